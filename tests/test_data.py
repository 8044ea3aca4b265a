"""Both layouts, on files the tests write; what is refused; where data come from; environments."""

import http.server
import threading
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pybullet_envs_gymnasium  # noqa: F401  (registers the robots)
import pytest
import torch
from conftest import episode, hopper_file, lab_config, own_transitions, refused, write_file
from gymnasium.spaces import Box

import ciql_pybullet as ciql

PUBLISHED = ciql.Config.dataset  # of which there is a sample
HOPPER = "HopperBulletEnv-v0"


def box_environment(low, high, observation_dim=15):
    """What the checks ask of an environment."""
    env = gymnasium.Env()
    env.observation_space = Box(-np.inf, np.inf, (observation_dim,))
    env.action_space = Box(np.float32(low), np.float32(high))
    return env


def load_for_hopper(data=None, **settings):
    """The file data.hdf5, or transitions of one's own, as a run on Hopper takes it."""
    config = ciql.Config(dataset="data.hdf5", env_id=HOPPER, **settings)
    return ciql.load_dataset(config, data)


# --------------------------------------------------------------------------- d4rl-pybullet's layout
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


# ------------------------------------------------------------------------------------ D4RL's layout
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
    ended = write_file(tmp_path / "ended.hdf5", *D4RL[:5], next_observations=None)
    assert ciql.read_dataset(ended).transitions.terminations.tolist() == [0, 1, 1, 0, 0, 0, 1]


def test_rows_in_random_order(tmp_path):
    """Their transitions are read, but they tell no episodes."""
    rows = {key: np.concatenate([e[key] for e in D4RL]) for key in D4RL[0]}
    order = np.random.default_rng(0).permutation(11)
    mixed = write_file(tmp_path / "data.hdf5", {key: rows[key][order] for key in rows})
    dataset = ciql.read_dataset(mixed, max_episode_steps=2)
    assert len(dataset.returns) == 0
    assert dataset.transitions.rewards.tolist() == rows["rewards"][order].tolist()
    assert dataset.transitions.terminations.tolist() == rows["terminals"][order].tolist()


# -------------------------------------------------------------------- files that are refused, NOTEs
def hopper(**columns):
    return lambda path: hopper_file(path, **columns)


def rows_of(*episodes, **columns):
    return lambda path: write_file(path, *episodes, **columns)


def first_rows(number):
    return rows_of({key: column[:number] for key, column in episode(4, 0, 15, 3).items()})


def cut_short(path):
    path.write_bytes(hopper_file(path).read_bytes()[:3000])


NO = np.zeros(132)
NARROW = np.ones((132, 14))
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (3, 132))
NEVER_WRITTEN = {key: np.zeros((900, *column.shape[1:])) for key, column in episode(1, 0).items()}
MOVES_AT_END = episode(3, 5) | {"actions": np.ones((4, 1))}
PAID_AT_START = episode(4, 0) | {"rewards": np.full(5, 7.0)}
HALF_MARKED = [d4rl_episode(600, 1000 * n + 1, timeout=n == 0) for n in range(3)]
NO_LAYOUT = "is of no known layout"
BAD_FILES = {
    "not there": (lambda path: None, "No such file"),
    "not HDF5": (lambda path: path.write_text("<html>"), "cannot be read"),
    "truncated": (cut_short, "cannot be read"),
    "missing key": (hopper(terminals=None), "'terminals'"),
    "one observation": (hopper(observations=1), "cannot be read"),
    "flat observations": (hopper(observations=NO, next_observations=NO, timeouts=NO), ""),
    "other observations": (hopper(observations=NARROW), "(14,), but"),
    "short rewards": (hopper(rewards=NO[1:]), "cannot be read"),
    "wide rewards": (hopper(rewards=np.ones((132, 2))), "cannot be read"),
    "transposed actions": (hopper(actions=ACTIONS, timeouts=NO), "cannot be read"),
    "narrow successors": (hopper(timeouts=NO, next_observations=NARROW), "cannot be read"),
    "infinity": (hopper(rewards=np.r_[0, np.inf, NO[2:]]), "rewards hold NaN or infinite"),
    "NaN": (hopper(observations=np.full((132, 15), np.nan)), "observations hold NaN or infinite"),
    "outside the box": (hopper(actions=2 * ACTIONS.T, timeouts=NO), "outside the action box"),
    "no rows": (first_rows(0), ""),
    "two rows": (first_rows(2), "needs two transitions"),
    "rows never written": (rows_of(episode(4, 1), NEVER_WRITTEN), "last rows are all zero"),
    "an action at an end row": (rows_of(episode(4, 0), MOVES_AT_END), NO_LAYOUT),
    "a reward at a start": (rows_of(PAID_AT_START, episode(3, 5)), NO_LAYOUT),
    "no timeouts": (rows_of(episode(4, 1), next_observations=np.ones((5, 2))), NO_LAYOUT),
    "longer than the limit": (rows_of(episode(4, 0), episode(1001, 10)), "an episode of 1,001 ste"),
    "half of the cuts are marked": (rows_of(*HALF_MARKED), "an episode of 1,200 steps, but the"),
}


@pytest.mark.parametrize(("make", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, make, named):
    make(tmp_path / "data.hdf5")
    with refused("data.hdf5: ", named):
        load_for_hopper()


def test_bandit_file(tmp_path):
    """Its observations are all zero to the end; what it holds are actions and rewards."""
    still = dict.fromkeys(("observations", "next_observations"), np.zeros((9, 15)))
    columns = still | {"actions": np.eye(9, 3), "rewards": np.ones(9)}
    columns |= {"terminals": np.ones(9), "timeouts": np.zeros(9)}
    write_file(tmp_path / "data.hdf5", columns)
    assert load_for_hopper().returns.tolist() == [1.0] * 9


@pytest.mark.parametrize(
    ("lengths", "limit", "timeouts", "is_noted"),
    [
        ((5, 5, 5, 3), 0, None, True),
        ((5, 5, 5, 3), 5, None, False),
        ((5, 6, 7, 5), 0, None, False),
        ((4, 4, 4), 0, np.zeros(15), True),  # in D4RL's layout
    ],
)
def test_ends_at_a_time_limit(tmp_path, capsys, lengths, limit, timeouts, is_noted):
    """Most episodes of a robot terminate after the same number of steps: a NOTE asks."""
    episodes = [episode(steps, 0, 15, 3) for steps in lengths]
    write_file(tmp_path / "data.hdf5", *episodes, timeouts=timeouts)
    load_for_hopper(max_episode_steps=limit)
    out = capsys.readouterr().out
    note = f"NOTE   3 of {len(lengths)} episodes terminate after 5 steps: was that a time limit?"
    assert (note in out) == ("NOTE" in out) == is_noted


# ----------------------------------------------------------------------------- where data come from
def test_where_data_are_looked_for(tmp_path, monkeypatch, no_network):
    """A path is taken as it is; an id from the cache; the default cache is d4rl-pybullet's."""
    assert ciql.find_dataset("some/file.hdf5") == tmp_path / "some/file.hdf5"
    for folder in ("cache", ".d4rl/datasets"):
        (tmp_path / folder).mkdir(parents=True)
        cached = write_file(tmp_path / folder / f"{PUBLISHED}.hdf5", episode(2, first=0))
        assert ciql.find_dataset(PUBLISHED) == cached
        monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
    assert not no_network


def test_offline(tmp_path, no_network, capsys):
    """The samples stand in for their own ids alone; it is said why, and how to have the file."""
    for name in ciql.DATASETS:
        sample = ciql.SAMPLES / name.replace("-v0", "-sample.hdf5")
        if sample.exists():
            assert ciql.find_dataset(name) == sample
            text = capsys.readouterr().out
            assert text.startswith("NOTE") and text.count("\n") == 1
        else:
            with refused(f"python data/make_bullet_dataset.py --id {name}") as error:
                ciql.find_dataset(name)
            text = str(error.value)
        assert f"{name} could not be downloaded (<urlopen error Name or service not known>" in text
        assert f"put {no_network[-1]} at {tmp_path / 'cache' / name}.hdf5" in text
        assert no_network[-1].endswith(f"/{name}.hdf5?dl=1")
    assert len(set(no_network)) == 12


@pytest.mark.parametrize(
    ("name", "shape", "terminations", "returns"),
    [
        ("halfcheetah-bullet-medium", (100_000, 26), 0, (100, 861.8, 90.6)),  # it never falls
        ("hopper-bullet-medium", (28_245, 15), 10, (32, 1253.7, 295.8)),
        ("hopper-bullet-mixed", (38_520, 15), 416, (426, 112.8, 218.6)),
    ],
)
def test_embedded_samples(no_network, capsys, name, shape, terminations, returns):
    dataset = ciql.load_dataset(ciql.Config(dataset=f"{name}-v0"))
    own = dataset.returns
    assert dataset.transitions.observations.shape == shape
    assert dataset.transitions.terminations.sum() == terminations
    assert (len(own), own.mean().round(1), own.std().round(1)) == returns
    note = f"NOTE   this is not the published {name}-v0, but re-collected after"
    assert note in capsys.readouterr().out


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


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that stands in for the published addresses."""
    httpd = http.server.ThreadingHTTPServer(("localhost", 0), type("Handler", (Server,), {}))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://localhost:{httpd.server_port}/{{key}}/{{dataset}}.hdf5"
    monkeypatch.setattr(ciql, "DOWNLOAD_URL", url)
    yield httpd.RequestHandlerClass
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (send(b"gone", 404), "404"),
        (send(b"<html>Sign in to continue</html>"), "what came is no HDF5 file"),
        (send(b"\x89HDF" * 1000, length=10**6), "IncompleteRead(4000 bytes read"),
    ],
)
def test_download_that_fails(server, tmp_path, capsys, reply, cause):
    """The sample where there is one, nothing in the cache, and the cause in words."""
    server.reply = reply
    assert ciql.find_dataset(PUBLISHED).parent == ciql.SAMPLES
    assert cause in capsys.readouterr().out
    with refused(cause):
        ciql.find_dataset("walker2d-bullet-random-v0")
    assert not list(tmp_path.rglob("cache/*"))


def test_download(server, tmp_path, capsys):
    """The whole file is in the cache, where it is found again."""
    good = hopper_file(tmp_path / "good.hdf5").read_bytes()
    server.reply = send(good)
    path = tmp_path / "cache" / f"{PUBLISHED}.hdf5"
    assert ciql.find_dataset(PUBLISHED) == path and capsys.readouterr().out == ""
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]
    server.reply = send(b"", 500)
    assert ciql.find_dataset(PUBLISHED) == path


# ------------------------------------------------------------------------- transitions of one's own
def test_own_transitions_may_be_of_any_kind():
    data = own_transitions()
    arrays = ciql.Transitions(*(column.numpy() for column in data))
    for given in (
        data._replace(observations=data.observations.clone().requires_grad_()),
        ciql.Transitions(*(column.astype(np.float64) for column in arrays)),
        arrays._replace(
            actions=np.frombuffer(arrays.actions.tobytes(), np.float32).reshape(6, 3),  # read-only
            rewards=arrays.rewards[:, None].tolist(),
            terminations=arrays.terminations.astype(bool),
        ),
    ):
        dataset = load_for_hopper(given)
        for column, expected in zip(dataset.transitions, data, strict=True):
            assert torch.equal(column, expected) and not column.requires_grad


S_AND_NEXT = torch.randn(6, 15)
SAME = {"observations": S_AND_NEXT, "next_observations": S_AND_NEXT}
UNFITTING = {
    "other observations": (own_transitions(observation_dim=14), "(14,), but the environment's of"),
    "other successors": (own_transitions(next_observations=torch.ones(6, 14)), "do not fit"),
    "other actions": (own_transitions(action_dim=2), "(2,), but the environment's of (3,)"),
    "fewer rewards": (own_transitions(rewards=torch.ones(5)), "rewards do not fit"),
    "rewards of two robots": (own_transitions(rewards=torch.ones(6, 2)), "rewards do not fit"),
    "transposed": (own_transitions(actions=torch.ones(3, 6)), "actions do not fit"),
    "NaN": (own_transitions(rewards=torch.full((6,), np.nan)), "rewards hold NaN"),
    "above the box": (own_transitions(actions=torch.full((6, 3), 1.5)), "outside the action box"),
    "below the box": (own_transitions(actions=torch.full((6, 3), -1.5)), "outside the action box"),
    "one row": (own_transitions(1), "two transitions at least"),
    "no successors": (own_transitions(**SAME), "next_observations are the observations"),
    "no successors of those that go on": (
        own_transitions(**SAME, terminations=torch.tensor([1.0, 0, 0, 1, 0, 0])),
        "next_observations are the observations",
    ),
    "words": (own_transitions(rewards=["a"] * 6), "rewards do not fit"),
    "sparse": (own_transitions(rewards=torch.ones(6).to_sparse()), "rewards do not fit"),
}


@pytest.mark.parametrize(("data", "named"), UNFITTING.values(), ids=UNFITTING)
def test_own_transitions_that_do_not_fit(data, named):
    with refused("data: ", named):
        load_for_hopper(data)


def test_successors_may_be_the_observations_where_every_step_terminates():
    load_for_hopper(own_transitions(**SAME, terminations=torch.ones(6)))


def test_actions_of_another_box_are_rescaled():
    env = box_environment((-2.0, 0.0), (2.0, 4.0))
    actions = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 4.0], [1.0, 1.0]])
    data = own_transitions(4, action_dim=2, actions=actions)
    found = ciql.check_transitions(data, env, "data")
    assert found.actions.tolist() == [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]]
    with refused("outside the action box"):
        ciql.check_transitions(data._replace(actions=actions - 0.01), env, "data")


def test_training_on_ones_own_transitions(lab, capsys):
    """It has the curve of a file's training, and no return of the data, as it tells no episodes."""
    data = ciql.read_dataset("data.hdf5", 10).transitions
    folder, evaluations = ciql.train(lab_config(), data)
    out = capsys.readouterr().out
    assert "data   data, in Transitions: 28 transitions, 0 of them terminations\n" in out
    assert "mean return" not in out and folder.name.startswith("own-transitions-")
    assert ciql.train(lab_config())[1] == evaluations
    with refused("dataset is own-transitions, for which env_id has to be set"):
        ciql.train(ciql.Config(), data)


# ------------------------------------------------------------------------------- other environments
class Paid(gymnasium.Env):
    """It pays the first action, and a hundred times the second."""

    observation_space = Box(-1, 1, (2,))
    action_space = Box(np.float32([-2, 0]), np.float32([2, 4]))
    limit = 3

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), action[0] + 100 * action[1], False, False, {}


def register(**changed):
    kind = type("Own", (Paid,), changed)
    gymnasium.register("Own-v0", kind, max_episode_steps=kind.limit)


@pytest.mark.parametrize(
    "changed",
    [
        {"action_space": gymnasium.spaces.Discrete(2)},
        {"action_space": Box(-np.inf, np.inf, (2,))},
        {"limit": None},
    ],
)
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium's own, besides
def test_environment_that_is_wrong(fails, tmp_path, changed):
    """One line at the start that names it, exit code 2, and no folder."""
    register(**changed)
    hopper_file(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--no-compile", "--env-id"]
    fails(*arguments, "Own-v0", named="env_id is Own-v0, but CIQL needs bounded actions")
    fails(*arguments, "None-v0", named="env_id is None-v0: ")


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")
def test_another_action_box_is_played():
    """Actions in [-1, 1] reach the environment's own box."""
    register()
    policy = ciql.GaussianPolicy(2, 2, (4,))
    with torch.no_grad():
        policy.mu[-1].weight.zero_()
        policy.mu[-1].bias.fill_(np.arctanh(0.5))  # half of the way from the middle
    assert ciql.play_episode(policy, "Own-v0", seed=0) == pytest.approx(3 * (1 + 100 * 3))


def test_evaluations_leak_nothing(lab):
    """Descriptors of environments are closed, also where an episode fails."""
    policy = ciql.GaussianPolicy(3, 1, (8,))
    ciql.evaluate(policy, lab_config(), 0)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for step in range(5):
        ciql.evaluate(policy, lab_config(), step)
    policy.act = lambda observation: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ciql.evaluate(policy, lab_config(), 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
