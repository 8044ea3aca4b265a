"""Speed and memory of ciql_pybullet.py on this machine: python tests/benchmark.py [--json FILE]

Steps a second, ratios and shares are medians over rounds in which the steps take turns, so that a machine whose speed
drifts is fair to all. The GEMM limit is the rate of the step's largest matrix product, by torch.mm (MKL) or by oneDNN,
whichever is faster, measured in the same rounds.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
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
from ciql_pybullet import CIQL, SAMPLES, Config, EvaluationPool, Transitions, read_transitions

S, A, B, H, K = 26, 6, 256, 256, 10  # the default job: HalfCheetah at the default settings
ENV = "HalfCheetahBulletEnv-v0"
SAMPLE = SAMPLES / "halfcheetah-bullet-medium-sample.hdf5"


def onednn_product(x, w):
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


class Textbook:
    """CIQL as people write it: an Adam a network, loops over parameters, .item(), numpy indices, no short cuts."""

    def __init__(self, data, alpha):
        def mlp(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, outputs))

        self.data, self.alpha = [column.numpy() for column in data], alpha
        self.q1, self.q2, self.v, self.pi = mlp(S + A, 1), mlp(S + A, 1), mlp(S, 1), mlp(S, A)
        self.log_std = nn.Parameter(torch.zeros(A))
        self.target1, self.target2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.q1_optimizer, self.q2_optimizer, self.v_optimizer, self.pi_optimizer = (
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (
                self.q1.parameters(), self.q2.parameters(), self.v.parameters(), [*self.pi.parameters(), self.log_std]
            )
        )  # fmt: skip

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
    """Floating-point operations of a step's matrix products, the penalty differentiated only when it is open."""

    def forward(rows, inputs, outputs=1):
        return 2 * rows * (inputs * H + H * H + H * outputs)

    def backward(rows, inputs, outputs=1):  # the gradients of the weights, and of all inputs but the network's own
        return forward(rows, inputs, outputs) + 2 * rows * (H * H + H * outputs)

    v = 2 * forward(B, S) + backward(B, S)
    q = 4 * forward(B, S + A) + 2 * backward(B, S + A)
    pi = forward(B, S, A) + backward(B, S, A)
    penalty = 2 * (backward(B * K, S + A) if is_open else 0) + 2 * forward(B * K, S + A)
    return v + q + pi + (penalty if alpha else 0)


def open_clamp_data(n=20_000):
    """Rewards grow with the size of actions and the data's are small: Q is higher off the data, the clamp open."""
    s, s_next = torch.randn(n, S), torch.randn(n, S)
    a = 0.5 * (torch.rand(n, A) * 2 - 1)
    return Transitions(s, a, 100 * (a**2).sum(1), s_next, torch.ones(n))


def steps_table(rounds, steps):
    """A row for each kind of step in each case. The kinds take turns, with matrix products between them."""
    sample, rows = read_transitions(SAMPLE), []
    for case, data, alpha in (("closed", sample, 1.0), ("open", open_clamp_data(), 1.0), ("alpha 0", sample, 0.0)):
        torch.manual_seed(0)
        agents = [CIQL(S, A, Config(device="cpu", alpha=alpha)) for _ in range(2)]
        ready = agents[0].prepare(Transitions(*(column.clone() for column in data)))
        compiled = agents[1].compiled_step(ready)
        work = flop(alpha, case == "open")
        kinds = {
            "textbook": (Textbook(ready, alpha).step, flop(alpha, True)),
            "eager": (functools.partial(agents[0].step, ready), work),
            "compiled": (functools.partial(compiled, ready), work),
        }
        left, right = torch.randn(B * K, H), torch.randn(H, H)  # the largest product of a step
        products = max(1, int(1e10 / (2 * B * K * H * H)))
        libraries = (
            {"torch.mm": torch.mm, "oneDNN": onednn_product}
            if torch.backends.mkldnn.is_available()
            else {"torch.mm": torch.mm}
        )
        times, opened = {kind: [] for kind in kinds}, []
        gemms = {library: [] for library in libraries}
        for step, _ in kinds.values():
            for _ in range(100):
                step()
        for _ in range(rounds):
            for kind, (step, _) in kinds.items():
                start = time.perf_counter()
                results = [step() for _ in range(steps)]
                times[kind].append((time.perf_counter() - start) / steps)
                opened += [float(r["clamp_open"]) for r in results if isinstance(r, dict)]
            for library, multiply in libraries.items():
                start = time.perf_counter()
                for _ in range(products):
                    multiply(left, right)
                gemms[library].append(products * 2 * B * K * H * H / (time.perf_counter() - start))
        gemm = max(gemms.values(), key=statistics.median)
        for kind, (_, work) in kinds.items():
            ratio = [base / own for base, own in zip(times["textbook"], times[kind], strict=True)]
            share = [work / own / rate for own, rate in zip(times[kind], gemm, strict=True)]
            rows.append(
                {
                    "step": kind,
                    "case": case,
                    "clamp_open": float(np.mean(opened)),
                    "gflop": work / 1e9,
                    "gemm_gflops": {library: statistics.median(rates) / 1e9 for library, rates in gemms.items()},
                    "steps_per_second": 1 / statistics.median(times[kind]),
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
    seconds = next(time.perf_counter() - start for line in process.stdout if line.startswith("step"))
    process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    return seconds, usage.ru_maxrss * 1024 / 1e9


def evaluation_times(rounds):
    """Seconds of 5 episodes, in one worker process and in one a core."""
    policy = CIQL(S, A, Config(device="cpu")).policy
    threads, times = torch.get_num_threads(), {1: [], torch.get_num_threads(): []}
    for workers, seconds in times.items():
        torch.set_num_threads(workers)
        with EvaluationPool(Config()) as pool, contextlib.redirect_stdout(io.StringIO()):
            pool.play(policy, 0)
            for step in range(1, rounds + 1):
                start = time.perf_counter()
                pool.play(policy, step)
                seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {f"{workers} worker{'s' * (workers > 1)}": statistics.median(values) for workers, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="of each variant a round")
    arguments = parser.parse_args()

    rows = steps_table(arguments.rounds, arguments.steps)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| case (clamp open) | step | steps/s | times textbook | GFLOP a step | share of GEMM limit |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} ({row['clamp_open']:.0%}) | {row['step']} | {row['steps_per_second']:.0f}"
            f" | {row['times_textbook']:.2f} | {row['gflop']:.2f}"
            f" | {row['share_of_gemm']:.0%} of {max(row['gemm_gflops'].values()):.0f} GFLOP/s |"
        )
    for library, rate in rows[0]["gemm_gflops"].items():
        print(f"\n{library}: {rate:.0f} GFLOP/s")
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
    } | {f"evaluation of 5 episodes, {name}, s": value for name, value in evaluation_times(3).items()}
    print("\n| | |\n|---|---|")
    for name, value in others.items():
        print(f"| {name} | {value:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": rows, "others": others}, indent=2))


if __name__ == "__main__":
    main()
