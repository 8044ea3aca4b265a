"""Conservative Implicit Q-Learning (CIQL), trained offline on the PyBullet D4RL data sets.

CIQL is Implicit Q-Learning plus a clamped conservative penalty. With Q̄ = min(Q1, Q2) of the target critic:

    V   diff = Q̄(s,a) − V(s)             loss = |τ − 1(diff<0)| · diff²
    Q   y = r + γ V(s')                    loss = (Q(s,a) − y)² + α · ReLU(E_ā Q(s,ā) − E_a Q(s,a))
    π   adv = max(0, Q̄(s,a) − V(s))      loss = −exp(β · adv) · log π(a|s)

y does not bootstrap after a true termination; ā are num_neg actions a state, drawn uniformly from the action box.
IQL: Kostrikov et al., 2021 (arXiv 2110.06169). CQL: Kumar et al., 2020 (arXiv 2006.04779). D4RL: Fu et al., 2020
(arXiv 2004.07219). Data sets: github.com/takuseno/d4rl-pybullet. Settings: below, or as flags (--help).
"""

import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
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
from torch.optim.adam import adam
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ settings
EnvId = Literal["HalfCheetahBulletEnv-v0", "HopperBulletEnv-v0", "Walker2DBulletEnv-v0", "AntBulletEnv-v0"]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True)
class Config:
    """CIQL on the PyBullet D4RL data sets. Every setting below is also a flag: --max-steps 20000."""

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of the 12 ids, or the path of an .hdf5 file (with env_id)
    env_id: EnvId | None = None  # the environment of an .hdf5 file
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL and its networks
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99  # discount
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.8  # expectile of V; 0.5 is the mean, towards 1 the best action
    beta: Weight = 1.0  # inverse temperature of the policy weights; 0 gives behaviour cloning
    alpha: Weight = 1.0  # weight of the conservative penalty; 0 gives IQL
    num_neg: Count = 10  # off-data actions a state in the penalty
    polyak: Annotated[float, Field(gt=0, le=1)] = 0.005  # share of the critic that moves into its target each step
    max_weight: Annotated[Weight, Field(ge=1)] = 100.0  # cap of the policy weights exp(beta * adv)
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
        if self.dataset not in DOWNLOAD_URLS and not (self.env_id and Path(self.dataset).suffix in (".hdf5", ".h5")):
            raise InputError(f"dataset is {self.dataset}, but must be an .hdf5 file, with env_id, or one of {DATASETS}")

    @property
    def robot(self) -> "Robot":
        key = self.env_id or self.dataset.split("-")[0]
        return next(robot for name, robot in ROBOTS.items() if key in (name, robot.env_id))


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


def read_transitions(file: str | Path | dict[str, np.ndarray], max_episode_steps: int = 1000) -> Transitions:
    """The transitions of a d4rl-pybullet file, given by its path or its rows. Raises InputError if it holds none.

    Row i of the file holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the step
    before. So the transition that starts in row i takes its reward and its end from row i + 1. An episode of T steps
    closes with an extra row (last observation, zero action, terminal 1): T + 1 rows, of which the last starts no
    transition. Nor does the last row of a file cut in mid-episode. Terminal is 1 at the time limit as well: an
    episode of ``max_episode_steps`` steps was cut, not ended, and its last transition is no termination.
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
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between: (B, sizes[0]) -> (B, sizes[-1])."""
    layers = [layer for size, size_out in itertools.pairwise(sizes) for layer in (nn.Linear(size, size_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ValueNetwork(nn.Module):
    """V(s): (B, observation_dim) -> (B,)."""

    def __init__(self, observation_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.v = mlp(observation_dim, *hidden_sizes, 1)

    def forward(self, observations: Tensor) -> Tensor:
        return self.v(observations).squeeze(-1)


class DoubleQNetwork(nn.Module):
    """Q1(s, a) and Q2(s, a): (B, observation_dim), (B, action_dim) -> two (B,)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.q1 = mlp(observation_dim + action_dim, *hidden_sizes, 1)
        self.q2 = mlp(observation_dim + action_dim, *hidden_sizes, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([observations, actions], -1)
        return self.q1(inputs).squeeze(-1), self.q2(inputs).squeeze(-1)


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(μ(s)), σ²), with one σ an action dimension, as in IQL. It acts with its mean, tanh(μ(s))."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.mu = mlp(observation_dim, *hidden_sizes, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        # what the training data were normalised with, so that a policy acts on the simulator's own observations
        self.observation_mean = nn.Buffer(torch.zeros(observation_dim))
        self.observation_std = nn.Buffer(torch.ones(observation_dim))

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
    return torch.relu(q_neg.mean() - q_data.mean())


def awr_weights(advantage: Tensor, beta: float, max_weight: float) -> Tensor:
    """min(exp(β · max(0, A)), max_weight): (B,) -> (B,), with A = Q̄(s,a) − V(s). IQL, equation 7, clamped."""
    return torch.exp(beta * advantage.clamp(min=0)).clamp(max=max_weight)


# --------------------------------------------------------------------------------------------------- agent
Metrics = dict[str, Tensor]  # what a step reports, each a mean over the batch
METRICS = ("value_loss", "q_loss", "policy_loss", "penalty", "q", "v", "advantage", "clamp_open", "policy_std")
NETWORKS = ("policy", "value", "critic", "target_critic")
ADAM = ("exp_avgs", "exp_avg_sqs", "adam_steps")
ON_AMD = os.path.exists("/proc/cpuinfo") and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


class CIQL:
    """Conservative Implicit Q-Learning: the networks, their one optimiser, and the gradient step."""

    def __init__(self, observation_dim: int, action_dim: int, config: Config) -> None:
        self.config, self.device = config, find_device(config.device)
        self.on_cpu = self.device.type == "cpu"
        self.policy = GaussianPolicy(observation_dim, action_dim, config.hidden_sizes).to(self.device)
        self.value = ValueNetwork(observation_dim, config.hidden_sizes).to(self.device)
        self.critic = DoubleQNetwork(observation_dim, action_dim, config.hidden_sizes).to(self.device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.parameters: list[Tensor] = [p for net in (self.policy, self.value, self.critic) for p in net.parameters()]
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critic.parameters())
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))  # Adam's
        self.adam_steps = [torch.zeros((), device=self.device) for _ in self.parameters]
        self.clamp_open = False  # was it at the last step?

    def gradients(self, batch: Transitions, negative_actions: Tensor, open_clamp: bool) -> tuple[Any, Metrics]:
        """Gradients of the losses, of the penalty only if ``open_clamp``, in one backward pass; figures for the log."""
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
        return torch.autograd.grad(value_loss + q_loss + policy_loss, self.parameters), metrics

    def update(self, batch: Transitions) -> Metrics:
        """One gradient step on B transitions (observations normalised); returns the losses, scalars on the device."""
        c = self.config
        size = len(batch.actions), c.num_neg * (c.alpha > 0), batch.actions.shape[1]
        negative_actions = torch.rand(size, device=self.device) * 2 - 1
        # ReLU'(x) = 0 for x <= 0: with the clamp closed, leaving out the penalty's backward pass, over half of the work,
        # is exact. Take it as the last step found it; go again if that was wrong. On CUDA the branch would cost a wait.
        open_clamp = self.clamp_open or not self.on_cpu
        gradients, metrics = self.gradients(batch, negative_actions, open_clamp)
        if self.on_cpu and c.alpha > 0:
            self.clamp_open = bool(metrics["penalty"] > 0)
            if self.clamp_open and not open_clamp:
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
        """``step`` by torch.compile; or as it is, with a line that says why, where that fails."""
        torch.compiler.reset()  # an earlier run's graphs count towards the compiler's limit
        torch._dynamo.config.trace_autograd_ops = True  # the backward pass in the graph
        torch._inductor.config.fallback_random = True  # the eager step's random numbers
        torch._inductor.config.cpp_wrapper = self.on_cpu  # no Python between the kernels
        if self.on_cpu and ON_AMD and torch.backends.mkldnn.is_available():
            compile_onednn()
        c, gradients = self.config, torch.compile(self.gradients, fullgraph=True)
        batch = Transitions(*(column[[0] * c.batch_size] for column in data))
        negative_actions = batch.actions.new_zeros(c.batch_size, c.num_neg * (c.alpha > 0), batch.actions.shape[1])
        try:
            gradients(batch, negative_actions, False)
        except Exception as error:  # noqa: BLE001  (any of the compiler's; a bug of ours comes up again eagerly)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"NOTE   the step could not be compiled and runs eagerly, slower: {reason}")
            return self.step
        self.gradients = gradients  # type: ignore[method-assign]
        return self.step if self.on_cpu else torch.compile(self.step, fullgraph=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random state."""
        networks = {name: getattr(self, name).state_dict() for name in NETWORKS}
        return networks | {name: getattr(self, name) for name in (*ADAM, "clamp_open")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        for name in ADAM:
            torch._foreach_copy_(getattr(self, name), state[name])
        self.clamp_open = state["clamp_open"]


@functools.cache
def compile_onednn() -> None:
    """Have torch.compile take oneDNN for float32 products on the CPU: MKL, torch's usual library, is slow on AMD."""
    from torch._inductor import config, ir, lowering, mkldnn_ir

    rules, mm, addmm = lowering.lowerings, torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    usual_mm, usual_addmm = rules[mm], rules[addmm]

    def product(x: Any, w: Any) -> Any:
        if (x.get_device().type, x.get_dtype()) != ("cpu", torch.float32):
            return usual_mm(x, w)
        call = mkldnn_ir.LinearUnary  # which takes w transposed, as a view too
        x, w = call.require_contiguous(call.realize_input(x)), call.realize_input(lowering.permute(w, [1, 0]))
        layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], w.get_size()[0]])
        return ir.TensorBox.create(mkldnn_ir._create_output_node(call(layout, [x, w], [None, "none", [-1], ""])))

    rules[mm] = product
    rules[addmm] = lambda b, x, w, **scale: usual_addmm(b, x, w, **scale) if scale else lowering.add(product(x, w), b)
    config.pattern_matcher = False  # which would make some of them MKL's again


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


# Random: published means (ant: measured; its dynamics have changed). Expert: stable-baselines3, d4rl-pybullet issue 2.
ROBOTS = {
    "halfcheetah": Robot("HalfCheetahBulletEnv-v0", (26, 6), -1304.0, 3000.0),
    "hopper": Robot("HopperBulletEnv-v0", (15, 3), 18.6, 2500.0),
    "walker2d": Robot("Walker2DBulletEnv-v0", (22, 6), 15.0, 2500.0),
    "ant": Robot("AntBulletEnv-v0", (28, 8), 432.0, 3300.0),
}
DATASETS = [f"{robot}-bullet-{kind}-v0" for robot in ROBOTS for kind in ("random", "medium", "mixed")]
KEYS = """jnvpb1hp60zt2ak v4xgssp1w968a9l scj1rqun963aw90 bino8ojd7iq4p4d w22kgzldn6eng7j xv3p0h7dzgxt8xb
1gwcfl2nmx6878m v0f2kz48b1hw6or i4u2ii0d85iblou 2xpmh4wk2m7i8xh 6n79kwd94xthr1t pmy3dzab35g4whk"""  # in that order
DOWNLOAD_URLS = {
    name: f"https://www.dropbox.com/s/{key}/{name}.hdf5?dl=1" for name, key in zip(DATASETS, KEYS.split(), strict=True)
}
SAMPLES = Path(__file__).resolve().parent / "data"  # re-collected, they stand in for want of a network
NETWORK_TIMEOUT = 5.0  # seconds, to connect and between two pieces of a download


def read_rows(path: str | Path, dims: tuple[int, ...] | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Read and check a d4rl-pybullet file: its columns (N, ...), float32, and how it was re-collected (or "").

    ``dims`` is (observation_dim, action_dim) of the environment it must fit. Raises InputError, naming file and key.
    """
    keys = ("observations", "actions", "rewards", "terminals")
    try:
        with h5py.File(path) as file:
            s, a, r, d = (file[key].astype(np.float32)[()] for key in keys)
            source = str(file.attrs.get("source", ""))
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); is it a whole d4rl-pybullet HDF5 file?") from error
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


def episode_returns(rows: dict[str, np.ndarray]) -> np.ndarray:
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
    return data, returns, " (re-collected, not the published file)" if published and source else ""


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``, a path or one of the 12 ids: from the cache, the network or the embedded samples."""
    cached = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / f"{dataset}.hdf5"
    if dataset not in DOWNLOAD_URLS or cached.exists():
        return cached if dataset in DOWNLOAD_URLS else Path(dataset)
    import pooch

    def fetch(url: str, part: str, _: object) -> None:
        """Fill a temporary file, which pooch renames to ``cached`` if it is whole and fits the environment."""
        pooch.HTTPDownloader(timeout=NETWORK_TIMEOUT, progressbar=sys.stderr.isatty())(url, part, None)
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
        remedy = f"download {url} to {cached}, or re-collect it: python data/make_bullet_dataset.py --id {dataset}"
        raise InputError(f"{cause}; {remedy}") from error


# ---------------------------------------------------------------------------------------------- evaluation
def play_episode(policy: bytes, env_id: str, seed: int, film: Path | Literal[False] = False) -> float:
    """Undiscounted return of an episode: a pure function of (pickled) policy and seed; ``film``: a GIF of 600 steps."""
    import gymnasium
    import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)
    from PIL import Image

    actor: GaussianPolicy = pickle.loads(policy)
    env: Any = gymnasium.make(env_id, render_mode="rgb_array" if film else None)  # afresh, 20 ms: free of the last one
    env.reset(seed=seed)  # the first episode of an environment is off by a constant: reset and throw it away
    observation, _ = env.reset(seed=seed)
    total, gif = 0.0, []
    for t in itertools.count():
        if film and t < 600 and t % 3 == 0:  # the simulator's 60 steps a second, at 20 frames a second
            gif.append(Image.fromarray(env.render()).quantize(64, dither=Image.Dither.NONE))
        observation, reward, terminated, truncated, _ = env.step(actor.act(observation))
        total += float(reward)
        if terminated or truncated:
            break
    env.close()
    if film:
        write_whole(film, lambda f: gif[0].save(f, "GIF", save_all=True, append_images=gif[1:], duration=50, loop=0))
    return total


class EvaluationPool(concurrent.futures.ProcessPoolExecutor):
    """Worker processes for episodes, one core each. The simulator lives in them alone, and so does what it prints."""

    def __init__(self, config: Config) -> None:
        self.config, workers = config, min(config.eval_episodes, torch.get_num_threads())
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # which the workers inherit
        self.submit(os.getpid)  # starts them
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)

    def play(self, policy: GaussianPolicy, step: int, film: Path | Literal[False] = False) -> dict[str, float]:
        """Evaluate ``policy`` as it is after ``step``, print a line, and return its columns of metrics.csv."""
        # new episodes at each step, and the same ones in every run of a seed
        seeds = np.random.SeedSequence([self.config.seed, step]).generate_state(self.config.eval_episodes).tolist()
        episode = functools.partial(play_episode, pickle.dumps(copy.deepcopy(policy).cpu()), self.config.robot.env_id)
        returns = list(self.map(episode, seeds))
        mean, std = float(np.mean(returns)), float(np.std(returns))
        score = self.config.robot.score(mean)
        say(f"step {step:>9,}  return {mean:.1f} ± {std:.1f} over {len(seeds)} episodes  score {score:.1f}")
        if film:
            self.submit(episode, seeds[0], film).result()
            say(f"film   {film}")
        row = {"return_mean": mean, "return_std": std, "score": score}
        return row | {f"return_{n}": value for n, value in enumerate(returns, start=1)}


def start_worker() -> None:
    """Prepare a process of the pool: one thread, silent, and gone with its parent."""
    torch.set_num_threads(1)
    for stream in (1, 2):  # the simulator prints from C; our errors travel to the parent as exceptions
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --------------------------------------------------------------------------------------------- run, picture
say = tqdm.write  # a line of the log on stdout, above a progress bar if there is one
SETTINGS = pydantic.TypeAdapter(Config)  # to JSON and back; what another version's run lacks takes its default


def write_whole(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    """Save what ``write`` writes beside ``path``, then rename: ``path`` is at any time the old file or the new one."""
    content, part = io.BytesIO(), path.with_name(f".{path.name}.{os.getpid()}")
    write(content)  # in memory first: torch.save to a full disk raises anything
    try:
        with open(part, "wb") as file:
            file.write(content.getbuffer())
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Run:
    """What a run keeps, in its folder: config.json, metrics.csv, TensorBoard's events, checkpoint.pt."""

    def __init__(self, config: Config, agent: CIQL, checkpoint: dict[str, Any] | None) -> None:
        self.config, self.agent, self.step = config, agent, 0
        self.rows: list[dict[str, float]] = []  # of metrics.csv: one a log line or evaluation
        self.sums = [torch.zeros((), device=agent.device) for _ in METRICS]  # since the last log line
        if checkpoint:
            self.step, self.rows = checkpoint["step"], checkpoint["rows"]
            torch._foreach_copy_(self.sums, checkpoint["meter"]["sums"])
            agent.load_state_dict(checkpoint["agent"])
            torch.set_rng_state(checkpoint["random_state"])
            torch.cuda.set_rng_state_all([] if agent.on_cpu else checkpoint["cuda_random_states"])
        name = f"{Path(config.dataset).stem}-seed{config.seed}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = config.resume or config.out_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.json", lambda file: file.write(SETTINGS.dump_json(config, indent=2)))
        episodes = (f"return_{n}" for n in range(1, config.eval_episodes + 1))
        columns = ("step", *METRICS, "steps_per_second", "return_mean", "return_std", "score", *episodes)
        self.csv = csv.DictWriter(open(self.folder / "metrics.csv", "w", buffering=1), columns, lineterminator="\n")  # noqa: SIM115
        self.csv.writeheader()
        self.csv.writerows(self.rows)
        if config.wandb_project:
            import wandb

            own: dict[str, Any] = {"project": config.wandb_project, "id": self.folder.name, "dir": self.folder}
            own |= {"config": SETTINGS.dump_python(config, mode="json"), "settings": wandb.Settings(silent=True)}
            wandb.init(**own, resume="allow", reinit="finish_previous", sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder, purge_step=self.step + 1)  # hides what an earlier process wrote later

    def log(self, steps_per_second: float) -> dict[str, float]:
        """Print the mean losses since the last log line, and start anew; returns their columns of metrics.csv."""
        row = dict(zip(METRICS, (torch.stack(self.sums) / self.config.log_interval).tolist(), strict=True))
        losses = f"V {row['value_loss']:.4f}  Q {row['q_loss']:.4f}  policy {row['policy_loss']:.3f}"
        values = f"penalty {row['penalty']:.4f}  mean Q {row['q']:.2f}  {steps_per_second:.0f} steps/s"
        say(f"step {self.step:>9,}  {losses}  {values}")
        torch._foreach_zero_(self.sums)
        return row | {"steps_per_second": steps_per_second}

    def record(self, row: dict[str, float]) -> None:
        """Add a row to metrics.csv and TensorBoard."""
        self.rows.append({"step": self.step} | row)
        self.csv.writerow(self.rows[-1])
        for name, value in row.items():
            group = "training" if name in (*METRICS, "steps_per_second") else "evaluation"
            self.board.add_scalar(f"{group}/{name}", value, self.step)
        self.board.flush()

    def save(self, checksum: int) -> None:
        """Write checkpoint.pt: all that the steps to come depend on."""
        checkpoint = {
            "config": SETTINGS.dump_json(self.config).decode(), "checksum": checksum, "step": self.step,
            "rows": self.rows, "meter": {"sums": self.sums}, "agent": self.agent.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_states": [] if self.agent.on_cpu else torch.cuda.get_rng_state_all(),
        }  # fmt: skip
        write_whole(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU. Raises InputError if there is none or it cannot be read."""
    path = folder / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); name the folder of a run") from error


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
    """Write the picture: evaluation returns against gradient steps, with their references."""
    from matplotlib.figure import Figure

    figure, (steps, returns) = Figure(figsize=(9, 5), layout="constrained"), evaluations(rows)
    axes, mean, std = figure.subplots(), returns.mean(1), returns.std(1)
    axes.plot(steps, mean, "o-", markersize=3, label=f"CIQL, mean of {returns.shape[1]} episodes")
    axes.fill_between(steps, mean - std, mean + std, alpha=0.25, lw=0, label="± standard deviation")
    draw_references(axes, config.robot, data_returns)
    settings = ", ".join(f"{name} {getattr(config, name)}" for name in ("seed", "alpha", "beta", "tau"))
    axes.set_title(f"CIQL on {Path(config.dataset).stem}{note}\n{settings}", fontsize="medium")
    write_whole(config.plot, lambda file: figure.savefig(file, format=config.plot.suffix[1:], dpi=110))


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
    if config.plot.suffix not in (".png", ".pdf", ".svg") or not os.access(config.plot.parent, os.W_OK | os.X_OK):
        raise InputError(f"plot is {config.plot}, but must be a .png, .pdf or .svg in a folder that can be written")
    if config.wandb_project and not importlib.util.find_spec("wandb"):
        raise InputError("wandb_project is set, but wandb is not installed; pip install wandb")
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
    """Context in which a first SIGINT or SIGTERM only joins the list it gives; a second one acts as ever."""
    caught: list[int] = []
    with contextlib.ExitStack() as usual_handlers:

        def handle(number: int, frame: object) -> None:
            caught.append(number)
            usual_handlers.close()
            say(f"{signal.Signals(number).name}: finishing the step, then saving; once more stops at once")

        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            for number in (signal.SIGINT, signal.SIGTERM):
                usual_handlers.callback(signal.signal, number, signal.signal(number, handle))
        yield caught


def train(config: Config, report: Callable[..., object] = lambda row, folder: None) -> tuple[np.ndarray, np.ndarray]:
    """Train CIQL, print the log, write the picture and the run folder.

    ``report`` is called after every evaluation, once it is saved, with its row of metrics.csv and the run folder.
    Returns evaluation steps (E,) and returns (E, eval_episodes). Raises InputError, OSError for a disk that is full or
    read-only, FloatingPointError for losses not finite, SystemExit after SIGINT or SIGTERM.
    """
    start = time.perf_counter()
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    check_run(config, checkpoint)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data, data_returns, note = load_dataset(config)
    checksum = zlib.crc32(data.rewards.numpy().data, zlib.crc32(data.actions.numpy().data))
    if checkpoint and checkpoint["checksum"] != checksum:
        raise InputError(f"{config.dataset} is not the data that {config.resume} was trained on; put that back")
    with EvaluationPool(config) as pool, stop_signals() as stop:
        torch.manual_seed(config.seed)
        agent = CIQL(*config.robot.dims, config)
        data = agent.prepare(data)
        run = Run(config, agent, checkpoint)
        where = f"cpu, {torch.get_num_threads()} threads" if agent.on_cpu else torch.cuda.get_device_name(agent.device)
        say(f"run    {run.folder}, {where}, from step {run.step:,}" + ", compiling the step" * config.compile)
        step_function = agent.compiled_step(data) if config.compile else agent.step
        since, timed = time.perf_counter(), run.step  # of the speed
        for _ in tqdm(range(run.step, config.max_steps), "train", config.max_steps, initial=run.step, disable=None):
            torch._foreach_add_(run.sums, list(step_function(data).values()))  # on the device: nothing waits for it
            run.step += 1
            is_last = run.step == config.max_steps
            logs, evaluates = run.step % config.log_interval == 0, run.step % config.eval_interval == 0 or is_last
            if not (logs or evaluates or stop):
                continue
            if not all(x.isfinite().all() for x in (*run.sums, *agent.parameters)):
                raise FloatingPointError(f"a loss or weight became NaN or infinite up to step {run.step:,}; lower lr")
            row = run.log((run.step - timed) / (time.perf_counter() - since)) if logs else {}
            if evaluates:
                row |= pool.play(agent.policy, run.step, config.film and is_last and run.folder / "policy.gif")
            if row:
                run.record(row)
            if evaluates or stop:
                run.save(checksum)
            if evaluates:
                draw(config, run.rows, data_returns, note)
                report(run.rows[-1], run.folder)
            if stop:
                say(f"stopped at step {run.step:,}; go on with --resume {run.folder}")
                raise SystemExit(128 + stop[0])
            since, timed = time.perf_counter(), run.step
    run.board.close()
    (steps, returns), score = evaluations(run.rows), config.robot.score
    last, mean, std = returns[-10:].mean(1), returns[-1].mean(), returns[-1].std()
    say(f"final  return {mean:.1f} ± {std:.1f} over {config.eval_episodes} episodes, score {score(mean):.1f}")
    say(f"       {last.mean():.1f} is the mean of the last {len(last)} evaluations, score {score(last.mean()):.1f}")
    say(f"wrote  {config.plot} and {run.folder}, in {(time.perf_counter() - start) / 60:.1f} minutes")
    say(f"next   --resume {run.folder} --max-steps {2 * config.max_steps}, or --evaluate {run.folder} --film")
    return steps, returns


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
        cause = " ".join(re.sub("[│╮]", "", re.split("[─-]{9,}", box.getvalue())[1]).split())  # between rules, in a box
        cause = re.sub(r".*Config (Value error, )?| \[type=.*", "", cause)
        raise InputError(f"{cause.replace('Input should', 'must')}; --help lists the settings") from stop
    folder = config.resume or config.evaluate
    if not folder or default:
        return config
    saved = SETTINGS.validate_json((folder / "config.json").read_bytes())
    return parse(arguments, dataclasses.replace(saved, resume=config.resume, evaluate=config.evaluate, film=False))


def main() -> None:
    getattr(sys.stdout, "reconfigure", dict)(line_buffering=True)  # so that a log in a file can be followed
    try:
        config = parse(sys.argv[1:])
        if not config.evaluate:
            train(config)
            return
        checkpoint = load_checkpoint(config.evaluate)
        with EvaluationPool(config) as pool:
            pool.play(load_policy(checkpoint), checkpoint["step"], config.film and config.evaluate / "policy.gif")
    except (InputError, OSError, FloatingPointError, pydantic.ValidationError) as error:
        remedy = "; mend that, or name another place, then go on with --resume" if isinstance(error, OSError) else ""
        print(f"ciql_pybullet: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
