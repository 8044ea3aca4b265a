"""Reading of the data format, on files the tests write."""

import numpy as np
import pooch
import pytest
from conftest import SAMPLE, SAMPLE_ID, episode, write_file

import ciql_pybullet
from ciql_pybullet import InputError, episode_returns, find_dataset, read_rows, read_transitions


@pytest.mark.parametrize("two_dimensional", [False, True])
def test_every_number(tmp_path, two_dimensional):
    """An episode that fell after 2 steps, one cut by the time limit of 3, and one cut by the end of the file."""
    path = write_file(
        tmp_path / "data.hdf5",
        episode(2, first=10), episode(3, first=20), episode(3, first=30, closed=False),
        two_dimensional=two_dimensional,
    )  # fmt: skip
    t = read_transitions(path, max_episode_steps=3)
    assert t.observations[:, 0].tolist() == [10, 11, 20, 21, 22, 30, 31]
    assert t.next_observations[:, 0].tolist() == [11, 12, 21, 22, 23, 31, 32]
    np.testing.assert_allclose(t.observations[:, 1] - t.observations[:, 0], 0.1, atol=1e-5)
    np.testing.assert_allclose(t.actions[:, 0], [1 / 4, 2 / 4, 1 / 5, 2 / 5, 3 / 5, 1 / 4, 2 / 4], atol=1e-7)
    assert t.rewards.tolist() == [1011, 1012, 1021, 1022, 1023, 1031, 1032]
    assert t.terminations.tolist() == [0, 1, 0, 0, 0, 0, 0]
    shapes = [tuple(column.shape) for column in t]
    assert shapes == [(7, 2), (7, 1), (7,), (7, 2), (7,)]
    assert {str(column.dtype) for column in t} == {"torch.float32"}
    assert episode_returns(read_rows(path)[0]).tolist() == [1011 + 1012, 1021 + 1022 + 1023]


def test_time_limit_decides_what_terminates(tmp_path):
    path = write_file(tmp_path / "data.hdf5", episode(4, first=10), episode(5, first=20))
    terminated = {limit: np.flatnonzero(read_transitions(path, limit).terminations).tolist() for limit in (4, 5, 6)}
    assert terminated == {4: [], 5: [3], 6: [3, 8]}


def test_first_row_of_the_next_episode_lends_no_reward(tmp_path):
    """The reward beside an episode's first observation belongs to nothing, even if it is not zero."""
    one, two = episode(2, first=10), episode(2, first=20)
    two["rewards"][0] = 777
    path = write_file(tmp_path / "data.hdf5", one, two)
    assert 777 not in read_transitions(path).rewards.tolist()
    assert episode_returns(read_rows(path)[0]).tolist() == [1011 + 1012, 1021 + 1022]


def test_float64_and_compressed_files(tmp_path):
    import h5py

    columns = episode(5, first=0)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column.astype(np.float64), compression="gzip")
    assert read_transitions(tmp_path / "data.hdf5").rewards.tolist() == [1001, 1002, 1003, 1004, 1005]


@pytest.mark.parametrize(
    ("name", "transitions", "terminations", "returns"),
    [
        ("halfcheetah", (100_000, 26), 0, (100, 861.8, 90.6)),
        ("hopper", (28_245, 15), 10, (32, 1253.7, 295.8)),
    ],  # a cheetah never falls
)
def test_embedded_samples(name, transitions, terminations, returns):
    path = SAMPLE.parent / f"{name}-bullet-medium-sample.hdf5"
    rows, source = read_rows(path)
    t, own = read_transitions(path), episode_returns(rows)
    assert t.observations.shape == transitions
    assert t.terminations.sum() == terminations
    assert (len(own), own.mean().round(1), own.std().round(1)) == returns
    assert t.rewards.double().sum().item() == pytest.approx(own.sum(), rel=1e-6)
    assert "re-collected" in source


# ---------------------------------------------------------------------------------- where data come from


@pytest.fixture
def offline(monkeypatch):
    """The published addresses cannot be reached; returns the list of those that were asked for."""
    asked = []

    def refuse(self, url, part, pooch):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", refuse)
    return asked


def test_a_path_is_taken_as_it_is(offline):
    assert str(find_dataset("some/file.hdf5")) == "some/file.hdf5"
    assert not offline


def test_the_cache_comes_before_the_network(tmp_path, offline):
    (tmp_path / "cache").mkdir()
    cached = write_file(tmp_path / "cache" / f"{SAMPLE_ID}.hdf5", episode(2, first=0))
    assert find_dataset(SAMPLE_ID) == cached
    assert not offline


def test_the_default_cache_is_d4rl_pybullets(tmp_path, monkeypatch, offline):
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    cached = write_file(folder / "ant-bullet-mixed-v0.hdf5", episode(2, first=0))
    assert find_dataset("ant-bullet-mixed-v0") == cached


def test_the_samples_stand_in_for_their_own_ids_alone(tmp_path, offline, capsys):
    samples = {path.name.replace("-sample.hdf5", "-v0"): path for path in SAMPLE.parent.glob("*-sample.hdf5")}
    assert samples[SAMPLE_ID] == SAMPLE
    for name, path in samples.items():
        assert find_dataset(name) == path
        assert "no route to host" in capsys.readouterr().out
    others = [name for name in ciql_pybullet.DOWNLOAD_URLS if name not in samples]
    assert len(others) == 12 - len(samples)
    for name in others:
        with pytest.raises(InputError) as error:
            find_dataset(name)
        url, place = ciql_pybullet.DOWNLOAD_URLS[name], tmp_path / "cache" / f"{name}.hdf5"
        assert f"download {url} to {place}" in str(error.value)
        assert f"python data/make_bullet_dataset.py --id {name}" in str(error.value)
    assert set(offline) == set(ciql_pybullet.DOWNLOAD_URLS.values())
    assert not list(tmp_path.glob("cache/*")) and not list(tmp_path.glob("cache/.*"))
