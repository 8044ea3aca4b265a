"""Studies: what runs they are made of, their methods, and how they stop, go on and grow."""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import variants
from conftest import LAB_SETTINGS, flags, lab_file, metrics, own_transitions, snapshot
from torch.nn.utils import parameters_to_vector

import ciql_pybullet as ciql
import study

PUBLISHED = ciql.Config.dataset  # of which there is a sample
OWN = ("dataset", "threads")  # of these a study has its own
LAB = flags(**{name: value for name, value in LAB_SETTINGS.items() if name not in OWN})
DATA = ["--datasets", "data.hdf5", *LAB, "--eval-episodes", "1"]


# ------------------------------------------------------------------------------- what it is made of
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
        (["--grid", "alpha"], "--grid alpha needs values"),
        (["--grid", "alpha,beta", "0,1", "1"], "--grid alpha,beta 0,1 1 needs values"),
        (["--seeds", "0", "1", "0"], "two runs of the study are"),
        (["--seeds"], "the study has no runs"),
        (["--seed", "3"], "--seed is of single runs"),
        (["--methods", "CIQL", "Mine"], "Mine is none of the methods CIQL, IQL, cloning"),
        (["--methods", "CIQL", "IQL", "--alpha", "2"], "--alpha 2.0 would make IQL another"),
        (["--gpu-share", "2"], "gpu_share is 2.0"),
        (["--datasets", "none.hdf5", "--env-id", "lab:Lab-v0"], "none.hdf5: cannot be read"),
        ([*DATA, "--study", "old"], "is of another version"),
        ([*DATA, "--device", "cpu", "--threads", "5"], "the largest node has 4 cores; lower it"),
        (["--evaluate", "nothing"], "nothing holds no run that can be read"),
        (["--summarize", "nothing"], "name a study's folder"),
        (["--baseline", "CIQL"], "works with --summarize alone"),
    ],
)
def test_bad_study(monkeypatch, fails, lab, arguments, named):
    """One line, exit code 2, before anything is trained; nothing is left behind."""
    (lab / "old").mkdir()
    (lab / "old" / "summary.csv").write_text("dataset,label,seed,state\n")
    trained_here(monkeypatch)
    monkeypatch.setattr(study, "train_runs", lambda runs, share: pytest.fail("trained"))
    fails(*arguments, named=named, main=study.main)


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
    monkeypatch.setattr(study, "draw", lambda folder: None)


def rows_of(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def test_threads(monkeypatch):
    """Each run has its own; 0 is the largest node's."""
    monkeypatch.setattr(study.ray, "nodes", lambda: NODES)
    _, runs = study.parse(["--grid", "threads", "0", "1", "4"])
    study.set_threads(list(runs.values()))
    assert [run.config.threads for run in runs.values()] == [4, 1, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_end_of_time_or_terminal_is_as_ctrl_c(monkeypatch, number):
    """But where it is ignored, as under nohup, it stays so."""
    monkeypatch.setattr(study.ray, "init", lambda *arguments, **options: None)
    monkeypatch.setattr(study.os, "environ", dict(os.environ))
    usual = [(each, signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGHUP)]
    try:
        signal.signal(number, signal.SIG_IGN)
        study.start_ray("")
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        study.start_ray("")
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        for each, handler in usual:
            signal.signal(each, handler)


def test_worker_hears_the_signal_that_ray_cancels_with(lab, monkeypatch):
    """A shell may have had SIGINT ignored for all that it started."""
    heard = []
    train = lambda config, make_agent: heard.append(signal.getsignal(signal.SIGINT))
    monkeypatch.setattr(ciql, "train", train)
    _, runs = study.parse([*DATA, "--study", "."])
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    study.train_run(*runs.values())
    signal.signal(signal.SIGINT, usual)
    assert heard == [signal.default_int_handler]


def test_each_run_has_its_own_resources(monkeypatch):
    """As Ray is told: threads of the run, a share of a GPU where there is one and it is wanted."""
    told = []

    def options(num_cpus, num_gpus, max_retries):
        told.append((num_cpus, num_gpus))
        return types.SimpleNamespace(remote=lambda run: run.config.name)

    task = types.SimpleNamespace(options=options)
    monkeypatch.setattr(study.ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 1})
    monkeypatch.setattr(study.ray, "remote", lambda **options: lambda function: task)
    monkeypatch.setattr(study.ray, "wait", lambda waiting: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(study.ray, "get", lambda ready: "")
    _, runs = study.parse(["--grid", "threads,device", "1,cpu", "2,auto"])
    study.train_runs(list(runs.values()), 0.5)
    assert told == [(1, 0), (2, 0.5)]


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


def test_what_another_process_works_on(lab, study_here, fails):
    """A study is refused. A single run is left alone and named; the others are trained."""
    names = [*DATA, "--seeds", "0", "1"]
    (lab / "s" / "data-CIQL-seed1").mkdir(parents=True)
    with filelock.FileLock(lab / "s" / ".lock"):
        code, _, error = study_here(*names)
        assert code == 1 and "lock" in error
    with filelock.FileLock(lab / "s" / "data-CIQL-seed1" / ".lock"):
        code, out, _ = study_here(*names)
    assert code == 1 and re.search("FAILED data, CIQL, seed 1: .*lock", out)
    code, out, _ = study_here(*names)
    assert code == 0 and "study  2 runs, 1 of them to train" in out and "FAILED" not in out


def test_the_sample_is_named_and_found_once(lab, study_here, monkeypatch, no_network):
    """Without a network: the note comes once, tables say that the data are re-collected."""
    monkeypatch.setattr(ciql, "play_episode", lambda *arguments: 1.0)
    settings = {name: value for name, value in LAB_SETTINGS.items() if name not in (*OWN, "env_id")}
    code, out, _ = study_here(*flags(**settings | {"max_steps": 20}), "--seeds", "0", "1")
    assert code == 0 and out.count("could not be downloaded") == len(no_network) == 1
    rows = rows_of(lab / "s" / "summary.csv")
    assert {row["dataset"] for row in rows} == {f"{PUBLISHED} (re-collected)"}


# ----------------------------------------------------------------------------------------- methods
def agent_of(kind):
    torch.manual_seed(0)
    return kind(4, 2, ciql.Config(device="cpu", hidden_sizes=(8,), batch_size=16, num_neg=3))


def test_methods():
    """IQL's recipe is that of its paper; all are settings of the script and agents of it."""
    settings = {"alpha": 0, "beta": 3, "tau": 0.7, "clamp_advantage": False}
    settings["policy_lr_decay"] = True
    assert variants.METHODS["IQL"].settings == settings
    _, runs = study.parse(["--methods", *variants.METHODS])
    for run, (name, method) in zip(runs.values(), variants.METHODS.items(), strict=True):
        assert (run.method, run.row["method"]) == (name, name)
        changed = {
            setting: value
            for setting, value in vars(run.config).items()
            if setting not in ciql.NEUTRAL_SETTINGS and value != getattr(ciql.Config, setting)
        }
        assert changed == method.settings


def test_averaged_policy():
    """It plays the running mean of the weights."""
    weights_of = lambda policy: parameters_to_vector(policy.parameters()).detach()
    agent = agent_of(variants.AveragedPolicy)
    prepared = agent.prepare(own_transitions(50, 4, 2))
    expected = weights_of(agent.policy)
    for _ in range(10):
        agent.update(prepared)
        expected = expected + 0.001 * (weights_of(agent.policy) - expected)
    played = agent.evaluated_policy()
    torch.testing.assert_close(weights_of(played), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(played.observation_mean, agent.policy.observation_mean)


def test_near_actions():
    """The penalty's actions lie about the policy's own mean, in the box."""
    agent = agent_of(variants.NearActions)
    batch = own_transitions(16, 4, 2)
    distances = agent.off_data_actions(batch) - agent.policy(batch.observations)[:, None]
    assert distances.shape == (16, 3, 2)
    assert 0.15 < distances.std() < 0.25 and abs(distances.mean()) < 0.1


# ----------------------------------------------------------------------------------------- with Ray
def start_study(*arguments):
    """Start a study as a user does, in a process group of its own."""
    command = [sys.executable, study.__file__, *arguments]
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
