"""Re-collect d4rl-pybullet data sets from their published recipe, with stable-baselines3's SAC.

Soft actor-critic (two hidden layers of 256, learning rate 3e-4, batch 100, one update per step)
learns in a PyBullet environment until the last ``window`` training episodes return ``level`` on
average. By the last word of its id, a data set is

    random   ``rows`` rows of the untrained stochastic policy
    mixed    the replay buffer up to that moment
    medium   ``rows`` rows of the final deterministic policy

in d4rl-pybullet's layout: row t holds (observation_t, action_t, r, d) where r and d ARRIVED WITH
observation_t, from the step before. An episode closes with an extra row: its last observation, a
zero action, the last reward, terminal 1, at the time limit as well as after a fall.

    python data/make_bullet_dataset.py --id hopper-bullet-medium-v0 hopper-bullet-mixed-v0
"""

import importlib.metadata
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gymnasium
import h5py
import numpy as np
import pybullet_envs_gymnasium  # noqa: F401  (registers the environments)
import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

# Of a robot: its environment, the return that ends learning, and of how many training episodes.
# One episode is the published criterion; of robots that fall it says little of the policy.
ROBOTS = {
    "halfcheetah": ("HalfCheetahBulletEnv-v0", 800.0, 1),
    "hopper": ("HopperBulletEnv-v0", 1000.0, 10),
    "walker2d": ("Walker2DBulletEnv-v0", 900.0, 10),
    "ant": ("AntBulletEnv-v0", 600.0, 10),
}
KINDS = ("random", "medium", "mixed")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """Re-collect d4rl-pybullet data sets: OUT/ID.hdf5 for each id."""

    id: tuple[str, ...]  # of one robot, such as hopper-bullet-medium-v0 hopper-bullet-mixed-v0
    out: Path | None = None  # folder; none: $D4RL_DATASET_DIR or ~/.d4rl/datasets
    level: float | None = None  # return that ends learning; none: the robot's own
    window: int | None = None  # ... on average of this many episodes; none: the robot's own
    max_steps: int = 1_000_000  # give up learning after this many environment steps
    rows: int = 200_000  # rows of a random or medium file
    mixed_rows: int | None = (
        None  # a mixed file keeps episodes, evenly, of about so many; none: all
    )
    seed: int = 0  # of the networks, the environment and the sampling


def stop(line: str) -> NoReturn:
    print(f"make_bullet_dataset: {line}", file=sys.stderr)
    sys.exit(2)


class Recorder(gymnasium.Wrapper):
    """Keeps the rows and the returns of all that is played in the environment below."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        env.reset()  # the first episode's rewards are off by a constant: it is thrown away
        self.rows: Rows = []
        self.returns: list[float] = []  # of the whole episodes

    def add_row(self, action: Any, terminal: float) -> None:
        row = {"observations": self.observation, "actions": action}
        self.rows.append(row | {"rewards": [self.reward], "terminals": [terminal]})

    def reset(self, **options: Any) -> Any:
        self.observation, info = self.env.reset(**options)
        self.reward = 0.0  # the one that arrived with the observation
        self.total = 0.0
        return self.observation, info

    def step(self, action: Any) -> Any:
        self.add_row(action, 0.0)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.reward = float(reward)
        self.total += self.reward
        if terminated or truncated:
            self.add_row(np.zeros_like(action), 1.0)
            self.returns.append(self.total)
        return self.observation, reward, terminated, truncated, info

    def episodes(self) -> list[Rows]:
        """The whole episodes, and the rows of the one that goes on."""
        ends = [number for number, row in enumerate(self.rows, 1) if row["terminals"] == [1.0]]
        bounds = [0, *ends, len(self.rows)]
        return [self.rows[start:end] for start, end in itertools.pairwise(bounds)]

    def thin(self, rows: int) -> None:
        """Keep whole episodes, evenly, of about ``rows`` rows."""
        *episodes, _ = self.episodes()
        share = min(1.0, rows / len(self.rows))
        kept = [n for n in range(len(episodes)) if int((n + 1) * share) > int(n * share)]
        self.rows = [row for n in kept for row in episodes[n]]
        self.returns = [self.returns[n] for n in kept]

    def write(self, path: Path, source: str, limit: int | None = None) -> None:
        """Write the first ``limit`` rows (None: all); a file of that name is whole."""
        rows = self.rows[:limit]
        part = path.with_suffix(".part")
        with h5py.File(part, "w") as file:
            file.attrs["source"] = source
            for name in rows[0]:
                column = np.asarray([row[name] for row in rows], np.float32)
                file.create_dataset(name, data=column, compression="gzip", shuffle=True)
        part.rename(path)
        mean = np.mean(self.returns)
        std = np.std(self.returns)
        print(f"{path}: {len(rows)} rows, {len(self.returns)} episodes, {mean:.1f} ± {std:.1f}")


class UntilLevel(BaseCallback):
    """Ends learning once the last ``window`` episodes return ``level`` on average."""

    def __init__(self, recorder: Recorder, level: float, window: int) -> None:
        super().__init__()
        self.recorder = recorder
        self.level = level
        self.window = window
        self.is_reached = False

    def _on_step(self) -> bool:
        returns = self.recorder.returns
        if self.locals["dones"][0] and len(returns) % 10 == 0:
            print(f"step {self.num_timesteps:,}  return {np.mean(returns[-10:]):.1f}", flush=True)
        enough = len(returns) >= self.window
        self.is_reached = enough and bool(np.mean(returns[-self.window :]) >= self.level)
        return not self.is_reached


def play(sac: SAC, env_id: str, rows: int, deterministic: bool, seed: int) -> Recorder:
    """Whole episodes of at least ``rows`` rows."""
    recorder = Recorder(gymnasium.make(env_id))
    observation, _ = recorder.reset(seed=seed)
    while len(recorder.rows) < rows:
        action, _ = sac.predict(observation, deterministic=deterministic)
        observation, _, terminated, truncated, _ = recorder.step(action)
        if terminated or truncated:
            observation, _ = recorder.reset()
    return recorder


def main(recipe: Recipe) -> None:
    robot = recipe.id[0].partition("-")[0] if recipe.id else ""
    kinds = {f"{robot}-bullet-{kind}-v0": kind for kind in KINDS}
    if robot not in ROBOTS or not kinds.keys() >= set(recipe.id):
        stop(f"id is {' '.join(recipe.id)}, but must be of one robot, like hopper-bullet-medium-v0")
    env_id, level, window = ROBOTS[robot]
    level = level if recipe.level is None else recipe.level
    window = window if recipe.window is None else recipe.window
    if min(window, recipe.max_steps, recipe.rows) < 1:
        stop("window, max_steps and rows must be at least 1")
    default = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    folder = (recipe.out or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"{folder} cannot be made ({error.strerror}); choose another --out")
    if not os.access(folder, os.W_OK):
        stop(f"{folder} cannot be written to; choose another --out")
    paths = {kinds[name]: folder / f"{name}.hdf5" for name in recipe.id}
    for path in paths.values():
        if path.exists():
            stop(f"{path} is there already; move it away or choose another --out")

    torch.set_num_threads(1)  # batches of 100 are too small for more
    recorder = Recorder(gymnasium.make(env_id))
    sac = SAC(
        "MlpPolicy",
        recorder,
        learning_rate=3e-4,
        batch_size=100,
        learning_starts=100,
        policy_kwargs={"net_arch": [256, 256]},
        seed=recipe.seed,
        device="cpu",
    )
    names = ("pybullet", "pybullet_envs_gymnasium", "stable_baselines3", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    source = (
        f"re-collected after d4rl-pybullet's recipe in {env_id}, seed {recipe.seed}, {versions}"
    )
    if "random" in paths:
        played = play(sac, env_id, recipe.rows, deterministic=False, seed=recipe.seed + 10_000)
        played.write(paths["random"], f"{source}; untrained policy", recipe.rows)
    if paths.keys() == {"random"}:
        return

    sac.set_random_seed(recipe.seed)  # learning is the same whether or not it played before
    until = UntilLevel(recorder, level, window)
    sac.learn(recipe.max_steps, until)
    if not until.is_reached:
        within = f"within {recipe.max_steps:,} steps"
        stop(f"{window} episodes returned no {level:g} on average {within}; lower --level")
    reached = f"{np.mean(recorder.returns[-window:]):.1f} over {window} episodes"
    learned = f"SAC stopped at {reached} after {len(recorder.rows):,} rows (level {level:g})"
    if "mixed" in paths:
        kept = ""
        if recipe.mixed_rows:
            recorder.thin(recipe.mixed_rows)
            kept = f", of which {len(recorder.returns)} whole episodes are kept, evenly"
        recorder.write(paths["mixed"], f"{source}; replay of {learned}{kept}")
    if "medium" in paths:
        played = play(sac, env_id, recipe.rows, deterministic=True, seed=recipe.seed + 20_000)
        played.write(paths["medium"], f"{source}; mean action of {learned}", recipe.rows)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
