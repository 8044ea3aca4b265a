"""Re-collect d4rl-pybullet data sets from their published recipe.

Soft actor-critic (Haarnoja et al., 2018) with the recipe's settings (two hidden layers of 256,
learning rate 3e-4, batch 100, one update per step, no warm-up) learns in a PyBullet environment
until a training episode returns at least ``level``; where one episode says little of the policy,
the last ``window`` of them must on average. By the last word of its id, a data set is

    random   ``rows`` rows of the untrained stochastic policy
    mixed    the replay buffer up to that moment
    medium   ``rows`` rows of the final deterministic policy

Rows are laid out as d4rl-pybullet lays them out. Row t holds (observation_t, action_t, r, d) where
r and d ARRIVED WITH observation_t, from the step before. An episode closes with an extra row: its
last observation, a zero action, the last reward, terminal 1, at the time limit as well as after a
fall.

    python data/make_bullet_dataset.py --id walker2d-bullet-mixed-v0
    python data/make_bullet_dataset.py --id hopper-bullet-medium-v0 hopper-bullet-mixed-v0
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from typing import NoReturn

import gymnasium
import h5py
import numpy as np
import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

# Of a robot: its environment, the return that ends learning, and of how many training episodes.
ROBOTS = {
    "halfcheetah": ("HalfCheetahBulletEnv-v0", 800.0, 1),
    "hopper": ("HopperBulletEnv-v0", 1000.0, 10),
    "walker2d": ("Walker2DBulletEnv-v0", 900.0, 10),
    "ant": ("AntBulletEnv-v0", 600.0, 10),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Re-collect d4rl-pybullet data sets: <out>/<id>.hdf5 for each id."""

    id: tuple[
        str, ...
    ]  # data sets of one robot, such as hopper-bullet-medium-v0 hopper-bullet-mixed-v0
    out: pathlib.Path | None = (
        None  # folder for the files; none: where ciql_pybullet.py looks for them
    )
    level: float | None = (
        None  # stop learning once training episodes return this much; none: the robot's own
    )
    window: int | None = None  # ... on average of this many, the last ones; none: the robot's own
    max_steps: int = 1_000_000  # give up learning after this many environment steps
    rows: int = 200_000  # rows of a random or medium file
    seed: int = 0  # of the networks, the environment and the sampling


class Rows:
    """Rows in d4rl-pybullet's layout, gathered step by step."""

    def __init__(self) -> None:
        self.rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []
        self.returns: list[float] = []  # of the whole episodes
        self.reward = 0.0  # the one that arrived with the coming observation
        self.episode_return = 0.0

    def step(
        self, env: gymnasium.Env, observation: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool]:
        """Log the row, act, and close the episode's rows if the action ended it."""
        self.rows.append((observation, action, self.reward, 0.0))
        observation, reward, terminated, truncated, _ = env.step(action)
        self.reward = float(reward)
        self.episode_return += self.reward
        if terminated or truncated:
            self.rows.append((observation, np.zeros_like(action), self.reward, 1.0))
            self.returns.append(self.episode_return)
            self.reward, self.episode_return = 0.0, 0.0
        return observation, float(reward), terminated, truncated

    def write(self, path: pathlib.Path, limit: int | None, source: str) -> bool:
        """Write the first ``limit`` rows (all of them: None) to ``path``; did that succeed?

        They may be hours of learning: where the disk is full they go to the temporary folder.
        """
        columns = zip(*self.rows[:limit], strict=True)
        observations, actions, rewards, terminals = (
            np.asarray(column, np.float32) for column in columns
        )
        stored = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards[:, None],
            "terminals": terminals[:, None],
        }
        count = len(self.returns)
        print(
            f"{path}: {len(rewards)} rows, {count} episodes, return {np.mean(self.returns):.1f}"
            f" ± {np.std(self.returns):.1f}",
            flush=True,
        )
        try:
            write_whole(path, stored, source)
            return True
        except OSError as error:
            complain(f"{path} cannot be written: {error}")
        other = pathlib.Path(tempfile.mkdtemp(prefix="bullet-"), path.name)
        try:
            write_whole(other, stored, source)
            complain(f"its rows are in {other}: move them there")
        except OSError as error:
            complain(f"{other} cannot be written either: {error}")
        return False


def write_whole(path: pathlib.Path, columns: dict[str, np.ndarray], source: str) -> None:
    """Write an HDF5 file; one of that name is whole. Raises OSError."""
    part = path.with_suffix(".part")
    try:
        with h5py.File(part, "w") as file:
            file.attrs["source"] = source
            for key, values in columns.items():
                file.create_dataset(key, data=values, compression="gzip", shuffle=True)
        part.rename(path)
    except RuntimeError as error:  # how HDF5 may tell of a full disk
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
    )  # fmt: skip


class SAC:
    """Soft actor-critic with an automatic temperature (Haarnoja et al., 2018, arXiv 1812.05905)."""

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        self.action_dim = action_dim
        self.actor = mlp(observation_dim, 2 * action_dim)
        self.critics = nn.ModuleList(mlp(observation_dim + action_dim, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics)
        self.log_temperature = torch.zeros(1, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=3e-4, fused=True)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=3e-4)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) of the tanh-Gaussian policy, with their log-likelihoods (B,)."""
        mean, log_std = self.actor(observations).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        # log(1 - tanh(x)^2), written so that it does not overflow
        log_det = 2 * (np.log(2) - raw - F.softplus(-2 * raw))
        return torch.tanh(raw), (normal.log_prob(raw) - log_det).sum(-1)

    @torch.no_grad()
    def act(self, observation: np.ndarray, deterministic: bool) -> np.ndarray:
        observations = torch.as_tensor(observation, dtype=torch.float32)
        if deterministic:
            return torch.tanh(self.actor(observations).chunk(2, -1)[0]).numpy()
        return self.sample(observations)[0].numpy()

    def update(self, s: Tensor, a: Tensor, r: Tensor, s_next: Tensor, terminated: Tensor) -> None:
        """One gradient step of critics, actor and temperature on B transitions."""
        temperature = self.log_temperature.exp().detach()
        with torch.no_grad():
            a_next, log_likelihood = self.sample(s_next)
            next_q = torch.stack([q(torch.cat([s_next, a_next], -1)) for q in self.targets]).amin(
                0
            )[:, 0]
            target = r + 0.99 * (1 - terminated) * (next_q - temperature * log_likelihood)
        x = torch.cat([s, a], -1)
        q_loss = torch.stack([F.mse_loss(q(x)[:, 0], target) for q in self.critics]).sum()
        minimize(self.critic_optimizer, q_loss)

        self.critics.requires_grad_(False)
        a_new, log_likelihood = self.sample(s)
        q_new = torch.stack([q(torch.cat([s, a_new], -1)) for q in self.critics]).amin(0)[:, 0]
        minimize(self.actor_optimizer, (temperature * log_likelihood - q_new).mean())
        self.critics.requires_grad_(True)

        excess = log_likelihood.detach() - self.action_dim  # the target entropy is -action_dim
        minimize(self.temperature_optimizer, -(self.log_temperature.exp() * excess).mean())
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.targets.parameters()), list(self.critics.parameters()), 0.005
            )


def minimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learn(recipe: Recipe, env: gymnasium.Env, sac: SAC, level: float, window: int) -> Rows:
    """Train ``sac`` until the last ``window`` episodes return ``level`` on average.

    Returns the replay buffer.
    """
    replay, start = Rows(), time.time()
    torch.manual_seed(recipe.seed)  # whether a random file was collected before or not
    observation, _ = env.reset(seed=recipe.seed)
    steps, observation_dim, action_dim = recipe.max_steps, observation.size, sac.action_dim
    buffer = [
        torch.zeros(steps, *shape)
        for shape in ((observation_dim,), (action_dim,), (), (observation_dim,), ())
    ]
    t = 0
    while True:
        if t == steps:
            stop(
                f"{window} episodes returned no {level:g} on average within {steps:,} steps;"
                " lower --level"
            )
        action = sac.act(observation, deterministic=False)
        next_observation, reward, terminated, truncated = replay.step(env, observation, action)
        for column, value in zip(
            buffer, (observation, action, reward, next_observation, terminated), strict=True
        ):
            column[t] = torch.as_tensor(value)
        observation = next_observation
        t += 1
        if t > 101:
            index = torch.randint(t, (100,))
            sac.update(*(column[index] for column in buffer))
        if terminated or truncated:
            if len(replay.returns) % 10 == 0:
                rate = t / (time.time() - start)
                print(
                    f"step {t:,}  return {np.mean(replay.returns[-10:]):.1f}  {rate:.0f} steps/s",
                    flush=True,
                )
            if len(replay.returns) >= window and np.mean(replay.returns[-window:]) >= level:
                return replay
            observation, _ = env.reset()


def collect(recipe: Recipe, env: gymnasium.Env, sac: SAC, deterministic: bool, seed: int) -> Rows:
    """Play ``sac`` for at least ``recipe.rows`` rows."""
    logged = Rows()
    torch.manual_seed(seed)
    observation, _ = env.reset(seed=seed)
    while len(logged.rows) < recipe.rows:
        action = sac.act(observation, deterministic)
        observation, _, terminated, truncated = logged.step(env, observation, action)
        if terminated or truncated:
            observation, _ = env.reset()
    return logged


def paths_by_kind(recipe: Recipe) -> tuple[str, dict[str, pathlib.Path]]:
    """The robot, and the file to write for each kind asked for.

    Ends the program for an id that cannot be made, or a folder that cannot hold the files.
    """
    try:
        default = pathlib.Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
        folder = recipe.out or default.expanduser()
    except RuntimeError as error:  # no home folder
        stop(f"{error}; set --out")
    found = [
        re.fullmatch(rf"({'|'.join(ROBOTS)})-bullet-(random|mixed|medium)-v0", name)
        for name in recipe.id
    ]
    robots = {match[1] for match in found if match}
    if not all(found) or len(robots) != 1:
        stop(
            f"id is {' '.join(recipe.id)}, but must be of one robot, like hopper-bullet-medium-v0"
            " hopper-bullet-mixed-v0"
        )
    paths = {match[2]: folder / f"{match[0]}.hdf5" for match in found if match}
    for path in paths.values():
        if os.path.exists(path):
            stop(f"{path} is there already; move it away or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        stop(f"{folder} cannot be written to ({error.strerror}); choose another --out")
    largest = recipe.max_steps if "mixed" in paths else 0
    largest += recipe.rows * len(paths.keys() - {"mixed"})
    needed = 38 * 4 * largest  # Ant's row: 28 observations, 8 actions, reward, end; float32
    free = shutil.disk_usage(folder).free
    if free < needed:
        stop(
            f"{folder} has {free / 1e6:,.0f} MB free, but up to {needed / 1e6:,.0f} are needed;"
            " choose another --out"
        )
    return robots.pop(), paths


def complain(line: str) -> None:
    print(f"make_bullet_dataset: {line}", file=sys.stderr)


def stop(line: str) -> NoReturn:
    complain(line)
    sys.exit(2)


def main(recipe: Recipe) -> None:
    robot, paths = paths_by_kind(recipe)
    env_id, level, window = ROBOTS[robot]
    level = level if recipe.level is None else recipe.level
    window = window if recipe.window is None else recipe.window
    if min(window, recipe.max_steps, recipe.rows) < 1:
        stop("window, max_steps and rows must be at least 1")
    torch.set_num_threads(1)  # batches of 100 are too small for more
    torch.manual_seed(recipe.seed)
    env = gymnasium.make(env_id)
    assert env.observation_space.shape and env.action_space.shape
    sac = SAC(env.observation_space.shape[0], env.action_space.shape[0])
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}"
        for p in ("pybullet", "pybullet_envs_gymnasium", "torch")
    )
    source = (
        f"re-collected after d4rl-pybullet's recipe in {env_id}, seed {recipe.seed},"
        f" {versions}, {datetime.date.today()}"
    )

    written = []
    if "random" in paths:
        untrained = collect(recipe, env, sac, deterministic=False, seed=recipe.seed + 10_000)
        written.append(untrained.write(paths["random"], recipe.rows, f"{source}; untrained policy"))
    if paths.keys() != {"random"}:
        replay = learn(recipe, env, sac, level, window)
        reached = f"{np.mean(replay.returns[-window:]):.1f} over {window} episodes"
        learned = f"SAC stopped at {reached} after {len(replay.rows):,} rows (level {level:g})"
        if "mixed" in paths:
            written.append(replay.write(paths["mixed"], None, f"{source}; replay of {learned}"))
        if "medium" in paths:
            played = collect(recipe, env, sac, deterministic=True, seed=recipe.seed + 20_000)
            source = f"{source}; mean action of {learned}"
            written.append(played.write(paths["medium"], recipe.rows, source))
    if not all(written):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
