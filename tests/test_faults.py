"""Bad files, settings, networks and disks: one line on stderr, exit code 2, nothing written or lost."""

import http.server
import os
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pooch
import pytest
import trustme
from conftest import SAMPLE, SAMPLE_ID, SCRIPT, episode, hopper_file, run_main, write_file

import ciql_pybullet
from ciql_pybullet import SETTINGS, Config, InputError, find_dataset

HOPPER = ["--env-id", "HopperBulletEnv-v0", "--device", "cpu", "--no-compile"]


def snapshot(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def fails(monkeypatch, capsys, folder, arguments):
    """Run the command line in this process; returns its one line of stderr."""
    before = snapshot(folder)
    code, _, error = run_main(monkeypatch, capsys, arguments)
    assert code == 2
    assert error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error
    assert snapshot(folder) == before
    return error


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tau", "0"], "tau must be greater than 0"),
        (["--tau", "1"], "tau must be less than 1"),
        (["--tau", "nan"], "tau must"),
        (["--tau", "much"], "--tau"),
        (["--gamma", "1.01"], "gamma must be less than or equal to 1"),
        (["--gamma", "-0.1"], "gamma must be greater than or equal to 0"),
        (["--beta", "-1"], "beta must be greater"),
        (["--beta", "inf"], "beta must be a finite number"),
        (["--alpha", "-1"], "alpha must be greater"),
        (["--alpha", "nan"], "alpha must be a finite number"),
        (["--num-neg", "0"], "num_neg must be greater than or equal to 1"),
        (["--lr", "0"], "lr must be greater than 0"),
        (["--lr", "inf"], "lr must be a finite"),
        (["--polyak", "0"], "polyak must be greater than 0"),
        (["--max-weight", "0.5"], "max_weight must be greater than or equal to 1"),
        (["--min-log-std", "1"], "min_log_std must be less than or equal to 0"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--max-steps", "0"], "max_steps must be greater than or equal to 1"),
        (["--max-steps", "-5"], "max_steps must be"),
        (["--max-steps", "1.5"], "--max-steps"),
        (["--log-interval", "0"], "log_interval must be"),
        (["--eval-interval", "0"], "eval_interval must be"),
        (["--eval-episodes", "0"], "eval_episodes must be"),
        (["--seed", "-1"], "seed must be"),
        (["--hidden-sizes", "0"], "hidden_sizes"),
        (["--hidden-sizes"], "hidden_sizes"),
        (["--dataset", "halfcheeta-bullet-medium"], "halfcheetah-bullet-medium-v0"),
        (["--dataset", "mine.hdf5"], "an .hdf5 file, with env_id"),
        (["--device", "gpu"], "device is gpu"),
        (["--device", "cuda:99"], "device is cuda:99"),
        (["--plot", "no/such/folder/p.png"], "plot is no/such/folder/p.png"),
        (["--plot", "picture.jpg"], "plot is picture.jpg"),
        (["--resume", "nothing"], "nothing/config.json"),
        (["--evaluate", "nothing"], "nothing/config.json"),
        (["--wandb-project", "p"], "pip install wandb"),
        (["--threads", "-1"], "threads must be"),
        (["--env-id", "Pendulum-v1"], "HopperBulletEnv-v0"),
        (["--no-such-setting", "1"], "--no-such-setting"),
    ],
)  # fmt: skip
def test_bad_setting(monkeypatch, capsys, tmp_path, arguments, named):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **options: pytest.fail("asked the network"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert named in fails(monkeypatch, capsys, tmp_path, arguments)


# ------------------------------------------------------------------------------------------------- files


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


def one_row(path):
    write_file(path, {key: column[:1] for key, column in episode(1, 0, 15, 3).items()})


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
    "not HDF5": (lambda path: path.write_text("<html>"), "data.hdf5: cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "data.hdf5: cannot be read"),
    "truncated": (cut_short, "data.hdf5: cannot be read"),
    "directory": (lambda path: path.mkdir(), "data.hdf5: cannot be read"),
    "missing key": (lambda path: hopper_file(path, terminals=None), "'terminals'"),
    "group for a key": (group_column, "cannot be read"),
    "text for numbers": (text_column, "cannot be read"),
    "lengths differ": (
        bad_column("rewards", lambda column: column[:-1]),
        "rewards (131,), terminals (132,) do not fit",
    ),
    "flat observations": (bad_column("observations", np.ravel), "observations (1980,)"),
    "wide rewards": (bad_column("rewards", lambda column: np.stack([column] * 2, 1)), "rewards (132, 2)"),
    "observation columns": (bad_column("observations", lambda c: c[:, :14]), "has (14, 3) columns"),
    "action columns": (bad_column("actions", lambda column: column[:, :2]), "has (15, 2) columns"),
    "NaN": (bad_column("observations", put(np.nan)), "['observations'] holds NaN"),
    "infinity": (bad_column("rewards", put(np.inf)), "['rewards'] holds NaN or infinite"),
    "action outside the box": (bad_column("actions", put(-1.5)), "'actions' reach outside [-1, 1]"),
    "terminal of a half": (bad_column("terminals", put(0.5)), "'terminals' holds values other than 0 and 1"),
    "no rows": (lambda path: write_file(path, {k: c[:0] for k, c in episode(1, 0, 15, 3).items()}), "0 rows hold no"),
    "one row": (one_row, "1 rows hold no complete transition"),
    "end rows alone": (bad_column("terminals", np.ones_like), "hold no complete transition"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(monkeypatch, capsys, tmp_path, name):
    make, named = BAD_FILES[name]
    path = tmp_path / "data.hdf5"
    make(path)
    error = fails(monkeypatch, capsys, tmp_path, ["--dataset", "data.hdf5", *HOPPER])
    assert named in error and "data.hdf5" in error


def test_out_dir_that_cannot_be_made(monkeypatch, capsys, tmp_path):
    hopper_file(tmp_path / "data.hdf5")
    (tmp_path / "a_file").write_text("")
    error = fails(monkeypatch, capsys, tmp_path, ["--dataset", "data.hdf5", *HOPPER, "--out-dir", "a_file/runs"])
    assert "Not a directory: 'a_file/runs/data-seed0-" in error and "another place" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(monkeypatch, capsys, tmp_path):
    hopper_file(tmp_path / "data.hdf5").chmod(0)
    assert "ermission" in fails(monkeypatch, capsys, tmp_path, ["--dataset", "data.hdf5", *HOPPER])


def test_damaged_checkpoint(monkeypatch, capsys, tmp_path):
    """And one that would run code when unpickled."""
    import pickle

    class Malicious:
        def __reduce__(self):
            return os.system, ("touch hacked",)

    (tmp_path / "config.json").write_bytes(SETTINGS.dump_json(Config()))
    for content in (b"", b"PK\x03\x04 no zip", pickle.dumps(Malicious())):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        for flag in ("--resume", "--evaluate"):
            assert "checkpoint.pt" in fails(monkeypatch, capsys, tmp_path, [flag, str(tmp_path)])


# ---------------------------------------------------------------------------------------------- download


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
    """An HTTPS server on this machine with a certificate of an authority that this process trusts."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("certificates")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "authority.pem"))
    monkeypatch.setattr(ciql_pybullet, "NETWORK_TIMEOUT", 1.0)
    httpd = http.server.ThreadingHTTPServer(("localhost", 0), type("Handler", (Server,), {}))
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"https://localhost:{httpd.server_port}/set.hdf5"
    for name in ciql_pybullet.DOWNLOAD_URLS:
        monkeypatch.setitem(ciql_pybullet.DOWNLOAD_URLS, name, url)
    yield httpd.RequestHandlerClass
    httpd.shutdown()
    httpd.server_close()


def good_file(tmp_path):
    return hopper_file(tmp_path / "good.hdf5").read_bytes()


def test_download(server, tmp_path):
    server.reply = send(good_file(tmp_path))
    path = find_dataset("hopper-bullet-mixed-v0")
    assert path == tmp_path / "cache" / "hopper-bullet-mixed-v0.hdf5"
    assert path.read_bytes() == good_file(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == [path]
    server.reply = send(b"", 500)
    assert find_dataset("hopper-bullet-mixed-v0") == path  # from the cache


def test_two_downloads_at_once(server, tmp_path):
    body = good_file(tmp_path)

    def slowly(handler):
        send(body[:5000], length=len(body))(handler)
        time.sleep(0.5)
        handler.wfile.write(body[5000:])

    server.reply = slowly
    threads = [threading.Thread(target=find_dataset, args=("hopper-bullet-mixed-v0",)) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [body]


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (send(b"gone", 404), "404"),
        (send(b"<html>Sign in to continue</html>"), "cannot be read"),
        (send(b"x" * 5000, length=10**6), "IncompleteRead(5000 bytes read"),
        (stall, "timed out"),
        (lambda handler: handler.connection.close(), "cannot download"),
        (lambda handler: time.sleep(3), "timed out"),
        ("wrong shapes", "has (15, 3) columns, but the environment (26, 6)"),
        ("untrusted", "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["404", "web page", "cut", "stalled", "dropped", "silent", "wrong shapes", "untrusted certificate"],
)
def test_failed_download(server, monkeypatch, tmp_path, capsys, reply, cause):
    """One line; no file left; the embedded sample where there is one, an error where there is none."""
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
    assert not list(tmp_path.glob("cache/*")) and not list(tmp_path.glob("cache/.*"))


def test_full_disk_during_download(server, tmp_path, capsys):
    """Under a limit on file sizes, which is what a full disk is to a writer."""
    server.reply = send(b"x" * 2_000_000)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert find_dataset(SAMPLE_ID) == SAMPLE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in capsys.readouterr().out
    assert not list(tmp_path.glob("cache/*")) and not list(tmp_path.glob("cache/.*"))


def test_cache_folder_that_cannot_be_made(server, monkeypatch, tmp_path, capsys):
    server.reply = send(good_file(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "cache"))
    assert find_dataset(SAMPLE_ID) == SAMPLE
    assert "cannot download" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- diverging, disks


def test_diverging_run_stops(tmp_path, monkeypatch, capsys):
    hopper_file(tmp_path / "data.hdf5")
    flags = ["--dataset", "data.hdf5", *HOPPER, "--lr", "1e30", "--max-steps", "50", "--log-interval", "10"]
    code, _, error = run_main(monkeypatch, capsys, flags)
    assert code == 1
    assert error.count("\n") == 1 and "a loss or weight became NaN or infinite up to step 10" in error
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """Under a limit on file sizes that lets the first checkpoint through and not the second."""
    hopper_file(tmp_path / "data.hdf5")
    flags = ["--dataset", "data.hdf5", *HOPPER, "--max-steps", "40", "--eval-interval", "10", "--eval-episodes", "1"]
    code = f"""
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {str(SCRIPT.parent)!r})
import ciql_pybullet
save, saved = ciql_pybullet.Run.save, []
def limited(*args):
    if saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    saved.append(save(*args))
ciql_pybullet.Run.save = limited
sys.argv = ["ciql_pybullet.py", *{flags!r}]
if __name__ == "__main__":
    ciql_pybullet.main()
"""
    (tmp_path / "limited.py").write_text(code)
    run = subprocess.run([sys.executable, "limited.py"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1 and "File too large" in run.stderr and "--resume" in run.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert ciql_pybullet.load_checkpoint(folder)["step"] == 10
    assert not list(folder.glob(".*"))


def test_config_survives_json():
    config = Config(dataset="x.hdf5", env_id="AntBulletEnv-v0", hidden_sizes=(3, 4), alpha=0.5)
    assert SETTINGS.validate_json(SETTINGS.dump_json(config)) == config
