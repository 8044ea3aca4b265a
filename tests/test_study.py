"""Studies: what runs they are made of, their statistics, and how they stop, go on and grow."""

import contextlib
import csv
import itertools
import os
import re
import shutil
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
from conftest import (
    LAB_SETTINGS,
    ROOT,
    SAMPLE_ID,
    children_of,
    flags,
    hopper_file,
    lab_file,
    metrics,
    run_main,
    snapshot,
)
from scipy import stats
from torch.nn.utils import parameters_to_vector

import ciql_pybullet as ciql

sys.path.insert(0, str(ROOT / "study"))
import variants

import study
from study import iqm_interval, mean_interval

TINY = flags(device="cpu", compile=False, hidden_sizes=(8,), batch_size=16, eval_episodes=1)
HOPPER = ["--env-id", "HopperBulletEnv-v0", *TINY]
LAB_SETTINGS = LAB_SETTINGS | {"eval_episodes": 1}
LAB_FLAGS = flags(**LAB_SETTINGS)
LAB = flags(**{name: LAB_SETTINGS[name] for name in LAB_SETTINGS if name != "dataset"})
DATA = ["--datasets", "data.hdf5"]


# --------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold(seeds):
    """Of many simulated studies, 95 % of the intervals contain the truth, ± 2 %."""
    rng = np.random.default_rng(seeds)
    ability = rng.normal(0, 300, (seeds, 20_000))  # of a seed, for every method
    first = 500 + ability + rng.normal(0, 50, ability.shape)
    second = 530 + ability + rng.normal(0, 150, ability.shape)
    elsewhere = rng.normal(40, 900, ability.shape)  # another data set, of another spread
    for samples, truth in (
        (first, 500),
        (second - first, 30),
        ((second + elsewhere) / 2, 285),
    ):
        _, low, high = mean_interval(pd.DataFrame(samples))
        assert abs(((low < truth) & (truth < high)).mean() - 0.95) < 0.02


def test_intervals_are_those_of_scipy():
    """Of a column, of a curve, of groups; a single seed has none."""
    rng = np.random.default_rng(0)
    returns = pd.DataFrame(rng.normal(size=(5, 3)), columns=[10, 20, 30])
    curve = mean_interval(returns)
    for step in returns:
        expected = stats.ttest_1samp(returns[step], 0).confidence_interval()
        alone = mean_interval(returns[step])
        grouped = mean_interval(returns[step].groupby([1, 1, 1, 1, 1]))
        assert np.allclose([alone.low, alone.high], expected)
        assert np.allclose([curve.low[step], curve.high[step]], expected)
        assert np.allclose([grouped.low[1], grouped.high[1]], expected)
    value, low, high = mean_interval(pd.Series([3.0]))
    assert value == 3 and np.isnan(low) and np.isnan(high)
    assert str(mean_interval(pd.Series([0.0, 0.0]))) == "0.0 [0.0, 0.0]"


def test_interquartile_mean():
    """Its interval resamples seeds within each data set, and so is blind to how these differ."""
    rng = np.random.default_rng(0)
    figures = pd.DataFrame(rng.normal(size=(8, 2)))
    value, low, high = iqm_interval(figures)
    assert value == pytest.approx(np.sort(figures.to_numpy().flatten())[4:12].mean())
    assert low < value < high

    apart = figures + [0, 1000]
    _, low, high = iqm_interval(apart)
    assert high - low < 2


def summary_of(returns, dataset="hopper-bullet-medium-v0"):
    """Rows of summary.csv and curves.csv: ``returns`` by label, a figure per seed."""
    own = {"dataset": dataset, "env_id": "HopperBulletEnv-v0", "data_return": 800.0}
    summary = []
    curves = []
    for label, values in returns.items():
        for seed, value in enumerate(values):
            run = own | {"label": label, "seed": seed}
            score = ciql.ROBOTS["HopperBulletEnv-v0"].score(value)
            complete = {"state": "complete", "final_return": value, "score": score, "error": ""}
            summary.append(run | complete)
            for step in (10, 20):
                curves.append(run | {"step": step, "return_mean": value + step})
    return summary, curves


def write_tables(folder, summary, curves):
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False)


def test_summarize_pairs_the_seeds(tmp_path, capsys):
    """A difference is of runs of the same seed: narrow where seeds differ more than methods do."""
    summary, curves = summary_of({"alpha=0": [100.0, 500.0, 900.0], "alpha=1": [111, 510, 912]})
    failed = {
        "label": "alpha=1",
        "dataset": "d",
        "seed": 3,
        "state": "failed",
        "error": "its error",
    }
    write_tables(tmp_path, [*summary, failed], curves)
    study.summarize(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"^alpha=0 +3 +500\.0 \[-493\.7, 1493\.7\] *$", out, re.MULTILINE)
    pattern = r"^alpha=1 +3 +511\.0 \[-483\.9, 1505\.9\] +11\.0 \[8\.5, 13\.5\]$"
    assert re.search(pattern, out, re.MULTILINE)
    assert "FAILED d, alpha=1, seed 3: its error" in out
    assert "interquartile" not in out
    for picture in ("study_returns.png", "study_scores.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_summarize_to_a_baseline(monkeypatch, capsys, tmp_path):
    """Differences, and the order of the table, are to the method that is named."""
    write_tables(tmp_path, *summary_of({"one": [1.0, 2, 3], "two": [5.0, 7, 9]}))
    command = ["--summarize", str(tmp_path), "--baseline"]
    code, out, _ = run_main(monkeypatch, capsys, [*command, "two"], study.main)
    pattern = r"^two +3 +7\.0 \[.*\] *\none +3 +2\.0 \[.*\] +-5\.0 \[-7\.5, -2\.5\]$"
    assert code == 0 and re.search(pattern, out, re.MULTILINE)
    before = snapshot(tmp_path)
    code, _, error = run_main(monkeypatch, capsys, [*command, "three"], study.main)
    assert (code, error.count("\n")) == (2, 1) and "the methods of" in error
    assert "are one, two" in error and snapshot(tmp_path) == before


def test_summarize_several_data_sets(tmp_path, capsys):
    """Scores count by their mean per seed, for methods that ran on all; from 8 seeds on IQMs."""
    rng = np.random.default_rng(0)
    one, curves = summary_of({"a": rng.normal(size=8), "b": rng.normal(size=8), "c": [1.0]}, "one")
    two, more = summary_of({"a": rng.normal(size=8), "b": rng.normal(size=9)}, "two")
    write_tables(tmp_path, one + two, curves + more)
    study.summarize(tmp_path)
    out = capsys.readouterr().out
    pooled = out[out.index("all data sets, score") :]
    scores = pd.DataFrame(one + two).query("label == 'b' and seed < 8").groupby("seed")["score"]
    value, low, high = mean_interval(scores.mean())
    expected = re.escape(f"{value:.1f} [{low:.1f}, {high:.1f}]")
    assert re.search(rf"^b +16 +{expected}", pooled, re.MULTILINE)
    assert "interquartile mean" in pooled and not re.search("^c ", pooled, re.MULTILINE)


def test_no_score_without_references(tmp_path, capsys):
    summary, curves = summary_of({"CIQL": [1.0, 2.0]})
    for row in summary:
        row.update(score=None, env_id="lab:Lab-v0", data_return=None)
    write_tables(tmp_path, summary, curves)
    study.summarize(tmp_path)
    assert re.search(r"^CIQL +2 +1\.5 \[-4\.9, 7\.9\]", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "study_returns.png").exists()
    assert not (tmp_path / "study_scores.png").exists()


# ------------------------------------------------------------------------------- what it is made of
def test_grid():
    """Data sets x variants x settings x seeds; settings with a comma between vary together."""
    command = [
        "--datasets",
        SAMPLE_ID,
        "m#y\n.hdf5",
        "--env-id",
        "HopperBulletEnv-v0",
        "--lr",
        "0.1",
    ]
    command += ["--seeds", "3", "4", "--variants", "CIQL", "RawObservations"]
    command += ["--grid", "alpha,clamp_advantage", "0,False", "1,True"]
    command += ["--grid", "hidden_sizes", "8 9", "--grid", "min_log_std", "-5"]
    _, runs = study.parse(command)
    cells = [(0, False), (1, True)]
    axes = itertools.product((SAMPLE_ID, "m#y\n"), ("CIQL", "RawObservations"), cells, (3, 4))
    for run, (dataset, variant, (alpha, clamp), seed) in zip(runs.values(), axes, strict=True):
        config = run.config
        assert (config.alpha, config.clamp_advantage, config.seed) == (alpha, clamp, seed)
        assert (config.lr, config.hidden_sizes, config.threads) == (0.1, (8, 9), 1)
        assert (run.dataset, run.variant) == (dataset, variant)
        assert Path(config.dataset).stem == dataset
        assert config.env_id == ("" if dataset == SAMPLE_ID else "HopperBulletEnv-v0")
        assert re.fullmatch(r"[\w.+-]+", run.name)
        label = f"alpha={alpha} clamp_advantage={clamp} hidden_sizes=8 9 min_log_std=-5"
        assert run.label == ("" if variant == "CIQL" else f"{variant} ") + label
    assert len(runs) == 2 * 2 * 2 * 2


def no_ray(monkeypatch):
    monkeypatch.setattr(study, "start_ray", lambda address: pytest.fail("started"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--grid", "alpha", "0", "-1"], "alpha is -1.0, but must be in [0, inf)"),
        (["--grid", "alpha"], "--grid alpha needs values"),
        (["--grid"], "--grid needs values"),
        (["--grid", "alpha,beta", "0,1", "1"], "--grid alpha,beta 0,1 1 needs values"),
        (["--seeds", "0", "1", "0"], "two runs of the study are"),
        (["--seeds", "0", "-1"], "seed is -1"),
        (["--seeds"], "the study has no runs"),
        (["--seed", "3"], "--seed is of single runs; use --datasets, --seeds, --study"),
        (["--dataset", "good.hdf5"], "--dataset is of single runs"),
        (["--variants", "CIQL", "Mine"], "Mine is none of the variants CIQL, AveragedPolicy"),
        (["--gpu-share", "2"], "gpu_share is 2.0"),
        (["--datasets", "mine.hdf5"], "which environment? Set env_id"),
        (
            ["--datasets", "none.hdf5", "--env-id", "HopperBulletEnv-v0"],
            "none.hdf5: cannot be read",
        ),
        (["--datasets", "hopper-bullet"], "hopper-bullet, but must be an .hdf5 file"),
        (["--datasets", "\udcff.hdf5", *HOPPER], "is not UTF-8, which Ray needs; rename it"),
        (["--study", "a_file/s", "--datasets", "good.hdf5", *HOPPER], "name another --study"),
        (["--study", "old", "--datasets", "good.hdf5", *HOPPER], "is of another version"),
        (["--evaluate", "nothing"], "nothing is not there"),
        (["--summarize", "nothing"], "name a study's folder"),
        (["--baseline", "CIQL"], "works with --summarize alone"),
    ],
)
def test_bad_study(monkeypatch, capsys, tmp_path, arguments, named):
    """One line, exit code 2, before anything starts; nothing is left behind."""
    (tmp_path / "a_file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.json").write_text('{"a-run": {"settings": "{}"}}')
    (tmp_path / "old" / ".lock").write_text("")
    hopper_file(tmp_path / "good.hdf5")
    no_ray(monkeypatch)
    before = snapshot(tmp_path)
    code, _, error = run_main(monkeypatch, capsys, arguments, study.main)
    assert (code, error.count("\n")) == (2, 1) and named in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--grid", "alfa", "0", "1"], ["--seeds", "a"], ["--no-x"]])
def test_flags_that_are_none(monkeypatch, capsys, arguments):
    code, _, error = run_main(monkeypatch, capsys, arguments, study.main)
    assert code == 2 and "Traceback" not in error


NODES = [
    {"Alive": True, "Resources": {"CPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 64.0}},
]


def test_threads(monkeypatch, capsys, tmp_path):
    """Each run has its own; 0 is the largest node's, and more than those are refused."""
    hopper_file(tmp_path / "data.hdf5")
    monkeypatch.setattr(study.ray, "nodes", lambda: NODES)
    _, runs = study.parse([*DATA, *HOPPER, "--grid", "threads", "0", "1", "4"])
    study.set_threads(runs)
    assert [run.config.threads for run in runs.values()] == [4, 1, 4]

    monkeypatch.setattr(study, "start_ray", lambda address: None)
    command = [*DATA, *HOPPER, "--threads", "5", "--study", "s"]
    code, _, error = run_main(monkeypatch, capsys, command, study.main)
    assert (code, error) == (2, "study: threads is 5, but the largest node has 4 cores; lower it\n")
    assert not (tmp_path / "s").exists()


def test_each_run_has_its_own_resources(monkeypatch):
    """As Tune is told: threads of the run, a share of a GPU where there is one and it is wanted."""
    told = {}
    monkeypatch.setattr(study.ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 1})
    monkeypatch.setattr(study.tune, "with_parameters", lambda function, **others: function)
    monkeypatch.setattr(study.tune, "with_resources", lambda _, resources: resources)

    class Tuner:
        def __init__(self, resources, param_space, **others):
            for name in param_space["run"]["grid_search"]:
                told[name] = resources({"run": name}).bundles

        def fit(self):
            return []

    monkeypatch.setattr(study.tune, "Tuner", Tuner)
    _, runs = study.parse([*DATA, "--grid", "threads,device", "1,cpu", "2,cuda"])
    study.train_runs(runs, 0.5)
    assert list(told.values()) == [[{"CPU": 1}], [{"CPU": 2, "GPU": 0.5}]]


@pytest.fixture
def trained(lab, pool_here, monkeypatch, capsys):
    """A folder where a run has been trained, in a study's layout, as an earlier command left it."""
    assert run_main(monkeypatch, capsys, [*LAB_FLAGS, "--out-dir", "one"])[0] == 0
    (folder,) = (lab / "one").iterdir()
    place = lab / "s" / "tune-20260101-000000" / "data-seed0" / "checkpoint_000001"
    shutil.copytree(folder, place / folder.name)
    return lab


def test_the_newest_checkpoint_that_is_whole(trained):
    """One that was being written when all was killed is passed over."""
    _, runs = study.parse([*DATA, *LAB, "--study", "s", "--seeds", "0", "1"])
    (saved,) = study.find_saved(runs).values()
    torn = trained / "s" / "tune-20260102-000000" / "data-seed0" / "checkpoint_000000" / "x"
    torn.mkdir(parents=True)
    (torn / "checkpoint.pt").write_bytes(Path(saved.folder, "checkpoint.pt").read_bytes()[:999])
    assert study.find_saved(runs)["data-seed0"].folder == saved.folder
    states = [study.state_of(run, {"data-seed0": saved}) for run in runs.values()]
    assert states == ["complete", "incomplete"]


def test_what_is_complete_needs_no_ray(trained, monkeypatch, capsys):
    """Its figures are of the last ten evaluations; a command that would alter it is refused."""
    no_ray(monkeypatch)
    command = [*DATA, *LAB, "--study", "s"]
    code, out, error = run_main(monkeypatch, capsys, command, study.main)
    assert code == 0, error
    assert "study  1 runs, 0 of them to train" in out
    (row,) = rows_of(trained / "s" / "summary.csv")
    rows = metrics(trained / "s" / row["folder"])
    returns = [float(row["return_mean"]) for row in rows if row["return_mean"]]
    assert float(row["final_return"]) == pytest.approx(np.mean(returns))
    assert float(row["clamp_open_steps"]) == sum(10 * float(row["clamp_open"]) for row in rows)
    assert (row["score"], row["state"], row["label"]) == ("", "complete", "CIQL")

    before = snapshot(trained)
    for changed in (["--lr", "0.1"], ["--storage", "elsewhere"], ["--max-steps", "80"]):
        code, _, error = run_main(monkeypatch, capsys, [*command, *changed], study.main)
        assert (code, error.count("\n")) == (2, 1)
        assert "data-seed0 is there already, with " in error
        assert snapshot(trained) == before
    lab_file(trained / "data.hdf5", rewards=np.arange(31) % 11 != 0)
    code, _, error = run_main(monkeypatch, capsys, command, study.main)
    assert code == 2 and "data-seed0 is there already, with data of mean return" in error


def test_a_study_that_another_process_works_on(trained, monkeypatch, capsys):
    with study.only_process(trained / "s"):
        code, _, error = run_main(monkeypatch, capsys, [*DATA, *LAB, "--study", "s"], study.main)
    assert (code, error.count("\n")) == (2, 1) and "another process works on" in error


def test_steps_with_an_open_clamp():
    rows = [{"step": 10, "clamp_open": 0.5}, {"step": 15, "return_mean": 1.0}]
    rows.append({"step": 30, "clamp_open": 0.1})
    progress = ciql.Progress(rows=rows, sums={"clamp_open": torch.tensor(3.0)})
    assert study.clamp_open_steps(progress) == 5 + 2 + 3
    assert study.clamp_open_steps(ciql.Progress(rows=[{"step": 5.0}])) == 0


# ----------------------------------------------------------------------------------------- variants
def agent_of(kind, **settings):
    torch.manual_seed(0)
    config = ciql.Config(device="cpu", hidden_sizes=(8,), batch_size=16, num_neg=3, **settings)
    return kind(4, 2, config)


def some_data(n=50):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4,), (2,), (), (4,), ())
    return ciql.Transitions(*(torch.randn(n, *size, generator=generator) for size in sizes))


def test_variants_by_name():
    for name, kind in variants.VARIANTS.items():
        assert kind.__name__ == name and issubclass(kind, ciql.CIQL)


def test_averaged_policy():
    """It plays the running mean of the weights, and a resumed run goes on with it."""
    agent = agent_of(variants.AveragedPolicy)
    prepared = agent.prepare(some_data())
    expected = parameters_to_vector(agent.policy.parameters()).detach().clone()
    for _ in range(10):
        agent.update(prepared)
        weights = parameters_to_vector(agent.policy.parameters()).detach()
        expected = expected + 0.001 * (weights - expected)
    played = agent.evaluated_policy()
    average = parameters_to_vector(played.parameters())
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(played.observation_mean, agent.policy.observation_mean)

    resumed = agent_of(variants.AveragedPolicy)
    resumed.prepare(some_data())
    resumed.load_state_dict(agent.state_dict())
    again = parameters_to_vector(resumed.evaluated_policy().parameters())
    assert torch.equal(again, average)


def test_raw_observations():
    agent = agent_of(variants.RawObservations)
    data = some_data()
    assert torch.equal(agent.prepare(data).observations, data.observations)
    observation = data.observations[0]
    action = agent.policy(observation).detach()
    assert np.array_equal(agent.policy.act(observation.numpy()), action.numpy())


def test_shifted_rewards():
    data = some_data()
    shifted = agent_of(variants.ShiftedRewards).prepare(data)
    plain = agent_of(ciql.CIQL).prepare(data)
    assert torch.equal(shifted.rewards[1:], data.rewards[:-1])
    assert torch.equal(shifted.observations, plain.observations)


def test_penalty_per_state():
    """It is the mean over states of each one's ReLU, and acts where the batch's mean does not."""
    agent = agent_of(variants.PenaltyPerState, alpha=2.0)
    data = some_data(16)
    off_data = torch.rand(16, 3, 2) * 2 - 1
    loss, metrics = agent.losses(data, off_data, False)
    base, _ = agent_of(ciql.CIQL, alpha=2.0).losses(data, off_data, False)
    expected = 0.0
    for n in range(16):
        state = data.observations[n : n + 1]
        on = torch.stack(agent.critic(state, data.actions[n : n + 1]))[:, 0]
        off = torch.stack(agent.critic(state.expand(3, -1), off_data[n])).mean(1)
        expected += (off - on).clamp(min=0).sum().item() / 16
    assert metrics["penalty"].item() == pytest.approx(expected, rel=1e-5) and expected > 0
    assert (loss - base).item() == pytest.approx(2 * expected, rel=1e-4)

    plain = agent_of(variants.PenaltyPerState, alpha=0.0).losses(data, off_data[:, :0], False)
    assert plain[1]["penalty"] == 0


# ----------------------------------------------------------------------------------------- with Ray
def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def start_study(*arguments):
    """Start a study as a user does, in a process group of its own."""
    command = [sys.executable, ROOT / "study" / "study.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def run_study(*arguments):
    process = start_study(*arguments)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.mark.slow
def test_a_study_stops_goes_on_and_grows(lab, monkeypatch, capsys, pool_here):
    """Ctrl-C while a run waits for a core; then a data set fails; then a new variant and seed.

    What is complete is not done again, and a run is what it is alone, to the bit.
    """
    lab_file(lab / "bad.hdf5", rewards=1e30 * (np.arange(31) % 11 != 0))
    settings = [*LAB, "--max-steps", "200", "--storage", "st", "--study", "s"]
    command = ["--datasets", "data.hdf5", "bad.hdf5", *settings]

    monkeypatch.setenv("LAB_PAUSE", "0.1")
    process = start_study(*command, "--threads", "0")  # of which one runs at a time
    for line in process.stdout:
        if "data-seed0 at step 40" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    out, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (130, "")
    assert "stopped; go on with the same command" in out
    stopped, waiting = rows_of(lab / "s" / "summary.csv")
    assert stopped["state"] == waiting["state"] == "incomplete"
    assert 40 <= int(stopped["step"]) < 200 and waiting["step"] == "0"

    monkeypatch.setenv("LAB_PAUSE", "0")
    code, out, error = run_study(*command, "--threads", "1")
    assert (code, error) == (1, "")
    assert "╭" not in out and "Trial" not in out  # no tables of Ray's
    assert re.search("^FAILED bad, CIQL, seed 0: .* NaN or infinite", out, re.MULTILINE)
    complete, failed = rows_of(lab / "s" / "summary.csv")
    assert (complete["state"], failed["state"]) == ("complete", "failed")
    before = snapshot(Path(complete["folder"]))
    _, log = sorted((lab / "st" / "s").glob("tune-*/data-seed0/log.txt"))
    assert f"from step {stopped['step']}" in log.read_text()
    assert "train:" not in log.read_text()  # no progress bar

    new = ["--datasets", "data.hdf5", "--variants", "AveragedPolicy", "--seeds", "1"]
    code, out, error = run_study(*new, *settings)
    assert (code, error) == (0, "")
    assert "study  1 runs, 1 of them to train" in out
    rows = rows_of(lab / "s" / "summary.csv")
    assert [row["state"] for row in rows] == ["complete", "failed", "complete"]
    assert rows[0] == complete and snapshot(Path(complete["folder"])) == before

    single = [*LAB_FLAGS, "--max-steps", "200"]
    assert run_main(monkeypatch, capsys, single)[0] == 0
    (alone,) = (lab / "runs").iterdir()
    assert metrics(alone) == metrics(Path(complete["folder"]))
    returns = [row["return_mean"] for row in metrics(alone) if row["return_mean"]]
    curves = rows_of(lab / "s" / "curves.csv")
    curve = [row["return_mean"] for row in curves if row["label"] == "CIQL"]
    assert np.array_equal(np.array(curve, float), np.array(returns, float))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, seconds=300):
    for _ in range(10 * seconds):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of two nodes, a core each: its address, and the process of the second node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    head = ["--head", "--include-dashboard=false", f"--port={port}"]
    nodes = []
    for n, arguments in enumerate((head, [f"--address=127.0.0.1:{port}"])):
        path = tmp_path.parent / f"node{n}.txt"
        with open(path, "w") as log:
            nodes.append(subprocess.Popen([*ray, *arguments], cwd="/", stdout=log, stderr=log))
        wait_for(lambda path=path: "Ray runtime started" in path.read_text())
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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_a_cluster_loses_a_node(lab, cluster, monkeypatch, capsys, pool_here):
    """Two runs on two nodes; a raylet is killed on the way, and its run goes on elsewhere."""
    address, second = cluster
    settings = [*LAB, "--threads", "1", "--max-steps", "400", "--eval-interval", "40"]
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    driver = start_study(
        *DATA, *settings, "--grid", "alpha", "0", "1", "--study", "s", "--ray-address", address
    )
    monkeypatch.delenv("LAB_PAUSE")

    def lost():
        """The run on the second node, once it has a checkpoint."""
        names = {working_in(pid).name for pid in descendants(second.pid)}
        found = lab.glob("s/tune-*/*/checkpoint_*")
        return {path.parent.name for path in found if path.parent.name in names}

    (name,) = wait_for(lost)
    (raylet,) = (
        pid
        for pid in descendants(second.pid)
        if "raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(raylet, signal.SIGKILL)
    out, error = driver.communicate(timeout=400)
    assert driver.returncode == 0, out + error
    (log,) = lab.glob(f"s/tune-*/{name}/log.txt")
    assert re.search(r"^run .* from step [1-9]\d+$", log.read_text(), re.MULTILINE)
    for row in rows_of(lab / "s" / "summary.csv"):
        single = ["--dataset", "data.hdf5", "--alpha", row["alpha"], "--name", row["alpha"]]
        assert run_main(monkeypatch, capsys, [*settings, *single])[0] == 0
        assert metrics(lab / "runs" / row["alpha"]) == metrics(lab / "s" / row["folder"])
