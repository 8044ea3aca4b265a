"""Bad input: one line, exit code 2, nothing left behind. Faults of the machine: saved, code 1."""

import contextlib
import dataclasses
import functools
import gc
import http.server
import importlib
import os
import resource
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pooch
import psutil
import pytest
import torch
from conftest import LAB_FLAGS, hopper_file, lab_config, metrics, refused

import ciql_pybullet as ciql

DRAW = ciql.draw
PUBLISHED = ciql.Config.dataset  # of which there is a sample


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tau": 0.0}, "tau is 0.0, but must be in (0, 1)"),
        ({"gamma": 1.01}, "gamma is 1.01, but must be in [0, 1]"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"max_steps": 2.5}, "max_steps is 2.5, which cannot be: float is not an instance of int"),
        ({"hidden_sizes": [8]}, "hidden_sizes is [8], which cannot be"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes is (8, 0)"),
        ({"hidden_sizes": ()}, "hidden_sizes is ()"),
        ({"matmul_precision": "low"}, "matmul_precision is 'low'"),
        ({"plot": "no/such/folder/p.png"}, "plot is no/such/folder/p.png"),
        ({"plot": "picture.jpg"}, "plot is picture.jpg"),
        ({"name": "a/b"}, "name is a/b"),
    ],
)
def test_bad_setting(settings, named):
    with refused(named):
        ciql.check(ciql.Config(**settings))


@pytest.mark.parametrize("value", [[1, 2], {1: 2}, {"a"}, Path("a"), ((1, 2), [3])])
def test_setting_of_ones_own_that_a_run_could_not_save(monkeypatch, value):
    fields = [("mine", object, dataclasses.field(default_factory=lambda: value))]
    kind = dataclasses.make_dataclass("Config", fields, bases=(ciql.Config,), frozen=True)
    monkeypatch.setattr(ciql, "Config", kind)
    with refused("mine is ", "which cannot be: "):
        ciql.check(kind())


def test_settings_of_a_subclass():
    """They would be no flags, and a resumed run would not know them."""

    class Mine(ciql.Config):
        pass

    with refused("config is a Mine; add settings to Config itself"):
        ciql.check(Mine())


def test_train_does_not_play():
    with refused("evaluate is set, but train plays nothing"):
        ciql.train(ciql.Config(evaluate="runs/run"))


def test_every_range_lets_its_defaults_through():
    ciql.check(ciql.Config())
    fields = {field.name: field.default for field in dataclasses.fields(ciql.Config)}
    numbers = {name for name, value in fields.items() if type(value) in (int, float)}
    assert numbers.issuperset(ciql.RANGES)
    assert fields.keys() > ciql.NEUTRAL_SETTINGS


HOPPER = ["--dataset", "hopper.hdf5", "--env-id", "HopperBulletEnv-v0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "hopper.hdf5"], "Set env_id (its shapes fit HopperBulletEnv-v0)"),
        (["--dataset", "\udce9.hdf5"], "which cannot be: 'utf-8' codec"),
        ([*HOPPER, "--device", "gpu"], "device is gpu, which is not here"),
        ([*HOPPER, "--device", "meta"], "device is meta, but must be auto, cpu or cuda"),
        (["--resume", "nothing"], "nothing/checkpoint.pt cannot be read (No such file"),
        (["--evaluate", "a_file/run"], "a_file/run/checkpoint.pt cannot be read (Not a directory"),
        (["--resume", "x" * 300], "xxx/checkpoint.pt cannot be read (File name too long)"),
        (["--resume", "a", "--evaluate", "a"], "resume and evaluate are set, and each"),
        (["--wandb-project", "p"], "pip install wandb"),
    ],
)
def test_bad_command_line(monkeypatch, fails, tmp_path, arguments, named):
    """It is refused before the network is asked."""
    (tmp_path / "a_file").write_text("")
    hopper_file(tmp_path / "hopper.hdf5")
    monkeypatch.setattr(pooch, "retrieve", lambda *words, **options: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    fails(*arguments, named=named)


def test_folder_that_cannot_be_a_runs(fails, lab):
    (lab / "a_file").write_text("")
    (lab / "runs" / "notes").mkdir(parents=True)
    (lab / "runs" / "notes" / "config.json").write_text("")
    fails(*LAB_FLAGS, "--out-dir", "a_file/runs", named="Not a directory")
    fails(*LAB_FLAGS, "--name", "x" * 300, named="xxx cannot be made ([Errno 36] File name too")
    fails(*LAB_FLAGS, "--name", "notes", named="runs/notes is there, and no run; take another")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_damaged_checkpoint(lab, fails):
    """And one that would run code when unpickled, and one of an older version."""
    folder, _ = ciql.train(lab_config(name="run"))
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    entry = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[entry.header_offset + 300] ^= 1  # a number in a tensor
    contents = [bytes(flipped), b"", whole[:-500]]
    older = torch.load(path, weights_only=True) | {"version": 1}
    for other in ({"step": Malicious()}, older):
        torch.save(other, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        fails("--resume", "runs/run", named="runs/run/checkpoint.pt cannot be read")


def test_run_that_another_command_cannot_have(lab, fails):
    """It is of another environment, or another process trains in its folder."""
    ciql.train(lab_config(name="run"))
    cause = "HopperBulletEnv-v0, of (15, 3) observations and actions, but the policy in runs/run"
    fails("--evaluate", "runs/run", "--env-id", "HopperBulletEnv-v0", named=f"{cause} has (3, 1)")
    with ciql.lock_folder(lab / "runs/run"):
        cause = "another process trains in runs/run"
        fails("--resume", "runs/run", "--max-steps", "60", named=cause)
    ciql.train(lab_config(resume="runs/run", max_steps=60))


# -------------------------------------------------------------------------------- Weights & Biases
def test_folder_named_wandb(tmp_path, monkeypatch):
    """Python takes it for a package, but it is not the one."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb")
    with refused("pip install wandb"):
        ciql.check(ciql.Config(wandb_project="p"))


@pytest.mark.parametrize(
    ("mode", "named"), [("online", "wandb login, or set WANDB_MODE=offline"), ("bogus", "bogus")]
)
def test_wandb_that_does_not_start(lab, monkeypatch, fails, command, mode, named):
    """It fails late: the folder goes again, but not one that was there before."""
    importlib.import_module("wandb").teardown()  # it would keep the settings of an earlier test
    monkeypatch.setenv("HOME", str(lab))
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    killed = lab / "runs" / "killed" / "code-from-step-0"
    killed.mkdir(parents=True)
    arguments = [*LAB_FLAGS, "--wandb-project", "p"]
    fails(*arguments, named=("Weights & Biases does not start", named))
    assert command(*arguments, "--name", "killed")[0] == 2 and killed.exists()


# ----------------------------------------------------------------------------------------- download
class Server(http.server.BaseHTTPRequestHandler):
    """What it answers is set by the test in ``reply``."""

    reply = None

    def do_GET(self):
        type(self).reply(self)

    def log_message(self, *args):
        pass


def send(body, status=200, length=None):
    def reply(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def stall(handler):
    send(b"\x89HDF", length=10**6)(handler)
    time.sleep(3)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that stands in for the published addresses."""
    monkeypatch.setattr(ciql, "NETWORK_TIMEOUT", 1.0)
    httpd = http.server.ThreadingHTTPServer(("localhost", 0), type("Handler", (Server,), {}))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://localhost:{httpd.server_port}/{{key}}/{{dataset}}.hdf5"
    monkeypatch.setattr(ciql, "DOWNLOAD_URL", url)
    yield httpd.RequestHandlerClass
    httpd.shutdown()
    httpd.server_close()


@contextlib.contextmanager
def full_disk(limit=100_000):
    """A limit on the sizes of files, which is what a full disk is to a writer."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (send(b"gone", 404), "404"),
        (send(b"<html>Sign in to continue</html>"), "cannot be read"),
        (send(b"x" * 5000, length=10**6), "IncompleteRead(5000 bytes read"),
        (stall, "its server cannot be reached"),
        (send(b"x" * 2_000_000), "File too large"),
    ],
)
def test_download_that_fails(server, tmp_path, capsys, reply, cause):
    """The sample where there is one, nothing in the cache, and the cause in words, soon."""
    server.reply = reply
    before = time.monotonic()
    with full_disk():
        assert ciql.find_dataset(PUBLISHED).parent == ciql.SAMPLES
        assert cause in capsys.readouterr().out
        with refused(cause):
            ciql.find_dataset("walker2d-bullet-random-v0")
    assert time.monotonic() - before < 8
    assert not [path for path in tmp_path.rglob("cache/*") if path.is_file()]


def test_download(server, tmp_path, capsys):
    """The whole file is in the cache, where it is found again."""
    good = hopper_file(tmp_path / "good.hdf5").read_bytes()
    server.reply = send(good)
    path = tmp_path / "cache" / f"{PUBLISHED}.hdf5"
    assert ciql.find_dataset(PUBLISHED) == path and capsys.readouterr().out == ""
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]
    server.reply = send(b"", 500)
    assert ciql.find_dataset(PUBLISHED) == path


# ------------------------------------------------------------------------- diverging, disks, memory
def test_diverging_run_stops(lab, command):
    """Before it saves; the message names the cause."""
    code, _, error = command(*LAB_FLAGS, "--lr", "1e30")
    assert code == 1 and error.count("\n") == 1
    assert "value_loss, q_loss" in error and "NaN or infinite up to step 10; lower lr" in error
    assert not list(lab.glob("runs/*/checkpoint.pt"))


def test_full_disk_keeps_the_previous_checkpoint(lab, monkeypatch, command):
    with contextlib.ExitStack() as stack:

        def fill(row, folder):
            stack.enter_context(full_disk((folder / "checkpoint.pt").stat().st_size - 1000))

        monkeypatch.setattr(ciql, "train", functools.partial(ciql.train, report=fill))
        code, _, error = command(*LAB_FLAGS, "--name", "run")
    assert code == 1 and error.count("\n") == 1 and "File too large" in error
    assert "mend that, then go on with --resume runs/run" in error
    assert ciql.load_checkpoint("runs/run")["step"] == 20
    assert {path.name for path in (lab / "runs/run").glob(".*")} <= {".lock"}
    ciql.train(lab_config(resume="runs/run"))
    assert ciql.load_checkpoint("runs/run")["step"] == 40


def test_batch_larger_than_the_memory(lab, fails):
    """It leaves no folder."""
    (lab / "runs").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, limits[1]))
    try:
        cause = "ciql_pybullet: out of memory; lower batch_size, num_neg or hidden_sizes\n"
        fails(*LAB_FLAGS, "--batch-size", "1000000000", "--threads", "1", named=cause)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ------------------------------------------------------------------------- environments that fail
EARLIER = 1 + 2 * 10  # steps at the start and in the first evaluation


@pytest.fixture
def misbehave(lab, monkeypatch):
    """A function that has the Lab behave for so many steps, then raise, or pay, something."""
    environment = importlib.import_module("lab").Lab
    step = environment.step

    def after(steps, deed):
        left = iter(range(steps))

        def misbehaving(self, action):
            observation, reward, *rest = step(self, action)
            if next(left, None) is None:
                reward = deed
            if isinstance(reward, BaseException):
                raise reward
            return observation, reward, *rest

        monkeypatch.setattr(environment, "step", misbehaving)

    return after


@pytest.mark.parametrize("deed", [ZeroDivisionError(), SystemExit()])
def test_environment_that_fails_later(misbehave, command, deed):
    """The run is saved, with the evaluation due; it ends by an error, and goes on as if whole.

    By a traceback, so with exit code 1: also where the environment calls sys.exit().
    """
    misbehave(EARLIER + 3, deed)
    with pytest.raises(RuntimeError, match="an episode of lab:Lab-v0, seed"):
        command(*LAB_FLAGS, "--name", "run")
    checkpoint = ciql.load_checkpoint("runs/run")
    assert checkpoint["step"] == 40
    assert [row["step"] for row in checkpoint["history"]["rows"] if "return_mean" in row] == [20]
    misbehave(1000, None)
    _, curve = ciql.train(lab_config(name="run"))
    _, whole = ciql.train(lab_config(name="whole"))
    assert np.array_equal(curve.returns, whole.returns)


@pytest.mark.filterwarnings("ignore:.*not within the observation space:UserWarning")
def test_observations_that_are_not_finite(lab, monkeypatch):
    """A policy acts on them as on any other, and the return would look like one."""
    environment = importlib.import_module("lab").Lab
    step = environment.step

    def blind(self, action):
        _, *rest = step(self, action)
        return np.full(3, np.nan, np.float32), *rest

    ciql.train(lab_config(name="run", max_steps=20))
    monkeypatch.setattr(environment, "step", blind)
    with pytest.raises(RuntimeError, match="failed: ValueError: step 1 gives"):
        ciql.evaluate(ciql.load_policy("runs/run"), lab_config(), step=20)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_rewards_that_are_not_finite(misbehave, monkeypatch, capsys, reward):
    """The episode is named, no mean leaves it out, and the picture is drawn all the same."""
    monkeypatch.setattr(ciql, "draw", DRAW)
    misbehave(EARLIER + 11, float(reward))  # in the second evaluation's second episode
    folder, _ = ciql.train(lab_config())
    out = capsys.readouterr().out
    last = metrics(folder)[-1]
    assert last["return_mean"] == last["return_2"] == reward != last["return_1"]
    assert f"NOTE   episode 2 returned {reward}" in out and out.count("NOTE") == 1
    assert f"final  {reward} is the mean of the last 2 of 2 evaluations" in out
    assert (folder / "eval_returns.png").exists()


def test_evaluations_leak_nothing(misbehave):
    """200 of them in one process, of which 20 raise: descriptors and memory stay."""
    config = lab_config(eval_episodes=1)
    policy = ciql.GaussianPolicy(3, 1, (8,))
    process = psutil.Process()
    for step in range(200):
        if step == 20:
            gc.collect()
            descriptors = process.num_fds()
            memory = process.memory_info().rss
        fails_now = step % 10 == 0
        misbehave(2 if fails_now else 1000, ZeroDivisionError())
        with pytest.raises(RuntimeError) if fails_now else contextlib.nullcontext():
            ciql.evaluate(policy, config, step)
    assert process.num_fds() <= descriptors
    assert process.memory_info().rss < memory + 10 * 2**20
