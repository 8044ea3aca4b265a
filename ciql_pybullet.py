# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   """pybullet==3.2.7; python_version < '3.12' and sys_platform == 'linux' \
#      and platform_machine == 'x86_64'""",
#   """pybullet-arm64==3.2.8; python_version >= '3.12' or sys_platform != 'linux' \
#      or platform_machine != 'x86_64'""",
#   "pybullet_envs_gymnasium==0.6.0",
#   "h5py==3.16.0",
#   "filelock==4.3.1",
#   "matplotlib==3.11.2",
#   "pillow==13.0.0",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
# ]
# [tool.uv]  # pybullet-arm64, a fork with wheels for all the rest, stands for the name pybullet
# override-dependencies = [
#   """pybullet==3.2.7; python_version < '3.12' and sys_platform == 'linux' \
#      and platform_machine == 'x86_64'""",
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

The losses and both E are means over a batch, and ReLU stands outside of E. So the penalty of a Q
either acts on the whole batch, or its clamp is closed and it is 0. The losses of Q1 and Q2 are
added. After a true termination y is r alone. exp(β · adv) is capped at max_weight. IQL has no
max(0, ·) in adv (--no-clamp-advantage). With q_weight another loss trains π: ``climbing_loss``. A
policy_share of V(s') in y is Q̄(s', μ(s')) instead, where μ(s) is the mean of π.

    python ciql_pybullet.py                       train with the settings below
    python ciql_pybullet.py --alpha 0             any setting is also a flag
    python ciql_pybullet.py --resume runs/RUN     go on with a stopped run

The file goes from the method to its surroundings: settings, networks, losses, agent, training.
Whoever stops there has read the method and the whole loop. What training calls follows: machine,
data, evaluation, records, commands.

IQL: Kostrikov et al., 2021 (arXiv 2110.06169). CQL: Kumar et al., 2020 (arXiv 2006.04779). D4RL: Fu
et al., 2020 (arXiv 2004.07219). Data sets: github.com/takuseno/d4rl-pybullet.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import functools
import http.client
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import h5py
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


# ----------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Config:
    """CIQL on the PyBullet D4RL data sets. Every setting is also a flag: --max-steps 20000."""

    # The comments are what --help shows. ``check``, near the end, holds the ranges.

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of 12 ids, or the path of an .hdf5 file
    env_id: str = ""  # an .hdf5 file's environment; MODULE:ID imports MODULE, which registers it
    max_episode_steps: int = 0  # time limit that the data were recorded with; 0: the environment's
    seed: int = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL and its networks
    gamma: float = 0.99  # discount
    tau: float = 0.8  # expectile of V; 0.5: mean over the data's actions, near 1: the best of them
    beta: float = 1.0  # inverse temperature of the policy weights; 0 gives behaviour cloning
    alpha: float = 1.0  # weight of the conservative penalty; 0 leaves it out, as in IQL
    num_neg: int = 10  # off-data actions per state in the penalty
    polyak: float = 0.005  # share of the critic that moves into its target each step
    clamp_advantage: bool = True  # max(0, A) in the policy weights; IQL does not clamp
    max_weight: float = 100.0  # cap of the policy weights exp(beta * A)
    q_weight: float = 0.0  # of Q in the policy's loss, 0.5 to 1; 0: AWR, by the settings above
    policy_share: float = 0.0  # how much of V(s') in y is Q of the policy's action instead
    layer_norm: bool = False  # LayerNorm before each ReLU of the critic
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
    plot: str = "eval_returns.png"  # .png, .pdf or .svg of the returns; a copy is in the run folder
    out_dir: str = "runs"  # every run makes a folder in here: settings, metrics, checkpoint
    wandb_project: str = ""  # also log to this Weights & Biases project (needs: pip install wandb)
    film: bool = False  # film an episode in the end: policy.gif in the run's folder
    resume: str = ""  # go on from the checkpoint in this run folder, with its settings
    evaluate: str = ""  # train nothing: play this run folder's policy, in its last episodes again


class InputError(ValueError):
    """A bad setting, file or network; its message is one line that names cause and remedy."""


# ----------------------------------------------------------------------------------------- networks
def mlp(*sizes: int, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between: (B, sizes[0]) -> (B, sizes[-1])."""
    *inner_sizes, size_out = sizes
    layers: list[nn.Module] = []
    for size_in, size in itertools.pairwise(inner_sizes):
        layers.append(nn.Linear(size_in, size))
        if layer_norm:
            layers.append(nn.LayerNorm(size))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(inner_sizes[-1], size_out))


class QNetworks(nn.Module):
    """Q1(s, a), Q2(s, a), ...: (B, observation_dim), (B, action_dim) -> (num_q, B).

    LayerNorm bounds how they extrapolate (Ball et al., 2023, arXiv 2302.02948).
    """

    def __init__(
        self, observation_dim: int, action_dim: int, config: Config, num_q: int = 2
    ) -> None:
        super().__init__()
        sizes = (observation_dim + action_dim, *config.hidden_sizes, 1)
        self.q = nn.ModuleList(mlp(*sizes, layer_norm=config.layer_norm) for _ in range(num_q))

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
        # ``act`` gets the simulator's own observations. The mean and std of the data, by which it
        # normalises them, are filled in by ``CIQL.prepare``.
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
    """The policy that is trained, saved, loaded and evaluated: replace the class for another.

    It has the methods and the two buffers of ``GaussianPolicy``. This is a function, and no method
    of ``CIQL``, because ``load_policy`` makes a policy without an agent.
    """
    return GaussianPolicy(observation_dim, action_dim, config.hidden_sizes)


# ------------------------------------------------------------------------------------------- losses
def expectile_loss(diff: Tensor, tau: float) -> Tensor:
    """mean of |τ − 1(diff<0)| · diff²: (B,) -> (). IQL, equation 5, with diff = Q̄(s,a) − V(s)."""
    weight = torch.where(diff < 0, 1 - tau, tau)
    return (weight * diff**2).mean()


def conservative_gap(q_neg: Tensor, q_data: Tensor) -> Tensor:
    """E_ā Q(s,ā) − E_a Q(s,a) of each Q: (num_q, B · num_neg), (num_q, B) -> (num_q,).

    CQL, equation 2. The Q may be bfloat16 numbers, but their means shall not be.
    """
    dtype = torch.promote_types(q_neg.dtype, torch.float32)
    return q_neg.mean(-1, dtype=dtype) - q_data.mean(-1, dtype=dtype)


def awr_weights(advantage: Tensor, beta: float, max_weight: float, clamp_advantage: bool) -> Tensor:
    """min(exp(β · max(0, A)), max_weight): (B,) -> (B,), with A = Q̄(s,a) − V(s).

    IQL, equation 7, which has no max(0, ·): there clamp_advantage is False.
    """
    if clamp_advantage:
        advantage = advantage.clamp(min=0)
    return torch.exp(beta * advantage).clamp(max=max_weight)


def climbing_loss(squared_errors: Tensor, gains: Tensor, q_weight: float) -> Tensor:
    """log E (μ(s) − a)² − w · E ΔQ / rms ΔQ: (B, action_dim), (B,) -> ().

    ``gains`` are ΔQ = Q̄(s, μ(s)) − Q̄(s, a); rms ΔQ carries no gradient. This has the two terms of
    DDPG+BC (Park et al., 2024, arXiv 2406.09329), without their units: log E (μ(s) − a)² is, but
    for a factor, the cloning loss of a Gaussian whose σ fits best, and rms ΔQ grows with the
    distance of μ(s) from a. If Q were linear in a, the policy would with w = 1 move away from the
    data by as much as their actions scatter, whatever the rewards, and from w = 2 on without end.
    """
    rms = gains.detach().square().mean().sqrt()
    return squared_errors.mean().log() - q_weight * gains.mean() / rms


# -------------------------------------------------------------------------------------------- agent
class Transitions(NamedTuple):
    """N transitions, float32."""

    observations: Tensor  # (N, observation_dim)
    actions: Tensor  # (N, action_dim), in [-1, 1]
    rewards: Tensor  # (N,)
    next_observations: Tensor  # (N, observation_dim)
    terminations: Tensor  # (N,), 1 where the episode truly ended, 0 where it went on or was cut


Metrics = dict[str, Tensor]  # scalars by name, for the log
Row = dict[str, float]  # of metrics.csv: the means of some steps' metrics, or an evaluation


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
    ``make_agent``. After replacing or adding a network, call ``make_optimizer`` with all of them. A
    run saves parameters, buffers, attributes that are numbers, and attributes that have a
    ``state_dict``, as optimisers have; nothing else. So keep a tensor as a ``nn.Buffer``.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.device = find_device(config.device)
        self.policy = make_policy(observation_dim, action_dim, config)
        v = mlp(observation_dim, *config.hidden_sizes, 1)
        self.value = nn.Sequential(v, nn.Flatten(0))  # V(s): (B, 1) -> (B,)
        self.critic = self.make_critic()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(self.device)
        self.make_optimizer(self.policy, self.value, self.critic)
        self.steps = 0  # gradient steps taken
        self.rough_dtype = find_rough_dtype()

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def make_critic(self) -> nn.Module:
        """The critic; its target is a copy. It may hold any number of Q."""
        return QNetworks(self.observation_dim, self.action_dim, self.config)

    def make_optimizer(self, policy: nn.Module, *others: nn.Module) -> None:
        """Adam. The policy is a group of its own, as ``policy_lr_decay`` lowers its rate alone."""
        rest = [parameter for network in others for parameter in network.parameters()]
        groups = [{"params": list(policy.parameters())}, {"params": rest}]
        self.optimizer = torch.optim.Adam(groups, lr=self.config.lr, fused=True)

    @torch.no_grad()
    def targets(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Q̄(s,a), the target of V, and y = r + γ V(s'), the target of Q: (B,) each.

        A ``policy_share`` of V(s') is Q̄(s', μ(s')) instead. All of it is as in TD3+BC (Fujimoto
        and Gu, 2021, arXiv 2106.06860), but for its noise and its average of the policy.
        """
        c = self.config
        q_bar = self.target_critic(batch.observations, batch.actions).amin(0)
        s_next = batch.next_observations
        v_next = self.value(s_next)
        if c.policy_share > 0:
            q_next = self.target_critic(s_next, self.policy(s_next)).amin(0)
            v_next = torch.lerp(v_next, q_next, c.policy_share)
        y = batch.rewards + c.gamma * (1 - batch.terminations) * v_next
        return q_bar, y

    def policy_loss(self, batch: Transitions, advantage: Tensor) -> Tensor:
        """Cloning weighted by the advantage (B,), or with ``q_weight`` cloning and climbing: ()."""
        c = self.config
        s = batch.observations
        a = batch.actions
        if c.q_weight > 0:
            # Q̄(s,a) again, as ``losses`` gives the advantage alone. Compiled, it is computed once.
            mu = self.policy(s)
            gains = self.target_critic(s, mu).amin(0) - self.target_critic(s, a).amin(0)
            return climbing_loss((mu - a) ** 2, gains, c.q_weight)
        weights = awr_weights(advantage, c.beta, c.max_weight, c.clamp_advantage)
        return -(weights * self.policy.log_prob(s, a)).mean()

    def losses(self, batch: Transitions) -> tuple[Tensor, Metrics]:
        """The sum of the losses of V, Q and π without the penalty, (), and figures for the log.

        Targets, advantage and the weights of Q̄ have no gradient, so each loss trains its own
        network alone, and one backward pass serves all three. Do not change ``batch`` in place: the
        penalty reads it, too.
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

        # π
        advantage = (q_bar - v).detach()
        policy_loss = self.policy_loss(batch, advantage)

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

    def off_data_actions(self, batch: Transitions) -> Tensor:
        """ā of the penalty, uniform in the action box, no gradient: (B, num_neg, action_dim)."""
        size = (len(batch.rewards), self.config.num_neg, self.action_dim)
        return torch.empty(size, device=self.device).uniform_(-1, 1)

    def gaps(self, batch: Transitions, negative_actions: Tensor) -> Tensor:
        """The ``conservative_gap`` of each Q, (num_q,); its ReLU is the penalty.

        ``negative_actions`` are the ``off_data_actions``.
        """
        s = batch.observations.repeat_interleave(self.config.num_neg, 0)
        q_neg = self.critic(s, negative_actions.flatten(0, 1))
        q_data = self.critic(batch.observations, batch.actions)
        return conservative_gap(q_neg, q_data)

    @torch.no_grad()
    def measure_gaps(self, batch: Transitions, negative_actions: Tensor) -> tuple[Tensor, Tensor]:
        """The gaps without gradient, and a margin that rounding stays below: (num_q,) each.

        They are roughly measured, with numbers of 8 significant bits, where the processor has such.
        No error above the margin was seen, with batches of 4 to 1,024.
        """
        is_rough = self.rough_dtype is not torch.float32
        with torch.autocast("cpu", self.rough_dtype, enabled=is_rough):
            gaps = self.gaps(batch, negative_actions)
            q_data = self.critic(batch.observations, batch.actions).float()
        # Rounding goes up or down, so a mean's error falls with the root of the batch. Both terms
        # of a gap have one, and |E_ā Q(s,ā)| is at most |gap| + E_a |Q(s,a)|.
        rounding = 5 * torch.finfo(self.rough_dtype).eps / math.sqrt(len(batch.rewards))
        return gaps, rounding * (gaps.abs() + 2 * q_data.abs().mean(-1))

    def sample(self, data: Transitions) -> Transitions:
        """A batch of ``data``: transitions drawn uniformly, with replacement."""
        index = torch.randint(len(data.rewards), (self.config.batch_size,), device=self.device)
        return Transitions(*(column.index_select(0, index) for column in data))

    def update(self, data: Transitions) -> Metrics:
        """One gradient step on a batch drawn from ``data``, which ``prepare`` made.

        It lowers ``losses`` + α · Σ ReLU(``gaps``).
        """
        c = self.config
        if not self.on_cpu:  # CUDA graphs may overwrite what the last step returned
            torch.compiler.cudagraph_mark_step_begin()
        batch = self.sample(data)
        self.optimizer.zero_grad()
        loss, metrics = self.losses(batch)
        loss.backward()
        if c.alpha > 0:
            metrics |= self.backward_of_penalty(batch)
            if "q_loss" in metrics:  # losses of your own may report none
                metrics["q_loss"] = metrics["q_loss"] + c.alpha * metrics["penalty"]

        if c.policy_lr_decay:
            policy_group, *_ = self.optimizer.param_groups
            policy_group["lr"] = c.lr * (1 + math.cos(math.pi * self.steps / c.max_steps)) / 2
        self.optimizer.step()
        self.policy.project(c.min_log_std)
        move_towards(self.target_critic, self.critic, c.polyak)
        self.steps += 1
        return metrics

    def backward_of_penalty(self, batch: Transitions) -> Metrics:
        """Add the gradient of the penalty to that of the losses; returns its figures for the log.

        With uniform ā the gaps are soon nearly always below 0, where ReLU has no gradient. So on
        the CPU they are first measured roughly, computed only where the clamp may be open, and
        followed backwards only where it is; the gaps of other steps are logged as measured. On CUDA
        the host would have to wait for the measure, so there all is always computed.
        """
        negative_actions = self.off_data_actions(batch)
        may_be_open = True
        if self.on_cpu:
            gaps, margin = self.measure_gaps(batch, negative_actions)
            may_be_open = bool((gaps >= -margin).any())
        if may_be_open:
            gaps = self.gaps(batch, negative_actions)
        penalty = torch.relu(gaps).sum()
        if not self.on_cpu or penalty > 0:
            (self.config.alpha * penalty).backward()
        penalty = penalty.detach()
        # clamp_open: the penalty of any Q acts
        metrics = {"penalty": penalty, "clamp_open": (penalty > 0).float()}
        for number, gap in enumerate(gaps.detach(), start=1):
            metrics[f"gap{number}"] = gap
        return metrics

    def evaluated_policy(self) -> nn.Module:
        """The policy to evaluate and to save; override it to return an average of it, say."""
        return self.policy

    def prepare(self, data: Transitions) -> Transitions:
        """Normalise the observations, tell the policies how, and move the data to the device."""
        std, mean = torch.std_mean(data.observations, 0)
        std += 1e-3  # a constant column must not divide by 0
        for name, buffer in self.named_buffers():  # of the policy, and of copies of it
            if name.endswith("observation_mean"):
                buffer.copy_(mean)
            elif name.endswith("observation_std"):
                buffer.copy_(std)
        normalised = data._replace(
            observations=(data.observations - mean) / std,
            next_observations=(data.next_observations - mean) / std,
        )
        return Transitions(*(column.to(self.device) for column in normalised))

    def check_attributes(self) -> None:
        """Raise InputError for what would never be trained, or never saved."""
        for module in self.modules():
            for name, part in vars(module).items():
                if isinstance(part, (Tensor, np.ndarray, np.generic)):
                    raise InputError(f"{name} is an array, which is not saved; make it a nn.Buffer")
        trained = {
            parameter
            for part in vars(self).values()
            if isinstance(part, torch.optim.Optimizer)
            for group in part.param_groups
            for parameter in group["params"]
        }
        own = set(self.parameters())
        forgotten = {parameter for parameter in own - trained if parameter.requires_grad}
        if forgotten or trained - own:
            raise InputError(
                "the optimisers do not train the agent's parameters: give each network to"
                " make_optimizer, and hold it as an attribute, a list of them in nn.ModuleList"
            )

    def training_state(self) -> dict[str, Any]:
        """What the next step depends on, besides the data and the random state."""
        self.check_attributes()  # a run asks before training, and at each save
        numbers = {}
        parts = {}
        for name, part in vars(self).items():
            if isinstance(part, (int, float)):
                numbers[name] = part
            elif hasattr(part, "state_dict"):
                parts[name] = part.state_dict()
        return {"numbers": numbers, "networks": self.state_dict(), "parts": parts}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``training_state``. Raises InputError for that of other attributes."""
        own = self.training_state()
        for kind in ("networks", "parts"):
            names = state[kind].keys() ^ own[kind].keys()
            if names:
                raise InputError(f"the run and the agent differ in {', '.join(names)}")
        vars(self).update(state["numbers"])
        self.load_state_dict(state["networks"])
        for name, part in state["parts"].items():
            getattr(self, name).load_state_dict(part)

    def accelerate(self, data: Transitions) -> None:
        """Compile what takes the time, or say why that cannot be done: no C++ compiler, say.

        A copy takes two steps to try it, so the agent stays as it is.
        """
        say("       compiling takes up to a minute the first time")
        names = ["losses"]
        how: dict[str, Any] = {"options": {"cpp_wrapper": True}}  # no Python between the kernels
        if not self.on_cpu:
            how = {"mode": "reduce-overhead"}  # CUDA graphs
        if self.config.alpha > 0:  # on the CPU the few backward passes of the penalty run eagerly
            names.append("measure_gaps" if self.on_cpu else "gaps")
        torch.compiler.reset()  # an earlier run's graphs are no longer needed
        compiled = {}
        trial = copy.deepcopy(self)
        for name in set(names) - vars(self).keys():  # a function set on the instance runs eagerly
            compiled[name] = torch.compile(getattr(type(self), name), fullgraph=True, **how)
            setattr(trial, name, functools.partial(compiled[name], trial))
        random_state = get_random_state(self.device)
        try:
            trial.update(data)
            # Losses that read a number like self.steps would need a graph for every step.
            with torch.compiler.set_stance("fail_on_recompile"):
                trial.update(data)
        except Exception as error:  # noqa: BLE001  (a bug in ``losses`` recurs in the first step)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"NOTE   the losses could not be compiled and run eagerly, slower: {reason}")
            return
        finally:
            set_random_state(random_state, self.device)
        for name, function in compiled.items():
            setattr(self, name, functools.partial(function, self))


# ----------------------------------------------------------------------------------------- training
def train(
    config: Config,
    data: Transitions | None = None,
    make_agent: Callable[[int, int, Config], CIQL] = CIQL,
    report: Callable[[Row, Path], object] | None = None,
) -> tuple[Path, list[Row]]:
    """Train an agent, print the log, draw the picture; returns the run's folder and evaluations.

    ``data`` are transitions of the caller's own, from ``config.env_id``; none: ``config.dataset``.
    If the folder that ``config.name`` or ``config.resume`` selects holds a run, that goes on, if it
    is of the same settings, agent and data. ``report`` is called after every evaluation,
    once it is saved, with its row of metrics.csv and the folder.

    Raises InputError for what is wrong with settings and data, FloatingPointError for losses that
    are not finite, and SystemExit for a signal, once all is saved.
    """
    check(config)
    with contextlib.ExitStack() as stack:
        config = use_machine(config, stack)
        if data is not None:
            config = dataclasses.replace(config, dataset="own-transitions")  # as records call it
        dataset = load_dataset(config, data)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)  # for ideas and environments that draw from it
        observations, actions, *_ = dataset.transitions
        agent = make_agent(observations.shape[1], actions.shape[1], config)
        prepared = agent.prepare(dataset.transitions)
        run = Run(config, agent, dataset)
        run.open(stack)  # what a stopped run left there is restored
        say(f"agent  {type(agent).__name__} on {agent.device}, threads: {config.threads}")
        if config.compile:
            agent.accelerate(prepared)
        say(f"run    {run.folder}, from step {agent.steps:,}")

        stop = stack.enter_context(stop_signals())
        bar = stack.enter_context(
            tqdm(desc="train", total=config.max_steps, initial=agent.steps, disable=None)
        )
        run.restart_clock()
        while agent.steps < config.max_steps and not stop:
            run.add(agent.update(prepared))
            bar.update()
            is_last = agent.steps == config.max_steps
            if is_last or agent.steps % config.log_interval == 0:
                run.log_losses()
            if is_last or agent.steps % config.eval_interval == 0:
                row = evaluate(agent.evaluated_policy(), config, agent.steps)
                run.log(row)
                run.save()
                plot_returns(run)
                if report:
                    report(row, run.folder)
                run.restart_clock()
        if agent.steps < config.max_steps:
            run.save()
            say(f"stopped at step {agent.steps:,}; go on with {run.how_to_go_on()}")
            raise SystemExit(128 + stop[0])

    evaluations = evaluations_of(run.rows)
    final, count = final_return([row["return_mean"] for row in evaluations])
    line = f"final  {final:.1f} is the mean of the last {count} of {len(evaluations)} evaluations"
    if run.env_id in ROBOTS:
        line += f", score {ROBOTS[run.env_id].score(final):.1f}"
    say(line)
    plot_returns(run)  # a run that was complete may have another plot now
    if config.film:
        write_film(run.folder / "policy.gif", agent.evaluated_policy(), config)
    say(f"wrote  {run.plot} and {run.folder}")
    return run.folder, evaluations


def say(line: str) -> None:
    """Print a line of the log on stdout, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # after a hangup there is no terminal, but the run is saved
        tqdm.write(line)


# ------------------------------------------------------------------------------------------ machine
def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device  # it is tried, and "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise InputError(f"device is {name}, which is not here; use auto, cpu or cuda") from error


def find_rough_dtype() -> torch.dtype:
    """bfloat16 where Linux says that the processor multiplies such numbers, else float32."""
    information = Path("/proc/cpuinfo")
    if information.exists() and "bf16" in information.read_text():
        return torch.bfloat16
    return torch.float32


def use_machine(config: Config, stack: contextlib.ExitStack) -> Config:
    """Have torch use the precision of ``config``, and its threads until the ``stack`` ends.

    Returns ``config`` with the number of threads, as another one gives other last digits.
    """
    threads = torch.get_num_threads()
    stack.callback(torch.set_num_threads, threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    config = dataclasses.replace(config, threads=config.threads or min(4, threads))
    torch.set_num_threads(config.threads)
    return config


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's and NumPy's random numbers, in types that a checkpoint may hold."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": (kind, keys.tolist(), *rest)}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put a ``get_random_state`` back; that of CUDA only where both have one."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context in which a signal that asks to stop joins the list, and does no more.

    So a step or an evaluation is finished first. Signals that are ignored stay so: nohup and shells
    ignore some for what they start. SIGUSR1 is SLURM's warning; Windows has the first two alone.
    """
    caught: list[int] = []
    usual = {}
    for signum in signal.Signals:
        if signum.name in STOP_SIGNALS and signal.getsignal(signum) != signal.SIG_IGN:
            usual[signum] = signal.signal(signum, lambda signum, frame: caught.append(signum))
    try:
        yield caught
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)


# --------------------------------------------------------------------------------------------- data
class References(NamedTuple):
    """The returns that define D4RL's normalised score of a robot."""

    random: float  # of score 0
    expert: float  # of score 100

    def score(self, episode_return: float) -> float:
        """100 · (return − random) / (expert − random)."""
        return 100 * (episode_return - self.random) / (self.expert - self.random)


# Random returns: the published means; Ant's was measured, as its dynamics have changed. Expert
# returns: the agents of stable-baselines3, from issue 2 of d4rl-pybullet.
ROBOTS = {
    "HalfCheetahBulletEnv-v0": References(random=-1304.0, expert=3000.0),
    "HopperBulletEnv-v0": References(random=18.6, expert=2500.0),
    "Walker2DBulletEnv-v0": References(random=15.0, expert=2500.0),
    "AntBulletEnv-v0": References(random=432.0, expert=3300.0),
}
DATASETS = {  # of github.com/takuseno/d4rl-pybullet, with their keys at Dropbox
    "halfcheetah-bullet-random-v0": "jnvpb1hp60zt2ak",
    "halfcheetah-bullet-medium-v0": "v4xgssp1w968a9l",
    "halfcheetah-bullet-mixed-v0": "scj1rqun963aw90",
    "hopper-bullet-random-v0": "bino8ojd7iq4p4d",
    "hopper-bullet-medium-v0": "w22kgzldn6eng7j",
    "hopper-bullet-mixed-v0": "xv3p0h7dzgxt8xb",
    "walker2d-bullet-random-v0": "1gwcfl2nmx6878m",
    "walker2d-bullet-medium-v0": "v0f2kz48b1hw6or",
    "walker2d-bullet-mixed-v0": "i4u2ii0d85iblou",
    "ant-bullet-random-v0": "2xpmh4wk2m7i8xh",
    "ant-bullet-medium-v0": "6n79kwd94xthr1t",
    "ant-bullet-mixed-v0": "pmy3dzab35g4whk",
}
DOWNLOAD_URL = "https://www.dropbox.com/s/{key}/{dataset}.hdf5?dl=1"
NETWORK_TIMEOUT = 5.0  # seconds, to connect and between two pieces of a download
SAMPLES = Path(__file__).resolve().parent / "data"  # re-collected sets for ids without a download


class Dataset(NamedTuple):
    """Logged episodes, as they were read."""

    name: str  # the file, or "data" where the caller gave transitions
    transitions: Transitions
    returns: np.ndarray  # (E,), undiscounted, of whole episodes; empty for rows in random order
    layout: str  # for the log
    source: str  # how it was re-collected, if it was, or ""


Columns = dict[str, np.ndarray]  # by their keys in a file of D4RL's or d4rl-pybullet's


def fitted(key: str, column: Any, observations: Any) -> np.ndarray:
    """A column as float32 of (N,), or (N, dim). Raises ValueError if it does not fit."""
    rows = len(observations)
    if len(column) != rows or not rows:
        raise ValueError(f"{key} have {len(column):,} rows, observations {rows:,}")
    shape: tuple[int, ...] = (rows,)  # rewards and marks are often stored as (N, 1)
    if key.endswith("observations"):
        shape = (rows, len(observations[0]))
    elif key == "actions":
        shape = (rows, -1)
    return np.array(column, np.float32).reshape(shape)


def read_dataset(path: str | Path, max_episode_steps: int = 1000) -> Dataset:
    """Read an HDF5 file of logged episodes, in D4RL's or d4rl-pybullet's layout.

    ``max_episode_steps`` is the time limit of the recording. Raises InputError if the file cannot
    be read, or is in neither layout.
    """
    try:
        with h5py.File(path) as file:
            optional = [key for key in ("timeouts", "next_observations") if key in file]
            keys = ["observations", "actions", "rewards", "terminals", *optional]
            columns = {key: fitted(key, file[key], file["observations"]) for key in keys}
            source = str(file.attrs.get("source", ""))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    last_rows = [columns[key][-2:] for key in ("observations", "actions", "rewards")]
    if not any(rows.any() for rows in last_rows):
        raise InputError(f"{path}: the last rows are all zero; cut off what was never written")
    layout = "D4RL's layout"
    if "timeouts" not in columns:
        layout = "d4rl-pybullet's layout"
        columns = as_d4rl(path, columns, max_episode_steps)

    transitions = transitions_of(columns)
    terminated = columns["terminals"] != 0
    is_end = terminated | (columns["timeouts"] != 0)
    if "next_observations" in columns:
        goes_on = (columns["next_observations"][:-1] == columns["observations"][1:]).all(1)
        if 2 * np.sum(goes_on | is_end[:-1]) < len(goes_on):  # rows in random order, no episodes
            return Dataset(str(path), transitions, np.array([]), layout, source)
    end = np.flatnonzero(is_end)  # the last row of each episode
    lengths = np.diff(end, prepend=-1, append=len(terminated) - 1)  # the last piece is incomplete
    if lengths.max() > max_episode_steps:
        raise InputError(
            f"{path}: has an episode of {lengths.max():,} steps, but the time limit is"
            f" {max_episode_steps:,}: set --max-episode-steps to that of the recording, or mark"
            " cuts in 'timeouts'"
        )
    ended_after = lengths[:-1][terminated[end]]
    counts = np.bincount(ended_after, minlength=1)
    if counts.max() > max(1, len(end) / 2):
        say(
            f"NOTE   {counts.max():,} of {len(end):,} episodes terminate after {counts.argmax():,}"
            " steps: was that a time limit? Set --max-episode-steps, or mark cuts in 'timeouts'"
        )
    totals = np.cumsum(columns["rewards"], dtype=np.float64)[end]
    returns = np.diff(totals, prepend=0.0)
    return Dataset(str(path), transitions, returns, layout, source)


def as_d4rl(path: str | Path, columns: Columns, max_episode_steps: int) -> Columns:
    """The columns of a file in d4rl-pybullet's layout, as D4RL's layout has them.

    Row i holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the
    step before. So the transition that starts in row i takes its reward and its end from row i + 1.
    An episode of T steps closes with an extra row (last observation, zero action, terminal 1): it
    has T + 1 rows, of which the last starts no transition. Nor does the last row of a file cut in
    mid-episode. Terminal is 1 at the time limit as well: an episode of ``max_episode_steps`` steps
    was cut, not ended, and its last transition is no termination.

    Raises InputError, with ``path``, for columns that cannot be of this layout.
    """
    is_end = columns["terminals"] != 0
    is_first = np.insert(is_end[:-1], 0, True)
    moves_at_end = columns["actions"][is_end].any()
    is_paid_at_start = columns["rewards"][is_first].any()
    if moves_at_end or is_paid_at_start or "next_observations" in columns:
        raise InputError(
            f"{path}: is of no known layout. In d4rl-pybullet's an episode begins with reward 0 and"
            " ends with a row of zero actions; D4RL's has 'timeouts': add them, and keep"
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
    }


def transitions_of(columns: Columns) -> Transitions:
    """The transitions in the columns of a file in D4RL's layout (Fu et al., 2020).

    Row i holds (observation_i, action_i, reward_i, terminal_i, timeout_i) of ONE step. Terminal
    marks true terminations alone, timeout the last step of an episode that was cut. Without
    ``next_observations`` the successor is the next row's observation. Then a step at a cut has
    none, nor has the last row of the file: these start no transition. A true termination needs
    none; its own observation fills the place.
    """
    observations = columns["observations"]
    terminated = columns["terminals"] != 0
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
        terminations=torch.from_numpy(terminated[is_start]),
    )


def check_transitions(data: Transitions, env: Any, name: str) -> Transitions:
    """``data`` with actions in [-1, 1]. Raises InputError, with ``name``, if it does not fit."""
    spaces = {
        "observations": env.observation_space,
        "next_observations": env.observation_space,
        "actions": env.action_space,
    }
    for key, space in spaces.items():
        shape = tuple(getattr(data, key).shape[1:])
        if shape != space.shape:
            raise InputError(
                f"{name}: {key} are of shape {shape}, but the environment's of {space.shape}; set"
                " env_id to that of the recording"
            )
    for key, column in data._asdict().items():
        if not column.isfinite().all():
            raise InputError(f"{name}: {key} hold NaN or infinite values; remove those episodes")
    goes_on = data.terminations == 0
    observations = data.observations[goes_on]
    if len(observations) and observations.equal(data.next_observations[goes_on]):
        raise InputError(f"{name}: next_observations are the observations; shift them by one step")
    middle, half = middle_and_half(env.action_space)
    actions = (data.actions - torch.from_numpy(middle)) / torch.from_numpy(half)
    if actions.abs().max() > 1 + 1e-5:
        raise InputError(f"{name}: actions reach outside the action box; rescale them")
    return data._replace(actions=actions.float(), terminations=(data.terminations != 0).float())


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``. If it must be an embedded sample, a NOTE says why.

    A path is taken as it is; an id comes from the cache, the network, or the samples. Raises
    InputError if an id has no file.
    """
    if dataset not in DATASETS:
        return Path(dataset).absolute()
    folder = os.environ.get("D4RL_DATASET_DIR") or os.path.expanduser("~/.d4rl/datasets")
    path = Path(folder, f"{dataset}.hdf5")
    if path.exists():
        return path
    url = DOWNLOAD_URL.format(key=DATASETS[dataset], dataset=dataset)
    try:
        with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT) as response:
            content = response.read()
        if not content.startswith(b"\x89HDF"):
            raise OSError("what came is no HDF5 file")  # but a web page about an error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{dataset} could not be downloaded ({error}); to have it, put {url} at {path}"
        path = SAMPLES / dataset.replace("-v0", "-sample.hdf5")
        if not path.exists():
            raise InputError(
                f"{reason}, or re-collect it: python data/make_bullet_dataset.py --id {dataset}"
            ) from error
        say(f"NOTE   {reason}")
    return path


def load_dataset(config: Config, data: Transitions | None = None) -> Dataset:
    """Find, read, check and print the data set, or ``data`` of the caller's. Raises InputError."""
    path = find_dataset(config.dataset)
    with open_environment(environment_id(config)) as env:
        if data is None:
            limit = config.max_episode_steps or env.spec.max_episode_steps
            dataset = read_dataset(path, limit)
        else:
            dataset = dataset_of(data)
        transitions = check_transitions(dataset.transitions, env, dataset.name)
    say(
        f"data   {dataset.name}, in {dataset.layout}: {len(transitions.rewards):,} transitions,"
        f" {int(transitions.terminations.sum()):,} of them terminations"
    )
    returns = dataset.returns
    if len(returns):
        say(
            f"       {len(returns):,} episodes, mean return {returns.mean():.1f} ±"
            f" {returns.std():.1f}"
        )
    if config.dataset in DATASETS and dataset.source:
        say(f"NOTE   this is not the published {config.dataset}, but {dataset.source}")
    return dataset._replace(transitions=transitions)


def dataset_of(data: Transitions) -> Dataset:
    """The caller's transitions, arrays or tensors. Raises InputError if they do not fit."""
    columns = []
    for key, column in data._asdict().items():
        try:
            column = torch.as_tensor(column).detach().cpu().numpy()
            columns.append(torch.from_numpy(fitted(key, column, data.observations)))
        except (TypeError, ValueError) as error:
            raise InputError(f"data: {key} do not fit the observations: {error}") from error
    return Dataset("data", Transitions(*columns), np.array([]), "Transitions", source="")


def environment_id(config: Config) -> str:
    """The environment of the data set. Raises InputError if it cannot be told."""
    if config.env_id:
        return config.env_id
    robot, _, _ = config.dataset.partition("-")
    for env_id in ROBOTS:
        if config.dataset in DATASETS and env_id.lower().startswith(robot):
            return env_id
    raise InputError(
        f"dataset is {config.dataset}, for which env_id has to be set; or name one of"
        f" {', '.join(DATASETS)}"
    )


def checksum_of(data: Transitions) -> str:
    """The CRC-32 by which a resumed run recognises its data."""
    numbers = np.concatenate([column.numpy().ravel() for column in data])
    return f"{zlib.crc32(numbers.data):08x}"


# --------------------------------------------------------------------------------------- evaluation
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which no output is shown: pybullet prints, from C, whenever it starts."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    streams = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for descriptor in streams:
        os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        # What C holds back would come out when the program ends.
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
        for descriptor, stream in streams.items():
            os.dup2(stream, descriptor)
            os.close(stream)
        os.close(nowhere)


@contextlib.contextmanager
def open_environment(env_id: str, with_pictures: bool = False) -> Iterator[Any]:
    """Context with the environment. Raises InputError if CIQL cannot act in it."""
    import gymnasium
    import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)

    options: Any = {"render_mode": "rgb_array"} if with_pictures else {}
    try:
        with contextlib.chdir("."), quiet():  # it may change the folder, which is put back
            env: Any = gymnasium.make(env_id, **options)
            # A fault of PyBullet: all rewards between the first reset of an environment and the
            # second are off by a constant. This is the first, and whoever plays resets again.
            env.reset(seed=0)
        with contextlib.chdir("."), contextlib.closing(env):
            box = env.action_space
            is_box = isinstance(box, gymnasium.spaces.Box)
            if not (is_box and box.is_bounded() and env.spec.max_episode_steps):
                raise InputError(f"env_id is {env_id}, but CIQL needs bounded actions and a limit")
            yield env
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(f"env_id is {env_id}: {error}") from error


def middle_and_half(box: Any) -> tuple[np.ndarray, np.ndarray]:
    """What scales actions: a of the policy's, in [-1, 1], is middle + half · a in the box."""
    middle = (box.high + box.low) / 2
    half = (box.high - box.low) / 2
    return middle, half


def play_episode(
    policy: nn.Module, env_id: str, seed: int, frames: list[np.ndarray] | None = None
) -> float:
    """The undiscounted return of an episode, a function of policy and seed alone.

    (Unless the environment draws from NumPy's global random numbers.) The policy is played on the
    CPU, in evaluation mode, in an environment of its own. ``frames`` receives pictures of the first
    ten seconds.
    """
    actor: Any = copy.deepcopy(policy).cpu().eval()
    total = 0.0
    with (
        open_environment(env_id, frames is not None) as env,
        torch.random.fork_rng([]),  # a policy that samples takes no number from training
    ):
        torch.default_generator.manual_seed(seed)
        middle, half = middle_and_half(env.action_space)
        observation, _ = env.reset(seed=seed)
        is_over = False
        for t in itertools.count():
            if not np.isfinite([*observation, total]).all():
                raise RuntimeError(f"{env_id}, seed {seed}: step {t} gives {observation}, {total}")
            if is_over:
                break
            if frames is not None and t < 600 and t % 3 == 0:  # 20 of the 60 in a second
                frames.append(env.render())
            action = middle + half * actor.act(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            is_over = terminated or truncated
    return total


def evaluate(policy: nn.Module, config: Config, step: int) -> Row:
    """Play ``policy``, as it is after ``step``; prints a line, returns a row of metrics.csv.

    Each step has episodes of its own, which are the same in every run of a seed.
    """
    env_id = environment_id(config)
    seeds = np.random.SeedSequence([config.seed, step]).generate_state(config.eval_episodes)
    episodes = [play_episode(policy, env_id, seed) for seed in seeds.tolist()]
    mean = float(np.mean(episodes))
    std = float(np.std(episodes))
    row = {"step": step, "return_mean": mean, "return_std": std}
    line = f"return {mean:.1f} ± {std:.1f} over {len(episodes)} episodes"
    if env_id in ROBOTS:
        row["score"] = ROBOTS[env_id].score(mean)
        line += f"  score {row['score']:.1f}"
    say(f"step {step:>9,}  {line}")
    for index, episode_return in enumerate(episodes, start=1):
        row[f"return_{index}"] = episode_return
    return row


def write_film(path: Path, policy: nn.Module, config: Config) -> None:
    """Write a GIF of the first ten seconds of an episode."""
    from PIL import Image

    frames: list[np.ndarray] = []
    play_episode(policy, environment_id(config), config.seed, frames)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=50, loop=0)
    say(f"film   {path}")


# ------------------------------------------------------------------------------------------ records
# A resumed run may have other values of these settings, and its name is without them. They change
# last digits at most (max_steps with policy_lr_decay: the rate to come). So a setting of your own
# is a line in Config.
NEUTRAL_SETTINGS = {
    "dataset",  # the data and the environment are compared themselves
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


def varied_words(config: Config) -> list[str]:
    """What differs from the defaults, as words: alpha=0.0, seed=3."""
    return [
        f"{name}={value}"
        for name, value in vars(config).items()
        if name not in NEUTRAL_SETTINGS and value != getattr(Config, name)
    ]


def folder_of(config: Config) -> Path:
    """The folder of the run, which need not be there."""
    if config.resume:
        return Path(config.resume).absolute()
    words = [Path(config.dataset).stem, *varied_words(config)]
    name = "-".join(words)[:100]
    name = re.sub(r"[^\w.+=-]", "_", name)
    name += f"-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    return Path(config.out_dir, config.name or name).absolute()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside ``path``, then rename: ``path`` is at any time the old or the new one."""
    part = path.with_name(f".part.{os.getpid()}")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name with no content
    part.replace(path)


class Run:
    """A training's folder: config.json, the code, metrics.csv, events, checkpoint.pt."""

    def __init__(self, config: Config, agent: CIQL, dataset: Dataset) -> None:
        self.config = config
        self.agent = agent
        self.dataset = dataset
        self.env_id = environment_id(config)
        self.folder = folder_of(config)
        # It is absolute, as an environment may change the folder of the process.
        self.plot = Path(config.plot).absolute()
        self.rows: list[Row] = []  # of metrics.csv
        # Of each metric since the last line of losses: its sum, and how many steps reported it
        self.sums: dict[str, tuple[Any, int]] = {}
        self.facts = {
            **agent.training_state()["numbers"],  # what its constructor was given, say
            **dataclasses.asdict(config),
            "agent": type(agent).__name__,
            "environment": self.env_id,
            "data_checksum": checksum_of(dataset.transitions),
        }

    def open(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder until the ``stack`` ends, go on with a run that is there, open the log.

        Raises InputError for a run that would learn something else.
        """
        if self.plot.suffix not in (".png", ".pdf", ".svg") or not self.plot.parent.is_dir():
            raise InputError(f"plot is {self.plot}; name a .png, .pdf or .svg in a folder there is")
        self.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(filelock.FileLock(self.folder / ".lock", timeout=0))
        if self.config.resume or (self.folder / "checkpoint.pt").exists():
            self.restore()
        self.describe()
        self.open_log(stack)

    def restore(self) -> None:
        """Go on from the checkpoint. Raises InputError if it is not of these facts."""
        checkpoint = load_checkpoint(self.folder)
        saved = checkpoint["facts"] | vars(checkpoint["config"])
        for name, value in self.facts.items():
            was = saved.get(name, value)
            if was != value and name not in NEUTRAL_SETTINGS:
                raise InputError(
                    f"{self.folder} is of {name} {was}, not {value}; go on as it was made, or start"
                    " another run"
                )
        if checkpoint["step"] > self.config.max_steps:
            raise InputError(f"max_steps is below the run's {checkpoint['step']:,}; raise it")
        if self.config.policy_lr_decay and saved["max_steps"] != self.config.max_steps:
            say("NOTE   the policy's learning rate goes on by the cosine over the new max_steps")
        self.rows = checkpoint["rows"]
        self.sums = checkpoint["sums"]
        self.agent.load_training_state(checkpoint["agent"])
        set_random_state(checkpoint["random_state"], self.agent.device)

    def describe(self) -> None:
        """Write config.json, and copy the code that this process runs."""
        content = self.facts | {"data": self.dataset.name, "torch": torch.__version__}
        write_whole(self.folder / "config.json", json.dumps(content, indent=2).encode())
        code = self.folder / f"code-from-step-{self.agent.steps}"
        code.mkdir(exist_ok=True)
        for module in {__name__, type(self.agent).__module__}:
            source = getattr(sys.modules[module], "__file__", None)
            if source and Path(source).is_file():  # a notebook has none
                shutil.copy(source, code)

    def open_log(self, stack: contextlib.ExitStack) -> None:
        """Start TensorBoard's log and W&B's, and write the rows that a resumed run has so far.

        Events are always written anew: so none is missing, whatever ended the last process.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self.config.wandb_project:
            import wandb

            wandb.init(
                project=self.config.wandb_project,
                id=self.folder.name,
                resume="allow",
                dir=self.folder.parent,  # in the folder, its watcher would find its own copies
                config=self.facts,
                sync_tensorboard=True,
            )
            stack.callback(wandb.tensorboard.unpatch)  # type: ignore[attr-defined]
            stack.push(lambda failure, *_: wandb.finish(exit_code=1 if failure else 0))
        for events in self.folder.glob("events.out.tfevents.*"):
            events.unlink()
        self.board = stack.enter_context(SummaryWriter(self.folder))
        for row in self.rows:
            self.log_event(row)
        self.write_table()

    def save(self) -> None:
        """Write checkpoint.pt: all that the steps to come depend on, besides settings and data."""
        self.means()  # which raises before a run that diverged replaces the last that had not
        agent = self.agent
        checkpoint = {
            "step": agent.steps,
            "rows": self.rows,
            "sums": self.sums,
            "agent": agent.training_state(),
            "policy": agent.evaluated_policy().state_dict(),
            "random_state": get_random_state(agent.device),
        }
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(self.folder / "checkpoint.pt", content.getvalue())

    def how_to_go_on(self) -> str:
        """What to type for it: flags, or Python for an agent or data of one's own."""
        data = ", data" if self.config.dataset == "own-transitions" else ""
        if type(self.agent) is CIQL and not data:
            return f"--resume {shlex.quote(str(self.folder))}"
        config = f"load_checkpoint({str(self.folder)!r})['config']"
        return f"train({config}{data}, make_agent={type(self.agent).__name__})"

    def restart_clock(self) -> None:
        """The next ``steps_per_second`` is of the time from here on."""
        self.timed_step = self.agent.steps
        self.timed_since = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step; this does not wait for the device."""
        for name, figure in metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            figure = torch.as_tensor(figure).detach()
            self.sums[name] = (total + figure, count + 1)

    def means(self) -> Row:
        """The means of the metrics since the last line of losses.

        Raises FloatingPointError if one is NaN or infinite.
        """
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{name} became NaN or infinite up to step {self.agent.steps:,}; lower lr,"
                    " beta or q_weight, or scale the rewards"
                )
        return means

    def log_losses(self) -> None:
        """Print and log the means of the metrics since the last such line."""
        step = self.agent.steps
        means = self.means()
        self.sums = {}
        speed = (step - self.timed_step) / (time.perf_counter() - self.timed_since)
        self.log({"step": step, **means, "steps_per_second": speed})
        figures = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        say(f"step {step:>9,}  {figures}  {speed:.0f} steps/s")
        self.restart_clock()

    def log(self, row: Row) -> None:
        """Add a row to metrics.csv and to TensorBoard."""
        self.rows.append(row)
        self.log_event(row)
        self.write_table()

    def log_event(self, row: Row) -> None:
        """Add a row to TensorBoard."""
        group = "evaluation" if "return_mean" in row else "training"
        for name in row.keys() - {"step"}:
            self.board.add_scalar(f"{group}/{name}", row[name], row["step"])
        self.board.flush()

    def write_table(self) -> None:
        """Write all rows to metrics.csv."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "metrics.csv", table.getvalue().encode())


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU, with the ``facts`` of config.json and ``config``.

    Raises InputError if it cannot be read.
    """
    try:
        checkpoint = torch.load(f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True)
        facts = json.loads(Path(folder, "config.json").read_text())
    except Exception as error:  # torch raises anything for a file that is damaged
        raise InputError(f"{folder} holds no run that can be read ({error})") from error
    settings: dict[str, Any] = {}
    for name in vars(Config()).keys() & facts.keys():  # other versions may have had others
        value = facts[name]
        settings[name] = tuple(value) if isinstance(value, list) else value
    config = Config(**settings | {"resume": str(folder), "name": ""})
    return checkpoint | {"facts": facts, "config": config}


def load_policy(
    run: str | Path, make_policy: Callable[[int, int, Config], Any] = make_policy
) -> Any:
    """The policy of a run folder, on the CPU, ready to ``act``.

    ``make_policy`` is the one that it was trained with. Raises InputError if it cannot be read.
    """
    checkpoint = load_checkpoint(run)
    facts = checkpoint["facts"]
    policy = make_policy(facts["observation_dim"], facts["action_dim"], checkpoint["config"])
    policy.load_state_dict(checkpoint["policy"])
    return policy.eval()


def evaluations_of(rows: Sequence[Row]) -> list[Row]:
    """The evaluations among the rows of metrics.csv."""
    return [row for row in rows if "return_mean" in row]


def final_return(means: Sequence[float] | np.ndarray) -> tuple[float, int]:
    """The mean of the last tenth of a run's evaluations, and how many these are.

    They are three at least, or all if there are fewer.
    """
    last = means[-max(3, len(means) // 10) :]
    return float(np.mean(last)), len(last)


def plot_returns(run: Run) -> None:
    """Write the picture: evaluation returns against gradient steps, with their references."""
    from matplotlib.figure import Figure

    config = run.config
    evaluations = evaluations_of(run.rows)
    means = [row["return_mean"] for row in evaluations]
    final, count = final_return(means)
    label = (
        f"evaluations, episodes; final {final:.0f} is\nthe mean of the last {count} of {len(means)}"
    )
    references = {}
    if len(run.dataset.returns):
        references["data set"] = run.dataset.returns.mean()
    if run.env_id in ROBOTS:
        references |= ROBOTS[run.env_id]._asdict()
    title = f"{type(run.agent).__name__} on {Path(config.dataset).stem}"
    if run.dataset.source and config.dataset in DATASETS:
        title += " (re-collected, not the published file)"
    title += "\n" + ", ".join(varied_words(config))

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in evaluations], means, "o-", label=label)
    for row in evaluations:
        episodes = [row[name] for name in row if name.removeprefix("return_").isdigit()]
        axes.plot([row["step"]] * len(episodes), episodes, ".", color="C0", alpha=0.25)
    limits = axes.get_ylim()  # a reference outside is in the legend alone
    for index, (name, value) in enumerate(references.items(), start=1):
        axes.axhline(value, color=f"C{index}", linestyle="--", label=f"{name}, {value:.0f}")
    axes.set_ylim(limits)
    axes.set(title=title, xlabel="gradient steps", ylabel="return of an episode", xlim=(0, None))
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3)
    content = io.BytesIO()
    figure.savefig(content, format=run.plot.suffix[1:])
    for path in (run.plot, run.folder / run.plot.name):
        write_whole(path, content.getvalue())


# ----------------------------------------------------------------------------------------- commands
SMALLEST = {
    "seed": 0,
    "gamma": 0,
    "tau": 0.001,
    "beta": 0,
    "alpha": 0,
    "num_neg": 1,
    "polyak": 1e-6,
    "max_weight": 1,
    "q_weight": 0,
    "policy_share": 0,
    "lr": 1e-12,
    "batch_size": 1,
    "max_steps": 1,
    "log_interval": 1,
    "eval_interval": 1,
    "eval_episodes": 1,
    "threads": 0,
}
LARGEST = {"seed": 2**32 - 1, "gamma": 1, "tau": 0.999, "polyak": 1, "policy_share": 1}


def check(config: Config) -> None:
    """Raise InputError for a setting out of its range."""
    for name, smallest in SMALLEST.items():
        value = getattr(config, name)
        largest = LARGEST.get(name, 1e15)
        if not smallest <= value <= largest:  # NaN is not, either
            raise InputError(f"{name} is {value}, but must be from {smallest} to {largest:g}")


def parse(arguments: Sequence[str]) -> Config:
    """Settings from the command line; those of the run that is resumed or evaluated are defaults.

    Raises InputError; a flag that tyro cannot read ends the program with its message.
    """
    import tyro

    config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py")
    run = config.resume or config.evaluate
    if run:
        own = {"resume": config.resume, "evaluate": config.evaluate, "film": False}
        saved = dataclasses.replace(load_checkpoint(run)["config"], **own)
        config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py", default=saved)
    check(config)
    return config


def main() -> None:
    """The command line.

    Exit codes: 2 for bad input, 1 for losses that are not finite, a fault of the machine or a bug,
    128 + n for signal n.
    """
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path.append(os.getcwd())  # where the MODULE of env_id may be
    try:
        config = parse(sys.argv[1:])
        if config.evaluate:
            policy = load_policy(config.evaluate)
            step = load_checkpoint(config.evaluate)["step"]
            evaluate(policy, config, step)
            if config.film:
                write_film(Path(config.evaluate, "policy.gif"), policy, config)
        else:
            train(config)
    except (InputError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
        print(f"ciql_pybullet: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
