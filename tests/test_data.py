"""Both layouts, on files the tests write; what is refused; where data come from; environments."""

import http.server
import threading

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import episode, hopper_file, lab_config, own_transitions, refused, write_file
from gymnasium.spaces import Box

import ciql_pybullet as ciql

PUBLISHED = ciql.Config.dataset  # of which there is a sample


def load_for_hopper(data=None, **settings):
    """The file data.hdf5, or transitions of one's own, as a run on Hopper takes it."""
    config = ciql.Config(dataset="data.hdf5", env_id="HopperBulletEnv-v0", **settings)
    return ciql.load_dataset(config, data)


def test_every_number(tmp_path):
    """Episodes that fell after 2 steps and after 1, one cut by the limit, one by the file's end."""
    path = write_file(
        tmp_path / "data.hdf5",
        episode(2, first=10),
        episode(1, first=40),
        episode(3, first=20),
        episode(3, first=30, closed=False),
    )
    dataset = ciql.read_dataset(path, max_episode_steps=3)
    t = dataset.transitions
    assert t.observations[:, 0].tolist() == [10, 11, 40, 20, 21, 22, 30, 31]
    assert t.next_observations[:, 0].tolist() == [11, 12, 41, 21, 22, 23, 31, 32]
    for observations in (t.observations, t.next_observations):
        np.testing.assert_allclose(observations[:, 1] - observations[:, 0], 0.1, atol=1e-5)
    actions = [1 / 4, 2 / 4, 1 / 3, 1 / 5, 2 / 5, 3 / 5, 1 / 4, 2 / 4]
    np.testing.assert_allclose(t.actions[:, 0], actions, atol=1e-7)
    assert t.rewards.tolist() == [1011, 1012, 1041, 1021, 1022, 1023, 1031, 1032]
    assert t.terminations.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert [tuple(column.shape) for column in t] == [(8, 2), (8, 1), (8,), (8, 2), (8,)]
    assert dataset.returns.tolist() == [1011 + 1012, 1041, 1021 + 1022 + 1023]
    assert dataset.layout == "d4rl-pybullet's layout"
    # The same episode of three steps ends by itself where the limit is four.
    assert ciql.read_dataset(path, 4).transitions.terminations.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]


def d4rl_episode(steps, first, terminal=0, timeout=0):
    """The steps of ``episode`` in D4RL's layout, the last one marked."""
    rows = episode(steps, first)
    last = np.arange(steps) == steps - 1
    return {
        "terminals": terminal * last,
        "timeouts": timeout * last,
        "observations": rows["observations"][:-1],
        "actions": rows["actions"][:-1],
        "rewards": rows["rewards"][1:],
        "next_observations": rows["observations"][1:],
    }


D4RL = (
    d4rl_episode(2, first=10, terminal=1),
    d4rl_episode(1, first=40, terminal=1),
    d4rl_episode(3, first=20, timeout=1),
    d4rl_episode(1, first=50, timeout=1),
    d4rl_episode(2, first=60, terminal=1, timeout=1),
    d4rl_episode(2, first=30),  # the file ends in mid-episode
)


def test_every_number_of_d4rls_layout(tmp_path):
    """With flags of any kind, columns of (N, 1), groups of no concern, compressed."""
    columns = {key: np.concatenate([e[key] for e in D4RL]) for key in D4RL[0]}
    columns["terminals"] = columns["terminals"].astype(bool)[:, None]
    columns["timeouts"] = columns["timeouts"].astype(np.int8)
    columns["rewards"] = columns["rewards"][:, None]
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
        file["infos/qpos"] = np.zeros((3, 2))
    dataset = ciql.read_dataset("data.hdf5", max_episode_steps=3)
    t = dataset.transitions
    assert np.array_equal(t.observations, columns["observations"].astype(np.float32))
    assert np.array_equal(t.next_observations, columns["next_observations"].astype(np.float32))
    assert np.array_equal(t.actions, columns["actions"].astype(np.float32))
    assert np.array_equal(t.rewards, columns["rewards"][:, 0])
    assert t.terminations.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert dataset.returns.tolist() == [2023, 1041, 3066, 1051, 2123]
    assert dataset.layout == "D4RL's layout"


def test_d4rls_layout_without_next_observations(tmp_path):
    """The last step of a cut episode has no successor, nor has the last row: they are left out."""
    path = write_file(tmp_path / "data.hdf5", *D4RL, next_observations=None)
    dataset = ciql.read_dataset(path)
    t = dataset.transitions
    assert t.observations[:, 0].tolist() == [10, 11, 40, 20, 21, 60, 61, 30]
    assert t.rewards.tolist() == [1011, 1012, 1041, 1021, 1022, 1061, 1062, 1031]
    assert t.terminations.tolist() == [0, 1, 1, 0, 0, 0, 1, 0]
    goes_on = t.terminations == 0  # what follows a termination is not used
    assert t.next_observations[goes_on][:, 0].tolist() == [11, 21, 22, 61, 31]
    assert t.next_observations.isfinite().all()
    assert dataset.returns.tolist() == [2023, 1041, 3066, 1051, 2123]


def test_rows_in_random_order(tmp_path):
    """Their transitions are read, but they tell no episodes."""
    rows = {key: np.concatenate([e[key] for e in D4RL]) for key in D4RL[0]}
    order = np.random.default_rng(0).permutation(11)
    mixed = write_file(tmp_path / "data.hdf5", {key: rows[key][order] for key in rows})
    dataset = ciql.read_dataset(mixed, max_episode_steps=2)
    assert len(dataset.returns) == 0
    assert dataset.transitions.rewards.tolist() == rows["rewards"][order].tolist()
    assert dataset.transitions.terminations.tolist() == rows["terminals"][order].tolist()


def hopper(**columns):
    return lambda path: hopper_file(path, **columns)


def rows_of(*episodes, **columns):
    return lambda path: write_file(path, *episodes, **columns)


NO = np.zeros(132)
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (132, 3))
NEVER_WRITTEN = {key: np.zeros((900, *column.shape[1:])) for key, column in episode(1, 0).items()}
MOVES_AT_END = episode(3, 5) | {"actions": np.ones((4, 1))}
PAID_AT_START = episode(4, 0) | {"rewards": np.full(5, 7.0)}
HALF_MARKED = [d4rl_episode(600, 1000 * n + 1, timeout=n == 0) for n in range(3)]
NO_LAYOUT = "is of no known layout"
BAD_FILES = {
    "not there": (lambda path: None, "No such file"),
    "missing key": (hopper(terminals=None), "'terminals'"),
    "short rewards": (hopper(rewards=NO[1:]), "cannot be read"),
    "NaN": (hopper(observations=np.full((132, 15), np.nan)), "observations hold NaN or infinite"),
    "outside the box": (hopper(actions=2 * ACTIONS, timeouts=NO), "outside the action box"),
    "rows never written": (rows_of(episode(4, 1), NEVER_WRITTEN), "last rows are all zero"),
    "an action at an end row": (rows_of(episode(4, 0), MOVES_AT_END), NO_LAYOUT),
    "a reward at a start": (rows_of(PAID_AT_START, episode(3, 5)), NO_LAYOUT),
    "longer than the limit": (rows_of(episode(4, 0), episode(1001, 10)), "an episode of 1,001 ste"),
    "half of the cuts are marked": (rows_of(*HALF_MARKED), "an episode of 1,200 steps, but the"),
}


@pytest.mark.parametrize(("make", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, make, named):
    make(tmp_path / "data.hdf5")
    with refused("data.hdf5: ", named):
        load_for_hopper()


@pytest.mark.parametrize("limit", [0, 5])
def test_ends_at_a_time_limit(tmp_path, capsys, limit):
    """Most episodes of a robot terminate after the same number of steps: a NOTE asks."""
    episodes = [episode(steps, 0, 15, 3) for steps in (5, 5, 5, 3)]
    write_file(tmp_path / "data.hdf5", *episodes)
    load_for_hopper(max_episode_steps=limit)
    out = capsys.readouterr().out
    note = "NOTE   3 of 4 episodes terminate after 5 steps: was that a time limit?"
    assert (note in out) == ("NOTE" in out) == (limit == 0)


def test_offline(tmp_path, no_network, capsys):
    """A sample stands in for its own id alone; it is said why, and how to have the file."""
    sample = ciql.SAMPLES / PUBLISHED.replace("-v0", "-sample.hdf5")
    assert ciql.find_dataset(PUBLISHED) == sample
    text = capsys.readouterr().out
    why = "could not be downloaded (<urlopen error Name or service not known>)"
    assert text.startswith(f"NOTE   {PUBLISHED} {why}") and text.count("\n") == 1
    assert f"put {no_network[0]} at {tmp_path / 'cache' / PUBLISHED}.hdf5" in text
    assert no_network[0].endswith(f"/{PUBLISHED}.hdf5?dl=1")
    other = "walker2d-bullet-random-v0"
    with refused(f"{other} {why}", f"python data/make_bullet_dataset.py --id {other}"):
        ciql.find_dataset(other)


class Handler(http.server.BaseHTTPRequestHandler):
    """It answers what the test has set."""

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def answer(monkeypatch):
    """A server on this machine stands in for the published addresses; sets what it answers."""
    own = type("Own", (Handler,), {})
    httpd = http.server.ThreadingHTTPServer(("localhost", 0), own)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://localhost:{httpd.server_port}/{{key}}/{{dataset}}.hdf5"
    monkeypatch.setattr(ciql, "DOWNLOAD_URL", url)

    def set_answer(body, status=200, length=None):
        own.body = body
        own.status = status
        own.length = length

    yield set_answer
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ((b"gone", 404), "404"),
        ((b"<html>Sign in to continue</html>",), "what came is no HDF5 file"),
        ((b"\x89HDF" * 1000, 200, 10**6), "IncompleteRead(4000 bytes read"),
    ],
)
def test_download_that_fails(answer, tmp_path, capsys, reply, cause):
    """The sample where there is one, nothing in the cache, and the cause in words."""
    answer(*reply)
    assert ciql.find_dataset(PUBLISHED).parent == ciql.SAMPLES
    assert cause in capsys.readouterr().out
    with refused(cause):
        ciql.find_dataset("walker2d-bullet-random-v0")
    assert not list(tmp_path.rglob("cache/*"))


def test_download(answer, tmp_path, capsys):
    """The whole file is in the cache, where it is found again."""
    good = hopper_file(tmp_path / "good.hdf5").read_bytes()
    answer(good)
    path = tmp_path / "cache" / f"{PUBLISHED}.hdf5"
    assert ciql.find_dataset(PUBLISHED) == path and capsys.readouterr().out == ""
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]
    answer(b"", 500)
    assert ciql.find_dataset(PUBLISHED) == path


def test_own_transitions_may_be_of_any_kind():
    data = own_transitions()
    given = data._replace(
        observations=data.observations.clone().requires_grad_(),
        actions=data.actions.numpy().astype(np.float64),
        rewards=data.rewards[:, None].tolist(),
        terminations=data.terminations.numpy().astype(bool),
    )
    for column, expected in zip(load_for_hopper(given).transitions, data, strict=True):
        assert torch.equal(column, expected) and not column.requires_grad


S_AND_NEXT = torch.randn(6, 15)
SAME = {"observations": S_AND_NEXT, "next_observations": S_AND_NEXT}
UNFITTING = {
    "other observations": (own_transitions(observation_dim=14), "(14,), but the environment's of"),
    "fewer rewards": (own_transitions(rewards=torch.ones(5)), "rewards do not fit"),
    "above the box": (own_transitions(actions=torch.full((6, 3), 1.5)), "outside the action box"),
    "no successors": (
        own_transitions(**SAME, terminations=torch.tensor([1.0, 0, 0, 1, 0, 0])),
        "next_observations are the observations",
    ),
}


@pytest.mark.parametrize(("data", "named"), UNFITTING.values(), ids=UNFITTING)
def test_own_transitions_that_do_not_fit(data, named):
    with refused("data: ", named):
        load_for_hopper(data)


def test_training_on_ones_own_transitions(lab, capsys):
    """It has the curve of a file's training, and no return of the data, as it tells no episodes."""
    data = ciql.read_dataset("data.hdf5", 10).transitions
    folder, evaluations = ciql.train(lab_config(), data)
    out = capsys.readouterr().out
    assert "data   data, in Transitions: 28 transitions, 0 of them terminations\n" in out
    assert "mean return" not in out and folder.name.startswith("own-transitions-")
    assert ciql.train(lab_config())[1] == evaluations


def register(box):
    """An environment that pays the first action, and a hundred times the second."""

    class Paid(gymnasium.Env):
        observation_space = Box(-1, 1, (2,))
        action_space = box

        def reset(self, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), action[0] + 100 * action[1], False, False, {}

    gymnasium.register("Own-v0", Paid, max_episode_steps=3)


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium's own, besides
def test_environment_that_is_wrong(fails, tmp_path):
    """One line at the start that names it, exit code 2, and no folder."""
    register(Box(-np.inf, np.inf, (2,)))
    hopper_file(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--no-compile", "--env-id"]
    fails(*arguments, "Own-v0", named="env_id is Own-v0, but CIQL needs bounded actions")
    fails(*arguments, "None-v0", named="env_id is None-v0: ")


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")
def test_another_action_box():
    """Its data are scaled to [-1, 1], and such actions back to the box where they are played."""
    box = Box(np.float32([-2, 0]), np.float32([2, 4]))
    register(box)
    actions = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 4.0], [1.0, 1.0]])
    data = own_transitions(4, 2, 2, actions=actions)
    config = ciql.Config(env_id="Own-v0")
    found = ciql.load_dataset(config, data).transitions
    assert found.actions.tolist() == [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]]
    with refused("outside the action box"):
        ciql.load_dataset(config, data._replace(actions=actions - 0.01))

    policy = ciql.GaussianPolicy(2, 2, (4,))
    with torch.no_grad():
        policy.mu[-1].weight.zero_()
        policy.mu[-1].bias.fill_(np.arctanh(0.5))  # half of the way from the middle
    assert ciql.play_episode(policy, "Own-v0", seed=0) == pytest.approx(3 * (1 + 100 * 3))
