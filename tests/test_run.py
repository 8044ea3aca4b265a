"""Whole runs, as a user starts them: log, picture, run folder, resuming, other programs."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, hopper_file, run_main

import ciql_pybullet
from ciql_pybullet import CIQL, Config, load_checkpoint, load_policy

SMALL = ["--device", "cpu", "--no-compile", "--hidden-sizes", "8", "8", "--batch-size", "16", "--eval-episodes", "2"]
HOPPER = ["--dataset", "data.hdf5", "--env-id", "HopperBulletEnv-v0", *SMALL]


@pytest.fixture
def start(tmp_path):
    """Starts the script in ``tmp_path``, without a network."""
    hopper_file(tmp_path / "data.hdf5")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HOME": str(tmp_path)}

    def start(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=tmp_path, env=environment, **pipes)

    return start


def run_folder(tmp_path, number=0):
    return sorted((tmp_path / "runs").iterdir())[number]


def metrics(folder):
    """The rows of metrics.csv, but for the speed."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in csv.DictReader(file)]


def test_300_steps(start, tmp_path):
    """The main job in small: what it prints, evaluates and writes."""
    process = start("--max-steps", "300", "--log-interval", "100", "--eval-interval", "150", *SMALL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    assert "argv[0]" not in out and "pybullet build time" not in out
    assert "halfcheetah-bullet-medium-sample.hdf5: 100,100 rows, 100 episodes, mean return 861.8 ± 90.6\n" in out
    assert "100,000 transitions, 0 of them terminations\n" in out
    assert "NOTE   this is not the published halfcheetah-bullet-medium-v0, but re-collected after" in out
    number = r"-?\d+\.\d+"
    losses = rf"step +\d+  V {number}  Q {number}  policy {number}  penalty {number}  mean Q {number}  \d+ steps/s"
    evaluation = rf"step +\d+  return {number} ± {number} over 2 episodes  score {number}"
    assert len(re.findall(losses, out)) == 3
    assert len(re.findall(evaluation, out)) == 2
    assert (tmp_path / "eval_returns.png").read_bytes().startswith(b"\x89PNG")
    folder = run_folder(tmp_path)
    assert [row["step"] for row in metrics(folder)] == ["100", "150", "200", "300"]
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 300
    assert load_checkpoint(folder)["step"] == 300
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob(".*"))

    # the saved policy plays what training saw, to the bit
    last = re.findall(evaluation, out)[-1]
    process = start("--evaluate", str(folder))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.findall(evaluation, out) == [last]
    action = load_policy(folder).act(np.zeros(26, np.float32))
    assert action.shape == (6,) and np.abs(action).max() <= 1


def test_train_can_be_called(tmp_path, capsys):
    """From another program, twice: the same settings give the same numbers."""
    hopper_file(tmp_path / "data.hdf5")
    config = Config(
        dataset="data.hdf5", env_id="HopperBulletEnv-v0", device="cpu", compile=False, hidden_sizes=(8,),
        max_steps=50, eval_interval=20, eval_episodes=3, log_interval=10,
    )  # fmt: skip
    reported = []
    steps, returns = ciql_pybullet.train(config, lambda row, folder: reported.append((row, load_checkpoint(folder))))
    assert steps.tolist() == [20, 40, 50]
    assert [row["step"] for row, _ in reported] == [checkpoint["step"] for _, checkpoint in reported] == [20, 40, 50]
    assert np.allclose([row["return_mean"] for row, _ in reported], returns.mean(1))
    assert returns.shape == (3, 3)
    again = ciql_pybullet.train(config)
    assert np.array_equal(again[1], returns)
    assert metrics(run_folder(tmp_path, 0)) == metrics(run_folder(tmp_path, 1))


def test_importing_has_no_side_effects(tmp_path):
    code = (
        "import sys, threading, torch; before = torch.get_rng_state(); import ciql_pybullet;"
        "assert not {'pybullet', 'gymnasium', 'matplotlib', 'tyro', 'tensorboard', 'torch._dynamo'} & set(sys.modules);"
        "assert threading.active_count() == 1 and torch.equal(before, torch.get_rng_state())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_two_runs_in_one_second_have_two_folders(tmp_path):
    config = Config(out_dir=tmp_path / "runs", device="cpu", hidden_sizes=(4,))
    agent = CIQL(26, 6, config)
    folders = {ciql_pybullet.Run(config, agent, None).folder.name for _ in range(3)}
    assert len(folders) == 3 and all(name.startswith("halfcheetah-bullet-medium-v0-seed0-20") for name in folders)


# ---------------------------------------------------------------------------------------------- resuming


def test_settings_of_an_older_run_can_be_read():
    """A setting that the run's version did not have takes its default, one that is gone is left out."""
    config = Config(tau=0.9, hidden_sizes=(8, 9), plot=Path("p.png"))
    values = json.loads(ciql_pybullet.SETTINGS.dump_json(config)) | {"seeds": [], "ray_address": None}
    del values["threads"]
    assert ciql_pybullet.SETTINGS.validate_json(json.dumps(values)) == config


LONG = [*HOPPER, "--eval-episodes", "1", "--max-steps", "600", "--eval-interval", "100", "--log-interval", "35"]


def parent_of(pid):
    """The parent of a process; None if it is gone, or has ended and waits to be reaped."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def children_of(pid):
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and parent_of(entry) == pid]


def gone(pid):
    """Wait for a process to end."""
    for _ in range(100):
        if parent_of(pid) is None:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_killed_and_stopped_runs_resume_to_the_same_bits(start, tmp_path, monkeypatch, capsys):
    """SIGKILL at random moments, SIGINT and SIGTERM, against the run that was never stopped."""
    rng = np.random.default_rng()
    process = start(*LONG)
    out, err = process.communicate()
    assert process.returncode == 0, err
    whole = run_folder(tmp_path)

    resume = LONG
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(*resume)
        evaluations = 0
        for line in process.stdout:  # once past a checkpoint ...
            evaluations += "episodes  score" in line
            if evaluations == (2 if number == signal.SIGKILL else 1):
                break
        time.sleep(rng.uniform(0, 0.3))  # ... at any moment
        children = children_of(process.pid)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == code, (out, err)
        assert number == signal.SIGKILL or err == ""
        assert all(gone(child) for child in children)
        if number != signal.SIGKILL:
            assert "go on with --resume" in out
        folder = run_folder(tmp_path, 1)
        assert 0 < load_checkpoint(folder)["step"] < 600
        resume = ["--resume", str(folder)]
    process = start(*resume)
    out, err = process.communicate()
    assert process.returncode == 0, err

    assert metrics(folder) == metrics(whole)
    one, other = load_checkpoint(whole), load_checkpoint(folder)
    for name in ("policy", "value", "critic", "target_critic"):
        for key, weight in one["agent"][name].items():
            assert torch.equal(weight, other["agent"][name][key]), (name, key)
    for name in ("exp_avgs", "exp_avg_sqs", "adam_steps"):
        assert all(torch.equal(a, b) for a, b in zip(one["agent"][name], other["agent"][name], strict=True))
    assert torch.equal(one["random_state"], other["random_state"])

    for arguments, cause in (
        (["--tau", "0.9"], "tau 0.9 (was 0.8)"),
        (["--max-steps", "100"], f"max_steps is 100, but {folder} is at step 600; raise it"),
        (["--max-steps", "900"], "data.hdf5 is not the data that"),
    ):
        if "not the data" in cause:
            hopper_file(tmp_path / "data.hdf5", rewards=np.zeros(132))
        code, _, error = run_main(monkeypatch, capsys, ["--resume", str(folder), *arguments])
        assert code == 2 and cause in error and error.count("\n") == 1
    assert metrics(folder) == metrics(whole)
