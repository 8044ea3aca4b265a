"""Files, settings and an environment that the tests share, and functions that run the programs."""

import contextlib
import csv
import signal
import sys
import urllib.error
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "ciql_pybullet.py"
sys.path[:0] = [str(ROOT), str(ROOT / "study"), str(ROOT / "data")]

import ciql_pybullet
from ciql_pybullet import Config, InputError, Transitions

# What nohup and shells ignore for what they start, the programs under test would ignore as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more would be slower for small networks


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Keep the tests away from the user's own data sets, and each other's files."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    """The published addresses cannot be reached; the list of those that were asked for."""
    asked = []

    def refuse(url, timeout):
        asked.append(url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


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
    columns = {"observations": observations, "actions": actions}
    return columns | {"rewards": rewards, "terminals": terminals}


def write_file(path, *episodes, **replaced):
    """Write ``episodes`` to an HDF5 file; ``replaced`` columns stand in, None leaves one out."""
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]} | replaced
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            if column is not None:
                file[key] = np.asarray(column, np.float32)
    return path


def small_file(path, lengths, dims, **replaced):
    """Episodes of these lengths with random observations; the file cuts the last one."""
    rng = np.random.default_rng(0)
    episodes = [episode(steps, 0, *dims, closed=steps != lengths[-1]) for steps in lengths]
    for e in episodes:
        e["observations"] = rng.normal(size=e["observations"].shape)
        e["rewards"] /= 1000
    return write_file(path, *episodes, **replaced)


def hopper_file(path, **replaced):
    """A small file that fits HopperBulletEnv-v0: two episodes that fell, one that the file cuts."""
    return small_file(path, (40, 60, 30), (15, 3), **replaced)


def lab_file(path, **replaced):
    """A small file that fits the Lab below: two episodes cut by its time limit, one by the file."""
    return small_file(path, (10, 10, 9), (3, 1), **replaced)


def own_transitions(n=6, observation_dim=15, action_dim=3, **replaced):
    """Transitions of random numbers; ``replaced`` columns stand in."""
    columns = {
        "observations": torch.randn(n, observation_dim),
        "actions": torch.rand(n, action_dim) * 2 - 1,
        "rewards": torch.randn(n),
        "next_observations": torch.randn(n, observation_dim),
        "terminations": torch.zeros(n),
    }
    return Transitions(**(columns | replaced))


def metrics(folder):
    """The rows of a run's metrics.csv, but for the speed."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("steps_per_second", None)
    return rows


def snapshot(folder):
    """All that is in a folder, but for compiled modules, locks, and the Lab's marks."""
    others = {"__pycache__", "playing", ".lock"}
    paths = [path for path in sorted(folder.rglob("*")) if not others & set(path.parts)]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command line in this process: its exit code, stdout and stderr."""

    def run(*arguments, main=ciql_pybullet.main):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def succeeds(command):
    """The same for one that ends well, without complaint: its stdout."""

    def run(*arguments, main=ciql_pybullet.main):
        code, out, error = command(*arguments, main=main)
        own = [line for line in error.splitlines() if not line.startswith("wandb:")]
        assert (code, own) == (0, [])
        return out

    return run


@pytest.fixture
def fails(command, tmp_path):
    """A function that runs a command line of bad input: exit code 2, one line, no file changed."""

    def run(*arguments, named, main=ciql_pybullet.main):
        before = snapshot(tmp_path)
        code, _, error = command(*arguments, main=main)
        assert (code, error.count("\n"), error[-1:]) == (2, 1, "\n"), error
        assert named in error
        assert snapshot(tmp_path) == before

    return run


@contextlib.contextmanager
def refused(*named):
    """Context that ends by an InputError of one line, which has these words."""
    with pytest.raises(InputError) as error:
        yield error
    text = str(error.value)
    assert "\n" not in text
    for words in named:
        assert words in text


LAB = """
import os
import time

import gymnasium
import numpy as np


class Lab(gymnasium.Env):
    '''It is paid for staying near 0. Tests see it play, and slow it down.'''

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
    "threads": 1,
}


def flags(**settings):
    """Settings as a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


LAB_FLAGS = flags(**LAB_SETTINGS)


def lab_config(**settings):
    return Config(**(LAB_SETTINGS | settings))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The folder of the Lab's module and data, found by this process and its children.

    Runs of this process draw no pictures, which would take half of their time.
    """
    (tmp_path / "lab.py").write_text(LAB)
    lab_file(tmp_path / "data.hdf5")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setattr(ciql_pybullet, "plot_returns", lambda run: None)
    return tmp_path
