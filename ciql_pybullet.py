# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium==1.4.0",
#     "pybullet==3.2.7",
#     "pybullet_envs_gymnasium==0.6.0",
#     "h5py==3.16.0",
#     "filelock==4.3.1",
#     "matplotlib==3.11.2",
#     "pillow==13.0.0",
#     "pooch==1.9.0",
#     "psutil==7.2.2",
#     "requests==2.34.2",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "typeguard==4.6.1",
#     "tyro==1.0.17",
# ]
# ///
"""Conservative Implicit Q-Learning (CIQL), trained offline on the PyBullet D4RL data sets.

CIQL is Implicit Q-Learning (IQL) plus a conservative penalty that is clamped at 0. From logged
transitions (s, a, r, s') it learns a value V(s), a critic of two networks Q1(s,a) and Q2(s,a), and
a policy π(a|s). Q̄ is the smaller Q of the target critic, a running average of the critic. The
off-data actions ā are drawn uniformly from the action box, num_neg per state.

    V   diff = Q̄(s,a) − V(s)             loss = |τ − 1(diff<0)| · diff²
    Q   y = r + γ V(s')                    loss = (Q(s,a) − y)² + α · ReLU(E_ā Q(s,ā) − E_a Q(s,a))
    π   adv = max(0, Q̄(s,a) − V(s))      loss = −exp(β · adv) · log π(a|s)

The losses and E are means over a batch. So in a step the penalty of a Q acts on the whole batch, or
its clamp is closed and it is 0. The losses of Q1 and Q2 are added. After a true termination y is r
alone. exp(β · adv) is capped at max_weight. IQL has no max(0, ·) in adv (--no-clamp-advantage).

    python ciql_pybullet.py                       train with the settings below
    python ciql_pybullet.py --alpha 0             any setting is also a flag
    python ciql_pybullet.py --resume runs/RUN     go on with a stopped run

IQL: Kostrikov et al., 2021 (arXiv 2110.06169). CQL: Kumar et al., 2020 (arXiv 2006.04779). D4RL: Fu
et al., 2020 (arXiv 2004.07219). Data sets: github.com/takuseno/d4rl-pybullet.
"""

import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Ctrl-C during the slow imports ends the program without a traceback; ``train`` handles it later.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock
import h5py
import numpy as np
import psutil
import torch
import typeguard
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm


# ----------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Config:
    """CIQL on the PyBullet D4RL data sets. Every setting is also a flag: --max-steps 20000."""

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of 12 ids, or the path of an .hdf5 file
    env_id: str = ""  # an .hdf5 file's environment; MODULE:ID imports MODULE, which registers it
    max_episode_steps: int = 0  # time limit that the data were recorded with; 0: the environment's
    seed: int = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL and its networks
    gamma: float = 0.99  # discount
    tau: float = 0.8  # expectile of V; 0.5 is the mean over the data's actions, near 1 their best
    beta: float = 1.0  # inverse temperature of the policy weights; 0 gives behaviour cloning
    alpha: float = 1.0  # weight of the conservative penalty; 0 leaves it out, as in IQL
    num_neg: int = 10  # off-data actions per state in the penalty
    polyak: float = 0.005  # share of the critic that moves into its target each step
    clamp_advantage: bool = True  # max(0, A) in the policy weights; IQL does not clamp
    max_weight: float = 100.0  # cap of the policy weights exp(beta * A)
    hidden_sizes: tuple[int, ...] = (256, 256)  # ReLU layers of every network
    min_log_std: float = -5.0  # floor of the policy's log standard deviation
    # Schedule
    lr: float = 3e-4  # Adam's learning rate, for all networks
    policy_lr_decay: bool = False  # the policy's rate falls to 0 by a cosine, as in IQL
    batch_size: int = 256  # transitions per gradient step
    max_steps: int = 500_000  # gradient steps
    log_interval: int = 1_000  # gradient steps between lines of losses
    eval_interval: int = 5_000  # gradient steps between evaluations
    eval_episodes: int = 5  # episodes per evaluation
    # Machine and output
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one
    threads: int = 0  # CPU threads; 0: one per core, at most four
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # medium: bfloat16 products
    compile: bool = True  # compile the losses (about a minute once; needs a C++ compiler)
    name: str = ""  # of the run's folder; empty: one is made of data set, changed settings, time
    plot: str = "eval_returns.png"  # picture of the evaluation returns
    out_dir: str = "runs"  # every run makes a folder in here: settings, metrics, checkpoint
    wandb_project: str = ""  # also log to this Weights & Biases project (needs: pip install wandb)
    film: bool = False  # film an episode in the end: policy.gif in the run's folder
    resume: str = ""  # go on from the checkpoint in this run folder, with its settings
    evaluate: str = ""  # train nothing: play the policy of this run folder for eval_episodes


RANGES = {  # intervals as in mathematics: a round bracket leaves its end out
    "max_episode_steps": "[0, inf)",
    "seed": "[0, 4294967296)",
    "gamma": "[0, 1]",
    "tau": "(0, 1)",
    "beta": "[0, inf)",
    "alpha": "[0, inf)",
    "num_neg": "[1, 1e9]",
    "polyak": "(0, 1]",
    "max_weight": "[1, inf)",
    "min_log_std": "[-20, 0]",
    "lr": "(0, inf)",
    "batch_size": "[1, 1e9]",
    "max_steps": "[1, inf)",
    "log_interval": "[1, inf)",
    "eval_interval": "[1, inf)",
    "eval_episodes": "[1, 1e6]",
    "threads": "[0, 1024]",
}
# All other settings appear in a run's name, and a NOTE tells when a resumed run changes them. So a
# setting of your own is a line in Config, and nothing else is needed. (A name begins with the data
# set, and a resumed run is held to its data and environment.)
NEUTRAL_SETTINGS = {
    "dataset",
    "env_id",
    "max_steps",
    "log_interval",
    "eval_interval",
    "eval_episodes",
    "device",
    "threads",
    "compile",
    "name",
    "plot",
    "out_dir",
    "wandb_project",
    "film",
    "resume",
    "evaluate",
}


class InputError(ValueError):
    """A bad setting, file or network; its message is one line that names cause and remedy."""


def with_tuples(value: Any) -> Any:
    """What JSON holds, with tuples in the place of lists."""
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def check(config: Config) -> None:
    """Raise InputError for a setting of the wrong type or out of its range."""
    if type(config) is not Config:
        raise InputError(f"config is a {type(config).__name__}; add settings to Config itself")
    for name, kind in typing.get_type_hints(Config).items():
        value = getattr(config, name)
        try:
            typeguard.check_type(value, kind)
            str(value).encode()
            if with_tuples(json.loads(json.dumps(value))) != value:
                raise TypeError("a run could not save it; use numbers, strings and tuples")
        except (typeguard.TypeCheckError, UnicodeEncodeError, TypeError) as error:
            raise InputError(f"{name} is {value!r}, which cannot be: {error}") from error
    for name, interval in RANGES.items():
        value = getattr(config, name)
        low, high = map(float, interval[1:-1].split(","))
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise InputError(f"{name} is {value}, but must be in {interval}")
    if not config.hidden_sizes or min(config.hidden_sizes) < 1:
        raise InputError(f"hidden_sizes is {config.hidden_sizes}, but must be positive numbers")
    if Path(config.name).name != config.name or config.name == "..":
        raise InputError(f"name is {config.name}, but must be one folder's name; see --out-dir")
    given = [name for name in ("name", "resume", "evaluate") if getattr(config, name)]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are set, and each selects a run; give one of them")
    if config.evaluate:  # without a picture, and without W&B
        return
    plot = Path(config.plot)
    if plot.suffix not in (".png", ".pdf", ".svg") or plot.is_dir():
        raise InputError(f"plot is {plot}, but must be a .png, .pdf or .svg file")
    if not (plot.parent.is_dir() and os.access(plot.parent, os.W_OK)):
        raise InputError(f"plot is {plot}, but {plot.parent} is no folder that can be written to")
    if config.wandb_project:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder of that name has no origin
            raise InputError("wandb_project is set, but wandb is not installed; pip install wandb")


def differences(config: Config, other: Config) -> dict[str, Any]:
    """The settings of ``config`` that differ from those of ``other`` and change what is learned."""
    return {
        name: value
        for name, value in vars(config).items()
        if name not in NEUTRAL_SETTINGS and value != getattr(other, name)
    }


def varied_words(config: Config) -> list[str]:
    """What differs from the defaults, and the seed, as words: alpha0, no-clamp_advantage, seed3."""
    varied = differences(config, Config())
    varied.pop("seed", None)
    words = []
    for name, value in varied.items():
        if isinstance(value, bool):
            words.append(name if value else f"no-{name}")
        elif isinstance(value, tuple):
            words.append(name + "x".join(map(str, value)))
        else:
            words.append(f"{name}{value}".removesuffix(".0"))
    return [*words, f"seed{config.seed}"]


# ------------------------------------------------------------------------------------------- output
say = tqdm.write  # prints a line of the log on stdout, above the progress bar if there is one


def part_of(path: Path) -> Path:
    """Where this thread writes what becomes ``path`` once it is whole."""
    return path.with_name(f".part.{os.getpid()}.{threading.get_ident()}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside ``path``, then rename: ``path`` is at any time the old or the new one."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between: (B, sizes[0]) -> (B, sizes[-1])."""
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ValueNetwork(nn.Module):
    """V(s): (B, observation_dim) -> (B,)."""

    def __init__(self, observation_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.v = mlp(observation_dim, *hidden_sizes, 1)

    def forward(self, observations: Tensor) -> Tensor:
        return self.v(observations).squeeze(-1)


class QNetworks(nn.Module):
    """Q1(s, a), Q2(s, a), ...: (B, observation_dim), (B, action_dim) -> (num_q, B)."""

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int], num_q: int = 2
    ) -> None:
        super().__init__()
        self.q = nn.ModuleList(
            mlp(observation_dim + action_dim, *hidden_sizes, 1) for _ in range(num_q)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat([observations, actions], -1)
        return torch.stack([q(inputs).squeeze(-1) for q in self.q])


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(μ(s)), σ²) with one σ per action dimension, as in IQL.

    It acts with its mean, tanh(μ(s)).
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.mu = mlp(observation_dim, *hidden_sizes, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        # What the data were normalised with: a policy acts on the simulator's own observations.
        self.observation_mean = nn.Buffer(torch.zeros(observation_dim))
        self.observation_std = nn.Buffer(torch.ones(observation_dim))

    def forward(self, observations: Tensor) -> Tensor:
        """Mean actions: normalised observations (B, observation_dim) -> (B, action_dim)."""
        return torch.tanh(self.mu(observations))

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log π(a|s): (B, observation_dim), (B, action_dim) -> (B,)."""
        z = (actions - self(observations)) * torch.exp(-self.log_std)
        log_densities = -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        return log_densities.sum(-1)

    def std(self) -> Tensor:
        """σ: (action_dim,)."""
        return self.log_std.exp()

    @torch.no_grad()
    def project(self, min_log_std: float) -> None:
        """Keep σ above its floor, after a gradient step.

        The data's actions are often a function of the state, which drives σ to 0. A clamp in the
        likelihood instead would kill the gradient, and σ could not grow again.
        """
        self.log_std.clamp_(min=min_log_std)

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """The mean action (action_dim,), in [-1, 1], for one observation (observation_dim,)."""
        x = torch.as_tensor(observation, dtype=torch.float32, device=self.observation_mean.device)
        x = (x - self.observation_mean) / self.observation_std
        return self(x[None])[0].cpu().numpy()


def make_policy(observation_dim: int, action_dim: int, config: Config) -> GaussianPolicy:
    """The policy that is trained, saved, loaded and evaluated: another class goes in here.

    It has the methods and the two buffers of ``GaussianPolicy``.
    """
    return GaussianPolicy(observation_dim, action_dim, config.hidden_sizes)


# ------------------------------------------------------------------------------------------- losses
def expectile_loss(diff: Tensor, tau: float) -> Tensor:
    """mean of |τ − 1(diff<0)| · diff²: (B,) -> (). IQL, equation 5, with diff = Q̄(s,a) − V(s)."""
    weight = torch.where(diff < 0, 1 - tau, tau)
    return (weight * diff**2).mean()


def conservative_gap(q_neg: Tensor, q_data: Tensor) -> Tensor:
    """E_ā Q(s,ā) − E_a Q(s,a) of each Q: (num_q, B · num_neg), (num_q, B) -> (num_q,).

    CQL, equation 2.
    """
    return q_neg.mean(-1) - q_data.mean(-1)


def awr_weights(
    advantage: Tensor, beta: float, max_weight: float, clamp_advantage: bool = True
) -> Tensor:
    """min(exp(β · max(0, A)), max_weight): (B,) -> (B,), with A = Q̄(s,a) − V(s).

    IQL, equation 7, which has no max(0, ·): there clamp_advantage is False.
    """
    if clamp_advantage:
        advantage = advantage.clamp(min=0)
    return torch.exp(beta * advantage).clamp(max=max_weight)


# -------------------------------------------------------------------------------------------- agent
class Transitions(NamedTuple):
    """N transitions, float32."""

    observations: Tensor  # (N, observation_dim)
    actions: Tensor  # (N, action_dim), in [-1, 1]
    rewards: Tensor  # (N,)
    next_observations: Tensor  # (N, observation_dim)
    terminations: Tensor  # (N,), 1 where the episode truly ended, 0 where it went on or was cut


Metrics = dict[str, Tensor]  # scalars by name, for the log


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros((), device=name).device  # it is tried, and "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise InputError(f"device is {name}, which is not here; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name}, but must be auto, cpu or cuda")
    return device


@torch.no_grad()
def move_towards(target: nn.Module, latest: nn.Module, share: float) -> None:
    """Move the parameters of ``target`` by ``share`` of their way to those of ``latest``.

    1 is all of it. Buffers, such as running statistics, are copied.
    """
    for parameter, goal in zip(target.parameters(), latest.parameters(), strict=True):
        parameter.lerp_(goal, share)
    for buffer, statistics in zip(target.buffers(), latest.buffers(), strict=True):
        buffer.copy_(statistics)


class CIQL(nn.Module):
    """Conservative Implicit Q-Learning: the networks, their optimiser, and the gradient step.

    To try an idea that is no setting, subclass it and give the class to ``train`` as
    ``make_agent``. Give networks that you replace or add to ``make_optimizer``. A run saves the
    agent's parameters and buffers, and the state of each attribute that is an optimiser or a
    learning rate scheduler.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.device = find_device(config.device)
        self.on_cpu = self.device.type == "cpu"
        self.policy = make_policy(observation_dim, action_dim, config)
        self.value: nn.Module = ValueNetwork(observation_dim, config.hidden_sizes)
        self.critic = self.make_critic()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(self.device)
        self.make_optimizer(self.policy, self.value, self.critic)
        self.steps = 0  # gradient steps taken
        self.meter: Meter | None = None  # measures the gaps first, where ``train`` has set one

    def make_critic(self) -> nn.Module:
        """The critic; its target is a copy. It may hold any number of Q."""
        return QNetworks(self.observation_dim, self.action_dim, self.config.hidden_sizes)

    def make_optimizer(self, policy: nn.Module, *others: nn.Module) -> None:
        """Adam. The policy is a group of its own, as ``policy_lr_decay`` lowers its rate alone."""
        rest = [parameter for network in others for parameter in network.parameters()]
        groups: list[dict[str, Any]] = [{"params": policy.parameters()}, {"params": rest}]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            groups, lr=self.config.lr, fused=True
        )

    @torch.no_grad()
    def targets(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Q̄(s,a), the target of V, and y = r + γ V(s'), the target of Q: (B,) each."""
        q_bar = self.target_critic(batch.observations, batch.actions).amin(0)
        v_next = self.value(batch.next_observations)
        y = batch.rewards + self.config.gamma * (1 - batch.terminations) * v_next
        return q_bar, y

    def losses(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """The sum of the losses of V, Q and π without the penalty, (), and figures for the log.

        Targets and advantage have no gradient, so each loss trains its own network alone, and one
        backward pass serves all three. Do not change ``batch`` in place: the penalty reads it, too.
        """
        c = self.config
        s = batch.observations
        a = batch.actions
        q_bar, y = self.targets(batch)

        # V: the expectile of Q̄ over the data's actions
        v = self.value(s)
        value_loss = expectile_loss(q_bar - v, c.tau)

        # Q: one step of bootstrap from V
        q = self.critic(s, a)  # (num_q, B)
        q_loss = ((q - y) ** 2).mean(-1).sum()

        # π: cloning of the data's actions, weighted by their advantage
        advantage = (q_bar - v).detach()
        weights = awr_weights(advantage, c.beta, c.max_weight, c.clamp_advantage)
        policy_loss = -(weights * self.policy.log_prob(s, a)).mean()

        metrics = {
            "value_loss": value_loss,
            "q_loss": q_loss,
            "policy_loss": policy_loss,
            "q": q.mean(),
            "v": v.mean(),
            "advantage": advantage.mean(),
            "policy_std": self.policy.std().mean(),
        }
        loss = value_loss + q_loss + policy_loss
        return loss, {name: figure.detach() for name, figure in metrics.items()}

    def gaps(self, critic: nn.Module, batch: Transitions, negative_actions: Tensor) -> Tensor:
        """The ``conservative_gap`` of each Q of ``critic``, (num_q,); its ReLU is the penalty.

        ``negative_actions`` are (B, num_neg, action_dim).
        """
        parts = 10 if self.on_cpu else 1  # smaller pieces fit the cache of a CPU's core
        q_neg = []
        for actions in negative_actions.chunk(parts, 1):
            s = batch.observations.repeat_interleave(actions.shape[1], 0)
            q_neg.append(critic(s, actions.flatten(0, 1)))
        q_data = critic(batch.observations, batch.actions)
        return conservative_gap(torch.cat(q_neg, -1), q_data)

    def update(self, data: Transitions) -> Metrics:
        """One gradient step on a batch drawn from ``data``, which ``prepare`` made.

        It lowers ``losses`` + α · Σ ReLU(``gaps``). The second term has a backward pass of its own,
        which is left out while the clamp is closed.
        """
        c = self.config
        if not self.on_cpu:  # the CUDA graphs may overwrite what the last step returned
            torch.compiler.cudagraph_mark_step_begin()
        index = torch.randint(len(data.rewards), (c.batch_size,), device=self.device)
        batch = Transitions(*(column.index_select(0, index) for column in data))
        if c.alpha > 0:
            size = (c.batch_size, c.num_neg, self.action_dim)
            negative_actions = torch.empty(size, device=self.device).uniform_(-1, 1)
            measured = self.meter(batch, negative_actions) if self.meter else None

        self.optimizer.zero_grad()
        loss, metrics = self.losses(batch)
        loss.backward()
        if c.alpha > 0:
            gaps = self.backward_of_penalty(batch, negative_actions, measured)
            penalty = torch.relu(gaps).sum()
            metrics["penalty"] = penalty
            if "q_loss" in metrics:  # losses of your own may report none
                metrics["q_loss"] = metrics["q_loss"] + c.alpha * penalty
            for number, gap in enumerate(gaps, start=1):
                metrics[f"gap{number}"] = gap
            metrics["clamp_open"] = (penalty > 0).float()  # the penalty of any Q acts

        if c.policy_lr_decay:
            remaining = (1 + math.cos(math.pi * self.steps / c.max_steps)) / 2
            self.optimizer.param_groups[0]["lr"] = c.lr * remaining  # the policy's
        self.optimizer.step()
        self.policy.project(c.min_log_std)
        move_towards(self.target_critic, self.critic, c.polyak)
        self.steps += 1
        return metrics

    def backward_of_penalty(
        self,
        batch: Transitions,
        negative_actions: Tensor,
        measured: Callable[[], Tensor] | None,
    ) -> Tensor:
        """Add the gradient of the penalty to that of the losses; returns the gaps, (num_q,).

        After the first steps the gaps are nearly always below 0, where ReLU has no gradient. So on
        the CPU they are first ``measured``, by a forward pass alone, a third of the work. On CUDA
        the host would have to wait for the result.
        """
        if measured:
            gaps = measured()
            if gaps.max() <= 0:
                return gaps
        gaps = self.gaps(self.critic, batch, negative_actions)
        (self.config.alpha * torch.relu(gaps).sum()).backward()
        return gaps.detach()

    def evaluated_policy(self) -> nn.Module:
        """The policy to evaluate and to save; override it to return an average of it, say."""
        return self.policy

    def prepare(self, data: Transitions) -> Transitions:
        """Normalise the observations, tell the policy how, and move the data to the device."""
        std, mean = torch.std_mean(data.observations, 0)
        std += 1e-3  # a constant column must not divide by 0
        self.policy.observation_mean.copy_(mean)
        self.policy.observation_std.copy_(std)
        normalised = data._replace(
            observations=(data.observations - mean) / std,
            next_observations=(data.next_observations - mean) / std,
        )
        return Transitions(*(column.to(self.device) for column in normalised))

    def check_optimizers(self) -> None:
        """Raise InputError for a parameter that would never be trained, or never saved."""
        trained = {
            parameter
            for part in vars(self).values()
            if isinstance(part, torch.optim.Optimizer)
            for group in part.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter not in trained:
                raise InputError(
                    f"{name} requires gradients, but no optimiser has it: give its network to"
                    " make_optimizer, or call requires_grad_(False)"
                )
        if not trained <= set(self.parameters()):
            raise InputError(
                "an optimiser has parameters that are not the agent's and would not be saved: hold"
                " networks as attributes, a list of them in nn.ModuleList"
            )

    def example(self, data: Transitions) -> tuple[Transitions, Tensor]:
        """A batch and its off-data actions, of the shapes that they have in a step."""
        c = self.config
        batch = Transitions(*(column[[0] * c.batch_size] for column in data))
        return batch, batch.actions.new_zeros(c.batch_size, c.num_neg, self.action_dim)

    @torch.no_grad()
    def critic_draws(self, data: Transitions) -> bool:
        """Does the critic draw random numbers, for dropout say?"""
        batch, _ = self.example(data)
        with torch.random.fork_rng([]):
            random_state = torch.get_rng_state()
            copy.deepcopy(self.critic)(batch.observations, batch.actions)
            return not torch.equal(torch.get_rng_state(), random_state)

    def compile_losses(self, data: Transitions) -> None:
        """Compile ``losses`` and ``gaps`` for batches of ``data``, or say why that cannot be done.

        An example is computed by a copy of the agent, so this changes nothing of it.
        """
        batch, negative_actions = self.example(data)
        how: dict[str, Any] = {"mode": "reduce-overhead"}  # CUDA: kernels are started together
        if self.on_cpu:
            how = {"options": {"cpp_wrapper": True}}  # no Python between the kernels
        torch.compiler.reset()  # an earlier run's graphs are no longer needed
        losses = torch.compile(type(self).losses, fullgraph=True, **how)
        gaps = torch.compile(type(self).gaps, fullgraph=True, **how)
        try:
            if vars(self).keys() & {"losses", "gaps"}:
                raise TypeError("losses and gaps are set on the agent; define them in its class")
            trial = copy.deepcopy(self)
            with torch.random.fork_rng([] if self.on_cpu else [self.device]):
                losses(trial, batch)[0].backward()
                trial.steps += 1
                # Losses that read a number like self.steps would need a graph for every step.
                with torch.compiler.set_stance("fail_on_recompile"):
                    losses(trial, batch)
                # On the CPU the penalty's few backward passes run eagerly: see ``accelerate``.
                if self.config.alpha > 0 and self.on_cpu:
                    with torch.no_grad():
                        gaps(trial, trial.critic, batch, negative_actions)
                elif self.config.alpha > 0:
                    gaps(trial, trial.critic, batch, negative_actions).sum().backward()
        except Exception as error:  # noqa: BLE001  (a bug in ``losses`` recurs in the first step)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"NOTE   the losses could not be compiled and run eagerly, slower: {reason}")
            return
        self.losses = functools.partial(losses, self)  # type: ignore[method-assign]
        self.gaps = functools.partial(gaps, self)  # type: ignore[method-assign]

    def training_state(self) -> dict[str, Any]:
        """What the next step depends on, besides the data and the random state."""
        state = {"steps": self.steps, "networks": self.state_dict()}
        for name, part in vars(self).items():
            if isinstance(part, (torch.optim.Optimizer, LRScheduler)):
                state[name] = part.state_dict()
        return state

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``training_state``.

        Raises KeyError, RuntimeError or ValueError for that of another kind of agent.
        """
        self.steps = state["steps"]
        self.load_state_dict(state["networks"])
        parts = vars(self)
        scheduled = [part.optimizer for part in parts.values() if isinstance(part, LRScheduler)]
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                settings = part.param_groups
                part.load_state_dict(state[name])
                # Its state is the saved one, its rate and other settings are those of now, unless a
                # scheduler owns them.
                if part not in scheduled:
                    part.param_groups = settings
            elif isinstance(part, LRScheduler):
                part.load_state_dict(state[name])


# It takes a batch and its off-data actions, and returns what to call for the gaps, (num_q,).
Meter = Callable[[Transitions, Tensor], Callable[[], Tensor]]


def make_meter(agent: CIQL, beside: bool, stack: contextlib.ExitStack) -> Meter:
    """A function that measures an agent's gaps without gradient, to know if the clamp is open.

    It does so before the losses, or ``beside`` them in a thread, until the ``stack`` ends. It has a
    copy of the critic, as ``losses`` may switch gradients of the agent's own off and on meanwhile,
    or call it with other weights.
    """
    critic = copy.deepcopy(agent.critic)
    measure = torch.no_grad()(agent.gaps)
    thread = concurrent.futures.ThreadPoolExecutor(
        1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    )
    stack.enter_context(thread)

    def start(batch: Transitions, negative_actions: Tensor) -> Callable[[], Tensor]:
        move_towards(critic, agent.critic, share=1)
        if beside:
            return thread.submit(measure, critic, batch, negative_actions).result
        gaps = measure(critic, batch, negative_actions)
        return lambda: gaps

    return start


# --------------------------------------------------------------------------------------------- data
class Robot(NamedTuple):
    """A robot of the simulator, with the returns that define D4RL's normalised score."""

    observation_dim: int
    action_dim: int
    random_return: float  # of score 0
    expert_return: float  # of score 100

    def score(self, episode_return: Any) -> Any:
        """100 · (return − random) / (expert − random)."""
        span = self.expert_return - self.random_return
        return 100 * (episode_return - self.random_return) / span

    def episode_return(self, score: Any) -> Any:
        """The return that has this score."""
        return self.random_return + score * (self.expert_return - self.random_return) / 100


# Random returns: the published means; Ant's was measured, as its dynamics have changed. Expert
# returns: the agents of stable-baselines3, from issue 2 of d4rl-pybullet.
ROBOTS = {
    "HalfCheetahBulletEnv-v0": Robot(26, 6, random_return=-1304.0, expert_return=3000.0),
    "HopperBulletEnv-v0": Robot(15, 3, random_return=18.6, expert_return=2500.0),
    "Walker2DBulletEnv-v0": Robot(22, 6, random_return=15.0, expert_return=2500.0),
    "AntBulletEnv-v0": Robot(28, 8, random_return=432.0, expert_return=3300.0),
}
NEVER_FALLS = "HalfCheetahBulletEnv-v0"  # its episodes end by the time limit alone
DATASETS = {  # of github.com/takuseno/d4rl-pybullet: environment, and key of the address
    "halfcheetah-bullet-random-v0": ("HalfCheetahBulletEnv-v0", "jnvpb1hp60zt2ak"),
    "halfcheetah-bullet-medium-v0": ("HalfCheetahBulletEnv-v0", "v4xgssp1w968a9l"),
    "halfcheetah-bullet-mixed-v0": ("HalfCheetahBulletEnv-v0", "scj1rqun963aw90"),
    "hopper-bullet-random-v0": ("HopperBulletEnv-v0", "bino8ojd7iq4p4d"),
    "hopper-bullet-medium-v0": ("HopperBulletEnv-v0", "w22kgzldn6eng7j"),
    "hopper-bullet-mixed-v0": ("HopperBulletEnv-v0", "xv3p0h7dzgxt8xb"),
    "walker2d-bullet-random-v0": ("Walker2DBulletEnv-v0", "1gwcfl2nmx6878m"),
    "walker2d-bullet-medium-v0": ("Walker2DBulletEnv-v0", "v0f2kz48b1hw6or"),
    "walker2d-bullet-mixed-v0": ("Walker2DBulletEnv-v0", "i4u2ii0d85iblou"),
    "ant-bullet-random-v0": ("AntBulletEnv-v0", "2xpmh4wk2m7i8xh"),
    "ant-bullet-medium-v0": ("AntBulletEnv-v0", "6n79kwd94xthr1t"),
    "ant-bullet-mixed-v0": ("AntBulletEnv-v0", "pmy3dzab35g4whk"),
}
DOWNLOAD_URL = "https://www.dropbox.com/s/{key}/{dataset}.hdf5?dl=1"
NETWORK_TIMEOUT = 5.0  # seconds, to connect and between two pieces of a download
SAMPLES = Path(__file__).resolve().parent / "data"  # re-collected sets for ids without a download
D4RL = "D4RL's layout"
D4RL_PYBULLET = "d4rl-pybullet's layout"
FROM_PYTHON = "transitions from Python"


class Dataset(NamedTuple):
    """Logged episodes, as they were read."""

    name: str  # the file, or "data" where the caller gave transitions
    transitions: Transitions
    lengths: np.ndarray  # (E,), steps of each whole episode
    returns: np.ndarray  # (E,), undiscounted
    terminated: np.ndarray  # (E,), bool: did it truly end?
    misplaced_ends: int  # rows whose mark and whose next observation disagree about an end
    rows: int  # of the file
    layout: str  # one of the three above
    source: str  # how it was re-collected, if it was, or ""


Columns = dict[str, np.ndarray]  # by their keys in a file of D4RL's or d4rl-pybullet's
COLUMNS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_COLUMNS = ("timeouts", "next_observations")


def check_columns(columns: Columns, name: str) -> Columns:
    """Columns of (N, dim) and (N,). Raises InputError, with ``name``, if they do not fit."""
    fitting = {}
    for key, column in columns.items():
        dimensions = 2 if key.endswith(("observations", "actions")) else 1
        if dimensions == 1 and column.shape[1:] == (1,):  # stored as (N, 1) or (N,)
            column = column[:, 0]
        observations = columns["observations"].shape
        fits = column.ndim == dimensions and column.shape[:1] == observations[:1]
        if not fits or (key == "next_observations" and column.shape != observations):
            expected = "(N,)" if dimensions == 1 else "(N, dim)"
            raise InputError(
                f"{name}: {key} of shape {column.shape} do not fit; they must be of {expected}, and"
                f" observations are of {observations}"
            )
        if not np.isfinite(column).all():
            raise InputError(f"{name}: {key} holds NaN or infinite values; remove those episodes")
        is_mark = key in ("terminals", "timeouts", "terminations")
        if is_mark and not np.isin(column, (0, 1)).all():
            raise InputError(f"{name}: {key} holds values other than 0 and 1; mark ends with 1")
        fitting[key] = column
    return fitting


def read_columns(path: Path) -> tuple[Columns, str]:
    """The columns of an HDF5 file, and how it was re-collected (or ""). Raises InputError."""
    try:
        with h5py.File(path) as file:
            keys = [*COLUMNS, *(key for key in OPTIONAL_COLUMNS if key in file)]
            # At its fullest the memory holds them about four times.
            needed = 4 * 4 * sum(file[key].size for key in keys)
            free = psutil.virtual_memory().available
            if needed > free:
                rows = len(file["rewards"])
                raise MemoryError(
                    f"{rows:,} rows need {needed:,} bytes of memory, {free:,} are free: take a part"
                    " of the file"
                )
            columns = {key: np.asarray(file[key], np.float32) for key in keys}
            source = str(file.attrs.get("source", ""))
    except Exception as error:  # h5py raises anything for what is no such file
        cause: object = error
        if isinstance(error, OSError) and error.errno:
            cause = os.strerror(error.errno)  # without h5py's own story
        raise InputError(
            f"{path}: cannot be read ({cause}); --dataset names a whole HDF5 file with"
            " observations, actions, rewards and terminals"
        ) from error
    columns = check_columns(columns, str(path))
    is_written = columns["observations"].any(1) | columns["actions"].any(1)
    is_written |= columns["rewards"] != 0
    unwritten = len(is_written) - 1 - np.flatnonzero(is_written).max(initial=-1)
    if unwritten > 1:  # a single row may be of a robot at rest
        raise InputError(f"{path}: the last {unwritten:,} rows are all zero; cut them off")
    return columns, source


def follows(columns: Columns) -> np.ndarray:
    """(N,), bool: does the next row begin with the ``next_observations`` of this one?"""
    successors = columns["next_observations"]
    return np.append((successors[:-1] == columns["observations"][1:]).all(1), False)


def transitions_of(columns: Columns) -> Transitions:
    """The transitions in the columns of a file in D4RL's layout (Fu et al., 2020).

    Row i holds (observation_i, action_i, reward_i, terminal_i, timeout_i) of ONE step. Terminal
    marks true terminations alone, timeout the last step of an episode that was cut. Without
    ``next_observations`` the successor is the next row's observation. Then a step at a cut has
    none, nor has the last row of the file: these start no transition. A true termination needs
    none; its own observation fills the place.
    """
    observations = columns["observations"]
    terminated = columns["terminals"] == 1
    if "next_observations" in columns:
        successors = columns["next_observations"]
        is_start = np.ones(len(observations), bool)
    else:
        successors = np.concatenate([observations[1:], observations[-1:]])
        successors[terminated] = observations[terminated]
        is_start = columns["timeouts"] == 0
        is_start[-1:] = False
        is_start |= terminated
    return Transitions(
        observations=torch.from_numpy(observations[is_start]),
        actions=torch.from_numpy(columns["actions"][is_start]),
        rewards=torch.from_numpy(columns["rewards"][is_start]),
        next_observations=torch.from_numpy(successors[is_start]),
        terminations=torch.from_numpy(columns["terminals"][is_start]),
    )


def as_d4rl(path: Path, columns: Columns, max_episode_steps: int) -> Columns:
    """The columns of a file in d4rl-pybullet's layout, as D4RL's layout has them.

    Row i holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the
    step before. So the transition that starts in row i takes its reward and its end from row i + 1.
    An episode of T steps closes with an extra row (last observation, zero action, terminal 1): it
    has T + 1 rows, of which the last starts no transition. Nor does the last row of a file cut in
    mid-episode. Terminal is 1 at the time limit as well: an episode of ``max_episode_steps`` steps
    was cut, not ended, and its last transition is no termination.

    Raises InputError, with ``path``, for columns that cannot be of this layout.
    """
    is_end = columns["terminals"] == 1
    is_first = np.roll(is_end, 1)
    is_first[:1] = True
    moving_ends = np.count_nonzero(columns["actions"][is_end].any(1))
    rewarded_starts = np.count_nonzero(columns["rewards"][is_first])
    if moving_ends or rewarded_starts:
        raise InputError(
            f"{path}: is of no known layout. In d4rl-pybullet's an episode ends with a row of zero"
            f" actions (here {moving_ends} of {np.count_nonzero(is_end)} do not) and begins with"
            f" reward 0 (here {rewarded_starts} do not); D4RL's has 'timeouts': add them, and keep"
            " 'terminals' for true terminations"
        )
    start = np.flatnonzero(~is_end[:-1])
    end = np.flatnonzero(is_end[start + 1])  # the last transition of each episode
    was_cut = np.diff(end, prepend=-1) == max_episode_steps
    terminals = np.zeros(len(start), np.float32)
    timeouts = np.zeros(len(start), np.float32)
    terminals[end] = ~was_cut
    timeouts[end] = was_cut
    return {
        "observations": columns["observations"][start],
        "actions": columns["actions"][start],
        "rewards": columns["rewards"][start + 1],
        "next_observations": columns["observations"][start + 1],
        "terminals": terminals,
        "timeouts": timeouts,
        "row": start,
    }


def make_dataset(
    name: str, columns: Columns, rows: int, layout: str, source: str, max_episode_steps: float
) -> Dataset:
    """The transitions and the episodes in columns of D4RL's layout.

    Raises InputError, with ``name``, for an episode longer than ``max_episode_steps``.
    """
    is_end = (columns["terminals"] == 1) | (columns["timeouts"] == 1)
    misplaced_ends = 0
    is_shuffled = False
    if "next_observations" in columns:
        goes_on = follows(columns)
        misplaced_ends = int((goes_on == is_end)[:-1].sum())  # a row goes on, or is an end
        jumps = ~goes_on & (columns["terminals"] == 0)
        is_shuffled = int(jumps.sum()) > len(jumps) / 2
    if is_shuffled:  # such rows tell no episodes
        is_end[:] = False
    first = np.insert(np.flatnonzero(is_end) + 1, 0, 0)
    lengths = np.diff(first, append=len(is_end))  # the last piece is incomplete or empty
    longest = lengths.argmax()
    if lengths[longest] > max_episode_steps and not is_shuffled:
        raise InputError(
            f"{name}: has an episode of {lengths[longest]:,} steps, from row"
            f" {columns['row'][first[longest]]:,} on, but the time limit is {max_episode_steps:,};"
            " set --max-episode-steps to that of the recording, or mark cuts in 'timeouts'"
        )
    totals = np.cumsum(columns["rewards"], dtype=np.float64)[is_end]
    return Dataset(
        name=name,
        transitions=transitions_of(columns),
        lengths=lengths[:-1],
        returns=np.diff(totals, prepend=0.0),
        terminated=columns["terminals"][is_end] == 1,
        misplaced_ends=misplaced_ends,
        rows=rows,
        layout=layout,
        source=source,
    )


def read_dataset(path: str | Path, max_episode_steps: int = 1000) -> Dataset:
    """Read an HDF5 file of logged episodes, in D4RL's or d4rl-pybullet's layout.

    ``max_episode_steps`` is the time limit of the recording. Raises InputError if the file cannot
    be read, or is in neither layout.
    """
    path = Path(path)
    columns, source = read_columns(path)
    rows = len(columns["rewards"])
    if "timeouts" in columns:
        layout = D4RL
        columns["row"] = np.arange(rows)
    elif "next_observations" in columns:
        raise InputError(
            f"{path}: has 'next_observations', as D4RL's layout has, but no 'timeouts'; add them: 1"
            " at the last step of an episode that was cut, else 0"
        )
    else:
        layout = D4RL_PYBULLET
        columns = as_d4rl(path, columns, max_episode_steps)
    return make_dataset(str(path), columns, rows, layout, source, max_episode_steps)


def dataset_of(data: Transitions) -> Dataset:
    """The caller's transitions, arrays or tensors of any kind, with the episodes that they tell.

    An episode is cut where the next row does not begin with its successor. Raises InputError.
    """
    if not isinstance(data, Transitions):
        raise InputError(f"data is a {type(data).__name__}, but must be Transitions")
    columns = {}
    for key, column in data._asdict().items():
        try:
            if isinstance(column, Tensor):
                column = column.detach().cpu().float().numpy()
            columns[key] = np.array(column, np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"data: {key} is no array of numbers: {error}") from error
    columns = check_columns(columns, "data")
    columns["terminals"] = columns.pop("terminations")
    goes_on = follows(columns) | (columns["terminals"] == 1)
    columns["timeouts"] = (~goes_on).astype(np.float32)
    return make_dataset("data", columns, len(goes_on), FROM_PYTHON, "", math.inf)


def fitting_robot(observations: Any, actions: Any) -> str:
    """A hint for messages: the robot that columns of these shapes fit, if there is one."""
    shapes = (observations.shape[-1], actions.shape[-1])
    for env_id, robot in ROBOTS.items():
        if (robot.observation_dim, robot.action_dim) == shapes:
            return f" (its shapes fit {env_id})"
    return ""


def check_transitions(data: Transitions, env: Any, name: str) -> Transitions:
    """``data`` with actions in [-1, 1]. Raises InputError, with ``name``, if it does not fit."""
    n = len(data.rewards)
    if n < 2:
        raise InputError(f"{name}: holds {n} transitions, but training needs two at least")
    spaces = {
        "observations": env.observation_space,
        "next_observations": env.observation_space,
        "actions": env.action_space,
    }
    for key, space in spaces.items():
        found = tuple(getattr(data, key).shape[1:])
        if found != space.shape:
            raise InputError(
                f"{name}: {key} are of shape {found}, but {space.shape} fits the environment; set"
                f" env_id to that of the recording{fitting_robot(data.observations, data.actions)}"
            )
    observations = data.observations[data.terminations == 0]
    successors = data.next_observations[data.terminations == 0]
    moves = (observations != observations[:1]).any()
    if moves and torch.equal(observations, successors):
        raise InputError(f"{name}: next_observations are the observations; shift them by one step")

    low = torch.from_numpy(env.action_space.low).float()
    high = torch.from_numpy(env.action_space.high).float()
    tolerance = 1e-5 * (high - low) / 2
    if ((data.actions < low - tolerance) | (data.actions > high + tolerance)).any():
        largest = data.actions.abs().max()
        raise InputError(
            f"{name}: actions reach outside the action box (up to {largest:.4g}); rescale them"
        )
    if (low == -1).all() and (high == 1).all():
        actions = data.actions
    else:
        actions = (data.actions - low) / (high - low) * 2 - 1
    used = actions.abs().max().item()
    if used <= 0.6:
        say(
            f"NOTE   the actions stay within {used:.0%} of the action box, from"
            f" {data.actions.min():.4g} to {data.actions.max():.4g}; are they in the environment's"
            " units?"
        )
    return data._replace(actions=actions)


def download(url: str, path: Path) -> None:
    """Fetch a data set; ``path`` is there only once it is whole. Raises OSError or InputError."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(timeout=NETWORK_TIMEOUT, progressbar=sys.stderr.isatty())
    part = part_of(path)
    try:
        pooch.retrieve(url, None, part.name, path.parent, downloader=downloader)
        read_dataset(part)  # it may be a web page about an error
        os.replace(part, path)
    except (requests.ConnectionError, requests.Timeout) as error:  # their text is mostly addresses
        raise OSError(f"its server cannot be reached, {type(error).__name__}") from error
    finally:
        part.unlink(missing_ok=True)


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``. If it must be an embedded sample, a NOTE says why.

    A path is taken as it is; an id comes from the cache, the network, or the samples. Raises
    InputError if an id has no file.
    """
    if dataset not in DATASETS:
        return Path(dataset)
    try:
        folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    except RuntimeError as error:
        raise InputError(f"{dataset} has no folder ({error}); set D4RL_DATASET_DIR") from error
    cached = folder / f"{dataset}.hdf5"
    if os.path.exists(cached):
        return cached
    url = DOWNLOAD_URL.format(key=DATASETS[dataset][1], dataset=dataset)
    try:
        download(url, cached)
        return cached
    except (OSError, InputError) as error:
        reason = f"{dataset} could not be downloaded ({error}); to have it, put {url} at {cached}"
        sample = SAMPLES / dataset.replace("-v0", "-sample.hdf5")
        if os.path.exists(sample):
            say(f"NOTE   {reason}")
            return sample
        raise InputError(
            f"{reason}, or re-collect it: python data/make_bullet_dataset.py --id {dataset}"
        ) from error


def note_ends(dataset: Dataset, env_id: str, limit: int) -> None:
    """Print a NOTE where ends may be in other rows, or time limits be read as terminations."""
    if dataset.misplaced_ends:
        say(
            f"NOTE   {dataset.misplaced_ends:,} rows are marked as an end though the next row goes"
            " on, or go on elsewhere without a mark: are 'terminals' or 'timeouts' a row off, or"
            " 'next_observations' of other rows, or the rows in random order?"
        )
    ended_after = dataset.lengths[dataset.terminated]
    if not len(ended_after):
        return
    lengths, counts = np.unique(ended_after, return_counts=True)
    commonest = lengths[counts.argmax()]
    if env_id == NEVER_FALLS:
        cause = f"{len(ended_after):,} terminations of a robot that never falls"
    elif counts.max() > max(1, len(dataset.lengths) / 2):
        cause = f"{counts.max():,} terminations after just {commonest} steps, the limit is {limit}"
    else:
        return
    remedies = {
        D4RL: "mark that in 'timeouts' and not in 'terminals'",
        D4RL_PYBULLET: f"set max_episode_steps (to {commonest}?)",
        FROM_PYTHON: "set terminations to 0 there",
    }
    say(f"NOTE   {cause}: if episodes were cut, {remedies[dataset.layout]}")


def load_dataset(config: Config, env: Any, data: Transitions | None = None) -> Dataset:
    """Find, read, check and print the data set, or ``data`` of the caller's. Raises InputError."""
    limit = config.max_episode_steps or env.spec.max_episode_steps
    if data is None:
        dataset = read_dataset(find_dataset(config.dataset), limit)
    else:
        dataset = dataset_of(data)
    checked = check_transitions(dataset.transitions, env, dataset.name)
    dataset = dataset._replace(transitions=checked)

    episodes = "no whole episode"
    if len(dataset.returns):
        mean = dataset.returns.mean()
        std = dataset.returns.std()
        episodes = f"{len(dataset.returns):,} episodes, mean return {mean:.1f} ± {std:.1f}"
    say(f"data   {dataset.name}: {dataset.rows:,} rows, {episodes}")
    terminations = int(checked.terminations.sum())
    say(
        f"       {len(checked.rewards):,} transitions, {terminations:,} of them terminations,"
        f" in {dataset.layout}"
    )
    if config.dataset in DATASETS and dataset.source:
        say(f"NOTE   this is not the published {config.dataset}, but {dataset.source}")
    note_ends(dataset, environment_id(config), limit)
    return dataset


def environment_id(config: Config) -> str:
    """The environment of the data set. Raises InputError if it cannot be told."""
    if config.env_id:
        return config.env_id
    if config.dataset in DATASETS:
        return DATASETS[config.dataset][0]
    if not os.path.exists(config.dataset):
        raise InputError(
            f"dataset is {config.dataset}, but must be an .hdf5 file, with env_id, or of"
            f" {', '.join(DATASETS)}"
        )
    columns, _ = read_columns(Path(config.dataset))
    hint = fitting_robot(columns["observations"], columns["actions"])
    raise InputError(f"{config.dataset}: which environment? Set env_id{hint}")


# --------------------------------------------------------------------------------------- evaluation
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which no output is shown: pybullet prints, from C, whenever it starts."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    streams = {number: os.dup(number) for number in (1, 2)}
    for number in streams:
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C holds back would come out when the program ends
        for number, stream in streams.items():
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)


@contextlib.contextmanager
def environment(env_id: str, film: bool = False) -> Iterator[Any]:
    """Context with an environment, closed at its end: one left open costs 6 MB."""
    with quiet():
        import gymnasium
        import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)

        options: Any = {"render_mode": "rgb_array"} if film else {}
        env = gymnasium.make(env_id, **options)
    with contextlib.closing(env):
        with quiet():
            # A fault of the simulator: after its first reset rewards are off by a constant. This is
            # the first, and whoever plays resets again.
            env.reset(seed=0)
        yield env


def check_environment(env_id: str, film: bool = False) -> Any:
    """The environment, tried in one step and closed: its spaces and its spec can still be read.

    Raises InputError if CIQL cannot act in it.
    """
    import gymnasium

    try:
        with environment(env_id, film) as env:
            box = env.action_space
            for space in (env.observation_space, box):
                if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                    raise ValueError(f"{space} is no box of one dimension")
            is_real = np.issubdtype(box.dtype, np.floating)
            if not (is_real and box.is_bounded() and (box.low < box.high).all()):
                raise ValueError(f"its actions need real numbers, bounds and a width, not {box}")
            if env.spec.max_episode_steps is None:
                raise ValueError("it has no time limit; register it with one")
            observation, reward, *_ = env.step((box.low + box.high) / 2)
            fits = np.shape(observation) == env.observation_space.shape
            if not (fits and np.isfinite(observation).all() and math.isfinite(reward)):
                raise ValueError(f"its first step gives {observation} and reward {reward}")
            if film:
                env.render()
    except (Exception, SystemExit) as error:  # its own code may do anything
        cause = "".join(traceback.format_exception_only(error)).strip()
        raise InputError(f"env_id is {env_id}, which CIQL cannot act in: {cause}") from error
    return env


def play_episode(
    policy: nn.Module,
    env_id: str,
    seed: int,
    stop: Sequence[int] = (),
    frames: list[Any] | None = None,
) -> float:
    """The undiscounted return of an episode, a function of policy and seed alone.

    The policy is played on the CPU, in evaluation mode.
    ``stop`` is the list that ``stop_signals`` fills meanwhile: a signal in it ends the episode.
    ``frames`` receives pictures of the first ten seconds.

    Raises RuntimeError for whatever the environment raises, SystemExit included: that would end a
    run as if it were complete.
    """
    import gymnasium
    from PIL import Image

    actor: Any = copy.deepcopy(policy).cpu().eval()
    total = 0.0
    try:
        with (
            environment(env_id, film=frames is not None) as env,
            torch.random.fork_rng([]),  # a policy that samples takes no number from training
        ):
            torch.default_generator.manual_seed(seed)
            box = env.action_space
            if not ((box.low == -1) & (box.high == 1)).all():
                env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
            observation, _ = env.reset(seed=seed)
            for t in itertools.count():
                if frames is not None and t < 600 and t % 3 == 0:  # 20 of the 60 in a second
                    image = Image.fromarray(env.render())
                    frames.append(image.quantize(64, dither=Image.Dither.NONE))
                observation, reward, terminated, truncated, _ = env.step(actor.act(observation))
                if not np.isfinite(observation).all():
                    raise ValueError(f"step {t + 1} gives {observation}")
                total += float(reward)
                if terminated or truncated or stop:
                    break
    except BaseException as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        raise RuntimeError(f"an episode of {env_id}, seed {seed}, failed: {cause}") from error
    return total


def evaluate(
    policy: nn.Module, config: Config, step: int, stop: Sequence[int] = ()
) -> dict[str, float]:
    """Play ``policy``, as it is after ``step``; prints a line, returns a row of metrics.csv.

    Each step has episodes of its own, which are the same in every run of a seed. A signal in
    ``stop`` ends them at once; the row is empty then.
    """
    env_id = environment_id(config)
    seeds = np.random.SeedSequence([config.seed, step]).generate_state(config.eval_episodes)
    episodes = []
    for seed in seeds.tolist():
        episodes.append(play_episode(policy, env_id, seed, stop))
        if stop:
            return {}
    returns = np.array(episodes)
    row: dict[str, float] = {"step": step}
    row["return_mean"] = float(returns.mean())
    row["return_std"] = float(returns.std())
    line = f"return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    if env_id in ROBOTS:
        row["score"] = float(ROBOTS[env_id].score(returns.mean()))
        line += f"  score {row['score']:.1f}"
    say(f"step {step:>9,}  {line}")
    for number, episode_return in enumerate(episodes, start=1):
        row[f"return_{number}"] = episode_return
        if not math.isfinite(episode_return):
            say(
                f"NOTE   episode {number} returned {episode_return}: {env_id} pays no finite reward"
            )
    return row


def film(path: Path, policy: nn.Module, config: Config) -> None:
    """Write a GIF of the first ten seconds of an episode."""
    frames: list[Any] = []
    play_episode(policy, environment_id(config), config.seed, frames=frames)
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
    write_whole(path, gif.getvalue())
    say(f"film   {path}")


# ------------------------------------------------------------------------------------------ records
def start_wandb(folder: Path, config: Config) -> Any:
    """A run of Weights & Biases. Raises InputError if it cannot start."""
    import wandb

    name = re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII)
    try:
        run = wandb.init(
            project=config.wandb_project,
            id=f"{name}-{zlib.crc32(str(folder.resolve()).encode()):08x}",  # a resumed run goes on
            dir=folder,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=20),
            resume="allow",
            reinit="finish_previous",
        )
    except (wandb.Error, ValueError) as error:  # of pydantic, for a bad WANDB_... variable
        reason = " ".join(str(error).split())
        raise InputError(
            f"Weights & Biases does not start ({reason}); mend that, wandb login, or set"
            " WANDB_MODE=offline"
        ) from error
    run.define_metric("*", step_metric="step")
    return run


@dataclass
class History:
    """What a run has reported so far; its checkpoint keeps it."""

    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv
    # The sum of each metric since the last line of losses, and how many steps reported it
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step; this does not wait for the device. Raises InputError."""
        for name, figure in metrics.items():
            value = torch.as_tensor(figure).detach().float()  # others round, or overflow, in a sum
            if value.ndim:
                raise InputError(f"the metric {name} is of shape {tuple(value.shape)}; average it")
            if name in ("step", "steps_per_second", "score") or name.startswith("return_"):
                raise InputError(f"a metric is named {name}, as a column of metrics.csv; rename it")
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, count + 1

    def take_means(self) -> dict[str, float]:
        """The means of the metrics since they were last taken."""
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        self.sums.clear()
        return means


def last_step(rows: Sequence[dict[str, float]], column: str) -> int:
    """The step of the last row that has this column; 0 if none has."""
    return int(max((row["step"] for row in rows if column in row), default=0))


class Log:
    """metrics.csv, TensorBoard's events and W&B."""

    def __init__(self, folder: Path, config: Config, rows: list[dict[str, float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.rows = rows  # the list in History: what is written here is saved there
        self.wandb = start_wandb(folder, config) if config.wandb_project else None
        # What an earlier process wrote after its last checkpoint is hidden.
        self.board = SummaryWriter(folder, purge_step=rows[-1]["step"] + 1 if rows else 0)
        settings = [f"| {name} | {value} |" for name, value in vars(config).items()]
        self.board.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *settings]))

    def write(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, table.getvalue().encode())

        group = "evaluation" if "return_mean" in row else "training"
        figures = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        for name, value in figures.items():
            self.board.add_scalar(name, value, int(row["step"]))
        self.board.flush()
        if self.wandb:
            # It counts rows: one that a resumed run writes again has the same number.
            self.wandb.log(figures | {"step": row["step"]}, step=len(self.rows), commit=True)

    def close(self) -> None:
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def processor() -> str:
    """The name of this machine's processor, where the system tells it."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return name[1] if name else platform.machine()


def commit() -> str:
    """The git commit of this file, with "+changes" where the tree has any; "" without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # there is no git
        return ""
    return answer.stdout.strip()


def write_provenance(
    folder: Path, config: Config, dataset: Dataset, checksum: int, agent: CIQL
) -> None:
    """Write config.json, with this process added to those that it lists, and copy the code."""
    path = folder / "config.json"
    processes = json.loads(path.read_text())["processes"] if path.exists() else []
    process = {
        "from_step": agent.steps,
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "agent": type(agent).__name__,
        "policy": type(agent.evaluated_policy()).__name__,
        "data": dataset.name,
        "data_checksum": f"{checksum:08x}",
        "commit": commit(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "processor": processor(),
    }
    code = folder / f"code-from-step-{agent.steps}"
    code.mkdir(exist_ok=True)
    for module in {__name__, type(agent).__module__}:
        source = getattr(sys.modules.get(module), "__file__", None)  # a notebook has none
        if source:
            write_whole(code / Path(source).name, Path(source).read_bytes())
    settings = dataclasses.asdict(config) | {"processes": [*processes, process]}
    write_whole(path, json.dumps(settings, indent=2).encode())


CHECKPOINT_VERSION = 4


def save_checkpoint(
    folder: Path, config: Config, checksum: int, agent: CIQL, history: History
) -> None:
    """Write checkpoint.pt: all that the steps to come depend on."""
    policy = agent.evaluated_policy()
    checkpoint = {
        "version": CHECKPOINT_VERSION,
        "config": json.dumps(dataclasses.asdict(config)),
        "checksum": checksum,  # of the data
        "history": vars(history),
        "step": agent.steps,
        "agent_class": type(agent).__name__,
        "agent": agent.training_state(),
        "policy_class": type(policy).__name__,
        "policy": policy.state_dict(),
        "dims": (agent.observation_dim, agent.action_dim),
        "random_state": torch.get_rng_state(),
        "cuda_random_state": None if agent.on_cpu else torch.cuda.get_rng_state(agent.device),
    }
    content = io.BytesIO()  # in memory first: torch.save to a full disk raises anything
    torch.save(checkpoint, content)
    write_whole(folder / "checkpoint.pt", content.getvalue())


def config_from_json(text: str) -> Config:
    """Saved settings. One that is new since then has its default, one that is gone is dropped."""
    known = {setting.name for setting in dataclasses.fields(Config)}
    saved = json.loads(text).items()
    return Config(**{name: with_tuples(value) for name, value in saved if name in known})


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU. Raises InputError if it cannot be read."""
    path = Path(folder, "checkpoint.pt")
    try:
        content = path.read_bytes()
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load looks at no checksum
            raise ValueError("a part of it has changed")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if checkpoint["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"version {checkpoint['version']}, not {CHECKPOINT_VERSION}")
        config = config_from_json(checkpoint["config"])
        checkpoint["config"] = dataclasses.replace(config, resume=str(folder), name="")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); name the folder of a run that was evaluated"
            " or stopped, as its log gives it"
        ) from error
    except Exception as error:  # torch raises anything for a file that is damaged
        raise InputError(
            f"{path} cannot be read ({error!r}); it is damaged, or of another version of the script"
        ) from error
    return checkpoint


def load_policy(
    run: str | Path, make_policy: Callable[[int, int, Config], Any] = make_policy
) -> Any:
    """The policy of a run folder, on the CPU, ready to ``act``.

    ``make_policy`` is the one that it was trained with. Raises InputError if the policy cannot be
    read, or is of another class than ``make_policy`` makes.
    """
    checkpoint = load_checkpoint(run)
    observation_dim, action_dim = checkpoint["dims"]
    policy = make_policy(observation_dim, action_dim, checkpoint["config"])
    if type(policy).__name__ != checkpoint["policy_class"]:
        raise InputError(
            f"{run} holds a {checkpoint['policy_class']}, but make_policy makes a"
            f" {type(policy).__name__}; load_policy(run, make_policy=...) takes another"
        )
    try:
        policy.load_state_dict(checkpoint["policy"])
    except RuntimeError as error:
        raise InputError(f"{run} holds another {checkpoint['policy_class']}: {error}") from error
    return policy.eval()


class Curve(NamedTuple):
    """The evaluations of a run."""

    steps: np.ndarray  # (E,)
    means: np.ndarray  # (E,), of the episodes of each
    returns: list[np.ndarray]  # E of (eval_episodes,)


def curve_of(rows: Sequence[dict[str, float]]) -> Curve:
    """The evaluations among the rows of metrics.csv."""
    evaluations = [row for row in rows if "return_mean" in row]
    returns = []
    for row in evaluations:
        names = [name for name in row if name.removeprefix("return_").isdigit()]
        returns.append(np.array([row[name] for name in names]))
    return Curve(
        steps=np.array([row["step"] for row in evaluations], int),
        means=np.array([row["return_mean"] for row in evaluations], float),
        returns=returns,
    )


def final_return(means: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """The mean of the last tenth of a run's evaluations, and how many these are.

    They are three at least, or all if there are fewer.
    """
    last = np.asarray(means)[-max(3, len(means) // 10) :]
    return float(last.mean()), len(last)


def method_name(config: Config, agent: str) -> str:
    """What an agent of this class is with these settings, for titles."""
    if agent != "CIQL":
        return agent
    if config.beta == 0:
        return "behaviour cloning"
    if config.alpha == 0:
        return "CIQL without penalty" if config.clamp_advantage else "IQL"
    return "CIQL"


def title_of(config: Config, agent: str, source: str) -> str:
    """The picture's title: method, data set, and what differs from the defaults."""
    recollected = source and config.dataset in DATASETS
    note = " (re-collected, not the published file)" if recollected else ""
    stem = Path(config.dataset).stem
    return f"{method_name(config, agent)} on {stem}{note}\n{', '.join(varied_words(config))}"


def draw_score(axes: Any, robot: Robot) -> None:
    """Add the score as an axis at the right, and random and expert as lines.

    The range of the axes stays as it is: a reference outside is in the legend alone.
    """
    limits = axes.get_ylim()
    random = robot.random_return
    expert = robot.expert_return
    axes.axhline(random, color="C2", linestyle=":", label=f"random, {random:.0f}")
    axes.axhline(expert, color="C4", linestyle="-.", label=f"expert, {expert:.0f}")
    axes.set_ylim(limits)
    right = axes.secondary_yaxis("right", functions=(robot.score, robot.episode_return))
    right.set_ylabel("normalised score")


def draw(paths: Sequence[Path], curve: Curve, title: str, dataset: Dataset, env_id: str) -> None:
    """Write the picture: evaluation returns against gradient steps, with their references."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    final, count = final_return(curve.means)
    total = len(curve.means)
    label = (
        f"evaluations; final {final:.0f} is\nthe mean of the last {count} of {total} evaluations"
    )
    axes.plot(curve.steps, curve.means, "o-", markersize=3, label=label)
    steps = np.repeat(curve.steps, [len(returns) for returns in curve.returns])
    episodes = np.concatenate(curve.returns)
    axes.plot(
        steps, episodes, ".", color="C0", alpha=0.25, markersize=4, zorder=1, label="episodes"
    )
    if len(dataset.returns):
        value = dataset.returns.mean()
        axes.axhline(value, color="C3", linestyle="--", label=f"data set, {value:.0f}")
    if env_id in ROBOTS:
        draw_score(axes, ROBOTS[env_id])
    axes.set(xlabel="gradient steps", ylabel="return of an episode", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format=paths[0].suffix[1:], dpi=110)
    for path in paths:
        write_whole(path, content.getvalue())


# ----------------------------------------------------------------------------------------- training
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context in which a signal that asks to stop joins the list, and does no more.

    Signals that are ignored stay so: nohup and shells ignore some for what they start.
    """
    caught: list[int] = []
    usual = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere none can be caught
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                usual[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Context in which torch works with the threads and the precision of ``config``."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(config.threads or threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def checksum_of(data: Transitions) -> int:
    """The CRC-32 by which a resumed run recognises its data."""
    checksum = 0
    for column in data:
        checksum = zlib.crc32(column.contiguous().numpy().data, checksum)
    return checksum


def folder_of(config: Config) -> Path:
    """The folder of the run, which need not be there."""
    if config.resume:
        return Path(config.resume)
    words = "-".join([Path(config.dataset).stem, *varied_words(config)])[:200]
    name = f"{words}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    return Path(config.out_dir, config.name or re.sub(r"[^\w.+-]", "_", name))


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """The lock that keeps other processes from training in a run's folder. Raises InputError."""
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"another process trains in {folder}; wait for it or stop it") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error})") from error
    return lock


def find_run(config: Config, stack: contextlib.ExitStack) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and its checkpoint; None for a new run.

    A folder with a checkpoint stays locked until the ``stack`` ends. A run that is there under the
    same ``name`` goes on, so a queue may start a job again by the same command. Raises InputError
    if that would learn something else.
    """
    folder = folder_of(config)
    is_there = os.path.exists(folder / "checkpoint.pt")
    if is_there:
        stack.callback(lock_folder(folder).release)
    elif not config.resume:
        return folder, None
    checkpoint = load_checkpoint(folder)
    changed = differences(checkpoint["config"], config)
    if changed and not config.resume:
        listed = [f"{name} {value} and not {vars(config)[name]}" for name, value in changed.items()]
        raise InputError(
            f"{folder} is there already, with {', '.join(listed)}; take another --name, or change"
            f" that run with --resume {folder}"
        )
    return folder, checkpoint


def make_folder(folder: Path, stack: contextlib.ExitStack) -> None:
    """Make and lock the folder of a new run; it is removed when the ``stack`` ends with no results.

    It may be left from a run that was killed before its first checkpoint. Raises InputError if it
    cannot be made, or holds something else.
    """
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()} - {".lock"}
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); take another --out-dir") from error
    if names and "code-from-step-0" not in names:
        raise InputError(f"{folder} is there, and no run; take another --name, or remove it")
    stack.callback(lock_folder(folder).release)
    if os.path.exists(folder / "checkpoint.pt"):
        raise InputError(f"another process trained in {folder} meanwhile; start it again")

    def remove_if_empty() -> None:
        if not any(os.path.exists(folder / name) for name in ("metrics.csv", "checkpoint.pt")):
            shutil.rmtree(folder, ignore_errors=True)  # it may be gone

    if is_new:
        stack.callback(remove_if_empty)


def restore(
    checkpoint: dict[str, Any], config: Config, dataset: Dataset, checksum: int, agent: CIQL
) -> History:
    """Put the agent and the random state back. Raises InputError if the run cannot go on."""
    saved: Config = checkpoint["config"]
    run = saved.resume
    env_id = environment_id(saved)
    if checkpoint["checksum"] != checksum:
        raise InputError(
            f"{run} was trained on other data than {dataset.name} holds now, or they were read with"
            " another max_episode_steps; put those back, or name their file, as in its config.json:"
            f" --dataset FILE --env-id {env_id}"
        )
    if environment_id(config) != env_id:
        raise InputError(
            f"{run} is of {env_id}, not of {environment_id(config)}: its evaluations would be of"
            " both; start another run"
        )
    if checkpoint["step"] > config.max_steps:
        raise InputError(
            f"max_steps is {config.max_steps}, but {run} is at step {checkpoint['step']}; raise it"
        )
    for key, part in (("agent_class", agent), ("policy_class", agent.evaluated_policy())):
        if checkpoint[key] != type(part).__name__:
            raise InputError(
                f"{run} holds a {checkpoint[key]}, not a {type(part).__name__}; resume it with the"
                " make_agent, and the script, that it was trained with"
            )
    try:
        agent.load_training_state(checkpoint["agent"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{run} holds an agent of another size or version; resume it with its own hidden_sizes"
            " and version"
        ) from error
    changed = differences(config, saved)
    if changed:
        listed = [f"{name} {value} (was {getattr(saved, name)})" for name, value in changed.items()]
        say(f"NOTE   the run goes on with other settings: {', '.join(listed)}")
    if config.policy_lr_decay and config.max_steps != saved.max_steps:
        say("NOTE   the policy's learning rate goes on by the cosine over the new max_steps")
    torch.set_rng_state(checkpoint["random_state"])
    if not agent.on_cpu and checkpoint["cuda_random_state"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_random_state"], agent.device)
    history = History(**checkpoint["history"])
    for name, (total, count) in history.sums.items():
        history.sums[name] = total.to(agent.device), count
    return history


def check_finite(agent: CIQL, history: History, data: Transitions) -> None:
    """Raise FloatingPointError if a loss or weight is NaN or infinite, before it is saved."""
    bad = [name for name, (total, _) in history.sums.items() if not total.isfinite()]
    if bad or not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise FloatingPointError(
            f"{', '.join(bad) or 'a weight'} became NaN or infinite up to step {agent.steps:,};"
            " lower lr, beta or max_weight, or scale the rewards (up to"
            f" {data.rewards.abs().max():.3g} here)"
        )


# The log has these columns in this order, followed by those that an idea adds.
METRICS_ORDER = (
    "value_loss",
    "q_loss",
    "policy_loss",
    "penalty",
    "gap1",
    "gap2",
    "q",
    "v",
    "advantage",
    "policy_std",
    "clamp_open",
)


def log_losses(log: Log, history: History, step: int, steps_per_second: float) -> None:
    """Write and print the means of the metrics since the last line."""
    means = history.take_means()
    ordered = {name: means.pop(name) for name in METRICS_ORDER if name in means} | means
    log.write({"step": step, **ordered, "steps_per_second": steps_per_second})
    figures = "  ".join(f"{name} {value:.4g}" for name, value in ordered.items())
    say(f"step {step:>9,}  {figures}  {steps_per_second:.0f} steps/s")


def accelerate(agent: CIQL, prepared: Transitions, stack: contextlib.ExitStack) -> None:
    """Have the agent use all of its threads and the compiler, until the ``stack`` ends."""
    c = agent.config
    where = f"cpu, {c.threads} threads"
    if not agent.on_cpu:
        where = torch.cuda.get_device_name(agent.device)
    compiling = "; compiling takes up to a minute the first time" if c.compile else ""
    say(f"agent  {type(agent).__name__}, {where}{compiling}")
    with_meter = agent.on_cpu and c.alpha > 0
    beside = with_meter and c.threads > 1
    # Gaps of your own may change what the losses read, and a critic may draw random numbers: then
    # it would be left to chance which come first. Else both have half of the threads.
    if beside and (type(agent).gaps is not CIQL.gaps or agent.critic_draws(prepared)):
        beside = False
    if beside:
        torch.set_num_threads(c.threads // 2)
    if c.compile:
        agent.compile_losses(prepared)
        # A call that fits none of the graphs, should there be one, runs eagerly.
        stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
    if with_meter:
        agent.meter = make_meter(agent, beside, stack)


def train(
    config: Config,
    data: Transitions | None = None,
    make_agent: Callable[[int, int, Config], CIQL] = CIQL,
    report: Callable[[dict[str, float], Path], object] | None = None,
) -> tuple[Path, Curve]:
    """Train an agent, print the log, write the picture; returns the run folder and the curve.

    ``data`` are transitions of the caller's own, from ``config.env_id``; none: ``config.dataset``.
    A resumed run goes on with ``config``; its own is ``load_checkpoint(folder)["config"]``.
    ``report`` is called after every evaluation, once it is saved, with its row of metrics.csv and
    the folder.

    Raises InputError for what is wrong with settings and data, and FloatingPointError for losses
    that are not finite. After saving what can be saved, raises OSError for a machine that fails (a
    full disk), RuntimeError for an environment that does, and SystemExit for a signal.
    """
    start = time.perf_counter()
    check(config)
    if config.evaluate:
        raise InputError("evaluate is set, but train plays nothing; use load_policy and evaluate")
    if data is not None:
        if not config.env_id:
            raise InputError("env_id is not set, but data come without an environment; set it")
        config = dataclasses.replace(config, dataset="own-transitions")
    elif config.dataset == "own-transitions":
        raise InputError("the run is on transitions from Python; resume it there, with its data")
    env_id = environment_id(config)
    with contextlib.ExitStack() as stack:
        # Data and agent
        folder, checkpoint = find_run(config, stack)
        saved_threads = checkpoint["config"].threads if checkpoint else 0
        threads = config.threads or saved_threads or min(4, torch.get_num_threads())
        config = dataclasses.replace(config, threads=threads)
        stack.enter_context(torch_settings(config))
        env = check_environment(env_id, config.film)
        dataset = load_dataset(config, env, data)
        checksum = checksum_of(dataset.transitions)
        torch.manual_seed(config.seed)
        agent = make_agent(env.observation_space.shape[0], env.action_space.shape[0], config)
        prepared = agent.prepare(dataset.transitions)
        agent.check_optimizers()
        with torch.random.fork_rng([]):  # a policy that cannot act shall not be trained first
            actor: Any = copy.deepcopy(agent.evaluated_policy()).cpu().eval()
            actor.act(dataset.transitions.observations[0].numpy())
        history = History()
        if checkpoint:
            history = restore(checkpoint, config, dataset, checksum, agent)
        logged = last_step(history.rows, "steps_per_second")
        evaluated = last_step(history.rows, "return_mean")
        if agent.steps == config.max_steps == evaluated:
            say(
                f"done   {folder} has all of its {config.max_steps:,} steps: nothing is left; raise"
                " --max-steps, or play and film it with --evaluate"
            )
            return folder, curve_of(history.rows)
        accelerate(agent, prepared, stack)

        # Run folder
        stop = stack.enter_context(stop_signals())
        if not checkpoint:
            make_folder(folder, stack)
        write_provenance(folder, config, dataset, checksum, agent)
        log = Log(folder, config, history.rows)
        stack.callback(log.close)
        say(f"run    {folder}, from step {agent.steps:,}")
        title = title_of(config, type(agent).__name__, dataset.source)
        pictures = (Path(config.plot), folder / Path(config.plot).name)
        flags_suffice = type(agent) is CIQL and data is None
        how_to_go_on = f"--resume {shlex.quote(str(folder))}"
        if not flags_suffice:
            how_to_go_on = f"train in Python, with config.resume {str(folder)!r}"

        def save() -> None:
            check_finite(agent, history, prepared)
            save_checkpoint(folder, config, checksum, agent, history)

        # Steps
        bar = tqdm(desc="train", total=config.max_steps, initial=agent.steps, disable=None)
        stack.enter_context(bar)
        timed = agent.steps  # steps per second are those since then
        since = time.perf_counter()
        while True:
            # What is due after a step; a run that was stopped in an evaluation begins with it.
            is_last = agent.steps == config.max_steps
            try:
                if agent.steps > logged and (is_last or agent.steps % config.log_interval == 0):
                    check_finite(agent, history, prepared)
                    speed = (agent.steps - timed) / (time.perf_counter() - since)
                    log_losses(log, history, agent.steps, speed)
                    logged = timed = agent.steps
                    since = time.perf_counter()
                if agent.steps > evaluated and (is_last or agent.steps % config.eval_interval == 0):
                    check_finite(agent, history, prepared)
                    row = evaluate(agent.evaluated_policy(), config, agent.steps, stop)
                    if stop:
                        break
                    draw(pictures, curve_of([*history.rows, row]), title, dataset, env_id)
                    log.write(row)
                    save()
                    if report:
                        report(row, folder)
                    evaluated = timed = agent.steps
                    since = time.perf_counter()
            except Exception as error:
                with contextlib.suppress(OSError, FloatingPointError):  # the first is reported
                    save()
                if isinstance(error, OSError):
                    is_saved = (folder / "checkpoint.pt").exists()
                    remedy = f"go on with {how_to_go_on}" if is_saved else "start it again"
                    error.add_note(f"mend that, then {remedy}")
                raise
            if stop or is_last:
                break

            history.add(agent.update(prepared))
            bar.update()

        if stop and evaluated < config.max_steps:  # a complete run ends as usual
            if agent.steps > 0:
                save()
                with contextlib.suppress(OSError):  # after a hangup there is no terminal
                    say(f"stopped at step {agent.steps:,}; go on with {how_to_go_on}")
            raise SystemExit(128 + stop[0])

    curve = curve_of(history.rows)
    final, count = final_return(curve.means)
    score = f", score {ROBOTS[env_id].score(final):.1f}" if env_id in ROBOTS else ""
    total = len(curve.means)
    say(f"final  {final:.1f} is the mean of the last {count} of {total} evaluations{score}")
    if config.film:
        film(folder / "policy.gif", agent.evaluated_policy(), config)
    say(f"wrote  {config.plot} and {folder}, in {(time.perf_counter() - start) / 60:.1f} minutes")
    if flags_suffice:
        playing = f"--evaluate {shlex.quote(str(folder))}"
        say(f"next   {playing} --film, or {how_to_go_on} --max-steps {2 * config.max_steps}")
    else:
        say(f"next   load_policy({str(folder)!r}, ...), or {how_to_go_on} and a larger max_steps")
    return folder, curve


# ----------------------------------------------------------------------------------------- commands
def parse(arguments: Sequence[str]) -> Config:
    """Settings from the command line; those of the run that is resumed or evaluated are defaults.

    Raises InputError; a flag that tyro cannot read ends the program with its message.
    """
    import tyro

    config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py")
    run = config.resume or config.evaluate
    if run and not (config.resume and config.evaluate):  # ``check`` refuses both
        own = {"resume": config.resume, "evaluate": config.evaluate, "film": False}
        saved = dataclasses.replace(load_checkpoint(run)["config"], **own)
        config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py", default=saved)
    check(config)
    return config


def evaluate_run(config: Config) -> None:
    """Play the policy of the run folder ``config.evaluate``. Raises InputError."""
    env_id = environment_id(config)
    policy = load_policy(config.evaluate)
    checkpoint = load_checkpoint(config.evaluate)
    env = check_environment(env_id, config.film)
    dims = (*env.observation_space.shape, *env.action_space.shape)
    if dims != tuple(checkpoint["dims"]):
        raise InputError(
            f"env_id is {env_id}, of {dims} observations and actions, but the policy in"
            f" {config.evaluate} has {tuple(checkpoint['dims'])}"
        )
    with torch_settings(config):
        evaluate(policy, config, checkpoint["step"])
        if config.film:
            film(Path(config.evaluate, "policy.gif"), policy, config)


def complain(cause: object) -> None:
    """One line on stderr: what happened, and what was added on the way up."""
    text = "; ".join([str(cause), *getattr(cause, "__notes__", [])])
    print("ciql_pybullet:", " ".join(text.split()), file=sys.stderr)


def main() -> None:
    """The command line.

    Exit codes: 2 for bad input, or settings too large for the memory; 1 for losses not finite, a
    fault of the machine, or a bug; 128 + n for signal n.
    """
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.path.append(os.getcwd())  # where the MODULE of env_id may be
    try:
        config = parse(sys.argv[1:])
        if config.evaluate:
            evaluate_run(config)
        else:
            train(config)
    except InputError as error:
        complain(error)
        sys.exit(2)
    except (OSError, FloatingPointError) as error:
        complain(error)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        # On the CPU torch raises a plain RuntimeError; one with a cause is of an environment.
        kinds = (MemoryError, torch.OutOfMemoryError)
        on_cpu = "allocate memory" in str(error) and error.__cause__ is None
        if not isinstance(error, kinds) and not on_cpu:
            raise
        complain("out of memory; lower batch_size, num_neg or hidden_sizes")
        sys.exit(2)


if __name__ == "__main__":
    main()
