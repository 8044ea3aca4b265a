"""Studies: what runs they are made of, their statistics, and a cluster that loses a node."""

import contextlib
import csv
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SAMPLE_ID, hopper_file, run_main
from test_run import children_of, metrics
from torch.nn.utils import parameters_to_vector

import ciql_pybullet

sys.path.insert(0, str(ROOT / "study"))
import variants

import study
from study import iqm, with_interval

TINY = ["--device", "cpu", "--no-compile", "--hidden-sizes", "8", "--batch-size", "16", "--eval-episodes", "1"]
HOPPER = ["--env-id", "HopperBulletEnv-v0", "--threads", "1", *TINY]


# -------------------------------------------------------------------------------------------- statistics


def test_iqm():
    rng = np.random.default_rng(0)
    for n, cut in ((3, 0), (4, 1), (7, 1), (8, 2), (10, 2)):
        values = rng.normal(size=(n, 5))
        expected = np.sort(values, 0)[cut : n - cut].mean(0)
        assert np.allclose(iqm(values, axis=0), expected)


def every_resample(values):
    return [np.array(sample) for sample in itertools.product(values, repeat=len(values))]


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_interval_is_of_the_stratified_bootstrap(statistic):
    """Against the bootstrap's exact distribution, by enumeration: seeds are resampled within each data set only."""
    strata = [np.array([1.0, 2.0, 6.0, 7.5]), np.array([110.0, 100.0, 103.0])]
    value, low, high = with_interval(strata, statistic)
    both = itertools.product(*map(every_resample, strata))
    exact = np.percentile([statistic(np.concatenate(samples)) for samples in both], [2.5, 97.5])
    assert value == statistic(np.concatenate(strata))
    spread = np.ptp(exact)
    assert abs(low - exact[0]) < 0.08 * spread and abs(high - exact[1]) < 0.08 * spread


def test_intervals_of_a_curve_are_those_of_its_points():
    returns = np.random.default_rng(0).normal(size=(5, 3))  # seeds, evaluations
    value, low, high = with_interval([returns], np.mean)
    for e in range(3):
        exact = np.percentile([sample.mean() for sample in every_resample(returns[:, e])], [2.5, 97.5])
        assert value[e] == pytest.approx(returns[:, e].mean())
        assert np.allclose([low[e], high[e]], exact, atol=0.1 * np.ptp(exact))


def test_one_seed_has_no_interval():
    value, low, high = with_interval([np.array([3.0])], np.mean)
    assert value == 3 and np.isnan(low) and np.isnan(high)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_summarize_pairs_the_seeds(tmp_path, capsys):
    """The difference is of runs of the same seed: its interval is narrow where seeds differ more than settings do."""
    returns = {"alpha=0": [100.0, 500.0, 900.0], "alpha=1": [111.0, 510.0, 912.0]}
    common = {"dataset": "hopper-bullet-medium-v0", "env_id": "HopperBulletEnv-v0", "data_return": 800.0}
    summary, curves = [], []
    for label, values in returns.items():
        for seed, value in enumerate(values):
            own = common | {"label": label, "seed": seed}
            score = 100 * (value - 18.6) / (2500 - 18.6)
            summary.append(
                own | {"state": "complete", "final_return": value, "score": score, "folder": "", "error": ""}
            )
            curves += [own | {"step": step, "return_mean": value + step} for step in (10, 20)]
    failed = common | {"label": "alpha=1", "seed": 3, "state": "failed", "folder": "a-run", "error": "its error"}
    pd.DataFrame([*summary, failed]).to_csv(tmp_path / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(tmp_path / "curves.csv", index=False)
    study.summarize(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"^alpha=0 +3 +500\.0 \[100\.0, 900\.0\] ", out, re.MULTILINE)
    assert re.search(r"^alpha=1 +3 +511\.0 \[111\.0, 912\.0\] .* 11\.0 \[10\.\d, 12\.0\]$", out, re.MULTILINE)
    assert "FAILED a-run: its error" in out
    for picture in ("study_returns.png", "study_scores.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------- what it is made of


def test_grid():
    """Data sets x settings x seeds; settings with a comma between them vary together."""
    flags = ["--datasets", SAMPLE_ID, "my.hdf5", "--env-id", "HopperBulletEnv-v0", "--seeds", "3", "4", "--lr", "0.1"]
    _, runs = study.parse([*flags, "--grid", "alpha,beta", "0,3", "1,1", "--grid", "hidden_sizes", "8 9"])
    assert len(runs) == 2 * 2 * 2
    for run, (dataset, (alpha, beta), seed) in zip(
        runs.values(), itertools.product((SAMPLE_ID, "my"), ((0, 3), (1, 1)), (3, 4)), strict=True
    ):
        config = study.ciql.SETTINGS.validate_json(run["settings"])
        assert (config.alpha, config.beta, config.seed, config.lr) == (alpha, beta, seed, 0.1)
        assert config.hidden_sizes == (8, 9) and config.threads == 1
        assert run["dataset"] == dataset and Path(config.dataset).stem == dataset
        assert config.robot.env_id == ("HopperBulletEnv-v0" if dataset == "my" else "HalfCheetahBulletEnv-v0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--grid", "alfa", "0", "1"], "--alfa"),
        (["--grid", "alpha", "0", "-1"], "alpha must be greater than or equal to 0"),
        (["--grid", "alpha"], "--grid alpha needs values"),
        (["--grid", "alpha,beta", "0", "1"], "--grid alpha,beta needs values"),
        (["--seeds", "0", "1", "0"], "two runs of the study are the same"),
        (["--seeds", "0", "-1"], "seed must be greater"),
        (["--seeds"], "--seeds"),
        (["--datasets", "mine.hdf5"], "an .hdf5 file, with env_id"),
        (["--datasets", "not-there.hdf5", "--env-id", "HopperBulletEnv-v0"], "not-there.hdf5: cannot be read"),
        (["--datasets", "hopper-bullet"], "dataset is hopper-bullet"),
        (["--study", "a_file/s", "--datasets", "good.hdf5", *HOPPER], "a_file"),
        (["--evaluate", "nothing"], "nothing/config.json"),
        (["--summarize", "nothing"], "nothing cannot be summarised"),
        (["--no-such-setting", "1"], "--no-such-setting"),
    ],
)
def test_bad_study(monkeypatch, capsys, tmp_path, arguments, named):
    """One line, exit code 2, before anything starts."""
    (tmp_path / "a_file").write_text("")
    hopper_file(tmp_path / "good.hdf5")
    monkeypatch.setattr(study, "start_ray", lambda own: pytest.fail("started"))
    code, _, error = run_main(monkeypatch, capsys, arguments, study.main)
    assert (code, error.count("\n")) == (2, 1) and named in error


# -------------------------------------------------------------------------------------------------- variants


def steps_of(kind, n=10):
    """The policy's weights before and after each of n steps of a small agent."""
    torch.manual_seed(0)
    agent = kind(4, 2, ciql_pybullet.Config(device="cpu", hidden_sizes=(8,), batch_size=16, max_steps=n))
    data = ciql_pybullet.Transitions(*(torch.randn(50, *size) for size in ((4,), (2,), (), (4,), ())))
    history = [parameters_to_vector(agent.policy.parameters()).detach().clone()]
    for _ in range(n):
        agent.step(data)
        history.append(parameters_to_vector(agent.policy.parameters()).detach().clone())
    return agent, torch.stack(history)


def test_falling_policy_rate():
    """Of the policy alone: the first step is nearly the plain one, the last one is none."""
    agent, plain = steps_of(ciql_pybullet.CIQL)
    other, falling = steps_of(variants.FallingPolicyRate)
    lengths = falling.diff(dim=0).norm(dim=1)
    assert lengths[0] / plain.diff(dim=0).norm(dim=1)[0] == pytest.approx((1 + np.cos(0.1 * np.pi)) / 2, rel=1e-3)
    assert lengths[9] == 0
    for one, same in zip(agent.critic.parameters(), other.critic.parameters(), strict=True):
        assert torch.equal(one, same)


def test_averaged_policy():
    agent, history = steps_of(variants.AveragedPolicy)
    expected = history[0]
    for weights in history[1:]:
        expected = expected + 0.001 * (weights - expected)
    torch.testing.assert_close(parameters_to_vector(agent.average.parameters()), expected, rtol=1e-5, atol=1e-7)


def test_shifted_rewards(tmp_path):
    rows, _ = ciql_pybullet.read_rows(hopper_file(tmp_path / "data.hdf5"))
    shifted = variants.shifted_rewards(rows).rewards.numpy()
    start = np.flatnonzero(rows["terminals"][:-1] == 0)
    assert np.array_equal(shifted, rows["rewards"][start])
    assert not np.array_equal(shifted, ciql_pybullet.read_transitions(rows).rewards)


# ------------------------------------------------------------------------------------------------- with Ray


def run_study(tmp_path, *arguments):
    """Run a study as a user does: exit code, stdout and stderr."""
    command = [sys.executable, ROOT / "study" / "study.py", *arguments]
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


def run_folder_of(tmp_path, name):
    (folder,) = tmp_path.glob(f"s/tune/{name}/checkpoint_*/*/")
    return folder


def test_a_failing_run_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    """It is named with its error; what is complete is not done twice; a run is what it is alone, to the bit."""
    hopper_file(tmp_path / "good.hdf5")
    hopper_file(tmp_path / "bad.hdf5", rewards=np.full(132, 1e30))  # whose squares are infinite
    short = [*HOPPER, "--eval-interval", "20", "--log-interval", "5", "--max-steps", "40"]
    command = [*short, "--datasets", "bad.hdf5", "good.hdf5", "--grid", "tau", "0.7", "0.9", "--study", "s"]
    code, out, err = run_study(tmp_path, *command)
    assert code == 1, out + err
    error = "a loss or weight became NaN or infinite up to step 5; lower lr"
    assert f"FAILED tune/bad-tau0.7-seed0: {error}" in out and f"FAILED tune/bad-tau0.9-seed0: {error}" in out
    summary = rows_of(tmp_path / "s" / "summary.csv")
    assert [(row["dataset"], row["tau"], row["state"]) for row in summary] == [
        ("bad", "0.7", "failed"), ("bad", "0.9", "failed"), ("good", "0.7", "complete"), ("good", "0.9", "complete"),
    ]  # fmt: skip

    single = [*short, "--dataset", "good.hdf5", "--tau", "0.9"]
    assert run_main(monkeypatch, capsys, single)[0] == 0
    (alone,) = (tmp_path / "runs").iterdir()
    assert metrics(alone) == metrics(run_folder_of(tmp_path, "good-tau0.9-seed0"))
    evaluated = [float(row["return_mean"]) for row in metrics(alone) if row["return_mean"]]
    assert float(summary[3]["final_return"]) == pytest.approx(np.mean(evaluated), abs=1e-9)
    assert float(summary[3]["score"]) == pytest.approx(100 * (np.mean(evaluated) - 18.6) / (2500 - 18.6), abs=1e-9)
    curves = [row for row in rows_of(tmp_path / "s" / "curves.csv") if row["label"] == "tau=0.9"]
    assert [float(row["return_mean"]) for row in curves if row["dataset"] == "good"] == evaluated

    log = (tmp_path / "s" / "tune" / "good-tau0.9-seed0" / "log.txt").read_text()
    assert "return" in log and "train:" not in log  # no progress bar

    before = run_folder_of(tmp_path, "good-tau0.9-seed0").stat()
    code, again, _ = run_study(tmp_path, *command)
    assert code == 1 and "good, return" in again
    assert run_folder_of(tmp_path, "good-tau0.9-seed0").stat() == before
    code, _, err = run_study(tmp_path, *command, "--lr", "0.1")
    assert (code, err.count("\n")) == (2, 1) and "other settings or data" in err


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, seconds=90):
    for _ in range(10 * seconds):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of two nodes, a core each: its address, and the process of the second node."""
    for name, value in {"AUTH_MODE": "token", "AUTH_TOKEN": uuid.uuid4().hex, "USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    own = (["--head", "--include-dashboard=false", f"--port={port}"], [f"--address=127.0.0.1:{port}"])
    nodes = []
    for n, arguments in enumerate(own):
        with open(tmp_path.parent / f"node{n}.txt", "w") as log:
            nodes.append(subprocess.Popen([*ray, *arguments], cwd="/", stdout=log, stderr=log))
        wait_for(lambda n=n: "Ray runtime started" in (tmp_path.parent / f"node{n}.txt").read_text())
    yield f"127.0.0.1:{port}", nodes[1]
    for node in reversed(nodes):
        node.terminate()
        node.wait()


def descendants(pid):
    return [pid, *(d for child in children_of(pid) for d in descendants(child))]


def working_in(pid):
    """The folder that a process works in."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cwd").resolve()
    return Path()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_a_cluster_loses_a_node(cluster, monkeypatch, capsys, tmp_path):
    """2 settings x 2 seeds on two nodes; a raylet is killed on the way, and its run goes on from its checkpoint."""
    address, second = cluster
    hopper_file(tmp_path / "a.hdf5")
    short = [*HOPPER, "--max-steps", "3000", "--eval-interval", "1000", "--log-interval", "500"]
    arguments = ["--datasets", "a.hdf5", "--grid", "alpha", "0", "1", "--seeds", "0", "1", "--study", "s"]
    command = [sys.executable, ROOT / "study" / "study.py", *short, *arguments, "--ray-address", address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(command, cwd=tmp_path, **pipes)

    def lost():
        """A run on the second node that has a checkpoint but is not complete."""
        names = {working_in(pid).name for pid in descendants(second.pid)}
        return {path.parent.name for path in tmp_path.glob("s/tune/a-*/checkpoint_000000") if path.parent.name in names}

    (name,) = wait_for(lost)
    (raylet,) = (pid for pid in descendants(second.pid) if "raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(raylet, signal.SIGKILL)
    out, err = driver.communicate()
    assert driver.returncode == 0, out + err
    log = (tmp_path / "s" / "tune" / name / "log.txt").read_text()
    assert re.search(r"^run .* from step [12],000$", log, re.MULTILINE), log
    for alpha, seed in itertools.product((0, 1), (0, 1)):
        single = ["--dataset", "a.hdf5", "--alpha", str(alpha), "--seed", str(seed), "--out-dir", f"{alpha}{seed}"]
        assert run_main(monkeypatch, capsys, [*short, *single])[0] == 0
        (folder,) = (tmp_path / f"{alpha}{seed}").iterdir()
        assert metrics(folder) == metrics(run_folder_of(tmp_path, f"a-alpha{alpha}-seed{seed}"))
