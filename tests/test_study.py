"""Studies: what runs they are made of, their methods, and how they stop, go on and grow."""

import hashlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import variants
from conftest import LAB_SETTINGS, flags, lab_file, metrics, snapshot

import ciql_pybullet as ciql
import study

PUBLISHED = ciql.Config.dataset  # of which there is a sample
OWN = ("dataset", "threads")  # of these a study has its own
LAB = flags(**{name: value for name, value in LAB_SETTINGS.items() if name not in OWN})
DATA = ["--datasets", "data.hdf5", *LAB, "--eval-episodes", "1"]


def test_grid():
    """Data sets x methods x settings x seeds; settings with a comma between vary together."""
    command = ["--datasets", PUBLISHED, "m#y\n.hdf5", "--env-id", "HopperBulletEnv-v0"]
    command += ["--seeds", "3", "4", "--methods", "IQL", "AveragedPolicy", "--lr", "0.1"]
    command += ["--grid", "alpha,clamp_advantage", "0,False", "1,True"]
    command += ["--grid", "hidden_sizes", "8 9", "--grid", "min_log_std", "-5"]
    _, runs = study.parse(command)
    cells = [(0, False), (1, True)]
    axes = itertools.product(("IQL", "AveragedPolicy"), cells, (PUBLISHED, "m#y\n"), (3, 4))
    for run, (method, (alpha, clamp), dataset, seed) in zip(runs.values(), axes, strict=True):
        config = run.config
        assert (config.alpha, config.clamp_advantage, config.seed) == (alpha, clamp, seed)
        assert (config.lr, config.hidden_sizes, config.threads) == (0.1, (8, 9), 1)
        assert config.policy_lr_decay == (method == "IQL")
        assert (run.row["dataset"], Path(config.dataset).stem) == (dataset, dataset)
        assert config.env_id == ("" if dataset == PUBLISHED else "HopperBulletEnv-v0")
        assert re.fullmatch(r"[\w.+-]+", config.name)
        label = f"{method} alpha={alpha} clamp_advantage={clamp} hidden_sizes=8 9 min_log_std=-5"
        assert (run.method, run.row["method"]) == (method, label)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--grid", "alpha", "0", "-1"], "alpha is -1.0, but must be from 0"),
        (["--grid", "alpha,beta", "0,1", "1"], "--grid alpha,beta 0,1 1 needs values"),
        (["--methods", "CIQL", "Mine"], "Mine is none of the methods CIQL, IQL, cloning"),
        (["--methods", "CIQL", "IQL", "--alpha", "2"], "--alpha 2.0 would make IQL another"),
        ([*DATA, "--device", "cpu", "--threads", "5"], "the largest node has 4 cores; lower it"),
    ],
)
def test_bad_study(monkeypatch, fails, lab, arguments, named):
    """One line, exit code 2, before anything is trained; nothing is left behind."""
    trained_here(monkeypatch)
    monkeypatch.setattr(study, "train_runs", lambda runs, share: pytest.fail("trained"))
    fails(*arguments, named=named, main=study.main)


NODES = [{"Alive": True, "Resources": {"CPU": cores}} for cores in (2.0, 4.0)]


def trained_here(monkeypatch):
    """Have studies train in this process, one run after another, without Ray."""

    def train_runs(runs, gpu_share):
        for run in runs:
            run.row["error"] = study.train_run(run)

    monkeypatch.setattr(study, "start_ray", lambda address: None)
    monkeypatch.setattr(study.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(study, "train_runs", train_runs)
    monkeypatch.setattr(study, "draw", lambda folder: None)


def rows_of(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


@pytest.fixture
def study_here(lab, monkeypatch, command):
    """A function that runs a study without Ray in the folder "s", as ``command`` does."""
    trained_here(monkeypatch)
    return lambda *arguments: command(*arguments, "--study", "s", main=study.main)


def test_a_run_of_a_study_is_what_it_is_alone(lab, study_here, command):
    """To the bit, and the tables have its figures."""
    assert study_here(*DATA)[0] == 0
    (row,) = rows_of(lab / "s" / "summary.csv")
    assert list(row) == [*study.KEYS, *study.COLUMNS]
    rows = assert_is_as_alone(command, lab / "s" / row["folder"])
    returns = [float(row["return_mean"]) for row in rows if row["return_1"]]
    curve = rows_of(lab / "s" / "curves.csv")
    assert [float(row["return_mean"]) for row in curve] == returns
    assert float(row["final_return"]) == pytest.approx(np.mean(returns))
    text = Path(ciql.__file__).read_bytes()
    assert row["version"] == hashlib.sha256(text).hexdigest()[:8]
    assert (row["score"], row["evaluations"]) == ("", "2")


def test_a_study_grows(lab, study_here):
    """Another command may name new runs alone: others stay as they are, complete or failed."""
    lab_file(lab / "bad.hdf5", rewards=1e30 * (np.arange(31) % 11 != 0))
    code, out, error = study_here("--datasets", "data.hdf5", "bad.hdf5", *DATA[2:])
    assert (code, error) == (1, "") and "study  2 runs, 2 of them to train" in out
    assert "\nFAILED bad, CIQL, seed 0: FloatingPointError: " in out
    assert "Traceback" in (lab / "s" / "bad-CIQL-seed0.log").read_text()
    before = rows_of(lab / "s" / "summary.csv")
    files = snapshot(lab / "s" / "data-CIQL-seed0")

    code, out, error = study_here("--methods", "cloning", "AveragedPolicy", "--seeds", "1", *DATA)
    assert (code, error) == (0, "") and "study  2 runs, 2 of them to train" in out
    rows = rows_of(lab / "s" / "summary.csv")
    assert rows[:2] == before and snapshot(lab / "s" / "data-CIQL-seed0") == files
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "complete"]
    assert [row["method"] for row in rows[1:]] == ["CIQL", "cloning", "AveragedPolicy"]
    facts = [ciql.load_checkpoint(lab / "s" / row["folder"])["facts"] for row in rows[2:]]
    assert [each["agent"] for each in facts] == ["CIQL", "AveragedPolicy"]


def test_a_complete_study(lab, study_here, monkeypatch, fails):
    """Nothing is trained again. A command that would change a run, or lose one, is refused."""
    assert study_here(*DATA)[0] == 0
    monkeypatch.setattr(study, "start_ray", lambda address: pytest.fail("started"))
    before = snapshot(lab / "s")
    code, out, _ = study_here(*DATA, "--threads", "2")
    assert code == 0 and "study  1 runs, 0 of them to train" in out
    assert snapshot(lab / "s") == before

    again = [*DATA, "--study", "s"]
    for changed in (["--lr", "0.1"], ["--eval-interval", "10"], ["--max-steps", "80"]):
        for seed in ("0", "1"):  # another seed would be averaged with those that are there
            cause = f"data-CIQL-seed{seed} has {changed[0][2:].replace('-', '_')} {changed[1]}"
            fails(*again, *changed, "--seeds", seed, named=cause, main=study.main)
    lab_file(lab / "data.hdf5", rewards=np.arange(31) % 11 != 0)
    fails(*again, named="data-CIQL-seed0 has data of checksum", main=study.main)
    shutil.move(lab / "s" / "data-CIQL-seed0", lab / "elsewhere")
    fails(*again, named="data-CIQL-seed0 is gone; put it back", main=study.main)


def assert_is_as_alone(command, folder, *settings):
    """A run of a study has the metrics of the same run alone, which are returned."""
    arguments = [*LAB, "--eval-episodes", "1", "--dataset", "data.hdf5", "--threads", "1"]
    code, _, error = command(*arguments, *settings, "--name", folder.name)
    assert code == 0, error
    rows = metrics(folder)
    assert metrics(Path("runs", folder.name)) == rows
    return rows


def test_the_sample_is_named_and_found_once(lab, study_here, monkeypatch, no_network):
    """Without a network: the note comes once, tables say that the data are re-collected."""
    monkeypatch.setattr(ciql, "play_episode", lambda *arguments: 1.0)
    settings = {name: value for name, value in LAB_SETTINGS.items() if name not in (*OWN, "env_id")}
    code, out, _ = study_here(*flags(**settings | {"max_steps": 20}), "--seeds", "0", "1")
    assert code == 0 and out.count("could not be downloaded") == len(no_network) == 1
    rows = rows_of(lab / "s" / "summary.csv")
    assert {row["dataset"] for row in rows} == {f"{PUBLISHED} (re-collected)"}


def test_methods():
    """IQL's recipe is that of its paper; all are settings of the script and agents of it."""
    settings = {"alpha": 0, "beta": 3, "tau": 0.7, "clamp_advantage": False}
    settings["policy_lr_decay"] = True
    assert variants.METHODS["IQL"].settings == settings
    _, runs = study.parse(["--methods", *variants.METHODS])
    for run, (name, method) in zip(runs.values(), variants.METHODS.items(), strict=True):
        assert (run.method, run.row["method"]) == (name, name)
        expected = vars(ciql.Config()) | method.settings
        for setting in expected.keys() - ciql.NEUTRAL_SETTINGS:
            assert getattr(run.config, setting) == expected[setting], setting


@pytest.mark.slow
def test_stopped_and_gone_on_with(lab, monkeypatch, command):
    """A queue's SIGTERM, then a run more. Each run is what it is alone, to the bit."""
    settings = ["--max-steps", "200", "--eval-interval", "40"]
    process = [sys.executable, study.__file__, *DATA, *settings, "--study", "s", "--seeds", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    folders = [lab / "s" / f"data-CIQL-seed{seed}" for seed in (0, 1)]
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    with subprocess.Popen(process, start_new_session=True, **pipes) as stopped:
        while not (folders[0] / "checkpoint.pt").exists():
            assert stopped.poll() is None
            time.sleep(0.1)
        os.killpg(stopped.pid, signal.SIGTERM)
        out, error = stopped.communicate(timeout=100)
    assert (stopped.returncode, error) == (130, ""), out
    assert out.endswith("stopped; go on with the same command\n")
    (row,) = rows_of(lab / "s" / "summary.csv")
    assert row["state"] == "incomplete" and 40 <= int(row["step"]) < 200

    monkeypatch.delenv("LAB_PAUSE")
    again = subprocess.run([*process, "1"], check=False, timeout=400, **pipes)
    assert (again.returncode, again.stderr) == (0, ""), again.stdout
    assert "2 of them to train" in again.stdout and "seed1 is complete" in again.stdout
    assert f"from step {row['step']}\n" in folders[0].with_suffix(".log").read_text()
    for seed, folder in enumerate(folders):
        assert_is_as_alone(command, folder, *settings, "--seed", seed)
