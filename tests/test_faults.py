"""Bad input: one line, exit code 2, nothing left behind. Faults of the machine: saved, code 1."""

import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import json
import os
import pickle
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import filelock
import h5py
import numpy as np
import pooch
import psutil
import pytest
import torch
import trustme
from conftest import (
    LAB_FLAGS,
    LAB_SETTINGS,
    SAMPLE,
    SAMPLE_ID,
    SCRIPT,
    episode,
    hopper_file,
    lab_file,
    metrics,
    run_main,
    snapshot,
    write_file,
)
from test_data import robot_environment

import ciql_pybullet
from ciql_pybullet import (
    Config,
    GaussianPolicy,
    InputError,
    check,
    evaluate,
    find_dataset,
    load_checkpoint,
    load_dataset,
    read_dataset,
    train,
)


def fails(monkeypatch, capsys, folder, arguments, expected=2):
    """Run the command line in this process; returns its one line of stderr."""
    before = snapshot(folder)
    code, _, error = run_main(monkeypatch, capsys, arguments)
    assert code == expected, error
    assert error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error
    assert snapshot(folder) == before
    return error


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tau": 0.0}, "tau is 0.0, but must be in (0, 1)"),
        ({"tau": 1.0}, "tau is 1.0"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"gamma": 1.01}, "gamma is 1.01, but must be in [0, 1]"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"max_steps": 0}, "max_steps is 0, but must be in [1, inf)"),
        ({"max_steps": 2.5}, "max_steps is 2.5, which cannot be: float is not an instance of int"),
        ({"compile": 1}, "compile is 1, which cannot be: int is not an instance of bool"),
        ({"lr": "fast"}, "lr is 'fast', which cannot be"),
        ({"hidden_sizes": [8]}, "hidden_sizes is [8], which cannot be"),
        ({"dataset": "caf\udce9.hdf5"}, r"dataset is 'caf\udce9.hdf5', which cannot be"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes is (8, 0)"),
        ({"hidden_sizes": ()}, "hidden_sizes is ()"),
        ({"matmul_precision": "low"}, "matmul_precision is 'low'"),
        ({"plot": "no/such/folder/p.png"}, "plot is no/such/folder/p.png"),
        ({"plot": "picture.jpg"}, "plot is picture.jpg"),
        ({"name": ".."}, "name is .."),
        ({"name": "a/b"}, "name is a/b"),
    ],
)
def test_bad_setting(settings, named):
    with pytest.raises(InputError) as error:
        check(Config(**settings))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_every_range_lets_its_defaults_through():
    check(Config())
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    numbers = {name for name, value in fields.items() if type(value) in (int, float)}
    assert set(ciql_pybullet.RANGES) == numbers
    assert fields.keys() > ciql_pybullet.NEUTRAL_SETTINGS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tau", "2"], "tau is 2.0"),
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "mine.hdf5"], "mine.hdf5, but must be an .hdf5 file, with env_id"),
        (["--device", "gpu"], "device is gpu, which is not here"),
        (["--device", "meta"], "device is meta, but must be auto, cpu or cuda"),
        (["--resume", "nothing"], "nothing/checkpoint.pt cannot be read (No such file"),
        (["--evaluate", "nothing"], "name the folder of a run that was evaluated or stopped"),
        (["--resume", "a_folder"], "a_folder/checkpoint.pt cannot be read (No such file"),
        (["--evaluate", "a_folder/a_file"], "a_file/checkpoint.pt cannot be read (Not a directory"),
        (["--resume", "x" * 300], "xxx/checkpoint.pt cannot be read (File name too long)"),
        (["--evaluate", "x" * 300], "xxx/checkpoint.pt cannot be read (File name too long)"),
        (["--dataset", "x" * 300], "xxx, but must be an .hdf5 file"),
        (["--dataset", "\udce9.hdf5"], "which cannot be: 'utf-8' codec"),
        (["--resume", "a_folder", "--evaluate", "a_folder"], "resume and evaluate are both set"),
        (["--wandb-project", "p"], "pip install wandb"),
    ],
)
def test_bad_command_line(monkeypatch, capsys, tmp_path, arguments, named):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_folder" / "a_file").write_text("")
    monkeypatch.setattr(
        pooch, "retrieve", lambda *args, **options: pytest.fail("asked the network")
    )
    if "--wandb-project" in arguments:
        monkeypatch.setitem(sys.modules, "wandb", None)
    if "--device" in arguments:
        arguments = ["--dataset", str(hopper_file(tmp_path / "data.hdf5")), *arguments[:2]]
        arguments += ["--env-id", "HopperBulletEnv-v0"]
    assert named in fails(monkeypatch, capsys, tmp_path, arguments)


def test_flag_that_cannot_be_read(monkeypatch, capsys):
    """The library's own message, which names the flag."""
    code, out, error = run_main(monkeypatch, capsys, ["--tau", "much"])
    assert code == 2 and "--tau" in out + error and "Traceback" not in error


# -------------------------------------------------------------------------------------------- files
def bad_column(key, change):
    def write(path):
        with h5py.File(hopper_file(path)) as file:
            columns = {name: np.array(file[name]) for name in file}
        hopper_file(path, **{key: change(columns[key])})

    return write


def put(value):
    def change(column):
        column.flat[7] = value
        return column

    return change


def cut_short(path):
    hopper_file(path)
    path.write_bytes(path.read_bytes()[:3000])


def first_rows(number):
    def write(path):
        rows = episode(4, 0, 15, 3)
        write_file(path, {key: column[:number] for key, column in rows.items()})

    return write


def text_column(path):
    hopper_file(path)
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file["rewards"] = "abc"


def group_column(path):
    hopper_file(path)
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file.create_group("rewards")


BAD_FILES = {
    "not there": (lambda path: None, "No such file"),
    "not HDF5": (lambda path: path.write_text("<html>"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (cut_short, "cannot be read"),
    "directory": (lambda path: path.mkdir(), "cannot be read"),
    "missing key": (lambda path: hopper_file(path, terminals=None), "'terminals'"),
    "group for a key": (group_column, "cannot be read"),
    "text for numbers": (text_column, "cannot be read"),
    "lengths differ": (
        bad_column("rewards", lambda column: column[:-1]),
        "rewards of shape (131,) do not fit 132 rows",
    ),
    "flat observations": (bad_column("observations", np.ravel), "observations of shape (1980,)"),
    "wide rewards": (
        bad_column("rewards", lambda column: np.stack([column] * 2, 1)),
        "rewards of shape (132, 2)",
    ),
    "successors of other shape": (
        lambda path: hopper_file(
            path, timeouts=np.zeros(132), next_observations=np.zeros((132, 3))
        ),
        "next_observations is torch.float32 (132, 3), but torch.float32 (132, 15) fits",
    ),
    "observation columns": (
        bad_column("observations", lambda column: column[:, :14]),
        "observations is torch.float32 (129, 14), but torch.float32 (129, 15) fits",
    ),
    "action columns": (
        bad_column("actions", lambda column: column[:, :2]),
        "actions is torch.float32 (129, 2), but torch.float32 (129, 3) fits",
    ),
    "NaN": (bad_column("observations", put(np.nan)), "observations holds NaN"),
    "infinity": (bad_column("rewards", put(np.inf)), "rewards holds NaN or infinite"),
    "action outside the box": (bad_column("actions", put(-1.5)), "up to 1.5"),
    "terminal of a half": (bad_column("terminals", put(0.5)), "other than 0 and 1"),
    "timeout of a half": (
        lambda path: hopper_file(path, timeouts=np.full(132, 0.5)),
        "'timeouts' holds values other than 0 and 1",
    ),
    "no rows": (first_rows(0), "holds 0 transitions, but training needs two"),
    "one row": (first_rows(1), "holds 0 transitions"),
    "two rows": (first_rows(2), "holds 1 transitions"),
    "end rows alone": (
        lambda path: write_file(path, *[episode(0, 1, 15, 3)] * 3),
        "holds 0 transitions",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    make, named = BAD_FILES[name]
    make(tmp_path / "data.hdf5")
    with pytest.raises(InputError) as error:
        config = Config(dataset="data.hdf5", env_id="HopperBulletEnv-v0")
        load_dataset(config, robot_environment("HopperBulletEnv-v0"))
    assert named in str(error.value) and "data.hdf5: " in str(error.value)
    assert "\n" not in str(error.value)


def test_file_larger_than_the_memory(tmp_path, monkeypatch):
    """Of a billion rows that are never written, and so need no room on the disk."""
    shapes = {"observations": (15,), "actions": (3,), "rewards": (), "terminals": ()}
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for key, shape in shapes.items():
            file.create_dataset(key, (10**9, *shape), np.float32, chunks=(10**5, *shape))
    memory = psutil.virtual_memory()._replace(available=2 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(InputError) as error:
        read_dataset("data.hdf5")
    assert str(error.value) == (
        "data.hdf5: 1,000,000,000 rows need 223.52 GiB of memory, 2.00 GiB are free;"
        " take a part of the file"
    )


def test_bad_file_on_the_command_line(monkeypatch, capsys, tmp_path):
    first_rows(2)(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--env-id", "HopperBulletEnv-v0", "--device", "cpu"]
    assert "training needs two" in fails(monkeypatch, capsys, tmp_path, arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    hopper_file(tmp_path / "data.hdf5").chmod(0)
    with pytest.raises(InputError, match="ermission"):
        load_dataset(Config(dataset="data.hdf5"), robot_environment("HopperBulletEnv-v0"))


def test_out_dir_that_cannot_be_made(monkeypatch, capsys, lab):
    (lab / "a_file").write_text("")
    (lab / "runs").mkdir()
    assert "Not a directory" in fails(
        monkeypatch, capsys, lab, [*LAB_FLAGS, "--out-dir", "a_file/runs"]
    )
    error = fails(monkeypatch, capsys, lab, [*LAB_FLAGS, "--name", "x" * 300])
    assert "xxx cannot be made ([Errno 36] File name too long" in error


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_damaged_checkpoint(lab, no_pictures, monkeypatch, capsys):
    """And one that would run code when unpickled, and one of an older version."""
    train(Config(**LAB_SETTINGS, name="run"))
    capsys.readouterr()
    path = lab / "runs" / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    torch.save({"step": 3}, lab / "old.pt")
    old = (lab / "old.pt").read_bytes()
    torch.save({"step": Malicious()}, lab / "malicious.pt")
    malicious = (lab / "malicious.pt").read_bytes()
    entry = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[entry.header_offset + 300] ^= 1  # a number in a tensor
    for content in (
        bytes(flipped),
        b"",
        b"PK\x03\x04 no zip",
        whole[:-500],
        malicious,
        pickle.dumps(Malicious(), 2),
        old,
    ):
        path.write_bytes(content)
        for flag in ("--resume", "--evaluate"):
            error = fails(monkeypatch, capsys, lab, [flag, "runs/run"])
            assert "runs/run/checkpoint.pt cannot be read" in error


def test_evaluation_in_another_environment(lab, no_pictures, monkeypatch, capsys):
    train(Config(**LAB_SETTINGS, name="run"))
    capsys.readouterr()
    arguments = ["--evaluate", "runs/run", "--env-id", "HopperBulletEnv-v0"]
    error = fails(monkeypatch, capsys, lab, arguments)
    assert "HopperBulletEnv-v0, of (15, 3) observations and actions" in error
    assert "runs/run has (3, 1)" in error


def test_two_processes_in_one_folder(lab, no_pictures, monkeypatch, capsys):
    train(Config(**LAB_SETTINGS, name="run"))
    capsys.readouterr()
    arguments = ["--resume", "runs/run", "--max-steps", "60"]
    with filelock.FileLock(lab / "runs/run/.lock"):
        error = fails(monkeypatch, capsys, lab, arguments)
        assert "another process trains in runs/run" in error
    assert run_main(monkeypatch, capsys, arguments)[0] == 0


# -------------------------------------------------------------------------------- Weights & Biases
def test_folder_named_wandb(tmp_path, monkeypatch):
    """Python takes it for a package, but it is not the one."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb")
    with pytest.raises(InputError, match="pip install wandb"):
        check(Config(wandb_project="p"))


@pytest.fixture
def no_login(lab, monkeypatch):
    """Starts fail, late: Weights & Biases wants to be logged in."""
    monkeypatch.setenv("HOME", str(lab))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.parametrize("name", ["config.json", ".gitignore"])
def test_failed_start_leaves_a_folder_that_was_there(lab, no_login, monkeypatch, capsys, name):
    """As that of a project which has such a file of its own."""
    (lab / "project").mkdir()
    (lab / "project" / name).write_text("{}")
    arguments = [*LAB_FLAGS, "--out-dir", ".", "--name", "project", "--wandb-project", "p"]
    assert run_main(monkeypatch, capsys, arguments)[0] == 2
    assert (lab / "project" / name).read_text() == "{}"


def test_wandb_without_a_login(lab, no_login, monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--wandb-project", "p"])
    assert code == 2 and error.count("\n") == 1
    assert "wandb login, or set WANDB_MODE=offline" in error
    assert not list(lab.glob("runs/*"))


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
def server(monkeypatch, tmp_path_factory):
    """An HTTPS server on this machine with a certificate of an authority that we trust."""
    authority = trustme.CA()
    folder = tmp_path_factory.mktemp("certificates")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "authority.pem"))
    monkeypatch.setattr(ciql_pybullet, "NETWORK_TIMEOUT", 1.0)
    httpd = http.server.ThreadingHTTPServer(("localhost", 0), type("Handler", (Server,), {}))
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"https://localhost:{httpd.server_port}/{{key}}/{{dataset}}.hdf5"
    monkeypatch.setattr(ciql_pybullet, "DOWNLOAD_URL", url)
    yield httpd.RequestHandlerClass
    httpd.shutdown()
    httpd.server_close()


def good_file(tmp_path):
    return hopper_file(tmp_path / "good.hdf5").read_bytes()


def assert_cache_is_empty(tmp_path):
    assert not list(tmp_path.glob("cache/*")) and not list(tmp_path.glob("cache/.*"))


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ("good", ""),
        (send(b"gone", 404), "404"),
        (send(b"<html>Sign in to continue</html>"), "cannot be read"),
        (send(b"x" * 5000, length=10**6), "IncompleteRead(5000 bytes read"),
        (stall, "its server cannot be reached"),
        ("untrusted", "its server cannot be reached, SSLError"),
        ("no folder", "Not a directory"),
    ],
    ids=["good", "404", "web page", "cut", "stalled", "untrusted certificate", "no folder"],
)
def test_download(server, monkeypatch, capsys, tmp_path, reply, cause):
    """The whole file in the cache, or none; the embedded sample where there is one."""
    if reply == "untrusted":
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    if reply == "no folder":
        (tmp_path / "a_file").write_text("")
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "a_file" / "cache"))
    server.reply = reply if callable(reply) else send(good_file(tmp_path))
    before = time.monotonic()
    path = find_dataset(SAMPLE_ID)
    note = capsys.readouterr().out
    assert time.monotonic() - before < 10
    if reply == "good":
        assert path == tmp_path / "cache" / f"{SAMPLE_ID}.hdf5"
        assert note == ""
        assert path.read_bytes() == good_file(tmp_path)
        assert list((tmp_path / "cache").iterdir()) == [path]
        server.reply = send(b"", 500)
        assert find_dataset(SAMPLE_ID) == path  # from the cache
        return
    assert path == SAMPLE and cause in note
    with pytest.raises(InputError):
        find_dataset("walker2d-bullet-random-v0")
    assert_cache_is_empty(tmp_path)


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


def test_full_disk_during_download(server, capsys, tmp_path):
    server.reply = send(b"x" * 2_000_000)
    with full_disk():
        assert find_dataset(SAMPLE_ID) == SAMPLE
    assert "File too large" in capsys.readouterr().out
    assert_cache_is_empty(tmp_path)


# ------------------------------------------------------------------------- diverging, disks, memory
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr", "1e30"], "lower lr"),
        ("rewards", "scale the rewards (up to 1e+20 here)"),
        (["--beta", "1e6", "--max-weight", "1e38", "--lr", "1"], "beta or max_weight"),
    ],
    ids=["learning rate", "rewards", "policy weights"],
)
def test_diverging_run_stops(lab, no_pictures, monkeypatch, capsys, change, named):
    """Before it saves; the message names the cause."""
    arguments = LAB_FLAGS
    if change == "rewards":
        lab_file(lab / "data.hdf5", rewards=np.tile(np.r_[0, np.full(10, 1e20)], 3)[:31])
    else:
        arguments = [*LAB_FLAGS, *change]
    code, _, error = run_main(monkeypatch, capsys, arguments)
    assert code == 1
    assert error.count("\n") == 1 and "NaN or infinite up to step 10" in error
    assert named in error
    assert not list(lab.glob("runs/*/checkpoint.pt"))


def test_full_disk_keeps_the_previous_checkpoint(lab, no_pictures, monkeypatch, capsys):
    with contextlib.ExitStack() as stack:

        def fill(row, folder):
            stack.enter_context(full_disk((folder / "checkpoint.pt").stat().st_size - 1000))

        monkeypatch.setattr(ciql_pybullet, "train", functools.partial(train, report=fill))
        code, _, error = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--name", "run"])
    assert code == 1
    assert error.count("\n") == 1 and "File too large" in error
    assert "mend that, then go on with --resume runs/run" in error
    assert load_checkpoint("runs/run")["step"] == 20
    assert {path.name for path in (lab / "runs/run").glob(".*")} <= {".lock"}
    monkeypatch.setattr(ciql_pybullet, "train", train)
    assert run_main(monkeypatch, capsys, ["--resume", "runs/run"])[0] == 0
    assert load_checkpoint("runs/run")["step"] == 40


@pytest.mark.slow
def test_batch_larger_than_the_memory(lab):
    def limit_memory():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    run = subprocess.run(
        [sys.executable, SCRIPT, *LAB_FLAGS, "--batch-size", "1000000000", "--threads", "1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit_memory,
    )
    assert run.returncode == 2
    assert not list(lab.glob("runs/*"))
    assert run.stderr == "ciql_pybullet: out of memory; lower batch_size, num_neg or hidden_sizes\n"


def test_config_survives_json():
    config = Config(dataset="x.hdf5", env_id="AntBulletEnv-v0", hidden_sizes=(3, 4), alpha=0.5)
    text = json.dumps(dataclasses.asdict(config))
    assert ciql_pybullet.config_from_json(text) == config


def test_interrupted_write_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyboardInterrupt):
        ciql_pybullet.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(Path(tmp_path).iterdir()) == [path]


# ------------------------------------------------------------------------- environments that fail
FAULTS = """
import os
import sys

import gymnasium
from lab import Lab


class Faulty(Lab):
    # It behaves for so many steps, and then does the deed. Open, it holds a descriptor.
    steps = 0
    deed = ""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.descriptor = os.open(os.devnull, os.O_RDONLY)

    def close(self):
        os.close(self.descriptor)

    def step(self, action):
        Faulty.steps -= 1
        if Faulty.steps >= 0:
            return super().step(action)
        if Faulty.deed == "raise":
            raise ZeroDivisionError("of the simulator")
        if Faulty.deed == "exit":
            sys.exit()
        if Faulty.deed == "interrupt":
            raise KeyboardInterrupt
        result = super().step(action)
        return result[0], float(Faulty.deed), *result[2:]


gymnasium.register("Faulty-v0", Faulty, max_episode_steps=10)
"""
FAULTY = LAB_SETTINGS | {"env_id": "faults:Faulty-v0"}
EARLIER = 1 + 2 * 10  # steps at the start and in the first evaluation


@pytest.fixture
def misbehave(lab):
    """A function that has the Faulty environment behave for so many steps, then do the deed."""
    (lab / "faults.py").write_text(FAULTS)
    environment = importlib.import_module("faults").Faulty

    def after(steps, deed):
        environment.steps = steps
        environment.deed = deed

    return after


@pytest.mark.parametrize("deed", ["raise", "exit", "interrupt"])
def test_environment_that_fails_later(misbehave, no_pictures, monkeypatch, capsys, deed):
    """The run is saved, with the evaluation due; it ends by an error, and goes on as if whole.

    By a traceback, so with exit code 1: also where the environment calls sys.exit().
    """
    misbehave(EARLIER + 3, deed)
    arguments = [*LAB_FLAGS, "--env-id", "faults:Faulty-v0", "--name", "run"]
    with pytest.raises(RuntimeError, match="an episode of faults:Faulty-v0, seed"):
        run_main(monkeypatch, capsys, arguments)
    checkpoint = load_checkpoint("runs/run")
    assert checkpoint["step"] == 40
    assert [row["step"] for row in checkpoint["rows"] if "return_mean" in row] == [20]
    misbehave(1000, "")
    _, curve = train(Config(**FAULTY, name="run"))
    _, whole = train(Config(**FAULTY, name="whole"))
    assert np.array_equal(curve.returns, whole.returns)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_rewards_that_are_not_finite(misbehave, capsys, reward):
    """The episode is named, no mean leaves it out, and the picture is drawn all the same."""
    misbehave(EARLIER + 11, reward)  # in the second evaluation's second episode
    folder, curve = train(Config(**FAULTY))
    out = capsys.readouterr().out
    assert np.isfinite(curve.means[0]) and not np.isfinite(curve.means[1])
    assert metrics(folder)[-1]["return_mean"] == metrics(folder)[-1]["return_2"] == reward
    assert f"NOTE   episode 2 returned {reward}: faults:Faulty-v0 pays no finite reward" in out
    assert out.count("NOTE") == 1
    assert f"final  {reward} is the mean of all 2 evaluations" in out
    assert (folder / "eval_returns.png").exists()


def test_evaluations_leak_nothing(misbehave):
    """200 of them in one process, of which 20 raise: descriptors and memory stay."""
    config = Config(**FAULTY | {"eval_episodes": 1})
    policy = GaussianPolicy(3, 1, (8,))
    process = psutil.Process()
    for step in range(200):
        if step == 20:
            descriptors = process.num_fds()
            memory = process.memory_info().rss
        fails_now = step % 10 == 0
        misbehave(2 if fails_now else 1000, "raise")
        with pytest.raises(RuntimeError) if fails_now else contextlib.nullcontext():
            evaluate(policy, config, step)
    assert process.num_fds() == descriptors
    assert process.memory_info().rss < memory + 10 * 2**20
