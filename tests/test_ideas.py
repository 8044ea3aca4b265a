"""Ideas as a student writes them: agents of a few lines, in ordinary PyTorch, that just work."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
import variants
from conftest import ROOT, lab_config, own_transitions, refused
from test_algorithm import assert_same_weights
from torch import nn

import ciql_pybullet
from ciql_pybullet import CIQL, Config, QNetworks, Transitions

README = (ROOT / "README.md").read_text()
S = 5  # observation_dim
A = 2  # action_dim
CONFIG = Config(device="cpu", hidden_sizes=(16, 16), batch_size=32, num_neg=3, alpha=5.0, lr=1e-3)


class FourCritics(CIQL):
    """And the penalty of CQL(H): a soft maximum over the off-data actions."""

    def make_critic(self):
        return QNetworks(self.observation_dim, self.action_dim, self.config, num_q=4)

    def gaps(self, batch, negative_actions):
        s = batch.observations.repeat_interleave(self.config.num_neg, 0)
        q_neg = self.critic(s, negative_actions.flatten(0, 1))
        q_neg = q_neg.unflatten(-1, (-1, self.config.num_neg)).logsumexp(-1)
        return (q_neg - self.critic(batch.observations, batch.actions)).mean(-1)


class SpectralCritic(CIQL):
    """Buffers that each call moves."""

    def make_critic(self):
        critic = super().make_critic()
        for q in critic.q:
            nn.utils.parametrizations.spectral_norm(q[0])
        return critic


class TargetValue(CIQL):
    """y bootstraps from a slow copy of V."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    def targets(self, batch):
        q_bar, _ = super().targets(batch)
        v_next = self.target_value(batch.next_observations)
        return q_bar, batch.rewards + self.config.gamma * (1 - batch.terminations) * v_next

    def update(self, data):
        metrics = super().update(data)
        ciql_pybullet.move_towards(self.target_value, self.value, self.config.polyak)
        return metrics


class LearnedTemperature(CIQL):
    """β is a parameter, which holds the mean weight of the policy's loss at 2."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.beta_optimizer = torch.optim.Adam([self.log_beta], lr=1e-2)

    def losses(self, batch):
        loss, metrics = super().losses(batch)
        advantage = self.targets(batch)[0] - self.value(batch.observations).detach()
        weights = torch.exp(self.log_beta.exp() * advantage.clamp(min=0))
        return loss + (weights.mean() - 2) ** 2, metrics | {"beta": self.log_beta.detach().exp()}

    def update(self, data):
        self.beta_optimizer.zero_grad()
        metrics = super().update(data)
        self.beta_optimizer.step()
        return metrics


class DDPGBC(CIQL):
    """The policy climbs the smaller target Q and clones, unweighted (Park et al., 2024)."""

    def policy_loss(self, batch, advantage):
        q = self.target_critic(batch.observations, self.policy(batch.observations)).amin(0)
        cloning = -self.policy.log_prob(batch.observations, batch.actions).mean()
        return cloning - q.mean() / q.abs().mean().detach()


class Prioritized(CIQL):
    """Transitions are drawn in proportion to their last TD error (Schaul et al., 2016)."""

    def prepare(self, data):
        self.priorities = nn.Buffer(torch.ones(len(data.rewards)))
        self.drawn = nn.Buffer(torch.zeros(self.config.batch_size, dtype=torch.long))
        return super().prepare(data)

    def sample(self, data):
        self.drawn.copy_(torch.multinomial(self.priorities, len(self.drawn), replacement=True))
        return Transitions(*(column[self.drawn] for column in data))

    @torch.no_grad()
    def update(self, data):
        with torch.enable_grad():
            metrics = super().update(data)
        batch = Transitions(*(column[self.drawn] for column in data))
        error = self.critic(batch.observations, batch.actions)[0] - self.targets(batch)[1]
        self.priorities[self.drawn] = error.abs() + 0.01
        return metrics


class AdamWCosine(CIQL):
    def make_optimizer(self, policy, *others):
        super().make_optimizer(policy, *others)
        self.optimizer = torch.optim.AdamW(self.optimizer.param_groups, weight_decay=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 1000)

    def update(self, data):
        metrics = super().update(data)
        self.scheduler.step()
        return metrics


class RunningScale(CIQL):
    """The advantage is divided by a running mean of its size, a plain number."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = 1.0

    def policy_loss(self, batch, advantage):
        self.scale = 0.9 * self.scale + 0.1 * float(advantage.abs().mean())
        return super().policy_loss(batch, advantage / self.scale)


class BufferedScale(CIQL):
    """The same as a tensor."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = nn.Buffer(torch.ones(()))

    def policy_loss(self, batch, advantage):
        self.scale = 0.9 * self.scale + 0.1 * advantage.abs().mean()
        return super().policy_loss(batch, advantage / self.scale)


def model_of_the_readme():
    """The README's example: a network more, whose loss is a column."""
    (code,) = re.findall(r"```python\n(import torch\nfrom ciql.*?)\ntrain\(", README, re.DOTALL)
    names = {"__name__": __name__}
    exec(code, names)  # noqa: S102
    return names["Model"]


OWN = [idea for idea in list(vars().values()) if type(idea) is type and CIQL in idea.__bases__]
IDEAS = [*OWN, model_of_the_readme(), variants.AveragedPolicy, variants.NearActions]
EAGER = {RunningScale}  # a graph would hold the number of one step


def make(idea):
    """An agent as ``train`` makes it, and its data."""
    torch.manual_seed(0)
    agent = idea(S, A, CONFIG)
    data = agent.prepare(own_transitions(300, S, A))
    agent.check_attributes()
    return agent, data


def take_steps(agent, data, steps, seed=1):
    """What each of these steps reported."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    history = [agent.update(data) for _ in range(steps)]
    return [{name: figure.item() for name, figure in row.items()} for row in history]


@functools.cache
def eager_run(idea):
    """The agent after a hundred steps, and what they reported."""
    agent, data = make(idea)
    return agent, take_steps(agent, data, 100)


@pytest.mark.parametrize("idea", IDEAS)
def test_idea_is_exact(idea, tmp_path):
    """The same seed gives the same bits, all of it is trained, it resumes as if never stopped."""
    agent, history = eager_run(idea)
    again, data = make(idea)
    before = copy.deepcopy(again)
    assert take_steps(again, data, 100) == history
    assert_same_weights(agent, again)
    for (name, old), new in zip(before.named_parameters(), again.parameters(), strict=True):
        assert not (old.requires_grad and torch.equal(old, new)), name

    expected = take_steps(again, data, 10, seed=2)
    resumed, data = make(idea)
    torch.save(agent.training_state(), tmp_path / "state.pt")
    resumed.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.steps == 100
    assert take_steps(resumed, data, 10, seed=2) == expected
    assert_same_weights(again, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("idea", IDEAS)
def test_traced_idea(idea, monkeypatch, capsys):
    """What the compiler traces of it, without machine code, takes the steps of the eager one."""
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, options: compile_with(f, backend="aot_eager")
    )
    agent, data = make(idea)
    agent.accelerate(data)
    assert ("losses" in vars(agent)) == (idea not in EAGER)
    assert ("NOTE" in capsys.readouterr().out) == (idea in EAGER)
    with torch.compiler.set_stance("fail_on_recompile"):
        history = take_steps(agent, data, 30)
    for traced_row, row in zip(history, eager_run(idea)[1], strict=False):
        assert traced_row == pytest.approx(row, rel=1e-2, abs=1e-3)


class TensorInPrepare(CIQL):
    def prepare(self, data):
        self.mean = data.rewards.mean()
        return super().prepare(data)


def test_tensor_that_a_resume_would_forget(lab):
    """It is refused by name, before training."""
    with refused("mean is an array, which is not saved; make it a nn.Buffer"):
        ciql_pybullet.train(lab_config(), make_agent=TensorInPrepare)
    assert not (lab / "runs").exists()
