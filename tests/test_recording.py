"""The data program: what it records of episodes, when learning ends, what a thinned set keeps."""

import gymnasium
import make_bullet_dataset as program
import numpy as np
import pytest

import ciql_pybullet as ciql


class Counted(gymnasium.Env):
    """Episodes of given lengths, which pay 100 times their number at each step, from 0 on."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, *lengths):
        self.lengths = lengths
        self.number = -1

    def reset(self, seed=None, options=None):
        self.number += 1
        self.t = 0
        return np.float32([1000 * self.number]), {}

    def step(self, action):
        self.t += 1
        is_over = self.t == self.lengths[self.number]
        return np.float32([1000 * self.number + self.t]), 100.0 * self.number, is_over, False, {}


def recorded(*lengths):
    """All episodes but the first, which is thrown away, and a step of one more."""
    recorder = program.Recorder(Counted(1, *lengths, 9))
    for length in (*lengths, 1):
        recorder.reset()
        for _ in range(length):
            recorder.step(np.float32([0.5]))
    return recorder


def test_recorded_file_is_read_as_what_was_played(tmp_path):
    recorder = recorded(2, 3)
    recorder.write(tmp_path / "data.hdf5", "made up")
    dataset = ciql.read_dataset(tmp_path / "data.hdf5", max_episode_steps=3)
    t = dataset.transitions
    assert t.observations[:, 0].tolist() == [1000, 1001, 2000, 2001, 2002]
    assert t.next_observations[:, 0].tolist() == [1001, 1002, 2001, 2002, 2003]
    assert t.rewards.tolist() == [100, 100, 200, 200, 200]
    assert t.terminations.tolist() == [0, 1, 0, 0, 0]
    assert dataset.returns.tolist() == recorder.returns == [200, 600]
    assert dataset.source == "made up" and set(t.actions[:, 0].tolist()) == {0.5}


@pytest.mark.parametrize(
    ("returns", "is_reached"),
    [
        ([900.0, 100.0, 100.0], False),  # one good episode, or an old one, is no level
        ([100.0, 100.0, 800.0, 600.0, 700.0], True),
        ([900.0, 900.0], False),  # of three
    ],
)
def test_learning_ends_at_a_mean_of_the_last_episodes(returns, is_reached):
    recorder = recorded()
    recorder.returns = returns
    until = program.UntilLevel(recorder, level=700.0, window=3)
    until.locals = {"dones": np.array([False])}
    assert until._on_step() != is_reached and until.is_reached == is_reached


def test_thinned_set_keeps_whole_episodes_evenly(tmp_path):
    """From the first to the last of learning, and no piece of one."""
    recorder = recorded(*[3] * 40)
    recorder.thin(40)
    kept = recorder.returns
    numbers = np.array(kept) / 300
    assert 9 <= len(kept) <= 11 and len(recorder.rows) == 4 * len(kept)
    assert numbers[0] <= 5 and numbers[-1] >= 36 and set(np.diff(numbers)) <= {3, 4, 5}
    recorder.write(tmp_path / "data.hdf5", "")
    assert ciql.read_dataset(tmp_path / "data.hdf5").returns.tolist() == kept


def test_first_episode_of_a_simulator_is_thrown_away():
    """Its rewards are off by a constant: here, and where the script plays."""
    recorder = program.Recorder(gymnasium.make("HopperBulletEnv-v0"))
    policy = ciql.GaussianPolicy(15, 3, (4,))
    for _ in range(2):
        is_over = False
        observation, _ = recorder.reset(seed=1)
        while not is_over:
            observation, _, terminated, truncated, _ = recorder.step(policy.act(observation))
            is_over = terminated or truncated
    first, second = recorder.returns
    assert first == second == ciql.play_episode(policy, "HopperBulletEnv-v0", seed=1)
