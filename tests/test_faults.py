"""Bad input: one line, exit code 2, nothing left behind. Faults of the machine: saved, code 1."""

import contextlib
import dataclasses
import functools
import http.server
import importlib.util
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
    run_main,
    snapshot,
    write_file,
)

import ciql_pybullet
from ciql_pybullet import (
    ROBOTS,
    Config,
    EvaluationPool,
    InputError,
    check,
    find_dataset,
    load_checkpoint,
    load_dataset,
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
        ({"max_steps": 2.5}, "max_steps is 2.5, but must be of type int"),
        ({"batch_size": True}, "batch_size is True"),
        ({"compile": 1}, "compile is 1"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes is (8, 0)"),
        ({"hidden_sizes": ()}, "hidden_sizes is ()"),
        ({"matmul_precision": "low"}, "matmul_precision is 'low'"),
        ({"plot": "no/such/folder/p.png"}, "plot is no/such/folder/p.png"),
        ({"plot": f"{'x' * 300}.png"}, "cannot be written to (File name too long)"),
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tau", "2"], "tau is 2.0"),
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "mine.hdf5"], "which environment? Set env_id"),
        (["--device", "gpu"], "device is gpu, which is not here"),
        (["--device", "meta"], "device is meta, but must be auto, cpu or cuda"),
        (["--resume", "nothing"], "nothing is not there; name the folder of a run"),
        (["--evaluate", "nothing"], "nothing is not there; name the folder of a run"),
        (["--resume", "a_folder"], "a_folder has no checkpoint.pt"),
        (["--evaluate", "a_folder/a_file"], "a_folder/a_file is a file; name the run's folder"),
        (["--resume", "x" * 300], "xxx/checkpoint.pt cannot be read (File name too long)"),
        (["--evaluate", "x" * 300], "xxx/checkpoint.pt cannot be read (File name too long)"),
        (["--dataset", "x" * 300], "xxx, but must be an .hdf5 file"),
        (["--resume", "a_folder", "--evaluate", "a_folder"], "resume and evaluate are both set"),
        (["--wandb-project", "p"], "pip install wandb"),
    ],
)
def test_bad_command_line(monkeypatch, capsys, tmp_path, pool_here, arguments, named):
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
    for arguments, named in (
        (["--no-such-setting", "1"], "--no-such-setting"),
        (["--tau", "much"], "--tau"),
        (["--max-steps", "1.5"], "--max-steps"),
        (["--matmul-precision", "low"], "--matmul-precision"),
    ):
        code, out, error = run_main(monkeypatch, capsys, arguments)
        assert code == 2 and named in out + error and "Traceback" not in error


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
        "rewards (131,), terminals (132,) do not fit",
    ),
    "flat observations": (bad_column("observations", np.ravel), "observations (1980,)"),
    "wide rewards": (
        bad_column("rewards", lambda column: np.stack([column] * 2, 1)),
        "rewards (132, 2)",
    ),
    "successors of other shape": (
        lambda path: hopper_file(path, next_observations=np.zeros((132, 3))),
        "next_observations (132, 3)",
    ),
    "observation columns": (
        bad_column("observations", lambda column: column[:, :14]),
        "observations has shape (129, 14), but (129, 15) fits",
    ),
    "action columns": (
        bad_column("actions", lambda column: column[:, :2]),
        "actions has shape (129, 2), but (129, 3) fits",
    ),
    "NaN": (bad_column("observations", put(np.nan)), "observations holds NaN"),
    "infinity": (bad_column("rewards", put(np.inf)), "rewards holds NaN or infinite"),
    "action outside the box": (bad_column("actions", put(-1.5)), "up to 1.5"),
    "terminal of a half": (bad_column("terminals", put(0.5)), "other than 0 and 1"),
    "timeout of a half": (
        lambda path: hopper_file(path, timeouts=np.full(132, 0.5)),
        "'timeouts' holds values other than 0 and 1",
    ),
    "no rows": (first_rows(0), "0 rows hold 0 complete transitions; at least 2"),
    "one row": (first_rows(1), "1 rows hold 0 complete transitions; at least 2"),
    "two rows": (first_rows(2), "2 rows hold 1 complete transitions; at least 2"),
    "end rows alone": (
        lambda path: write_file(path, *[episode(0, 0, 15, 3)] * 3),
        "hold 0 complete transitions",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    make, named = BAD_FILES[name]
    make(tmp_path / "data.hdf5")
    with pytest.raises(InputError) as error:
        load_dataset(Config(dataset="data.hdf5"), ROBOTS["HopperBulletEnv-v0"])
    assert named in str(error.value) and "data.hdf5: " in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_file_on_the_command_line(monkeypatch, capsys, tmp_path):
    """With the workers that were started meanwhile."""
    first_rows(2)(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--env-id", "HopperBulletEnv-v0", "--device", "cpu"]
    assert "at least 2 are needed" in fails(monkeypatch, capsys, tmp_path, arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    hopper_file(tmp_path / "data.hdf5").chmod(0)
    with pytest.raises(InputError, match="ermission"):
        load_dataset(Config(dataset="data.hdf5"), ROBOTS["HopperBulletEnv-v0"])


def test_out_dir_that_cannot_be_made(monkeypatch, capsys, lab, pool_here):
    (lab / "a_file").write_text("")
    (lab / "runs").mkdir()
    assert "Not a directory" in fails(
        monkeypatch, capsys, lab, [*LAB_FLAGS, "--out-dir", "a_file/runs"]
    )
    error = fails(monkeypatch, capsys, lab, [*LAB_FLAGS, "--name", "x" * 300])
    assert "xxx cannot be made ([Errno 36] File name too long" in error


def test_names_that_are_not_utf8(lab, pool_here, monkeypatch, capsys):
    """Of the data file; and one with signs that mean something elsewhere."""
    for name in (os.fsdecode(b"caf\xe9.hdf5"), "a#b?.hdf5"):
        lab_file(lab / name)
        code, out, error = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--dataset", name])
        assert (code, error) == (0, "")
        assert "wrote  eval_returns.png" in out
    names = sorted(folder.name for folder in (lab / "runs").iterdir())
    assert names[0].startswith("a_b_-num_neg2") and names[1].startswith("caf_udce9-num_neg2")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_damaged_checkpoint(lab, pool_here, monkeypatch, capsys):
    """And one that would run code when unpickled, and one of an older version."""
    train(Config(**LAB_SETTINGS, name="run"))
    capsys.readouterr()
    path = lab / "runs" / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    torch.save({"step": 3}, lab / "old.pt")
    old = (lab / "old.pt").read_bytes()
    entry = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[entry.header_offset + 300] ^= 1  # a number in a tensor
    for content in (
        bytes(flipped),
        b"",
        b"PK\x03\x04 no zip",
        whole[:-500],
        pickle.dumps(Malicious(), 2),
        old,
    ):
        path.write_bytes(content)
        for flag in ("--resume", "--evaluate"):
            error = fails(monkeypatch, capsys, lab, [flag, "runs/run"])
            assert "runs/run/checkpoint.pt cannot be read" in error


def test_evaluation_in_another_environment(lab, pool_here, monkeypatch, capsys):
    train(Config(**LAB_SETTINGS, name="run"))
    capsys.readouterr()
    arguments = ["--evaluate", "runs/run", "--env-id", "HopperBulletEnv-v0"]
    error = fails(monkeypatch, capsys, lab, arguments)
    assert "HopperBulletEnv-v0, of (15, 3) observations and actions" in error
    assert "runs/run has (3, 1)" in error


def test_two_processes_in_one_folder(lab, pool_here, monkeypatch, capsys):
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
        ciql_pybullet.find_wandb(Config(wandb_project="p"))


def test_wandb_without_a_login(lab, pool_here, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(lab))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    code, _, error = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--wandb-project", "p"])
    assert code == 2 and error.count("\n") == 1
    assert "wandb login, or set WANDB_MODE=offline" in error
    assert not list(lab.glob("runs/*"))


@pytest.mark.slow
def test_wandb_offline(lab):
    """With a data file of an odd name, and signs that the terminal's encoding lacks."""
    lab_file(lab / "a#b.hdf5")
    words = [*LAB_FLAGS, "--dataset", "a#b.hdf5", "--threads", "1", "--wandb-project", "p"]
    environment = {"HOME": str(lab), "WANDB_MODE": "offline", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(
        [sys.executable, SCRIPT, *words],
        check=False,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert r" \xb1 " in run.stdout
    (folder,) = lab.glob("runs/a_b-*")
    assert list(folder.glob("wandb/offline-run-*"))


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
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"https://localhost:{httpd.server_port}/{{key}}/{{dataset}}.hdf5"
    monkeypatch.setattr(ciql_pybullet, "DOWNLOAD_URL", url)
    yield httpd.RequestHandlerClass
    httpd.shutdown()
    httpd.server_close()


def good_file(tmp_path):
    return hopper_file(tmp_path / "good.hdf5").read_bytes()


def assert_cache_is_empty(tmp_path):
    assert not list(tmp_path.glob("cache/*")) and not list(tmp_path.glob("cache/.*"))


def test_download(server, tmp_path, monkeypatch):
    asked = []

    def reply(handler):
        asked.append(handler.path)
        send(good_file(tmp_path))(handler)

    server.reply = reply
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    path = find_dataset("hopper-bullet-mixed-v0")
    assert "RES_OPTIONS" not in os.environ
    assert path == tmp_path / "cache" / "hopper-bullet-mixed-v0.hdf5"
    assert path.read_bytes() == good_file(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == [path]
    assert asked == ["/xv3p0h7dzgxt8xb/hopper-bullet-mixed-v0.hdf5"]
    server.reply = send(b"", 500)
    assert find_dataset("hopper-bullet-mixed-v0") == path  # from the cache


def test_two_downloads_at_once(server, tmp_path):
    body = good_file(tmp_path)

    def slowly(handler):
        send(body[:5000], length=len(body))(handler)
        time.sleep(0.5)
        handler.wfile.write(body[5000:])

    server.reply = slowly
    threads = []
    for _ in range(2):
        threads.append(threading.Thread(target=find_dataset, args=("hopper-bullet-mixed-v0",)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [body]


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (send(b"gone", 404), "404"),
        (send(b"<html>Sign in to continue</html>"), "cannot be read"),
        (send(b"x" * 5000, length=10**6), "IncompleteRead(5000 bytes read"),
        (stall, "timed out"),
        (lambda handler: handler.connection.close(), "cannot download"),
        ("wrong shapes", "observations has shape (129, 15), but (129, 26) fits"),
        ("untrusted", "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["404", "web page", "cut", "stalled", "dropped", "wrong shapes", "untrusted certificate"],
)
def test_failed_download(server, monkeypatch, tmp_path, capsys, reply, cause):
    """One line; no file left; the embedded sample where there is one, an error where not."""
    if reply == "untrusted":
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    server.reply = reply if callable(reply) else send(good_file(tmp_path))
    before = time.monotonic()
    assert find_dataset(SAMPLE_ID) == SAMPLE
    assert time.monotonic() - before < 10
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 1 and cause in notes[0]
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


def test_full_disk_during_download(server, tmp_path, capsys):
    server.reply = send(b"x" * 2_000_000)
    with full_disk():
        assert find_dataset(SAMPLE_ID) == SAMPLE
    assert "File too large" in capsys.readouterr().out
    assert_cache_is_empty(tmp_path)


def test_cache_folder_that_cannot_be_made(server, monkeypatch, tmp_path, capsys):
    server.reply = send(good_file(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "cache"))
    assert find_dataset(SAMPLE_ID) == SAMPLE
    assert "cannot download" in capsys.readouterr().out


# ------------------------------------------------------------------ diverging, disks, memory, pools
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr", "1e30"], "lower lr"),
        ("rewards", "scale the rewards (up to 1e+20 here)"),
        (["--beta", "1e6", "--max-weight", "1e38", "--lr", "1"], "beta or max_weight"),
    ],
    ids=["learning rate", "rewards", "policy weights"],
)
def test_diverging_run_stops(lab, pool_here, monkeypatch, capsys, change, named):
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


def test_full_disk_keeps_the_previous_checkpoint(lab, pool_here, monkeypatch, capsys):
    with contextlib.ExitStack() as stack:

        def fill(row, folder):
            stack.enter_context(full_disk((folder / "checkpoint.pt").stat().st_size - 1000))

        monkeypatch.setattr(ciql_pybullet, "train", functools.partial(train, report=fill))
        code, _, error = run_main(monkeypatch, capsys, [*LAB_FLAGS, "--name", "run"])
    assert code == 1
    assert error.count("\n") == 1 and "File too large" in error
    assert load_checkpoint("runs/run")["progress"].step == 20
    assert {path.name for path in (lab / "runs/run").glob(".*")} <= {".lock"}
    monkeypatch.setattr(ciql_pybullet, "train", train)
    assert run_main(monkeypatch, capsys, ["--resume", "runs/run"])[0] == 0
    assert load_checkpoint("runs/run")["progress"].step == 40


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
    assert run.stderr == "ciql_pybullet: out of memory; lower batch_size, num_neg or hidden_sizes\n"


@pytest.mark.slow
def test_closed_streams(lab):
    """What is printed goes nowhere, and above all not into a file of the run."""
    words = [sys.executable, str(SCRIPT), *LAB_FLAGS, "--name", "run", "--threads", "1"]
    run = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words], check=False, timeout=120)
    assert run.returncode == 0
    assert load_checkpoint("runs/run")["progress"].step == 40
    assert (lab / "runs/run/metrics.csv").read_text().count("\n") == 5
    for path in lab.rglob("*"):
        assert path.is_dir() or b"mean return" not in path.read_bytes()


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("bug")])
def test_signal_mask_after_a_pool_that_does_not_start(monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(ciql_pybullet.concurrent.futures, "ProcessPoolExecutor", broken)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    expected = InputError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected, match="no space|bug"):
        EvaluationPool("lab:Lab-v0", 2)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_config_survives_json():
    config = Config(dataset="x.hdf5", env_id="AntBulletEnv-v0", hidden_sizes=(3, 4), alpha=0.5)
    text = ciql_pybullet.json.dumps(dataclasses.asdict(config))
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
