"""Files, processes and settings that the tests share."""

import csv
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "ciql_pybullet.py"
SAMPLE_ID = "halfcheetah-bullet-medium-v0"
SAMPLE = ROOT / "data" / "halfcheetah-bullet-medium-sample.hdf5"
sys.path.insert(0, str(ROOT))

import ciql_pybullet
from ciql_pybullet import Transitions

# What nohup and shells ignore for what they start, the programs under test would ignore as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Keep the tests away from the user's own data sets, the network, and each other's threads."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- files
def episode(steps, first, observation_dim=2, action_dim=1, closed=True):
    """Rows of an episode in d4rl-pybullet's layout, all numbers told apart by ``first``."""
    rows = steps + closed
    observations = first + np.arange(rows)[:, None] + np.arange(observation_dim) / 10
    actions = np.tile((np.arange(rows)[:, None] + 1) / (rows + 1), action_dim)
    rewards = 1000.0 + first + np.arange(rows)  # the reward in row i came with observation i
    rewards[0] = 0
    terminals = np.zeros(rows)
    if closed:
        actions[-1] = 0
        terminals[-1] = 1
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
    }


def write_file(path, *episodes, two_dimensional=False, **replaced):
    """Write ``episodes`` to an HDF5 file; ``replaced`` columns stand in, None leaves one out."""
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]} | replaced
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            if column is not None:
                column = np.asarray(column, np.float32)
                file[key] = column[:, None] if two_dimensional and column.ndim == 1 else column
    return path


def hopper_file(path, **replaced):
    """A small file that fits HopperBulletEnv-v0: two episodes that fell, one that the file cuts."""
    rng = np.random.default_rng(0)
    episodes = [
        episode(40, 0, 15, 3),
        episode(60, 0, 15, 3),
        episode(30, 0, 15, 3, closed=False),
    ]
    for e in episodes:
        e["observations"] = rng.normal(size=e["observations"].shape)
    return write_file(path, *episodes, **replaced)


def metrics(folder):
    """The rows of a run's metrics.csv, but for the speed."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("steps_per_second", None)
    return rows


def snapshot(folder):
    """All that is in a folder, but for compiled modules and the Lab's marks."""
    others = {"__pycache__", "playing"}
    paths = [path for path in sorted(folder.rglob("*")) if not others & set(path.parts)]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


# ---------------------------------------------------------------------------------------- processes
def run_main(monkeypatch, capsys, arguments, main=ciql_pybullet.main):
    """Run a command line in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --------------------------------------------------------------------------- an environment of ours
LAB = """
import os
import time

import gymnasium
import numpy as np


class Lab(gymnasium.Env):
    '''A point on a line that is paid for staying at 0. Tests see it play and slow it down.'''

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gymnasium.spaces.Box(-10, 10, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=3).astype(np.float32)
        with open("playing", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return self.x, {}

    def step(self, action):
        time.sleep(float(os.environ.get("LAB_PAUSE", "0")))
        self.x = np.float32(0.9) * self.x + np.float32(0.1) * action
        return self.x, 1 - float(self.x @ self.x), False, False, {}

    def render(self):
        return np.full((8, 8, 3), 100 * abs(self.x[0]) % 255, np.uint8)


gymnasium.register("Lab-v0", Lab, max_episode_steps=10)
"""
LAB_SETTINGS = {
    "dataset": "data.hdf5",
    "env_id": "lab:Lab-v0",
    "device": "cpu",
    "compile": False,
    "hidden_sizes": (8,),
    "batch_size": 16,
    "num_neg": 2,
    "max_steps": 40,
    "eval_interval": 20,
    "log_interval": 10,
    "eval_episodes": 2,
    "threads": 2,
}


def flags(**settings):
    """Settings as a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


LAB_FLAGS = flags(**LAB_SETTINGS)


def lab_file(path, **replaced):
    """A small file that fits the Lab: two episodes cut by its time limit, one by the file."""
    rng = np.random.default_rng(0)
    episodes = [episode(10, 0, 3, 1), episode(10, 0, 3, 1), episode(9, 0, 3, 1, closed=False)]
    for e in episodes:
        e["observations"] = rng.normal(size=e["observations"].shape)
        e["rewards"] /= 1000
    return write_file(path, *episodes, **replaced)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The Lab's module and data, where this process and its children find them; that folder."""
    (tmp_path / "lab.py").write_text(LAB)
    lab_file(tmp_path / "data.hdf5")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes half of a small training."""
    monkeypatch.setattr(ciql_pybullet, "draw", lambda *arguments: None)


def own_transitions(n=6, observation_dim=15, action_dim=3, **replaced):
    columns = {
        "observations": torch.randn(n, observation_dim),
        "actions": torch.rand(n, action_dim) * 2 - 1,
        "rewards": torch.randn(n),
        "next_observations": torch.randn(n, observation_dim),
        "terminations": torch.zeros(n),
    }
    return Transitions(**(columns | replaced))
