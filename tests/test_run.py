"""Whole runs: what they print and write, the picture, calls from Python, folders, resuming."""

import collections
import copy
import csv
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import variants
from conftest import LAB_FLAGS, SCRIPT, flags, lab_config, lab_file, metrics, refused, snapshot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ciql_pybullet as ciql

PLOT = ciql.plot_returns


def saved(folder, *keys):
    """Parts of a run's checkpoint as text, to the last bit; the speed is left out."""
    checkpoint = ciql.load_checkpoint(folder)
    for row in checkpoint["rows"]:
        row.pop("steps_per_second", None)
    return json.dumps([checkpoint[key] for key in keys], default=torch.Tensor.tolist)


def assert_same_run(one, other):
    """Two run folders hold the same log, weights, averages and random state, to the bit."""
    assert metrics(one) == metrics(other)
    keys = ("step", "rows", "sums", "agent", "policy", "random_state")
    assert saved(one, *keys) == saved(other, *keys)
    for folder in (one, other):
        assert_events_are_the_table(folder)


def assert_events_are_the_table(folder):
    """TensorBoard shows what metrics.csv has: each value at its step, none twice, none missing."""
    expected = collections.defaultdict(list)
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            group = "evaluation" if row["return_mean"] else "training"
            for name, value in row.items():
                if value:
                    expected[f"{group}/{name}"].append((step, float(np.float32(value))))
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert found == expected


SMALL = "--max-steps 300 --log-interval 100 --eval-interval 150 --eval-episodes 1 --alpha 0.5"
SMALL += " --device cpu --no-compile --hidden-sizes 8 --batch-size 16 --threads 1"
NUMBER = r"-?\d\S*"
EVALUATION = rf"step +\d+  return {NUMBER} ± {NUMBER} over 1 episodes  score {NUMBER}"


@pytest.mark.slow
def test_main_job(tmp_path, succeeds):
    """Its log, without what pybullet prints from C; its folder; its policy plays as it did."""
    command = [sys.executable, SCRIPT, *SMALL.split()]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    out = process.stdout
    assert (process.returncode, process.stderr) == (0, "")
    assert "argv[0]" not in out and "pybullet build time" not in out
    assert "100 episodes, mean return 861.8 ± 90.6\n" in out
    losses = rf"step +\d+  value_loss {NUMBER}  q_loss .*  clamp_open {NUMBER}  .*\d+ steps/s\n"
    assert (len(re.findall(losses, out)), len(re.findall(EVALUATION, out))) == (3, 2)

    (folder,) = (tmp_path / "runs").iterdir()
    picture = (folder / "eval_returns.png").read_bytes()
    assert picture == (tmp_path / "eval_returns.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    rows = metrics(folder)
    assert [row["step"] for row in rows] == ["100", "150", "200", "300", "300"]
    assert [bool(row["return_1"]) for row in rows] == [False, True, False, False, True]
    columns = (
        "step value_loss q_loss policy_loss penalty gap1 gap2 q v advantage policy_std clamp_open"
        " return_mean return_std score return_1"
    )
    assert set(rows[0]) == set(columns.split())
    assert_events_are_the_table(folder)
    facts = json.loads((folder / "config.json").read_text())
    assert (facts["max_steps"], facts["agent"], facts["torch"]) == (300, "CIQL", torch.__version__)
    assert facts["environment"] == "HalfCheetahBulletEnv-v0" and len(facts["data_checksum"]) == 8
    assert (folder / "code-from-step-0/ciql_pybullet.py").read_bytes() == SCRIPT.read_bytes()
    played = succeeds("--evaluate", folder)
    assert re.findall(EVALUATION, played) == re.findall(EVALUATION, out)[-1:]


def test_episodes_differ(monkeypatch):
    """Within an evaluation, between steps, and between seeds; not when it is done again."""
    monkeypatch.setattr(ciql, "play_episode", lambda policy, env_id, seed: float(seed))
    keys = [(seed, step) for seed in (0, 1) for step in (5_000, 10_000)]
    played = []
    for seed, step in keys * 2:
        row = ciql.evaluate(None, ciql.Config(seed=seed), step)
        assert row["step"] == step
        played.append([row[f"return_{number}"] for number in range(1, 6)])
        returns = np.array(played[-1])
        assert (row["return_mean"], row["return_std"]) == (returns.mean(), returns.std())
    assert played[:4] == played[4:]
    assert len({seed for seeds in played for seed in seeds}) == 20


def test_final_return():
    """The last tenth of the evaluations, three at least; all where there are fewer."""
    assert ciql.final_return(list(range(1, 41))) == (38.5, 4)
    assert ciql.final_return(list(range(1, 11))) == (9, 3)
    assert ciql.final_return([5.0, 7.0]) == (6, 2)


@pytest.mark.parametrize("has_episodes", [True, False])
def test_picture(tmp_path, monkeypatch, has_episodes):
    """Means and single episodes at their steps; a line where the data are; no line out of view."""
    figures = []
    keep = lambda figure, file, **options: figures.append(figure)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    rows = [{"step": 50, "q": 1.0}]
    for step, pair in ((100, (500.0, 700.0)), (300, (900.0, 1500.0))):
        row = {"step": step, "return_mean": sum(pair) / 2, "return_std": 1.0, "score": 3.0}
        rows.append(row | {"return_1": pair[0], "return_2": pair[1]})
    returns = np.array([800.0, 1000.0] if has_episodes else [])
    dataset = types.SimpleNamespace(returns=returns, source="")
    config = ciql.Config(dataset="my.hdf5", seed=3)
    run = types.SimpleNamespace(rows=rows, dataset=dataset, config=config, folder=tmp_path)
    run.agent = variants.AveragedPolicy(2, 1, ciql.Config(device="cpu"))
    run.env_id = "HopperBulletEnv-v0"
    run.plot = tmp_path / "p.svg"
    ciql.plot_returns(run)
    (axes,) = figures[0].axes
    means, *others = axes.get_lines()
    assert means.get_xdata().tolist() == [100, 300]
    assert means.get_ydata().tolist() == [600, 1200]
    dots = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in others[:2]]
    assert dots == [([100, 100], [500, 700]), ([300, 300], [900, 1500])]
    levels = {line.get_label(): line.get_ydata()[0] for line in others[2:]}
    expected = {"random, 19": 18.6, "expert, 2500": 2500}
    if has_episodes:
        expected["data set, 900"] = 900
    assert levels == expected
    bottom, top = axes.get_ylim()
    assert 18.6 < bottom < 500 and 1500 < top < 2500
    assert axes.get_title() == "AveragedPolicy on my\nseed=3"


def test_default_settings():
    """Those of the task that the script was made for."""
    c = ciql.Config()
    ciql.check(c)
    assert (c.gamma, c.tau, c.beta, c.alpha, c.num_neg) == (0.99, 0.8, 1.0, 1.0, 10)
    assert (c.lr, c.batch_size, c.max_steps, c.hidden_sizes) == (3e-4, 256, 500_000, (256, 256))
    assert (c.eval_interval, c.log_interval, c.eval_episodes) == (5_000, 1_000, 5)
    assert (c.clamp_advantage, c.policy_lr_decay, c.q_weight, c.polyak) == (True, False, 0, 0.005)


def state_of_the_process():
    handlers = [signal.getsignal(getattr(signal, name)) for name in ciql.STOP_SIGNALS]
    return handlers, torch.get_num_threads(), threading.active_count(), dict(os.environ)


def test_train_can_be_called(lab):
    """Twice: the same settings give the same numbers, in two folders, and leave no trace."""
    config = lab_config()
    reported = []
    report = lambda row, folder: reported.append((row, ciql.load_checkpoint(folder)["step"]))
    ciql.train(config)  # imports what stays
    torch.set_num_threads(2)
    before = state_of_the_process()
    first, evaluations = ciql.train(config, report=report)
    second, again = ciql.train(config)
    assert state_of_the_process() == before
    torch.set_num_threads(1)
    assert reported == [(row, row["step"]) for row in evaluations]
    assert [row["step"] for row in evaluations] == [20, 40]
    assert again == evaluations == ciql.evaluations_of(ciql.load_checkpoint(first)["rows"])
    assert first != second
    assert_same_run(first, second)


class Reporting(variants.AveragedPolicy):
    """It reports a number, and a metric of every second step."""

    def update(self, data):
        metrics = super().update(data)
        if self.steps % 2:
            metrics["sometimes"] = torch.tensor(float(self.steps))
        return metrics | {"number": 0.5}


def test_agent_of_ones_own(lab):
    """Means are of the steps that reported; what is saved is the policy that it evaluates."""
    folder, evaluations = ciql.train(lab_config(), make_agent=Reporting)
    row = ciql.load_checkpoint(folder)["rows"][0]
    assert (row["number"], row["sometimes"]) == (0.5, 5)
    assert ciql.evaluate(ciql.load_policy(folder), lab_config(), 40) == evaluations[1]
    assert (folder / "code-from-step-0/test_run.py").exists()


def test_the_same_command_again(lab, succeeds, fails):
    """As a job that is queued again: it goes on, is done, or is refused with other facts."""
    again = [*LAB_FLAGS, "--name", "r"]
    folder = lab / "runs" / "r"
    (folder / "code-from-step-0").mkdir(parents=True)  # killed before its first evaluation
    assert f"run    {folder}, from step 0\n" in succeeds(*again, "--max-steps", "20")
    out = succeeds(*again)
    assert f"run    {folder}, from step 20\n" in out and "NOTE" not in out
    whole, _ = ciql.train(lab_config(name="whole"))
    assert_same_run(whole, folder)
    assert "from step 40\n" in succeeds(*again)  # nothing is left to do
    assert_same_run(whole, folder)
    for changed, cause in (
        (["--tau", "0.9"], "tau 0.8, not 0.9; go on as it was made"),
        (["--hidden-sizes", "9"], "hidden_sizes (8,), not (9,)"),
        (["--seed", "3"], "seed 0, not 3"),
    ):
        fails(*again, *changed, named=cause)
        fails("--resume", "runs/r", *changed, "--max-steps", "80", named=cause)


def test_run_answers_for_itself_alone(lab):
    """Another agent, environment or data under its name do not get its curve."""
    config = lab_config(name="run")
    ciql.train(config)
    with refused("is of agent CIQL, not AveragedPolicy"):
        ciql.train(config, make_agent=variants.AveragedPolicy)
    with refused("is of environment lab:Lab-v0, not Lab-v0"):
        ciql.train(dataclasses.replace(config, env_id="Lab-v0"))
    lab_file(lab / "data.hdf5", actions=np.zeros((31, 1)))
    with refused("is of data_checksum "):
        ciql.train(config)


def test_what_a_resumed_run_may_change(lab, succeeds):
    """The file's name, steps, intervals, output; of the cosine there is a NOTE."""
    whole, _ = ciql.train(lab_config(max_steps=60, policy_lr_decay=True, eval_interval=10))
    ciql.train(lab_config(name="run", policy_lr_decay=True))
    shutil.move("data.hdf5", "same.hdf5")
    resume = ["--resume", "runs/run", "--dataset", "same.hdf5"]
    own = flags(max_steps=60, eval_interval=10, log_interval=7, out_dir="elsewhere", plot="p.pdf")
    out = succeeds(*resume, *own)
    assert f"run    {lab}/runs/run, from step 40\n" in out and out.count("NOTE") == 1
    assert "NOTE   the policy's learning rate goes on by the cosine over the new max_steps" in out
    rows = metrics(lab / "runs/run")
    assert [row["step"] for row in rows[-5:]] == ["49", "50", "56", "60", "60"]
    assert saved("runs/run", "policy") != saved(whole, "policy")
    assert "NOTE" not in succeeds(*resume)  # it has these max_steps now
    assert not Path("elsewhere").exists()


def test_setting_that_is_newer_than_the_run(lab):
    """It is compared with its default, which the run had; one that is gone since is no matter."""
    folder, _ = ciql.train(lab_config(name="run", tau=0.9))
    path = folder / "config.json"
    facts = json.loads(path.read_text()) | {"batch_parts": 2}
    del facts["polyak"]
    path.write_text(json.dumps(facts))
    ciql.train(lab_config(name="run", tau=0.9, max_steps=42))
    del facts["tau"]
    path.write_text(json.dumps(facts))
    with refused("is of tau 0.8, not 0.9"):
        ciql.train(lab_config(name="run", tau=0.9, max_steps=50))


class Averaged(ciql.CIQL):
    """Its evaluated policy is a copy, and a number of it is none at first."""

    def __init__(self, *arguments, rate=0.1):
        super().__init__(*arguments)
        self.average = copy.deepcopy(self.policy).requires_grad_(False)
        self.rate = rate
        self.last_q = None

    def update(self, data):
        metrics = super().update(data)
        self.last_q = float(metrics["q"])
        ciql.move_towards(self.average, self.policy, self.rate)
        return metrics

    def evaluated_policy(self):
        return self.average


def test_copy_of_the_policy_and_numbers(lab):
    """Copies normalise as the policy does; what the constructor was given has to stay."""
    folder, _ = ciql.train(lab_config(name="run"), make_agent=Averaged)
    policy = ciql.load_policy(folder)
    assert policy.observation_std.min() < 1 and policy.observation_mean.abs().max() > 0
    ciql.train(lab_config(name="run", max_steps=45), make_agent=Averaged)
    with refused("is of rate 0.1, not 0.2"):
        other = functools.partial(Averaged, rate=0.2)
        ciql.train(lab_config(name="run", max_steps=50), make_agent=other)
    with refused("max_steps is below the run's 45"):
        ciql.train(lab_config(name="run"), make_agent=Averaged)


def test_clock_that_is_set_back(lab, monkeypatch):
    """TensorBoard sorts by the clock, and would hide what seems to be older."""
    ciql.train(lab_config(name="run"))
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    folder, _ = ciql.train(lab_config(name="run", max_steps=80))
    assert_events_are_the_table(folder)


def test_environment_that_changes_the_folder(lab, monkeypatch, succeeds):
    """All is read and written where it would be without."""
    elsewhere = lab / "elsewhere"
    elsewhere.mkdir()
    environment = importlib.import_module("lab").Lab
    reset = environment.reset

    def moving(self, **options):
        result = reset(self, **options)
        os.chdir(elsewhere)
        return result

    monkeypatch.setattr(environment, "reset", moving)
    monkeypatch.setattr(ciql, "plot_returns", PLOT)
    for arguments in ([*LAB_FLAGS, "--name", "run"], ["--evaluate", "runs/run"]):
        succeeds(*arguments, "--film")
        (lab / "runs/run/policy.gif").unlink()
        os.chdir(lab)
    assert (lab / "eval_returns.png").exists() and snapshot(elsewhere) == {}


def wandb_records(path):
    """What a file of an offline run holds: records of a LevelDB log, as protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    position = 7  # after the file's header
    record = b""
    while position + 7 < len(content):
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1: whole, 2: first part, 3: middle, 4: last
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if 32768 - position % 32768 < 7:  # no header fits into this block
            position += 32768 - position % 32768
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_has_the_rows_of_metrics_csv(lab, monkeypatch):
    """Offline, of a run that goes on: each row once; the run has its id, and shows as failed."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ciql.train(lab_config(wandb_project="p", name="run", max_steps=20))
    config = lab_config(wandb_project="p", name="run", max_steps=60)
    with pytest.raises(ZeroDivisionError):
        ciql.train(config, report=lambda row, folder: 1 / (60 - row["step"]))
    wandb.teardown()
    files = sorted(lab.rglob("run-run.wandb"), key=os.path.getmtime)
    complete, failed = [list(wandb_records(path)) for path in files]
    for records, code in ((complete, 0), (failed, 1)):
        assert [one.exit.exit_code for one in records if one.HasField("exit")] == [code]
    found = collections.defaultdict(dict)
    for record in failed:
        if not record.HasField("history"):
            continue
        row = {"/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        cells = {name.partition("/")[2]: cell for name, cell in row.items() if "/" in name}
        assert not cells.keys() & found[row["global_step"]].keys()  # twice
        found[row["global_step"]] |= cells
    expected = collections.defaultdict(dict)
    for row in ciql.load_checkpoint("runs/run")["rows"]:
        expected[row["step"]] |= {name: np.float32(row[name]) for name in row.keys() - {"step"}}
    assert found == expected and len(found) == 6
