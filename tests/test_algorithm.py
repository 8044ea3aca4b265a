"""The gradient step against a float64 reference that shares no code with the script."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import refused

from ciql_pybullet import CIQL, Config, Transitions, mlp

S = 5  # observation_dim
A = 3  # action_dim
B = 8  # batch
K = 4  # off-data actions
ZERO = torch.zeros((), dtype=torch.float64)


# ----------------------------------------------------------------------------------- the reference
def net(p, prefix, x):
    """The MLP whose parameters start with ``prefix``, on rows x: ReLU before all layers but one."""
    layers = sorted({int(name.split(".")[-2]) for name in p if name.startswith(prefix + ".")})
    for layer in layers:
        weight = p[f"{prefix}.{layer}.weight"]
        if weight.dim() == 1:  # LayerNorm (Ba et al., 2016)
            x = x - x.mean(1, keepdim=True)
            x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
        else:
            x = (x if layer == layers[0] else x.maximum(ZERO)) @ weight.T
        x = x + p[f"{prefix}.{layer}.bias"]
    return x


def mean_action(p, s):
    return net(p, "policy.mu", s).tanh()


def value(p, s):
    return net(p, "value.0", s)[:, 0]


def q(p, critic, k, s, a):
    return net(p, f"{critic}.q.{k - 1}", torch.cat([s, a], 1))[:, 0]


def q_bar_of(p, s, a):
    return q(p, "target_critic", 1, s, a).minimum(q(p, "target_critic", 2, s, a))


def gap(p, k, s, a, negatives):
    """E_ā Q(s,ā) − E_a Q(s,a) of critic k."""
    off_data = [q(p, "critic", k, s, negatives[:, n]).mean() for n in range(K)]
    return sum(off_data) / K - q(p, "critic", k, s, a).mean()


def log_density(p, s, a):
    """log N(a; tanh(μ(s)), σ²), summed over the action's dimensions."""
    mean = mean_action(p, s)
    variance = (2 * p["policy.log_std"]).exp()
    density = (-((a - mean) ** 2) / (2 * variance)).exp() / (2 * torch.pi * variance).sqrt()
    return density.log().sum(1)


def reference(p, frozen, batch, negatives, c):
    """The figures of a step at ``p``; what must carry no gradient is computed from ``frozen``."""
    s, a, r, s_next, terminated = batch
    q_bar = q_bar_of(frozen, s, a)
    v_next = value(frozen, s_next)
    if c.policy_share:
        v_next = (1 - c.policy_share) * v_next
        v_next = v_next + c.policy_share * q_bar_of(frozen, s_next, mean_action(frozen, s_next))
    y = torch.where(terminated == 1, r, r + c.gamma * v_next)
    q1 = q(p, "critic", 1, s, a)
    q2 = q(p, "critic", 2, s, a)
    advantage = q_bar - value(frozen, s)
    exponent = advantage.maximum(ZERO) if c.clamp_advantage else advantage
    weights = (c.beta * exponent).exp().minimum(ZERO + c.max_weight)
    diff = q_bar - value(p, s)
    figures = {
        "value_loss": ((c.tau - (diff < 0).double()).abs() * diff * diff).mean(),
        "q_loss": ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean(),
        "policy_loss": -(weights * log_density(p, s, a)).mean(),
        "q": (q1.mean() + q2.mean()) / 2,
        "v": value(p, s).mean(),
        "advantage": advantage.mean(),
        "policy_std": p["policy.log_std"].exp().mean(),
    }
    if c.q_weight:
        mu = mean_action(p, s)
        q_mu = q_bar_of(frozen, s, mu)
        rms = ((q_mu - q_bar).detach() ** 2).mean().sqrt()
        climbing = (q_mu - q_bar).mean() / rms
        figures["policy_loss"] = ((mu - a) ** 2).mean().log() - c.q_weight * climbing
    if c.alpha:
        gaps = [gap(p, k, s, a, negatives) for k in (1, 2)]
        penalty = gaps[0].maximum(ZERO) + gaps[1].maximum(ZERO)
        figures["q_loss"] = figures["q_loss"] + c.alpha * penalty
        figures |= {"gap1": gaps[0], "gap2": gaps[1]}
        figures |= {"penalty": penalty, "clamp_open": penalty > 0}
    return figures


def adam_step(p, gradient, moments, t, lr):
    """Kingma & Ba, 2015, algorithm 1, with its own constants."""
    for name, g in gradient.items():
        m, v = moments.get(name, (0.0, 0.0))
        moments[name] = (0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2)
        m, v = moments[name]
        p[name] -= lr(name) * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def weights_of(agent, part="data"):
    """All weights of the agent by name, or their ``grad`` where they have one, in float64."""
    tensors = {name: getattr(weight, part) for name, weight in agent.named_parameters()}
    return {name: tensor.double() for name, tensor in tensors.items() if tensor is not None}


def assert_close(found, expected, rtol, atol):
    assert found.keys() == expected.keys()
    for name, figure in expected.items():
        tensor = torch.as_tensor(figure).double()
        torch.testing.assert_close(found[name].double(), tensor, rtol=rtol, atol=atol, msg=name)


def random_data(n=200):
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(n, A, generator=generator) * 2 - 1
    return Transitions(
        observations=torch.randn(n, S, generator=generator),
        actions=actions,
        rewards=actions.sum(1),
        next_observations=torch.randn(n, S, generator=generator),
        terminations=(torch.rand(n, generator=generator) < 0.3).float(),
    )


RECIPES = {
    "CIQL": {"alpha": 1.5, "beta": 2.0, "max_weight": 1.5},
    "IQL": {"alpha": 0.0, "beta": 3.0, "clamp_advantage": False, "policy_lr_decay": True},
    "cloning": {"alpha": 0.0, "beta": 0.0},
    "climbing": {"alpha": 0.0, "q_weight": 0.7},
    "actor-critic": {"alpha": 1.5, "q_weight": 0.7, "policy_share": 0.3, "layer_norm": True},
}


def on_cuda(agent):
    """Have it take CUDA's path, here on the CPU: gaps are computed without a measure."""
    agent.__class__ = type("OnCuda", (type(agent),), {"on_cpu": False})
    return agent


@pytest.mark.parametrize(
    ("recipe", "path"),
    [(recipe, "cpu") for recipe in RECIPES] + [("CIQL", "cuda")],
)
def test_steps_are_those_of_the_reference(recipe, path):
    """Figures, gradients and weights, with the gaps measured first, computed, or not needed."""
    sizes = {"hidden_sizes": (6, 5), "batch_size": B, "num_neg": K, "lr": 1e-3, "polyak": 0.05}
    config = Config(device="cpu", tau=0.7, gamma=0.9, max_steps=8, **sizes, **RECIPES[recipe])
    torch.manual_seed(3)
    agent = CIQL(S, A, config)
    data = agent.prepare(random_data(20))
    for parameter in itertools.chain(agent.critic.parameters(), agent.target_critic.parameters()):
        parameter.data += 0.3 * torch.randn_like(parameter)  # apart from each other
    agent.rough_dtype = torch.float32  # figures of closed steps are exact then, too
    if path == "cuda":
        on_cuda(agent)

    p = weights_of(agent)
    moments = {}
    clamps = set()
    for t in range(6):
        torch.manual_seed(t)
        index = torch.randint(20, (B,))
        negatives = (torch.rand(B, K, A) * 2 - 1).double()
        batch = [column[index].double() for column in data]
        leaves = {name: weight.clone().requires_grad_() for name, weight in p.items()}
        expected = reference(leaves, p, batch, negatives, config)
        sum(expected[name] for name in ("value_loss", "q_loss", "policy_loss")).backward()
        gradient = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        torch.manual_seed(t)
        figures = agent.update(data)
        assert_close(figures, expected, 1e-3, 1e-5)
        assert_close(weights_of(agent, "grad"), gradient, 1e-3, 1e-5)

        cosine = (1 + math.cos(math.pi * t / 8)) / 2 if config.policy_lr_decay else 1
        lr = lambda name, c=cosine: 1e-3 * (c if "policy" in name else 1)
        adam_step(p, gradient, moments, t + 1, lr)
        for name in p.keys() - gradient:
            p[name] = 0.95 * p[name] + 0.05 * p[name.removeprefix("target_")]
        assert_close(weights_of(agent), p, 1e-4, 1e-5)
        if config.alpha:
            clamps.add((figures["gap1"] > 0).item() + (figures["gap2"] > 0).item())
    assert recipe != "CIQL" or clamps == {0, 1, 2}  # of the two are open


def test_log_std_stays_above_its_floor_and_can_grow_again():
    agent = CIQL(S, A, small(min_log_std=-1.0, lr=0.5, num_neg=1))
    zeros = torch.zeros(4)
    batch = Transitions(torch.zeros(4, S), torch.zeros(4, A), zeros, torch.zeros(4, S), zeros + 1)
    agent.policy.mu[-1].weight.data.zero_()
    agent.policy.mu[-1].bias.data.zero_()
    for _ in range(20):
        agent.update(batch)
    assert agent.policy.log_std.tolist() == [-1.0] * A
    for _ in range(20):
        agent.update(batch._replace(actions=torch.tensor([[1.0], [1], [-1], [-1]]).expand(4, A)))
    assert agent.policy.log_std.min() > -0.9


def test_data_are_normalised_as_the_policy_undoes_it():
    agent = CIQL(S, A, small())
    data = random_data(20)
    s = data.observations.double().numpy() * [0.01, 0.1, 1, 3, 5] + [0, 0, 7, -7, 7]
    successors = torch.tensor(s[::-1].copy()).float()
    raw = data._replace(observations=torch.tensor(s).float(), next_observations=successors)
    prepared = agent.prepare(raw)
    deviation = np.sqrt(((s - s.mean(0)) ** 2).sum(0) / 19)
    expected = (s - s.mean(0)) / (deviation + 1e-3)
    np.testing.assert_allclose(prepared.observations, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(prepared.next_observations, expected[::-1], rtol=1e-3, atol=1e-4)
    for name in ("actions", "rewards", "terminations"):
        assert torch.equal(getattr(prepared, name), getattr(data, name))
    mean_action = agent.policy(prepared.observations[:1])[0].detach()
    np.testing.assert_allclose(agent.policy.act(s[0]), mean_action, rtol=1e-3, atol=1e-5)


def small(**settings):
    usual = {"hidden_sizes": (16, 16), "batch_size": 32, "lr": 1e-2, "threads": 2}
    return Config(device="cpu", **(usual | settings))


def started(config, make_agent=CIQL):
    torch.manual_seed(0)
    agent = make_agent(S, A, config)
    agent.prepare(random_data())
    return agent


def run_steps(agent, steps):
    """What each of these steps reports."""
    torch.manual_seed(0)
    data = random_data()
    history = []
    for _ in range(steps):
        figures = agent.update(data)
        history.append({name: figure.item() for name, figure in figures.items()})
    return history


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leaving_out_a_closed_clamp_is_exact(dtype):
    """Measured or always computed: the same bits, but for the log's rough gaps of closed steps."""
    measured = started(small())
    measured.rough_dtype = dtype
    history = run_steps(measured, 30)
    assert 0 < np.mean([row["clamp_open"] for row in history]) < 1
    always = on_cuda(started(small()))
    for row, expected in zip(history, run_steps(always, 30), strict=True):
        if dtype == torch.bfloat16 and not row["clamp_open"]:
            for name in ("gap1", "gap2"):
                assert row.pop(name) == pytest.approx(expected.pop(name), rel=0.1, abs=0.02)
        assert row == expected
    assert_same_weights(measured, always)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("batch_size", [4, 32, 256])
@pytest.mark.parametrize(("spread", "steps"), [(0.0, 100), (1.0, 0), (30.0, 100)])
def test_rough_measure_knows_how_rough_it_is(spread, steps, batch_size, layer_norm):
    """Its error is below its margin, so no gap that is open is ever called closed."""
    settings = {"num_neg": K, "alpha": 5.0, "lr": 1e-3, "layer_norm": layer_norm}
    agent = started(small(batch_size=batch_size, **settings))
    agent.rough_dtype = torch.bfloat16
    for parameter in agent.critic.parameters():
        parameter.data += spread * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    run_steps(agent, steps)
    data = random_data()
    errors = []
    for _ in range(50):
        batch = agent.sample(data)
        negatives = agent.off_data_actions(batch)
        gaps, margin = agent.measure_gaps(batch, negatives)
        p = weights_of(agent)
        s, a, *_ = (column.double() for column in batch)
        exact = torch.stack([gap(p, k, s, a, negatives.double()) for k in (1, 2)])
        assert gaps.dtype == margin.dtype == torch.float32 and not gaps.requires_grad
        assert ((gaps - exact).abs() < margin).all()
        errors.append((gaps - exact).abs().max().item())
        scale = agent.critic(batch.observations, batch.actions).abs().mean(-1)
        # else hardly any would be closed
        assert (margin < (scale + exact.abs()) / (10 * batch_size**0.5)).all()
    assert max(errors) > 1e-5  # it is rough indeed

    agent.rough_dtype = torch.float32
    gaps, margin = agent.measure_gaps(batch, negatives)
    torch.testing.assert_close(gaps.double(), exact, rtol=1e-4, atol=1e-5 * (1 + spread) ** 2)
    assert (margin < 1e-6 * (scale + exact.abs())).all()


class Counting(CIQL):
    """Its losses move a buffer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = torch.nn.Buffer(torch.zeros(()))

    def losses(self, batch):
        self.seen.add_(1)
        return super().losses(batch)


@pytest.mark.slow
def test_compiled_step(capsys):
    """It agrees with the eager one, gives the same bits again, and its trial leaves no trace."""
    config = small(lr=1e-3)
    agent = started(config, Counting)
    before = copy.deepcopy(agent)
    random_state = (torch.get_rng_state(), np.random.get_state()[1].tolist())
    agent.accelerate(random_data())
    assert_same_weights(agent, before)
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert np.random.get_state()[1].tolist() == random_state[1] and agent.steps == 0
    assert {"losses", "measure_gaps"} <= vars(agent).keys()
    with torch.compiler.set_stance("fail_on_recompile"):  # a recompile would be an eager step
        found = run_steps(agent, 100)
        assert agent.seen == 100 and "NOTE" not in capsys.readouterr().out
        agent.load_training_state(before.training_state())
        assert run_steps(agent, 100) == found
    expected = run_steps(started(config), 100)
    for name in expected[0]:
        one = [row[name] for row in found]
        other = [row[name] for row in expected]
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=5e-3, err_msg=name)


def test_what_cannot_be_compiled_runs_eagerly(monkeypatch, capsys):
    """With a NOTE of one line, and to the bits of a run that was not to be compiled."""
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: lambda *batch: 1 / 0)
    agent = started(small(alpha=0.0))
    agent.accelerate(random_data())
    out = capsys.readouterr().out
    assert out.count("NOTE   the losses could not be compiled") == 1 and out.count("\n") == 2
    assert run_steps(agent, 3) == run_steps(started(small(alpha=0.0)), 3)
    assert agent.steps == 3 and "losses" not in vars(agent)


def test_parameters_that_nothing_would_train_or_save():
    """Each is refused until it was given to ``make_optimizer``, and is the agent's own."""
    agent = started(small())
    agent.value = torch.nn.Sequential(mlp(S, 12, 1), torch.nn.Flatten(0))
    with refused("give each network to make_optimizer"):
        agent.check_attributes()
    agent.others = [mlp(S, 8, 1)]  # a plain list, which nothing would save
    agent.make_optimizer(agent.policy, agent.value, agent.critic, *agent.others)
    with refused("nn.ModuleList"):
        agent.check_attributes()
    agent.others = torch.nn.ModuleList(agent.others)
    agent.check_attributes()

    state = agent.training_state()
    agent.mine = torch.nn.Linear(2, 2)
    agent.make_optimizer(agent.policy, agent.value, agent.critic, agent.others, agent.mine)
    with refused("differ in mine"):
        agent.load_training_state(state)
