"""Speed of ciql_pybullet.py on this machine: python tests/benchmark.py [--rounds N] [--steps N]

Steps per second and ratios are medians over rounds in which the kinds of step take turns, so that a
machine whose speed drifts is fair to all. Each round is then taken again beside a process that
computes all the time.
"""

import argparse
import contextlib
import copy
import functools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ciql_pybullet import CIQL, SAMPLES, Config, read_dataset

# The default job: HalfCheetah at the default settings.
S = 26
A = 6
B = 256
H = 256
K = 10
SAMPLE = SAMPLES / "halfcheetah-bullet-medium-sample.hdf5"


class Textbook:
    """CIQL as people write it: an Adam per network, loops, .item(), numpy indices, no tricks."""

    def __init__(self, data, alpha):
        self.data = [column.numpy() for column in data]
        self.alpha = alpha
        self.log_std = nn.Parameter(torch.zeros(A))
        self.q1, self.q1_optimizer = self.network(S + A, 1)
        self.q2, self.q2_optimizer = self.network(S + A, 1)
        self.v, self.v_optimizer = self.network(S, 1)
        self.pi, self.pi_optimizer = self.network(S, A, self.log_std)
        self.target1 = copy.deepcopy(self.q1)
        self.target2 = copy.deepcopy(self.q2)

    @staticmethod
    def network(inputs, outputs, *more):
        hidden = [nn.Linear(inputs, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU()]
        layers = nn.Sequential(*hidden, nn.Linear(H, outputs))
        return layers, torch.optim.Adam([*layers.parameters(), *more], lr=3e-4)

    @staticmethod
    def minimize(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

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


KINDS = {  # of step: settings, None for the textbook's
    "textbook": None,
    "eager": {"threads": 2, "compile": False},
    "**compiled** (default)": {"threads": 2},
    "compiled, one thread": {"threads": 1},
}


def serve_steps(connection, alpha, settings):
    """In a process of its own: take as many steps as it is told, and answer with their time."""
    torch.manual_seed(0)
    config = Config(device="cpu", alpha=alpha, **settings or {"threads": 2})
    torch.set_num_threads(config.threads)
    agent = CIQL(S, A, config)
    data = agent.prepare(read_dataset(SAMPLE).transitions)
    step = functools.partial(agent.update, data)
    if settings is None:
        step = Textbook(data, alpha).step
    elif config.compile:
        agent.accelerate(data)
    while True:
        count = connection.recv()
        start = time.perf_counter()
        for _ in range(count):
            step()
        connection.send((time.perf_counter() - start) / count)


def start_kind(stack, alpha, settings):
    """A process that takes steps: a function of their number, which gives seconds per step."""
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve_steps, args=(other, alpha, settings), daemon=True)
    process.start()
    stack.callback(process.kill)

    def steps(count):
        own.send(count)
        return own.recv()

    steps(30)
    return steps


@contextlib.contextmanager
def busy_process():
    """Context beside one process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def processor():
    """Its name, where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="of each kind per round")
    arguments = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}", end=", ")
    print(f"Python {platform.python_version()}\n")
    print("| α | step | steps/s | beside one busy process | times textbook |")
    print("|---|---|---|---|---|")
    for alpha in (1.0, 0.0):
        with contextlib.ExitStack() as stack:
            kinds = {name: start_kind(stack, alpha, own) for name, own in KINDS.items()}
            idle = {name: [] for name in kinds}
            busy = {name: [] for name in kinds}
            for _ in range(arguments.rounds):
                for name, steps in kinds.items():
                    idle[name].append(steps(arguments.steps))
                with busy_process():
                    for name, steps in kinds.items():
                        busy[name].append(steps(arguments.steps))
        for name in kinds:
            ratios = [base / own for base, own in zip(idle["textbook"], idle[name], strict=True)]
            rates = [1 / statistics.median(seconds[name]) for seconds in (idle, busy)]
            cells = f"{rates[0]:.0f} | {rates[1]:.0f} | {statistics.median(ratios):.2f}"
            print(f"| {alpha:g} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
