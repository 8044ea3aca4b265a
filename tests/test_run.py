"""Whole runs: what they print and write, calls from Python, folders, resuming, signals."""

import contextlib
import csv
import dataclasses
import errno
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
from PIL import Image

import ciql_pybullet as ciql


@contextlib.contextmanager
def started(*arguments, before=(), **options):
    """Context with the script in a process group of its own, of which nothing is left behind."""
    command = [*before, sys.executable, SCRIPT, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process, words):
    """Read its log up to a line with ``words``."""
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended without {words!r}: {process.stderr.read()}")


def saved(folder, *keys):
    """Parts of a run's checkpoint as text, to the last bit; the speed is left out."""
    checkpoint = ciql.load_checkpoint(folder)
    for row in checkpoint["history"]["rows"]:
        row.pop("steps_per_second", None)
    return json.dumps([checkpoint[key] for key in keys], default=torch.Tensor.tolist)


def assert_same_run(one, other):
    """Two run folders hold the same curve, weights, averages and random state, to the bit."""
    assert metrics(one) == metrics(other)
    keys = ("step", "history", "agent", "policy", "random_state")
    assert saved(one, *keys) == saved(other, *keys)


# ------------------------------------------------------------------------------------- the main job
SMALL = "--max-steps 300 --log-interval 100 --eval-interval 150 --eval-episodes 2 --alpha 0.5"
SMALL += " --device cpu --no-compile --hidden-sizes 8 --batch-size 16"
NUMBER = r"-?\d\S*"
EVALUATION = rf"step +\d+  return {NUMBER} ± {NUMBER} over 2 episodes  score {NUMBER}"


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job in small: its run's folder, and its log."""
    place = tmp_path_factory.mktemp("main")
    own = {"D4RL_DATASET_DIR": str(place / "cache")}
    with started(*SMALL.split(), cwd=place, env=os.environ | own) as process:
        out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    (folder,) = (place / "runs").iterdir()
    return folder, out


@pytest.mark.slow
def test_log_of_the_main_job(main_job):
    """Nothing of what pybullet prints from C."""
    _, out = main_job
    assert "argv[0]" not in out and "pybullet build time" not in out
    assert "sample.hdf5: 100,100 rows, 100 episodes, mean return 861.8 ± 90.6\n" in out
    losses = rf"step +\d+  value_loss {NUMBER}  q_loss .*  clamp_open {NUMBER}  \d+ steps/s\n"
    assert (len(re.findall(losses, out)), len(re.findall(EVALUATION, out))) == (3, 2)


@pytest.mark.slow
def test_folder_of_the_main_job(main_job):
    folder, _ = main_job
    picture = (folder / "eval_returns.png").read_bytes()
    assert picture == (folder.parents[1] / "eval_returns.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    rows = metrics(folder)
    assert [row["step"] for row in rows] == ["100", "150", "200", "300", "300"]
    assert [bool(row["return_2"]) for row in rows] == [False, True, False, False, True]
    assert [bool(row["value_loss"]) for row in rows] == [True, False, True, True, False]
    columns = (
        "step value_loss q_loss policy_loss penalty gap1 gap2 q v advantage policy_std clamp_open"
        " return_mean return_std score return_1 return_2"
    )
    assert list(rows[0]) == columns.split()
    events = next(folder.glob("events.out.tfevents.*")).read_bytes()
    assert b"training/policy_loss" in events and b"| alpha | 0.5 |" in events
    assert {path.name for path in folder.glob(".*")} <= {".lock"}


@pytest.mark.slow
def test_what_was_run_can_be_known(main_job):
    folder, _ = main_job
    settings = json.loads((folder / "config.json").read_text())
    (process,) = settings["processes"]
    assert settings["max_steps"] == 300
    assert (process["torch"], process["numpy"]) == (torch.__version__, np.__version__)
    assert (process["agent"], process["policy"]) == ("CIQL", "GaussianPolicy")
    assert len(process["data_checksum"]) == 8 and process["processor"]
    assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", process["commit"])
    assert (folder / "code-from-step-0/ciql_pybullet.py").read_bytes() == SCRIPT.read_bytes()


@pytest.mark.slow
def test_saved_policy_plays_what_training_saw(main_job, succeeds):
    """To the last digit that is printed."""
    folder, trained = main_job
    out = succeeds("--evaluate", folder)
    assert re.findall(EVALUATION, out) == re.findall(EVALUATION, trained)[-1:]


# ------------------------------------------------------------------------------ from other programs
def state_of_the_process():
    handlers = [signal.getsignal(number) for number in ciql.STOP_SIGNALS]
    settings = (torch.get_float32_matmul_precision(), torch.get_num_threads())
    return handlers, settings, threading.active_count(), dict(os.environ)


def test_train_can_be_called(lab):
    """Twice: the same settings give the same numbers, in two folders, and leave no trace."""
    config = lab_config(matmul_precision="medium")
    reported = []
    report = lambda row, folder: reported.append(
        (row["return_mean"], ciql.load_checkpoint(folder)["step"])
    )
    ciql.train(config)  # imports what stays
    before = state_of_the_process()
    first, curve = ciql.train(config, report=report)
    second, again = ciql.train(config)
    assert state_of_the_process() == before
    assert reported == list(zip(curve.means, curve.steps, strict=True))
    assert curve.steps.tolist() == [20, 40] and len(curve.returns[1]) == 2
    assert np.allclose(curve.means, [returns.mean() for returns in curve.returns])
    assert np.array_equal(again.returns, curve.returns)
    assert first != second
    assert_same_run(first, second)


def test_importing_has_no_side_effects(tmp_path):
    code = f"""
import sys, threading, torch
sys.path.append({str(SCRIPT.parent)!r})
before = torch.get_rng_state()
import ciql_pybullet
assert threading.active_count() == 1 and torch.equal(before, torch.get_rng_state())
heavy = {{"pybullet", "gymnasium", "matplotlib", "tyro", "tensorboard", "torch._dynamo"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)
    assert run.stdout + run.stderr == b"" and not list(tmp_path.iterdir())


def test_agent_of_ones_own(lab):
    """What is saved is the policy that it evaluates, and the code of its module."""
    folder, curve = ciql.train(lab_config(), make_agent=variants.AveragedPolicy)
    assert (
        ciql.evaluate(ciql.load_policy(folder), lab_config(), 40)["return_1"] == curve.returns[1][0]
    )
    copied = folder / "code-from-step-0" / "variants.py"
    assert copied.read_bytes() == Path(variants.__file__).read_bytes()


def test_notebook(lab, monkeypatch):
    """A class that is defined where no file is, as in a notebook."""
    monkeypatch.setitem(sys.modules, "typed_in", types.ModuleType("typed_in"))
    typed = type("Typed", (ciql.CIQL,), {"__module__": "typed_in"})
    ciql.train(lab_config(), make_agent=typed)


def test_policy_is_played_in_eval_mode(lab):
    """Without its dropout; training goes on in training mode."""
    policy = ciql.GaussianPolicy(3, 1, (8,))
    plain = ciql.evaluate(policy, lab_config(), 1)
    policy.mu.insert(1, torch.nn.Dropout(0.5))
    assert ciql.evaluate(policy, lab_config(), 1) == plain and policy.training


def test_film(lab, succeeds):
    """Of the final policy, and again when it is evaluated; the evaluation is the same without."""
    folder, curve = ciql.train(lab_config(film=True, name="run"))
    path = folder / "policy.gif"
    film = path.read_bytes()
    with Image.open(path) as images:
        assert images.format == "GIF" and images.n_frames == 4  # of ten steps, every third
    path.unlink()
    out = succeeds("--evaluate", "runs/run", "--film")
    assert f"return {curve.means[-1]:.1f} ± " in out and path.read_bytes() == film


def test_policy_that_samples(lab, monkeypatch):
    """Its evaluations take no random number from training, and an episode is that of its seed."""
    usual, _ = ciql.train(lab_config())
    act = ciql.GaussianPolicy.act
    sampled = lambda policy, x: act(policy, x) + torch.rand(1).numpy() / 10
    monkeypatch.setattr(ciql.GaussianPolicy, "act", sampled)
    one, _ = ciql.train(lab_config())
    other, _ = ciql.train(lab_config())
    assert_same_run(one, other)
    assert metrics(one) != metrics(usual)
    assert saved(one, "policy") == saved(usual, "policy")


def test_policy_that_cannot_act(lab, monkeypatch):
    """It is found before training; what it raises is the user's own."""
    monkeypatch.setattr(ciql.GaussianPolicy, "act", lambda policy, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ciql.train(lab_config(name="run"))
    assert not (lab / "runs").exists()


class Figures(ciql.CIQL):
    """A number, a figure of every second step, and one of a name and shape that tests set."""

    own = ("mine", ())

    def losses(self, batch):
        loss, figures = super().losses(batch)
        name, shape = self.own
        figures |= {"number": 0.5, name: figures["v"].expand(shape)}
        figures["small"] = torch.tensor(200, dtype=torch.uint8)  # whose sum is no uint8
        if self.steps % 2:
            figures["sometimes"] = torch.tensor(7.0)
        return loss, figures


class OnlyPolicyLoss(ciql.CIQL):
    def losses(self, batch):
        return -self.policy.log_prob(batch.observations, batch.actions).mean(), {}


def test_losses_may_report_nothing(lab):
    """There is no q_loss that the penalty could be added to."""
    folder, _ = ciql.train(lab_config(), make_agent=OnlyPolicyLoss)
    assert "q_loss" not in metrics(folder)[0] and "penalty" in metrics(folder)[0]


def test_figures_are_means_of_the_steps_that_reported_them(lab):
    folder, _ = ciql.train(lab_config(), make_agent=Figures)
    row = ciql.load_checkpoint(folder)["history"]["rows"][0]
    assert (row["number"], row["sometimes"], row["mine"]) == (0.5, 7, row["v"])
    assert row["small"] == 200


@pytest.mark.parametrize(
    ("name", "shape", "cause"),
    [
        ("step", (), "a metric is named step, as a column"),
        ("return_mean", (), "a metric is named return_mean, as a column"),
        ("mine", (16,), "the metric mine is of shape (16,); average it"),
    ],
)
def test_figures_that_are_refused(lab, monkeypatch, name, shape, cause):
    monkeypatch.setattr(Figures, "own", (name, shape))
    with refused(cause):
        ciql.train(lab_config(), make_agent=Figures)
    assert not list((lab / "runs").iterdir())  # at the first step


def test_wandb_has_the_rows_of_metrics_csv(lab, monkeypatch):
    """Each row once, also after a resume, which goes on with the same id."""
    logged = {}  # by id, and number of the row

    def init(id, **options):
        rows = logged.setdefault(id, {})
        log = lambda row, step, commit: rows.update({step: row})
        nothing = lambda *arguments, **options: None
        return types.SimpleNamespace(log=log, define_metric=nothing, finish=nothing)

    monkeypatch.setattr("wandb.init", init)
    config = lab_config(wandb_project="p", name="a#b")
    ciql.train(config)
    ciql.train(dataclasses.replace(config, max_steps=60))
    ((id, rows),) = logged.items()
    assert re.fullmatch(r"[\w.-]+", id)
    with open("runs/a#b/metrics.csv", newline="") as file:
        expected = [[float(cell) for cell in row if cell] for row in list(csv.reader(file))[1:]]
    found = [[row.pop("step"), *row.values()] for row in rows.values()]
    assert len(expected) == 9 and found == expected


# -------------------------------------------------------------------------------- the final return
@pytest.mark.parametrize(
    ("means", "value", "evaluations"),
    [(range(1, 41), 38.5, 4), (range(1, 11), 9, 3), ([5.0, 7.0], 6, 2)],
)
def test_final_return(means, value, evaluations):
    """The last tenth of the evaluations, three at least; all where there are fewer."""
    assert ciql.final_return(list(means)) == (value, evaluations)


def test_final_return_is_of_means(lab, capsys):
    """An evaluation of many episodes counts as much as one of few, also after a resume."""
    ciql.train(lab_config(name="run"))
    capsys.readouterr()
    _, curve = ciql.train(lab_config(resume="runs/run", max_steps=60, eval_episodes=7))
    assert [len(returns) for returns in curve.returns] == [2, 2, 7]
    mean = np.mean([returns.mean() for returns in curve.returns])
    assert (
        f"final  {mean:.1f} is the mean of the last 3 of 3 evaluations\n" in capsys.readouterr().out
    )


# -------------------------------------------------------------------------------------- run folders
def test_names_of_folders():
    """They say what differs from the defaults; two of one second differ."""
    varied = ciql.Config(
        dataset="my data.hdf5", alpha=0, clamp_advantage=False, hidden_sizes=(8, 9), seed=3
    )
    configs = (varied, varied, ciql.Config(name="mine"))
    names = [ciql.folder_of(config).name for config in configs]
    assert names[0].startswith("my_data-alpha0-no-clamp_advantage-hidden_sizes8x9-seed3-20")
    assert names[1] != names[0] and names[2] == "mine"


def test_names_of_methods():
    iql = ciql.Config(alpha=0, clamp_advantage=False)
    configs = (ciql.Config(), ciql.Config(alpha=0), ciql.Config(alpha=0, beta=0), iql)
    names = [ciql.method_name(config, "CIQL") for config in configs]
    assert names == ["CIQL", "CIQL without penalty", "behaviour cloning", "IQL"]


def test_the_same_command_again(lab, succeeds, fails):
    """As a job that is queued again: it goes on, is done, or is refused with other settings."""
    again = [*LAB_FLAGS, "--name", "r"]
    folder = lab / "runs" / "r"
    (folder / "code-from-step-0").mkdir(parents=True)  # killed before its first evaluation
    assert "run    runs/r, from step 0\n" in succeeds(*again, "--max-steps", "20")
    out = succeeds(*again)
    assert "run    runs/r, from step 20\n" in out and "NOTE" not in out
    whole, _ = ciql.train(lab_config(name="whole"))
    assert_same_run(whole, folder)

    before = snapshot(lab)
    assert "runs/r has all of its 40 steps: nothing is left" in succeeds(*again)
    assert snapshot(lab) == before
    cause = "there already, with seed 0 and not 3, tau 0.8 and not 0.9; take another --name"
    fails(*again, "--tau", "0.9", "--seed", "3", named=cause)


def test_two_starts_under_one_name(lab, monkeypatch):
    """The second finds a checkpoint that was not there when it looked."""
    folder, _ = ciql.train(lab_config(name="run"))
    before = snapshot(folder)
    exists = os.path.exists
    looks = iter([False])
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "exists", lambda path: next(looks, None) is None and exists(path))
        with refused("another process trained in runs/run meanwhile"):
            ciql.train(lab_config(name="run"))
    assert snapshot(folder) == before


def test_settings_of_another_version_can_be_read():
    """A setting that the run's version did not have takes its default, one gone is left out."""
    config = ciql.Config(tau=0.9, hidden_sizes=(8, 9), plot="p.png")
    values = dataclasses.asdict(config) | {"batch_parts": 2, "ray_address": None}
    del values["threads"]
    assert ciql.config_from_json(json.dumps(values)) == config


# ----------------------------------------------------------------------------------------- resuming
def test_what_a_resumed_run_may_not_change(lab, fails):
    """Else its curve would be of two experiments, or its numbers would have no meaning."""
    ciql.train(lab_config(name="run"))
    register = "gymnasium.register('O-v0', lab.Lab, max_episode_steps=10)"
    (lab / "other.py").write_text(f"import gymnasium, lab\n{register}\n")
    for change, cause in (
        ({"max_steps": 10}, "max_steps is 10, but runs/run is at step 40; raise it"),
        ({"max_steps": 50, "hidden_sizes": 9}, "an agent of another size"),
        ({"name": "other"}, "name and resume are set, and each"),
        ({"max_steps": 50, "env_id": "other:O-v0"}, "is of lab:Lab-v0, not of other:O-v0"),
    ):
        fails("--resume", "runs/run", *flags(**change), named=cause)


@pytest.mark.parametrize("max_steps", [40, 50])
def test_run_answers_for_itself_alone(lab, max_steps):
    """Complete or not, another agent or other data under its name do not get its curve."""
    ciql.train(lab_config(name="run"))
    config = lab_config(name="run", max_steps=max_steps)
    with refused("holds a CIQL, not a AveragedPolicy"):
        ciql.train(config, make_agent=variants.AveragedPolicy)
    lab_file(lab / "data.hdf5", actions=np.zeros((31, 1)))
    with refused("was trained on other data than data.hdf5 holds now", "in its config.json"):
        ciql.train(config)


def with_reward(self, batch, losses=ciql.CIQL.losses):
    loss, figures = losses(self, batch)
    return loss, figures | {"reward": batch.rewards.mean()}


def test_what_a_resumed_run_may_change(lab, monkeypatch, succeeds):
    """The file's name in silence, settings with a NOTE; a new figure is a new column."""
    ciql.train(lab_config(name="run"))
    shutil.move("data.hdf5", "same.hdf5")
    resume = ["--resume", "runs/run", "--dataset", "same.hdf5"]
    out = succeeds(*resume, "--max-steps", "50")
    assert "NOTE" not in out and "run    runs/run, from step 40\n" in out
    monkeypatch.setattr(ciql.CIQL, "losses", with_reward)
    out = succeeds(*resume, "--tau", "0.9", "--policy-lr-decay", "--max-steps", "60")
    assert "other settings: tau 0.9 (was 0.8), policy_lr_decay True (was False)\n" in out
    assert "by the cosine over the new max_steps" in out
    rows = metrics(lab / "runs/run")
    assert [row["step"] for row in rows[-4:]] == ["50", "50", "60", "60"]
    assert [bool(row["reward"]) for row in rows[-4:]] == [False, False, True, False]
    processes = json.loads((lab / "runs/run/config.json").read_text())["processes"]
    assert [process["from_step"] for process in processes] == [0, 40, 50]
    assert all(None not in row and len(row) == len(rows[0]) for row in rows)


def test_threads_are_kept_with_the_run(lab, monkeypatch):
    """The number is settled at the start, so that a resume is exact on another machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    ciql.train(lab_config(threads=0, name="run"))
    assert ciql.load_checkpoint("runs/run")["config"].threads == 4  # at most
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    ciql.train(lab_config(threads=0, resume="runs/run", max_steps=60))
    assert ciql.load_checkpoint("runs/run")["config"].threads == 4


@pytest.mark.parametrize("full", [0, 2, 5])  # of 10, 20 and its evaluation, 30, 40 and its own
def test_log_that_is_full_loses_nothing(lab, monkeypatch, full):
    """A line of losses, of an evaluation, or the last that cannot be printed: the run goes on."""
    lines = iter(range(6))

    def say(line):
        if line.startswith("step") and next(lines) == full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ciql, "say", say)
        with pytest.raises(OSError, match="No space left") as failed:
            ciql.train(lab_config(name="run"))
    assert "--resume runs/run" in failed.value.__notes__[0]
    ciql.train(lab_config(resume="runs/run"))
    whole, _ = ciql.train(lab_config())
    assert_same_run(whole, Path("runs/run"))


# ------------------------------------------------------------------------------------------ signals
def stopped_train(config):
    """The exit code of a training that is stopped."""
    with pytest.raises(SystemExit) as stopped:
        ciql.train(config)
    return stopped.value.code


@pytest.mark.parametrize(
    ("number", "step"), list(zip(ciql.STOP_SIGNALS, (5, 15, 20, 40), strict=True))
)
def test_stopped_after_any_step_it_resumes_to_the_same_bits(lab, monkeypatch, capsys, number, step):
    """Before and after a line of losses, where an evaluation is due, and where it is the last."""
    update = ciql.CIQL.update

    def stopping(agent, data):
        if agent.steps == step - 1:
            signal.raise_signal(number)
        return update(agent, data)

    whole, _ = ciql.train(lab_config())
    before = state_of_the_process()
    with monkeypatch.context() as patched:
        patched.setattr(ciql.CIQL, "update", stopping)
        assert stopped_train(lab_config(name="my run")) == 128 + number
    assert state_of_the_process() == before
    assert f"stopped at step {step}; go on with --resume 'runs/my run'" in capsys.readouterr().out
    assert ciql.load_checkpoint("runs/my run")["step"] == step
    ciql.train(lab_config(resume="runs/my run"))
    assert_same_run(whole, Path("runs/my run"))


def test_stopped_when_all_is_done(lab):
    """A signal after the last evaluation finds nothing to stop."""
    stop = lambda row, folder: row["step"] == 40 and signal.raise_signal(signal.SIGTERM)
    ciql.train(lab_config(), report=stop)


def test_hangup_takes_the_terminal_away(lab, monkeypatch):
    def hang_up(line):
        if line.startswith("step"):
            signal.raise_signal(signal.SIGHUP)
        if line.startswith("stopped"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ciql, "say", hang_up)
    assert stopped_train(lab_config(name="run")) == 129
    assert ciql.load_checkpoint("runs/run")["step"] == 10


def test_stopped_before_the_first_step(lab, monkeypatch):
    """Nothing is left behind."""
    stop = lambda line: line.startswith("run ") and signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(ciql, "say", stop)
    assert stopped_train(lab_config()) == 143 and not list((lab / "runs").iterdir())


LONG = [*LAB_FLAGS, *flags(max_steps=1000, eval_interval=500, lr=1e-3)]


def wait_until_it_plays(lab, process):
    """Wait until an episode has begun that was not begun before."""
    marks = lab / "playing"
    marks.unlink(missing_ok=True)
    for _ in range(600):
        # The first reset is the trial at the start; each episode has two, one is thrown away.
        if marks.exists() and len(marks.read_text().splitlines()) >= 3:
            return
        assert process.poll() is None
        time.sleep(0.1)
    pytest.fail("no evaluation in a minute")


@pytest.mark.slow
def test_stopped_and_killed_runs_resume_to_the_same_bits(lab, monkeypatch, succeeds):
    """Every signal, to the whole group of processes, against the run that was never stopped."""
    succeeds(*LONG, "--name", "whole")
    folder = lab / "runs" / "stopped"
    monkeypatch.setenv("LAB_PAUSE", "0.05")

    # in training: timeout's SIGTERM; nohup's SIGHUP is ignored
    nohup = ["timeout", "300", "nohup"]
    first = [*LONG, "--name", "stopped"]
    with started(*first, before=nohup, stdin=subprocess.DEVNULL) as process:
        read_until(process, "step        10")
        os.killpg(process.pid, signal.SIGHUP)  # timeout itself ends by it
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err and "go on with --resume runs/stopped" in out
    steps = [ciql.load_checkpoint(folder)["step"]]
    for number, code, moment in (
        (signal.SIGINT, 130, "first evaluation"),
        (signal.SIGHUP, 129, "training"),
        (signal.SIGUSR1, 138, "last evaluation"),
        (signal.SIGKILL, -9, "last evaluation"),
    ):
        with started("--resume", folder) as process:
            if moment == "training":
                read_until(process, "step       510")
            else:
                wait_until_it_plays(lab, process)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (code, "")
        steps.append(ciql.load_checkpoint(folder)["step"])
    assert 10 <= steps[0] < 500 and 510 <= steps[2] < 1000
    assert steps[1] == 500 and steps[3:] == [1000, 1000]
    monkeypatch.delenv("LAB_PAUSE")
    succeeds("--resume", folder)
    assert_same_run(lab / "runs" / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "import"), (signal.SIGINT, "data"), (signal.SIGTERM, "data")],
)
def test_stopped_before_training(lab, number, moment):
    """While modules are imported, and while the first environment is made: silent, no folder."""
    compiled = "--no-compile" if moment == "import" else "--compile"
    with started(*LAB_FLAGS, compiled) as process:
        if moment == "import":
            time.sleep(1)
        else:
            read_until(process, "agent ")
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (-number, "")
    assert not (lab / "runs").exists()
