"""Files and settings the tests share."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "ciql_pybullet.py"
SAMPLE_ID = "halfcheetah-bullet-medium-v0"
SAMPLE = ROOT / "data" / "halfcheetah-bullet-medium-sample.hdf5"
sys.path.insert(0, str(ROOT))

import ciql_pybullet


def episode(steps, first, observation_dim=2, action_dim=1, closed=True):
    """Rows of one episode in d4rl-pybullet's layout, every number of them told apart by ``first``."""
    rows = steps + closed
    observations = first + np.arange(rows)[:, None] + np.arange(observation_dim) / 10
    actions = np.tile((np.arange(rows)[:, None] + 1) / (rows + 1), action_dim)
    rewards = 1000.0 + first + np.arange(rows)  # the reward in row i came with observation i
    rewards[0] = 0
    terminals = np.zeros(rows)
    if closed:
        actions[-1], terminals[-1] = 0, 1
    return {"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals}


def write_file(path, *episodes, two_dimensional=False, **replaced):
    """Write ``episodes`` to an HDF5 file; ``replaced`` columns stand in for theirs, None leaves one out."""
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]} | replaced
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            if column is not None:
                column = np.asarray(column, np.float32)
                file[key] = column[:, None] if two_dimensional and column.ndim == 1 else column
    return path


def hopper_file(path, **replaced):
    """A small file that fits HopperBulletEnv-v0: episodes that fell, one cut."""
    rng = np.random.default_rng(0)
    episodes = [episode(steps, 0, 15, 3, closed) for steps, closed in ((40, True), (60, True), (30, False))]
    for e in episodes:
        e["observations"] = rng.normal(size=e["observations"].shape)
    return write_file(path, *episodes, **replaced)


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


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Keep the tests away from the user's own data sets, and from the network."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
