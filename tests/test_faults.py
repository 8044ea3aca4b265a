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

import filelock
import numpy as np
import pytest
import torch
from conftest import LAB_FLAGS, SCRIPT, flags, hopper_file, lab_config, lab_file, refused
from test_run import assert_same_run

import ciql_pybullet as ciql


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tau": 0.0}, "tau is 0.0, but must be from 0.001 to 0.999"),
        ({"gamma": 1.01}, "gamma is 1.01, but must be from 0 to 1"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"eval_episodes": 0}, "eval_episodes is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_setting(settings, named):
    with refused(named):
        ciql.check(ciql.Config(**settings))


HOPPER = ["--dataset", "hopper.hdf5", "--env-id", "HopperBulletEnv-v0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "hopper.hdf5"], "for which env_id has to be set"),
        ([*HOPPER, "--device", "gpu"], "device is gpu, which is not here"),
        (["--resume", "nothing"], "nothing holds no run that can be read"),
        (["--evaluate", "a_file"], "a_file holds no run that can be read"),
        ([*HOPPER, "--plot", "no/such/folder/p.png"], "no/such/folder/p.png; name a .png, .pdf or"),
        ([*HOPPER, "--plot", "picture.jpg"], "picture.jpg; name a .png, .pdf or .svg"),
    ],
)
def test_bad_command_line(fails, tmp_path, no_network, arguments, named):
    """It is refused before the network is asked, and nothing is left behind."""
    (tmp_path / "a_file").write_text("")
    hopper_file(tmp_path / "hopper.hdf5")
    fails(*arguments, named=named)
    assert not no_network


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_damaged_checkpoint(lab, fails):
    """And one that would run code when unpickled."""
    folder, _ = ciql.train(lab_config(name="run", max_steps=2))
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    torch.save({"step": Malicious()}, path)
    for content in (path.read_bytes(), b"", whole[:-500]):
        path.write_bytes(content)
        fails("--resume", "runs/run", named="runs/run holds no run that can be read")
    assert not Path("hacked").exists()


def test_run_that_another_process_trains(lab, command):
    ciql.train(lab_config(name="run", max_steps=2))
    with filelock.FileLock(lab / "runs/run/.lock"):
        code, _, error = command("--resume", "runs/run", "--max-steps", "4")
        assert (code, error.count("\n")) == (1, 1) and "runs/run/.lock" in error
    ciql.train(lab_config(resume="runs/run", max_steps=4))


# ---------------------------------------------------------------------------- diverging, full disks
def test_diverging_run_stops(lab, command):
    """Before it saves; the message names the cause."""
    lab_file(lab / "data.hdf5", rewards=1e30 * (np.arange(31) % 11 != 0))
    code, _, error = command(*LAB_FLAGS)
    assert code == 1 and error.count("\n") == 1
    assert "became NaN or infinite up to step 10; lower lr" in error
    assert not list(lab.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("name", "writes"), [("metrics.csv", 2), ("metrics.csv", 5), ("checkpoint.pt", 1)]
)
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
    if writes != 2:
        assert ciql.load_checkpoint("runs/run")["step"] == 20
    ciql.train(lab_config(name="run"))
    whole, _ = ciql.train(lab_config())
    assert_same_run(whole, Path("runs/run"))


def test_checkpoint_is_saved_before_the_picture_is_drawn(lab, monkeypatch):
    monkeypatch.setattr(ciql, "plot_returns", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ciql.train(lab_config(name="run"))
    assert ciql.load_checkpoint("runs/run")["step"] == 20


# ------------------------------------------------------------------------- environments that fail
@pytest.fixture
def misbehave(lab, monkeypatch):
    """A function that has a method of the Lab work so many times, then do something else."""
    environment = importlib.import_module("lab").Lab

    def after(times, method, deed):
        usual = getattr(environment, method)
        left = iter(range(times))

        def misbehaving(self, *arguments, **options):
            result = usual(self, *arguments, **options)
            return deed(result) if next(left, None) is None else result

        monkeypatch.setattr(environment, method, misbehaving)

    return after


def leave(result):
    sys.exit()


def blind(result):
    return result[0] * np.nan, *result[1:]


def endless(result):
    return result[0], float("inf"), *result[2:]


# One reset at the start; an episode has two, and ten steps.
@pytest.mark.parametrize(
    ("times", "method", "deed"),
    [
        (23, "step", leave),
        (1 + 2 * 2 + 1, "reset", leave),
        (23, "step", blind),
        (1 + 2 * 2 + 1, "reset", blind),
        (23, "step", endless),
    ],
)
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")
def test_environment_that_fails_later(misbehave, command, times, method, deed):
    """It ends by a traceback, so with exit code 1, and costs what a kill costs."""
    misbehave(times, method, deed)
    with pytest.raises(RuntimeError, match="lab:Lab-v0"):
        command(*LAB_FLAGS, "--name", "run")
    assert ciql.load_checkpoint("runs/run")["step"] == 20


# ------------------------------------------------------------------------------------------ signals
class Drawn(ciql.CIQL):
    """It uses NumPy's random numbers, and keeps a running mean in a number."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = 1.0

    def policy_loss(self, batch, advantage):
        self.scale = 0.9 * self.scale + 0.1 * float(advantage.abs().mean())
        return super().policy_loss(batch, advantage / self.scale + np.random.rand())


def stopped_train(config, make_agent=ciql.CIQL):
    """The exit code of a training that is stopped."""
    with pytest.raises(SystemExit) as stopped:
        ciql.train(config, make_agent=make_agent)
    return stopped.value.code


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


def how_to_go_on(out):
    return re.search(r"^stopped at step \d+; go on with (.*)$", out, re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("name", "step", "make_agent"),
    [
        ("SIGINT", 5, ciql.CIQL),
        ("SIGTERM", 15, ciql.CIQL),
        ("SIGHUP", 20, Drawn),
        ("SIGUSR1", 39, Drawn),
    ],
)
def test_stopped_after_any_step_it_resumes_to_the_same_bits(
    lab, monkeypatch, capsys, name, step, make_agent
):
    """Before and after a line of losses, where an evaluation is due, and just before the last.

    What to type for it is printed, as flags, or as Python for an agent of one's own.
    """
    whole, _ = ciql.train(lab_config(), make_agent=make_agent)
    usual = [signal.getsignal(getattr(signal, each)) for each in ciql.STOP_SIGNALS]
    with stopping(monkeypatch, name, step):
        code = stopped_train(lab_config(name="my run"), make_agent)
    assert code == 128 + getattr(signal, name)
    assert [signal.getsignal(getattr(signal, each)) for each in ciql.STOP_SIGNALS] == usual
    assert ciql.load_checkpoint("runs/my run")["step"] == step
    line = how_to_go_on(capsys.readouterr().out)
    if make_agent is ciql.CIQL:
        ciql.train(ciql.parse(shlex.split(line)))
    else:
        exec(line, vars(ciql) | {"Drawn": Drawn})  # noqa: S102
    assert_same_run(whole, Path("runs/my run"))


def test_how_to_go_on_with_data_of_ones_own(lab, monkeypatch, capsys):
    """The line of Python has the data, too."""
    data = ciql.read_dataset("data.hdf5", 10).transitions
    whole, _ = ciql.train(lab_config(), data)
    with stopping(monkeypatch, "SIGTERM", 5), pytest.raises(SystemExit):
        ciql.train(lab_config(name="run"), data)
    line = how_to_go_on(capsys.readouterr().out)
    exec(line, vars(ciql) | {"data": data})  # noqa: S102
    assert_same_run(whole, Path("runs/run"))


def test_stopped_when_all_is_done(lab):
    """A signal after the last evaluation finds nothing to stop."""
    stop = lambda row, folder: row["step"] == 40 and signal.raise_signal(signal.SIGTERM)
    ciql.train(lab_config(), report=stop)


def test_ignored_signals_stay_ignored(lab, monkeypatch):
    """As nohup and shells ignore some for what they start."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping(monkeypatch, "SIGHUP", 5):
        ciql.train(lab_config())
    assert signal.signal(signal.SIGHUP, usual) == signal.SIG_IGN


LONG = [*LAB_FLAGS, *flags(max_steps=1000, eval_interval=500, log_interval=50)]


@contextlib.contextmanager
def started(*arguments, before=(), **options):
    """Context with the script in a process group of its own, of which nothing is left behind."""
    command = [*before, sys.executable, SCRIPT, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **(pipes | options))
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


def wait_until_it_plays(lab, process):
    """Wait until an episode has begun that was not begun before."""
    marks = lab / "playing"
    marks.unlink(missing_ok=True)
    for _ in range(600):
        # The first reset is the one at the start; each episode has two, one is thrown away.
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

    # in training: timeout's SIGTERM
    with started(*LONG, "--name", "stopped", before=["timeout", "300"]) as process:
        read_until(process, "step        50")
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err and f"go on with --resume {folder}" in out
    steps = [ciql.load_checkpoint(folder)["step"]]
    for name, code, moment in (
        ("SIGINT", 130, "first evaluation"),
        ("SIGUSR1", 138, "training"),
        ("SIGKILL", -9, "last evaluation"),
    ):
        with started("--resume", folder) as process:
            if moment == "training":
                read_until(process, "step       550")
            else:
                wait_until_it_plays(lab, process)
            os.killpg(process.pid, getattr(signal, name))
            _, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (code, "")
        steps.append(ciql.load_checkpoint(folder)["step"])
    assert 50 <= steps[0] < 500 == steps[1] < 550 <= steps[2] == steps[3] < 1000
    monkeypatch.delenv("LAB_PAUSE")
    succeeds("--resume", folder)
    assert_same_run(lab / "runs" / "whole", folder)


@pytest.mark.slow
def test_hangup_takes_the_terminal_away(lab, monkeypatch):
    """In the middle of an evaluation: it is finished and saved, though no line can be printed."""
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    ours, its = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    with started(*LAB_FLAGS, "--name", "run", **streams) as process:
        os.close(its)
        wait_until_it_plays(lab, process)
        os.close(ours)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(timeout=30) == 129
    assert ciql.load_checkpoint("runs/run")["step"] == 20
    monkeypatch.delenv("LAB_PAUSE")
    ciql.train(lab_config(name="run"))
    whole, _ = ciql.train(lab_config())
    assert_same_run(whole, Path("runs/run"))
