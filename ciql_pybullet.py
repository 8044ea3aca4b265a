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
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Conservative Implicit Q-Learning (CIQL), trained offline on the PyBullet D4RL data sets.

CIQL is Implicit Q-Learning plus a clamped conservative penalty. With Q̄ = min(Q1, Q2) of the
target critic:

    V   diff = Q̄(s,a) − V(s)             loss = |τ − 1(diff<0)| · diff²
    Q   y = r + γ V(s')                    loss = (Q(s,a) − y)² + α · ReLU(E_ā Q(s,ā) − E_a Q(s,a))
    π   adv = max(0, Q̄(s,a) − V(s))      loss = −exp(β · adv) · log π(a|s)

Q1 and Q2 have a loss each, and y does not bootstrap after a true termination. exp(β · adv) has a
cap, max_weight. ā are num_neg actions per state, drawn uniformly from the action box.

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
import dataclasses
import datetime
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
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

    # Data
    dataset: str = "halfcheetah-bullet-medium-v0"  # one of 12 ids, or an .hdf5 file (with env_id)
    env_id: str = ""  # the environment of an .hdf5 file; MODULE:ID imports MODULE to register it
    max_episode_steps: int = 0  # time limit that the data were recorded with; 0: the environment's
    seed: int = 0  # of networks, batches, off-data actions and evaluation episodes
    # CIQL and its networks
    gamma: float = 0.99  # discount
    tau: float = 0.8  # expectile of V; 0.5 is the mean, towards 1 the best action
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
    batch_parts: int = 2  # pieces of a batch for CPU threads (gcd with batch_size); sets rounding
    threads: int = 0  # CPU threads and evaluation workers, 0: one per core; no result depends on it
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # medium: bfloat16 products
    compile: bool = True  # compile the gradient step (about a minute once; needs a C++ compiler)
    name: str = ""  # of the run's folder; empty: data set, what is not the default, seed, time
    plot: str = "eval_returns.png"  # picture of the evaluation returns
    out_dir: str = "runs"  # every run makes a folder in here: settings, metrics, checkpoint
    wandb_project: str = ""  # also log to this Weights & Biases project (needs: pip install wandb)
    film: bool = False  # film an episode of the final or evaluated policy: policy.gif in its folder
    resume: str = ""  # go on from the checkpoint in this run folder, with its settings
    evaluate: str = ""  # train nothing: play the policy of this run folder for eval_episodes


RANGES = {  # intervals: a round bracket leaves its end out
    "max_episode_steps": ("[", 0, math.inf, ")"),
    "seed": ("[", 0, 2**32, ")"),
    "gamma": ("[", 0, 1, "]"),
    "tau": ("(", 0, 1, ")"),
    "beta": ("[", 0, math.inf, ")"),
    "alpha": ("[", 0, math.inf, ")"),
    "num_neg": ("[", 1, math.inf, ")"),
    "polyak": ("(", 0, 1, "]"),
    "max_weight": ("[", 1, math.inf, ")"),
    "min_log_std": ("[", -20, 0, "]"),
    "lr": ("(", 0, math.inf, ")"),
    "batch_size": ("[", 1, math.inf, ")"),
    "max_steps": ("[", 1, math.inf, ")"),
    "log_interval": ("[", 1, math.inf, ")"),
    "eval_interval": ("[", 1, math.inf, ")"),
    "eval_episodes": ("[", 1, math.inf, ")"),
    "batch_parts": ("[", 1, math.inf, ")"),
    "threads": ("[", 0, math.inf, ")"),
}
# Settings that change what is learned: they name a run, and a resumed run notes their changes.
LEARNING = (
    "max_episode_steps",
    "gamma",
    "tau",
    "beta",
    "alpha",
    "num_neg",
    "polyak",
    "clamp_advantage",
    "max_weight",
    "hidden_sizes",
    "min_log_std",
    "lr",
    "policy_lr_decay",
    "batch_size",
    "batch_parts",
    "matmul_precision",
    "seed",
)


class InputError(ValueError):
    """A bad setting, file or network; its message is one line that names cause and remedy."""


def check(config: Config) -> None:
    """Raise InputError for a setting of the wrong type or out of its range, and a bad ``plot``."""
    for setting in dataclasses.fields(Config):
        value = getattr(config, setting.name)
        kind = type(setting.default)
        is_number = type(value) is int and kind is float
        if type(value) is not kind and not is_number:
            raise InputError(f"{setting.name} is {value!r}, but must be of type {kind.__name__}")
    for name, (start, low, high, end) in RANGES.items():
        value = getattr(config, name)
        above = low < value if start == "(" else low <= value
        below = value < high if end == ")" else value <= high
        if not (above and below):
            raise InputError(f"{name} is {value}, but must be in {start}{low}, {high}{end}")
    sizes = config.hidden_sizes
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InputError(f"hidden_sizes is {sizes}, but must be one positive number per layer")
    if config.matmul_precision not in ("highest", "high", "medium"):
        raise InputError(
            f"matmul_precision is {config.matmul_precision!r}, not highest, high, medium"
        )
    if Path(config.plot).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"plot is {config.plot}, but must be a .png, .pdf or .svg file")
    if not config.evaluate:
        plot = Path(config.plot)
        try:
            with tempfile.NamedTemporaryFile(dir=plot.parent, prefix=f".{plot.name}"):
                pass
        except OSError as error:
            raise InputError(
                f"plot is {plot}, but {plot.parent} cannot be written to ({error.strerror}); make"
                " that folder, or set another plot"
            ) from error
    if Path(config.name).name != config.name or config.name == "..":
        raise InputError(
            f"name is {config.name}, but must be one folder's name; --out-dir says where"
        )


def differences(config: Config, other: Config) -> dict[str, Any]:
    """The learning settings of ``config`` that are not those of ``other``."""
    return {
        name: getattr(config, name)
        for name in LEARNING
        if getattr(config, name) != getattr(other, name)
    }


def varied_words(config: Config) -> list[str]:
    """What is not the default, and the seed, as words: alpha0, no-clamp_advantage, seed3."""
    words = []
    for name, value in (differences(config, Config()) | {"seed": config.seed}).items():
        if isinstance(value, bool):
            words.append(name if value else f"no-{name}")
        elif isinstance(value, tuple):
            words.append(name + "x".join(map(str, value)))
        elif isinstance(value, float):
            words.append(f"{name}{value:g}")
        else:
            words.append(f"{name}{value}")
    return words


# ------------------------------------------------------------------------------------------- output
say = tqdm.write  # a line of the log on stdout, above a progress bar if there is one


def printable(text: str) -> str:
    """``text`` as it can be printed and stored: a file's name need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside ``path``, then rename: ``path`` is at any time the old or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
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
        return self(x).cpu().numpy()


def by_size(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module. Large ones first: in a vector they stay aligned."""
    return sorted(module.parameters(), key=Tensor.numel, reverse=True)


def as_vector(module: nn.Module) -> nn.Parameter:
    """All parameters of a module, ``by_size``, in one vector (P,), of which they become views.

    To Adam and Polyak averaging one vector is less work than a dozen small tensors. A module that
    is moved, converted or deep-copied afterwards has parameters of its own again.
    """
    parameters = by_size(module)
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector, parameters)
    return nn.Parameter(vector, requires_grad=parameters[0].requires_grad)


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
    """E_ā Q(s,ā) − E_a Q(s,a): (B · num_neg,), (B,) -> (), of one critic. CQL, equation 2."""
    return q_neg.mean() - q_data.mean()


def conservative_penalty(gap: Tensor, clamp_open: Tensor | None = None) -> Tensor:
    """ReLU(E_ā Q(s,ā) − E_a Q(s,a)) of the ``conservative_gap`` of one critic: () -> ().

    The clamp is of the mean gap of the whole batch. A part of a batch does not know that mean, so
    it is given ``clamp_open``, 1 where the mean is above zero, else 0: clamp_open · gap has the
    value and the gradient of its share.
    """
    if clamp_open is None:
        return torch.relu(gap)
    return clamp_open * gap


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
    """N transitions, float32; those that a caller gives to ``train`` are on the CPU."""

    observations: Tensor  # (N, observation_dim)
    actions: Tensor  # (N, action_dim), in [-1, 1]
    rewards: Tensor  # (N,)
    next_observations: Tensor  # (N, observation_dim)
    terminations: Tensor  # (N,), 1 where the episode truly ended, 0 where it went on or was cut


Metrics = dict[str, Tensor]  # what a step reports by name, each ()


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises InputError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device is {name}, but must be auto, cpu or cuda")
        return torch.zeros((), device=device).device  # it is tried, and "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as error:  # torch raises either, with pages of text
        raise InputError(f"device is {name}, which is not here; use auto, cpu or cuda") from error


def wants_onednn() -> bool:
    """Is torch's usual library for float32 products, MKL, slow here? It keeps to AVX2 on AMD."""
    cpu = Path("/proc/cpuinfo")
    return (
        cpu.exists()
        and "AuthenticAMD" in cpu.read_text()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    )


@contextlib.contextmanager
def compiler_settings(on_cpu: bool) -> Iterator[None]:
    """Context in which torch compiles the step as is fastest here."""
    import torch._inductor.config
    from torch._inductor import lowering

    mm = torch.ops.aten.mm.default
    addmm = torch.ops.aten.addmm.default
    usual: dict[Any, Any] = {operator: lowering.lowerings[operator] for operator in (mm, addmm)}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: lowering.lowerings.update(usual))
        # the backward pass in the same graph as the forward one
        stack.enter_context(torch._dynamo.config.patch(trace_autograd_ops=True))
        # no Python between the kernels
        stack.enter_context(torch._inductor.config.patch(cpp_wrapper=on_cpu))
        if on_cpu and wants_onednn():
            # The compiler's cache on disk does not know of the rule below, but of this tag.
            tag = torch.compiler.config.patch(cache_key_tag="oneDNN")  # type: ignore[attr-defined]
            stack.enter_context(tag)
            kernel = torch.ops.mkldnn._linear_pointwise.default
            onednn = lowering.fallback_handler(kernel, add_to_fallback_set=False)

            def product(x: Any, w: Any) -> Any:
                # To call oneDNN for a small product costs more than it saves.
                if min(*x.get_size(), *w.get_size()) < 64:
                    return usual[mm](x, w)
                return onednn(x, lowering.permute(w, [1, 0]), None, "none", [], "")

            lowering.lowerings[mm] = product
            lowering.lowerings[addmm] = lambda b, x, w: lowering.add(product(x, w), b)
            # The pattern matcher would make some of the products MKL's again.
            stack.enter_context(torch._inductor.config.patch(pattern_matcher=False))
        yield


class CIQL:
    """Conservative Implicit Q-Learning: the networks, their one optimiser, and the gradient step.

    An idea that is no setting is a subclass, given to ``train`` as ``make_agent``. After replacing
    a network it calls ``make_optimizer`` again. One more network is made before
    ``super().__init__``, and joins ``parameters``, ``vectors`` and Adam's groups, last in each, in
    a ``make_optimizer`` of its own. What a resumed run needs is in modules and optimisers.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Config) -> None:
        self.config = config
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.device = find_device(config.device)
        self.on_cpu = self.device.type == "cpu"
        sizes = config.hidden_sizes
        self.policy = make_policy(observation_dim, action_dim, config).to(self.device)
        self.value = ValueNetwork(observation_dim, sizes).to(self.device)
        self.critic = DoubleQNetwork(observation_dim, action_dim, sizes).to(self.device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.make_optimizer()
        self.steps = 0  # gradient steps taken
        # A batch is worked in equal parts. Their number does not depend on that of the threads, so
        # the bits do not either.
        self.parts = math.gcd(config.batch_size, config.batch_parts) if self.on_cpu else 1
        self.map: Callable[..., Any] = map  # one after another; ``train`` puts a thread pool's here

    def make_optimizer(self) -> None:
        """Adam over a vector per network, of which the parameters are views from now on.

        Its first group is the policy alone, whose rate ``policy_lr_decay`` lowers.
        """
        self.parameters = [*by_size(self.policy), *by_size(self.value), *by_size(self.critic)]
        self.policy_vector = as_vector(self.policy)
        self.value_vector = as_vector(self.value)
        self.critic_vector = as_vector(self.critic)
        self.target_vector = as_vector(self.target_critic)
        self.vectors = [self.policy_vector, self.value_vector, self.critic_vector]
        groups = [{"params": [vector]} for vector in self.vectors]
        self.optimizer = torch.optim.Adam(groups, lr=self.config.lr, fused=True)

    def losses(
        self,
        batch: Transitions,
        negative_actions: Tensor,
        with_penalty: bool,
        clamp_open: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The sum of the three losses (), and figures () for the log: what an idea edits.

        - ``batch``: one of the equal parts of a step's batch, observations normalised
        - ``negative_actions``: (B, num_neg, action_dim)
        - ``with_penalty``: False where the clamp is known to be closed, or not known yet
        - ``clamp_open``: (2,), one per critic, 1 or 0; None where the part is the whole batch

        The step takes the mean of its parts, so each loss and figure must be a mean over
        transitions. What is not, as the clamp, belongs in ``update``, which needs the figures gap1
        and gap2. Parts run in threads: draw no random numbers here, and change no buffers.

        No loss reaches another's network: Q̄ and y are targets, made without gradient, and the
        advantage is detached. So one backward pass of the sum serves all three.
        """
        c = self.config
        s = batch.observations
        a = batch.actions
        with torch.no_grad():
            q_bar = torch.minimum(*self.target_critic(s, a))
            v_next = self.value(batch.next_observations)
            y = batch.rewards + c.gamma * (1 - batch.terminations) * v_next

        # V: the expectile of Q̄ over the data's actions
        v = self.value(s)
        value_loss = expectile_loss(q_bar - v, c.tau)

        # Q: one step of bootstrap from V, and the penalty on actions off the data
        q1, q2 = self.critic(s, a)
        td_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        penalty = torch.zeros_like(td_loss)
        gap1 = gap2 = torch.zeros_like(td_loss)
        if c.alpha > 0:
            with torch.set_grad_enabled(with_penalty):
                s_neg = s.repeat_interleave(c.num_neg, 0)
                neg1, neg2 = self.critic(s_neg, negative_actions.flatten(0, 1))
                gap1 = conservative_gap(neg1, q1)
                gap2 = conservative_gap(neg2, q2)
            if with_penalty:
                open1, open2 = (None, None) if clamp_open is None else clamp_open
                penalty = conservative_penalty(gap1, open1) + conservative_penalty(gap2, open2)
        q_loss = td_loss + c.alpha * penalty

        # π: cloning of the data's actions, weighted by their advantage
        advantage = (q_bar - v).detach()
        weights = awr_weights(advantage, c.beta, c.max_weight, c.clamp_advantage)
        policy_loss = -(weights * self.policy.log_prob(s, a)).mean()

        metrics = {
            "value_loss": value_loss,
            "q_loss": q_loss,
            "policy_loss": policy_loss,
            "penalty": penalty,
            "gap1": gap1,
            "gap2": gap2,
            "q": (q1.mean() + q2.mean()) / 2,
            "v": v.mean(),
            "advantage": advantage.mean(),
            "policy_std": self.policy.std().mean(),
        }
        loss = value_loss + q_loss + policy_loss
        return loss, {name: figure.detach() for name, figure in metrics.items()}

    def gradients(
        self,
        batch: Transitions,
        negative_actions: Tensor,
        with_penalty: bool,
        clamp_open: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The gradient of ``losses``, one vector (P,) for the ``vectors`` together, and figures.

        On CUDA the result is valid until the next call, which overwrites it.
        """
        loss, metrics = self.losses(batch, negative_actions, with_penalty, clamp_open)
        gradients = torch.autograd.grad(loss, self.parameters)
        return torch.cat([gradient.flatten() for gradient in gradients]), metrics

    def mean_of_parts(
        self,
        data: Transitions,
        index: Tensor,
        negative_actions: Tensor,
        with_penalty: bool,
        clamp_open: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """``gradients`` of the rows ``index`` of ``data``: the mean of those of the parts."""

        def work(rows: Tensor, actions: Tensor) -> tuple[Tensor, Metrics]:
            batch = Transitions(*(column[rows] for column in data))
            return self.gradients(batch, actions, with_penalty, clamp_open)

        parts = list(self.map(work, index.chunk(self.parts), negative_actions.chunk(self.parts)))
        gradient, metrics = parts[0]
        for other, _ in parts[1:]:  # in order, whichever thread was first
            gradient += other
        gradient /= self.parts
        figures = torch.stack([torch.stack([part[name] for name in metrics]) for _, part in parts])
        return gradient, dict(zip(metrics, figures.mean(0).unbind(), strict=True))

    def update(self, data: Transitions) -> Metrics:
        """One gradient step on a batch drawn from ``data``, which ``prepare`` made."""
        c = self.config
        index = torch.randint(len(data.rewards), (c.batch_size,), device=self.device)
        num_neg = c.num_neg if c.alpha > 0 else 0
        size = (c.batch_size, num_neg, self.action_dim)
        negative_actions = torch.rand(size, device=self.device) * 2 - 1

        # On the CPU a first pass only measures the gaps. Nearly always both are below zero: penalty
        # and its gradient are 0, and half of the work is saved. Otherwise a second pass includes
        # the penalty. On CUDA the host would have to wait to know, so it is always included.
        sampled = (data, index, negative_actions)
        gradient, metrics = self.mean_of_parts(*sampled, with_penalty=not self.on_cpu)
        gaps = torch.stack([metrics["gap1"], metrics["gap2"]])
        if self.on_cpu and gaps.max() > 0:
            clamp_open = (gaps > 0).float()
            gradient, metrics = self.mean_of_parts(*sampled, True, clamp_open)
        metrics["clamp_open"] = (gaps.max() > 0).float()  # that of either critic

        if c.policy_lr_decay:
            remaining = (1 + math.cos(math.pi * self.steps / c.max_steps)) / 2
            self.optimizer.param_groups[0]["lr"] = c.lr * remaining  # the policy's
        sizes = [vector.numel() for vector in self.vectors]
        for vector, piece in zip(self.vectors, gradient.split(sizes), strict=True):
            vector.grad = piece
        self.optimizer.step()
        with torch.no_grad():
            self.policy.project(c.min_log_std)
            self.target_vector.lerp_(self.critic_vector, c.polyak)
        self.steps += 1
        return metrics

    def evaluated_policy(self) -> nn.Module:
        """The policy that evaluations play and ``load_policy`` loads."""
        return self.policy

    def prepare(self, data: Transitions) -> Transitions:
        """Normalise the observations, tell the policy how, and move the data to the device.

        Raises TypeError for a network that no vector holds, which would silently not be trained.
        """
        pairs = [
            (self.policy, self.policy_vector),
            (self.value, self.value_vector),
            (self.critic, self.critic_vector),
            (self.target_critic, self.target_vector),
        ]
        for network, vector in pairs:
            if by_size(network)[0].data_ptr() != vector.data_ptr():
                raise TypeError(f"call make_optimizer again: no vector holds {network}")
        std, mean = torch.std_mean(data.observations, 0)
        std += 1e-3
        self.policy.observation_mean.copy_(mean)
        self.policy.observation_std.copy_(std)
        normalised = data._replace(
            observations=(data.observations - mean) / std,
            next_observations=(data.next_observations - mean) / std,
        )
        return Transitions(*(column.to(self.device) for column in normalised))

    def compile(self, data: Transitions) -> None:
        """Have ``gradients`` compiled for batches of ``data``, or say why it stays as it is.

        What is private to torch's compiler is in here and in ``compiler_settings``, inside the
        ``try``, so that another release of torch costs speed and not the run.
        """
        c = self.config
        rows = [0] * (c.batch_size // self.parts)  # any rows: the shapes count
        batch = Transitions(*(column[rows] for column in data))
        num_neg = c.num_neg if c.alpha > 0 else 0
        actions = batch.actions.new_zeros(len(rows), num_neg, self.action_dim)
        clamp_open = batch.rewards.new_ones(2)
        eager = self.gradients

        # Two functions, as the compiler's look-up among the graphs of one is not thread-safe.
        def closed(batch: Transitions, actions: Tensor) -> tuple[Tensor, Metrics]:
            return eager(batch, actions, False)

        def opened(
            batch: Transitions, actions: Tensor, clamp_open: Tensor | None
        ) -> tuple[Tensor, Metrics]:
            return eager(batch, actions, True, clamp_open)

        try:
            torch.compiler.reset()  # an earlier run's graphs count towards the compiler's limit
            # On CUDA the kernels are started together: each takes longer to start than to run.
            mode = None if self.on_cpu else "reduce-overhead"
            compiled_closed = torch.compile(closed, fullgraph=True, mode=mode)
            compiled_opened = torch.compile(opened, fullgraph=True, mode=mode)

            def compiled(
                batch: Transitions,
                actions: Tensor,
                with_penalty: bool,
                clamp_open: Tensor | None = None,
            ) -> tuple[Tensor, Metrics]:
                if not self.on_cpu:  # what the last call returned is overwritten now: it was used
                    torch.compiler.cudagraph_mark_step_begin()
                if with_penalty:
                    return compiled_opened(batch, actions, clamp_open)
                return compiled_closed(batch, actions)

            with compiler_settings(self.on_cpu):
                if self.on_cpu:
                    compiled(batch, actions, False)
                    if c.alpha > 0:
                        compiled(batch, actions, True, clamp_open)
                else:
                    for _ in range(3):  # CUDA: to compile, to record, and to start what is recorded
                        compiled(batch, actions, True)
        except Exception as error:  # noqa: BLE001  (one of our own recurs in the eager step)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"NOTE   the step could not be compiled and runs eagerly, slower: {reason}")
            return

        self.gradients = compiled  # type: ignore[method-assign, assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CIQL":
        """Raises TypeError: the parameters of a deep copy would be no views of its vectors."""
        raise TypeError("make another agent, and load a deep copy of this one's state_dict")

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and the state of every attribute that is a module or optimiser.

        With the random state, that is all that the next step depends on.
        """
        state: dict[str, Any] = {"steps": self.steps}
        for name, part in vars(self).items():
            if isinstance(part, (nn.Module, torch.optim.Optimizer)):
                state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, RuntimeError or ValueError for a state that is not of such an agent."""
        if state.keys() != self.state_dict().keys():
            raise KeyError(f"{list(state)} is not {list(self.state_dict())}")
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name, saved in state.items():
            if name == "steps":
                self.steps = saved
            else:
                getattr(self, name).load_state_dict(saved)
        # The saved state holds the rates as well, but ``config`` may have other ones now.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


# --------------------------------------------------------------------------------------------- data
class Environment(NamedTuple):
    """What training must know of an environment, and the returns that make its score."""

    observation_dim: int
    action_dim: int
    max_episode_steps: int = 1000
    action_low: tuple[float, ...] | float = -1.0
    action_high: tuple[float, ...] | float = 1.0
    random_return: float | None = None  # of score 0; None: no score
    expert_return: float | None = None  # of score 100
    never_ends: bool = False  # no episode ends but by the time limit

    def score(self, episode_return: Any) -> Any:
        """D4RL's normalised score, 100 · (return − random) / (expert − random)."""
        assert self.random_return is not None and self.expert_return is not None
        return (
            100 * (episode_return - self.random_return) / (self.expert_return - self.random_return)
        )


# Random: published means, but for Ant, whose dynamics have changed: measured. Expert: the agents of
# stable-baselines3, d4rl-pybullet issue 2.
ROBOTS = {
    "HalfCheetahBulletEnv-v0": Environment(
        26, 6, random_return=-1304.0, expert_return=3000.0, never_ends=True
    ),
    "HopperBulletEnv-v0": Environment(15, 3, random_return=18.6, expert_return=2500.0),
    "Walker2DBulletEnv-v0": Environment(22, 6, random_return=15.0, expert_return=2500.0),
    "AntBulletEnv-v0": Environment(28, 8, random_return=432.0, expert_return=3300.0),
}
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
SAMPLES = Path(__file__).resolve().parent / "data"  # re-collected, they stand in without a network


def read_columns(path: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """The columns of an HDF5 file, float32, and how it was re-collected (or "").

    Raises InputError if one is missing, or their shapes do not fit together.
    """
    columns = {}
    try:
        with h5py.File(path) as file:
            for key in ("observations", "actions", "rewards", "terminals"):
                columns[key] = np.asarray(file[key][()], np.float32)
            for key in ("timeouts", "next_observations"):
                if key in file:
                    columns[key] = np.asarray(file[key][()], np.float32)
            source = str(file.attrs.get("source", ""))
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        cause: object = error
        if isinstance(error, OSError) and error.errno:
            cause = os.strerror(error.errno)  # without h5py's own story
        remedy = "is it a whole HDF5 file with observations, actions, rewards and terminals?"
        if isinstance(error, FileNotFoundError):
            remedy = "set dataset to its path"
        raise InputError(f"{path}: cannot be read ({cause}); {remedy}") from error
    for key in ("rewards", "terminals", "timeouts"):
        if key in columns and columns[key].shape[1:] == (1,):  # stored as (N, 1) or (N,)
            columns[key] = columns[key][:, 0]

    observations = columns["observations"]
    expected = {
        "observations": 2,
        "actions": 2,
        "rewards": 1,
        "terminals": 1,
        "timeouts": 1,
        "next_observations": 2,
    }
    fits = columns.get("next_observations", observations).shape == observations.shape
    for key, column in columns.items():
        fits = fits and column.ndim == expected[key] and len(column) == len(observations)
    if not fits:
        shapes = ", ".join(f"{key} {column.shape}" for key, column in columns.items())
        raise InputError(f"{path}: the shapes of {shapes} do not fit together")
    for key in ("terminals", "timeouts"):
        if key in columns and not np.isin(columns[key], (0, 1)).all():
            raise InputError(f"{path}: '{key}' holds values other than 0 and 1; mark ends with 1")
    return columns, source


Episodes = tuple[Transitions, np.ndarray, np.ndarray]  # transitions, returns, ended_after


def read_d4rl(path: str | Path, columns: dict[str, np.ndarray], max_episode_steps: int) -> Episodes:
    """The transitions in the columns of a file in D4RL's layout (Fu et al., 2020).

    Row i holds (observation_i, action_i, reward_i, terminal_i, timeout_i) of ONE step. Terminal
    marks true terminations alone, timeout the last step of an episode that was cut. Without
    ``next_observations`` the successor is the next row's observation. A step that was cut then has
    none, nor has the last row of the file: these start no transition. A true termination needs
    none; its own observation fills the place.

    Raises InputError, with ``path``, if nothing marks the cuts that ``max_episode_steps`` made.
    """
    terminated = columns["terminals"] == 1
    end = np.flatnonzero(terminated | (columns["timeouts"] == 1))
    total = np.cumsum(columns["rewards"], dtype=np.float64)[end]
    with np.errstate(invalid="ignore"):  # infinite rewards are refused later
        returns = np.diff(total, prepend=0.0)
    steps = np.diff(end, prepend=-1)
    tail = len(terminated) - steps.sum()  # of an episode that the file cuts
    longest = max(steps.max(initial=0), tail)
    if longest > max_episode_steps and not columns["timeouts"].any():
        raise InputError(
            f"{path}: 'timeouts' is never set, but an episode has {longest:,} steps and the time"
            f" limit is {max_episode_steps:,}; mark cuts in 'timeouts', or set max_episode_steps"
        )

    observations = columns["observations"]
    if "next_observations" in columns:
        successor = columns["next_observations"]
        start = np.arange(len(observations))
    else:
        successor = np.concatenate([observations[1:], observations[-1:]])
        successor[terminated] = observations[terminated]
        has_successor = columns["timeouts"] == 0
        has_successor[-1:] = False
        start = np.flatnonzero(has_successor | terminated)
    transitions = Transitions(
        observations=torch.from_numpy(observations[start]),
        actions=torch.from_numpy(columns["actions"][start]),
        rewards=torch.from_numpy(columns["rewards"][start]),
        next_observations=torch.from_numpy(successor[start]),
        terminations=torch.from_numpy(terminated[start].astype(np.float32)),
    )
    return transitions, returns, steps[terminated[end]]


def read_d4rl_pybullet(
    path: str | Path, columns: dict[str, np.ndarray], max_episode_steps: int
) -> Episodes:
    """The transitions in the columns of a file in d4rl-pybullet's layout.

    Row i holds (observation_i, action_i, r, d) where r and d arrived WITH observation_i, from the
    step before. So the transition that starts in row i takes its reward and its end from row i + 1.
    An episode of T steps closes with an extra row (last observation, zero action, terminal 1): it
    has T + 1 rows, of which the last starts no transition. Nor does the last row of a file cut in
    mid-episode. Terminal is 1 at the time limit as well: an episode of ``max_episode_steps`` steps
    was cut, not ended, and its last transition is no termination.

    Raises InputError, with ``path``, for columns that cannot be of this layout.
    """
    is_end = columns["terminals"] == 1
    end = np.flatnonzero(is_end)
    first = np.concatenate([[0], end + 1])  # the last one is of an episode that the file cuts
    steps = np.append(end, len(is_end) - 1) - first
    moving_ends = np.count_nonzero(columns["actions"][end].any(1))
    rewarded_starts = np.count_nonzero(columns["rewards"][first[first < len(is_end)]])
    if moving_ends or rewarded_starts:
        raise InputError(
            f"{path}: is of no known layout. In d4rl-pybullet's an episode ends with a row of zero"
            f" actions (here {moving_ends} of {len(end)} do not) and begins with reward 0 (here"
            f" {rewarded_starts} do not); D4RL's has 'timeouts': add them, and keep 'terminals' for"
            " true terminations"
        )
    if steps.max() > max_episode_steps:
        raise InputError(
            f"{path}: has an episode of {steps.max():,} steps, but the time limit is"
            f" {max_episode_steps:,}; set max_episode_steps to that of the recording"
        )
    first = first[:-1]  # of the whole episodes
    steps = steps[:-1]
    was_cut = steps == max_episode_steps
    terminated = np.zeros(len(is_end), np.float32)
    terminated[end[~was_cut]] = 1
    # The reward in an episode's first row belongs to no step of it.
    total = np.cumsum(columns["rewards"], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinite rewards are refused later
        returns = total[end] - total[first]

    start = np.flatnonzero(~is_end[:-1])
    transitions = Transitions(
        observations=torch.from_numpy(columns["observations"][start]),
        actions=torch.from_numpy(columns["actions"][start]),
        rewards=torch.from_numpy(columns["rewards"][start + 1]),
        next_observations=torch.from_numpy(columns["observations"][start + 1]),
        terminations=torch.from_numpy(terminated[start + 1]),
    )
    return transitions, returns, steps[~was_cut]


class Dataset(NamedTuple):
    """A file of logged episodes, as it was read."""

    transitions: Transitions
    returns: np.ndarray  # (E,), undiscounted, of the whole episodes
    ended_after: np.ndarray  # steps (T,) of the episodes that truly ended
    rows: int
    layout: str
    source: str  # how it was re-collected, or ""


def read_dataset(path: str | Path, max_episode_steps: int = 1000) -> Dataset:
    """Read an HDF5 file of logged episodes, in D4RL's layout or in that of d4rl-pybullet.

    ``max_episode_steps`` is the time limit of the recording. Raises InputError if the file cannot
    be read, or is in neither layout.
    """
    columns, source = read_columns(path)
    if "timeouts" in columns:
        transitions, returns, ended_after = read_d4rl(path, columns, max_episode_steps)
        layout = "D4RL's layout"
    else:
        transitions, returns, ended_after = read_d4rl_pybullet(path, columns, max_episode_steps)
        layout = "d4rl-pybullet's layout"
    rows = len(columns["rewards"])
    if len(transitions.rewards) < 2:
        held = len(transitions.rewards)
        raise InputError(
            f"{path}: {rows} rows hold {held} complete transitions; at least 2 are needed"
        )
    return Dataset(transitions, returns, ended_after, rows, layout, source)


def read_transitions(path: str | Path, max_episode_steps: int = 1000) -> Transitions:
    """The transitions of a file in either layout. Raises as ``read_dataset``."""
    return read_dataset(path, max_episode_steps).transitions


def fitting_robot(path: Path) -> str:
    """A hint for messages: the robot that the shapes of a file fit, if it is exactly one."""
    try:
        columns, _ = read_columns(path)
    except InputError:
        return ""
    shapes = (columns["observations"].shape[1], columns["actions"].shape[1])
    fitting = [env_id for env_id, robot in ROBOTS.items() if robot[:2] == shapes]
    return f" (its shapes fit {fitting[0]})" if len(fitting) == 1 else ""


def check_transitions(data: Transitions, environment: Environment, name: str) -> Transitions:
    """``data`` with actions in [-1, 1]. Raises InputError, with ``name``, if they do not fit."""
    n = len(data.rewards)
    expected = {
        "observations": (n, environment.observation_dim),
        "actions": (n, environment.action_dim),
        "rewards": (n,),
        "next_observations": (n, environment.observation_dim),
        "terminations": (n,),
    }
    for key, shape in expected.items():
        column = getattr(data, key)
        if tuple(column.shape) != shape:
            raise InputError(
                f"{name}: {key} has shape {tuple(column.shape)}, but {shape} fits the environment;"
                f" set env_id to that of the recording{fitting_robot(Path(name))}"
            )
        if column.dtype != torch.float32:
            raise InputError(f"{name}: {key} is {column.dtype}, but must be torch.float32")
        if not np.isfinite(column.numpy()).all():
            raise InputError(f"{name}: {key} holds NaN or infinite values; remove those episodes")
    if n < 2:
        raise InputError(f"{name}: holds {n} transitions, but training needs two at least")
    if not np.isin(data.terminations.numpy(), (0, 1)).all():
        raise InputError(f"{name}: terminations holds values other than 0 and 1")

    low = torch.tensor(environment.action_low, dtype=torch.float32)
    high = torch.tensor(environment.action_high, dtype=torch.float32)
    tolerance = 1e-5 * (high - low) / 2
    outside = (data.actions < low - tolerance) | (data.actions > high + tolerance)
    if outside.any():
        extreme = data.actions.abs().max().item()
        raise InputError(
            f"{name}: actions reach outside the action box (up to {extreme:.4g}); rescale them"
        )
    if (low == -1).all() and (high == 1).all():
        return data
    return data._replace(actions=(data.actions - low) / (high - low) * 2 - 1)


def download(url: str, path: Path, environment: Environment) -> None:
    """Fetch a data set; ``path`` is there only once it is whole and fits the environment.

    Raises OSError or InputError.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(timeout=NETWORK_TIMEOUT, progressbar=sys.stderr.isatty())
    part = f".{path.name}.{os.getpid()}.{threading.get_ident()}"
    resolver = os.environ.get("RES_OPTIONS")
    os.environ["RES_OPTIONS"] = "timeout:4 attempts:1"  # looking up a host has no other time-out
    try:
        fetched = pooch.retrieve(url, None, part, path.parent, downloader=downloader)
        check_transitions(read_transitions(fetched), environment, path.name)
        os.replace(fetched, path)
    finally:
        if resolver is None:
            del os.environ["RES_OPTIONS"]
        else:
            os.environ["RES_OPTIONS"] = resolver
        path.with_name(part).unlink(missing_ok=True)


def find_dataset(dataset: str) -> Path:
    """The file of ``dataset``: a path as it is; an id from cache, network or embedded samples.

    Raises InputError if an id has no file.
    """
    if dataset not in DATASETS:
        return Path(dataset)
    try:
        folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    except RuntimeError as error:
        raise InputError(f"{dataset} has no folder ({error}); set D4RL_DATASET_DIR") from error
    cached = folder / f"{dataset}.hdf5"
    if os.path.exists(cached):  # Path.exists raises for a folder that may not be looked into
        return cached
    env_id, key = DATASETS[dataset]
    url = DOWNLOAD_URL.format(key=key, dataset=dataset)
    try:
        download(url, cached, ROBOTS[env_id])
        return cached
    except (OSError, InputError) as error:
        cause = str(error).split("Caused by ")[-1]  # what stands before it repeats the address
        sample = SAMPLES / dataset.replace("-v0", "-sample.hdf5")
        if sample.exists():
            say(f"NOTE   cannot download {dataset}: {cause}")
            return sample
        raise InputError(
            f"cannot download {dataset}: {cause}; download {url} to {cached},"
            f" or re-collect it: python data/make_bullet_dataset.py --id {dataset}"
        ) from error


def note_ends(dataset: Dataset, environment: Environment, limit: int) -> None:
    """Print a NOTE where time limits may have been read as terminations."""
    if not len(dataset.ended_after):
        return
    lengths, counts = np.unique(dataset.ended_after, return_counts=True)
    commonest = lengths[counts.argmax()]
    cause = ""
    if environment.never_ends:
        cause = f"{len(dataset.ended_after):,} terminations of a robot that never falls"
    elif counts.max() > max(1, len(dataset.returns) / 2):
        cause = f"{counts.max():,} terminations after just {commonest} steps, the limit is {limit}"
    if cause:
        remedy = f"if episodes were cut, set max_episode_steps (to {commonest}?)"
        if "D4RL" in dataset.layout:
            remedy = "if episodes were cut, mark that in 'timeouts' and not in 'terminals'"
        say(f"NOTE   {cause}: {remedy}")


def load_dataset(config: Config, environment: Environment) -> Dataset:
    """Find, read, check and print the data set. Raises InputError."""
    path = find_dataset(config.dataset)
    limit = config.max_episode_steps or environment.max_episode_steps
    dataset = read_dataset(path, limit)
    data = check_transitions(dataset.transitions, environment, str(path))
    dataset = dataset._replace(transitions=data)
    returns = dataset.returns
    figures = "none of them whole"
    if len(returns):
        figures = f"mean return {returns.mean():.1f} ± {returns.std():.1f}"
    say(f"data   {path}: {dataset.rows:,} rows, {len(returns):,} episodes, {figures}")
    terminations = int(data.terminations.sum())
    say(
        f"       {len(data.rewards):,} transitions, {terminations:,} of them terminations,"
        f" in {dataset.layout}"
    )
    if config.dataset in DATASETS and dataset.source:
        say(f"NOTE   this is not the published {config.dataset}, but {dataset.source}")
    note_ends(dataset, environment, limit)
    return dataset


def environment_id(config: Config) -> str:
    """The environment of the data set. Raises InputError if it cannot be told."""
    if config.env_id:
        return config.env_id
    if config.dataset in DATASETS:
        return DATASETS[config.dataset][0]
    path = Path(config.dataset)
    if path.suffix in (".hdf5", ".h5") or os.path.exists(path):
        raise InputError(f"{path}: which environment? Set env_id{fitting_robot(path)}")
    raise InputError(
        f"dataset is {path}, but must be an .hdf5 file, with env_id, or of {', '.join(DATASETS)}"
    )


# --------------------------------------------------------------------------------------- evaluation
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def make_environment(env_id: str, **options: Any) -> Any:
    """The environment. To be called in a worker alone, as importing the simulator prints."""
    import gymnasium
    import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)

    return gymnasium.make(env_id, **options)


def describe_environment(env_id: str, film: bool = False) -> Environment:
    """What the environment says of itself. Raises InputError if CIQL cannot act in it.

    With ``film`` it must also be one that can be made to render.
    """
    import gymnasium

    try:
        env = make_environment(env_id, **({"render_mode": "rgb_array"} if film else {}))
    except Exception as error:  # noqa: BLE001  (the environment's own code may raise anything)
        reason = " ".join(str(error).split())
        raise InputError(
            f"env_id is {env_id}, which gymnasium cannot make ({reason});"
            " MODULE:ID imports the module that registers it"
        ) from None
    observations = env.observation_space
    actions = env.action_space
    for space in (observations, actions):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"env_id is {env_id}, but {space} is no box of one dimension")
    if not (np.isfinite(actions.low) & np.isfinite(actions.high)).all():
        raise InputError(f"env_id is {env_id}, but its action box has no bounds: {actions}")
    if env.spec.max_episode_steps is None:
        raise InputError(f"env_id is {env_id}, which has no time limit; register it with one")
    return Environment(
        observation_dim=observations.shape[0],
        action_dim=actions.shape[0],
        max_episode_steps=env.spec.max_episode_steps,
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
    )


def play_episode(policy: str, env_id: str, seed: int, film: str = "") -> float:
    """Undiscounted return of an episode: a pure function of seed and (pickled, in a file) policy.

    ``film`` is the path of a GIF of its first ten seconds.
    """
    import gymnasium
    from PIL import Image

    actor = pickle.loads(Path(policy).read_bytes())
    env = make_environment(env_id, **({"render_mode": "rgb_array"} if film else {}))
    box = env.action_space
    if not ((box.low == -1) & (box.high == 1)).all():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    # The reward of the first episode after creation is off by a constant: it is thrown away.
    env.reset(seed=seed)
    observation, _ = env.reset(seed=seed)
    total = 0.0
    images = []
    for t in itertools.count():
        if film and t < 600 and t % 3 == 0:  # 20 frames of the simulator's 60 steps per second
            frame = Image.fromarray(env.render())
            images.append(frame.quantize(64, dither=Image.Dither.NONE))
        observation, reward, terminated, truncated, _ = env.step(actor.act(observation))
        total += float(reward)
        if terminated or truncated:
            break
    env.close()
    if film:
        gif = io.BytesIO()
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=50, loop=0)
        write_whole(Path(film), gif.getvalue())
    return total


def start_worker() -> None:
    """Prepare a worker: silent, one thread, out of the signals' way, and gone with its parent."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the simulator prints from C; errors travel to the parent
        os.dup2(silence, stream)
    torch.set_num_threads(1)
    # In a session of its own a worker gets no signal to the run's process group. Those that waited
    # are dropped, except SIGTERM, with which the pool ends workers.
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


class EvaluationPool:
    """Worker processes that play episodes. The simulator, and what it prints, is in them alone."""

    def __init__(self, env_id: str, workers: int, film: bool = False) -> None:
        self.env_id = env_id
        self.size = workers
        self.film = film
        try:
            self.start()
        except OSError as error:
            raise InputError(
                f"worker processes cannot be started ({error}); they need a writable /dev/shm"
            ) from error

    def start(self) -> None:
        """Start the workers, without waiting for them. Raises OSError."""
        others = multiprocessing.active_children()
        context = multiprocessing.get_context("spawn")
        # Workers inherit the mask: signals wait until a worker has reached ``start_worker``.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.executor = concurrent.futures.ProcessPoolExecutor(
                self.size, context, initializer=start_worker
            )
            # multiprocessing's resource tracker, which it starts, unblocks SIGINT and SIGTERM.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            descriptions = [  # one per worker: the executor starts a process per task
                self.executor.submit(describe_environment, self.env_id, self.film)
                for _ in range(self.size)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.description = descriptions[0]
        self.workers = [child for child in multiprocessing.active_children() if child not in others]

    def environment(self) -> Environment:
        """What the environment says of itself, once a worker is up. Raises InputError."""
        try:
            return self.description.result()
        except BrokenProcessPool:
            raise InputError(
                "the worker processes ended at once: out of memory, or a program calls train"
                ' without if __name__ == "__main__":'
            ) from None

    def play(
        self, policy: nn.Module, seeds: Sequence[int], stop: Sequence[int] = (), film: str = ""
    ) -> np.ndarray | None:
        """Returns (len(seeds),) of episodes that ``policy`` plays; None once there is a ``stop``.

        ``stop`` is the list that ``stop_signals`` adds to meanwhile. The first episode is filmed as
        well, if ``film`` is a path. Where a worker dies, all play again in new ones. Raises
        ChildProcessError if that fails too.
        """
        # The workers read the policy from a file, as a dead worker may leave the pipe full.
        with tempfile.NamedTemporaryFile() as file:
            # a copy, as pickle would store the policy's vector once per parameter
            pickle.dump(copy.deepcopy(policy).cpu(), file)
            file.flush()
            tasks = [(file.name, self.env_id, seed) for seed in seeds]
            for _ in range(2):
                try:
                    episodes = [self.executor.submit(play_episode, *task) for task in tasks]
                    waiting = set(episodes)
                    if film:
                        filmed = self.executor.submit(play_episode, *tasks[0], film)
                        waiting.add(filmed)
                    while waiting:
                        if stop:
                            return None
                        _, waiting = concurrent.futures.wait(waiting, timeout=0.1)
                    returns = np.array([episode.result() for episode in episodes])
                    if film:
                        fault = filmed.exception()
                        if fault:
                            say(f"NOTE   there is no film: {printable(str(fault))}")
                        else:
                            say(f"film   {film}")
                    return returns
                except BrokenProcessPool:
                    self.close()
                    self.start()
        raise ChildProcessError("worker processes die in the evaluation (out of memory?)")

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self.workers:
            worker.kill()
        self.executor.shutdown(cancel_futures=True)


def evaluate(
    pool: EvaluationPool,
    policy: nn.Module,
    config: Config,
    environment: Environment,
    step: int,
    stop: Sequence[int] = (),
    film: str = "",
) -> dict[str, float]:
    """Play ``policy``, as it is after ``step``; prints a line, returns columns of metrics.csv.

    The episodes are new at each step, and the same in every run of a seed. None are returned once
    there is a ``stop``.
    """
    seeds = np.random.SeedSequence([config.seed, step]).generate_state(config.eval_episodes)
    returns = pool.play(policy, seeds.tolist(), stop, film)
    if returns is None:
        return {}
    columns = {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
    line = f"return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    if environment.random_return is not None:
        columns["score"] = float(environment.score(returns.mean()))
        line += f"  score {columns['score']:.1f}"
    say(f"step {step:>9,}  {line}")
    for n, episode_return in enumerate(returns, start=1):
        columns[f"return_{n}"] = float(episode_return)
    return columns


# ------------------------------------------------------------------------------------------ records
@dataclass
class Progress:
    """How far a run is: what a checkpoint holds besides the agent and the random state."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv
    row: dict[str, float] = field(default_factory=dict)  # the next one, until it is complete
    sums: Metrics = field(default_factory=dict)  # of the metrics since the last log line
    summed: int = 0  # steps in ``sums``
    evaluation_due: bool = False  # after this step, if it was stopped before


def find_wandb(config: Config) -> None:
    """Raise InputError if Weights & Biases are asked for and not installed."""
    if config.wandb_project:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder of that name has no origin
            raise InputError("wandb_project is set, but wandb is not installed; pip install wandb")


def start_wandb(folder: Path, config: Config) -> Any:
    """A run of Weights & Biases that follows TensorBoard. Raises InputError if it cannot start."""
    import wandb

    place = folder.resolve()
    name = re.sub(r"[^\w.-]", "-", place.name, flags=re.ASCII)
    try:
        return wandb.init(
            project=config.wandb_project,
            id=f"{name}-{zlib.crc32(os.fsencode(place)):08x}",  # a resumed run goes on there
            dir=folder,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, init_timeout=20),
            resume="allow",
            reinit="finish_previous",
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"Weights & Biases does not start ({reason}); wandb login, or set WANDB_MODE=offline"
        ) from error


class Log:
    """metrics.csv, TensorBoard's events and W&B."""

    def __init__(self, folder: Path, config: Config, rows: list[dict[str, float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.rows = rows  # the list that the checkpoint holds
        self.columns: list[str] = []
        self.wandb = start_wandb(folder, config) if config.wandb_project else None
        # What an earlier process wrote after its last checkpoint is hidden.
        self.board = SummaryWriter(folder, purge_step=rows[-1]["step"] + 1 if rows else 0)
        settings = dataclasses.asdict(config)
        lines = [f"| {name} | {printable(str(value))} |" for name, value in settings.items()]
        self.board.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]))
        self.write_rows()

    def write_rows(self) -> None:
        """Write metrics.csv anew, with a column for all that any row has."""
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step"]
        content = io.StringIO()
        writer = csv.DictWriter(content, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, content.getvalue().encode())

    def write(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        else:  # a figure that no row had until now
            self.write_rows()
        for name, value in row.items():
            if name != "step":
                group = "evaluation" if name.startswith(("return", "score")) else "training"
                self.board.add_scalar(f"{group}/{name}", value, int(row["step"]))
        self.board.flush()

    def close(self) -> None:
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def save_checkpoint(
    folder: Path, agent: CIQL, progress: Progress, config: Config, checksum: int
) -> None:
    """Write checkpoint.pt: all that the steps to come depend on."""
    policy = agent.evaluated_policy()
    checkpoint = {
        "config": json.dumps(dataclasses.asdict(config)),
        "checksum": checksum,
        "progress": vars(progress),
        "agent_class": type(agent).__name__,
        "agent": agent.state_dict(),
        "policy": policy.state_dict(),
        "dims": (agent.observation_dim, agent.action_dim),
        "random_state": torch.get_rng_state(),
        "cuda_random_state": None if agent.on_cpu else torch.cuda.get_rng_state(agent.device),
    }
    content = io.BytesIO()  # in memory first: torch.save to a full disk raises anything
    torch.save(checkpoint, content)
    write_whole(folder / "checkpoint.pt", content.getvalue())


def config_from_json(text: str) -> Config:
    """Saved settings. One that the version did not have takes its default, one gone is dropped."""
    known = {setting.name for setting in dataclasses.fields(Config)}
    values = {name: value for name, value in json.loads(text).items() if name in known}
    values["hidden_sizes"] = tuple(values["hidden_sizes"])
    return Config(**values)


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The checkpoint in a run folder, on the CPU. Raises InputError if it cannot be read."""
    folder = Path(folder)
    path = folder / "checkpoint.pt"
    try:
        content = path.read_bytes()
    except NotADirectoryError as error:
        raise InputError(f"{folder} is a file; name the run's folder, {folder.parent}") from error
    except FileNotFoundError as error:
        if folder.exists():
            cause = "has no checkpoint.pt; a run has one after its first evaluation"
        else:
            cause = "is not there; name the folder of a run, as the log gives it"
        raise InputError(f"{folder} {cause}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); is it yours?") from error
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load looks at no checksum
            raise ValueError("a part of it has changed")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        checkpoint["config"] = config_from_json(checkpoint["config"])
        checkpoint["progress"] = Progress(**checkpoint["progress"])
        return checkpoint
    except Exception as error:  # torch raises anything for a file that is damaged
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); it is damaged, or of another version"
        ) from error


def load_policy(run: str | Path | dict[str, Any]) -> GaussianPolicy:
    """The policy of a run folder or its checkpoint, on the CPU, ready to ``act``.

    Raises as ``load_checkpoint``.
    """
    checkpoint = run if isinstance(run, dict) else load_checkpoint(run)
    observation_dim, action_dim = checkpoint["dims"]
    policy = make_policy(observation_dim, action_dim, checkpoint["config"])
    try:
        policy.load_state_dict(checkpoint["policy"])
    except RuntimeError as error:
        raise InputError("the run's policy is of another class than make_policy makes") from error
    return policy


class Curve(NamedTuple):
    """The evaluations of a run."""

    steps: np.ndarray  # (E,)
    returns: np.ndarray  # (E, eval_episodes); NaN where an evaluation had fewer


def curve_of(rows: Sequence[dict[str, float]]) -> Curve:
    """The evaluations among the rows of metrics.csv."""
    steps = []
    returns = []
    for row in rows:
        if "return_mean" in row:
            steps.append(int(row["step"]))
            names = [name for name in row if name.removeprefix("return_").isdigit()]
            returns.append([row[name] for name in names])
    most = max(map(len, returns), default=0)
    padded = [episodes + [math.nan] * (most - len(episodes)) for episodes in returns]
    return Curve(np.array(steps, int), np.array(padded, float).reshape(len(steps), most))


def method_name(config: Config, agent: str = "CIQL") -> str:
    """What the settings make of the agent's class."""
    if agent != "CIQL":
        return agent
    if config.beta == 0:
        return "behaviour cloning"
    if config.alpha == 0:
        return "CIQL without penalty" if config.clamp_advantage else "IQL"
    return "CIQL"


def title_of(config: Config, agent: str, source: str) -> str:
    """The picture's title: method, data set, and what is not the default."""
    recollected = source and config.dataset in DATASETS
    note = " (re-collected, not the published file)" if recollected else ""
    stem = printable(Path(config.dataset).stem)
    return f"{method_name(config, agent)} on {stem}{note}\n{', '.join(varied_words(config))}"


def draw_score(axes: Any, environment: Environment) -> None:
    """Score axis at the right, random and expert as lines, if there are such references.

    The range stays that of what is drawn: a far reference is in the legend alone.
    """
    if environment.random_return is None or environment.expert_return is None:
        return
    limits = axes.get_ylim()
    random = environment.random_return
    expert = environment.expert_return
    axes.axhline(random, color="C2", linestyle=":", label=f"random, {random:.0f}")
    axes.axhline(expert, color="C4", linestyle="-.", label=f"expert, {expert:.0f}")
    axes.set_ylim(limits)
    unscore = np.poly1d([(expert - random) / 100, random])
    right = axes.secondary_yaxis("right", functions=(environment.score, unscore))
    right.set_ylabel("normalised score")


def draw(
    path: Path,
    curve: Curve,
    environment: Environment,
    data_returns: np.ndarray,
    title: str,
) -> None:
    """Write the picture: evaluation returns against gradient steps, with their references."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    episodes = curve.returns.shape[1]
    mean = np.nanmean(curve.returns, 1)
    axes.plot(curve.steps, mean, "o-", markersize=3, label=f"mean of {episodes} episodes")
    for returns in curve.returns.T:
        axes.plot(curve.steps, returns, ".", color="C0", alpha=0.25, markersize=4, zorder=1)
    if len(data_returns):
        value = data_returns.mean()
        axes.axhline(value, color="C3", linestyle="--", label=f"data set, {value:.0f}")
    draw_score(axes, environment)
    axes.set(xlabel="gradient steps", ylabel="return of an episode", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=110)
    write_whole(path, content.getvalue())


# ----------------------------------------------------------------------------------------- training
def end_if_imported_by_a_worker() -> None:
    """End a worker whose import of the main program calls train; the parent reports it."""
    for frame in inspect.stack():
        if frame.function == "<module>" and frame.frame.f_globals["__name__"] == "__mp_main__":
            os._exit(1)


@contextlib.contextmanager
def torch_settings(config: Config) -> Iterator[int]:
    """Context in which torch works with one thread per operation and the precision of ``config``.

    It gives the number of threads that parts of a batch are worked by.
    """
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        yield config.threads or threads
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def thread_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads for the parts of a batch, each with one thread per operation."""
    return concurrent.futures.ThreadPoolExecutor(
        threads, initializer=torch.set_num_threads, initargs=(1,)
    )


def out_of_memory(error: BaseException) -> bool:
    """Is that what the error tells? torch has a class for it on CUDA alone."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def checksum_of(data: Transitions) -> int:
    """The CRC-32 by which a resumed run recognises its data."""
    checksum = 0
    for column in data:
        checksum = zlib.crc32(np.ascontiguousarray(column.numpy()).data, checksum)
    return checksum


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


def taken(folder: Path) -> InputError:
    return InputError(f"{folder} is there already; take another --name, or remove it")


def make_folder(config: Config) -> Path:
    """The folder of a new run. Raises InputError if it cannot be made."""
    words = "-".join([printable(Path(config.dataset).stem), *varied_words(config)])
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    name = config.name or re.sub(r"[^\w.+-]", "_", f"{words[:150]}-{now}")
    folder = Path(config.out_dir, name)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise taken(folder) from error
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); take another --out-dir") from error
    return folder


def restore(checkpoint: dict[str, Any], agent: CIQL, config: Config, checksum: int) -> Progress:
    """Put the agent and the random state back, and return how far the run was.

    Prints a NOTE where settings changed. Raises InputError where it cannot go on.
    """
    saved: Config = checkpoint["config"]
    progress: Progress = checkpoint["progress"]
    if checkpoint["checksum"] != checksum:
        raise InputError(
            f"{config.resume} was trained on other data than {config.dataset}; put those back"
        )
    if progress.step > config.max_steps:
        raise InputError(
            f"max_steps is {config.max_steps}, but {config.resume} is at step {progress.step};"
            " raise it"
        )
    if checkpoint["agent_class"] != type(agent).__name__:
        raise InputError(
            f"{config.resume} holds a {checkpoint['agent_class']}, not a {type(agent).__name__};"
            " resume it with the make_agent that it was trained with"
        )
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{config.resume} holds an agent of another size or version; resume it with its own"
            " hidden_sizes and version"
        ) from error
    changed = differences(config, saved)
    if config.policy_lr_decay and config.max_steps != saved.max_steps:
        say("NOTE   the policy's learning rate goes on by the cosine over the new max_steps")
    if changed:
        listed = [f"{name} {value} (was {getattr(saved, name)})" for name, value in changed.items()]
        say(f"NOTE   the run goes on with other settings: {', '.join(listed)}")
    progress.sums = {name: total.to(agent.device) for name, total in progress.sums.items()}
    torch.set_rng_state(checkpoint["random_state"])
    if not agent.on_cpu and checkpoint["cuda_random_state"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_random_state"], agent.device)
    return progress


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context in which signals that ask to stop join the list it gives. A second SIGINT interrupts.

    Signals that are ignored stay so: nohup and shells ignore some for what they start.
    """
    caught: list[int] = []
    first = math.inf

    def handle(number: int, frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        first = min(first, now)
        if number == signal.SIGINT and now > first + 1:  # not the same one, sent twice
            raise KeyboardInterrupt
        caught.append(number)

    usual = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere none can be caught
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                usual[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """A training that is under way, as ``train`` prepared it."""

    config: Config
    agent: CIQL
    data: Transitions
    data_returns: np.ndarray
    checksum: int  # of the data
    environment: Environment
    pool: EvaluationPool
    folder: Path
    log: Log
    progress: Progress
    title: str  # of the picture

    def learn(self, stop: Sequence[int], report: Callable[..., object] | None) -> None:
        """Take the gradient steps that are left, or those until there is a ``stop``."""
        config = self.config
        progress = self.progress
        bar = tqdm(desc="train", total=config.max_steps, initial=progress.step, disable=None)
        since = time.perf_counter()  # steps per second are those since then
        timed = progress.step
        with bar:
            while True:
                if progress.evaluation_due:  # it may be so at the start of a resumed run
                    self.check_finite()
                    self.evaluate(stop)
                    since = time.perf_counter()
                    timed = progress.step
                    if report and not progress.evaluation_due:
                        report(self.log.rows[-1], self.folder)
                elif progress.row:
                    row = progress.row
                    progress.row = {}
                    self.log.write(row)
                if stop or progress.step == config.max_steps:
                    break

                metrics = self.agent.update(self.data)
                for name, figure in metrics.items():  # on the device: nothing waits for it
                    progress.sums[name] = progress.sums.get(name, 0) + figure
                progress.summed += 1
                progress.step += 1
                is_last = progress.step == config.max_steps
                progress.evaluation_due = is_last or progress.step % config.eval_interval == 0
                bar.update()
                if progress.step % config.log_interval == 0:
                    self.check_finite()
                    self.log_losses((progress.step - timed) / (time.perf_counter() - since))
                    since = time.perf_counter()
                    timed = progress.step

    def log_losses(self, steps_per_second: float) -> None:
        """Begin the row of the means of the metrics since the last one, and print them.

        A line that cannot be printed, to a full disk or a closed pipe, loses none of them.
        """
        progress = self.progress
        losses = {name: (total / progress.summed).item() for name, total in progress.sums.items()}
        progress.row = {"step": progress.step, **losses, "steps_per_second": steps_per_second}
        progress.sums = {}
        progress.summed = 0
        figures = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        say(f"step {progress.step:>9,}  {figures}  {steps_per_second:.0f} steps/s")

    def evaluate(self, stop: Sequence[int]) -> None:
        """Evaluate and save, unless there is a ``stop``: then it stays due."""
        config = self.config
        progress = self.progress
        is_last = progress.step == config.max_steps
        film = str(self.folder / "policy.gif") if config.film and is_last else ""
        policy = self.agent.evaluated_policy()
        columns = evaluate(self.pool, policy, config, self.environment, progress.step, stop, film)
        if not columns:
            return
        row = {"step": progress.step} | progress.row | columns
        progress.row = {}
        progress.evaluation_due = False
        self.log.write(row)
        self.save()
        curve = curve_of(self.log.rows)
        for path in (Path(config.plot), self.folder / Path(config.plot).name):
            draw(path, curve, self.environment, self.data_returns, self.title)

    def save(self) -> None:
        """Write the checkpoint. Raises OSError, and FloatingPointError rather than save NaN."""
        self.check_finite()
        save_checkpoint(self.folder, self.agent, self.progress, self.config, self.checksum)

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss or weight is NaN or infinite, before it is saved."""
        sums = self.progress.sums
        bad = [name for name, total in sums.items() if not total.isfinite()]
        if not bad and all(weight.isfinite().all() for weight in self.agent.vectors):
            return
        largest = self.data.rewards.abs().max().item()
        remedy = f"lower lr, or scale the rewards (up to {largest:.3g} here)"
        if bad and set(bad) <= {"policy_loss", "policy_std"}:
            remedy = "lower lr, beta or max_weight"
        names = ", ".join(bad) or "a weight"
        raise FloatingPointError(
            f"{names} became NaN or infinite up to step {self.progress.step:,}; {remedy}"
        )


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
    the folder. Raises InputError for what is wrong with settings and data; after saving what can be
    saved, OSError for a machine that fails (a full disk, workers that die), FloatingPointError for
    losses not finite, KeyboardInterrupt for SIGINT, and SystemExit for the other signals.
    """
    start = time.perf_counter()
    end_if_imported_by_a_worker()
    check(config)
    if data is not None:
        if not config.env_id:
            raise InputError("env_id is not set, but data come without an environment; set it")
        config = dataclasses.replace(config, dataset="own-transitions")
    elif config.dataset == "own-transitions":
        raise InputError(
            "the run is on transitions from Python; resume it there: train(config, data)"
        )
    if config.name and not config.resume and os.path.exists(Path(config.out_dir, config.name)):
        raise taken(Path(config.out_dir, config.name))  # now, and not after compiling
    env_id = environment_id(config)
    find_wandb(config)
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if config.resume:
            # Any other folder is left without a lock file.
            if os.path.exists(Path(config.resume, "checkpoint.pt")):
                stack.callback(lock_folder(Path(config.resume)).release)
            checkpoint = load_checkpoint(config.resume)
        threads = stack.enter_context(torch_settings(config))
        pool = EvaluationPool(env_id, min(config.eval_episodes, threads), config.film)
        stack.callback(pool.close)
        environment = ROBOTS.get(env_id) or pool.environment()
        if data is None:
            dataset = load_dataset(config, environment)
        else:
            data = check_transitions(data, environment, "data")
            dataset = Dataset(
                transitions=data,
                returns=np.array([]),
                ended_after=np.array([]),
                rows=len(data.rewards),
                layout="",
                source="",
            )
        checksum = checksum_of(dataset.transitions)

        torch.manual_seed(config.seed)
        agent = make_agent(environment.observation_dim, environment.action_dim, config)
        prepared = agent.prepare(dataset.transitions)
        progress = restore(checkpoint, agent, config, checksum) if checkpoint else Progress()
        if progress.step == config.max_steps and not progress.evaluation_due:
            say(
                f"done   {config.resume} has all of its {progress.step:,} steps: nothing is left;"
                " raise --max-steps, or play it with --evaluate"
            )
            return Path(config.resume), curve_of(progress.rows)
        where = f"cpu, {min(threads, agent.parts)} threads"
        if not agent.on_cpu:
            where = torch.cuda.get_device_name(agent.device)
        if config.compile:
            where += ", compiling the step"
        say(f"agent  {type(agent).__name__}, {where}")
        if agent.on_cpu:
            agent.map = stack.enter_context(thread_pool(threads)).map
        if config.compile:
            agent.compile(prepared)
            # A call that none of the graphs fits, should there be one, runs eagerly.
            stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
        pool.environment()  # waits until the workers are up, and fails here if they cannot be

        folder = Path(config.resume) if config.resume else make_folder(config)
        quoted = shlex.quote(str(folder))  # as a shell takes it
        is_of_command_line = type(agent) is CIQL and data is None
        how_to_go_on = f"--resume {quoted}"
        if not is_of_command_line:
            how_to_go_on = f"train(config, ...) in Python, where config.resume is {str(folder)!r}"
        try:
            if not config.resume:
                stack.callback(lock_folder(folder).release)
            settings = json.dumps(dataclasses.asdict(config), indent=2)
            write_whole(folder / "config.json", settings.encode())
            log = Log(folder, config, progress.rows)
        except (InputError, OSError):
            if not config.resume:
                shutil.rmtree(folder)
            raise
        stack.callback(log.close)
        say(f"run    {folder}, from step {progress.step:,}")
        title = title_of(config, type(agent).__name__, dataset.source)
        run = Run(
            config=config,
            agent=agent,
            data=prepared,
            data_returns=dataset.returns,
            checksum=checksum,
            environment=environment,
            pool=pool,
            folder=folder,
            log=log,
            progress=progress,
            title=title,
        )
        stop = stack.enter_context(stop_signals())
        try:
            run.learn(stop, report)
        except Exception as error:
            # The state is whole: between two steps, or at an evaluation that can be taken again.
            if isinstance(error, OSError) or progress.evaluation_due:
                with contextlib.suppress(OSError, FloatingPointError):  # the first fault tells
                    run.save()
            saved = (folder / "checkpoint.pt").exists()
            if saved and isinstance(error, OSError):
                error.add_note(f"mend that, then go on with {how_to_go_on}")
            if not saved and out_of_memory(error):  # settings that cannot be leave nothing behind
                shutil.rmtree(folder)
            if not (stop and isinstance(error, OSError)):  # a hangup takes the terminal as well
                raise
        if stop and (progress.evaluation_due or progress.step < config.max_steps):
            run.save()
            with contextlib.suppress(OSError):  # after a hangup there is no terminal
                say(f"stopped at step {progress.step:,}; go on with {how_to_go_on}")
            if stop[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stop[0])

    curve = curve_of(log.rows)
    last = curve.returns[-10:]
    score = ""
    if environment.random_return is not None:
        score = f", score {environment.score(np.nanmean(last)):.1f}"
    say(f"final  {np.nanmean(last):.1f} is the mean of the last {len(last)} evaluations{score}")
    say(f"wrote  {config.plot} and {folder}, in {(time.perf_counter() - start) / 60:.1f} minutes")
    longer = f", or {how_to_go_on} --max-steps {2 * config.max_steps}" if is_of_command_line else ""
    say(f"next   --evaluate {quoted} --film{longer}")
    return folder, curve


# ----------------------------------------------------------------------------------------- commands
def parse(arguments: Sequence[str]) -> Config:
    """Settings from the command line; those of the run that is resumed or evaluated are defaults.

    Raises InputError; a flag that tyro cannot read ends the program with its message.
    """
    import tyro

    config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py")
    if config.resume and config.evaluate:
        raise InputError("resume and evaluate are both set; give one of the two")
    run = config.resume or config.evaluate
    if run and config.name:
        raise InputError(f"name is {config.name}, but {run} has its own; leave it out")
    if run:
        saved = load_checkpoint(run)["config"]
        own = {"resume": config.resume, "evaluate": config.evaluate, "film": False, "name": ""}
        saved = dataclasses.replace(saved, **own)
        config = tyro.cli(Config, args=arguments, prog="ciql_pybullet.py", default=saved)
    check(config)
    return config


def evaluate_run(config: Config) -> None:
    """Play the policy of the run folder ``config.evaluate``."""
    checkpoint = load_checkpoint(config.evaluate)
    policy = load_policy(checkpoint)
    env_id = environment_id(config)
    pool = EvaluationPool(
        env_id, min(config.eval_episodes, config.threads or torch.get_num_threads())
    )
    with contextlib.closing(pool):
        environment = ROBOTS.get(env_id) or pool.environment()
        dims = (environment.observation_dim, environment.action_dim)
        if dims != tuple(checkpoint["dims"]):
            raise InputError(
                f"env_id is {env_id}, of {dims} observations and actions, but the policy in"
                f" {config.evaluate} has {tuple(checkpoint['dims'])}"
            )
        film = str(Path(config.evaluate, "policy.gif")) if config.film else ""
        step = checkpoint["progress"].step
        evaluate(pool, policy, config, environment, step, film=film)


def prepare_process() -> None:
    """What a program does that a library must not: its streams and signals."""
    descriptor = 0
    while descriptor <= 2:  # a stream that was closed would lend its number to a file of ours
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(descriptor, descriptor <= 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not None
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    sys.path.append(os.getcwd())  # where the MODULE of env_id may be

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in STOP_SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def complain(cause: object) -> None:
    """One line on stderr: what happened, and what was added on the way up."""
    text = "; ".join([str(cause), *getattr(cause, "__notes__", [])])
    line = " ".join(text.split())
    print(f"ciql_pybullet: {printable(line)}", file=sys.stderr)


def main() -> None:
    """The command line.

    Exit codes: 2 for bad input, or settings too large for the memory; 1 for losses not finite or a
    fault of the machine; 128 + n for signal n.
    """
    prepare_process()
    code = 0
    try:
        config = parse(sys.argv[1:])
        if config.evaluate:
            evaluate_run(config)
        else:
            train(config)
    except KeyboardInterrupt:
        code = 130
    except InputError as error:
        code = 2
        complain(error)
    except (OSError, FloatingPointError) as error:
        code = 1
        complain(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        code = 2
        complain("out of memory; lower batch_size, num_neg or hidden_sizes")
    sys.exit(code)


if __name__ == "__main__":
    main()
