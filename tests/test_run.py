"""Whole runs, as a user starts them: log, picture, run folder, resuming, other programs."""

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
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LAB_FLAGS,
    LAB_SETTINGS,
    ROOT,
    SCRIPT,
    PoolHere,
    children_of,
    flags,
    gone,
    hopper_file,
    lab_file,
    metrics,
    run_main,
    snapshot,
)
from PIL import Image

import ciql_pybullet
from ciql_pybullet import CIQL, Config, load_checkpoint, load_policy, train

SMALL = ["--device", "cpu", "--no-compile", "--hidden-sizes", "8", "--batch-size", "16"]


def start(*arguments, before=(), **options):
    """Start the script in a process group of its own."""
    return subprocess.Popen(
        [*before, sys.executable, SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@contextlib.contextmanager
def ended(process):
    """Context that leaves nothing of the process group behind."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process, timeout=60):
    """Its exit code, and the rest of stdout and stderr."""
    with ended(process):
        out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def read_until(process, words):
    """Read its log up to a line with ``words``."""
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended without {words!r}: {process.stderr.read()}")


def run_folders(tmp_path):
    """The run folders, in the order in which they were made."""
    return sorted((tmp_path / "runs").iterdir(), key=lambda folder: folder.name[-22:])


def assert_same_run(one, other):
    """Two run folders hold the same curve, weights, averages and random state, to the bit."""
    assert metrics(one) == metrics(other)
    left, right = (load_checkpoint(folder) for folder in (one, other))
    assert_same(vars(left["progress"]), vars(right["progress"]), "progress")
    for key in ("agent", "policy", "random_state"):
        assert_same(left[key], right[key], key)


def assert_same(one, other, where):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key != "steps_per_second":
                assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# ------------------------------------------------------------------------------------- the main job
@pytest.mark.slow
def test_300_steps(tmp_path, pool_here, monkeypatch, capsys):
    """The main job in small: what it prints, evaluates and writes."""
    arguments = ["--max-steps", "300", "--log-interval", "100", "--eval-interval", "150", *SMALL]
    process = start(*arguments, "--eval-episodes", "2", "--alpha", "0.5")
    code, out, err = finish(process, 200)
    assert (code, err) == (0, "")
    assert "argv[0]" not in out and "pybullet build time" not in out
    sample = "halfcheetah-bullet-medium-sample.hdf5"
    assert f"{sample}: 100,100 rows, 100 episodes, mean return 861.8 ± 90.6\n" in out
    assert "100,000 transitions, 0 of them terminations, in d4rl-pybullet's layout\n" in out
    assert "NOTE   this is not the published halfcheetah-bullet-medium-v0, but re-collected" in out
    number = r"-?\d\S*"
    losses = rf"step +\d+  value_loss {number}  q_loss {number}  policy_loss {number}  "
    evaluation = rf"step +\d+  return {number} ± {number} over 2 episodes  score {number}"
    assert len(re.findall(losses + r".*  \d+ steps/s\n", out)) == 3
    assert len(re.findall(evaluation, out)) == 2
    assert (tmp_path / "eval_returns.png").read_bytes().startswith(b"\x89PNG")

    (folder,) = run_folders(tmp_path)
    words = "halfcheetah-bullet-medium-v0-alpha0.5-hidden_sizes8-batch_size16-seed0-20"
    assert folder.name.startswith(words)
    picture = (folder / "eval_returns.png").read_bytes()
    assert picture == (tmp_path / "eval_returns.png").read_bytes()
    rows = metrics(folder)
    assert [row["step"] for row in rows] == ["100", "150", "200", "300"]
    assert [bool(row["return_2"]) for row in rows] == [False, True, False, True]
    assert [bool(row["value_loss"]) for row in rows] == [True, False, True, True]
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 300
    assert load_checkpoint(folder)["progress"].step == 300
    events = next(folder.glob("events.out.tfevents.*")).read_bytes()
    assert b"training/policy_loss" in events and b"| alpha | 0.5 |" in events
    assert {path.name for path in folder.glob(".*")} <= {".lock"}

    # the saved policy plays what training saw, to the bit
    last = re.findall(evaluation, out)[-1]
    code, out, err = run_main(monkeypatch, capsys, ["--evaluate", str(folder)])
    assert (code, err) == (0, "")
    assert re.findall(evaluation, out) == [last]
    action = load_policy(folder).act(np.zeros(26, np.float32))
    assert action.shape == (6,) and np.abs(action).max() <= 1


# ------------------------------------------------------------------------------ from other programs
def test_train_can_be_called(lab, pool_here):
    """Twice: the same settings give the same numbers, in two folders, and leave no trace."""
    config = Config(**LAB_SETTINGS, matmul_precision="medium")
    reported = []

    def report(row, folder):
        reported.append((row, load_checkpoint(folder)["progress"].step))

    def state():
        handlers = [signal.getsignal(number) for number in ciql_pybullet.STOP_SIGNALS]
        precision = torch.get_float32_matmul_precision()
        active = threading.active_count()
        return handlers, precision, active, torch.get_num_threads(), dict(os.environ)

    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        train(config)  # imports what stays
        before = state()
        first, curve = train(config, report=report)
        second, again = train(config)
    assert state() == before
    assert curve.steps.tolist() == [20, 40]
    assert [row["step"] for row, _ in reported] == [step for _, step in reported] == [20, 40]
    assert np.allclose([row["return_mean"] for row, _ in reported], curve.returns.mean(1))
    assert curve.returns.shape == (2, 2)
    assert np.array_equal(again.returns, curve.returns)
    assert first != second
    assert_same_run(first, second)


def test_interrupted_from_python(lab, pool_here, capsys):
    """Ctrl-C raises KeyboardInterrupt once all is saved, other signals SystemExit."""
    config = Config(**LAB_SETTINGS, name="my run")
    usual = [signal.getsignal(number) for number in ciql_pybullet.STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train(config, report=lambda row, folder: signal.raise_signal(signal.SIGINT))
    assert load_checkpoint("runs/my run")["progress"].step == 20
    assert "stopped at step 20; go on with --resume 'runs/my run'\n" in capsys.readouterr().out
    resumed = dataclasses.replace(config, resume="runs/my run", max_steps=60)
    with pytest.raises(SystemExit) as stopped:
        train(resumed, report=lambda row, folder: signal.raise_signal(signal.SIGHUP))
    assert stopped.value.code == 128 + signal.SIGHUP
    assert load_checkpoint("runs/my run")["progress"].step == 40
    assert [signal.getsignal(number) for number in ciql_pybullet.STOP_SIGNALS] == usual


def test_importing_has_no_side_effects(tmp_path):
    code = """
        import sys, threading, torch
        before = torch.get_rng_state()
        import ciql_pybullet
        assert threading.active_count() == 1 and torch.equal(before, torch.get_rng_state())
        heavy = {"pybullet", "gymnasium", "matplotlib", "tyro", "tensorboard", "torch._dynamo"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_program_without_a_main_guard(lab):
    """Its workers import it and would train as well: it is told what is missing."""
    (lab / "program.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import ciql_pybullet\nciql_pybullet.train(ciql_pybullet.Config(**{LAB_SETTINGS!r}))\n"
    )
    run = subprocess.run(
        [sys.executable, "program.py"], check=False, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1
    assert 'a program calls train without if __name__ == "__main__":' in run.stderr
    assert not (lab / "runs").exists()


OTHER_POLICY = """
import ciql_pybullet


class OtherPolicy(ciql_pybullet.GaussianPolicy):
    '''Acts half as far.'''

    def forward(self, observations):
        return super().forward(observations) / 2
"""


@pytest.mark.slow
def test_policy_of_another_class(lab, monkeypatch, capsys):
    """Named in one place, it is trained, saved, loaded, sent to workers and evaluated."""
    (lab / "other_policy.py").write_text(OTHER_POLICY)
    import other_policy

    def make_policy(observation_dim, action_dim, config):
        return other_policy.OtherPolicy(observation_dim, action_dim, config.hidden_sizes)

    monkeypatch.setattr(ciql_pybullet, "make_policy", make_policy)
    folder, curve = train(Config(**LAB_SETTINGS))
    policy = load_policy(folder)
    assert type(policy).__name__ == "OtherPolicy"
    assert np.abs([policy.act(np.full(3, x, np.float32)) for x in (-1e4, 1e4)]).max() <= 0.5
    seeds = np.random.SeedSequence([0, 40]).generate_state(2).tolist()
    assert PoolHere("lab:Lab-v0", 1).play(policy, seeds).tolist() == curve.returns[-1].tolist()


def test_film(lab, pool_here, monkeypatch, capsys):
    """Of the final policy, and again when it is evaluated; the evaluation is the same without."""
    folder, curve = train(Config(**LAB_SETTINGS, film=True, name="run"))
    film = (folder / "policy.gif").read_bytes()
    assert film.startswith(b"GIF89a")
    with Image.open(folder / "policy.gif") as images:
        assert images.n_frames == 4  # of ten steps, every third
    (folder / "policy.gif").unlink()
    code, out, _ = run_main(monkeypatch, capsys, ["--evaluate", "runs/run", "--film"])
    assert code == 0 and f"return {curve.returns[-1].mean():.1f} ± " in out
    assert (folder / "policy.gif").read_bytes() == film


# -------------------------------------------------------------------------------------- run folders
def test_names_of_folders(tmp_path):
    """They say what differs from the defaults; two of one second differ; a name is taken once."""
    varied = Config(
        dataset="my data.hdf5", alpha=0, clamp_advantage=False, hidden_sizes=(8, 9), seed=3
    )
    configs = (varied, varied, Config(), Config(name="mine"))
    names = [ciql_pybullet.make_folder(config).name for config in configs]
    assert names[0].startswith("my_data-alpha0-no-clamp_advantage-hidden_sizes8x9-seed3-20")
    assert names[1].startswith("my_data-alpha0-") and names[1] != names[0]
    assert names[2].startswith("halfcheetah-bullet-medium-v0-seed0-20")
    assert names[3] == "mine"
    with pytest.raises(ciql_pybullet.InputError, match="runs/mine is there already; take another"):
        ciql_pybullet.make_folder(Config(name="mine"))
    with pytest.raises(ciql_pybullet.InputError, match="runs/mine is there already; take another"):
        ciql_pybullet.train(Config(name="mine", dataset="not read.hdf5", env_id="not made"))


def test_titles():
    expected = {
        Config(): "CIQL on halfcheetah-bullet-medium-v0\nseed0",
        Config(alpha=0): "CIQL without penalty on halfcheetah-bullet-medium-v0\nalpha0, seed0",
        Config(beta=0, dataset="a/mine.hdf5"): "behaviour cloning on mine\nbeta0, seed0",
    }
    for config, title in expected.items():
        assert ciql_pybullet.title_of(config, "CIQL", "") == title
    iql = Config(alpha=0, clamp_advantage=False)
    assert ciql_pybullet.title_of(iql, "CIQL", "").startswith("IQL on ")
    assert ciql_pybullet.title_of(Config(), "Idea", "re-collected after").startswith(
        "Idea on halfcheetah-bullet-medium-v0 (re-collected, not the published file)\n"
    )


def test_settings_of_another_version_can_be_read():
    """A setting that the run's version did not have takes its default, one gone is left out."""
    config = Config(tau=0.9, hidden_sizes=(8, 9), plot="p.png")
    values = dataclasses.asdict(config) | {"seeds": [], "ray_address": None}
    del values["threads"]
    assert ciql_pybullet.config_from_json(json.dumps(values)) == config


# ----------------------------------------------------------------------------------------- resuming
class OtherAgent(CIQL):
    pass


def test_resuming(lab, pool_here, monkeypatch, capsys):
    """What may change, what is noted, and what is refused."""

    def resume(*arguments):
        return run_main(monkeypatch, capsys, ["--resume", "runs/run", *arguments])

    code, _, _ = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--name", "run"])
    assert code == 0
    before = snapshot(lab)
    code, out, err = resume()
    assert (code, err) == (0, "")
    assert "runs/run has all of its 40 steps: nothing is left" in out
    for arguments, cause in (
        (["--tau", "2"], "tau is 2.0, but must be in (0, 1)"),
        (["--max-steps", "10"], "max_steps is 10, but runs/run is at step 40; raise it"),
        (["--hidden-sizes", "9", "--max-steps", "50"], "an agent of another size"),
        (["--evaluate", "runs/run"], "resume and evaluate are both set"),
        (["--name", "other"], "name is other, but runs/run has its own"),
    ):
        code, _, err = resume(*arguments)
        assert code == 2 and cause in err and err.count("\n") == 1
    assert snapshot(lab) == before

    (lab / "elsewhere").mkdir()
    shutil.move("data.hdf5", "elsewhere/same.hdf5")
    code, out, _ = resume("--dataset", "elsewhere/same.hdf5", "--max-steps", "50", "--threads", "1")
    assert code == 0 and "NOTE" not in out and "run    runs/run, from step 40\n" in out
    changes = ["--tau", "0.9", "--no-clamp-advantage", "--max-steps", "60", "--eval-episodes", "1"]
    code, out, _ = resume(*changes)
    assert code == 0
    assert "other settings: tau 0.9 (was 0.8), clamp_advantage False (was True)\n" in out
    data = {"dataset": "elsewhere/same.hdf5"}
    config = Config(**LAB_SETTINGS | {"max_steps": 70} | data, resume="runs/run")
    with pytest.raises(ciql_pybullet.InputError, match="holds a CIQL, not a OtherAgent"):
        train(config, make_agent=OtherAgent)
    code, out, _ = resume("--policy-lr-decay", "--max-steps", "70")
    assert code == 0 and "by the cosine over the new max_steps" in out
    assert "policy_lr_decay True (was False)\n" in out

    lab_file(lab / "elsewhere" / "same.hdf5", actions=np.zeros((31, 1)))
    code, _, err = resume("--max-steps", "80")
    assert code == 2 and "was trained on other data than elsewhere/same.hdf5; put those" in err
    assert [row["step"] for row in metrics(lab / "runs/run")][-3:] == ["50", "60", "70"]
    assert (lab / "runs/run/metrics.csv").read_text().count("step") == 2  # one head of the table


def test_lines_that_cannot_be_printed(lab, pool_here, monkeypatch):
    """A log that is full at any line loses no row and no evaluation; a hangup stays one."""
    config = Config(**LAB_SETTINGS)
    whole, _ = train(config)
    for wanted in range(6):  # 10, 20 and its evaluation, 30, 40 and its evaluation
        lines = iter(range(6))

        def say(line, lines=lines, wanted=wanted):
            if line.startswith("step") and next(lines) == wanted:
                raise OSError(errno.ENOSPC, "No space left on device")

        name = f"run{wanted}"
        with monkeypatch.context() as patched:
            patched.setattr(ciql_pybullet, "say", say)
            with pytest.raises(OSError, match="No space left") as failed:
                train(dataclasses.replace(config, name=name))
        assert f"--resume runs/{name}" in failed.value.__notes__[0]
        folder, _ = train(dataclasses.replace(config, resume=f"runs/{name}"))
        assert_same_run(whole, folder)

    def hang_up(line):
        if line.startswith("step"):
            signal.raise_signal(signal.SIGHUP)
        if line.startswith(("step", "stopped")):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ciql_pybullet, "say", hang_up)
    with pytest.raises(SystemExit) as stopped:
        train(dataclasses.replace(config, name="hung-up"))
    assert stopped.value.code == 129
    assert load_checkpoint("runs/hung-up")["progress"].step == 10


def test_resumed_run_logs_one_figure_more(lab, pool_here, monkeypatch):
    config = Config(**LAB_SETTINGS, name="run")
    train(config)
    losses = CIQL.losses

    def with_reward(self, batch, *arguments):
        loss, figures = losses(self, batch, *arguments)
        return loss, figures | {"reward": batch.rewards.mean()}

    monkeypatch.setattr(CIQL, "losses", with_reward)
    train(dataclasses.replace(config, resume="runs/run", max_steps=60))
    with open("runs/run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["reward"]) for row in rows] == [False] * 4 + [True] * 2
    assert all(None not in row and len(row) == len(rows[0]) for row in rows)
    events = b"".join(path.read_bytes() for path in Path("runs/run").glob("events.*"))
    assert b"training/reward" in events


LONG = flags(
    **LAB_SETTINGS | {"max_steps": 200, "eval_interval": 100, "log_interval": 10, "lr": 1e-3}
)


def wait_until_both_play(lab, process):
    """Wait until two workers have begun an episode that was not begun before."""
    marks = lab / "playing"
    marks.unlink(missing_ok=True)
    for _ in range(600):
        if marks.exists() and len(set(marks.read_text().split())) == 2:
            return
        assert process.poll() is None
        time.sleep(0.1)
    pytest.fail("no evaluation in a minute")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_stopped_and_killed_runs_resume_to_the_same_bits(lab, monkeypatch, capsys):
    """Every signal, to the whole group of processes, against the run that was never stopped."""
    with monkeypatch.context() as patch:
        patch.setattr(ciql_pybullet, "EvaluationPool", PoolHere)
        code, _, _ = run_main(monkeypatch, capsys, [*LONG, "--name", "whole"])
    assert code == 0
    folder = lab / "runs" / "stopped"
    monkeypatch.setenv("LAB_PAUSE", "0.05")

    # in training: timeout's SIGTERM; nohup's SIGHUP is ignored
    nohup = ["timeout", "300", "nohup"]
    process = start(*LONG, "--name", "stopped", before=nohup, stdin=subprocess.DEVNULL)
    with ended(process):
        read_until(process, "step        10")
        (script,) = children_of(process.pid)
        workers = children_of(script)
        os.kill(script, signal.SIGHUP)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # which timeout passes on, to the group as well
        out, err = process.communicate(timeout=30)
        assert process.returncode == 143 and "Traceback" not in err
        assert "go on with --resume runs/stopped" in out
        assert all(gone(child) for child in [script, *workers])
    assert 10 <= load_checkpoint(folder)["progress"].step < 100

    steps = []
    for number, code, moment in (
        (signal.SIGINT, 130, "first evaluation"),
        (signal.SIGHUP, 129, "training"),
        (signal.SIGUSR1, 138, "last evaluation"),
        (signal.SIGKILL, -9, "last evaluation"),
    ):
        threads = "1" if moment == "training" else "2"
        process = start("--resume", str(folder), "--threads", threads)
        with ended(process):
            if moment == "training":
                read_until(process, "step       110")
            else:
                wait_until_both_play(lab, process)
            children = children_of(process.pid)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (code, "") or number == signal.SIGKILL
            assert number == signal.SIGKILL or "go on with --resume" in out
            assert all(gone(child) for child in children)
        steps.append(load_checkpoint(folder)["progress"].step)
    assert steps[0] == 100 and 110 <= steps[1] < 200 and steps[2:] == [200, 200]
    monkeypatch.setattr(ciql_pybullet, "EvaluationPool", PoolHere)
    code, _, _ = run_main(monkeypatch, capsys, ["--resume", str(folder)])
    assert code == 0
    assert_same_run(lab / "runs" / "whole", folder)


@pytest.mark.slow
def test_stopped_while_workers_import(lab):
    """In silence, with nothing left behind."""
    hopper_file(lab / "data.hdf5")  # of a robot that is known without asking them
    process = start(*LAB_FLAGS, "--env-id", "HopperBulletEnv-v0")
    with ended(process):
        read_until(process, "data   data.hdf5")
        children = children_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, "")
        assert all(gone(child) for child in children)
    assert not (lab / "runs").exists()


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_run_survives_its_workers(lab, monkeypatch, capfd):
    """SIGKILL of each of two workers, while they play and while they idle: the run goes on."""
    monkeypatch.setenv("LAB_PAUSE", "0.05")
    config = Config(**LAB_SETTINGS | {"max_steps": 80})
    with monkeypatch.context() as patch:
        patch.setattr(ciql_pybullet, "EvaluationPool", PoolHere)
        whole, _ = train(dataclasses.replace(config, name="whole"))
    killed = []
    next_one = threading.Event()
    marks = lab / "playing"

    def kill(workers):
        """The first of them, then the second, and so on."""
        worker = sorted(workers)[len(killed) % 2]
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
        assert gone(worker)

    def players():
        return {int(pid) for pid in marks.read_text().split()} if marks.exists() else set()

    def kill_players():
        for _ in range(2):
            marks.unlink(missing_ok=True)
            deadline = time.monotonic() + 60
            while len(players()) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            kill(players())
            next_one.wait(60)
            next_one.clear()

    def report(row, folder):
        if row["step"] <= 40:
            next_one.set()
        else:  # idle now
            workers = [pid for pid in children_of(os.getpid()) if "spawn_main" in command_of(pid)]
            assert len(workers) == 2
            kill(workers)

    killer = threading.Thread(target=kill_players, daemon=True)
    killer.start()
    folder, _ = train(dataclasses.replace(config, name="killed"), report=report)
    killer.join(60)
    assert len(set(killed)) == 4
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_run_whose_workers_die_again_and_again(lab, monkeypatch, capsys):
    """Saved, one line, exit code 1; and it goes on from there once they live."""
    (lab / "die").write_text("")
    code, _, err = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--name", "run"])
    assert code == 1 and err.count("\n") == 1 and "worker processes die" in err
    assert load_checkpoint("runs/run")["progress"].step == 20
    (lab / "die").unlink()
    monkeypatch.setattr(ciql_pybullet, "EvaluationPool", PoolHere)
    for arguments in (["--resume", "runs/run"], [*LAB_FLAGS, "--name", "whole"]):
        code, _, _ = run_main(monkeypatch, capsys, arguments)
        assert code == 0
    assert_same_run(lab / "runs" / "whole", lab / "runs" / "run")
