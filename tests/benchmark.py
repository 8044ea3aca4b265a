"""Speed and memory of ciql_pybullet.py on this machine: python tests/benchmark.py [--json FILE]

Steps per second, ratios and shares are medians over rounds in which the steps take turns, so that a
machine whose speed drifts is fair to all. Each round is then taken again beside a process that
computes all the time. The GEMM limit is the rate of the step's largest matrix product, by torch.mm
(MKL) or by oneDNN, whichever is faster, measured in the same rounds.
"""

import argparse
import contextlib
import copy
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ciql_pybullet import (
    CIQL,
    SAMPLES,
    Config,
    EvaluationPool,
    Transitions,
    read_transitions,
    thread_pool,
    torch_settings,
)

S, A, B, H, K = 26, 6, 256, 256, 10  # the default job: HalfCheetah at the default settings
ENV = "HalfCheetahBulletEnv-v0"
SAMPLE = SAMPLES / "halfcheetah-bullet-medium-sample.hdf5"


def onednn_product(x, w):
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


class Textbook:
    """CIQL as people write it: an Adam per network, loops, .item(), numpy indices, no tricks."""

    def __init__(self, data, alpha):
        def mlp(inputs, outputs):
            return nn.Sequential(
                nn.Linear(inputs, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, outputs)
            )

        self.data, self.alpha = [column.numpy() for column in data], alpha
        self.q1, self.q2, self.v, self.pi = mlp(S + A, 1), mlp(S + A, 1), mlp(S, 1), mlp(S, A)
        self.log_std = nn.Parameter(torch.zeros(A))
        self.target1, self.target2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.q1_optimizer = torch.optim.Adam(self.q1.parameters(), lr=3e-4)
        self.q2_optimizer = torch.optim.Adam(self.q2.parameters(), lr=3e-4)
        self.v_optimizer = torch.optim.Adam(self.v.parameters(), lr=3e-4)
        self.pi_optimizer = torch.optim.Adam([*self.pi.parameters(), self.log_std], lr=3e-4)

    def step(self):
        index = np.random.randint(len(self.data[2]), size=B)
        s, a, r, s_next, d = (torch.FloatTensor(column[index]) for column in self.data)
        with torch.no_grad():
            sa = torch.cat([s, a], 1)
            q_bar = torch.min(self.target1(sa), self.target2(sa)).squeeze(1)
        diff = q_bar - self.v(s).squeeze(1)
        v_loss = (torch.where(diff < 0, 0.2, 0.8) * diff**2).mean()
        self.minimize(self.v_optimizer, v_loss)

        with torch.no_grad():
            y = r + 0.99 * (1 - d) * self.v(s_next).squeeze(1)
        negatives = torch.rand(B * K, A) * 2 - 1
        s_negatives = torch.cat([s.repeat_interleave(K, 0), negatives], 1)
        q_losses = []
        for q, optimizer in ((self.q1, self.q1_optimizer), (self.q2, self.q2_optimizer)):
            q_data = q(torch.cat([s, a], 1)).squeeze(1)
            loss = F.mse_loss(q_data, y)
            if self.alpha:
                loss = loss + self.alpha * F.relu(q(s_negatives).mean() - q_data.mean())
            self.minimize(optimizer, loss)
            q_losses.append(loss.item())

        with torch.no_grad():
            adv = (q_bar - self.v(s).squeeze(1)).clamp(min=0)
            weights = adv.exp().clamp(max=100.0)
        policy = torch.distributions.Normal(torch.tanh(self.pi(s)), self.log_std.exp())
        pi_loss = -(weights * policy.log_prob(a).sum(1)).mean()
        self.minimize(self.pi_optimizer, pi_loss)
        for q, target in ((self.q1, self.target1), (self.q2, self.target2)):
            for p, p_target in zip(q.parameters(), target.parameters(), strict=True):
                p_target.data.copy_(0.995 * p_target.data + 0.005 * p.data)
        return v_loss.item(), q_losses, pi_loss.item()

    @staticmethod
    def minimize(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def flop(alpha, is_open):
    """Floating-point operations of a step's products; the penalty is differentiated when open."""

    def forward(rows, inputs, outputs=1):
        return 2 * rows * (inputs * H + H * H + H * outputs)

    def backward(rows, inputs, outputs=1):  # of the weights, and of all inputs but the first
        return forward(rows, inputs, outputs) + 2 * rows * (H * H + H * outputs)

    v = 2 * forward(B, S) + backward(B, S)
    q = 4 * forward(B, S + A) + 2 * backward(B, S + A)
    pi = forward(B, S, A) + backward(B, S, A)
    penalty = 2 * (backward(B * K, S + A) if is_open else 0) + 2 * forward(B * K, S + A)
    return v + q + pi + (penalty if alpha else 0)


def open_clamp_data(n=20_000):
    """Rewards grow with the size of actions, the data's are small: Q is higher off the data."""
    s, s_next = torch.randn(n, S), torch.randn(n, S)
    a = 0.5 * (torch.rand(n, A) * 2 - 1)
    return Transitions(s, a, 100 * (a**2).sum(1), s_next, torch.ones(n))


@contextlib.contextmanager
def busy_process():
    """Context beside one process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def data_of(case):
    """The transitions of a case, and alpha."""
    if case == "open":
        return open_clamp_data(), 1.0
    return read_transitions(SAMPLE), 0.0 if case == "alpha 0" else 1.0


def serve_steps(connection, case, settings):
    """In a process of its own: take as many steps as it is told, and answer with their time."""
    torch.manual_seed(0)
    data, alpha = data_of(case)
    ready = CIQL(S, A, Config(device="cpu")).prepare(data)
    with contextlib.ExitStack() as stack:
        if settings is None:
            step = Textbook(ready, alpha).step
        else:
            config = Config(device="cpu", alpha=alpha, **settings)
            threads = stack.enter_context(torch_settings(config))
            agent = CIQL(S, A, config)
            agent.map = stack.enter_context(thread_pool(threads)).map
            if config.compile:
                agent.compile(ready)
            step = functools.partial(agent.update, ready)
        while True:
            count = connection.recv()
            start = time.perf_counter()
            results = [step() for _ in range(count)]
            seconds = (time.perf_counter() - start) / count
            opened = [float(r["clamp_open"]) for r in results if isinstance(r, dict)]
            connection.send((seconds, float(np.mean(opened)) if opened else 0.0))


def kinds_of(case, parts):
    """The steps to time: name -> settings, None for the textbook's."""
    kinds = {
        "textbook": None,
        "eager": {"compile": False},
        "**compiled** (default)": {},
        "compiled, one thread": {"threads": 1},
    }
    for other in parts:
        kinds[f"compiled, {other} parts"] = {"batch_parts": other}
        kinds[f"compiled, {other} parts, one thread"] = {"batch_parts": other, "threads": 1}
    if case != "open":
        kinds["compiled, medium precision"] = {"matmul_precision": "medium"}
    return kinds


def start_kind(stack, case, settings):
    """A process that takes steps: a function of their number, with their time and share of open."""
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve_steps, args=(other, case, settings), daemon=True)
    process.start()
    stack.callback(process.kill)

    def steps(count):
        own.send(count)
        return own.recv()

    steps(30)
    return steps


def gemm_rate(multiply, left, right, products=40):
    """Floating-point operations per second of a product."""
    start = time.perf_counter()
    for _ in range(products):
        multiply(left, right)
    return products * 2 * B * K * H * H / (time.perf_counter() - start)


def steps_table(rounds, steps, parts, cases):
    """A row for each kind of step in each case. The kinds take turns, products between them."""
    left, right = torch.randn(B * K, H), torch.randn(H, H)  # the largest product of a step
    libraries = {"torch.mm": torch.mm}
    if torch.backends.mkldnn.is_available():
        libraries["oneDNN"] = onednn_product
    rows = []
    for case in cases:
        alpha = 0.0 if case == "alpha 0" else 1.0
        with contextlib.ExitStack() as stack:
            kinds = {}
            for name, settings in kinds_of(case, parts).items():
                kinds[name] = start_kind(stack, case, settings)
            idle = {name: [] for name in kinds}
            busy = {name: [] for name in kinds}
            gemms = {library: [] for library in libraries}
            opened = []
            for _ in range(rounds):
                for name, kind in kinds.items():
                    seconds, share = kind(steps)
                    idle[name].append(seconds)
                    if name != "textbook":
                        opened.append(share)
                for library, multiply in libraries.items():
                    gemms[library].append(gemm_rate(multiply, left, right))
                with busy_process():
                    for name, kind in kinds.items():
                        busy[name].append(kind(steps)[0])
        gemm = max(gemms.values(), key=statistics.median)
        for name in kinds:
            work = flop(alpha, name == "textbook" or case == "open")
            ratio = [base / own for base, own in zip(idle["textbook"], idle[name], strict=True)]
            share = [work / own / rate for own, rate in zip(idle[name], gemm, strict=True)]
            rows.append(
                {
                    "step": name,
                    "case": case,
                    "clamp_open": float(np.mean(opened)),
                    "gflop": work / 1e9,
                    "gemm_gflops": {
                        library: statistics.median(rates) / 1e9 for library, rates in gemms.items()
                    },
                    "steps_per_second": 1 / statistics.median(idle[name]),
                    "busy_steps_per_second": 1 / statistics.median(busy[name]),
                    "times_textbook": statistics.median(ratio),
                    "share_of_gemm": statistics.median(share),
                }
            )
    return rows


def write_million(path):
    """A million rows of HalfCheetah's shape, in whole episodes."""
    rng = np.random.default_rng(0)
    rows = 999 * 1001
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, S)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, A)).astype(np.float32)
        file["rewards"] = rng.normal(size=(rows, 1)).astype(np.float32)
        terminals = np.zeros((rows, 1), np.float32)
        terminals[1000::1001] = 1
        file["terminals"] = terminals
        file["actions"][1000::1001] = 0
        file["rewards"][::1001] = 0


def first_step(folder, *flags):
    """Seconds from process start to the first step's line, and the process's peak memory in GB."""
    command = [
        sys.executable,
        ROOT / "ciql_pybullet.py",
        "--max-steps",
        "1",
        "--log-interval",
        "1",
        "--eval-episodes",
        "1",
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *flags], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    seconds = next(
        time.perf_counter() - start for line in process.stdout if line.startswith("step")
    )
    process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    return seconds, usage.ru_maxrss * 1024 / 1e9


def evaluation_times(rounds):
    """Seconds of 5 episodes, in one worker process and in one per core."""
    policy = CIQL(S, A, Config(device="cpu")).policy
    times = {}
    for workers in sorted({1, torch.get_num_threads()}):
        with contextlib.closing(EvaluationPool(ENV, workers)) as pool:
            pool.play(policy, range(5))
            seconds = []
            for n in range(rounds):
                start = time.perf_counter()
                pool.play(policy, range(5 * n, 5 * n + 5))
                seconds.append(time.perf_counter() - start)
        times[f"{workers} worker{'s' * (workers > 1)}"] = statistics.median(seconds)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="of each kind per round")
    parser.add_argument("--parts", type=int, nargs="+", default=[], help="also these batch_parts")
    cases = ["closed", "open", "alpha 0"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--steps-only", action="store_true", help="no loading, start, evaluation")
    arguments = parser.parse_args()

    rows = steps_table(arguments.rounds, arguments.steps, arguments.parts, arguments.cases)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        "| case (clamp open) | step | steps/s | beside one busy process | times textbook"
        " | GFLOP per step | share of GEMM limit |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} ({row['clamp_open']:.0%}) | {row['step']}"
            f" | {row['steps_per_second']:.0f} | {row['busy_steps_per_second']:.0f}"
            f" | {row['times_textbook']:.2f} | {row['gflop']:.2f}"
            f" | {row['share_of_gemm']:.0%} of {max(row['gemm_gflops'].values()):.0f} GFLOP/s |"
        )
    for library, rate in rows[0]["gemm_gflops"].items():
        print(f"\n{library}: {rate:.0f} GFLOP/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.steps_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        million = Path(folder) / "million.hdf5"
        write_million(million)
        loads = []
        for _ in range(3):
            start = time.perf_counter()
            read_transitions(million)
            loads.append(time.perf_counter() - start)
        own_file = ("--dataset", str(million), "--env-id", ENV)
        eager, _ = first_step(folder, "--dataset", str(SAMPLE), "--env-id", ENV, "--no-compile")
        compiled, _ = first_step(folder, "--dataset", str(SAMPLE), "--env-id", ENV)
        _, peak = first_step(folder, *own_file)
    others = {
        "load a million rows, s": statistics.median(loads),
        "peak memory with a million rows, GB": peak,
        "process start to first step, eager, s": eager,
        "process start to first step, compiled before on this machine, s": compiled,
    } | {
        f"evaluation of 5 episodes, {name}, s": value for name, value in evaluation_times(3).items()
    }
    print("\n| | |\n|---|---|")
    for name, value in others.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
