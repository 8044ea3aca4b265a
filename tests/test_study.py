"""Studies: seeds and data sets in one command, their statistics, and a cluster that loses a node."""

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
import pytest
from conftest import SCRIPT, hopper_file, run_main
from test_run import children_of, metrics, run_folder

import ciql_pybullet
from ciql_pybullet import Config, Run, Study, iqm, with_interval

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


def test_final_return_is_the_mean_of_the_last_ten_evaluations():
    study, run = object.__new__(Study), Run(Config(), Path("run"), Path("data"))
    returns = np.arange(12.0) ** 2
    study.curves = {run: (np.arange(12), returns)}
    value = sum(n * n for n in range(2, 12)) / 10
    assert study.final(run) == pytest.approx((value, 100 * (value + 1304) / 4304))


# ------------------------------------------------------------------------------------ without Ray, and again


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_without_ray_one_after_the_other(monkeypatch, capsys, tmp_path):
    """A failing run does not stop the others; the same command again does what is left, to the bits of single runs."""
    hopper_file(tmp_path / "good.hdf5")
    hopper_file(tmp_path / "bad.hdf5", rewards=np.full(132, 1e30))  # whose squares are infinite
    monkeypatch.setitem(sys.modules, "ray", None)
    short = [*HOPPER, "--eval-interval", "20", "--log-interval", "5"]
    command = [*short, "--datasets", "bad.hdf5", "good.hdf5", "--seeds", "0", "1", "--study", "s"]

    code, out, err = run_main(monkeypatch, capsys, [*command, "--max-steps", "20"])
    assert (code, err) == (1, "")
    assert "NOTE   ray is not installed" in out
    last = out[out.index("return: mean") :]
    for seed in (0, 1):
        assert f"FAILED bad-seed{seed}: q_loss became inf within the 5 steps up to step 5; lower lr" in last
    summary = rows_of(tmp_path / "s" / "summary.csv")
    assert [(row["dataset"], row["seed"], row["state"]) for row in summary] == [
        ("bad.hdf5", "0", "failed"), ("bad.hdf5", "1", "failed"),
        ("good.hdf5", "0", "complete"), ("good.hdf5", "1", "complete"),
    ]  # fmt: skip
    assert "lower lr" in summary[0]["error"]
    for picture in ("eval_returns.png", "study_scores.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    # resumed, then skipped
    hopper_file(tmp_path / "bad.hdf5")
    code, out, err = run_main(monkeypatch, capsys, [*command, "--max-steps", "30"])
    assert (code, err) == (0, "")
    assert re.findall(r"run .*/(\w+-seed\d) from step 20, cpu \(1 threads\)", out) == ["good-seed0", "good-seed1"]
    before = (tmp_path / "s" / "good-seed0" / "metrics.csv").read_bytes()
    code, out, err = run_main(monkeypatch, capsys, [*command, "--max-steps", "30"])
    assert (code, err) == (0, "")
    assert "4 runs, 4 of them complete" in out and "steps/s" not in out
    assert (tmp_path / "s" / "good-seed0" / "metrics.csv").read_bytes() == before

    # the figures of the table are those of the runs, which are those of single runs
    single = [*short, "--dataset", "good.hdf5", "--seed", "1", "--max-steps", "30"]
    assert run_main(monkeypatch, capsys, single)[0] == 0
    assert metrics(run_folder(tmp_path)) == metrics(tmp_path / "s" / "good-seed1")
    means = []
    for seed in (0, 1):
        rows = metrics(tmp_path / "s" / f"good-seed{seed}")
        means.append(np.mean([float(row["return_mean"]) for row in rows if row["return_mean"]]))
        row = rows_of(tmp_path / "s" / "summary.csv")[2 + seed]
        assert float(row["final_return"]) == pytest.approx(means[seed], abs=1e-9)
        assert float(row["score"]) == pytest.approx(100 * (means[seed] - 18.6) / (2500 - 18.6), abs=1e-9)
    (line,) = (line for line in out.splitlines() if line.startswith("good.hdf5"))
    assert line.split()[:3] == ["good.hdf5", "2", f"{np.mean(means):.1f}"]

    # other settings are refused, and nothing is touched
    code, out, err = run_main(monkeypatch, capsys, [*command, "--max-steps", "30", "--tau", "0.9"])
    assert (code, err.count("\n")) == (2, 1) and "tau 0.9 (was 0.8)" in err


def test_one_seed_and_one_data_set_are_the_plain_job(monkeypatch, capsys, tmp_path):
    hopper_file(tmp_path / "good.hdf5")
    arguments = [*HOPPER, "--max-steps", "2", "--datasets", "good.hdf5", "--seeds", "3"]
    code, out, err = run_main(monkeypatch, capsys, arguments)
    assert (code, err) == (0, "") and "study" not in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("good-seed3-")


def test_two_processes_cannot_work_on_one_study(tmp_path):
    refused = pytest.raises(ciql_pybullet.InputError, match="worked on by another process")
    with ciql_pybullet.owned(tmp_path / "s"), refused, ciql_pybullet.owned(tmp_path / "s"):
        pass


# ----------------------------------------------------------------------------------------------- with Ray


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, seconds=60):
    for _ in range(10 * seconds):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of two nodes, a core each; the second does not see ``tmp_path``, where that can be arranged."""
    pytest.importorskip("ray")
    for name, value in {"AUTH_MODE": "token", "AUTH_TOKEN": uuid.uuid4().hex, "USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    hide = f"mount -t tmpfs none {tmp_path} && "
    can_hide = subprocess.run(["unshare", "-m", "sh", "-c", f"{hide}true"], check=False, capture_output=True)
    hidden = ["unshare", "-m", "sh", "-c", f'{hide}exec "$@"', "sh"] if can_hide.returncode == 0 else []
    commands = [
        [*ray, "--head", "--include-dashboard=false", f"--port={port}"],
        [*hidden, *ray, f"--address=127.0.0.1:{port}"],
    ]
    nodes = []
    for n, command in enumerate(commands):
        path = tmp_path.parent / f"node{n}.txt"
        with open(path, "w") as log:
            nodes.append(subprocess.Popen(command, cwd="/", stdout=log, stderr=log))
    try:
        for n in range(2):
            wait_for(lambda n=n: "Ray runtime started" in (tmp_path.parent / f"node{n}.txt").read_text())
        yield f"127.0.0.1:{port}", nodes[1], bool(hidden)
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait()


def processes(*words):
    """Processes whose command line holds all ``words``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            found += [int(entry.name)] if all(word in line for word in words) else []
    return found


def descendants(pid):
    return [pid, *(d for child in children_of(pid) for d in descendants(child))]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_a_cluster_loses_a_node_and_a_process(cluster, monkeypatch, capsys, tmp_path):
    """2 seeds x 2 data sets on two nodes; a raylet and a run are killed on the way, and nothing is lost."""
    address, second, hidden = cluster
    for name in ("a", "b"):
        hopper_file(tmp_path / f"{name}.hdf5", **({"rewards": np.ones(132)} if name == "b" else {}))
    short = [*HOPPER, "--max-steps", "600", "--eval-interval", "300", "--log-interval", "100"]
    arguments = ["--datasets", "a.hdf5", "b.hdf5", "--seeds", "0", "1", "--study", "s", "--ray-address", address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen([sys.executable, SCRIPT, *short, *arguments], cwd=tmp_path, **pipes)

    def nodes():
        """The node of each run that has a checkpoint but is not complete."""
        found = {}
        for log in (tmp_path / "s").glob("*/log.txt"):
            if (log.parent / "checkpoint.pt").exists() and "final" not in log.read_text():
                found[log.parent.name] = re.findall("^node .*, (.*)$", log.read_text(), re.MULTILINE)[-1]
        return found

    (raylet,) = set(processes("raylet/raylet")) & set(descendants(second.pid))
    node = re.search(r"--node_id=(\w+)", Path(f"/proc/{raylet}/cmdline").read_text())[1]
    before = wait_for(lambda: node in (now := nodes()).values() and now)
    os.kill(raylet, signal.SIGKILL)
    for pid in processes("ciql_pybullet.work", str(tmp_path / "s")):
        os.kill(pid, signal.SIGKILL)
    out, err = driver.communicate()
    assert (driver.returncode, err) == (0, "")
    for run in before:
        assert re.search(rf"^retry  {run} from step 300: ", out, re.MULTILINE)
        assert re.search(r"^run .* from step 300, ", (tmp_path / "s" / run / "log.txt").read_text(), re.MULTILINE)
    for dataset, seed in itertools.product(("a", "b"), (0, 1)):
        single = [*short, "--dataset", f"{dataset}.hdf5", "--seed", str(seed), "--out-dir", f"{dataset}{seed}"]
        assert run_main(monkeypatch, capsys, single)[0] == 0
        (folder,) = (tmp_path / f"{dataset}{seed}").iterdir()
        assert metrics(folder) == metrics(tmp_path / "s" / f"{dataset}-seed{seed}")
    print(f"killed: {before}; second node without our disk: {hidden}\n{out}")  # shown by pytest -rP
