"""Bad input: one line, exit code 2. Faults of the machine: code 1, no work lost. Signals."""

import contextlib
import errno
import importlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import LAB_FLAGS, SCRIPT, flags, hopper_file, lab_config, lab_file
from test_run import assert_same_run

import ciql_pybullet as ciql

HOPPER = ["--dataset", "hopper.hdf5", "--env-id", "HopperBulletEnv-v0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tau", "0"], "tau is 0.0, but must be from 0.001 to 0.999"),
        (["--lr", "nan"], "lr is nan"),
        (["--max-steps", "0"], "max_steps is 0"),
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "hopper.hdf5"], "for which env_id has to be set"),
        (["--evaluate", "nothing"], "nothing holds no run that can be read"),
        ([*HOPPER, "--plot", "no/such/folder/p.png"], "no/such/folder/p.png; name a .png, .pdf or"),
        ([*HOPPER, "--plot", "picture.jpg"], "picture.jpg; name a .png, .pdf or .svg"),
    ],
)
def test_bad_command_line(fails, tmp_path, no_network, arguments, named):
    """It is refused before the network is asked, and nothing is left behind."""
    hopper_file(tmp_path / "hopper.hdf5")
    fails(*arguments, named=named)
    assert not no_network


def test_diverging_run_stops(lab, command):
    """Before it saves; the message names the cause."""
    lab_file(lab / "data.hdf5", rewards=1e30 * (np.arange(31) % 11 != 0))
    code, _, error = command(*LAB_FLAGS)
    assert code == 1 and error.count("\n") == 1
    assert "became NaN or infinite up to step 10; lower lr" in error
    assert not list(lab.glob("runs/*/checkpoint.pt"))


def test_diverged_run_that_is_stopped_keeps_its_last_checkpoint(lab, monkeypatch):
    """Between two lines of losses, so none has found it."""
    policy_loss = ciql.CIQL.policy_loss

    def diverge(agent, *arguments):
        return policy_loss(agent, *arguments) * (np.inf if agent.steps >= 12 else 1)

    monkeypatch.setattr(ciql.CIQL, "policy_loss", diverge)
    with stopping(monkeypatch, "SIGTERM", 14), pytest.raises(FloatingPointError, match="step 14"):
        ciql.train(lab_config(name="run", eval_interval=10))
    assert ciql.load_checkpoint("runs/run")["step"] == 10


@pytest.mark.parametrize(("name", "writes"), [("metrics.csv", 5), ("checkpoint.pt", 1)])
def test_full_disk_loses_nothing(lab, monkeypatch, command, name, writes):
    """The run ends by one line, keeps its last checkpoint, and goes on as if whole."""
    write = ciql.write_whole
    left = iter(range(writes))

    def fill(path, content):
        if path.name == name and next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(ciql, "write_whole", fill)
    code, _, error = command(*LAB_FLAGS, "--name", "run")
    assert (code, error) == (1, "ciql_pybullet: [Errno 28] No space left on device\n")
    monkeypatch.setattr(ciql, "write_whole", write)
    assert ciql.load_checkpoint("runs/run")["step"] == 20
    ciql.train(lab_config(name="run"))
    whole, _ = ciql.train(lab_config())
    assert_same_run(whole, Path("runs/run"))


def test_checkpoint_is_saved_before_the_picture_is_drawn(lab, monkeypatch):
    monkeypatch.setattr(ciql, "plot_returns", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ciql.train(lab_config(name="run"))
    assert ciql.load_checkpoint("runs/run")["step"] == 20


def blind(result):
    return result[0] * np.nan, *result[1:]


# One reset at the start; an episode has two, and ten steps.
@pytest.mark.parametrize(("times", "method"), [(23, "step"), (6, "reset")])
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")
def test_environment_that_fails_later(lab, monkeypatch, command, times, method):
    """It ends by a traceback, so with exit code 1, and costs what a kill costs."""
    environment = importlib.import_module("lab").Lab
    usual = getattr(environment, method)
    left = iter(range(times))

    def misbehaving(self, *arguments, **options):
        result = usual(self, *arguments, **options)
        return blind(result) if next(left, None) is None else result

    monkeypatch.setattr(environment, method, misbehaving)
    with pytest.raises(RuntimeError, match="lab:Lab-v0"):
        command(*LAB_FLAGS, "--name", "run")
    assert ciql.load_checkpoint("runs/run")["step"] == 20


class Drawn(ciql.CIQL):
    """It uses NumPy's random numbers, and keeps a running mean in a number."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = 1.0

    def policy_loss(self, batch, advantage):
        self.scale = 0.9 * self.scale + 0.1 * float(advantage.abs().mean())
        return super().policy_loss(batch, advantage / self.scale + np.random.rand())


@contextlib.contextmanager
def stopping(monkeypatch, name, step):
    """Context in which a signal comes in the middle of a step."""
    update = ciql.CIQL.update

    def stop(agent, data):
        if agent.steps == step - 1:
            signal.raise_signal(getattr(signal, name))
        return update(agent, data)

    with monkeypatch.context() as patched:
        patched.setattr(ciql.CIQL, "update", stop)
        yield


@pytest.mark.parametrize(
    ("name", "step", "make_agent", "has_data"),
    [
        ("SIGINT", 5, ciql.CIQL, False),
        ("SIGTERM", 15, ciql.CIQL, True),
        ("SIGHUP", 20, Drawn, False),
        ("SIGUSR1", 39, Drawn, False),
    ],
)
def test_stopped_after_any_step_it_resumes_to_the_same_bits(
    lab, monkeypatch, capsys, name, step, make_agent, has_data
):
    """Before and after a line of losses, where an evaluation is due, and just before the last.

    What to type for it is printed, as flags, or as Python for an agent or data of one's own.
    """
    data = ciql.read_dataset("data.hdf5", 10).transitions if has_data else None
    whole, _ = ciql.train(lab_config(), data, make_agent)
    usual = [signal.getsignal(getattr(signal, each)) for each in ciql.STOP_SIGNALS]
    with stopping(monkeypatch, name, step), pytest.raises(SystemExit) as stopped:
        ciql.train(lab_config(name="my run"), data, make_agent)
    assert stopped.value.code == 128 + getattr(signal, name)
    assert [signal.getsignal(getattr(signal, each)) for each in ciql.STOP_SIGNALS] == usual
    assert ciql.load_checkpoint("runs/my run")["step"] == step
    line = re.search(
        r"^stopped at step \d+; go on with (.*)$", capsys.readouterr().out, re.MULTILINE
    )[1]
    if make_agent is ciql.CIQL and not has_data:
        ciql.train(ciql.parse(shlex.split(line)))
    else:
        exec(line, vars(ciql) | {"Drawn": Drawn, "data": data})  # noqa: S102
    assert_same_run(whole, Path("runs/my run"))


def test_ignored_signals_stay_ignored(lab, monkeypatch):
    """As nohup and shells ignore some for what they start."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping(monkeypatch, "SIGHUP", 5):
        ciql.train(lab_config())
    assert signal.signal(signal.SIGHUP, usual) == signal.SIG_IGN


LONG = [*LAB_FLAGS, *flags(max_steps=600, eval_interval=300, log_interval=50)]


@pytest.mark.slow
def test_stopped_and_killed_runs_resume_to_the_same_bits(lab, monkeypatch, succeeds):
    """Every signal, to the whole group of processes, against the run that was never stopped.

    After a step, or (0) in an evaluation; SIGHUP comes when the terminal is gone.
    """
    succeeds(*LONG, "--name", "whole")
    folder = lab / "runs" / "stopped"
    marks = lab / "playing"
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    arguments = [*LONG, "--name", "stopped"]
    steps = []
    for name, code, step in (
        ("SIGTERM", 143, 50),
        ("SIGHUP", 129, 0),
        ("SIGINT", 130, 350),
        ("SIGKILL", -9, 0),
        ("SIGUSR1", 138, 450),
    ):
        marks.write_text("")
        ours, its = pty.openpty()
        path = lab / f"{name}.txt"
        with open(path, "w") as log:
            out = its if name == "SIGHUP" else log
            command = [sys.executable, SCRIPT, *arguments]
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            # The first reset is at the start; an episode has two, one is thrown away.
            while f"step {step:9}" not in path.read_text():
                if step == 0 and marks.read_text().count("\n") >= 3:
                    break
                assert process.poll() is None
                time.sleep(0.05)
            os.close(its)
            os.close(ours)
            os.killpg(process.pid, getattr(signal, name))
            assert process.wait(timeout=30) == code
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert "Traceback" not in path.read_text()
        steps.append(ciql.load_checkpoint(folder)["step"])
        arguments = ["--resume", folder]
    assert f"go on with --resume {folder}" in (lab / "SIGTERM.txt").read_text()
    assert steps[0] < 300 == steps[1] < 350 <= steps[2] == steps[3] < 450 <= steps[4] < 600
    monkeypatch.delenv("LAB_PAUSE")
    succeeds("--resume", folder)
    assert_same_run(lab / "runs" / "whole", folder)
