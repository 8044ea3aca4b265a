"""Studies: what runs they are made of, their statistics, and how they stop, go on and grow."""

import contextlib
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
import psutil
import pytest
import torch
from conftest import LAB_SETTINGS, ROOT, SAMPLE_ID, flags, lab_file, metrics, refused, snapshot
from scipy import stats
from torch.nn.utils import parameters_to_vector

import ciql_pybullet as ciql

sys.path.insert(0, str(ROOT / "study"))
import tables
import variants
from tables import iqm_interval, mean_interval

import study

OWN = ("dataset", "threads")  # of these a study has its own
LAB = flags(**{name: value for name, value in LAB_SETTINGS.items() if name not in OWN})
DATA = ["--datasets", "data.hdf5", *LAB, "--eval-episodes", "1"]


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
        _, low, high = mean_interval(returns[step])
        grouped = mean_interval(returns[step].groupby([1, 1, 1, 1, 1]))
        for interval in (
            (low, high),
            (curve.low[step], curve.high[step]),
            (grouped.low[1], grouped.high[1]),
        ):
            assert np.allclose(interval, expected)
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
    _, low, high = iqm_interval(figures + [0, 1000])
    assert high - low < 2


def tables_of(returns, dataset="hopper-bullet-medium-v0", commit="one"):
    """Rows of summary.csv and curves.csv: ``returns`` by method, a final return per seed.

    The curves begin with another figure, which is not of the last three evaluations.
    """
    summary = []
    curves = []
    for method, values in returns.items():
        for seed, value in enumerate(values):
            keys = {"dataset": dataset, "method": method, "seed": seed}
            facts = {"env_id": "HopperBulletEnv-v0", "data_return": 800.0, "commit": commit}
            stale = {"state": "complete", "final_return": -1.0, "evaluations": 9, "score": -1.0}
            summary.append(keys | facts | stale | {"error": ""})
            for step, mean in zip(
                (10, 20, 30, 40), (-5000, value - 1, value, value + 1), strict=True
            ):
                curves.append(keys | {"step": step, "return_mean": mean})
    return summary, curves


@pytest.fixture
def summarized(tmp_path, capsys):
    """A function that summarizes such tables: what is printed."""

    def summarize(summary, curves):
        pd.DataFrame(summary).to_csv(tmp_path / "summary.csv", index=False)
        pd.DataFrame(curves).to_csv(tmp_path / "curves.csv", index=False)
        study.summarize(tmp_path)
        return capsys.readouterr().out

    return summarize


def has_line(out, pattern):
    return re.search(f"^{pattern}$", out, re.MULTILINE)


def test_summarize_pairs_the_seeds(summarized, tmp_path):
    """A difference is of runs of the same seed: narrow where seeds differ more than methods do.

    Final returns are of the last evaluations in curves.csv, whatever summary.csv says.
    """
    summary, curves = tables_of({"CIQL": [100.0, 500.0, 900.0], "IQL": [111, 510, 912]})
    failed = {"dataset": "d", "method": "IQL", "seed": 3, "state": "failed", "error": "its error"}
    out = summarized([*summary, failed], curves)
    assert has_line(out, r"CIQL +3 +500\.0 \[-493\.7, 1493\.7\] *")
    assert has_line(out, r"IQL +3 +511\.0 \[-483\.9, 1505\.9\] +11\.0 \[8\.5, 13\.5\]")
    assert "difference to CIQL" in out and "of the last 3 evaluations of each run" in out
    assert "FAILED d, IQL, seed 3: its error" in out
    assert "interquartile" not in out and "NOTE" not in out
    for picture in ("study_returns.png", "study_scores.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_summarize_to_a_baseline(summarized, command, fails, tmp_path):
    """Differences, and the table's order, are to the method that is named; pictures stay."""
    summarized(*tables_of({"one": [1.0, 2, 3], "two": [5.0, 7, 9]}))
    before = snapshot(tmp_path)
    again = ["--summarize", tmp_path, "--baseline"]
    code, out, _ = command(*again, "two", main=study.main)
    pattern = r"two +3 +7\.0 \[.*\] *\none +3 +2\.0 \[.*\] +-5\.0 \[-7\.5, -2\.5\]"
    assert code == 0 and has_line(out, pattern)
    assert snapshot(tmp_path) == before
    fails(*again, "three", named=f"the methods of {tmp_path} are one, two", main=study.main)


def test_versions_of_the_script(summarized):
    """Runs of two versions are not paired by seed, and the table says so."""
    summary, curves = tables_of({"CIQL": [1.0, 2, 3], "IQL": [5.0, 7, 10]})
    summary[-1]["commit"] = "two"  # IQL's seed 2
    out = summarized(summary, curves)
    low, high = stats.ttest_1samp([4.0, 5.0], 0).confidence_interval()
    assert has_line(out, rf"IQL +3 +7\.3 \[.*\] +4\.5 \[{low:.1f}, {high:.1f}\], 2 seeds")
    assert has_line(out, "NOTE +these runs are of 2 versions of the script.*")

    for row in summary[:3]:
        row["commit"] = "two"
    summary[-1]["commit"] = ""  # of a copy without git
    out = summarized(summary, curves)
    assert "difference" not in out.split("NOTE")[0] and "of 3 versions" in out


def test_summarize_several_data_sets(summarized):
    """Scores count by their mean per seed, for methods that ran on all; from 8 seeds on IQMs."""
    rng = np.random.default_rng(0)
    one, curves = tables_of({"a": rng.normal(size=8), "b": rng.normal(size=8), "c": [1.0]}, "one")
    two, more = tables_of({"a": rng.normal(size=8), "b": rng.normal(size=9)}, "two")
    out = summarized(one + two, curves + more)
    pooled = out[out.index("all data sets, score") :]
    finals = pd.DataFrame(curves + more).query("method == 'b' and seed < 8 and step == 30")
    scores = ciql.ROBOTS["HopperBulletEnv-v0"].score(finals["return_mean"])
    interval = mean_interval(scores.groupby(finals["seed"]).mean())
    assert has_line(pooled, rf"b +16 +{re.escape(str(interval))}.*")
    assert "interquartile mean" in pooled and not has_line(pooled, "c .*")


def test_no_score_without_references(summarized, tmp_path):
    summary, curves = tables_of({"CIQL": [1.0, 2.0]})
    for row in summary:
        row.update(score=None, env_id="lab:Lab-v0", data_return=None)
    assert has_line(summarized(summary, curves), r"CIQL +2 +1\.5 \[-4\.9, 7\.9\] *")
    assert {path.name for path in tmp_path.glob("*.png")} == {"study_returns.png"}


def test_pictures(summarized, monkeypatch):
    """No line is in a legend that is not in view; scores have methods as rows."""
    summary, curves = tables_of({"CIQL": [900.0, 1000.0], "IQL alpha=1": [700.0, 720.0]})
    figures = []
    keep = lambda figure, path, **options: figures.append(figure)
    monkeypatch.setattr(tables.Figure, "savefig", keep)
    summarized(summary, [row for row in curves if row["step"] > 10])
    (returns,), (scores,) = (figure.axes for figure in figures)
    legend = [text.get_text() for text in returns.get_legend().get_texts()]
    assert legend == ["CIQL (2)", "IQL alpha=1 (2)", "data set, 800"]  # random 19, expert 2500
    assert [text.get_text() for text in scores.get_yticklabels()] == ["CIQL", "IQL alpha=1"]
    robot = ciql.ROBOTS["HopperBulletEnv-v0"]
    dots = scores.get_lines()[0]
    assert np.allclose(dots.get_xdata(), robot.score(np.array([900, 1e3, 700, 720])))
    assert list(dots.get_ydata()) == [0, 0, 1, 1]


# ------------------------------------------------------------------------------- what it is made of
def test_grid():
    """Data sets x methods x settings x seeds; settings with a comma between vary together."""
    command = ["--datasets", SAMPLE_ID, "m#y\n.hdf5", "--env-id", "HopperBulletEnv-v0"]
    command += ["--seeds", "3", "4", "--methods", "IQL", "AveragedPolicy", "--lr", "0.1"]
    command += ["--grid", "alpha,clamp_advantage", "0,False", "1,True"]
    command += ["--grid", "hidden_sizes", "8 9", "--grid", "min_log_std", "-5"]
    _, runs = study.parse(command)
    cells = [(0, False), (1, True)]
    axes = itertools.product(("IQL", "AveragedPolicy"), cells, (SAMPLE_ID, "m#y\n"), (3, 4))
    for run, (method, (alpha, clamp), dataset, seed) in zip(runs.values(), axes, strict=True):
        config = run.config
        assert (config.alpha, config.clamp_advantage, config.seed) == (alpha, clamp, seed)
        assert (config.lr, config.hidden_sizes, config.threads) == (0.1, (8, 9), 1)
        assert (config.beta, config.policy_lr_decay) == (
            (3, True) if method == "IQL" else (1, False)
        )
        assert (run.row["dataset"], run.method) == (dataset, method)
        assert Path(config.dataset).stem == dataset
        assert config.env_id == ("" if dataset == SAMPLE_ID else "HopperBulletEnv-v0")
        assert re.fullmatch(r"[\w.+-]+", config.name)
        label = f"{method} alpha={alpha} clamp_advantage={clamp} hidden_sizes=8 9 min_log_std=-5"
        assert run.row["method"] == label
    assert len(runs) == 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--grid", "alpha", "0", "-1"], "alpha is -1.0, but must be in [0, inf)"),
        (["--grid", "alpha"], "--grid alpha needs values"),
        (["--grid"], "--grid needs values"),
        (["--grid", "alpha,beta", "0,1", "1"], "--grid alpha,beta 0,1 1 needs values"),
        (["--seeds", "0", "1", "0"], "two runs of the study are"),
        (["--methods", "IQL", "IQL"], "two runs of the study are"),
        (["--seeds", "0", "-1"], "seed is -1"),
        (["--seeds"], "the study has no runs"),
        (["--seed", "3"], "--seed is of single runs; use --datasets, --seeds, --study"),
        (["--dataset", "data.hdf5"], "--dataset is of single runs"),
        (["--out-dir", "elsewhere"], "--out_dir is of single runs"),
        (["--methods", "CIQL", "Mine"], "Mine is none of the methods CIQL, IQL, cloning"),
        (["--methods", "CIQL", "IQL", "--alpha", "2"], "--alpha 2.0 would make IQL another"),
        (["--gpu-share", "2"], "gpu_share is 2.0"),
        (["--datasets", "mine.hdf5"], "which environment? Set env_id"),
        (["--datasets", "none.hdf5", "--env-id", "lab:Lab-v0"], "none.hdf5: cannot be read"),
        (["--datasets", "hopper-bullet"], "hopper-bullet, but must be an .hdf5 file"),
        (["--datasets", "\udcff.hdf5", "--env-id", "lab:Lab-v0"], "which cannot be: 'utf-8'"),
        ([*DATA, "--study", "a_file/s"], "name another --study"),
        ([*DATA, "--study", "old"], "is of another version"),
        ([*DATA, "--device", "cpu", "--threads", "5"], "the largest node has 4 cores; lower it"),
        (["--evaluate", "nothing"], "nothing/checkpoint.pt cannot be read"),
        (["--summarize", "nothing"], "name a study's folder"),
        (["--baseline", "CIQL"], "works with --summarize alone"),
    ],
)
def test_bad_study(monkeypatch, fails, lab, arguments, named):
    """One line, exit code 2, before anything is trained; nothing is left behind."""
    (lab / "a_file").write_text("")
    (lab / "old").mkdir()
    (lab / "old" / "summary.csv").write_text("dataset,label,seed,state\n")
    lab_file(lab / "mine.hdf5")
    trained_here(monkeypatch)
    monkeypatch.setattr(study, "train_runs", lambda runs, share: pytest.fail("trained"))
    fails(*arguments, named=named, main=study.main)


@pytest.mark.parametrize("arguments", [["--grid", "alfa", "0", "1"], ["--seeds", "a"], ["--no-x"]])
def test_flags_that_are_none(command, arguments):
    code, _, error = command(*arguments, main=study.main)
    assert code == 2 and "Traceback" not in error


# -------------------------------------------------------------------------- studies in this process
NODES = [
    {"Alive": True, "Resources": {"CPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 64.0}},
]


def trained_here(monkeypatch):
    """Have studies train in this process, one run after another, without Ray."""

    def train_runs(runs, gpu_share):
        for run in runs:
            run.row["error"] = study.train_run(run)

    monkeypatch.setattr(study, "start_ray", lambda address: None)
    monkeypatch.setattr(study.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(study, "train_runs", train_runs)
    monkeypatch.setattr(tables, "draw_curves", lambda *arguments: None)


def rows_of(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def test_threads(monkeypatch):
    """Each run has its own; 0 is the largest node's."""
    monkeypatch.setattr(study.ray, "nodes", lambda: NODES)
    _, runs = study.parse(["--grid", "threads", "0", "1", "4"])
    study.set_threads(list(runs.values()))
    assert [run.config.threads for run in runs.values()] == [4, 1, 4]


def test_sigterm_is_as_ctrl_c(monkeypatch):
    """A queue sends it when time is up."""
    monkeypatch.setattr(study.ray, "init", lambda *arguments, **options: None)
    monkeypatch.setattr(study.os, "environ", dict(os.environ))
    usual = signal.getsignal(signal.SIGTERM)
    try:
        study.start_ray("")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_each_run_has_its_own_resources(monkeypatch):
    """As Ray is told: threads of the run, a share of a GPU where there is one and it is wanted."""
    told = []

    class Task:
        def options(self, **options):
            told.append(options)
            return self

        def remote(self, run):
            return run.config.name

    monkeypatch.setattr(study.ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 1})
    monkeypatch.setattr(study.ray, "remote", lambda **options: lambda function: Task())
    monkeypatch.setattr(study.ray, "wait", lambda waiting: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(study.ray, "get", lambda ready: "")
    _, runs = study.parse(["--grid", "threads,device", "1,cpu", "2,auto"])
    study.train_runs(list(runs.values()), 0.5)
    assert told == [
        {"num_cpus": 1, "num_gpus": 0, "max_retries": 3},
        {"num_cpus": 2, "num_gpus": 0.5, "max_retries": 3},
    ]


@pytest.fixture
def study_here(lab, no_pictures, monkeypatch, command):
    """A function that runs a study without Ray in the folder "s", as ``command`` does."""
    trained_here(monkeypatch)
    return lambda *arguments: command(*arguments, "--study", "s", main=study.main)


def bad_file(path):
    lab_file(path, rewards=1e30 * (np.arange(31) % 11 != 0))


def test_a_study_grows(lab, study_here, monkeypatch, command, fails):
    """What is complete is not done again, and a run is what it is alone, to the bit.

    A run that fails is named with its own error, and another command may name new runs alone. One
    that would make a known run another is refused.
    """
    bad_file(lab / "bad.hdf5")
    code, out, error = study_here("--datasets", "data.hdf5", "bad.hdf5", *DATA[2:])
    assert (code, error) == (1, "")
    assert "study  2 runs, 2 of them to train" in out
    assert has_line(out, "FAILED bad, CIQL, seed 0: FloatingPointError: .* NaN or infinite.*")
    complete, failed = rows_of(lab / "s" / "summary.csv")
    assert (complete["state"], failed["state"]) == ("complete", "failed")
    assert "Traceback" in (lab / "s" / "bad-CIQL-seed0.log").read_text()
    before = snapshot(lab / "s" / "data-CIQL-seed0")

    code, out, error = study_here("--methods", "cloning", "AveragedPolicy", "--seeds", "1", *DATA)
    assert (code, error) == (0, "") and "study  2 runs, 2 of them to train" in out
    rows = rows_of(lab / "s" / "summary.csv")
    assert list(rows[0]) == [*study.KEYS, *study.COLUMNS]
    assert [row["state"] for row in rows] == ["complete", "failed", "complete", "complete"]
    assert rows[:2] == [complete, failed]
    assert [row["method"] for row in rows[1:]] == ["CIQL", "cloning", "AveragedPolicy"]
    assert snapshot(lab / "s" / "data-CIQL-seed0") == before
    agents = [ciql.load_checkpoint(lab / "s" / row["folder"])["agent_class"] for row in rows[2:]]
    assert agents == ["CIQL", "AveragedPolicy"]

    rows = assert_is_as_alone(command, lab / "s" / complete["folder"])
    returns = [float(row["return_mean"]) for row in rows if row["return_1"]]
    curve = [row for row in rows_of(lab / "s" / "curves.csv") if row["method"] == "CIQL"]
    assert [float(row["return_mean"]) for row in curve] == returns
    assert float(complete["final_return"]) == pytest.approx(np.mean(returns))
    assert (complete["score"], complete["evaluations"]) == ("", "2")
    assert complete["commit"] == ciql.commit()

    # Now that all is there, no Ray is started, and a changed run is refused.
    monkeypatch.setattr(study, "start_ray", lambda address: pytest.fail("started"))
    again = [*DATA, "--study", "s"]
    cause = "data-CIQL-seed0 is there already, with "
    for changed in (["--lr", "0.1"], ["--eval-interval", "10"], ["--max-steps", "80"]):
        fails(*again, *changed, named=cause, main=study.main)
    before = snapshot(lab / "s")
    code, out, error = study_here(*DATA, "--threads", "2")
    assert code == 0, error
    assert "study  1 runs, 0 of them to train" in out and snapshot(lab / "s") == before
    lab_file(lab / "data.hdf5", rewards=np.arange(31) % 11 != 0)
    fails(*again, named=f"{cause}data of checksum", main=study.main)

    # Results whose run is gone would be lost from the tables.
    shutil.move(lab / "s" / "data-cloning-seed1", lab / "elsewhere")
    gone = "data-cloning-seed1 is gone; put it back"
    fails(*again, "--seeds", "5", named=gone, main=study.main)


def assert_is_as_alone(command, folder, *settings):
    """A run of a study has the metrics of the same run alone, which are returned."""
    arguments = [*LAB, "--eval-episodes", "1", "--dataset", "data.hdf5", "--threads", "1"]
    code, _, error = command(*arguments, *settings, "--name", folder.name)
    assert code == 0, error
    rows = metrics(folder)
    assert metrics(Path("runs", folder.name)) == rows
    return rows


def test_what_another_process_works_on(lab, study_here, fails):
    """A study is refused. A single run is left alone and named; the others are trained."""
    names = [*DATA, "--seeds", "0", "1"]
    (lab / "s").mkdir()
    with ciql.lock_folder(lab / "s"):
        fails(*names, "--study", "s", named="another process trains in", main=study.main)
    (lab / "s" / "data-CIQL-seed1").mkdir()
    with ciql.lock_folder(lab / "s" / "data-CIQL-seed1"):
        code, out, _ = study_here(*names)
    assert code == 1 and has_line(out, "FAILED data, CIQL, seed 1: .*another process trains.*")
    code, out, _ = study_here(*names)
    assert code == 0 and "study  2 runs, 1 of them to train" in out and "FAILED" not in out


def test_a_study_without_a_complete_run(lab, study_here, command):
    """It has tables all the same, and each run its error; another command goes on with it."""
    bad_file(lab / "bad.hdf5")
    for _ in range(2):
        code, out, error = study_here("--datasets", "bad.hdf5", *DATA[2:])
        assert (code, error) == (1, "") and "1 of them to train" in out
        assert out.count("FAILED bad, CIQL, seed 0: FloatingPointError") == 1
    (row,) = rows_of(lab / "s" / "summary.csv")
    assert row["state"] == "failed"
    assert command("--summarize", "s", main=study.main)[0] == 0


def test_a_return_that_is_no_number(study_here, monkeypatch):
    """Such a run has failed: its mean would be left out without a word."""
    monkeypatch.setattr(ciql, "play_episode", lambda *arguments: float("nan"))
    code, out, _ = study_here(*DATA)
    assert code == 1 and "FAILED data, CIQL, seed 0: a return is NaN or infinite" in out


def test_the_sample_is_named_and_found_once(lab, study_here, monkeypatch):
    """Without a network: the note comes once, tables say that the data are re-collected."""
    asked = []

    def download(url, path):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(ciql, "download", download)
    monkeypatch.setattr(ciql, "play_episode", lambda *arguments: 1.0)
    settings = {name: value for name, value in LAB_SETTINGS.items() if name not in (*OWN, "env_id")}
    code, out, error = study_here(*flags(**settings | {"max_steps": 20}), "--seeds", "0", "1")
    assert code == 0, error
    assert len(asked) == 1 and out.count("no network") == 1
    rows = rows_of(lab / "s" / "summary.csv")
    assert {row["dataset"] for row in rows} == {f"{SAMPLE_ID} (re-collected)"}


# ----------------------------------------------------------------------------------------- methods
def agent_of(kind, **settings):
    torch.manual_seed(0)
    config = ciql.Config(device="cpu", hidden_sizes=(8,), batch_size=16, num_neg=3, **settings)
    return kind(4, 2, config)


def some_data(n=50):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4,), (2,), (), (4,), ())
    return ciql.Transitions(*(torch.randn(n, *size, generator=generator) for size in sizes))


def test_methods():
    """IQL's recipe is that of its paper; all are settings of the script and agents of it."""
    settings = {"alpha": 0, "beta": 3, "tau": 0.7, "clamp_advantage": False}
    settings["policy_lr_decay"] = True
    assert variants.METHODS["IQL"].settings == variants.METHODS["SmallTargets"].settings == settings
    _, runs = study.parse(["--methods", *variants.METHODS])
    for run, (name, method) in zip(runs.values(), variants.METHODS.items(), strict=True):
        assert (run.method, run.row["method"]) == (name, name)
        assert ciql.differences(run.config, ciql.Config()) == method.settings
        assert method.agent.__name__ == ("CIQL" if method.agent is ciql.CIQL else name)
        assert issubclass(method.agent, ciql.CIQL)


def test_averaged_policy():
    """It plays the running mean of the weights, and a resumed run goes on with it."""
    agent = agent_of(variants.AveragedPolicy)
    prepared = agent.prepare(some_data())
    agent.check_optimizers()
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
    resumed.load_training_state(agent.training_state())
    again = parameters_to_vector(resumed.evaluated_policy().parameters())
    assert torch.equal(again, average)


def test_small_targets():
    """Returns span 1,000: as the authors, rewards · 1000 / (largest − smallest return)."""
    data = some_data(6)
    data = data._replace(
        rewards=torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]),
        terminations=torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        next_observations=data.observations.roll(-1, 0),
    )
    prepared = agent_of(variants.SmallTargets).prepare(data)
    torch.testing.assert_close(prepared.rewards, data.rewards * 1000 / (60 - 6))
    plain = agent_of(ciql.CIQL).prepare(data)
    assert torch.equal(prepared.observations, plain.observations)
    with refused("episodes of different returns"):
        agent_of(variants.SmallTargets).prepare(data._replace(rewards=torch.ones(6)))


# ----------------------------------------------------------------------------------------- with Ray
def start_study(*arguments):
    """Start a study as a user does, in a process group of its own."""
    command = [sys.executable, ROOT / "study" / "study.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def wait_for(condition, seconds=300):
    for _ in range(10 * seconds):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def workers_of(process):
    """The processes that train, of those that ``process`` has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[0].startswith("ray::train_run"):
                found.append(child)
        except (psutil.Error, IndexError):
            pass  # it has ended
    return found


@contextlib.contextmanager
def cluster(folder):
    """A Ray cluster of two nodes, a core each: its address, and the processes of the nodes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    head = ["--head", "--include-dashboard=false", f"--port={address.split(':')[1]}"]
    with contextlib.ExitStack() as stack:
        nodes = []
        for n, arguments in enumerate((head, [f"--address={address}"])):
            path = folder / f"node{n}.txt"
            log = stack.enter_context(open(path, "w"))
            node = subprocess.Popen([*ray, *arguments], cwd="/", stdout=log, stderr=log)
            stack.callback(node.wait)
            stack.callback(node.terminate)
            nodes.append(node)
            wait_for(lambda path=path: "Ray runtime started" in path.read_text())
        yield address, nodes


@pytest.mark.slow
def test_stopped_and_killed_on_two_nodes(lab, tmp_path_factory, monkeypatch, command):
    """Ctrl-C while a run waits for a core; then, on a cluster, workers and a node die.

    Each run goes on where it was, elsewhere if need be, and is what it is alone, to the bit.
    """
    settings = ["--max-steps", "400", "--eval-interval", "40"]
    arguments = [*DATA, *settings, "--grid", "alpha", "0", "1", "--study", "s"]
    names = [f"data-CIQL-alpha{alpha}-seed0" for alpha in "01"]
    checkpoints = [lab / "s" / name / "checkpoint.pt" for name in names]
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    process = start_study(*arguments, "--threads", "0")  # of which one runs at a time
    wait_for(checkpoints[0].exists)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (130, ""), out
    assert out.endswith("stopped; go on with the same command\n") and "Traceback" not in out
    stopped, waiting = rows_of(lab / "s" / "summary.csv")
    assert stopped["state"] == waiting["state"] == "incomplete"
    assert 40 <= int(stopped["step"]) < 400 and not int(waiting["step"] or 0)
    assert "stopped at step" in (lab / "s" / f"{names[0]}.log").read_text()

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    saved = checkpoints[0].stat().st_mtime_ns
    with cluster(tmp_path_factory.mktemp("nodes")) as (address, (first, second)):
        monkeypatch.delenv("LAB_PAUSE")
        process = start_study(*arguments, "--ray-address", address)
        wait_for(lambda: checkpoints[0].stat().st_mtime_ns > saved)
        killed = workers_of(first) + workers_of(second)
        assert killed
        for worker in killed:
            worker.terminate()
        wait_for(lambda: checkpoints[1].exists() and workers_of(second))
        for child in psutil.Process(second.pid).children(recursive=True):
            if child.name() == "raylet":
                child.kill()
        out, error = process.communicate(timeout=400)
    assert (process.returncode, error) == (0, ""), out
    assert "2 of them to train" in out and f"{names[1]} is complete" in out
    starts = []
    for name in names:
        log = (lab / "s" / f"{name}.log").read_text()
        assert "train:" not in log  # no progress bar
        steps = re.findall(r"^run .* from step ([\d,]+)$", log, re.MULTILINE)
        starts.append([int(step) for step in steps])
        alpha = name.partition("alpha")[2][0]
        assert_is_as_alone(command, lab / "s" / name, *settings, "--alpha", alpha)
    assert starts[0][:2] == [0, int(stopped["step"])] and starts[0][1] < starts[0][2]
    assert starts[1][0] == 0 and len(starts[0]) + len(starts[1]) >= 5  # one more for the node
