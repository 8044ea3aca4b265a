"""Losses and update against float64 references in numpy that share no code with the script."""

import copy

import numpy as np
import pytest
import torch
from conftest import refused

from ciql_pybullet import (
    CIQL,
    Config,
    Transitions,
    ValueNetwork,
    awr_weights,
    conservative_gap,
    expectile_loss,
)

S = 5  # observation_dim
A = 3  # action_dim
B = 8  # batch
K = 4  # off-data actions
SETTINGS = {"hidden_sizes": (8, 7), "batch_size": B, "num_neg": K, "lr": 1e-3, "polyak": 0.05}
CONFIG = Config(device="cpu", tau=0.7, beta=2.0, alpha=1.5, gamma=0.9, **SETTINGS)
pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------- the reference
def net(parameters, prefix, x):
    """The MLP whose parameters start with ``prefix``, on rows x, in float64."""
    names = [name for name in parameters if name.startswith(prefix + ".")]
    layers = sorted({int(name.split(".")[-2]) for name in names})
    for layer in layers:
        x = x @ parameters[f"{prefix}.{layer}.weight"].T + parameters[f"{prefix}.{layer}.bias"]
        if layer != layers[-1]:
            x = np.maximum(x, 0)
    return x


def value(p, s):
    return net(p, "value.v", s)[:, 0]


def q(p, critic, k, s, a):
    return net(p, f"{critic}.q.{k - 1}", np.concatenate([s, a], 1))[:, 0]


def gap(p, k, batch, negatives):
    """E_ā Q(s,ā) − E_a Q(s,a) of critic k."""
    off_data = [q(p, "critic", k, batch[0], negatives[:, n]) for n in range(negatives.shape[1])]
    return np.mean(off_data) - np.mean(q(p, "critic", k, batch[0], batch[1]))


def log_density(p, s, a):
    """log N(a; tanh(μ(s)), σ²), summed over the action's dimensions."""
    mean = np.tanh(net(p, "policy.mu", s))
    variance = np.exp(2 * p["policy.log_std"])
    density = np.exp(-((a - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    return np.log(density).sum(1)


def reference(p, frozen, batch, negatives, c):
    """The figures of a step at ``p``; what must carry no gradient is computed from ``frozen``."""
    s, a, r, s_next, terminated = batch
    q_bar = np.minimum(q(frozen, "target_critic", 1, s, a), q(frozen, "target_critic", 2, s, a))
    v_next = value(frozen, s_next)
    y = [r[i] if terminated[i] else r[i] + c.gamma * v_next[i] for i in range(len(r))]
    q1 = q(p, "critic", 1, s, a)
    q2 = q(p, "critic", 2, s, a)
    gaps = [gap(p, k, batch, negatives) for k in (1, 2)] if c.alpha else [0.0, 0.0]
    penalty = sum(max(0.0, one) for one in gaps)
    advantage = q_bar - value(frozen, s)
    exponent = np.maximum(0, advantage) if c.clamp_advantage else advantage
    weights = np.minimum(np.exp(c.beta * exponent), c.max_weight)
    diff = q_bar - value(p, s)
    return {
        "value_loss": np.mean([abs(c.tau - (d < 0)) * d * d for d in diff]),
        "q_loss": np.mean((q1 - y) ** 2) + np.mean((q2 - y) ** 2) + c.alpha * penalty,
        "policy_loss": -np.mean(weights * log_density(p, s, a)),
        "penalty": penalty,
        "gap1": gaps[0],
        "gap2": gaps[1],
        "q": (q1.mean() + q2.mean()) / 2,
        "v": value(p, s).mean(),
        "advantage": advantage.mean(),
        "policy_std": np.exp(p["policy.log_std"]).mean(),
    }


def total_loss(p, frozen, batch, negatives, c):
    figures = reference(p, frozen, batch, negatives, c)
    return figures["value_loss"] + figures["q_loss"] + figures["policy_loss"]


def finite_differences(loss, p, names, step=1e-6):
    """The gradient of ``loss(p)`` by the parameters ``names``."""
    p = {name: column.copy() for name, column in p.items()}
    gradient = {}
    for name in names:
        gradient[name] = np.zeros_like(p[name])
        for index in np.ndindex(*p[name].shape):
            middle = p[name][index]
            p[name][index] = middle + step
            high = loss(p)
            p[name][index] = middle - step
            low = loss(p)
            p[name][index] = middle
            gradient[name][index] = (high - low) / (2 * step)
    return gradient


class Adam:
    """Kingma & Ba, 2015, algorithm 1, with its own constants."""

    def __init__(self, p, names):
        self.names = names
        self.t = 0
        self.m = {name: np.zeros_like(p[name]) for name in names}
        self.v = {name: np.zeros_like(p[name]) for name in names}

    def step(self, p, gradient, lr):
        self.t += 1
        for name in self.names:
            g = gradient[name]
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            m_hat = self.m[name] / (1 - 0.9**self.t)
            v_hat = self.v[name] / (1 - 0.999**self.t)
            p[name] -= lr(name) * m_hat / (np.sqrt(v_hat) + 1e-8)


def move_target(p, polyak):
    for name in p:
        if name.startswith("target_"):
            p[name] = (1 - polyak) * p[name] + polyak * p[name.removeprefix("target_")]


# --------------------------------------------------------------------------------- what is compared
def weights_of(agent, part="data"):
    """All weights of the agent by name, or their ``grad`` where they have one, in float64."""
    tensors = {name: getattr(weight, part) for name, weight in agent.named_parameters()}
    return {name: t.double().numpy().copy() for name, t in tensors.items() if t is not None}


def trained(p):
    return [name for name in p if not name.startswith("target_")]


def in_float64(batch):
    return tuple(column.double().numpy() for column in batch)


def assert_close(found, expected, rtol, atol):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


def random_batch(generator, n=B):
    return Transitions(
        observations=torch.randn(n, S, generator=generator),
        actions=torch.rand(n, A, generator=generator) * 2 - 1,
        rewards=torch.randn(n, generator=generator),
        next_observations=torch.randn(n, S, generator=generator),
        terminations=(torch.rand(n, generator=generator) < 0.3).float(),
    )


# ------------------------------------------------------------------------- one step, several steps
CLAMPS = {"closed": (False, False), "open on both": (True, True), "open on one": (False, True)}


@pytest.fixture(scope="module", params=CLAMPS)
def case(request):
    """An agent with weights far from zero, a batch, off-data actions, and the reference of them."""
    wanted = CLAMPS[request.param]  # is the clamp of (Q1, Q2) open?
    generator = torch.Generator().manual_seed(4)
    torch.manual_seed(3)
    agent = CIQL(S, A, CONFIG)
    agent.prepare(random_batch(generator))
    for network in (agent.critic, agent.target_critic):  # apart from each other
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    for parameter in agent.value.parameters():
        parameter.data -= 0.2
    agent.policy.log_std.data.uniform_(-1, 0.5)
    batch = random_batch(generator)
    negatives = torch.rand(B, K, A, generator=generator) * 2 - 1
    arguments = (in_float64(batch), negatives.double().numpy())
    for k, network in enumerate(agent.critic.q, start=1):
        if (gap(weights_of(agent), k, *arguments) > 0) != wanted[k - 1]:
            network[-1].weight.data *= -1
    p = weights_of(agent)
    gaps = np.array([gap(p, k, *arguments) for k in (1, 2)])
    assert tuple(gaps > 0) == wanted and np.abs(gaps).min() > 0.01
    arguments = (*arguments, CONFIG)
    gradient = finite_differences(lambda at: total_loss(at, p, *arguments), p, trained(p))
    assert max(np.abs(column).max() for column in gradient.values()) > 0.1
    return agent, batch, negatives, reference(p, p, *arguments), gradient


@pytest.mark.parametrize("where", ["helper", "in line", "as on CUDA"])
def test_figures_and_gradients_of_a_step(case, monkeypatch, where):
    """All three losses and the penalty, with the gaps measured beside, before, or not at all."""
    agent, batch, negatives, expected, expected_gradient = case
    agent = copy.deepcopy(agent)
    if where == "helper":
        agent.meter.start_helper(batch)
        assert agent.meter.helper
    if where == "as on CUDA":
        agent.meter = None
        agent.on_cpu = False
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.arange(B))
    monkeypatch.setattr(torch, "rand", lambda *args, **options: (negatives + 1) / 2)
    found = {name: figure.item() for name, figure in agent.update(batch).items()}
    assert_close(found, expected | {"clamp_open": expected["penalty"] > 0}, 1e-4, 1e-6)
    assert_close(weights_of(agent, "grad"), expected_gradient, 2e-3, 2e-5)


RECIPES = {
    "CIQL": {"alpha": 1.5, "beta": 2.0},
    "IQL": {"alpha": 0.0, "beta": 3.0, "clamp_advantage": False, "policy_lr_decay": True},
    "cloning": {"alpha": 0.0, "beta": 0.0},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_several_steps(recipe):
    """Batches, off-data actions, Adam, the policy's cosine and the target's average."""
    config = Config(device="cpu", tau=0.7, gamma=0.9, max_steps=8, **SETTINGS | RECIPES[recipe])
    torch.manual_seed(1)
    agent = CIQL(S, A, config)
    for parameter in agent.target_critic.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    data = random_batch(torch.Generator().manual_seed(1), 20)
    p = weights_of(agent)
    names = trained(p)
    adam = Adam(p, names)
    for t in range(6):
        torch.manual_seed(t)
        index = torch.randint(20, (B,)).numpy()
        negatives = (torch.rand(B, K, A) * 2 - 1).double().numpy()
        batch = tuple(column[index] for column in in_float64(data))
        frozen = {name: column.copy() for name, column in p.items()}
        rest = (frozen, batch, negatives, config)
        gradient = finite_differences(lambda at, rest=rest: total_loss(at, *rest), p, names, 1e-5)
        policy_lr = config.lr
        if config.policy_lr_decay:
            policy_lr *= (1 + np.cos(np.pi * t / 8)) / 2
        adam.step(p, gradient, lambda name, lr=policy_lr: lr if "policy" in name else config.lr)
        move_target(p, config.polyak)
        torch.manual_seed(t)
        figures = agent.update(data)
        assert ("penalty" in figures) == (config.alpha > 0)
        assert_close(weights_of(agent), p, 1e-4, 1e-5)


def test_losses_by_hand():
    diff = torch.tensor([2.0, -1.0, 0.0, -3.0], dtype=torch.float64)
    expected = (0.8 * 4 + 0.2 * 1 + 0 + 0.2 * 9) / 4
    assert expectile_loss(diff, 0.8).item() == pytest.approx(expected)

    q_data = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    q_neg = torch.tensor([[4.0, 2.0, 3.0, 7.0], [1.0, 2.0, 3.0, 2.0]])
    assert conservative_gap(q_neg, q_data).tolist() == [2.0, -3.0]

    advantage = torch.tensor([-5.0, 0.0, 0.5, 1e6])
    assert awr_weights(advantage, 2.0, 50.0).tolist() == pytest.approx([1.0, 1.0, np.e, 50.0])
    of_iql = awr_weights(advantage, 2.0, 50.0, clamp_advantage=False)
    assert of_iql.tolist() == pytest.approx([np.exp(-10), 1.0, np.e, 50.0])


def test_log_std_stays_above_its_floor_and_can_grow_again():
    config = Config(device="cpu", hidden_sizes=(8,), min_log_std=-1.0, lr=0.5, num_neg=1)
    agent = CIQL(S, A, config)
    zeros = torch.zeros(4)
    batch = Transitions(torch.zeros(4, S), torch.zeros(4, A), zeros, torch.zeros(4, S), zeros + 1)
    agent.policy.mu[-1].weight.data.zero_()
    agent.policy.mu[-1].bias.data.zero_()
    for _ in range(20):
        agent.update(batch)
    assert agent.policy.log_std.tolist() == [-1.0] * A
    spread = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, A)
    for _ in range(20):
        agent.update(batch._replace(actions=spread))
    assert agent.policy.log_std.min() > -0.9


def test_data_are_normalised_as_the_policy_undoes_it():
    agent = CIQL(S, A, CONFIG)
    data = random_batch(torch.Generator().manual_seed(0), 20)
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


# ----------------------------------------------------------------------- the same step, done faster
def random_data(n=200):
    data = random_batch(torch.Generator().manual_seed(0), n)
    return data._replace(rewards=data.actions.sum(1))


def small(**settings):
    usual = {"hidden_sizes": (16, 16), "batch_size": 32, "lr": 1e-2, "threads": 2}
    return Config(device="cpu", **(usual | settings))


def started(config, make_agent=CIQL):
    torch.manual_seed(0)
    agent = make_agent(S, A, config)
    data = agent.prepare(random_data())
    if config.alpha > 0 and agent.meter:
        agent.meter.start_helper(data)
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


@pytest.mark.parametrize("alpha", [1.0, 20.0])
def test_leaving_out_a_closed_clamp_is_exact(alpha):
    """The helper's gaps, those measured in line, and always taking them: the same bits."""
    helped = started(small(alpha=alpha))
    history = run_steps(helped, 30)
    assert 0 < np.mean([row["clamp_open"] for row in history]) < 1
    in_line = started(small(alpha=alpha))
    in_line.meter.helper = None
    always = started(small(alpha=alpha))
    always.meter = None
    always.on_cpu = False
    for other in (in_line, always):
        assert run_steps(other, 30) == history
        for name, tensor in helped.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_step_on_cuda_reads_nothing_on_the_host(monkeypatch):
    """Its path, here on the CPU: a read of a tensor would wait for the device."""
    agent = started(small(policy_lr_decay=True))
    agent.on_cpu = False
    agent.meter = None
    data = random_data()
    agent.update(data)

    def read(*args):
        pytest.fail("a tensor was read on the host")

    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, read)
        figures = agent.update(data)
    assert figures["clamp_open"].item() in (0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda(compiled):
    """The same figures as on the CPU, from the same weights and batches."""
    config = small(batch_size=200, alpha=5.0)
    agent = started(Config(**vars(config) | {"device": "cuda"}))
    data = agent.prepare(random_data())
    if compiled:
        agent.compile_losses(data)
    for _ in range(20):
        figures = {name: figure.item() for name, figure in agent.update(data).items()}
    assert all(np.isfinite(list(figures.values())))
    of_cpu = run_steps(started(config), 20)[-1]
    assert figures["q_loss"] == pytest.approx(of_cpu["q_loss"], rel=0.5)


class Counting(CIQL):
    """Its losses move an attribute."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = torch.zeros(())

    def losses(self, batch):
        self.seen = self.seen + 1
        return super().losses(batch)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_compiled_step(capsys, alpha):
    """It agrees with the eager one, and gives the same bits each time; it leaves no trace."""
    config = small(lr=1e-3, alpha=alpha)
    expected = run_steps(started(config), 100)
    found = []
    for _ in range(2):
        agent = started(config, Counting)
        before = (copy.deepcopy(agent.state_dict()), torch.get_rng_state())
        agent.compile_losses(random_data())
        assert all(torch.equal(t, before[0][name]) for name, t in agent.state_dict().items())
        assert torch.equal(torch.get_rng_state(), before[1])
        with torch.compiler.set_stance("fail_on_recompile"):  # a recompile would be an eager step
            found.append(run_steps(agent, 100))
        assert agent.seen == 100 and capsys.readouterr().out == ""
    assert found[0] == found[1]
    for name in expected[0]:
        one = [row[name] for row in found[0]]
        other = [row[name] for row in expected]
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3, err_msg=name)


class Annealed(CIQL):
    """Its losses change with the step: a graph of one step would leave the others eager."""

    def losses(self, batch):
        loss, figures = super().losses(batch)
        return loss * (1 + self.steps), figures


def no_compiler(*arguments, **options):
    def broken(*batch):
        raise RuntimeError("no compiler found\nand a page more")

    return broken


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [torch.compile, no_compiler])
def test_what_cannot_be_compiled_runs_eagerly(monkeypatch, capsys, compiler):
    """With a NOTE of one line, and to the bits of a run that was not to be compiled."""
    monkeypatch.setattr(torch, "compile", compiler)
    agent = started(small(alpha=0.0), Annealed)
    agent.compile_losses(random_data())
    out = capsys.readouterr().out
    assert out.startswith("NOTE   the losses could not be compiled") and out.count("\n") == 1
    assert run_steps(agent, 3) == run_steps(started(small(alpha=0.0), Annealed), 3)
    assert agent.steps == 3 and "losses" not in vars(agent)


# --------------------------------------------------------------------------------------- optimisers
def test_parameters_that_nothing_would_train_or_save():
    """Each is refused until it was given to ``make_optimizer``, and is the agent's own."""
    agent = started(small())
    agent.value = ValueNetwork(S, (12,))
    with refused("value.v.0.weight requires gradients, but no"):
        agent.check_optimizers()
    agent.make_optimizer(agent.policy, agent.value, agent.critic)
    agent.check_optimizers()
    agent.policy.fixed = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    agent.check_optimizers()

    agent.others = [ValueNetwork(S, (8,))]  # a plain list, which nothing would save
    agent.make_optimizer(agent.policy, agent.value, agent.critic, *agent.others)
    with refused("parameters that are not the agent's", "nn.ModuleList"):
        agent.check_optimizers()
    agent.others = torch.nn.ModuleList(agent.others)
    agent.check_optimizers()
    run_steps(agent, 1)  # that no loss uses them is no error


def test_settings_of_a_resumed_optimiser_are_the_configs():
    """Its averages are the saved ones, its rate and such are those of now."""
    saved = started(small(lr=1e-2))
    run_steps(saved, 5)
    agent = started(small(lr=5e-4))
    for group in agent.optimizer.param_groups:
        group["weight_decay"] = 0.1
    agent.load_training_state(copy.deepcopy(saved.training_state()))
    for group in agent.optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["fused"]) == (5e-4, 0.1, True)
        assert all(agent.optimizer.state[p]["step"] == 5 for p in group["params"])
