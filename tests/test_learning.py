"""Learning itself: on a made-up task IQL finds what the random actions of the data do not do."""

import torch

from ciql_pybullet import CIQL, Config, Transitions

STEPS = 20  # of an episode


def play(act, episodes, generator):
    """Rows of episodes in which an action pushes a point, which is paid for being near 0."""
    x = torch.randn(episodes, 2, generator=generator) * 1.5
    steps = []
    for _ in range(STEPS):
        action = act(x)
        successor = x + 0.3 * action
        steps.append((x, action, -(successor**2).sum(-1), successor))
        x = successor
    return [torch.stack(column, 1).flatten(0, 1) for column in zip(*steps, strict=True)]


def random_data(shift):
    """What random actions do; each reward may be that of the row ``shift`` rows before."""
    generator = torch.Generator().manual_seed(0)
    observations, actions, rewards, successors = play(
        lambda x: torch.rand(x.shape, generator=generator) * 2 - 1, 300, generator
    )
    cut = torch.zeros(len(rewards))  # no episode ends by itself
    return Transitions(observations, actions, rewards.roll(shift), successors, cut)


def mean_return(shift=0, **recipe):
    """Of the learned policy's mean actions, over 100 episodes."""
    sizes = {"hidden_sizes": (32, 32), "batch_size": 128, "max_steps": 600}
    config = Config(device="cpu", lr=3e-3, gamma=0.9, alpha=0, **sizes, **recipe)
    torch.manual_seed(0)
    agent = CIQL(2, 2, config)
    data = agent.prepare(random_data(shift))
    for _ in range(config.max_steps):
        agent.update(data)
    policy = agent.policy
    act = lambda x: policy((x - policy.observation_mean) / policy.observation_std).detach()
    rewards = play(act, 100, torch.Generator().manual_seed(1))[2]
    return rewards.sum().item() / 100


IQL = {"beta": 3.0, "tau": 0.7, "clamp_advantage": False, "policy_lr_decay": True}


def test_iql_learns():
    """Cloning does not, nor does IQL from rewards of the step before, as a wrong reader gives."""
    iql = mean_return(**IQL)
    assert iql > -30
    assert mean_return(beta=0.0) < 2 * iql
    assert mean_return(shift=1, **IQL) < 1.3 * iql
