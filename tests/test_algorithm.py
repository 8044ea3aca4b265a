"""The losses and the update, against a float64 reference in numpy that shares no code with the script."""

import copy

import numpy as np
import pytest
import torch
import torch._inductor.config

import ciql_pybullet
from ciql_pybullet import (
    CIQL,
    METRICS,
    Config,
    GaussianPolicy,
    Transitions,
    awr_weights,
    conservative_penalty,
    expectile_loss,
)

S, A, B, K = 5, 3, 6, 4  # observation_dim, action_dim, batch, off-data actions
CONFIG = Config(device="cpu", hidden_sizes=(8, 7), batch_size=B, num_neg=K, tau=0.7, beta=2.0, alpha=1.5, gamma=0.9)


# ----------------------------------------------------------------------------------------- the reference


def net(parameters, prefix, x):
    """The MLP whose parameters start with ``prefix``, on rows x, in float64."""
    layers = sorted({int(name.split(".")[-2]) for name in parameters if name.startswith(prefix + ".")})
    for layer in layers:
        x = x @ parameters[f"{prefix}.{layer}.weight"].T + parameters[f"{prefix}.{layer}.bias"]
        x = np.maximum(x, 0) if layer != layers[-1] else x
    return x


def value(p, s):
    return net(p, "value.v", s)[:, 0]


def q(p, critic, k, s, a):
    return net(p, f"{critic}.q{k}", np.concatenate([s, a], 1))[:, 0]


def reference_losses(p, frozen, batch, negatives, c):
    """V, Q and policy loss and penalty at ``p``; what must carry no gradient is computed from ``frozen``."""
    s, a, r, s_next, terminated = batch
    q_bar = np.minimum(q(frozen, "target_critic", 1, s, a), q(frozen, "target_critic", 2, s, a))
    diff = q_bar - value(p, s)
    value_loss = np.mean([abs(c.tau - (d < 0)) * d * d for d in diff])
    y = np.array([r[i] if terminated[i] else r[i] + c.gamma * value(frozen, s_next)[i] for i in range(len(r))])
    td = penalty = 0.0
    for k in (1, 2):
        data = q(p, "critic", k, s, a)
        off_data = [q(p, "critic", k, s, negatives[:, n]) for n in range(negatives.shape[1])]
        td += np.mean((data - y) ** 2)
        penalty += max(0.0, np.mean(off_data) - np.mean(data))
    advantage = np.maximum(0, q_bar - value(frozen, s))
    weights = np.minimum(np.exp(c.beta * advantage), c.max_weight)
    mean, log_std = np.tanh(net(p, "policy.mu", s)), p["policy.log_std"]
    density = np.exp(-((a - mean) ** 2) / (2 * np.exp(2 * log_std))) / np.sqrt(2 * np.pi * np.exp(2 * log_std))
    policy_loss = -np.mean(weights * np.log(density).sum(1))
    return value_loss, td + c.alpha * penalty, policy_loss, penalty


def parameters_of(agent):
    nets = ("policy", "value", "critic", "target_critic")
    return {
        f"{n}.{k}": v.double().numpy().copy()
        for n in nets
        for k, v in getattr(agent, n).named_parameters()
        for v in [v.detach()]
    }


@pytest.fixture(params=["closed", "open"])
def case(request):
    """(agent, batch, off-data actions, is the clamp open?)."""
    clamp = request.param
    torch.manual_seed(3)
    agent = CIQL(S, A, CONFIG)
    for network in (agent.critic, agent.target_critic):  # apart from each other, with values far from zero
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    for parameter in agent.value.parameters():
        parameter.data -= 0.2
    agent.policy.log_std.data.uniform_(-1, 0.5)
    batch = Transitions(
        torch.randn(B, S),
        torch.rand(B, A) * 2 - 1,
        torch.randn(B),
        torch.randn(B, S),
        torch.tensor([0.0, 1, 0, 0, 1, 0]),
    )
    negatives = torch.rand(B, K, A) * 2 - 1
    for q_net in (agent.critic.q1, agent.critic.q2):
        inputs = torch.cat([batch.observations, batch.actions], 1)
        off = torch.cat([batch.observations[:, None].expand(-1, K, -1), negatives], -1)
        gap = q_net(off).mean() - q_net(inputs).mean()
        if (gap > 0) != (clamp == "open"):
            q_net[-1].weight.data *= -1
    return agent, batch, negatives, clamp == "open"


def in_float64(batch):
    return tuple(column.double().numpy() for column in batch)


def test_losses_match_reference(case):
    agent, batch, negatives, is_open = case
    _, metrics = agent.gradients(batch, negatives, open_clamp=True)
    p = parameters_of(agent)
    expected = reference_losses(p, p, in_float64(batch), negatives.double().numpy(), CONFIG)
    assert (expected[3] > 0) == is_open
    found = [metrics[name].item() for name in ("value_loss", "q_loss", "policy_loss", "penalty")]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert tuple(metrics) == METRICS


def test_gradients_match_finite_differences(case):
    agent, batch, negatives, is_open = case
    frozen = parameters_of(agent)
    gradients, _ = agent.gradients(batch, negatives, open_clamp=is_open)  # closed: the penalty is left out
    names = [f"{n}.{k}" for n in ("policy", "value", "critic") for k, _ in getattr(agent, n).named_parameters()]
    data, negatives = in_float64(batch), negatives.double().numpy()
    largest = 0.0
    for name, gradient in zip(names, gradients, strict=True):
        for index in np.ndindex(*gradient.shape):
            up, down = (copy.deepcopy(frozen) for _ in range(2))
            up[name][index] += 1e-6
            down[name][index] -= 1e-6
            high, low = (sum(reference_losses(p, frozen, data, negatives, CONFIG)[:3]) for p in (up, down))
            expected = (high - low) / 2e-6
            assert gradient[index].item() == pytest.approx(expected, rel=2e-3, abs=2e-5), (name, index)
            largest = max(largest, abs(expected))
    assert largest > 0.1  # the comparison was not of zeros


def test_update_is_adam_and_polyak(case):
    agent, batch, _, _ = case
    names = [f"{n}.{k}" for n in ("policy", "value", "critic") for k, _ in getattr(agent, n).named_parameters()]
    p = parameters_of(agent)
    m, v = ({name: np.zeros_like(p[name]) for name in names} for _ in range(2))
    for t in range(1, 7):
        batch = batch._replace(rewards=batch.rewards * -1.5)  # gradients that change, for Adam's averages
        torch.manual_seed(t)
        negatives = torch.rand(B, K, A) * 2 - 1
        gradients, _ = copy.deepcopy(agent).gradients(batch, negatives, open_clamp=True)
        for name, gradient in zip(names, gradients, strict=True):
            g = gradient.double().numpy()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            p[name] -= CONFIG.lr * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
        for name in [name for name in p if name.startswith("target_critic")]:
            p[name] += CONFIG.polyak * (p[name.removeprefix("target_")] - p[name])
        torch.manual_seed(t)
        agent.update(batch)
        for name, found in parameters_of(agent).items():
            np.testing.assert_allclose(found, p[name], rtol=1e-4, atol=2e-6, err_msg=name)


# ------------------------------------------------------------------------------------- each loss by hand


def test_expectile_loss_by_hand():
    diff = torch.tensor([2.0, -1.0, 0.0, -3.0], dtype=torch.float64)
    assert expectile_loss(diff, 0.8).item() == pytest.approx((0.8 * 4 + 0.2 * 1 + 0 + 0.2 * 9) / 4)


def test_expectile_loss_finds_the_expectile():
    """Its minimum over v solves τ E(x−v)⁺ = (1−τ) E(v−x)⁺, the expectile's definition."""
    x = np.random.default_rng(0).normal(size=400)
    grid = np.linspace(-1, 2, 3001)
    best = grid[np.argmin([expectile_loss(torch.from_numpy(x - v), 0.9).item() for v in grid])]
    assert 0.9 * np.maximum(x - best, 0).mean() == pytest.approx(0.1 * np.maximum(best - x, 0).mean(), rel=0.01)


def test_conservative_penalty_by_hand():
    q_data = torch.tensor([1.0, 3.0])
    assert conservative_penalty(torch.tensor([[4.0, 2.0], [3.0, 7.0]]), q_data).item() == 2.0
    assert conservative_penalty(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), q_data).item() == 0.0


def test_awr_weights_by_hand():
    weights = awr_weights(torch.tensor([-5.0, 0.0, 0.5, 1e6]), 2.0, 50.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0, np.e, 50.0])


def test_log_std_stays_above_its_floor_and_can_grow_again():
    agent = CIQL(S, A, Config(device="cpu", hidden_sizes=(8,), min_log_std=-1.0, lr=0.5, num_neg=1))
    batch = Transitions(torch.zeros(4, S), torch.zeros(4, A), torch.zeros(4), torch.zeros(4, S), torch.ones(4))
    agent.policy.mu[-1].weight.data.zero_()
    agent.policy.mu[-1].bias.data.zero_()
    for _ in range(20):
        agent.update(batch)
    assert agent.policy.log_std.tolist() == [-1.0] * A
    for _ in range(20):
        agent.update(batch._replace(actions=torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, A)))
    assert agent.policy.log_std.min() > -0.9


# ----------------------------------------------------------------------------------- settings, branches


def random_data(n=200):
    generator = torch.Generator().manual_seed(0)
    s, s_next = (torch.randn(n, S, generator=generator) for _ in range(2))
    a = torch.rand(n, A, generator=generator) * 2 - 1
    return Transitions(s, a, a.sum(1), s_next, (torch.rand(n, generator=generator) < 0.1).float())


def trained(config, steps=30, prepare=lambda agent: agent.step):
    torch.manual_seed(0)
    agent = CIQL(S, A, config)
    step = prepare(agent)
    history = [{k: v.item() for k, v in step(random_data()).items()} for _ in range(steps)]
    return agent, history


def small(**settings):
    return Config(device="cpu", **{"hidden_sizes": (16, 16), "batch_size": 32, "lr": 1e-2} | settings)


def test_alpha_zero_is_iql():
    """No penalty at all: the critics' loss is the TD error."""
    _, history = trained(small(alpha=0.0))
    assert all(row["penalty"] == 0 for row in history)
    _, with_penalty = trained(small(alpha=5.0))
    assert any(row["penalty"] > 0 for row in with_penalty)
    assert history[-1]["q_loss"] != with_penalty[-1]["q_loss"]


def test_beta_zero_is_behaviour_cloning():
    """The policy's loss is the plain negative log-likelihood, so the critics do not matter to it."""
    agents = [
        trained(small(beta=0.0, alpha=0.0, num_neg=4, tau=tau, gamma=gamma))[0]
        for tau, gamma in ((0.5, 0.0), (0.9, 0.99))
    ]
    for one, other in zip(*(agent.policy.parameters() for agent in agents), strict=True):
        assert torch.equal(one, other)
    batch = random_data()
    _, metrics = agents[0].gradients(batch, torch.zeros(len(batch.rewards), 0, A), False)
    assert metrics["policy_loss"].item() == pytest.approx(-agents[0].policy.log_prob(*batch[:2]).mean().item())


def test_same_seed_same_bits():
    first, second = (trained(small())[1] for _ in range(2))
    assert first == second
    torch.manual_seed(1)
    assert CIQL(S, A, small()).step(random_data())["q_loss"].item() != first[0]["q_loss"]


def test_skipping_a_closed_clamp_is_exact():
    """The branch that skips the penalty's backward pass gives the weights of the plain ReLU."""

    def plain(agent):
        agent.on_cpu = False
        return agent.step

    for alpha in (1.0, 20.0):
        branched, history = trained(small(alpha=alpha))
        plain_relu, _ = trained(small(alpha=alpha), prepare=plain)
        assert 0 < np.mean([row["clamp_open"] for row in history]) < 1  # both sides were taken
        for one, other in zip(branched.parameters, plain_relu.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_cuda_step_is_one_graph(monkeypatch, capsys, backend):
    """What CUDA runs, the plain ReLU and a traced Adam, has no branch on a tensor and no read of one."""
    graphs = []

    def compile_here(function, fullgraph):
        assert fullgraph
        graphs.append(function.__name__)
        return compiled(function, fullgraph=True, backend=backend)

    def traced(agent):
        agent.on_cpu = False
        return agent.compiled_step(random_data())

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", compile_here)
    agent, _ = trained(small(), 5, traced)
    assert graphs == ["gradients", "step"] and "eagerly" not in capsys.readouterr().out
    expected, _ = trained(small(), 5)
    for one, other in zip(agent.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_compiled_step_agrees_with_eager(monkeypatch, capsys, library):
    """100 steps from the same state, with the clamp open now and then, and no trace left by compiling."""
    from torch._inductor import lowering, mkldnn_ir

    by_onednn, create = [], mkldnn_ir._create_output_node
    monkeypatch.setattr(mkldnn_ir, "_create_output_node", lambda node: by_onednn.append(node) or create(node))
    for operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):  # put back after the test
        monkeypatch.setitem(lowering.lowerings, operator, lowering.lowerings[operator])
    monkeypatch.setattr(ciql_pybullet, "ON_AMD", library == "oneDNN")
    ciql_pybullet.compile_onednn.cache_clear()  # before and after, as the rules are put back
    data = random_data()
    eager, expected = trained(small(lr=1e-3), 100)
    with torch._inductor.config.patch(force_disable_caches=True, pattern_matcher=True):
        compiled, found = trained(small(lr=1e-3), 100, lambda agent: agent.compiled_step(data))
    ciql_pybullet.compile_onednn.cache_clear()
    assert bool(by_onednn) == (library == "oneDNN")
    assert "eagerly" not in capsys.readouterr().out  # it was compiled
    assert 0 < np.mean([row["clamp_open"] for row in expected]) < 1
    for name in METRICS:
        np.testing.assert_allclose(
            [r[name] for r in found], [r[name] for r in expected], rtol=1e-3, atol=1e-4, err_msg=name
        )
    for one, other in zip(compiled.parameters, eager.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_step_that_cannot_be_compiled_runs_eagerly(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler found\nand a page more")

    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: broken)
    _, found = trained(small(), 3, lambda agent: agent.compiled_step(random_data()))
    assert found == trained(small(), 3)[1]
    assert "runs eagerly, slower: no compiler found\n" in capsys.readouterr().out


def test_data_are_normalised_as_the_policy_undoes_it():
    data, agent = random_data(), CIQL(S, A, small())
    s = data.observations.double().numpy() * [1, 2, 3, 4, 5] + 7
    raw = data._replace(observations=torch.tensor(s).float(), next_observations=torch.tensor(s[::-1].copy()).float())
    prepared = agent.prepare(raw)
    expected = (s - s.mean(0)) / (s.std(0, ddof=1) + 1e-3)
    np.testing.assert_allclose(prepared.observations, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(prepared.next_observations, expected[::-1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(
            agent.policy.act(s[0]), agent.policy(prepared.observations[:1])[0], rtol=1e-3, atol=1e-5
        )


def test_policy_acts_with_the_mean_it_was_trained_on():
    policy = GaussianPolicy(S, A, (8,))
    policy.observation_mean += 2
    policy.observation_std *= 3
    observation = np.arange(S, dtype=np.float32)
    action = policy.act(observation)
    z = torch.from_numpy((observation - 2) / 3)
    at_mean = policy.log_prob(z[None], torch.from_numpy(action)[None])
    assert at_mean.item() == pytest.approx(-0.5 * A * np.log(2 * np.pi))
    assert (at_mean > policy.log_prob(z[None], torch.from_numpy(action)[None] + 0.1)).all()
