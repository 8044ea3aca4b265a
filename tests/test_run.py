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
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LAB_FLAGS,
    LAB_SETTINGS,
    ROOT,
    SCRIPT,
    flags,
    lab_config,
    lab_file,
    metrics,
    refused,
    snapshot,
)
from PIL import Image

import ciql_pybullet
from ciql_pybullet import (
    CIQL,
    Config,
    GaussianPolicy,
    curve_of,
    evaluate,
    final_return,
    load_checkpoint,
    load_policy,
    train,
)

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


def read_until(process, words):
    """Read its log up to a line with ``words``."""
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended without {words!r}: {process.stderr.read()}")


def assert_same_run(one, other):
    """Two run folders hold the same curve, weights, averages and random state, to the bit."""
    assert metrics(one) == metrics(other)
    left, right = (load_checkpoint(folder) for folder in (one, other))
    for key in ("step", "rows", "sums", "counts", "agent", "policy", "random_state"):
        assert flat(left[key]) == flat(right[key]), key


def flat(part):
    """A part of a checkpoint as something that can be compared; the speed is left out."""
    if isinstance(part, dict):
        return {name: flat(value) for name, value in part.items() if name != "steps_per_second"}
    if isinstance(part, list):
        return [flat(value) for value in part]
    return part.tolist() if isinstance(part, torch.Tensor) else part


# ------------------------------------------------------------------------------------- the main job
@pytest.mark.slow
def test_300_steps(tmp_path, command):
    """The main job in small: what it prints, evaluates and writes."""
    arguments = ["--max-steps", "300", "--log-interval", "100", "--eval-interval", "150", *SMALL]
    process = start(*arguments, "--eval-episodes", "2", "--alpha", "0.5")
    with ended(process):
        out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
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

    (folder,) = (tmp_path / "runs").iterdir()
    words = "halfcheetah-bullet-medium-v0-alpha0.5-hidden_sizes8-batch_size16-seed0-20"
    assert folder.name.startswith(words)
    picture = (folder / "eval_returns.png").read_bytes()
    assert picture == (tmp_path / "eval_returns.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    rows = metrics(folder)
    assert [row["step"] for row in rows] == ["100", "150", "200", "300", "300"]
    assert [bool(row["return_2"]) for row in rows] == [False, True, False, False, True]
    assert [bool(row["value_loss"]) for row in rows] == [True, False, True, True, False]
    columns = (
        "step value_loss q_loss policy_loss penalty gap1 gap2 q v advantage policy_std clamp_open"
        " steps_per_second return_mean return_std score return_1 return_2"
    )
    assert (folder / "metrics.csv").read_text().splitlines()[0] == columns.replace(" ", ",")
    assert load_checkpoint(folder)["step"] == 300
    events = next(folder.glob("events.out.tfevents.*")).read_bytes()
    assert b"training/policy_loss" in events and b"| alpha | 0.5 |" in events
    assert {path.name for path in folder.glob(".*")} <= {".lock"}

    # What was run can be known.
    settings = json.loads((folder / "config.json").read_text())
    assert settings["max_steps"] == 300
    (process,) = settings["processes"]
    assert process["torch"] == torch.__version__ and process["numpy"] == np.__version__
    assert (process["agent"], process["policy"]) == ("CIQL", "GaussianPolicy")
    assert len(process["data_checksum"]) == 8 and process["processor"]
    assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", process["commit"])
    copied = folder / "code-from-step-0" / "ciql_pybullet.py"
    assert copied.read_bytes() == SCRIPT.read_bytes()

    # The saved policy plays what training saw, to the bit.
    last = re.findall(evaluation, out)[-1]
    code, out, err = command("--evaluate", folder)
    assert (code, err) == (0, "")
    assert re.findall(evaluation, out) == [last]
    action = load_policy(folder).act(np.zeros(26, np.float32))
    assert action.shape == (6,) and np.abs(action).max() <= 1


# ------------------------------------------------------------------------------ from other programs
def test_train_can_be_called(lab, no_pictures):
    """Twice: the same settings give the same numbers, in two folders, and leave no trace."""
    config = lab_config(matmul_precision="medium")
    reported = []

    def report(row, folder):
        reported.append((row, load_checkpoint(folder)["step"]))

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
    assert [row["return_mean"] for row, _ in reported] == curve.means.tolist()
    assert np.allclose(curve.means, [returns.mean() for returns in curve.returns])
    assert np.array_equal(again.returns, curve.returns) and len(curve.returns[1]) == 2
    assert first != second
    assert_same_run(first, second)


@pytest.mark.parametrize("number", ciql_pybullet.STOP_SIGNALS)
def test_stopped_from_python(lab, no_pictures, capsys, number):
    """SystemExit once all is saved; the handlers of before are back."""
    config = lab_config(name="my run")
    usual = [signal.getsignal(number) for number in ciql_pybullet.STOP_SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        train(config, report=lambda row, folder: signal.raise_signal(number))
    assert stopped.value.code == 128 + number
    assert load_checkpoint("runs/my run")["step"] == 20
    assert "stopped at step 20; go on with --resume 'runs/my run'\n" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in ciql_pybullet.STOP_SIGNALS] == usual
    last = lab_config(resume="runs/my run")
    train(last, report=lambda row, folder: signal.raise_signal(number))  # nothing is left to stop


def program(*words):
    """What a Python program says that ends well."""
    own = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *words]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, env=own)
    return run.stdout + run.stderr


def test_importing_has_no_side_effects(tmp_path):
    code = """
        import sys, threading, torch
        before = torch.get_rng_state()
        import ciql_pybullet
        assert threading.active_count() == 1 and torch.equal(before, torch.get_rng_state())
        heavy = {"pybullet", "gymnasium", "matplotlib", "tyro", "tensorboard", "torch._dynamo"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    assert program("-c", textwrap.dedent(code)) == "" and not list(tmp_path.iterdir())


class OtherPolicy(GaussianPolicy):
    """Acts half as far."""

    def forward(self, observations):
        return super().forward(observations) / 2


def make_other_policy(observation_dim, action_dim, config):
    return OtherPolicy(observation_dim, action_dim, config.hidden_sizes)


class OtherAgent(CIQL):
    """A subclass whose policy is its own."""

    def __init__(self, observation_dim, action_dim, config):
        super().__init__(observation_dim, action_dim, config)
        self.policy = make_other_policy(observation_dim, action_dim, config)
        self.make_optimizer(self.policy, self.value, self.critic)


def test_policy_of_a_subclass(lab, no_pictures, command, fails):
    """It is trained, saved, and loaded by the function that makes it; else refused in one line."""
    config = lab_config(name="run")
    folder, curve = train(config, make_agent=OtherAgent)
    code, out, _ = command("--evaluate", "runs/run")
    assert code == 2 and "--evaluate" not in out  # of the log, as it does not work
    policy = load_policy(folder, make_policy=make_other_policy)
    assert np.abs([policy.act(np.full(3, x, np.float32)) for x in (-1e4, 1e4)]).max() <= 0.5
    assert evaluate(policy, config, 40)["return_1"] == curve.returns[-1][0]
    fails("--evaluate", "runs/run", named="Other")
    fails("--resume", "runs/run", "--max-steps", "60", named="Other")
    copied = folder / "code-from-step-0" / Path(__file__).name
    assert copied.read_bytes() == Path(__file__).read_bytes()


def test_notebook(lab, no_pictures, monkeypatch):
    """A class that is defined where no file is, as in a notebook."""
    monkeypatch.setitem(sys.modules, "typed_in", types.ModuleType("typed_in"))
    typed = type("Typed", (OtherAgent,), {"__module__": "typed_in"})
    _, curve = train(lab_config(), make_agent=typed)
    assert curve.steps.tolist() == [20, 40]


def test_policy_is_played_in_eval_mode(lab):
    """With dropout, two evaluations are the same, and training goes on in training mode."""
    policy = GaussianPolicy(3, 1, (8,))
    policy.mu.insert(1, torch.nn.Dropout(0.5))
    assert evaluate(policy, lab_config(), 1) == evaluate(policy, lab_config(), 1)
    assert policy.training


def test_film(lab, no_pictures, command):
    """Of the final policy, and again when it is evaluated; the evaluation is the same without."""
    folder, curve = train(lab_config(film=True, name="run"))
    path = folder / "policy.gif"
    film = path.read_bytes()
    with Image.open(path) as images:
        assert images.format == "GIF" and images.n_frames == 4  # of ten steps, every third
    path.unlink()
    code, out, _ = command("--evaluate", "runs/run", "--film")
    assert code == 0 and f"return {curve.means[-1]:.1f} ± " in out
    assert path.read_bytes() == film


# -------------------------------------------------------------------------------- the final return
@pytest.mark.parametrize(
    ("means", "value", "evaluations"),
    [
        (range(1, 101), 95.5, 10),
        (range(1, 11), 9, 3),
        (range(1, 31), 29, 3),
        (range(1, 41), 38.5, 4),
        ([5.0, 7.0], 6, 2),
        ([float("nan"), 1, 2, 3], 2, 3),
    ],
)
def test_final_return(means, value, evaluations):
    """The last tenth of the evaluations, three at least; all where there are fewer."""
    final = final_return(list(means))
    assert (final.value, final.evaluations, final.total) == (value, evaluations, len(means))


def test_final_return_is_of_means(lab, no_pictures, capsys):
    """An evaluation of many episodes counts as much as one of few, also after a resume."""
    train(lab_config(name="run"))
    capsys.readouterr()
    _, curve = train(lab_config(resume="runs/run", max_steps=60, eval_episodes=7))
    assert [len(returns) for returns in curve.returns] == [2, 2, 7]
    mean = np.mean([returns.mean() for returns in curve.returns])
    assert f"final  {mean:.1f} is the mean of all 3 evaluations\n" in capsys.readouterr().out
    assert abs(mean - np.concatenate(curve.returns).mean()) > 1e-3


# -------------------------------------------------------------------------------------- run folders
def test_names_of_folders():
    """They say what differs from the defaults; two of one second differ."""
    varied = Config(
        dataset="my data.hdf5", alpha=0, clamp_advantage=False, hidden_sizes=(8, 9), seed=3
    )
    configs = (varied, varied, Config(), Config(name="mine"))
    names = [ciql_pybullet.folder_of(config).name for config in configs]
    assert names[0].startswith("my_data-alpha0-no-clamp_advantage-hidden_sizes8x9-seed3-20")
    assert names[1].startswith("my_data-alpha0-") and names[1] != names[0]
    assert names[2].startswith("halfcheetah-bullet-medium-v0-seed0-20")
    assert names[3] == "mine"


def test_the_same_command_again(lab, no_pictures, command, fails):
    """As a job that is queued again: it goes on, is refused with other settings, or is done."""
    again = [*LAB_FLAGS, "--name", "r"]
    folder = lab / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    fails(*again, named="runs/r is there, and no run; take another --name")
    (folder / "config.json").unlink()

    (folder / "code-from-step-0").mkdir()  # killed before its first evaluation
    code, out, _ = command(*again, "--max-steps", "20")
    assert code == 0 and "run    runs/r, from step 0\n" in out
    code, out, _ = command(*again)
    assert code == 0 and "run    runs/r, from step 20\n" in out and "NOTE" not in out
    code, out, _ = command(*again)
    assert code == 0 and "runs/r has all of its 40 steps: nothing is left" in out
    cause = "there already, with seed 0 and not 3, tau 0.8 and not 0.9; take another --name"
    fails(*again, "--tau", "0.9", "--seed", "3", named=cause)
    whole, _ = train(lab_config(name="whole"))
    assert_same_run(whole, folder)


def test_a_setting_of_ones_own(lab):
    """One line in Config: it is a flag, in the name, config.json and the NOTE of a resume."""
    own = lab / "mine.py"
    source = SCRIPT.read_text()
    line = "    gamma: float = 0.99  # discount\n"
    assert source.count(line) == 1
    own.write_text(source.replace(line, line + "    smooth: float = 0.0  # mine\n"))
    program(own, *LAB_FLAGS, "--smooth", "0.5")
    (folder,) = (lab / "runs").iterdir()
    assert "-smooth0.5-" in folder.name
    assert json.loads((folder / "config.json").read_text())["smooth"] == 0.5
    out = program(own, "--resume", folder, "--smooth", "0.25", "--max-steps", "50")
    assert "NOTE   the run goes on with other settings: smooth 0.25 (was 0.5)\n" in out


def test_titles():
    iql = Config(alpha=0, clamp_advantage=False)
    cloning = Config(beta=0, dataset="a/mine.hdf5")
    for config, agent, source, title in (
        (Config(), "CIQL", "", "CIQL on {}\nseed0"),
        (Config(alpha=0), "CIQL", "", "CIQL without penalty on {}\nalpha0, seed0"),
        (cloning, "CIQL", "", "behaviour cloning on mine\nbeta0, seed0"),
        (iql, "CIQL", "", "IQL on {}\nalpha0, no-clamp_advantage, seed0"),
        (Config(), "Idea", "a", "Idea on {} (re-collected, not the published file)\nseed0"),
    ):
        expected = title.format("halfcheetah-bullet-medium-v0")
        assert ciql_pybullet.title_of(config, agent, source) == expected


def test_settings_of_another_version_can_be_read():
    """A setting that the run's version did not have takes its default, one gone is left out."""
    config = Config(tau=0.9, hidden_sizes=(8, 9), plot="p.png")
    values = dataclasses.asdict(config) | {"batch_parts": 2, "ray_address": None}
    del values["threads"]
    assert ciql_pybullet.config_from_json(json.dumps(values)) == config


# ----------------------------------------------------------------------------------------- resuming
def with_reward(self, batch, losses=CIQL.losses):
    loss, figures = losses(self, batch)
    return loss, figures | {"reward": batch.rewards.mean()}


def test_resuming(lab, no_pictures, monkeypatch, command, fails):
    """What may change, what is noted, and what is refused."""
    resume = ["--resume", "runs/run"]
    train(lab_config(name="run"))
    before = snapshot(lab)
    code, out, err = command(*resume)
    assert (code, err) == (0, "") and snapshot(lab) == before
    assert "runs/run has all of its 40 steps: nothing is left" in out
    fails(*resume, "--tau", "2", named="tau is 2.0, but must be in (0, 1)")
    cause = "max_steps is 10, but runs/run is at step 40; raise it"
    fails(*resume, "--max-steps", "10", named=cause)
    fails(*resume, "--hidden-sizes", "9", "--max-steps", "50", named="an agent of another size")
    fails(*resume, "--name", "other", named="name is other, but a run that is there has its own")
    (lab / "other.py").write_text(
        "import gymnasium\nimport lab\ngymnasium.register('O-v0', lab.Lab, max_episode_steps=10)\n"
    )
    cause = "is of lab:Lab-v0, not of other:O-v0"
    fails(*LAB_FLAGS, "--name", "run", "--env-id", "other:O-v0", "--max-steps", "60", named=cause)

    (lab / "elsewhere").mkdir()
    shutil.move("data.hdf5", "elsewhere/same.hdf5")
    code, out, _ = command(*resume, "--dataset", "elsewhere/same.hdf5", "--max-steps", "50")
    assert code == 0 and "NOTE" not in out and "run    runs/run, from step 40\n" in out
    changes = ["--tau", "0.9", "--no-clamp-advantage", "--max-steps", "60", "--eval-episodes", "1"]
    code, out, _ = command(*resume, *changes)
    assert code == 0
    assert "other settings: tau 0.9 (was 0.8), clamp_advantage False (was True)\n" in out
    config = lab_config(max_steps=70, dataset="elsewhere/same.hdf5", resume="runs/run")
    with refused("holds a CIQL, not a OtherAgent"):
        train(config, make_agent=OtherAgent)
    monkeypatch.setattr(CIQL, "losses", with_reward)  # a figure more from here on
    code, out, _ = command(*resume, "--policy-lr-decay", "--max-steps", "70")
    assert code == 0 and "by the cosine over the new max_steps" in out
    assert "policy_lr_decay True (was False)\n" in out

    lab_file(lab / "elsewhere" / "same.hdf5", actions=np.zeros((31, 1)))
    cause = "was trained on other data than elsewhere/same.hdf5 holds now"
    fails(*resume, "--max-steps", "80", named=cause)
    rows = metrics(lab / "runs/run")
    assert [row["step"] for row in rows[-6:]] == ["50", "50", "60", "60", "70", "70"]
    assert [bool(row["reward"]) for row in rows[-4:]] == [False, False, True, False]
    assert all(None not in row and len(row) == len(rows[0]) for row in rows)
    assert (lab / "runs/run/metrics.csv").read_text().count("step") == 2  # one head of the table
    events = b"".join(path.read_bytes() for path in Path("runs/run").glob("events.*"))
    assert b"training/reward" in events


def test_threads_are_kept_with_the_run(lab, no_pictures, monkeypatch):
    """The number is settled at the start, so that a resume is exact on another machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    train(lab_config(threads=0, name="run"))
    assert load_checkpoint("runs/run")["config"].threads == 4  # at most
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    train(lab_config(threads=0, resume="runs/run", max_steps=60))
    assert load_checkpoint("runs/run")["config"].threads == 4


def test_a_complete_run_answers_for_itself_alone(lab, no_pictures):
    """Another agent, or other data, under its name does not get its curve."""
    config = lab_config(name="run")
    train(config)
    with refused("holds a CIQL, not a OtherAgent"):
        train(config, make_agent=OtherAgent)
    lab_file(lab / "data.hdf5", actions=np.zeros((31, 1)))
    with refused("was trained on other data"):
        train(config)


def test_policy_that_samples(lab, no_pictures, monkeypatch):
    """Its evaluations take no random number from training, and an episode is that of its seed."""
    config = lab_config()
    usual, _ = train(config)
    act = GaussianPolicy.act
    sampled = lambda policy, x: act(policy, x) + torch.rand(1).numpy() / 10
    monkeypatch.setattr(GaussianPolicy, "act", sampled)
    runs = [train(dataclasses.replace(config, name=name)) for name in ("one", "other")]
    for folder, _ in runs:
        left, right = load_checkpoint(usual), load_checkpoint(folder)
        for name, tensor in left["policy"].items():
            assert torch.equal(tensor, right["policy"][name])
    assert (runs[0][1].means == runs[1][1].means).all()
    assert (runs[0][1].means != curve_of(left["rows"]).means).all()


def test_lines_that_cannot_be_printed(lab, no_pictures, monkeypatch):
    """A log that is full at any line loses no row and no evaluation; a hangup stays one."""
    whole, _ = train(lab_config())
    for wanted in range(6):  # 10, 20 and its evaluation, 30, 40 and its evaluation
        lines = iter(range(6))

        def say(line, lines=lines, wanted=wanted):
            if line.startswith("step") and next(lines) == wanted:
                raise OSError(errno.ENOSPC, "No space left on device")

        run = f"runs/run{wanted}"
        with monkeypatch.context() as patched:
            patched.setattr(ciql_pybullet, "say", say)
            with pytest.raises(OSError, match="No space left") as failed:
                train(lab_config(name=f"run{wanted}"))
        assert f"--resume {run}" in failed.value.__notes__[0]
        train(lab_config(resume=run))
        assert_same_run(whole, Path(run))

    def hang_up(line):
        if line.startswith("step"):
            signal.raise_signal(signal.SIGHUP)
        if line.startswith("stopped"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ciql_pybullet, "say", hang_up)
    with pytest.raises(SystemExit) as stopped:
        train(lab_config(name="hung-up"))
    assert stopped.value.code == 129
    assert load_checkpoint("runs/hung-up")["step"] == 10


class Figures(CIQL):
    """A figure of every second step, one that is a number, and one with a name of its own."""

    def losses(self, batch):
        loss, figures = super().losses(batch)
        figures["number"] = 0.5
        figures["attached"] = self.value(batch.observations).mean()
        if self.steps % 2:
            figures["sometimes"] = torch.tensor(7.0)
        return loss, figures | {self.own: torch.ones(self.shape)}

    own = "mine"
    shape = ()


def test_figures_of_all_kinds(lab, no_pictures, monkeypatch):
    """Each is the mean of the steps that reported it; a column's name and a vector are refused."""
    folder, _ = train(lab_config(), make_agent=Figures)
    for row in load_checkpoint(folder)["rows"]:
        if "v" in row:
            assert (row["number"], row["sometimes"], row["mine"]) == (0.5, 7, 1)
    for name in ("return_mean", "step", "score"):
        monkeypatch.setattr(Figures, "own", name)
        with refused(f"a metric is named {name}, as a column"):
            train(lab_config(), make_agent=Figures)
    monkeypatch.setattr(Figures, "shape", (16,))
    with refused("the metric score is of shape (16,); average it"):
        train(lab_config(), make_agent=Figures)


def test_two_starts_under_one_name(lab, no_pictures, monkeypatch):
    """The second finds a checkpoint that was not there when it looked."""
    config = lab_config(name="run")
    folder, _ = train(config)
    before = (folder / "checkpoint.pt").read_bytes()
    exists = os.path.exists
    looks = iter([False])
    monkeypatch.setattr(os.path, "exists", lambda path: next(looks, None) is None and exists(path))
    with refused("another process trained in runs/run meanwhile"):
        train(config)
    monkeypatch.setattr(os.path, "exists", exists)
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_stopped_before_the_first_step(lab, no_pictures, monkeypatch):
    """Nothing is left behind."""
    stop = lambda line: line.startswith("run ") and signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(ciql_pybullet, "say", stop)
    with pytest.raises(SystemExit) as stopped:
        train(lab_config())
    assert stopped.value.code == 143 and not list((lab / "runs").iterdir())


LONG = flags(**LAB_SETTINGS | {"max_steps": 200, "eval_interval": 100, "lr": 1e-3})


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
def test_stopped_and_killed_runs_resume_to_the_same_bits(lab, no_pictures, monkeypatch, command):
    """Every signal, to the whole group of processes, against the run that was never stopped."""
    assert command(*LONG, "--name", "whole")[0] == 0
    folder = lab / "runs" / "stopped"
    monkeypatch.setenv("LAB_PAUSE", "0.05")

    # in training: timeout's SIGTERM; nohup's SIGHUP is ignored
    nohup = ["timeout", "300", "nohup"]
    process = start(*LONG, "--name", "stopped", before=nohup, stdin=subprocess.DEVNULL)
    with ended(process):
        read_until(process, "step        10")
        os.killpg(process.pid, signal.SIGHUP)  # timeout itself ends by it
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err and "go on with --resume runs/stopped" in out
    assert 10 <= load_checkpoint(folder)["step"] < 100

    steps = []
    for number, code, moment in (
        (signal.SIGINT, 130, "first evaluation"),
        (signal.SIGHUP, 129, "training"),
        (signal.SIGUSR1, 138, "last evaluation"),
        (signal.SIGKILL, -9, "last evaluation"),
    ):
        process = start("--resume", folder)
        with ended(process):
            if moment == "training":
                read_until(process, "step       110")
            else:
                wait_until_it_plays(lab, process)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (code, "") or number == signal.SIGKILL
            assert number == signal.SIGKILL or "go on with --resume" in out
        steps.append(load_checkpoint(folder)["step"])
    assert steps[0] == 100 and 110 <= steps[1] < 200 and steps[2:] == [200, 200]
    monkeypatch.delenv("LAB_PAUSE")
    assert command("--resume", folder)[0] == 0
    assert_same_run(lab / "runs" / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "import"), (signal.SIGINT, "data"), (signal.SIGTERM, "data")],
)
def test_stopped_before_training(lab, number, moment):
    """While modules are imported, and while the first environment is made: silent, no folder."""
    process = start(*LAB_FLAGS, "--no-compile" if moment == "import" else "--compile")
    with ended(process):
        if moment == "import":
            time.sleep(1)
        else:
            read_until(process, "agent ")
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (-number, "")
    assert not (lab / "runs").exists()


# -------------------------------------------------------------------------------- Weights & Biases
def records_of(content):
    """The records of a file in LevelDB's log format, after W&B's own header of seven bytes."""
    position = 7
    record = b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is padding
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


def wandb_rows(folder):
    """The history in all offline runs of a folder, as W&B stored it, without its own columns."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in records_of(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or i.nested_key[-1]): i.value_json for i in record.history.item}
                row = {key.split("/")[-1]: json.loads(text) for key, text in items.items()}
                rows.append({key: value for key, value in row.items() if key[0] != "_"})
    return rows


@pytest.mark.slow
def test_wandb_has_the_rows_of_metrics_csv(lab, no_pictures, monkeypatch):
    """Offline: each row once, also after a resume, and for the second run of a process."""
    import wandb

    wandb.teardown()  # it would keep the settings of an earlier test
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(lab))
    train(lab_config(wandb_project="p", name="a#b"))
    train(lab_config(wandb_project="p", name="second", seed=1))
    time.sleep(3)  # it would scan folders again and again
    train(lab_config(wandb_project="p", resume="runs/a#b", max_steps=60))
    for name, steps in (("a#b", 9), ("second", 6)):
        folder = lab / "runs" / name
        with open(folder / "metrics.csv", newline="") as file:
            expected = []
            for row in csv.DictReader(file):
                expected.append({key: float(value) for key, value in row.items() if value})
        assert len(expected) == steps and wandb_rows(folder) == expected
