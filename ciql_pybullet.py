"""Conservative Implicit Q-Learning (CIQL), trained offline on the PyBullet D4RL data sets.

CIQL is Implicit Q-Learning plus a clamped conservative penalty. With Q̄ = min(Q1, Q2) of the target critic,
three losses are minimised on a logged data set:

    V   diff = Q̄(s,a) − V(s)             loss = |τ − 1(diff<0)| · diff²
    Q   y = r + γ V(s')                    loss = (Q(s,a) − y)² + α · ReLU(E_ā Q(s,ā) − E_a Q(s,a))
    π   adv = max(0, Q̄(s,a) − V(s))      loss = −exp(β · adv) · log π(a|s)

y does not bootstrap after a true termination; ā are num_neg actions a state, drawn uniformly from the action box.

Usage:
    python ciql_pybullet.py                                      the settings below
    python ciql_pybullet.py --dataset hopper-bullet-mixed-v0 --seed 3
    python ciql_pybullet.py --seeds 0 1 2 3 4                    a study: many runs, side by side, summarised
    python ciql_pybullet.py --help                               every setting

References:
    Kostrikov et al., Offline Reinforcement Learning with Implicit Q-Learning, 2021 (arXiv 2110.06169)
    Kumar et al., Conservative Q-Learning for Offline Reinforcement Learning, 2020 (arXiv 2006.04779)
    Fu et al., D4RL: Datasets for Deep Data-Driven Reinforcement Learning, 2020 (arXiv 2004.07219)
    d4rl-pybullet, the data sets (github.com/takuseno/d4rl-pybullet)
"""

import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from tqdm import tqdm


def say(line: str) -> None:
    """Print one line of the log on stdout, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


class InputError(ValueError):
    """A bad setting, file or network; its message is one line that names the cause and the remedy."""


# ------------------------------------------------------------------------------------------------ settings


@dataclasses.dataclass(frozen=True)
class Config:
    """CIQL on the PyBullet D4RL data sets. Every setting below is also a flag: --max-steps 20000."""

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of the 12 ids, or the path of an .hdf5 file (with env_id)
    env_id: str | None = None  # gymnasium environment of the data; known for the 12 ids
    seed: int = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL
    gamma: float = 0.99  # discount
    tau: float = 0.8  # expectile of V; 0.5 is the mean, towards 1 the best action in the data
    beta: float = 1.0  # inverse temperature of the policy weights; 0 gives behaviour cloning
    alpha: float = 1.0  # weight of the conservative penalty; 0 gives IQL
    num_neg: int = 10  # off-data actions a state in the penalty
    polyak: float = 0.005  # share of the critic that moves into the target critic each step
    max_weight: float = 100.0  # cap of the policy weights exp(beta * adv)
    # Networks
    hidden_sizes: tuple[int, ...] = (256, 256)  # ReLU layers of every network
    min_log_std: float = -5.0  # floor of the policy's log standard deviation
    # Schedule
    lr: float = 3e-4  # Adam's learning rate, for all networks
    batch_size: int = 256  # transitions a gradient step
    max_steps: int = 500_000  # gradient steps
    log_interval: int = 1_000  # gradient steps between lines of losses
    eval_interval: int = 5_000  # gradient steps between evaluations
    eval_episodes: int = 5  # episodes an evaluation
    # Machine and output
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one
    threads: int = 0  # CPU threads; 0 takes a core each, in a study through Ray one
    compile: bool = True  # compile the gradient step (about 30 s at the start, needs a C++ compiler)
    plot: Path = Path("eval_returns.png")  # picture of the evaluation returns
    out_dir: Path = Path("runs")  # every run makes a folder in here: settings, metrics, checkpoint
    wandb_project: str | None = None  # also log to this Weights & Biases project (needs: pip install wandb)
    film: bool = False  # film an episode of the final policy, or of the evaluated one: policy.gif in the run folder
    resume: Path | None = None  # go on from the checkpoint in this run folder, with its settings
    evaluate: Path | None = None  # train nothing: play eval_episodes episodes of the policy in this run folder
    # Study: every data set with every seed, through Ray where it is installed
    seeds: tuple[int, ...] = ()  # several make a study; none: the one in seed
    datasets: tuple[str, ...] = ()  # several make a study; none: the one in dataset
    study: Path | None = None  # folder of the study; the same command again skips what is complete and resumes the rest
    ray_address: str | None = None  # of a Ray cluster, auto or HOST:PORT; none: this machine
    gpu_share: float = 0.25  # of a GPU that a run takes in a study, where there is one

    def __post_init__(self) -> None:
        positive, inf = "a whole number of at least 1", math.inf
        several = len(self.seeds) > 1 or len(self.datasets) > 1
        rules: dict[str, tuple[bool, str]] = {
            "seed": (0 <= self.seed < 2**32, "a whole number from 0 to 4294967295"),
            "gamma": (0 <= self.gamma <= 1, "in [0, 1]"),
            "tau": (0 < self.tau < 1, "in (0, 1)"),
            "beta": (0 <= self.beta < inf, "at least 0"),
            "alpha": (0 <= self.alpha < inf, "at least 0"),
            "num_neg": (self.num_neg >= (self.alpha > 0), "at least 1 while alpha > 0"),
            "polyak": (0 < self.polyak <= 1, "in (0, 1]"),
            "max_weight": (1 <= self.max_weight < inf, "at least 1"),
            "hidden_sizes": (len(self.hidden_sizes) > 0 and min(self.hidden_sizes) >= 1, "one or more positive sizes"),
            "min_log_std": (-20 <= self.min_log_std <= 0, "in [-20, 0]"),
            "lr": (0 < self.lr < inf, "greater than 0"),
            "batch_size": (self.batch_size >= 1, positive),
            "max_steps": (self.max_steps >= 1, positive),
            "log_interval": (self.log_interval >= 1, positive),
            "eval_interval": (self.eval_interval >= 1, positive),
            "eval_episodes": (self.eval_episodes >= 1, positive),
            "threads": (self.threads >= 0, "0 or a whole number of threads"),
            "seeds": (len(set(self.seeds)) == len(self.seeds), "all different"),
            "datasets": (len({Path(d).stem for d in self.datasets}) == len(self.datasets), "all of different names"),
            "study": (not (self.study and (self.resume or self.evaluate)), "left out with resume and evaluate"),
            "resume": (not (self.resume and several), "left out with several seeds or data sets; use study"),
            "evaluate": (not (self.evaluate and several), "left out with several seeds or data sets"),
            "gpu_share": (0 < self.gpu_share <= 1, "in (0, 1]"),
        }
        for name, (valid, requirement) in rules.items():
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)}, but must be {requirement}")
        if self.dataset not in DOWNLOAD_URLS:
            if Path(self.dataset).suffix not in (".hdf5", ".h5"):
                near = difflib.get_close_matches(self.dataset, DOWNLOAD_URLS, n=3, cutoff=0.3) or DOWNLOAD_URLS
                raise InputError(
                    f"dataset is {self.dataset}, but must be an .hdf5 file or an id like {', '.join(near)}"
                )
            if not self.env_id:
                raise InputError(
                    f"env_id is not set, but must name the environment that {self.dataset} was recorded in"
                )

    @property
    def environment(self) -> str:
        """The id of the environment to evaluate in."""
        return self.env_id or ROBOTS[self.dataset.split("-")[0]].env_id

    @property
    def robot(self) -> "Robot | None":
        """What is known of the environment, if it is one of the four robots'."""
        return next((robot for robot in ROBOTS.values() if robot.env_id == self.environment), None)


# ---------------------------------------------------------------------------------------------------- data


class Transitions(NamedTuple):
    """N transitions, float32."""

    observations: Tensor  # (N, observation_dim)
    actions: Tensor  # (N, action_dim), in [-1, 1]
    rewards: Tensor  # (N,)
    next_observations: Tensor  # (N, observation_dim)
    terminations: Tensor  # (N,), 1 where the episode truly ended, 0 where it went on or met the time limit


def read_transitions(
    path: str | Path, max_episode_steps: int = 1000, dims: tuple[int, int] | None = None
) -> Transitions:
    """Read the transitions of a d4rl-pybullet HDF5 file.

    Row i of the file holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the step
    before. So the transition that starts in row i takes its reward and its end from row i + 1. An episode of T steps
    closes with an extra row (last observation, zero action, terminal 1): T + 1 rows, of which the last starts no
    transition. Nor does the last row of a file cut in mid-episode. Terminal is 1 at the time limit as well: an
    episode of ``max_episode_steps`` steps was cut, not ended, and its last transition is no termination.

    Returns one row a transition, on the CPU. Raises InputError for a file that holds no usable data, or whose columns
    are not ``dims``, (observation_dim, action_dim), where that is given.
    Format: github.com/takuseno/d4rl-pybullet.
    """
    columns = read_columns(Path(path), dims)
    end_row = columns["terminals"] == 1
    start = np.flatnonzero(~end_row[:-1])
    end = np.flatnonzero(end_row)
    steps = np.diff(end, prepend=-1) - 1
    termination = np.zeros(len(end_row), np.float32)
    termination[end[steps < max_episode_steps]] = 1
    observations = columns["observations"]
    transitions = (
        observations[start],
        columns["actions"][start],
        columns["rewards"][start + 1],
        observations[start + 1],
        termination[start + 1],
    )
    return Transitions(*map(torch.from_numpy, transitions))


# ------------------------------------------------------------------------------------------------ networks


def mlp(inputs: int, hidden_sizes: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between: (B, inputs) -> (B, outputs)."""
    sizes = [inputs, *hidden_sizes, outputs]
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class ValueNetwork(nn.Module):
    """V(s)."""

    def __init__(self, observation_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.v = mlp(observation_dim, hidden_sizes, 1)

    def forward(self, observations: Tensor) -> Tensor:
        """(B, observation_dim) -> (B,)."""
        return self.v(observations).squeeze(-1)


class DoubleQNetwork(nn.Module):
    """Q1(s, a) and Q2(s, a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.dims = (observation_dim, action_dim)
        self.q1 = mlp(observation_dim + action_dim, hidden_sizes, 1)
        self.q2 = mlp(observation_dim + action_dim, hidden_sizes, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, observation_dim), (B, action_dim) -> two (B,)."""
        inputs = torch.cat([observations, actions], -1)
        return self.q1(inputs).squeeze(-1), self.q2(inputs).squeeze(-1)

    def many(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """K actions a state: (B, observation_dim), (B, K, action_dim) -> two (B, K).

        The first layer splits, W [s; a] = W_s s + W_a a: the state's part is computed once, not K times.
        """
        values = []
        for q in (self.q1, self.q2):
            first, rest = cast(nn.Linear, q[0]), q[1:]
            w_s, w_a = first.weight.split(self.dims, dim=1)
            hidden = F.linear(actions, w_a) + F.linear(observations, w_s, first.bias)[:, None]
            values.append(rest(hidden).squeeze(-1))
        return values[0], values[1]


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(μ(s)), σ²), with one σ an action dimension, as in IQL. It acts with its mean, tanh(μ(s))."""

    observation_mean: Tensor
    observation_std: Tensor

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.mu = mlp(observation_dim, hidden_sizes, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        # what the training data were normalised with, so that a policy acts on the simulator's own observations
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))

    def forward(self, observations: Tensor) -> Tensor:
        """Mean actions: normalised observations (B, observation_dim) -> (B, action_dim) in [-1, 1]."""
        return torch.tanh(self.mu(observations))

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s): (B, observation_dim), (B, action_dim) -> (B,)."""
        z = (actions - self(observations)) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """The mean action (action_dim,) for one observation (observation_dim,) as the environment gives it."""
        x = torch.as_tensor(observation, dtype=torch.float32, device=self.log_std.device)
        return self((x - self.observation_mean) / self.observation_std).cpu().numpy()


# -------------------------------------------------------------------------------------------------- losses


def expectile_loss(diff: Tensor, tau: float) -> Tensor:
    """mean of |τ − 1(diff<0)| · diff²: (B,) -> (). IQL, equation 5, with diff = Q̄(s,a) − V(s)."""
    return (torch.where(diff < 0, 1 - tau, tau) * diff**2).mean()


def conservative_penalty(q_neg: Tensor, q_data: Tensor) -> Tensor:
    """ReLU(E_ā Q(s,ā) − E_a Q(s,a)): (B, K), (B,) -> (), of one critic. CQL's gap, clamped at zero."""
    return F.relu(q_neg.mean() - q_data.mean())


def awr_weights(advantage: Tensor, beta: float, max_weight: float) -> Tensor:
    """min(exp(β · max(0, A)), max_weight): (B,) -> (B,), with A = Q̄(s,a) − V(s). IQL, equation 7, clamped."""
    return torch.exp(beta * advantage.clamp(min=0)).clamp(max=max_weight)


# --------------------------------------------------------------------------------------------------- agent


# what a step reports, each a mean over the batch
METRICS = ("value_loss", "q_loss", "policy_loss", "penalty", "q", "v", "advantage", "clamp_open", "policy_std")


class CIQL:
    """Conservative Implicit Q-Learning: the networks, their one optimiser, and the gradient step."""

    NETWORKS = ("policy", "value", "critic", "target_critic")
    ADAM = ("exp_avgs", "exp_avg_sqs", "adam_steps")

    def __init__(self, observation_dim: int, action_dim: int, config: Config) -> None:
        self.config = config
        self.device = find_device(config.device)
        self.on_cpu = self.device.type == "cpu"
        sizes = config.hidden_sizes
        self.policy = GaussianPolicy(observation_dim, action_dim, sizes).to(self.device)
        self.value = ValueNetwork(observation_dim, sizes).to(self.device)
        self.critic = DoubleQNetwork(observation_dim, action_dim, sizes).to(self.device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.parameters: list[Tensor] = [p for net in (self.policy, self.value, self.critic) for p in net.parameters()]
        self.exp_avgs = [torch.zeros_like(p) for p in self.parameters]  # Adam's state
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.parameters]
        self.adam_steps = [torch.zeros((), device=self.device) for _ in self.parameters]
        self.clamp_open = False  # was it at the last step?

    def describe(self) -> str:
        where = f"{torch.get_num_threads()} threads" if self.on_cpu else torch.cuda.get_device_name(self.device)
        compiling = ", compiling the step" if self.config.compile else ""
        return f"{self.device.type} ({where}), {sum(p.numel() for p in self.parameters):,} parameters{compiling}"

    def prepare(self, data: Transitions) -> Transitions:
        """Normalise the observations (in place), tell the policy how, and move the data to the device."""
        std, mean = torch.std_mean(data.observations, 0)
        std += 1e-3
        self.policy.observation_mean.copy_(mean)
        self.policy.observation_std.copy_(std)
        for observations in (data.observations, data.next_observations):
            observations.sub_(mean).div_(std)
        return Transitions(*(column.to(self.device) for column in data))

    def losses(
        self, batch: Transitions, negative_actions: Tensor, open_clamp: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the three losses, and each with the figures worth a log line. All scalars.

        With ``open_clamp`` false the penalty enters as a number without a gradient.
        """
        c, (s, a, r, s_next, terminated) = self.config, batch
        with torch.no_grad():
            q_bar = torch.minimum(*self.target_critic(s, a))
            y = r + c.gamma * (1 - terminated) * self.value(s_next)

        v = self.value(s)
        value_loss = expectile_loss(q_bar - v, c.tau)

        q1, q2 = self.critic(s, a)
        penalty = torch.zeros_like(value_loss)
        if c.alpha > 0:
            with torch.set_grad_enabled(open_clamp):
                neg1, neg2 = self.critic.many(s, negative_actions)
                penalty = conservative_penalty(neg1, q1) + conservative_penalty(neg2, q2)
        q_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean() + c.alpha * penalty

        advantage = (q_bar - v).detach()
        weights = awr_weights(advantage, c.beta, c.max_weight)
        policy_loss = -(weights * self.policy.log_prob(s, a)).mean()

        metrics = {
            "value_loss": value_loss,
            "q_loss": q_loss,
            "policy_loss": policy_loss,
            "penalty": penalty,
            "q": (q1.mean() + q2.mean()) / 2,
            "v": v.mean(),
            "advantage": advantage.mean(),
            "clamp_open": (penalty > 0).float(),
            "policy_std": self.policy.log_std.exp().mean(),
        }
        return value_loss + q_loss + policy_loss, {name: metric.detach() for name, metric in metrics.items()}

    def gradients(
        self, batch: Transitions, negative_actions: Tensor, open_clamp: bool
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Gradients of ``losses`` for every parameter: one backward pass, as no loss reaches another's network."""
        loss, metrics = self.losses(batch, negative_actions, open_clamp)
        return torch.autograd.grad(loss, self.parameters), metrics

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One gradient step on B transitions (observations normalised); returns the losses, scalars on the device."""
        shape = (len(batch.actions), self.config.num_neg, batch.actions.shape[1])
        negative_actions = torch.rand(shape, device=self.device) * 2 - 1
        if self.on_cpu:
            # ReLU'(x) = 0 for x <= 0: with the clamp closed, leaving out the penalty's backward pass (over half of the
            # work) is exact. Start from what the last step found, and go again if an open clamp was taken for closed.
            gradients, metrics = self.gradients(batch, negative_actions, self.clamp_open)
            is_open = bool(metrics["penalty"] > 0)
            if is_open and not self.clamp_open:
                gradients, metrics = self.gradients(batch, negative_actions, True)
            self.clamp_open = is_open
        else:  # a branch would make the host wait for the device
            gradients, metrics = self.gradients(batch, negative_actions, True)
        self.apply(gradients)
        return metrics

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step of Adam over all parameters, then Polyak averaging of the target critic."""
        # Adam's fused kernel cannot be traced. A compiled CPU step calls it as it is: it beats what the compiler makes of
        # Adam. On CUDA the step must stay one graph.
        traced = torch.compiler.is_compiling() and not self.on_cpu
        adam(
            self.parameters, list(gradients), self.exp_avgs, self.exp_avg_sqs, [], self.adam_steps,
            fused=not traced, foreach=traced, capturable=traced, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.999, lr=self.config.lr, weight_decay=0.0, eps=1e-8,
        )  # fmt: skip
        # The data's actions are often a function of the state, which drives σ to 0. A projection, not a clamp in the
        # likelihood: that would kill the gradient, and σ could not grow again.
        self.policy.log_std.clamp_(min=self.config.min_log_std)
        target: list[Tensor] = list(self.target_critic.parameters())
        online: list[Tensor] = list(self.critic.parameters())
        torch._foreach_lerp_(target, online, self.config.polyak)

    def step(self, data: Transitions) -> dict[str, Tensor]:
        """``update`` on a batch drawn from ``data``, which lies on the device."""
        index = torch.randint(len(data.rewards), (self.config.batch_size,), device=self.device)
        return self.update(Transitions(*(column[index] for column in data)))

    def compiled_step(self, data: Transitions) -> Callable[[Transitions], dict[str, Tensor]]:
        """``step`` under torch.compile; or as it is, with a line that says why, where that fails. Leaves no trace.

        On CUDA it is one graph. On the CPU it breaks at the branch on the clamp and at Adam's fused kernel.
        """
        torch.compiler.reset()  # an earlier run's graphs count towards the compiler's limit
        torch._dynamo.config.trace_autograd_ops = True  # the backward pass in the graph of the step
        torch._inductor.config.fallback_random = True  # the eager step's random numbers
        torch._logging.set_logs(dynamo=logging.ERROR)  # no warning that the branch on the clamp breaks the graph
        torch._inductor.config.cpp_wrapper = self.on_cpu  # no Python between the kernels
        step = torch.compile(self.step, fullgraph=not self.on_cpu)
        before = copy.deepcopy(self.state_dict())
        with torch.random.fork_rng():
            try:
                step(data)
            except Exception as error:  # noqa: BLE001  (any of the compiler's; a bug of ours comes up again eagerly)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"NOTE   the step could not be compiled and runs eagerly, slower: {reason}")
                step = self.step
        self.load_state_dict(before)
        return step

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random state."""
        return {
            **{name: getattr(self, name).state_dict() for name in self.NETWORKS},
            **{name: getattr(self, name) for name in self.ADAM},
            "clamp_open": self.clamp_open,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.ADAM:
            torch._foreach_copy_(getattr(self, name), state[name])
        self.clamp_open = state["clamp_open"]


# ---------------------------------------------------------------------------------------------- data files


class Robot(NamedTuple):
    """Environment of a data set, with the returns that make its score: random is 0, expert is 100."""

    env_id: str
    dims: tuple[int, int]  # of observations and actions
    random_return: float
    expert_return: float

    def score(self, episode_return: Any) -> Any:
        """D4RL's normalised score, 100 · (return − random) / (expert − random)."""
        return 100 * (episode_return - self.random_return) / (self.expert_return - self.random_return)

    def unscore(self, score: Any) -> Any:
        """The return of a normalised score."""
        return self.random_return + score / 100 * (self.expert_return - self.random_return)


# Random: published mean of the random set (ant: measured in today's simulator, the published 10.4 is of another
# dynamics). Expert: stable-baselines3's agents, d4rl-pybullet issue 2.
ROBOTS = {
    "halfcheetah": Robot("HalfCheetahBulletEnv-v0", (26, 6), -1304.0, 3000.0),
    "hopper": Robot("HopperBulletEnv-v0", (15, 3), 18.6, 2500.0),
    "walker2d": Robot("Walker2DBulletEnv-v0", (22, 6), 15.0, 2500.0),
    "ant": Robot("AntBulletEnv-v0", (28, 8), 432.0, 3300.0),
}
DOWNLOAD_URLS = {  # published by d4rl-pybullet
    f"{name}-v0": f"https://www.dropbox.com/s/{key}/{name}-v0.hdf5?dl=1"
    for name, key in {
        "halfcheetah-bullet-random": "jnvpb1hp60zt2ak",
        "halfcheetah-bullet-medium": "v4xgssp1w968a9l",
        "halfcheetah-bullet-mixed": "scj1rqun963aw90",
        "hopper-bullet-random": "bino8ojd7iq4p4d",
        "hopper-bullet-medium": "w22kgzldn6eng7j",
        "hopper-bullet-mixed": "xv3p0h7dzgxt8xb",
        "walker2d-bullet-random": "1gwcfl2nmx6878m",
        "walker2d-bullet-medium": "v0f2kz48b1hw6or",
        "walker2d-bullet-mixed": "i4u2ii0d85iblou",
        "ant-bullet-random": "2xpmh4wk2m7i8xh",
        "ant-bullet-medium": "6n79kwd94xthr1t",
        "ant-bullet-mixed": "pmy3dzab35g4whk",
    }.items()
}
SAMPLE_ID = "halfcheetah-bullet-medium-v0"
SAMPLE = Path(__file__).resolve().parent / "data" / "halfcheetah-bullet-medium-sample.hdf5"
NETWORK_TIMEOUT = 5.0  # seconds, to connect and between two pieces of a download


def read_columns(path: Path, dims: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """Read and check the four columns of a d4rl-pybullet HDF5 file, as stored: N rows, float32.

    Returns observations (N, observation_dim), actions (N, action_dim), rewards (N,) and terminals (N,). ``dims`` is
    (observation_dim, action_dim) of the environment that the data must fit.
    Raises InputError, naming file and key, for a file that cannot be read or holds no usable data.
    """
    columns: dict[str, np.ndarray] = {}
    try:
        with h5py.File(path) as file:
            for key in ("observations", "actions", "rewards", "terminals"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise InputError(f"{path}: the key '{key}' is missing; is it a d4rl-pybullet file?")
                columns[key] = file[key].astype(np.float32)[()]
    except InputError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as HDF5 numbers ({error}); is it a whole d4rl-pybullet file?"
        ) from error

    for key in ("rewards", "terminals"):  # stored as (N, 1) or (N,)
        if columns[key].ndim == 2 and columns[key].shape[1] == 1:
            columns[key] = columns[key][:, 0]
    shapes = {key: column.shape for key, column in columns.items()}
    rows = len(columns["observations"]) if columns["observations"].ndim else 0
    for key, ndim in {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}.items():
        if len(shapes[key]) != ndim or shapes[key][0] != rows:
            raise InputError(
                f"{path}: '{key}' has shape {shapes[key]}, which does not fit {rows} rows of {ndim} dimensions"
            )
        if not np.isfinite(columns[key]).all():
            raise InputError(f"{path}: '{key}' holds NaN or infinite values; remove those episodes")
    if dims and dims != (found := (shapes["observations"][1], shapes["actions"][1])):
        raise InputError(
            f"{path}: 'observations' and 'actions' have {found} columns, but the environment has {dims}; "
            "set env_id to the one they were recorded in"
        )
    if rows and np.abs(columns["actions"]).max(initial=0) > 1 + 1e-5:
        raise InputError(f"{path}: 'actions' reach outside [-1, 1]; rescale them to the action box")
    if not np.isin(columns["terminals"], (0, 1)).all():
        raise InputError(f"{path}: 'terminals' holds values other than 0 and 1; mark end rows with 1")
    if not (columns["terminals"][:-1] == 0).any():
        raise InputError(f"{path}: {rows} rows hold no complete transition; two rows of one episode are the least")
    return columns


def episode_returns(path: str | Path) -> np.ndarray:
    """Undiscounted returns (E,) of the whole episodes of a d4rl-pybullet HDF5 file."""
    with h5py.File(path) as file:
        rewards, terminals = (np.ravel(file[key][()]) for key in ("rewards", "terminals"))
    end = np.flatnonzero(terminals == 1)
    start = np.concatenate([[0], end[:-1] + 1])[: len(end)]
    total = np.cumsum(rewards, dtype=np.float64)
    return total[end] - total[start]  # the reward in an episode's first row belongs to no step of it


class DataSource(NamedTuple):
    """The file that a run learns from."""

    path: Path
    returns: np.ndarray  # of its whole episodes, (E,)
    checksum: int = 0  # CRC-32 of its actions and rewards

    def describe(self) -> str:
        if not len(self.returns):
            return "no whole episode"
        return f"{len(self.returns):,} episodes, mean return {self.returns.mean():.1f} ± {self.returns.std():.1f}"

    def title(self, config: Config) -> str:
        """The name of the data set in a picture."""
        return Path(config.dataset).stem + (" (embedded sample, not the published file)" if self.is_sample else "")

    @property
    def is_sample(self) -> bool:
        return self.path.name == SAMPLE.name


def load_data(config: Config, path: Path, dims: tuple[int, int], max_steps: int) -> tuple[Transitions, DataSource]:
    """Read ``path``, recorded in an environment of ``dims`` and time limit ``max_steps``, and print what it holds."""
    data = read_transitions(path, max_steps, dims)
    with h5py.File(path) as file:
        rows = len(file["rewards"])
    source = DataSource(
        path, episode_returns(path), zlib.crc32(data.rewards.numpy().data, zlib.crc32(data.actions.numpy().data))
    )
    say(f"data   {path}: {rows:,} rows, {source.describe()}")
    say(f"       {len(data.rewards):,} transitions, {int(data.terminations.sum()):,} of them terminations")
    if source.is_sample:
        say(f"NOTE   this is the embedded sample, a re-collection of 100 episodes, not the published {SAMPLE_ID}")
    if config.dataset in DOWNLOAD_URLS and config.dataset.startswith("ant-"):
        say(
            "NOTE   the published ant files were recorded under other dynamics than today's simulator (random: 10, today 432)"
        )
    return data, source


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``, a path or one of the 12 ids: from the cache, the network or the embedded sample.

    Raises InputError if there is none.
    """
    if dataset not in DOWNLOAD_URLS:
        return Path(dataset)
    cached = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / f"{dataset}.hdf5"
    if cached.exists():
        return cached
    try:
        download(DOWNLOAD_URLS[dataset], cached, ROBOTS[dataset.split("-")[0]].dims)
        return cached
    except InputError as error:
        if dataset == SAMPLE_ID and SAMPLE.exists():
            say(f"NOTE   {error}")
            return SAMPLE
        remedy = f"download {DOWNLOAD_URLS[dataset]} and put it at {cached}"
        raise InputError(f"no file for {dataset} ({error}); {remedy}") from error


def download(url: str, path: Path, dims: tuple[int, int]) -> None:
    """Fetch the data set at ``url`` into ``path``, which appears only once it is whole and fits ``dims``."""
    part = None
    try:
        with open_url(url) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", delete=False) as file:
                part = Path(file.name)
                size = int(response.headers.get("Content-Length") or 0)
                bar = tqdm(desc=path.name, total=size or None, unit="B", unit_scale=True, disable=None, leave=False)
                with bar:
                    while piece := response.read(1 << 20):
                        bar.update(file.write(piece))
                if size and file.tell() != size:
                    raise InputError(f"the download of {path.name} stopped after {file.tell():,} of {size:,} bytes")
                file.flush()
                os.fsync(file.fileno())
        read_columns(part, dims)
        os.replace(part, path)
    except InputError as error:
        raise InputError(str(error).replace(str(part), f"the download from {url}")) from error
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"cannot download {path.name}: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def open_url(url: str) -> Any:
    """Open ``url`` within NETWORK_TIMEOUT, looking up its host included, which urlopen's own time-out is not."""
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def connect() -> None:
        try:
            result.set_result(urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT))
        except Exception as error:  # noqa: BLE001  (raised again by result())
            result.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()  # no executor: that would be waited for at exit
    try:
        return result.result(2 * NETWORK_TIMEOUT - 1)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"no answer within {2 * NETWORK_TIMEOUT - 1:g} s") from error


# ---------------------------------------------------------------------------------------------- evaluation


def make_environment(env_id: str, render_mode: str | None = None) -> Any:
    """The gymnasium environment ``env_id``. Raises InputError if there is none of that name or it does not fit."""
    import gymnasium
    import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)

    try:
        env: Any = gymnasium.make(env_id, render_mode=render_mode)
    except gymnasium.error.Error as error:
        raise InputError(f"env_id is {env_id}, which gymnasium cannot make: {' '.join(str(error).split())}") from error
    space = env.action_space
    if not all(isinstance(box, gymnasium.spaces.Box) and len(box.shape) == 1 for box in (space, env.observation_space)):
        raise InputError(f"env_id is {env_id}, whose observations or actions are not vectors; CIQL needs vectors")
    if not (np.all(space.low == -1) and np.all(space.high == 1)):
        raise InputError(f"env_id is {env_id}, whose action box is not [-1, 1]; wrap it in gymnasium's RescaleAction")
    return env


def describe_environment(env_id: str) -> tuple[tuple[int, int], int]:
    """((observation_dim, action_dim), max_episode_steps) of ``env_id``."""
    env = make_environment(env_id)
    steps = env.spec.max_episode_steps or sys.maxsize
    env.close()
    return (env.observation_space.shape[0], env.action_space.shape[0]), steps


def play_episode(policy: bytes, env_id: str, seed: int) -> float:
    """The undiscounted return of one episode: a pure function of the (pickled) policy, environment and seed."""
    actor: GaussianPolicy = pickle.loads(policy)
    env = make_environment(env_id)  # afresh (20 ms), so that no episode depends on the ones before it
    env.reset(seed=seed)  # the first episode of an environment is off by a constant: reset and throw it away
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(actor.act(observation))
        total += float(reward)
        ended = terminated or truncated
    env.close()
    return total


def pickled(policy: GaussianPolicy) -> bytes:
    """A CPU copy of ``policy``, ready to be sent to a worker."""
    return pickle.dumps(copy.deepcopy(policy).cpu())


class EvaluationPool(concurrent.futures.ProcessPoolExecutor):
    """Worker processes for episodes, one core each. The simulator lives in them alone, and so does what it prints."""

    def __init__(self, env_id: str, episodes: int) -> None:
        workers = min(episodes, torch.get_num_threads())
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
        self.env_id = env_id

    def start(self) -> concurrent.futures.Future[tuple[tuple[int, int], int]]:
        """Start the workers, deaf to Ctrl-C from the first; what comes is the description of the environment."""
        if threading.current_thread() is not threading.main_thread():
            return self.submit(describe_environment, self.env_id)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit
        try:
            return self.submit(describe_environment, self.env_id)
        finally:
            signal.signal(signal.SIGINT, handler)

    def __exit__(self, *exception: object) -> None:
        self.shutdown(cancel_futures=True)

    def returns(self, policy: GaussianPolicy, seeds: Sequence[int]) -> list[float]:
        """The return of one episode a seed, played by the mean action of ``policy``."""
        episode = functools.partial(play_episode, pickled(policy), self.env_id)
        return list(self.map(episode, seeds))

    def film(self, policy: GaussianPolicy, seed: int, path: Path) -> None:
        """Film one episode of ``policy``."""
        self.submit(film_episode, pickled(policy), self.env_id, seed, path).result()
        say(f"film   {path}")


def film_episode(policy: bytes, env_id: str, seed: int, path: Path) -> None:
    """Write an animated GIF of one episode, in real time, headless."""
    from PIL import Image

    actor: GaussianPolicy = pickle.loads(policy)
    env = make_environment(env_id, render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    frames, ended, t = [], False, 0
    while not ended and t < 600:
        if t % 3 == 0:  # the simulator's 60 steps a second, at 20 frames a second
            frames.append(Image.fromarray(env.render()).quantize(64, dither=Image.Dither.NONE))
        observation, _, terminated, truncated, _ = env.step(actor.act(observation))
        ended, t = terminated or truncated, t + 1
    env.close()
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
    write_whole(path, content.getbuffer())


def start_worker() -> None:
    """Prepare a process of the pool: one thread, silent, deaf to signals, and gone with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the simulator prints from C; our errors travel to the parent as exceptions
    os.dup2(nowhere, 2)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def episode_seeds(seed: int, step: int, episodes: int) -> list[int]:
    """Seeds of the evaluation at ``step``: new ones each time, the same ones in every run of that seed."""
    return [int(s) for s in np.random.SeedSequence([seed, step]).generate_state(episodes)]


def play_and_report(config: Config, policy: GaussianPolicy, pool: EvaluationPool, step: int) -> dict[str, float]:
    """Evaluate ``policy`` as it is after ``step``, print a line, and return the evaluation's columns of metrics.csv."""
    returns = pool.returns(policy, episode_seeds(config.seed, step, config.eval_episodes))
    row = {"return_mean": float(np.mean(returns)), "return_std": float(np.std(returns))}
    line = f"step {step:>9,}  return {row['return_mean']:.1f} ± {row['return_std']:.1f} over {len(returns)} episodes"
    if config.robot:
        row["score"] = config.robot.score(row["return_mean"])
        line += f"  score {row['score']:.1f}"
    say(line)
    return row | {f"return_{n}": value for n, value in enumerate(returns, start=1)}


# ------------------------------------------------------------------------------------- run folder, picture


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write beside ``path`` and rename, so that at any time ``path`` is the old file or the new one, whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}); make room, then --resume the run") from error


class RunFolder:
    """The folder of a run: config.json, metrics.csv (a row a log line or evaluation) and checkpoint.pt."""

    def __init__(self, path: Path, config: Config, rows: Sequence[dict[str, float]] = ()) -> None:
        self.path = path
        self.rows = list(rows)
        episodes = (f"return_{n}" for n in range(1, config.eval_episodes + 1))
        self.columns = ["step", *METRICS, "steps_per_second", "return_mean", "return_std", "score", *episodes]
        write_whole(path / "config.json", settings_to_json(config).encode())
        header: dict[str, Any] = {name: name for name in self.columns}
        write_whole(path / "metrics.csv", self.csv([header, *self.rows]))
        settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
        self.board = self.open_board(settings)
        self.wandb: Any = None
        if config.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                group=path.parent.name,
                name=path.name,
                id=f"{path.parent.name}-{path.name}",
                dir=path,
                config=settings,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )

    def open_board(self, settings: dict[str, str]) -> Any:
        """TensorBoard's writer, told the settings; what an earlier process wrote past our rows is hidden."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        board = SummaryWriter(self.path, purge_step=int(self.rows[-1]["step"]) + 1 if self.rows else 0)
        for summary in hparams(settings, {"evaluation/return_mean": 0.0}):
            board._get_file_writer().add_summary(summary)
        return board

    def close(self) -> None:
        self.board.close()
        if self.wandb:
            self.wandb.finish()

    @classmethod
    def create(cls, config: Config) -> Self:
        """Make out_dir/<dataset>-seed<seed>-<date-time>; a number follows where two runs start in one second."""
        name = f"{Path(config.dataset).stem}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        for n in itertools.count(1):
            path = config.out_dir / (name if n == 1 else f"{name}-{n}")
            try:
                path.mkdir(parents=True)
                return cls(path, config)
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(f"out_dir is {config.out_dir}, which cannot be written ({error.strerror})") from error
        raise AssertionError("unreachable")

    def csv(self, rows: Sequence[dict[str, Any]]) -> bytes:
        return "".join(",".join(str(row.get(name, "")) for name in self.columns) + "\n" for row in rows).encode()

    def record(self, row: dict[str, float]) -> None:
        """Add a row to metrics.csv and to the event files."""
        self.rows.append(row)
        try:
            with open(self.path / "metrics.csv", "ab") as file:
                file.write(self.csv([row]))
            for name in row.keys() - {"step"}:
                group = "training" if name in (*METRICS, "steps_per_second") else "evaluation"
                self.board.add_scalar(f"{group}/{name}", row[name], int(row["step"]))
            self.board.flush()
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}); make room, then --resume it"
            ) from error
        if self.wandb:
            self.wandb.log(row, step=int(row["step"]))


def evaluations(rows: Sequence[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation steps (E,) and returns (E, eval_episodes) among the rows of metrics.csv."""
    evaluated = [row for row in rows if "return_mean" in row]
    returns = [[value for name, value in row.items() if re.fullmatch(r"return_\d+", name)] for row in evaluated]
    return np.array([int(row["step"]) for row in evaluated]), np.array(returns)


PATHS = ("plot", "out_dir", "resume", "evaluate", "study")  # the settings that are paths


def settings_to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def settings_from_json(text: str) -> Config:
    values = json.loads(text)
    paths = {name: Path(values[name]) for name in PATHS if values.get(name) is not None}  # older runs lack some
    return Config(**values | paths | {name: tuple(v) for name, v in values.items() if isinstance(v, list)})


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU. Raises InputError if there is none or it cannot be read."""
    path = folder / "checkpoint.pt"
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; name the folder of a run that has been evaluated once") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read as a checkpoint; is it damaged?") from error


def load_policy(folder: str | Path) -> GaussianPolicy:
    """The policy saved in a run folder, on the CPU, ready to ``act``. Raises InputError as ``load_checkpoint``."""
    checkpoint = load_checkpoint(Path(folder))
    config, state = settings_from_json(checkpoint["config"]), checkpoint["agent"]["policy"]
    policy = GaussianPolicy(len(state["observation_mean"]), len(state["log_std"]), config.hidden_sizes)
    policy.load_state_dict(state)
    return policy


def algorithm_changes(config: Config) -> str:
    """The settings of algorithm and networks that differ from the defaults."""
    fields = [field for field in dataclasses.fields(config) if field.name not in (*PATHS, "dataset", "env_id", "seed")]
    fields = fields[: [field.name for field in fields].index("max_steps")]
    changes = (f"{f.name} {getattr(config, f.name)}" for f in fields if getattr(config, f.name) != f.default)
    return ", ".join(changes) or "default settings"


def draw(config: Config, folder: RunFolder, source: DataSource) -> None:
    """Write the picture: evaluation returns with their references, and the losses, against training steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, returns = evaluations(folder.rows)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    top, bottom = parts
    axes = top.subplots()
    mean, std = returns.mean(1), returns.std(1)
    axes.plot(
        steps, mean, color="#0072B2", marker="o", markersize=3, label=f"CIQL, mean of {returns.shape[1]} episodes"
    )
    axes.fill_between(
        steps, mean - std, mean + std, color="#0072B2", alpha=0.25, linewidth=0, label="± standard deviation"
    )
    draw_references(axes, config, source)
    top.suptitle(f"CIQL on {source.title(config)}\nseed {config.seed}, {algorithm_changes(config)}", fontsize="medium")
    panels = {"value_loss": "V loss", "q_loss": "Q loss", "policy_loss": "policy loss", "q": "mean Q(s, a)"}
    logged = [row for row in folder.rows if "q" in row]
    for panel, (name, label) in zip(bottom.subplots(1, 4), panels.items(), strict=True):
        panel.plot([row["step"] for row in logged], [row[name] for row in logged], color="#0072B2", linewidth=1)
        panel.set_title(label, fontsize="small")
        panel.tick_params(labelsize="x-small")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.grid(alpha=0.3)
    save_figure(figure, config.plot)


def draw_references(axes: Any, config: Config, source: DataSource) -> None:
    """Dress axes of returns against steps: the returns of data set, random and expert policy, the score at the right."""
    references = {}
    if len(source.returns):
        references["data set"] = (source.returns.mean(), "#D55E00", "--")
    if config.robot:
        references["random"] = (config.robot.random_return, "#009E73", ":")
        references["expert"] = (config.robot.expert_return, "#CC79A7", "-.")
        score = axes.secondary_yaxis("right", functions=(config.robot.score, config.robot.unscore))
        score.set_ylabel("normalised score")
    for name, (value, colour, style) in references.items():
        axes.axhline(value, color=colour, linestyle=style, label=f"{name}, {value:.0f}")
    axes.set(xlabel="gradient steps", ylabel="return of an episode")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0)
    axes.legend(fontsize="small", ncols=2, loc="lower right")


def save_figure(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=110)
    write_whole(path, content.getbuffer())


# ------------------------------------------------------------------------------------------------ training


def check_machine(config: Config) -> None:
    """Raise InputError for what this machine does not have: a place to write to, or an optional package."""
    if config.plot.suffix not in (".png", ".pdf", ".svg") or not os.access(config.plot.parent, os.W_OK | os.X_OK):
        raise InputError(f"plot is {config.plot}, but must be a .png, .pdf or .svg in a folder that can be written")
    for name, folder in {"out_dir": config.out_dir, "study": config.study or config.out_dir}.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"{name} is {folder}, but {there} is no folder that can be written; choose another")
    for name, package in {"wandb_project": "wandb", "ray_address": "ray"}.items():
        if getattr(config, name) and not importlib.util.find_spec(package):
            raise InputError(f"{name} is set, but {package} is not installed; pip install {package}")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU. Raises InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise InputError(
            f"device is {name}, which is not on this machine; use auto, cpu or a CUDA device there is"
        ) from error


def check_resumes(config: Config, checkpoint: dict[str, Any]) -> None:
    """Raise InputError unless ``config`` goes on from ``checkpoint`` as if it had never stopped."""
    free = (*PATHS, "max_steps", "threads", "film", "wandb_project", "ray_address", "gpu_share")
    saved = settings_from_json(checkpoint["config"])
    now = dataclasses.asdict(config)
    changes = (f"{name} {now[name]} (was {old})" for name, old in dataclasses.asdict(saved).items() if now[name] != old)
    if changed := [change for change in changes if not change.startswith(free)]:
        raise InputError(f"{config.resume} was trained with other settings; resume without {', '.join(changed)}")
    if config.max_steps < checkpoint["step"]:
        raise InputError(
            f"max_steps is {config.max_steps}, but {config.resume} is at step {checkpoint['step']}; raise it"
        )


class Stopped(Exception):
    """The run was asked to stop by a signal; ``args`` is its number."""


class Diverged(ArithmeticError):
    """A loss or a weight is no longer finite."""


class StopSignals:
    """Context in which SIGINT and SIGTERM only set ``number``; a second one ends the process at once."""

    number: int | None = None

    def __enter__(self) -> Self:
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.handlers = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        self.number = number
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: finishing the step, then saving; once more stops at once")


class Meter:
    """Means of the metrics since the last log line, summed on the device: nothing waits for it but a log line."""

    def __init__(self, device: torch.device) -> None:
        self.sums = [torch.zeros((), device=device) for _ in METRICS]
        self.count = 0  # steps in the sums
        self.start, self.timed = time.perf_counter(), 0  # of the speed: steps since then, in this process

    def add(self, metrics: dict[str, Tensor]) -> None:
        torch._foreach_add_(self.sums, list(metrics.values()))
        self.count += 1
        self.timed += 1

    def check(self, step: int) -> None:
        """Raise Diverged if a loss was NaN or infinite since the last log line."""
        for name, total in zip(METRICS, self.sums, strict=True):
            if not math.isfinite(total):
                raise Diverged(
                    f"{name} became {float(total)} within the {self.count} steps up to step {step:,}; lower lr"
                )

    def report(self, step: int) -> dict[str, float]:
        """Print the losses and start anew; returns their columns of metrics.csv."""
        self.check(step)
        row = dict(zip(METRICS, (torch.stack(self.sums) / self.count).tolist(), strict=True))
        row["steps_per_second"] = self.timed / (time.perf_counter() - self.start)
        say(
            f"step {step:>9,}  V {row['value_loss']:.4f}  Q {row['q_loss']:.4f}  policy {row['policy_loss']:.3f}"
            f"  penalty {row['penalty']:.4f}  mean Q {row['q']:.2f}  {row['steps_per_second']:.0f} steps/s"
        )
        torch._foreach_zero_(self.sums)
        self.count, self.start, self.timed = 0, time.perf_counter(), 0
        return row


def save_checkpoint(
    config: Config, folder: RunFolder, step: int, agent: CIQL, meter: Meter, source: DataSource
) -> None:
    """Write checkpoint.pt: all that the steps to come depend on. Raises Diverged rather than save a broken agent."""
    meter.check(step)
    if not all(parameter.isfinite().all() for parameter in agent.parameters):
        raise Diverged(f"a weight is NaN or infinite at step {step:,}; lower lr")
    checkpoint = {
        "config": settings_to_json(config),
        "step": step,
        "agent": agent.state_dict(),
        "random_state": torch.get_rng_state(),
        "cuda_random_states": torch.cuda.get_rng_state_all() if not agent.on_cpu else [],
        "meter": {"sums": meter.sums, "count": meter.count},
        "rows": folder.rows,
        "checksum": source.checksum,
    }
    content = io.BytesIO()  # torch.save to a full disk raises anything
    torch.save(checkpoint, content)
    write_whole(folder.path / "checkpoint.pt", content.getbuffer())


def restore(checkpoint: dict[str, Any], agent: CIQL, meter: Meter) -> None:
    """Put agent, meter and the random states where ``save_checkpoint`` found them."""
    agent.load_state_dict(checkpoint["agent"])
    torch._foreach_copy_(meter.sums, checkpoint["meter"]["sums"])
    meter.count = checkpoint["meter"]["count"]
    torch.set_rng_state(checkpoint["random_state"])
    if not agent.on_cpu:
        torch.cuda.set_rng_state_all(checkpoint["cuda_random_states"])


def train(config: Config, run: Path | None = None, path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Train CIQL on the file ``path`` of the data set; prints the log, writes the picture and the run folder ``run``.

    Either is found or made where not given. Returns the evaluation steps (E,) and returns (E, eval_episodes). Raises
    InputError for a bad setting, file or network, Diverged for losses not finite, Stopped after SIGINT or SIGTERM.
    """
    start = time.perf_counter()
    check_machine(config)
    find_device(config.device)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    if checkpoint:
        check_resumes(config, checkpoint)
    path = path or find_dataset(config.dataset)
    with EvaluationPool(config.environment, config.eval_episodes) as pool, StopSignals() as stop:
        if config.robot:
            data, source = load_data(config, path, config.robot.dims, 1000)
            pool.start()  # while we go on
        else:
            data, source = load_data(config, path, *pool.start().result())
        torch.manual_seed(config.seed)
        agent = CIQL(data.observations.shape[1], data.actions.shape[1], config)
        data = agent.prepare(data)
        if checkpoint and config.resume:
            if checkpoint["checksum"] != source.checksum:
                raise InputError(f"{path} is not the data that {config.resume} was trained on; put that back")
            folder, first = RunFolder(config.resume, config, checkpoint["rows"]), checkpoint["step"] + 1
        else:
            folder, first = RunFolder(run, config) if run else RunFolder.create(config), 1
        say(f"run    {folder.path}{f' from step {first - 1:,}' if checkpoint else ''}, {agent.describe()}")
        step_function = agent.compiled_step(data) if config.compile else agent.step
        meter = Meter(agent.device)
        if checkpoint:
            restore(checkpoint, agent, meter)

        bar = tqdm(range(first, config.max_steps + 1), "train", config.max_steps, initial=first - 1, disable=None)
        for step in bar:
            meter.add(step_function(data))
            row: dict[str, float] = {}
            if step % config.log_interval == 0:
                row |= meter.report(step)
            evaluates = step % config.eval_interval == 0 or step == config.max_steps
            pause = time.perf_counter()
            if evaluates:
                row |= play_and_report(config, agent.policy, pool, step)
                bar.set_postfix_str(f"return {row['return_mean']:.0f}")
            if row:
                folder.record({"step": step} | row)
            if evaluates or stop.number:
                save_checkpoint(config, folder, step, agent, meter, source)
                draw(config, folder, source)
                meter.start += time.perf_counter() - pause
            if stop.number:
                say(f"stopped at step {step:,}; go on with --resume {folder.path}")
                raise Stopped(stop.number)
        if config.film:
            pool.film(agent.policy, episode_seeds(config.seed, config.max_steps, 1)[0], folder.path / "policy.gif")
    folder.close()
    summarize(config, folder, time.perf_counter() - start)
    return evaluations(folder.rows)


def summarize(config: Config, folder: RunFolder, seconds: float) -> None:
    """Print what came out of the run and what to do with it."""
    steps, returns = evaluations(folder.rows)
    means = returns.mean(1)
    last, best, robot = means[-10:], int(means.argmax()), config.robot

    def score(value: float) -> str:
        return f", score {robot.score(value):.1f}" if robot else ""

    say(f"final  return {means[-1]:.1f} ± {returns[-1].std():.1f} over {returns.shape[1]} episodes{score(means[-1])}")
    say(f"       {last.mean():.1f} is the mean of the last {len(last)} evaluations{score(last.mean())}")
    say(f"       {means[best]:.1f} at step {steps[best]:,} was the best of {len(means)}: picked by luck, not a result")
    say(f"took   {seconds / 60:.1f} minutes")
    say(f"wrote  {config.plot} and {folder.path} (settings, metrics, TensorBoard events, checkpoint)")
    say(f"next   --resume {folder.path} --max-steps {2 * config.max_steps}")
    say(f"       --evaluate {folder.path} --film")


def evaluate(config: Config) -> None:
    """Play ``eval_episodes`` episodes of the policy saved in the run folder ``config.evaluate``, and film on request."""
    assert config.evaluate
    policy, step = load_policy(config.evaluate), load_checkpoint(config.evaluate)["step"]
    with EvaluationPool(config.environment, config.eval_episodes) as pool:
        play_and_report(config, policy, pool, step)
        if config.film:
            pool.film(policy, episode_seeds(config.seed, step, 1)[0], config.evaluate / "policy.gif")


# --------------------------------------------------------------------------------------------------- study


class Run(NamedTuple):
    """One run of a study."""

    config: Config
    folder: Path  # absolute, as is the next
    data: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def step(self) -> int:
        """The step that metrics.csv has come to."""
        if not (self.folder / "metrics.csv").exists():
            return 0
        lines = (self.folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0

    def saved_step(self) -> int:
        """The step that a retry goes on from."""
        return load_checkpoint(self.folder)["step"] if self.checkpoint.exists() else 0


def single_runs(config: Config) -> list[Config]:
    """The settings of each run: the product of the data sets and the seeds. Among ids, env_id is for the files."""
    runs = []
    for dataset, seed in itertools.product(config.datasets or [config.dataset], config.seeds or [config.seed]):
        env_id = None if len(config.datasets) > 1 and dataset in DOWNLOAD_URLS else config.env_id
        changes: dict[str, Any] = {"dataset": dataset, "seed": seed, "env_id": env_id}
        runs.append(dataclasses.replace(config, datasets=(), seeds=(), study=None, **changes))
    return runs


class Study:
    """The runs of a study, each in a folder of its own, and what became of them.

    Raises InputError for data that cannot be used and for a folder that holds runs with other settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = (config.study or config.out_dir / time.strftime("study-%Y%m%d-%H%M%S")).absolute()
        self.runs: list[Run] = []
        self.curves: dict[Run, tuple[np.ndarray, np.ndarray]] = {}  # of complete runs: steps (E,), mean returns (E,)
        self.errors: dict[Run, str] = {}  # of failed runs
        self.sources: dict[str, DataSource] = {}  # by data set
        for single in single_runs(config):
            if single.dataset not in self.sources:
                path = find_dataset(single.dataset).absolute()
                read_columns(path, single.robot.dims if single.robot else None)
                self.sources[single.dataset] = DataSource(path, episode_returns(path))
            folder = self.folder / f"{Path(single.dataset).stem}-seed{single.seed}"
            run = Run(dataclasses.replace(single, out_dir=self.folder), folder, self.sources[single.dataset].path)
            self.runs.append(run)
            if run.checkpoint.exists():
                checkpoint = load_checkpoint(folder)
                check_resumes(dataclasses.replace(run.config, resume=folder), checkpoint)
                self.is_complete(run, checkpoint)
        self.start, self.before = time.perf_counter(), {run: run.step() for run in self.runs}

    def is_complete(self, run: Run, checkpoint: dict[str, Any]) -> bool:
        """Is ``run`` complete by its checkpoint? Then keep its curve."""
        if checkpoint["step"] == run.config.max_steps:
            steps, returns = evaluations(checkpoint["rows"])
            self.curves[run] = steps, returns.mean(1)
        return run in self.curves

    @property
    def open_runs(self) -> list[Run]:
        return [run for run in self.runs if run not in self.curves and run not in self.errors]

    def final(self, run: Run) -> tuple[float, float]:
        """Mean return of the last ten evaluations of a complete run, and its score, NaN without references."""
        value = float(self.curves[run][1][-10:].mean())
        return value, run.config.robot.score(value) if run.config.robot else math.nan

    def groups(self) -> dict[str, list[Run]]:
        """The complete runs of each data set that has any."""
        complete = (run for run in self.runs if run in self.curves)
        return {dataset: list(runs) for dataset, runs in itertools.groupby(complete, lambda run: run.config.dataset)}

    def scores(self) -> dict[str, np.ndarray]:
        """The final scores (seeds,) of the complete runs of each data set that has references."""
        groups = self.groups().items()
        return {name: np.array([self.final(run)[1] for run in runs]) for name, runs in groups if runs[0].config.robot}

    def line(self, running: int) -> str:
        """How far the study is; the time left from the speed since its start."""
        alive = [run for run in self.runs if run not in self.errors]
        now = {run: run.config.max_steps if run in self.curves else run.step() for run in alive}
        made, missing = (sum(now[r] - self.before[r] for r in alive), sum(r.config.max_steps - now[r] for r in alive))
        left = tqdm.format_interval((time.perf_counter() - self.start) * missing / made) if made > 0 else "?"
        return f"study  {len(self.curves)} done, {running} running, {len(self.errors)} failed, {left} left"

    def end(self, run: Run, error: str | None) -> None:
        """Take in that ``run`` ended, well or with an error, and refresh summary and pictures."""
        if error is None and self.is_complete(run, load_checkpoint(run.folder)):
            value, score = self.final(run)
            scored = "" if math.isnan(score) else f", score {score:.1f}"
            say(f"done   {run.folder.name}: final return {value:.1f}{scored}")
        else:
            self.errors[run] = error or "it ended before its last step"
            say(f"FAILED {run.folder.name}: {self.errors[run]}")
        self.write()

    def write(self) -> None:
        """Write summary.csv, and the pictures once a run is complete."""
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["dataset", "seed", "state", "step", "final_return", "score", "folder", "error"])
        for run in self.runs:
            state = "complete" if run in self.curves else "failed" if run in self.errors else "incomplete"
            figures = self.final(run) if run in self.curves else ("", "")
            step, error = run.step(), self.errors.get(run, "")
            writer.writerow([run.config.dataset, run.config.seed, state, step, *figures, run.folder.name, error])
        write_whole(self.folder / "summary.csv", table.getvalue().encode())
        if self.curves:
            draw_curves(self)
            draw_scores(self)

    def summarize(self) -> None:
        """Print the statistics of each data set and of all, and what failed."""

        def cells(strata: Sequence[np.ndarray]) -> str:
            texts = []
            for value, low, high in (with_interval(strata, statistic) for statistic in (np.mean, iqm)):
                texts.append(f"{value:.1f}" if math.isnan(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]")
            return "".join(f"{text:>25}" for text in texts)

        groups, scores = self.groups(), self.scores()
        width = max(len(name) for name in (*groups, "all data sets")) + 2
        headings = ("return: mean", "interquartile mean", "score: mean", "interquartile mean")
        say(f"{'':{width}}runs{''.join(f'{heading:>25}' for heading in headings)}")
        for name, runs in groups.items():
            returns = np.array([self.final(run)[0] for run in runs])
            say(f"{name:{width}}{len(runs):4}{cells([returns])}{cells([scores[name]]) if name in scores else ''}")
        if len(scores) > 1:
            say(f"{'all data sets':{width}}{sum(map(len, scores.values())):4}{'':50}{cells(list(scores.values()))}")
        say("       of the mean of a run's last ten evaluations; [95 % stratified-bootstrap interval over seeds]")
        for run, error in self.errors.items():
            say(f"FAILED {run.folder.name}: {error}")


def iqm(values: np.ndarray, axis: int = -1) -> Any:
    """Interquartile mean along ``axis``: without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def with_interval(strata: Sequence[np.ndarray], statistic: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """``statistic`` of all ``strata`` together, and its 95 % stratified-bootstrap interval: value, low, high.

    A stratum holds the figures of one data set, (seeds,) or (seeds, E); seeds are resampled within each. NaN for the
    interval of a single seed. Agarwal et al., Deep RL at the Edge of the Statistical Precipice, 2021 (arXiv 2108.13264).
    """
    from scipy.stats import bootstrap

    def pooled(*samples: np.ndarray, axis: int) -> Any:
        return statistic(np.concatenate(samples, axis), axis=axis)

    value = pooled(*strata, axis=0)
    if min(map(len, strata)) < 2:
        return value, value * math.nan, value * math.nan
    result = bootstrap(strata, pooled, axis=0, vectorized=True, method="percentile", n_resamples=2000, rng=0)
    return value, *result.confidence_interval


def draw_curves(study: Study) -> None:
    """Write the picture of evaluation returns: mean over seeds with its interval, and every seed, a panel a data set."""
    from matplotlib.figure import Figure

    groups = study.groups()
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(max(9, 6 * columns), 4.5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, runs) in zip(panels, groups.items(), strict=False):
        steps = functools.reduce(np.intersect1d, [study.curves[run][0] for run in runs])
        returns = np.array([study.curves[run][1][np.isin(study.curves[run][0], steps)] for run in runs])
        mean, low, high = with_interval([returns], np.mean)
        axes.plot(steps, returns.T, color="#0072B2", linewidth=0.7, alpha=0.4)
        axes.plot(steps, mean, color="#0072B2", marker="o", markersize=3, label=f"CIQL, seeds: {len(runs)}, mean")
        axes.fill_between(steps, low, high, color="#0072B2", alpha=0.25, linewidth=0, label="95 % interval")
        draw_references(axes, runs[0].config, study.sources[name])
        axes.set_title(study.sources[name].title(runs[0].config), fontsize="medium")
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.suptitle(f"CIQL, {algorithm_changes(study.config)}", fontsize="medium")
    save_figure(figure, study.config.plot)


def draw_scores(study: Study) -> None:
    """Write study_scores beside the other picture: the final scores with their intervals, data sets side by side."""
    from matplotlib.figure import Figure

    scores = study.scores()
    if not scores:
        return
    columns: dict[str, list[np.ndarray]] = {}
    for name, values in scores.items():
        sample = "\n(sample)" if study.sources[name].is_sample else ""
        columns[Path(name).stem.replace("-bullet-", "\n").removesuffix("-v0") + sample] = [values]
    if len(scores) > 1:
        columns["all"] = list(scores.values())
    figure = Figure(figsize=(max(5, 1.3 * len(columns) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    for x, strata in enumerate(columns.values()):
        if len(strata) == 1:
            axes.plot([x] * len(strata[0]), strata[0], ".", color="#999999", label="a seed" if x == 0 else None)
        for shift, statistic, colour, name in ((-0.15, np.mean, "#0072B2", "mean"), (0.15, iqm, "#D55E00", "IQM")):
            value, low, high = with_interval(strata, statistic)
            axes.plot([x + shift], [value], "o", color=colour, label=f"{name}, 95 % interval" if x == 0 else None)
            axes.vlines([x + shift], low, high, color=colour, linewidth=2)
    axes.set_xticks(range(len(columns)), list(columns), fontsize="small")
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set(
        ylabel="normalised score (0 random, 100 expert)", title=f"CIQL, {algorithm_changes(study.config)}: final scores"
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    save_figure(figure, study.config.plot.with_stem("study_scores"))


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[str]:
    """Hold the folder of a study against a second process.

    Yields what its lock file says, by which a node finds out whether it sees the same disk.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder} is being worked on by another process; wait for it or stop it") from error
        except OSError as error:
            raise InputError(
                f"study is {folder}, which cannot be written ({error.strerror}); choose another"
            ) from error
        token = uuid.uuid4().hex
        file.truncate(0)
        file.write(token)
        file.flush()
        yield token


def train_study(config: Config) -> int:
    """Train every data set with every seed, summarise, and return the exit code: 1 if a run failed.

    Raises InputError before anything starts, Stopped after SIGINT or SIGTERM.
    """
    check_machine(config)
    on_ray = len(single_runs(config)) > 1 and importlib.util.find_spec("ray") is not None
    if on_ray and not config.threads:
        config = dataclasses.replace(config, threads=1)
    study = Study(config)
    on_ray = on_ray and bool(study.open_runs)
    if on_ray:
        start_ray(config)
    with owned(study.folder) as token:
        say(f"study  {study.folder}: {len(study.runs)} runs, {len(study.curves)} of them complete")
        if len(study.open_runs) > 1 and not on_ray:
            say("NOTE   ray is not installed, so the runs go one after the other (pip install ray: side by side)")
        for run in study.open_runs:
            run.folder.mkdir(exist_ok=True)
            write_whole(run.folder / "config.json", settings_to_json(run.config).encode())
        study.write()
        try:
            for run, error in run_on_ray(study, token) if on_ray else run_here(study):
                study.end(run, error)
        except Stopped:
            say(f"stopped; go on with the same command and --study {study.folder}")
            raise
    study.summarize()
    pictures = [config.plot] * bool(study.curves) + [config.plot.with_stem("study_scores")] * bool(study.scores())
    say(f"wrote  {', '.join(map(str, [study.folder / 'summary.csv', *pictures]))}")
    return 1 if study.errors else 0


def train_in(folder: Path, data: Path) -> int:
    """Train a run of a study in its folder, which holds its settings, from the checkpoint on if there is one."""
    config = settings_from_json((folder / "config.json").read_text())
    resume = folder if (folder / "checkpoint.pt").exists() else None
    plot = folder / f"eval_returns{config.plot.suffix}"
    train(dataclasses.replace(config, out_dir=folder.parent, plot=plot, resume=resume), folder, data)
    return 0


def run_here(study: Study) -> Iterator[tuple[Run, str | None]]:
    """Train the open runs one after the other in this process; yields each with its error."""
    for run in study.open_runs:
        say(study.line(1))
        error = None
        try:
            train_in(run.folder, run.data)
        except (InputError, Diverged) as failure:
            error = str(failure)
        except Stopped:
            raise
        except Exception as failure:  # noqa: BLE001  (a bug in one run is shown, and must not cost the others)
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        yield run, error


# ----------------------------------------------------------------------------------------------- Ray

DEATHS = 3  # of a run's worker or node, without a new checkpoint between, that fail the run


class Desk:
    """A Ray actor beside the driver: knows the runs that have begun, and takes in files of nodes without its disk."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.running: set[str] = set()

    def begin(self, run: str) -> None:
        self.running.add(run)

    def end(self, run: str) -> None:
        self.running.discard(run)

    def count(self) -> int:
        return len(self.running)

    def receive(self, run: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            write_whole(self.study / run / name, content)


def run_files(folder: Path, since: dict[str, int]) -> dict[str, bytes]:
    """The files of a run folder that changed since they were noted in ``since``, by name."""
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("[!.]*") if file.is_file()}
    changed = [name for name, written in times.items() if written != since.get(name)]
    since.update(times)
    return {name: (folder / name).read_bytes() for name in changed}


def run_on_node(
    study: Path, token: str, run: str, files: dict[str, bytes], data: Path, content: Any, script: str, desk: Any
) -> None:
    """A Ray task: one run in a process of its own, which is the same as the run alone.

    It works in the study's folder, or where this node does not see that in a scratch folder, which starts with
    ``files`` and is sent to ``desk`` as it changes. ``content`` is that of the data set's file, unless all nodes have it.
    Raises ChildProcessError if the process was killed, RuntimeError with its error if it failed.
    """
    import ray

    desk.begin.remote(run)  # not waited for: Ray gives our cores away while we wait
    lock = study / ".lock"
    shared = lock.exists() and lock.read_text() == token
    with tempfile.TemporaryDirectory(prefix="ciql-") as scratch:
        folder = (study if shared else Path(scratch) / study.name) / run
        since: dict[str, int] = {}
        sent: list[Any] = []

        def send() -> None:
            if not shared and (changed := run_files(folder, since)):
                sent.append(desk.receive.remote(run, changed))

        if not shared:
            folder.mkdir(parents=True)
            for name, file in files.items():
                (folder / name).write_bytes(file)
        if content is not None and not (data.exists() and data.stat().st_size == len(content)):
            data = Path(scratch) / data.name
            data.write_bytes(content)
        (Path(scratch) / "ciql_pybullet.py").write_text(script)
        with open(folder / "log.txt", "ab") as log:
            log.write(f"node   {platform.node()}, {ray.get_runtime_context().get_node_id()}\n".encode())
            log.flush()
            code = "import ciql_pybullet, sys; ciql_pybullet.work(*sys.argv[1:])"
            command = [sys.executable, "-c", code, str(folder), str(data)]
            child = subprocess.Popen(command, cwd=scratch, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            while child.poll() is None:
                time.sleep(0.5)
                send()
        except KeyboardInterrupt:  # the study was stopped
            child.terminate()
            child.wait()
            raise
        finally:
            child.kill()  # if sending failed
            child.wait()
            send()
            ray.get(sent)
        if child.returncode < 0 or child.returncode > 128:
            raise ChildProcessError(f"its process was killed, exit code {child.returncode}")
        if child.returncode:
            last = (folder / "log.txt").read_text().rstrip().splitlines()[-1]
            raise RuntimeError(f"{last.removeprefix('ciql_pybullet: ')} ({run}/log.txt)")


def work(folder: str, data: str) -> None:
    """The process of a run of a study. It ends with its parent: stdin is closed then."""

    def follow_parent() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    as_program(lambda: train_in(Path(folder), Path(data)))


def start_ray(config: Config) -> None:
    """Connect to the cluster at ``ray_address``, or start one of this machine. Raises InputError if that fails."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no word to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns
    address = config.ray_address or "local"
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not config.ray_address:
        options["include_dashboard"] = False
    try:
        if ":" in address:  # Ray would try for minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), NETWORK_TIMEOUT).close()
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        cause = " ".join(str(error).split())[:150]
        remedy = "start it (ray start --head), or set its token" if config.ray_address else "pip install -U ray"
        raise InputError(f"Ray does not answer at {address} ({cause}); {remedy}") from error
    cores = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if config.threads > cores:
        raise InputError(f"threads is {config.threads}, but no node has more than {cores:.0f} CPUs; take that or fewer")


def task_error(task: Any) -> Exception | None:
    """Why an ended task failed: RuntimeError if the run itself did, another if its process, worker or node died."""
    import ray

    try:
        ray.get(task)
        return None
    except ray.exceptions.RayTaskError as error:  # raised by the task
        return error.cause or error
    except ray.exceptions.RayError as error:
        return error


def run_on_ray(study: Study, token: str) -> Iterator[tuple[Run, str | None]]:
    """Train the open runs as tasks of Ray, each on cores of its own; yields each as it ends, with its error.

    A run whose process, worker or node died goes on from its last checkpoint, on whichever node is free.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node need not have this file
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk: Any = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote(study.folder)
    has_gpu = study.config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    task = ray.remote(run_on_node).options(
        num_cpus=study.config.threads,
        num_gpus=study.config.gpu_share if has_gpu else 0,
        max_retries=0,  # we do that
        scheduling_strategy="SPREAD",
    )
    script = Path(__file__).read_text()
    paths = {run.data for run in study.open_runs if study.config.ray_address}
    contents = {path: ray.put(np.fromfile(path, np.uint8)) for path in paths}

    def submit(run: Run) -> Any:
        files, content = run_files(run.folder, {}), contents.get(run.data)
        return task.remote(study.folder, token, run.folder.name, files, run.data, content, script, desk)

    pending = {submit(run): run for run in study.open_runs}
    deaths: collections.Counter[tuple[Run, int]] = collections.Counter()
    stopped, said = False, ""
    try:
        with tqdm(bar_format="{desc}", disable=None, leave=False) as bar, StopSignals() as stop:
            while pending:
                for ended in ray.wait(list(pending), num_returns=len(pending), timeout=1)[0]:
                    run, error = pending.pop(ended), task_error(ended)
                    ray.get(desk.end.remote(run.folder.name))
                    if error is None or isinstance(error, RuntimeError):
                        yield run, str(error) if error else None
                    elif not stopped:
                        step = run.saved_step()
                        deaths[run, step] += 1
                        reason = f"{type(error).__name__}, {' '.join(str(error).split())[:150]}"
                        if deaths[run, step] == DEATHS:
                            yield run, f"died {DEATHS} times at step {step:,}, {reason}"
                        else:
                            say(f"retry  {run.folder.name} from step {step:,}: {reason}")
                            pending[submit(run)] = run
                if stop.number and not stopped:
                    stopped = True
                    for waiting in pending:
                        ray.cancel(waiting)
                line = study.line(ray.get(desk.count.remote()))
                bar.set_description_str(line)
                counts = line.rsplit(",", 1)[0]
                if bar.disable and counts != said:
                    said = counts
                    say(line)
    finally:
        ray.shutdown()
    if stop.number:
        raise Stopped(stop.number)


# ---------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str]) -> Config:
    """Settings from the command line; when a run folder is resumed or evaluated, its settings are the defaults."""
    import tyro

    def flags(default: Config) -> Config:
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Config, args=arguments, default=default, prog="ciql_pybullet.py")
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            # tyro draws a box, the cause first
            lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]
            cause = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines))
            raise InputError(f"{cause.removeprefix('Error parsing Config: ')}; --help lists the settings") from stop

    config = flags(Config())
    if folder := config.resume or config.evaluate:
        saved = settings_from_json(load_checkpoint(folder)["config"])
        config = flags(dataclasses.replace(saved, resume=config.resume, evaluate=config.evaluate, film=False))
    return config


def as_program(job: Callable[[], int]) -> None:
    """End the process with the exit code of ``job``, or with one line on stderr for what users can put right."""
    try:
        sys.exit(job())
    except (InputError, Diverged) as error:
        print(f"ciql_pybullet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Stopped as stopped:
        sys.exit(128 + stopped.args[0])
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    def job() -> int:
        config = parse(sys.argv[1:])
        runs = single_runs(config)
        if config.evaluate:
            evaluate(config)
        elif config.study or len(runs) > 1:
            return train_study(config)
        else:
            train(runs[0])
        return 0

    as_program(job)


if __name__ == "__main__":
    main()
