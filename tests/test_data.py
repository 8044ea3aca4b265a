"""Both layouts, on files the tests write; what is refused; where data come from; environments."""

import pwd
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import psutil
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


def robot_environment(env_id):
    """A robot's spaces and spec, without starting the simulator."""
    robot = ciql.ROBOTS[env_id]
    ones = np.ones(robot.action_dim)
    env = box_environment(-ones, ones, robot.observation_dim)
    env.spec = gymnasium.spec(env_id)
    return env


def load_for_hopper(data=None):
    """The file data.hdf5, or transitions of one's own, as a run on Hopper takes it."""
    config = ciql.Config(dataset="data.hdf5", env_id=HOPPER)
    return ciql.load_dataset(config, robot_environment(HOPPER), data)


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
    assert dataset.lengths.tolist() == [2, 1, 3]
    assert dataset.terminated.tolist() == [True, True, False]
    assert (dataset.rows, dataset.layout) == (12, "d4rl-pybullet's layout")
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
    assert dataset.lengths.tolist() == [2, 1, 3, 1, 2]
    assert dataset.terminated.tolist() == [True, True, False, False, True]
    assert (dataset.rows, dataset.layout) == (11, "D4RL's layout")


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


@pytest.mark.parametrize(
    ("key", "shift", "misplaced"),
    [
        ("terminals", 0, 0),
        ("terminals", 1, 7),  # three ends, each marked too late and missed; and row 0
        ("terminals", -1, 7),
        ("next_observations", 1, 8),
    ],
)
def test_ends_a_row_off(tmp_path, capsys, key, shift, misplaced):
    """The next row tells of marks that are late or early, and of successors of other rows."""
    episodes = [d4rl_episode(3, 10 * n + 1, terminal=1) for n in range(4)]
    moved = np.roll(np.concatenate([e[key] for e in episodes]), shift, 0)
    dataset = ciql.read_dataset(write_file(tmp_path / "data.hdf5", *episodes, **{key: moved}))
    assert dataset.misplaced_ends == misplaced
    ciql.note_ends(dataset, "Lab-v0", limit=1000)
    note = f"NOTE   {misplaced} rows are marked as an end"
    assert (note in capsys.readouterr().out) == (misplaced > 0)


def test_rows_in_random_order(tmp_path, capsys):
    """Their transitions are read, no episodes are told, and a NOTE asks."""
    rows = {key: np.concatenate([e[key] for e in D4RL]) for key in D4RL[0]}
    order = np.random.default_rng(0).permutation(11)
    mixed = write_file(tmp_path / "data.hdf5", {key: rows[key][order] for key in rows})
    dataset = ciql.read_dataset(mixed, max_episode_steps=2)
    assert len(dataset.returns) == len(dataset.lengths) == 0
    assert dataset.transitions.rewards.tolist() == rows["rewards"][order].tolist()
    assert dataset.transitions.terminations.tolist() == rows["terminals"][order].tolist()
    ciql.note_ends(dataset, "Lab-v0", limit=2)
    assert "or the rows in random order?" in capsys.readouterr().out


# -------------------------------------------------------------------- files that are refused, NOTEs
def marked(*timeouts):
    """Episodes of 600 steps, of which some have a mark that they were cut."""
    return [d4rl_episode(600, 1000 * n + 1, timeout=mark) for n, mark in enumerate(timeouts)]


def hopper(**columns):
    return lambda path: hopper_file(path, **columns)


def rows_of(*episodes, **columns):
    return lambda path: write_file(path, *episodes, **columns)


def first_rows(number):
    return rows_of({key: column[:number] for key, column in episode(4, 0, 15, 3).items()})


def cut_short(path):
    path.write_bytes(hopper_file(path).read_bytes()[:3000])


HALF = np.full(132, 0.5)
NEVER_WRITTEN = {key: np.zeros((900, *column.shape[1:])) for key, column in episode(1, 0).items()}
BAD_FILES = {
    "not there": (lambda path: None, "No such file"),
    "not HDF5": (lambda path: path.write_text("<html>"), "cannot be read"),
    "truncated": (cut_short, "cannot be read"),
    "missing key": (hopper(terminals=None), "'terminals'"),
    "one observation": (hopper(observations=1), "observations of shape () do not fit"),
    "short rewards": (hopper(rewards=HALF[1:]), "shape (131,)"),
    "wide rewards": (hopper(rewards=np.ones((132, 2))), "shape (132, 2)"),
    "narrow successors": (
        hopper(timeouts=0 * HALF, next_observations=np.ones((132, 14))),
        "next_observations of shape (132, 14) do not fit",
    ),
    "timeout of a half": (hopper(timeouts=HALF), "timeouts holds values other than 0 and 1"),
    "infinity": (hopper(rewards=np.r_[0, np.inf, np.zeros(130)]), "rewards holds NaN or"),
    "no rows": (first_rows(0), "holds 0 transitions, but training needs two"),
    "two rows": (first_rows(2), "holds 1 transitions"),
    "rows never written": (rows_of(episode(4, 1), NEVER_WRITTEN), "the last 900 rows are all zero"),
    "an action at an end row": (
        rows_of(episode(4, 0), episode(3, 5) | {"actions": np.ones((4, 1))}),
        "is of no known layout",
    ),
    "a reward at a start": (
        rows_of(episode(4, 0) | {"rewards": np.full(5, 7.0)}, episode(3, 5)),
        "begins with reward 0 (here 1 do not)",
    ),
    "longer than the limit": (
        rows_of(episode(4, 0), episode(1001, 10)),
        "an episode of 1,001 steps, from row 5 on, but the time limit is 1,000",
    ),
    "timeouts lost": (
        rows_of(*marked(1, 0, 0)),
        "an episode of 1,200 steps, from row 600 on, but the time limit is 1,000",
    ),
    "next observations without timeouts": (
        rows_of(episode(4, 1), next_observations=np.ones((5, 2))),
        "has 'next_observations', as D4RL's layout has, but no 'timeouts'; add them",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    make, named = BAD_FILES[name]
    make(tmp_path / "data.hdf5")
    with refused("data.hdf5: ", named):
        load_for_hopper()


def test_file_larger_than_the_memory(tmp_path, monkeypatch):
    hopper_file(tmp_path / "data.hdf5")
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with refused(
        "data.hdf5: cannot be read (132 rows need 42,240 bytes of memory, 1,000 are free",
        "take a part of the file",
    ):
        ciql.read_dataset("data.hdf5")


def test_bandit_file(tmp_path):
    """Its observations are all zero to the end; what it holds are actions and rewards."""
    still = dict.fromkeys(("observations", "next_observations"), np.zeros((9, 15)))
    columns = still | {"actions": np.eye(9, 3), "rewards": np.ones(9)}
    columns |= {"terminals": np.ones(9), "timeouts": np.zeros(9)}
    write_file(tmp_path / "data.hdf5", columns)
    load_for_hopper()


NEVER_FALLS = "2 terminations of a robot that never falls"
SAME_LENGTH = "3 terminations after just 5 steps"


@pytest.mark.parametrize(
    ("env_id", "lengths", "limit", "timeouts", "note"),
    [
        ("HalfCheetahBulletEnv-v0", (5, 5), 0, None, NEVER_FALLS),
        (HOPPER, (5, 5, 5, 3), 0, None, SAME_LENGTH),
        (HOPPER, (5, 5, 5, 3), 5, None, ""),
        (HOPPER, (5, 6, 7, 5), 0, None, ""),
        (HOPPER, (4, 4, 4), 0, np.zeros(15), SAME_LENGTH),  # in D4RL's layout
    ],
)
def test_ends_at_a_time_limit(tmp_path, capsys, env_id, lengths, limit, timeouts, note):
    robot = ciql.ROBOTS[env_id]
    dims = (robot.observation_dim, robot.action_dim)
    episodes = [episode(steps, 0, *dims) for steps in lengths]
    path = write_file(tmp_path / "data.hdf5", *episodes, timeouts=timeouts)
    config = ciql.Config(dataset=str(path), env_id=env_id, max_episode_steps=limit)
    ciql.load_dataset(config, robot_environment(env_id))
    out = capsys.readouterr().out
    assert ("NOTE" in out) == bool(note) and note in out


# ----------------------------------------------------------------------------- where data come from
def test_where_data_are_looked_for(tmp_path, monkeypatch, no_network):
    """A path is taken as it is; an id from the cache; the default cache is d4rl-pybullet's."""
    assert ciql.find_dataset("some/file.hdf5") == Path("some/file.hdf5")
    for folder in ("cache", ".d4rl/datasets"):
        (tmp_path / folder).mkdir(parents=True)
        cached = write_file(tmp_path / folder / f"{PUBLISHED}.hdf5", episode(2, first=0))
        assert ciql.find_dataset(PUBLISHED) == cached
        monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
    assert not no_network


def test_user_without_a_home(tmp_path, monkeypatch, no_network):
    """As in a container: no HOME, and a number that is no user's."""
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with refused("set D4RL_DATASET_DIR"):
        ciql.find_dataset(PUBLISHED)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert ciql.find_dataset(PUBLISHED).parent == ciql.SAMPLES


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
        assert f"{name} could not be downloaded (its server cannot be reached" in text
        assert f"put {no_network[-1]} at {tmp_path / 'cache' / name}.hdf5" in text
        assert no_network[-1].endswith(f"/{name}.hdf5?dl=1") and "NameResolution" not in text
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
    env_id, _ = ciql.DATASETS[f"{name}-v0"]
    dataset = ciql.load_dataset(ciql.Config(dataset=f"{name}-v0"), robot_environment(env_id))
    own = dataset.returns
    assert dataset.transitions.observations.shape == shape
    assert dataset.transitions.terminations.sum() == terminations
    assert (len(own), own.mean().round(1), own.std().round(1)) == returns
    note = f"NOTE   this is not the published {name}-v0, but re-collected after"
    assert note in capsys.readouterr().out


# ------------------------------------------------------------------------- transitions of one's own
def test_own_transitions_may_be_of_any_kind():
    data = own_transitions()
    arrays = ciql.Transitions(*(column.numpy() for column in data))
    for given in (
        data._replace(observations=data.observations.clone().requires_grad_()),
        ciql.Transitions(*(column.astype(">f8") for column in arrays)),
        arrays._replace(
            observations=arrays.observations[::-1].copy()[::-1],
            actions=np.frombuffer(arrays.actions.tobytes(), np.float32).reshape(6, 3),  # read-only
            rewards=arrays.rewards.tolist(),
            terminations=arrays.terminations.astype(bool),
        ),
    ):
        dataset = load_for_hopper(given)
        for column, expected in zip(dataset.transitions, data, strict=True):
            assert torch.equal(column, expected) and not column.requires_grad


S_AND_NEXT = torch.randn(6, 15)
SAME = {"observations": S_AND_NEXT, "next_observations": S_AND_NEXT}
UNFITTING = {
    "other observations": (own_transitions(observation_dim=14), "(14,), but (15,) fits the"),
    "other successors": (own_transitions(next_observations=torch.ones(6, 14)), "(6, 14) do not"),
    "NaN": (own_transitions(rewards=torch.full((6,), np.nan)), "rewards holds NaN"),
    "half an end": (
        own_transitions(terminations=torch.full((6,), 0.5)),
        "terminations holds values other than 0 and 1",
    ),
    "above the box": (own_transitions(actions=torch.full((6, 3), 1.5)), "(up to 1.5)"),
    "below the box": (own_transitions(actions=torch.full((6, 3), -1.5)), "outside the action box"),
    "one row": (own_transitions(1), "two at least"),
    "no successors": (own_transitions(**SAME), "next_observations are the observations"),
    "no successors of those that go on": (
        own_transitions(**SAME, terminations=torch.tensor([1.0, 0, 0, 1, 0, 0])),
        "next_observations are the observations",
    ),
    "dict": (own_transitions()._asdict(), "data is a dict, but must be Transitions"),
    "words": (own_transitions(rewards=["a"] * 6), "rewards is no array of numbers"),
    "sparse": (own_transitions(rewards=torch.ones(6).to_sparse()), "rewards is no array of"),
    "no data": (own_transitions(rewards=torch.ones(6, device="meta")), "rewards is no array of"),
}


@pytest.mark.parametrize(("data", "named"), UNFITTING.values(), ids=UNFITTING)
def test_own_transitions_that_do_not_fit(data, named):
    with refused("data", named):
        load_for_hopper(data)


def test_successors_may_be_the_observations_where_every_step_terminates():
    load_for_hopper(own_transitions(**SAME, terminations=torch.ones(6)))


def test_actions_of_another_box_are_rescaled(capsys):
    env = box_environment((-2.0, 0.0), (2.0, 4.0))
    actions = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 4.0], [1.0, 1.0]])
    data = own_transitions(4, action_dim=2, actions=actions)
    found = ciql.check_transitions(data, env, "data")
    assert found.actions.tolist() == [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]]
    assert capsys.readouterr().out == ""
    outside = data._replace(actions=actions - 0.01)
    with refused("outside the action box"):
        ciql.check_transitions(outside, env, "data")


@pytest.mark.parametrize(("largest", "is_noted"), [(1.19, True), (1.3, False)])
def test_actions_that_use_a_part_of_the_box(capsys, largest, is_noted):
    """As those that were divided by 2 already, for a box of ±2."""
    env = box_environment((-2.0, -2.0), (2.0, 2.0))
    actions = torch.tensor([[-0.5, 0.0], [0.0, largest]])
    ciql.check_transitions(own_transitions(2, action_dim=2, actions=actions), env, "data")
    out = capsys.readouterr().out
    assert ("NOTE   the actions stay within 60% of the action box" in out) == is_noted


def in_order(*episodes):
    """Transitions with the rows of episodes in D4RL's layout, but for their marks of cuts."""
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    columns["terminations"] = columns.pop("terminals")
    del columns["timeouts"]
    return ciql.Transitions(**columns)


def test_episodes_of_ones_own_transitions():
    """Where ends can be told: by a termination, by a jump, by the last row; not where shuffled."""
    ends = [(4, 1), (3, 0), (5, 1), (6, 0)]
    episodes = [d4rl_episode(n, 100 * n, terminal=terminal) for n, terminal in ends]
    data = in_order(*episodes)
    dataset = ciql.dataset_of(data)
    assert dataset.lengths.tolist() == [4, 3, 5, 6]
    assert dataset.returns.tolist() == [e["rewards"].sum() for e in episodes]
    assert dataset.terminated.tolist() == [True, False, True, False]
    order = np.random.default_rng(0).permutation(18)
    shuffled = ciql.Transitions(*(column[order] for column in data))
    assert len(ciql.dataset_of(shuffled).returns) == 0
    data.next_observations[3] = data.observations[4]  # it starts anew where it terminated
    assert ciql.dataset_of(data).lengths.tolist() == [4, 3, 5, 6]
    bandit = in_order(*[d4rl_episode(1, 0, terminal=1)] * 3)
    assert ciql.dataset_of(bandit).lengths.tolist() == [1, 1, 1]


def test_training_on_ones_own_transitions(lab, monkeypatch, capsys):
    """It prints what a file's training does, draws the same of the data, and has the same curve."""
    drawn = []
    monkeypatch.setattr(ciql, "draw", lambda *arguments: drawn.append(arguments))
    of_file = ciql.read_dataset("data.hdf5", 10)
    folder, curve = ciql.train(lab_config(), of_file.transitions)
    out = capsys.readouterr().out
    assert "data   data: 28 rows, 3 episodes, mean return" in out
    assert "28 transitions, 0 of them terminations, in transitions from Python\n" in out
    assert "--resume" not in out and "train in Python, with config.resume" in out
    assert folder.name.startswith("own-transitions-")
    *_, title, dataset, env_id = drawn[-1]
    assert title.startswith("CIQL on own-transitions\n") and env_id == "lab:Lab-v0"
    assert dataset.returns[:2] == pytest.approx(of_file.returns)
    assert np.array_equal(ciql.train(lab_config())[1].returns, curve.returns)
    with refused("env_id is not set"):
        ciql.train(ciql.Config(), of_file.transitions)


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


def gives(observation, reward):
    return {"step": lambda self, action: (np.float32(observation), reward, False, False, {})}


WRONG = {
    "Discrete(2) is no box": {"action_space": gymnasium.spaces.Discrete(2)},
    "is no box of one dimension": {"observation_space": Box(0, 1, (8, 8))},
    "not Box(0, 3, (2,), int64)": {"action_space": Box(0, 3, (2,), int)},
    "not Box(-inf, inf, (2,)": {"action_space": Box(-np.inf, np.inf, (2,))},
    "not Box([-2. 3.], 3.0, (2,)": {"action_space": Box(np.float32([-2, 3]), np.float32(3))},
    "has no time limit": {"limit": None},
    "reward nan": gives([0, 0], np.nan),
    "gives [nan 0.]": gives([np.nan, 0], 0.0),
    "gives [0.] and reward 0.0": gives([0], 0.0),
    "ZeroDivisionError: division by zero": {"step": lambda self, action: 1 / 0},
    "SystemExit": {"step": lambda self, action: sys.exit()},
    "TypeError": {"__init__": lambda self, mass: None},
}


@pytest.mark.parametrize("cause", WRONG)
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium's own, besides
def test_environment_that_is_wrong(fails, tmp_path, cause):
    """One line at the start that names it, exit code 2, and no folder."""
    register(**WRONG[cause])
    hopper_file(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--env-id", "Own-v0", "--no-compile"]
    fails(*arguments, named=("env_id is Own-v0, which CIQL cannot act in", cause))


@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")
def test_another_action_box_is_played():
    """Actions in [-1, 1] reach the environment's own box."""
    register()
    policy = ciql.GaussianPolicy(2, 2, (4,))
    with torch.no_grad():
        policy.mu[-1].weight.zero_()
        policy.mu[-1].bias.fill_(np.arctanh(0.5))  # half of the way from the middle
    assert ciql.play_episode(policy, "Own-v0", seed=0) == pytest.approx(3 * (1 + 100 * 3))


@pytest.mark.slow
def test_robots_are_as_the_simulator_says():
    for env_id, robot in ciql.ROBOTS.items():
        env = ciql.check_environment(env_id)
        shapes = (*env.observation_space.shape, *env.action_space.shape)
        assert shapes == robot[:2] and env.spec.max_episode_steps == 1000
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
