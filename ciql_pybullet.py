"""Conservative Implicit Q-Learning (CIQL), trained offline on the PyBullet D4RL data sets.

CIQL is Implicit Q-Learning plus a clamped conservative penalty. With Q̄ = min(Q1, Q2) of the target critic,
three losses are minimised on a logged data set:

    V   diff = Q̄(s,a) − V(s)             loss = |τ − 1(diff<0)| · diff²
    Q   y = r + γ V(s')                    loss = (Q(s,a) − y)² + α · ReLU(E_ā Q(s,ā) − E_a Q(s,a))
    π   adv = max(0, Q̄(s,a) − V(s))      loss = −exp(β · adv) · log π(a|s)

y does not bootstrap after a true termination; ā are num_neg actions a state, drawn uniformly from the action box.

    python ciql_pybullet.py                                      the settings below
    python ciql_pybullet.py --dataset hopper-bullet-mixed-v0 --seed 3
    python ciql_pybullet.py --help                               every setting

References:
    Kostrikov et al., Offline Reinforcement Learning with Implicit Q-Learning, 2021 (arXiv 2110.06169)
    Kumar et al., Conservative Q-Learning for Offline Reinforcement Learning, 2020 (arXiv 2006.04779)
    Fu et al., D4RL: Datasets for Deep Data-Driven Reinforcement Learning, 2020 (arXiv 2004.07219)
    d4rl-pybullet, the data sets (github.com/takuseno/d4rl-pybullet)
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import h5py
import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ settings
EnvId = Literal["HalfCheetahBulletEnv-v0", "HopperBulletEnv-v0", "Walker2DBulletEnv-v0", "AntBulletEnv-v0"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True)
class Config:
    """CIQL on the PyBullet D4RL data sets. Every setting below is also a flag: --max-steps 20000."""

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of the 12 ids, or the path of an .hdf5 file (with env_id)
    env_id: EnvId | None = None  # the environment of an .hdf5 file
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL
    gamma: Fraction = 0.99  # discount
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.8  # expectile of V; 0.5 is the mean, towards 1 the best action
    beta: Weight = 1.0  # inverse temperature of the policy weights; 0 gives behaviour cloning
    alpha: Weight = 1.0  # weight of the conservative penalty; 0 gives IQL
    num_neg: Annotated[int, Field(ge=0)] = 10  # off-data actions a state in the penalty
    polyak: Annotated[Fraction, Field(gt=0)] = 0.005  # share of the critic that moves into its target each step
    max_weight: Annotated[Weight, Field(ge=1)] = 100.0  # cap of the policy weights exp(beta * adv)
    # Networks
    hidden_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (256, 256)  # ReLU layers of every network
    min_log_std: Annotated[float, Field(ge=-20, le=0)] = -5.0  # floor of the policy's log standard deviation
    # Schedule
    lr: Annotated[Weight, Field(gt=0)] = 3e-4  # Adam's learning rate, for all networks
    batch_size: Count = 256  # transitions a gradient step
    max_steps: Count = 500_000  # gradient steps
    log_interval: Count = 1_000  # gradient steps between lines of losses
    eval_interval: Count = 5_000  # gradient steps between evaluations
    eval_episodes: Count = 5  # episodes an evaluation
    # Machine and output
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads; 0 takes a core each
    compile: bool = True  # compile the gradient step (about 30 s at the start, needs a C++ compiler)
    plot: Path = Path("eval_returns.png")  # picture of the evaluation returns
    out_dir: Path = Path("runs")  # every run makes a folder in here: settings, metrics, checkpoint
    wandb_project: str | None = None  # also log to this Weights & Biases project (needs: pip install wandb)
    film: bool = False  # film an episode of the final policy, or of the evaluated one: policy.gif in the run folder
    resume: Path | None = None  # go on from the checkpoint in this run folder, with its settings
    evaluate: Path | None = None  # train nothing: play eval_episodes episodes of the policy in this run folder

    def __post_init__(self) -> None:
        if self.alpha > 0 and self.num_neg == 0:
            raise InputError("num_neg is 0, but must be at least 1 while alpha > 0")
        if self.dataset not in DOWNLOAD_URLS and Path(self.dataset).suffix not in (".hdf5", ".h5"):
            ids = ", ".join(DOWNLOAD_URLS)
            raise InputError(f"dataset is {self.dataset}, but must be an .hdf5 file or one of {ids}")
        if self.dataset not in DOWNLOAD_URLS and not self.env_id:
            raise InputError(f"env_id is not set, but must name the environment that {self.dataset} was recorded in")

    @property
    def robot(self) -> "Robot":
        """The robot of the data set."""
        by_environment = {robot.env_id: robot for robot in ROBOTS.values()}
        return by_environment[self.env_id] if self.env_id else ROBOTS[self.dataset.split("-")[0]]


class InputError(ValueError):
    """A bad setting, file or network; its message is one line that names the cause and the remedy."""


# ---------------------------------------------------------------------------------------------------- data
class Transitions(NamedTuple):
    """N transitions, float32."""

    observations: Tensor  # (N, observation_dim)
    actions: Tensor  # (N, action_dim), in [-1, 1]
    rewards: Tensor  # (N,)
    next_observations: Tensor  # (N, observation_dim)
    terminations: Tensor  # (N,), 1 where the episode truly ended, 0 where it went on or met the time limit


Rows = dict[str, np.ndarray]  # the columns of a file as they are stored, N rows, float32


def read_transitions(file: str | Path | Rows, max_episode_steps: int = 1000) -> Transitions:
    """The transitions of a d4rl-pybullet HDF5 file, given by its path or its rows.

    Row i of the file holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the step
    before. So the transition that starts in row i takes its reward and its end from row i + 1. An episode of T steps
    closes with an extra row (last observation, zero action, terminal 1): T + 1 rows, of which the last starts no
    transition. Nor does the last row of a file cut in mid-episode. Terminal is 1 at the time limit as well: an
    episode of ``max_episode_steps`` steps was cut, not ended, and its last transition is no termination.

    Returns one row a transition, on the CPU. Raises InputError for a file that holds no usable data.
    Format: github.com/takuseno/d4rl-pybullet.
    """
    rows = file if isinstance(file, dict) else read_rows(file)[0]
    end_row = rows["terminals"] == 1
    start = np.flatnonzero(~end_row[:-1])
    end = np.flatnonzero(end_row)
    steps = np.diff(end, prepend=-1) - 1
    termination = np.zeros(len(end_row), np.float32)
    termination[end[steps < max_episode_steps]] = 1
    s, a, s_next = rows["observations"][start], rows["actions"][start], rows["observations"][start + 1]
    return Transitions(*map(torch.from_numpy, (s, a, rows["rewards"][start + 1], s_next, termination[start + 1])))


# ------------------------------------------------------------------------------------------------ networks
class MLP(nn.Sequential):
    """Linear layers with ReLU between: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs: int, hidden_sizes: Sequence[int], outputs: int) -> None:
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise([inputs, *hidden_sizes, outputs]):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.fused = prefers_onednn()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fused and x.is_cpu and x.dim() == 2):
            return super().forward(x)
        *hidden, last = (layer for layer in self if isinstance(layer, nn.Linear))
        for layer in hidden:
            x = LinearReLU.apply(x, layer.weight, layer.bias)
        return last(x)


class ValueNetwork(nn.Module):
    """V(s)."""

    def __init__(self, observation_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.v = MLP(observation_dim, hidden_sizes, 1)

    def forward(self, observations: Tensor) -> Tensor:
        """(B, observation_dim) -> (B,)."""
        return self.v(observations).squeeze(-1)


class DoubleQNetwork(nn.Module):
    """Q1(s, a) and Q2(s, a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.q1 = MLP(observation_dim + action_dim, hidden_sizes, 1)
        self.q2 = MLP(observation_dim + action_dim, hidden_sizes, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, observation_dim), (B, action_dim) -> two (B,)."""
        inputs = torch.cat([observations, actions], -1)
        return self.q1(inputs).squeeze(-1), self.q2(inputs).squeeze(-1)


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(μ(s)), σ²), with one σ an action dimension, as in IQL. It acts with its mean, tanh(μ(s))."""

    observation_mean: Tensor
    observation_std: Tensor

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.mu = MLP(observation_dim, hidden_sizes, action_dim)
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
    """ReLU(E_ā Q(s,ā) − E_a Q(s,a)): (B · num_neg,), (B,) -> (), of one critic. CQL's gap, clamped at zero."""
    return F.relu(q_neg.mean() - q_data.mean())


def awr_weights(advantage: Tensor, beta: float, max_weight: float) -> Tensor:
    """min(exp(β · max(0, A)), max_weight): (B,) -> (B,), with A = Q̄(s,a) − V(s). IQL, equation 7, clamped."""
    return torch.exp(beta * advantage.clamp(min=0)).clamp(max=max_weight)


# --------------------------------------------------------------------------------------------------- agent
# what a step reports, each a mean over the batch
Metrics = dict[str, Tensor]
METRICS = ("value_loss", "q_loss", "policy_loss", "penalty", "q", "v", "advantage", "clamp_open", "policy_std")
NETWORKS = ("policy", "value", "critic", "target_critic")
ADAM = ("exp_avgs", "exp_avg_sqs", "adam_steps")


class CIQL:
    """Conservative Implicit Q-Learning: the networks, their one optimiser, and the gradient step."""

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
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critic.parameters())
        self.exp_avgs = [torch.zeros_like(p) for p in self.parameters]  # Adam's state
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.parameters]
        self.adam_steps = [torch.zeros((), device=self.device) for _ in self.parameters]
        self.clamp_open = False  # was it at the last step?

    def losses(self, batch: Transitions, negative_actions: Tensor, open_clamp: bool) -> tuple[Tensor, Metrics]:
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
                neg1, neg2 = self.critic(s.repeat_interleave(c.num_neg, 0), negative_actions.flatten(0, 1))
                penalty = conservative_penalty(neg1, q1) + conservative_penalty(neg2, q2)
        q_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean() + c.alpha * penalty

        advantage = (q_bar - v).detach()
        weights = awr_weights(advantage, c.beta, c.max_weight)
        policy_loss = -(weights * self.policy.log_prob(s, a)).mean()

        q, clamp_open, policy_std = (q1.mean() + q2.mean()) / 2, (penalty > 0).float(), self.policy.log_std.exp().mean()
        figures = (value_loss, q_loss, policy_loss, penalty, q, v.mean(), advantage.mean(), clamp_open, policy_std)
        metrics = {name: figure.detach() for name, figure in zip(METRICS, figures, strict=True)}
        return value_loss + q_loss + policy_loss, metrics

    def gradients(self, batch: Transitions, negative_actions: Tensor, open_clamp: bool) -> tuple[Any, Metrics]:
        """Gradients of ``losses`` for every parameter: one backward pass, as no loss reaches another's network."""
        loss, metrics = self.losses(batch, negative_actions, open_clamp)
        return torch.autograd.grad(loss, self.parameters), metrics

    def update(self, batch: Transitions) -> Metrics:
        """One gradient step on B transitions (observations normalised); returns the losses, scalars on the device."""
        num_neg = self.config.num_neg if self.config.alpha > 0 else 0
        negative_actions = torch.rand(len(batch.actions), num_neg, batch.actions.shape[1], device=self.device) * 2 - 1
        if self.on_cpu and self.config.alpha > 0:
            # ReLU'(x) = 0 for x <= 0: with the clamp closed, leaving out the penalty's backward pass (over half of the
            # work) is exact. Start from what the last step found, and go again if an open clamp was taken for closed.
            gradients, metrics = self.gradients(batch, negative_actions, self.clamp_open)
            is_open = bool(metrics["penalty"] > 0)
            if is_open and not self.clamp_open:
                gradients, metrics = self.gradients(batch, negative_actions, True)
            self.clamp_open = is_open
        else:  # on CUDA a branch would make the host wait for the device
            gradients, metrics = self.gradients(batch, negative_actions, True)
        self.apply(gradients)
        return metrics

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step of Adam over all parameters, then Polyak averaging of the target critic."""
        traced = torch.compiler.is_compiling()  # on CUDA alone; a fused kernel cannot be
        adam(
            self.parameters, list(gradients), self.exp_avgs, self.exp_avg_sqs, [], self.adam_steps,
            fused=not traced, foreach=traced, capturable=traced, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.999, lr=self.config.lr, weight_decay=0.0, eps=1e-8,
        )  # fmt: skip
        # The data's actions are often a function of the state, which drives σ to 0. A projection, not a clamp in the
        # likelihood: that would kill the gradient, and σ could not grow again.
        self.policy.log_std.clamp_(min=self.config.min_log_std)
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.config.polyak)

    def prepare(self, data: Transitions) -> Transitions:
        """Normalise the observations (in place), tell the policy how, and move the data to the device."""
        std, mean = torch.std_mean(data.observations, 0)
        std += 1e-3
        self.policy.observation_mean.copy_(mean)
        self.policy.observation_std.copy_(std)
        for observations in (data.observations, data.next_observations):
            observations.sub_(mean).div_(std)
        return Transitions(*(column.to(self.device) for column in data))

    def step(self, data: Transitions) -> Metrics:
        """``update`` on a batch drawn from ``data``, which lies on the device."""
        index = torch.randint(len(data.rewards), (self.config.batch_size,), device=self.device)
        return self.update(Transitions(*(column[index] for column in data)))

    def compiled_step(self, data: Transitions) -> Callable[[Transitions], Metrics]:
        """``step`` under torch.compile; or as it is, with a line that says why, where that fails. Leaves no trace.

        On CUDA it is one graph. On the CPU it breaks at the branch on the clamp, and ``apply`` stays as it is.
        """
        torch.compiler.reset()  # an earlier run's graphs count towards the compiler's limit
        torch._dynamo.config.trace_autograd_ops = True  # the backward pass in the graph of the step
        torch._inductor.config.fallback_random = True  # the eager step's random numbers
        torch._logging.set_logs(dynamo=logging.ERROR)  # no warning that the branch on the clamp breaks the graph
        torch._inductor.config.cpp_wrapper = self.on_cpu  # no Python between the kernels
        if self.on_cpu and prefers_onednn():
            compile_onednn()
        if self.on_cpu:  # the kernels of ``apply`` beat what the compiler makes of it
            self.apply = torch.compiler.disable(self.apply)  # type: ignore[method-assign]
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
        networks = {name: getattr(self, name).state_dict() for name in NETWORKS}
        return networks | {name: getattr(self, name) for name in ADAM} | {"clamp_open": self.clamp_open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name in ADAM:
            torch._foreach_copy_(getattr(self, name), state[name])
        self.clamp_open = state["clamp_open"]


# -------------------------------------------------------------------------------------------- fast products
def prefers_onednn() -> bool:
    """Is oneDNN, which comes with torch, the faster library for products? On AMD: there torch's own, MKL, goes slow."""
    is_amd = os.path.exists("/proc/cpuinfo") and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return is_amd and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x wᵀ + b) in one call of oneDNN, float32: (M, K), (N, K), (N,) -> (M, N); w may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, w, b, activation, [], "")


class LinearReLU(torch.autograd.Function):
    """ReLU(x wᵀ + b): (B, I), (O, I), (O,) -> (B, O), its three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        y = product(x, w, b, "relu")
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        x, w, y = ctx.saved_tensors
        grad = grad_y * (y > 0)
        return product(grad, w.t()) if ctx.needs_input_grad[0] else None, product(grad.t(), x.t()), grad.sum(0)


def compile_onednn() -> None:
    """Have torch.compile call ``product`` as it is: its own rule for this operator takes constant weights only."""
    from torch._inductor import config, ir, lowering, mkldnn_ir

    def lower(x: Any, w: Any, b: Any, activation: str, scalars: Any, algorithm: str) -> Any:
        call = mkldnn_ir.LinearUnary
        x, w = call.require_contiguous(call.realize_input(x)), call.realize_input(w)
        tensors = [x, w] if b is None else [x, w, call.realize_input(b)]
        constants = [None, activation, [-1], algorithm][b is not None :]
        layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], w.get_size()[0]])
        return ir.TensorBox.create(mkldnn_ir._create_output_node(call(layout, tensors, constants)))

    lowering.lowerings[torch.ops.mkldnn._linear_pointwise.default] = lower
    config.pattern_matcher = False  # nor fuse it with what follows, by another such rule


# ---------------------------------------------------------------------------------------------- data files
class Robot(NamedTuple):
    """Environment of three data sets, with the returns that make its score: random is 0, expert is 100."""

    env_id: str
    dims: tuple[int, int]  # of observations and actions
    random_return: float
    expert_return: float

    def score(self, episode_return: Any) -> Any:
        """D4RL's normalised score, 100 · (return − random) / (expert − random)."""
        return 100 * (episode_return - self.random_return) / (self.expert_return - self.random_return)


# Random: published mean of the random set (ant: measured in today's simulator, the published 10.4 is of another
# dynamics). Expert: stable-baselines3's agents, d4rl-pybullet issue 2.
ROBOTS = {
    "halfcheetah": Robot("HalfCheetahBulletEnv-v0", (26, 6), -1304.0, 3000.0),
    "hopper": Robot("HopperBulletEnv-v0", (15, 3), 18.6, 2500.0),
    "walker2d": Robot("Walker2DBulletEnv-v0", (22, 6), 15.0, 2500.0),
    "ant": Robot("AntBulletEnv-v0", (28, 8), 432.0, 3300.0),
}
PUBLISHED = {  # by d4rl-pybullet: keys of the random, the medium and the mixed file
    "halfcheetah": ("jnvpb1hp60zt2ak", "v4xgssp1w968a9l", "scj1rqun963aw90"),
    "hopper": ("bino8ojd7iq4p4d", "w22kgzldn6eng7j", "xv3p0h7dzgxt8xb"),
    "walker2d": ("1gwcfl2nmx6878m", "v0f2kz48b1hw6or", "i4u2ii0d85iblou"),
    "ant": ("2xpmh4wk2m7i8xh", "6n79kwd94xthr1t", "pmy3dzab35g4whk"),
}
DOWNLOAD_URLS = {
    f"{robot}-bullet-{kind}-v0": f"https://www.dropbox.com/s/{key}/{robot}-bullet-{kind}-v0.hdf5?dl=1"
    for robot, keys in PUBLISHED.items()
    for kind, key in zip(("random", "medium", "mixed"), keys, strict=True)
}
SAMPLES = Path(__file__).resolve().parent / "data"  # re-collected, they stand in for want of a network
NETWORK_TIMEOUT = 5.0  # seconds, to connect and between two pieces of a download


def read_rows(path: str | Path, dims: tuple[int, ...] | None = None) -> tuple[Rows, str]:
    """Read and check a d4rl-pybullet file: its columns, and how it was re-collected ("": a published file).

    ``dims`` is (observation_dim, action_dim) of the environment that the data must fit.
    Raises InputError, naming file and key, for a file that cannot be read or holds no usable data.
    """
    keys = ("observations", "actions", "rewards", "terminals")
    try:
        with h5py.File(path) as file:
            if missing := [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]:
                raise InputError(f"{path}: the key '{missing[0]}' is missing; is it a d4rl-pybullet file?")
            s, a, r, d = (file[key].astype(np.float32)[()] for key in keys)
            source = str(file.attrs.get("source", ""))
    except (OSError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as HDF5 numbers ({error}); is it a whole file?") from error
    r, d = (column[:, 0] if column.shape[1:] == (1,) else column for column in (r, d))  # stored as (N, 1) or (N,)
    rows, own = dict(zip(keys, (s, a, r, d), strict=True)), (*s.shape[1:], *a.shape[1:])
    fit = s.ndim == a.ndim == 2 and r.shape == d.shape == s.shape[:1] == a.shape[:1]
    not_finite = [key for key in keys if not np.isfinite(rows[key]).all()]
    for valid, complaint in (
        (fit, f"the shapes of {', '.join(f'{key} {rows[key].shape}' for key in keys)} do not fit together"),
        (dims in (None, own), f"has {own} columns, but the environment {dims}; set env_id to the one of the recording"),
        (not not_finite, f"{not_finite} holds NaN or infinite values; remove those episodes"),
        ((np.abs(a) <= 1 + 1e-5).all(), "'actions' reach outside [-1, 1]; rescale them to the action box"),
        (np.isin(d, (0, 1)).all(), "'terminals' holds values other than 0 and 1; mark end rows with 1"),
        ((d.ravel()[:-1] == 0).any(), f"{d.size} rows hold no complete transition; an episode has two at least"),
    ):
        if not valid:
            raise InputError(f"{path}: {complaint}")
    return rows, source


def episode_returns(rows: Rows) -> np.ndarray:
    """Undiscounted returns (E,) of the whole episodes."""
    end = np.flatnonzero(rows["terminals"] == 1)
    start = np.concatenate([[0], end[:-1] + 1])[: len(end)]
    total = np.cumsum(rows["rewards"], dtype=np.float64)
    return total[end] - total[start]  # the reward in an episode's first row belongs to no step of it


def load_dataset(config: Config) -> tuple[Transitions, np.ndarray, str]:
    """Find, read and print the data set: its transitions, the returns of its whole episodes, a note for the picture."""
    path, published = find_dataset(config.dataset), config.dataset in DOWNLOAD_URLS
    rows, source = read_rows(path, config.robot.dims)
    data, returns = read_transitions(rows), episode_returns(rows)
    figures = f"mean return {returns.mean():.1f} ± {returns.std():.1f}" if len(returns) else "none of them whole"
    say(f"data   {path}: {len(rows['rewards']):,} rows, {len(returns):,} episodes, {figures}")
    say(f"       {len(data.rewards):,} transitions, {int(data.terminations.sum()):,} of them terminations")
    if published and source:
        say(f"NOTE   this is not the published {config.dataset}, but {source}")
    elif published and config.dataset.startswith("ant-"):
        say("NOTE   the published ant files were recorded under other dynamics (random: 10) than today's (random: 432)")
    return data, returns, " (re-collected, not the published file)" if published and source else ""


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``, a path or one of the 12 ids: from the cache, the network or the embedded samples."""
    cached = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / f"{dataset}.hdf5"
    if dataset not in DOWNLOAD_URLS or cached.exists():
        return cached if dataset in DOWNLOAD_URLS else Path(dataset)
    import pooch

    def fetch(url: str, part: str, _: object) -> None:
        """Fill a temporary file, which pooch renames to ``cached`` if it is whole and fits the environment."""
        options: dict[str, Any] = {"progressbar": sys.stderr.isatty(), "chunk_size": 1 << 20}
        pooch.HTTPDownloader(timeout=NETWORK_TIMEOUT, **options)(url, part, None)
        read_rows(part, ROBOTS[dataset.split("-")[0]].dims)

    os.environ.setdefault("RES_OPTIONS", "timeout:4 attempts:1")  # looking up a host has no other time-out
    pooch.get_logger().setLevel("WARNING")
    url, sample = DOWNLOAD_URLS[dataset], SAMPLES / f"{dataset.removesuffix('-v0')}-sample.hdf5"
    try:
        return Path(pooch.retrieve(url, None, cached.name, cached.parent, downloader=fetch))
    except (OSError, InputError) as error:
        cause = f"cannot download {dataset}: {str(error).split('Caused by ')[-1]}"  # the rest is requests' own story
        if sample.exists():
            say(f"NOTE   {cause}")
            return sample
        rebuild = f"python data/make_bullet_dataset.py --id {dataset}"
        raise InputError(f"{cause}; download {url} and put it at {cached}, or re-collect it: {rebuild}") from error


# ---------------------------------------------------------------------------------------------- evaluation
def play_episode(policy: bytes, env_id: str, seed: int, film: Path | None = None) -> float:
    """The undiscounted return of one episode: a pure function of the (pickled) policy, environment and seed.

    ``film`` is written as an animated GIF of its first 600 steps, in real time, headless.
    """
    import gymnasium
    import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)
    from PIL import Image

    actor: GaussianPolicy = pickle.loads(policy)
    # afresh (20 ms), so that no episode depends on the ones before it
    env: Any = gymnasium.make(env_id, render_mode="rgb_array" if film else None)
    env.reset(seed=seed)  # the first episode of an environment is off by a constant: reset and throw it away
    observation, _ = env.reset(seed=seed)
    total, frames = 0.0, []
    for t in itertools.count():
        if film and t < 600 and t % 3 == 0:  # the simulator's 60 steps a second, at 20 frames a second
            frames.append(Image.fromarray(env.render()).quantize(64, dither=Image.Dither.NONE))
        observation, reward, terminated, truncated, _ = env.step(actor.act(observation))
        total += float(reward)
        if terminated or truncated:
            break
    env.close()
    if film:
        content = io.BytesIO()
        frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
        write_whole(film, content.getvalue())
    return total


class EvaluationPool(concurrent.futures.ProcessPoolExecutor):
    """Worker processes for episodes, one core each. The simulator lives in them alone, and so does what it prints."""

    def __init__(self, config: Config) -> None:
        self.config, workers = config, min(config.eval_episodes, torch.get_num_threads())
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # which the workers inherit
        self.submit(os.getpid)  # starts them
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)

    def play(self, policy: GaussianPolicy, step: int, film: Path | None = None) -> dict[str, float]:
        """Evaluate ``policy`` as it is after ``step``, print a line, and return the evaluation's columns of metrics.csv.

        The seeds of the episodes are new ones at each step, and the same ones in every run of a seed.
        """
        seeds = np.random.SeedSequence([self.config.seed, step]).generate_state(self.config.eval_episodes).tolist()
        episode = functools.partial(play_episode, pickle.dumps(copy.deepcopy(policy).cpu()), self.config.robot.env_id)
        returns = list(self.map(episode, seeds))
        mean, std = float(np.mean(returns)), float(np.std(returns))
        score = self.config.robot.score(mean)
        say(f"step {step:>9,}  return {mean:.1f} ± {std:.1f} over {len(seeds)} episodes  score {score:.1f}")
        if film:
            self.submit(episode, seeds[0], film).result()
            say(f"film   {film}")
        columns = {f"return_{n}": value for n, value in enumerate(returns, start=1)}
        return {"return_mean": mean, "return_std": std, "score": score} | columns


def start_worker() -> None:
    """Prepare a process of the pool: one thread, silent, and gone with its parent."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the simulator prints from C; our errors travel to the parent as exceptions
    os.dup2(nowhere, 2)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


# --------------------------------------------------------------------------------------------- run, picture
def say(line: str) -> None:
    """Print one line of the log on stdout, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def write_whole(path: Path, content: bytes) -> None:
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


SETTINGS = pydantic.TypeAdapter(Config)  # to JSON and back; what another version's run lacks takes its default


class Run:
    """What a run keeps, in its folder: config.json, metrics.csv, TensorBoard's events, checkpoint.pt."""

    def __init__(self, config: Config, agent: CIQL, checkpoint: dict[str, Any] | None) -> None:
        self.config, self.agent, self.step = config, agent, 0
        self.rows: list[dict[str, float]] = []  # of metrics.csv: one a log line or evaluation
        self.sums, self.count = [torch.zeros((), device=agent.device) for _ in METRICS], 0  # since the last log line
        if checkpoint:
            self.step, self.rows, self.count = checkpoint["step"], checkpoint["rows"], checkpoint["meter"]["count"]
            torch._foreach_copy_(self.sums, checkpoint["meter"]["sums"])
            agent.load_state_dict(checkpoint["agent"])
            torch.set_rng_state(checkpoint["random_state"])
            if not agent.on_cpu:
                torch.cuda.set_rng_state_all(checkpoint["cuda_random_states"])
        start = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
        self.folder = config.resume or config.out_dir / f"{Path(config.dataset).stem}-seed{config.seed}-{start}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out_dir is {config.out_dir}, which cannot be written ({error.strerror})") from error
        write_whole(self.folder / "config.json", SETTINGS.dump_json(config, indent=2))
        episodes = (f"return_{n}" for n in range(1, config.eval_episodes + 1))
        self.columns = ("step", *METRICS, "steps_per_second", "return_mean", "return_std", "score", *episodes)
        header = ",".join(self.columns) + "\n"
        write_whole(self.folder / "metrics.csv", (header + "".join(map(self.csv_line, self.rows))).encode())
        settings, self.wandb = {name: str(value) for name, value in dataclasses.asdict(config).items()}, None
        if config.wandb_project:
            import wandb

            own: dict[str, Any] = {"project": config.wandb_project, "id": self.folder.name, "dir": self.folder}
            quiet = wandb.Settings(silent=True)
            self.wandb = wandb.init(**own, config=settings, resume="allow", sync_tensorboard=True, settings=quiet)
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.board = SummaryWriter(self.folder, purge_step=self.step + 1)  # hides what an earlier process wrote later
        for summary in hparams(settings, {"evaluation/return_mean": 0.0}):
            self.board._get_file_writer().add_summary(summary)

    def csv_line(self, row: dict[str, float]) -> str:
        return ",".join(str(row.get(name, "")) for name in self.columns) + "\n"

    def record(self, row: dict[str, float]) -> None:
        """Add a row to metrics.csv and TensorBoard."""
        self.rows.append({"step": self.step} | row)
        try:
            with open(self.folder / "metrics.csv", "a") as file:
                file.write(self.csv_line(self.rows[-1]))
            for name, value in row.items():
                group = "training" if name in (*METRICS, "steps_per_second") else "evaluation"
                self.board.add_scalar(f"{group}/{name}", value, self.step)
            self.board.flush()
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}); make room, then --resume it"
            ) from error

    def add(self, metrics: Metrics) -> None:
        """Take in the metrics of one more step, on the device: nothing waits for it but a log line."""
        torch._foreach_add_(self.sums, list(metrics.values()))
        self.step, self.count = self.step + 1, self.count + 1

    def log(self, steps_per_second: float) -> dict[str, float]:
        """Print the mean losses since the last log line, and start anew; returns their columns of metrics.csv."""
        self.check_finite()
        row = dict(zip(METRICS, (torch.stack(self.sums) / self.count).tolist(), strict=True))
        losses = f"V {row['value_loss']:.4f}  Q {row['q_loss']:.4f}  policy {row['policy_loss']:.3f}"
        values = f"penalty {row['penalty']:.4f}  mean Q {row['q']:.2f}  {steps_per_second:.0f} steps/s"
        say(f"step {self.step:>9,}  {losses}  {values}")
        torch._foreach_zero_(self.sums)
        self.count = 0
        return row | {"steps_per_second": steps_per_second}

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss since the last log line, or a weight, is NaN or infinite."""
        bad = [name for name, total in zip(METRICS, self.sums, strict=True) if not total.isfinite()]
        bad += [] if all(p.isfinite().all() for p in self.agent.parameters) else ["a weight"]
        if bad:
            span = f"within the {self.count} steps up to step {self.step:,}"
            raise FloatingPointError(f"{bad[0]} became NaN or infinite {span}; lower lr")

    def save(self, checksum: int) -> None:
        """Write checkpoint.pt: all that the steps to come depend on."""
        self.check_finite()
        checkpoint = {
            "config": SETTINGS.dump_json(self.config).decode(),
            "step": self.step,
            "rows": self.rows,
            "agent": self.agent.state_dict(),
            "meter": {"sums": self.sums, "count": self.count},
            "random_state": torch.get_rng_state(),
            "cuda_random_states": [] if self.agent.on_cpu else torch.cuda.get_rng_state_all(),
            "checksum": checksum,
        }
        content = io.BytesIO()  # torch.save to a full disk raises anything
        torch.save(checkpoint, content)
        write_whole(self.folder / "checkpoint.pt", content.getvalue())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU. Raises InputError if there is none or it cannot be read."""
    path = folder / "checkpoint.pt"
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = error.strerror if isinstance(error, OSError) else "is it damaged?"
        raise InputError(f"{path} cannot be read ({cause}); name the folder of a run evaluated once") from error


def load_policy(run: str | Path | dict[str, Any]) -> GaussianPolicy:
    """The policy in a run folder or its checkpoint, on the CPU, ready to ``act``. Raises as ``load_checkpoint``."""
    checkpoint = run if isinstance(run, dict) else load_checkpoint(Path(run))
    state, hidden_sizes = checkpoint["agent"]["policy"], SETTINGS.validate_json(checkpoint["config"]).hidden_sizes
    policy = GaussianPolicy(len(state["observation_mean"]), len(state["log_std"]), hidden_sizes)
    policy.load_state_dict(state)
    return policy


def evaluations(rows: Sequence[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation steps (E,) and returns (E, eval_episodes) among the rows of metrics.csv."""
    evaluated = [row for row in rows if "return_mean" in row]
    returns = [[row[name] for name in row if name.removeprefix("return_").isdigit()] for row in evaluated]
    return np.array([int(row["step"]) for row in evaluated]), np.array(returns)


def draw(config: Config, rows: Sequence[dict[str, float]], data_returns: np.ndarray, note: str) -> None:
    """Write the picture: evaluation returns with their references, and the losses, against gradient steps."""
    from matplotlib.figure import Figure

    steps, returns = evaluations(rows)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    axes, mean, std = parts[0].subplots(), returns.mean(1), returns.std(1)
    axes.plot(steps, mean, "o-", markersize=3, label=f"CIQL, mean of {returns.shape[1]} episodes")
    axes.fill_between(steps, mean - std, mean + std, alpha=0.25, lw=0, label="± standard deviation")
    draw_references(axes, config.robot, data_returns)
    settings = dataclasses.fields(config)[3:13]  # from gamma to lr
    changes = [f"{f.name} {getattr(config, f.name)}" for f in settings if getattr(config, f.name) != f.default]
    title = f"CIQL on {Path(config.dataset).stem}{note}\nseed {config.seed}, {', '.join(changes) or 'default settings'}"
    parts[0].suptitle(title, fontsize="medium")
    panels = {"value_loss": "V loss", "q_loss": "Q loss", "policy_loss": "policy loss", "q": "mean Q(s, a)"}
    logged = [row for row in rows if "q" in row]
    for panel, (name, label) in zip(parts[1].subplots(1, 4), panels.items(), strict=True):
        panel.plot([row["step"] / 1000 for row in logged], [row[name] for row in logged], linewidth=1)
        panel.set(title=label, xlabel="thousand steps")
        panel.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format=config.plot.suffix[1:], dpi=110)
    write_whole(config.plot, content.getvalue())


def draw_references(axes: Any, robot: Robot, data_returns: np.ndarray) -> None:
    """Dress axes of returns against steps: the returns of data set, random and expert policy, the score at the right."""
    references = {"random": (robot.random_return, "C2", ":"), "expert": (robot.expert_return, "C4", "-.")}
    references |= {"data set": (np.mean(data_returns), "C3", "--")} if len(data_returns) else {}
    unscore = np.poly1d([(robot.expert_return - robot.random_return) / 100, robot.random_return])
    axes.secondary_yaxis("right", functions=(robot.score, unscore)).set_ylabel("normalised score")
    for name, (value, colour, style) in references.items():
        axes.axhline(value, color=colour, linestyle=style, label=f"{name}, {value:.0f}")
    axes.set(xlabel="gradient steps", ylabel="return of an episode", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)


# ------------------------------------------------------------------------------------------------ training
def check_run(config: Config, checkpoint: dict[str, Any] | None) -> None:
    """Raise InputError for what this machine does not have, or if ``config`` does not go on from ``checkpoint``."""
    if config.plot.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"plot is {config.plot}, but must be a .png, .pdf or .svg")
    there = next(folder for folder in (config.out_dir / "_").absolute().parents if folder.exists())
    for name, folder in {"plot": config.plot.parent, "out_dir": there}.items():
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise InputError(f"{name} is {getattr(config, name)}, but {folder} is no folder that can be written")
    if config.wandb_project:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise InputError("wandb_project is set, but wandb is not installed; pip install wandb") from error
    find_device(config.device)
    if checkpoint:
        saved, now = dataclasses.asdict(SETTINGS.validate_json(checkpoint["config"])), dataclasses.asdict(config)
        free = {"plot", "out_dir", "resume", "evaluate", "max_steps", "threads", "film", "wandb_project"}
        changes = [f"{name} {now[name]} (was {saved[name]})" for name in now.keys() - free if now[name] != saved[name]]
        if changes:
            raise InputError(f"{config.resume} was trained with other settings; resume without {', '.join(changes)}")
        if config.max_steps < (step := checkpoint["step"]):
            raise InputError(f"max_steps is {config.max_steps}, but {config.resume} is at step {step}; raise it")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU. Raises InputError if it is not there."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise InputError(f"device is {name}, which is not here; use auto, cpu or a CUDA device there is") from error


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context in which SIGINT and SIGTERM only join the list it gives; a second one acts as ever."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        restore()
        say(f"{signal.Signals(number).name}: finishing the step, then saving; once more stops at once")

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    is_main = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be caught
    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield caught
    finally:
        restore()


def train(config: Config, report: Callable[..., object] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Train CIQL; prints the log, writes the picture and the run folder.

    ``report`` is called after every evaluation, once it is saved, with its row of metrics.csv and the run folder.
    Returns the evaluation steps (E,) and returns (E, eval_episodes). Raises InputError for a bad setting, file or
    network, FloatingPointError for losses not finite, SystemExit after SIGINT or SIGTERM.
    """
    start = time.perf_counter()
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    check_run(config, checkpoint)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data, returns, note = load_dataset(config)
    checksum = zlib.crc32(data.rewards.numpy().data, zlib.crc32(data.actions.numpy().data))
    if checkpoint and checkpoint["checksum"] != checksum:
        raise InputError(f"{config.dataset} is not the data that {config.resume} was trained on; put that back")
    with EvaluationPool(config) as pool, stop_signals() as stop:
        torch.manual_seed(config.seed)
        agent = CIQL(*config.robot.dims, config)
        data = agent.prepare(data)
        run = Run(config, agent, checkpoint)
        where = f"{torch.get_num_threads()} threads" if agent.on_cpu else torch.cuda.get_device_name(agent.device)
        size, compiling = sum(p.numel() for p in agent.parameters), ", compiling the step" if config.compile else ""
        start_step = f" from step {run.step:,}" if checkpoint else ""
        say(f"run    {run.folder}{start_step}, {agent.device.type} ({where}), {size:,} parameters{compiling}")
        step_function = agent.compiled_step(data) if config.compile else agent.step
        since, timed = time.perf_counter(), run.step  # of the speed
        bar = tqdm(range(run.step, config.max_steps), "train", config.max_steps, initial=run.step, disable=None)
        for _ in bar:
            run.add(step_function(data))
            row: dict[str, float] = {}
            if run.step % config.log_interval == 0:
                row |= run.log((run.step - timed) / (time.perf_counter() - since))
                since, timed = time.perf_counter(), run.step
            pause = time.perf_counter()
            evaluates, is_last = run.step % config.eval_interval == 0, run.step == config.max_steps
            if evaluates or is_last:
                row |= pool.play(agent.policy, run.step, run.folder / "policy.gif" if config.film and is_last else None)
                bar.set_postfix_str(f"return {row['return_mean']:.0f}")
            if row:
                run.record(row)
            if evaluates or is_last or stop:
                run.save(checksum)
            if "return_mean" in row:
                draw(config, run.rows, returns, note)
                if report:
                    report(run.rows[-1], run.folder)
            if stop:
                say(f"stopped at step {run.step:,}; go on with --resume {run.folder}")
                raise SystemExit(128 + stop[0])
            since += time.perf_counter() - pause
    run.board.close()
    if run.wandb:
        run.wandb.finish()
    summarize(run, time.perf_counter() - start)
    return evaluations(run.rows)


def summarize(run: Run, seconds: float) -> None:
    """Print what came out of the run and what to do with it."""
    (steps, returns), score = evaluations(run.rows), run.config.robot.score
    means, best = returns.mean(1), int(returns.mean(1).argmax())
    last = means[-10:].mean()
    spread = f"{returns[-1].std():.1f} over {returns.shape[1]} episodes"
    say(f"final  return {means[-1]:.1f} ± {spread}, score {score(means[-1]):.1f}")
    say(f"       {last:.1f} is the mean of the last {len(means[-10:])} evaluations, score {score(last):.1f}")
    say(f"       {means[best]:.1f} at step {steps[best]:,} was the best of {len(means)}: picked by luck, not a result")
    say(f"took   {seconds / 60:.1f} minutes")
    say(f"wrote  {run.config.plot} and {run.folder} (settings, metrics, TensorBoard events, checkpoint)")
    say(f"next   --resume {run.folder} --max-steps {2 * run.config.max_steps}, or --evaluate {run.folder} --film")


# -------------------------------------------------------------------------------------------- command line
def parse(arguments: Sequence[str], default: Config | None = None) -> Config:
    """Settings from the command line; when a run folder is resumed or evaluated, its settings are the defaults."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(Config, args=arguments, default=default or Config(), prog="ciql_pybullet.py")
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]  # in a box, the cause first
        cause = " ".join(itertools.takewhile(lambda line: line[:3] not in ("───", "╰──", "For"), lines))
        cause = re.sub(r".*Config (Value error, )?", "", cause).replace("Input should", "must")
        cause = re.sub(r" \[type=(?!value_error)\w+, input_value=(.*), input_type.*", r", not \1", cause)
        cause = cause.split(" [type=")[0]
        raise InputError(f"{cause}; --help lists the settings") from stop
    folder = config.resume or config.evaluate
    if not folder or default:
        return config
    try:
        saved = SETTINGS.validate_json((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json cannot be read; name the folder of a run") from error
    return parse(arguments, dataclasses.replace(saved, resume=config.resume, evaluate=config.evaluate, film=False))


def main() -> None:
    try:
        config = parse(sys.argv[1:])
        if not config.evaluate:
            train(config)
            return
        checkpoint = load_checkpoint(config.evaluate)
        with EvaluationPool(config) as pool:
            film = config.evaluate / "policy.gif" if config.film else None
            pool.play(load_policy(checkpoint), checkpoint["step"], film)
    except (InputError, FloatingPointError) as error:
        print(f"ciql_pybullet: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
