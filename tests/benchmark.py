"""Steps per second of ciql_pybullet.py here, beside CIQL as people write it: medians of rounds."""

import copy
import functools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ciql_pybullet import CIQL, SAMPLES, Config, mlp, read_dataset

S = 26  # the default job's sizes
A = 6
B = 256
K = 10
ROUNDS = 5
STEPS = 60  # of each kind per round


def optimized(inputs, outputs, *more):
    """A network, and an Adam of its own."""
    network = mlp(inputs, 256, 256, outputs)
    return network, torch.optim.Adam([*network.parameters(), *more], lr=3e-4)


def minimize(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()


class Textbook:
    """CIQL with an Adam per network, loops, .item(), NumPy's indices, no tricks."""

    def __init__(self, data, alpha):
        self.data = [column.numpy() for column in data]
        self.alpha = alpha
        self.log_std = nn.Parameter(torch.zeros(A))
        self.critics = [optimized(S + A, 1) for _ in range(2)]
        self.targets = [copy.deepcopy(q) for q, _ in self.critics]
        self.v, self.v_optimizer = optimized(S, 1)
        self.pi, self.pi_optimizer = optimized(S, A, self.log_std)

    def step(self):
        index = np.random.randint(len(self.data[2]), size=B)
        s, a, r, s_next, d = (torch.FloatTensor(column[index]) for column in self.data)
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            q_bar = torch.min(*(target(sa) for target in self.targets)).squeeze(1)
            y = r + 0.99 * (1 - d) * self.v(s_next).squeeze(1)
        diff = q_bar - self.v(s).squeeze(1)
        weights = diff.detach().clamp(min=0).exp().clamp(max=100.0)
        minimize(self.v_optimizer, (torch.where(diff < 0, 0.2, 0.8) * diff**2).mean())

        negatives = torch.cat([s.repeat_interleave(K, 0), torch.rand(B * K, A) * 2 - 1], 1)
        for (q, optimizer), target in zip(self.critics, self.targets, strict=True):
            q_data = q(sa).squeeze(1)
            loss = F.mse_loss(q_data, y)
            if self.alpha:
                loss = loss + self.alpha * F.relu(q(negatives).mean() - q_data.mean())
            minimize(optimizer, loss)
            for p, p_target in zip(q.parameters(), target.parameters(), strict=True):
                p_target.data.copy_(0.995 * p_target.data + 0.005 * p.data)

        policy = torch.distributions.Normal(torch.tanh(self.pi(s)), self.log_std.exp())
        minimize(self.pi_optimizer, -(weights * policy.log_prob(a).sum(1)).mean())


def main():
    """The kinds of step take turns, so that a drifting machine is fair to all."""
    transitions = read_dataset(SAMPLES / "halfcheetah-bullet-medium-sample.hdf5").transitions
    print("| threads | α | textbook | eager | compiled | compiled / textbook |")
    print("|---|---|---|---|---|---|")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for alpha in (1.0, 0.0):
            eager = CIQL(S, A, Config(device="cpu", alpha=alpha))
            data = eager.prepare(transitions)
            compiled = copy.deepcopy(eager)
            compiled.accelerate(data)
            kinds = [Textbook(data, alpha).step]
            kinds += [functools.partial(agent.update, data) for agent in (eager, compiled)]
            seconds = [[] for _ in kinds]
            for _ in range(ROUNDS + 1):
                for step, own in zip(kinds, seconds, strict=True):
                    start = time.perf_counter()
                    for _ in range(STEPS):
                        step()
                    own.append((time.perf_counter() - start) / STEPS)
            rates = [1 / statistics.median(own[1:]) for own in seconds]  # the first is to warm up
            cells = " | ".join(f"{rate:.0f}" for rate in rates)
            print(f"| {threads} | {alpha:g} | {cells} | {rates[2] / rates[0]:.2f} |")


if __name__ == "__main__":
    main()
