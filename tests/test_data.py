"""Reading of both layouts, on files the tests write; where data come from; other environments."""

import dataclasses
import pwd
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pooch
import pybullet_envs_gymnasium  # noqa: F401  (registers the robots)
import pytest
import requests
import torch
from conftest import (
    SAMPLE,
    SAMPLE_ID,
    episode,
    hopper_file,
    lab_config,
    metrics,
    own_transitions,
    refused,
    small_file,
    write_file,
)

import ciql_pybullet
from ciql_pybullet import (
    ROBOTS,
    Config,
    GaussianPolicy,
    InputError,
    Transitions,
    check_environment,
    check_transitions,
    dataset_of,
    find_dataset,
    load_checkpoint,
    load_dataset,
    note_ends,
    play_episode,
    read_dataset,
    train,
)


def read_transitions(path, max_episode_steps=1000):
    return read_dataset(path, max_episode_steps).transitions


def box_environment(low, high, observation_dim=15):
    """What the checks ask of an environment."""
    env = gymnasium.Env()
    env.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,))
    env.action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))
    return env


def robot_environment(env_id):
    """A robot's spaces and spec, without starting the simulator."""
    robot = ROBOTS[env_id]
    ones = np.ones(robot.action_dim)
    env = box_environment(-ones, ones, robot.observation_dim)
    env.spec = gymnasium.spec(env_id)
    return env


# --------------------------------------------------------------------------- d4rl-pybullet's layout
@pytest.mark.parametrize("two_dimensional", [False, True])
def test_every_number(tmp_path, two_dimensional):
    """Episodes that fell after 2 steps and after 1, one cut by the limit, one by the file's end."""
    path = write_file(
        tmp_path / "data.hdf5",
        episode(2, first=10),
        episode(1, first=40),
        episode(3, first=20),
        episode(3, first=30, closed=False),
        two_dimensional=two_dimensional,
    )
    dataset = read_dataset(path, max_episode_steps=3)
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
    assert {column.dtype for column in t} == {torch.float32}
    assert dataset.returns.tolist() == [1011 + 1012, 1041, 1021 + 1022 + 1023]
    assert dataset.lengths.tolist() == [2, 1, 3]
    assert dataset.terminated.tolist() == [True, True, False]
    assert (dataset.rows, dataset.layout) == (12, "d4rl-pybullet's layout")
    # The same episode of three steps ends by itself where the limit is four.
    assert read_transitions(path, 4).terminations.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]


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


@pytest.mark.parametrize("flag", [np.float32, bool, np.int8])
def test_every_number_of_d4rls_layout(tmp_path, flag):
    """With every kind of flags, two-dimensional columns, groups of no concern, compressed."""
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for key in D4RL[0]:
            column = np.concatenate([e[key] for e in D4RL])
            if key in ("terminals", "timeouts"):
                column = column.astype(flag)
            if column.ndim == 1 and flag != np.int8:
                column = column[:, None]
            file.create_dataset(key, data=column, compression="gzip")
        file["infos/qpos"] = np.zeros((3, 2))
        file["metadata/algorithm"] = "SAC"
    dataset = read_dataset(path, max_episode_steps=3)
    t = dataset.transitions
    assert t.observations[:, 0].tolist() == [10, 11, 40, 20, 21, 22, 50, 60, 61, 30, 31]
    assert t.next_observations[:, 0].tolist() == [11, 12, 41, 21, 22, 23, 51, 61, 62, 31, 32]
    actions = [1 / 4, 2 / 4, 1 / 3, 1 / 5, 2 / 5, 3 / 5, 1 / 3, 1 / 4, 2 / 4, 1 / 4, 2 / 4]
    np.testing.assert_allclose(t.actions[:, 0], actions, atol=1e-7)
    rewards = [1011, 1012, 1041, 1021, 1022, 1023, 1051, 1061, 1062, 1031, 1032]
    assert t.rewards.tolist() == rewards
    assert t.terminations.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert {column.dtype for column in t} == {torch.float32}
    assert dataset.returns.tolist() == [2023, 1041, 3066, 1051, 2123]
    assert dataset.lengths.tolist() == [2, 1, 3, 1, 2]
    assert dataset.terminated.tolist() == [True, True, False, False, True]
    assert (dataset.rows, dataset.layout) == (11, "D4RL's layout")


def test_d4rls_layout_without_next_observations(tmp_path):
    """The last step of a cut episode has no successor, nor has the last row: they are left out."""
    path = write_file(tmp_path / "data.hdf5", *D4RL, next_observations=None)
    dataset = read_dataset(path)
    t = dataset.transitions
    assert t.observations[:, 0].tolist() == [10, 11, 40, 20, 21, 60, 61, 30]
    assert t.rewards.tolist() == [1011, 1012, 1041, 1021, 1022, 1061, 1062, 1031]
    assert t.terminations.tolist() == [0, 1, 1, 0, 0, 0, 1, 0]
    goes_on = t.terminations == 0  # what follows a termination is not used
    assert t.next_observations[goes_on][:, 0].tolist() == [11, 21, 22, 61, 31]
    assert t.next_observations.isfinite().all()
    assert dataset.returns.tolist() == [2023, 1041, 3066, 1051, 2123]
    ended = write_file(tmp_path / "ended.hdf5", *D4RL[:5], next_observations=None)
    assert read_transitions(ended).terminations.tolist() == [0, 1, 1, 0, 0, 0, 1]


def test_ends_a_row_off(tmp_path, capsys):
    """Marks that are late or early, and successors of other rows, are told by the next row."""
    episodes = [d4rl_episode(3, 10 * n + 1, terminal=1) for n in range(4)]
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    for key, shift, expected in [
        ("terminals", 0, 0),
        ("terminals", 1, 7),  # three ends, each once marked too late and once missed; and row 0
        ("terminals", -1, 7),
        ("next_observations", 1, 8),
    ]:
        moved = {key: np.roll(columns[key], shift, 0)}
        path = write_file(tmp_path / "data.hdf5", *episodes, **moved)
        dataset = read_dataset(path)
        assert dataset.misplaced_ends == expected
        note_ends(dataset, "Lab-v0", limit=1000)
        assert (f"NOTE   {expected} rows are marked as an end" in capsys.readouterr().out) == (
            expected > 0
        )


# ------------------------------------------------------------------ neither layout, doubtful limits
def half_marked(episodes, marked=(1, 3, 5)):
    """Episodes of four steps, of which only some have a mark that they were cut."""
    return [d4rl_episode(4, 10 * n + 1, timeout=n in marked) for n in range(episodes)]


def nothing(columns, rows):
    """Rows of zeros beside such columns."""
    return {key: np.zeros((rows, *column.shape[1:])) for key, column in columns.items()}


def files(*episodes, **replaced):
    return lambda path: write_file(path, *episodes, **replaced)


LONGER = "an episode of 5 steps, from row 5 on, but the time limit is 4; set --max-episode-steps"
NEITHER = {
    "steps at the end rows": (
        files(*D4RL, timeouts=None, next_observations=None),
        "no known layout",
        "(here 3 of 3 do not)",
    ),
    "an action at an end row": (
        files(episode(4, 0), episode(3, 5) | {"actions": np.ones((4, 1))}),
        "zero actions (here 1 of 2 do not)",
    ),
    "first rewards": (
        files(episode(4, 0) | {"rewards": np.full(5, 7.0)}, episode(3, 5)),
        "no known layout",
        "begins with reward 0 (here 1 do not)",
    ),
    "longer than the limit": (files(episode(4, 0), episode(5, 10)), LONGER),
    "cut one longer than the limit": (
        files(episode(4, 0), episode(6, 10, closed=False)),
        LONGER,
    ),
    "every second timeout lost": (
        files(*half_marked(6)),
        "an episode of 8 steps, from row 0 on, but the time limit is 4",
        "mark cuts in 'timeouts'",
    ),
    "the tail's timeouts lost": (
        files(*half_marked(5, marked=(0, 1))),
        "an episode of 12 steps, from row 8 on, but the time limit is 4",
    ),
    "next observations without timeouts": (
        files(episode(4, 1), next_observations=np.ones((5, 2))),
        "has 'next_observations', as D4RL's layout has, but no 'timeouts'; add them",
    ),
    "rows never written": (
        files(episode(4, 1), episode(3, 10), nothing(episode(4, 0), 900)),
        "the last 900 rows are all zero; cut them off",
    ),
    "rows never written in D4RL's layout": (
        files(*half_marked(4, range(4)), nothing(D4RL[0], 20_000)),
        "the last 20,000 rows are all zero; cut them off",
    ),
}


@pytest.mark.parametrize("name", NEITHER)
def test_file_of_neither_layout_is_refused(tmp_path, name):
    write, *named = NEITHER[name]
    with refused("data.hdf5", *named):
        read_dataset(write(tmp_path / "data.hdf5"), max_episode_steps=4)


def test_episodes_at_the_limit(tmp_path):
    """A file may end after the last action; three of 4 steps that nothing marks are one of 12."""
    path = write_file(tmp_path / "data.hdf5", episode(4, 0), episode(4, 10, closed=False))
    assert read_transitions(path, 4).terminations.tolist() == [0] * 7
    path = write_file(tmp_path / "data.hdf5", *half_marked(3, ()))
    assert len(read_transitions(path, max_episode_steps=12).rewards) == 12


def robot_file(path, env_id, lengths, **replaced):
    """Episodes of these lengths in d4rl-pybullet's layout, with the shapes of ``env_id``."""
    robot = ROBOTS[env_id]
    dims = (robot.observation_dim, robot.action_dim)
    return write_file(path, *(episode(steps, 0, *dims) for steps in lengths), **replaced)


@pytest.mark.parametrize(
    ("env_id", "lengths", "limit", "terminations", "note"),
    [
        ("HalfCheetahBulletEnv-v0", (5, 5), 0, 2, "2 terminations of a robot that never falls"),
        ("HalfCheetahBulletEnv-v0", (5, 5), 5, 0, ""),
        ("HopperBulletEnv-v0", (5, 5, 5, 3), 0, 4, "3 terminations after just 5 steps"),
        ("HopperBulletEnv-v0", (5, 5, 5, 3), 5, 1, ""),
        ("HopperBulletEnv-v0", (5, 6, 7, 5), 0, 4, ""),
    ],
)
def test_time_limit_of_the_recording(tmp_path, capsys, env_id, lengths, limit, terminations, note):
    path = robot_file(tmp_path / "data.hdf5", env_id, lengths)
    config = Config(dataset=str(path), env_id=env_id, max_episode_steps=limit)
    dataset = load_dataset(config, robot_environment(env_id))
    assert dataset.transitions.terminations.sum() == terminations
    out = capsys.readouterr().out
    assert f"{sum(lengths)} transitions, {terminations} of them terminations" in out
    assert "in d4rl-pybullet's layout" in out
    assert ("NOTE" in out) == bool(note) and note in out
    if note:
        assert "max_episode_steps (to 5?)" in out


def test_time_limits_among_the_terminations_of_d4rls_layout(tmp_path, capsys):
    env_id = "HopperBulletEnv-v0"
    path = robot_file(tmp_path / "data.hdf5", env_id, (5, 5, 5), timeouts=np.zeros(18))
    load_dataset(Config(dataset=str(path), env_id=env_id), robot_environment(env_id))
    out = capsys.readouterr().out
    assert "in D4RL's layout" in out and "mark that in 'timeouts' and not in 'terminals'" in out


def test_message_names_the_robot_that_fits(tmp_path, fails, command):
    hopper_file(tmp_path / "data.hdf5")
    fails("--dataset", "data.hdf5", named="Set env_id (its shapes fit HopperBulletEnv-v0)")
    write_file(tmp_path / "other.hdf5", episode(3, 0, 4, 2))
    code, _, error = command("--dataset", "other.hdf5")
    assert code == 2 and "Set env_id" in error and "BulletEnv" not in error


# ------------------------------------------------------------------------------- embedded samples
@pytest.mark.parametrize(
    ("name", "transitions", "terminations", "returns"),
    [
        ("halfcheetah-bullet-medium", (100_000, 26), 0, (100, 861.8, 90.6)),  # it never falls
        ("hopper-bullet-medium", (28_245, 15), 10, (32, 1253.7, 295.8)),
        ("hopper-bullet-mixed", (38_520, 15), 416, (426, 112.8, 218.6)),
    ],
)
def test_embedded_samples(name, transitions, terminations, returns):
    dataset = read_dataset(SAMPLE.parent / f"{name}-sample.hdf5")
    t = dataset.transitions
    own = dataset.returns
    assert t.observations.shape == transitions
    assert t.terminations.sum() == terminations
    assert (len(own), own.mean().round(1), own.std().round(1)) == returns
    assert t.rewards.double().sum().item() == pytest.approx(own.sum(), rel=1e-6)
    assert "re-collected" in dataset.source


# ----------------------------------------------------------------------------- where data come from
@pytest.fixture
def offline(monkeypatch):
    """The published addresses cannot be reached; returns the list of those that were asked for."""
    asked = []

    def refuse(self, url, part, pooch):
        asked.append(url)
        raise requests.ConnectionError(f"HTTPSConnectionPool({url}): NameResolutionError")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", refuse)
    return asked


def test_where_data_are_looked_for(tmp_path, monkeypatch, offline):
    """A path is taken as it is; an id from the cache; the default cache is d4rl-pybullet's."""
    assert find_dataset("some/file.hdf5") == Path("some/file.hdf5")
    for folder in ("cache", ".d4rl/datasets"):
        (tmp_path / folder).mkdir(parents=True)
        cached = write_file(tmp_path / folder / f"{SAMPLE_ID}.hdf5", episode(2, first=0))
        assert find_dataset(SAMPLE_ID) == cached
        monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
    assert not offline


def test_user_without_a_home(tmp_path, monkeypatch, offline):
    """As in a container: no HOME, and a number that is no user's. Only an id needs a folder."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with refused("set D4RL_DATASET_DIR"):
        find_dataset(SAMPLE_ID)
    assert str(find_dataset("data.hdf5")) == "data.hdf5"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert find_dataset(SAMPLE_ID) == SAMPLE


def test_offline(tmp_path, offline, capsys):
    """In words: why there is no published file, how to have it, and what the sample is."""
    load_dataset(Config(), robot_environment("HalfCheetahBulletEnv-v0"))
    out = capsys.readouterr().out
    note, what = [line for line in out.splitlines() if line.startswith("NOTE")]
    assert what.startswith(f"NOTE   this is not the published {SAMPLE_ID}, but re-collected after")
    reason = f"{SAMPLE_ID} could not be downloaded (its server cannot be reached, ConnectionError)"
    place = tmp_path / "cache" / f"{SAMPLE_ID}.hdf5"
    assert f"{reason}; to have it, put {offline[0]} at {place}" in note
    assert "NameResolutionError" not in out


def test_the_published_file_comes_after_a_run_on_the_sample(tmp_path, no_pictures, offline):
    """The run goes on with the file that it was trained on, which the message names."""
    settings = {"compile": False, "hidden_sizes": (8,), "eval_episodes": 1, "max_steps": 2}
    folder, _ = train(Config(dataset="hopper-bullet-medium-v0", **settings))
    (tmp_path / "cache").mkdir(exist_ok=True)
    hopper_file(tmp_path / "cache" / "hopper-bullet-medium-v0.hdf5")
    config = dataclasses.replace(load_checkpoint(folder)["config"], max_steps=3)
    sample = SAMPLE.parent / "hopper-bullet-medium-sample.hdf5"
    with pytest.raises(InputError, match=rf"holds now \(on {sample}\); put those back, or name"):
        train(config)
    env_id = "HopperBulletEnv-v0"
    train(dataclasses.replace(config, dataset=str(sample), env_id=env_id))
    assert load_checkpoint(folder)["step"] == 3


def test_own_transitions_may_be_of_any_kind():
    data = own_transitions()
    env = robot_environment("HopperBulletEnv-v0")
    arrays = Transitions(*(column.numpy() for column in data))
    for given in (
        data._replace(observations=data.observations.clone().requires_grad_()),
        Transitions(*(column.astype(">f8") for column in arrays)),
        arrays._replace(
            observations=arrays.observations[::-1].copy()[::-1],
            rewards=arrays.rewards.tolist(),
            terminations=arrays.terminations.astype(bool),
        ),
    ):
        loaded = load_dataset(Config(env_id="HopperBulletEnv-v0"), env, given).transitions
        for column, expected in zip(loaded, data, strict=True):
            assert torch.equal(column, expected) and not column.requires_grad


def test_the_samples_stand_in_for_their_own_ids_alone(tmp_path, offline):
    for name in ciql_pybullet.DATASETS:
        sample = SAMPLE.parent / name.replace("-v0", "-sample.hdf5")
        if sample.exists():
            assert find_dataset(name) == sample
        else:
            with refused(f"python data/make_bullet_dataset.py --id {name}") as error:
                find_dataset(name)
            place = tmp_path / "cache" / f"{name}.hdf5"
            assert f"put {offline[-1]} at {place}" in str(error.value)
        assert offline[-1].startswith("https://www.dropbox.com/s/")
        assert offline[-1].endswith(f"/{name}.hdf5?dl=1")
    assert len(set(offline)) == 12


# ------------------------------------------------------------------------- transitions of one's own
S_AND_NEXT = torch.randn(6, 15)
SAME = {"observations": S_AND_NEXT, "next_observations": S_AND_NEXT}
STILL = dict.fromkeys(SAME, torch.zeros(6, 15))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (own_transitions(observation_dim=14), "(6, 14), but (6, 15) fits the environment"),
        (own_transitions(action_dim=2), "actions is of shape (6, 2), but (6, 3) fits"),
        (own_transitions(next_observations=torch.zeros(6, 3)), "next_observations is"),
        (own_transitions(rewards=torch.zeros(6, 1)), "rewards is of shape (6, 1)"),
        (own_transitions(rewards=torch.full((6,), np.nan)), "rewards holds NaN"),
        (
            own_transitions(observations=torch.full((6, 15), np.inf)),
            "observations holds NaN or inf",
        ),
        (own_transitions(terminations=torch.full((6,), 0.5)), "other than 0 and 1"),
        (own_transitions(actions=torch.full((6, 3), 1.5)), "outside the action box (up to 1.5)"),
        (own_transitions(actions=torch.full((6, 3), -1.5)), "outside the action box (up to 1.5)"),
        (own_transitions(1), "two at least"),
        (own_transitions(**SAME), "next_observations are the observations; shift them"),
    ],
)
def test_transitions_that_do_not_fit(data, named):
    with refused(named):
        check_transitions(data, robot_environment("HopperBulletEnv-v0"), "data")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (own_transitions()._asdict(), "data is a dict, but must be Transitions"),
        (tuple(own_transitions()), "data is a tuple, but must be Transitions"),
        (own_transitions(rewards=["a"] * 6), "rewards is no array of numbers"),
        (own_transitions(rewards=[[1], [1, 2]]), "rewards is no array of numbers"),
    ],
)
def test_data_that_are_no_transitions(data, named):
    env = robot_environment("HopperBulletEnv-v0")
    with refused("data", named):
        load_dataset(Config(env_id="HopperBulletEnv-v0"), env, data)


def test_successors_that_may_be_the_observations():
    """Where every step terminates, and where nothing ever moves."""
    env = robot_environment("HopperBulletEnv-v0")
    check_transitions(own_transitions(**SAME, terminations=torch.ones(6)), env, "data")
    check_transitions(own_transitions(**STILL), env, "data")


def test_bandit_file(tmp_path):
    """Its observations are all zero to the end; what it holds are actions and rewards."""
    shapes = {"observations": (9, 15), "actions": (9, 3), "next_observations": (9, 15)}
    columns = {key: np.zeros(shape) for key, shape in shapes.items()}
    columns["actions"][0] = 1
    columns |= {"rewards": np.ones(9), "terminals": np.ones(9), "timeouts": np.zeros(9)}
    data = read_transitions(write_file(tmp_path / "data.hdf5", columns))
    check_transitions(data, robot_environment("HopperBulletEnv-v0"), "data")
    assert data.rewards.sum() == data.terminations.sum() == 9


def test_actions_of_another_box_are_rescaled(capsys):
    env = box_environment((-2.0, 0.0), (2.0, 4.0))
    actions = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 4.0], [1.0, 1.0]])
    data = own_transitions(4, action_dim=2, actions=actions)
    found = check_transitions(data, env, "data")
    assert found.actions.tolist() == [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]]
    assert capsys.readouterr().out == ""
    outside = data._replace(actions=actions - 0.01)
    with refused("outside the action box"):
        check_transitions(outside, env, "data")


@pytest.mark.parametrize(("largest", "is_noted"), [(1.0, True), (1.19, True), (1.3, False)])
def test_actions_that_use_a_part_of_the_box(capsys, largest, is_noted):
    """As those that were divided by 2 already, for a box of ±2."""
    env = box_environment((-2.0, -2.0), (2.0, 2.0))
    actions = torch.zeros(4, 2)
    actions[0, 0] = -0.5
    actions[1, 1] = largest
    check_transitions(own_transitions(4, action_dim=2, actions=actions), env, "data")
    out = capsys.readouterr().out
    assert ("NOTE" in out) == is_noted
    note = f"within {largest / 2:.0%} of the action box, from -0.5 to {largest:.4g}; are they"
    assert (note in out) == is_noted


def in_order(*episodes):
    """Transitions whose rows follow each other, an episode per pair of length and termination."""
    parts = [], [], []
    for number, (length, terminated) in enumerate(episodes):
        states = torch.arange(length + 1.0)[:, None] + 100 * number
        last = torch.arange(length) == length - 1
        for part, rows in zip(parts, (states[:-1], states[1:], terminated * last), strict=True):
            part.append(rows.float())
    names = ("observations", "next_observations", "terminations")
    columns = {name: torch.cat(column) for name, column in zip(names, parts, strict=True)}
    n = len(columns["terminations"])
    return own_transitions(n, 1, 1, rewards=torch.ones(n), **columns)


def test_episodes_of_ones_own_transitions():
    """Where ends can be told: by a termination, by a jump, by the last row; not where shuffled."""
    data = in_order((4, True), (3, False), (5, True), (6, False))
    dataset = dataset_of(data)
    assert dataset.lengths.tolist() == dataset.returns.tolist() == [4, 3, 5, 6]
    assert dataset.terminated.tolist() == [True, False, True, False]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    shuffled = type(data)(*(column[order] for column in data))
    assert len(dataset_of(shuffled).returns) == 0
    assert dataset_of(in_order((5, False))).returns.tolist() == [5]
    data.next_observations[3] = data.observations[4]  # it starts anew where it terminated
    assert dataset_of(data).lengths.tolist() == [4, 3, 5, 6]
    assert dataset_of(in_order((1, True), (1, True), (1, True))).returns.tolist() == [1, 1, 1]


def test_training_on_ones_own_transitions(lab, monkeypatch, capsys):
    """It prints what a file's training does, and draws the same of the data."""
    drawn = []
    monkeypatch.setattr(ciql_pybullet, "draw", lambda *arguments: drawn.append(arguments))
    data = in_order((10, False), (8, True))
    wide = {key: getattr(data, key).repeat(1, 3) for key in SAME}
    folder, _ = train(lab_config(), data._replace(**wide))
    out = capsys.readouterr().out
    assert "data   data: 18 rows, 2 episodes, mean return 9.0 ± 1.0\n" in out
    assert "18 transitions, 1 of them terminations, in transitions from Python\n" in out
    assert folder.name.startswith("own-transitions-")
    *_, title, dataset, env_id = drawn[-1]
    assert title.startswith("CIQL on own-transitions\n") and env_id == "lab:Lab-v0"
    assert dataset.returns.tolist() == [10, 8]
    assert "--resume" not in out and "train in Python, with config.resume" in out
    with refused("env_id is not set"):
        train(Config(), data)


# ------------------------------------------------------------------------------- other environments
ENVIRONMENTS = """
import sys
import gymnasium
import numpy as np

class Paid(gymnasium.Env):
    # It pays the first action, and a hundred times the second.
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 4]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), action[0] + 100 * action[1], False, False, {}

def register(name, limit=3, **changed):
    gymnasium.register(f"{name}-v0", type(name, (Paid,), changed), max_episode_steps=limit)

def giving(observation, reward):
    return {"step": lambda self, action: (np.float32(observation), reward, False, False, {})}

register("Paid")
register("Endless", limit=None)
register("Unbounded", action_space=gymnasium.spaces.Box(-np.inf, np.inf, (2,)))
register("Narrow", action_space=gymnasium.spaces.Box(np.float32([-2, 3]), np.float32([2, 3])))
register("Picture", observation_space=gymnasium.spaces.Box(0, 1, (8, 8)))
register("Restless", __init__=lambda self, mass: None)
register("Unpaid", **giving([0, 0], np.nan))
register("Wordy", **giving([0, 0], "much"))
register("Lost", **giving([np.nan, 0], 0.0))
register("Short", **giving([0], 0.0))
register("Broken", step=lambda self, action: 1 / 0)
register("Quitter", step=lambda self, action: sys.exit())
"""


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """A module that registers environments."""
    (tmp_path / "environments.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.slow
def test_robots_are_as_the_simulator_says():
    for env_id, robot in ROBOTS.items():
        env = check_environment(env_id)
        shapes = (*env.observation_space.shape, *env.action_space.shape)
        assert shapes == robot[:2] and env.spec.max_episode_steps == 1000
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    reacher = check_environment("ReacherBulletEnv-v0")
    assert reacher.observation_space.shape == (9,) and reacher.spec.max_episode_steps == 150


@pytest.mark.parametrize(
    ("env_id", "cause"),
    [
        ("CartPole-v1", "is no box"),
        ("environments:Picture-v0", "is no box of one dimension"),
        ("environments:Unbounded-v0", "has no bounds"),
        ("environments:Narrow-v0", "action 1 has no width, from 3 to 3"),
        ("environments:Restless-v0", "mass"),
        ("environments:Endless-v0", "has no time limit"),
        ("environments:Unpaid-v0", "reward nan"),
        ("environments:Wordy-v0", "must be real number, not str"),
        ("environments:Lost-v0", "gives [nan 0.]"),
        ("environments:Short-v0", "of shape (1,)"),
        ("environments:Broken-v0", "ZeroDivisionError: division by zero"),
        ("environments:Quitter-v0", "SystemExit"),
        ("NoSuchRobot-v0", "NoSuchRobot"),
        ("no_such_module:Robot-v0", "no_such_module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*WARN:UserWarning")  # gymnasium's own, besides
def test_environment_that_is_wrong(environments, fails, tmp_path, env_id, cause):
    """One line at the start that names it, exit code 2, and no folder."""
    hopper_file(tmp_path / "data.hdf5")
    arguments = ["--dataset", "data.hdf5", "--env-id", env_id, "--no-compile"]
    fails(*arguments, named=(f"env_id is {env_id}, which CIQL cannot act in", cause))


SMALL = {"max_steps": 20, "eval_interval": 10, "threads": 1}


def test_another_action_box_is_played(tmp_path, environments, capsys, no_pictures):
    """Actions in [-1, 1] reach the environment's own box; no score, as there is no reference."""
    policy = GaussianPolicy(2, 2, (4,))
    with torch.no_grad():
        policy.mu[-1].weight.zero_()
        policy.mu[-1].bias.fill_(np.arctanh(0.5))  # half of the way from the middle
    returns = [play_episode(policy, "environments:Paid-v0", seed) for seed in (0, 1)]
    np.testing.assert_allclose(returns, 3 * (1 + 100 * 3), rtol=1e-5)

    actions = np.tile(np.float32([[-2, 0], [2, 4], [0, 0]]), (5, 1))
    parts = [d4rl_episode(3, 10 * n, timeout=1) for n in range(5)]
    path = write_file(tmp_path / "data.hdf5", *parts, actions=actions)
    config = lab_config(**SMALL, dataset=str(path), env_id="environments:Paid-v0")
    loaded = load_dataset(config, check_environment(config.env_id)).transitions
    assert loaded.actions[:3].tolist() == [[-1, -1], [1, 1], [0, -1]]
    folder, curve = train(config)
    assert curve.steps.tolist() == [10, 20]
    rows = metrics(folder)
    assert "return_mean" in rows[-1] and "score" not in rows[-1]
    assert "score" not in capsys.readouterr().out


@pytest.mark.slow
def test_reacher(tmp_path, capsys):
    """Another of the simulator's robots: time limit and shapes are its own. From Python as well."""
    path = small_file(tmp_path / "data.hdf5", (150, 100, 150), 9, 2)
    config = lab_config(**SMALL, dataset=str(path), env_id="ReacherBulletEnv-v0")
    folder, curve = train(config)
    out = capsys.readouterr().out
    assert "399 transitions, 1 of them terminations, in d4rl-pybullet's layout" in out
    assert "NOTE" not in out and "score" not in out
    assert np.isfinite(curve.returns).all() and (folder / "eval_returns.png").exists()
    _, own = train(config, data=read_transitions(path, 150))
    assert np.array_equal(own.returns, curve.returns)
