"""Losses and update against float64 references in numpy that share no code with the script."""

import copy
import math

import numpy as np
import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch._inductor import lowering

import ciql_pybullet
from ciql_pybullet import (
    CIQL,
    Config,
    GaussianPolicy,
    Transitions,
    ValueNetwork,
    awr_weights,
    conservative_gap,
    conservative_penalty,
    expectile_loss,
    thread_pool,
    torch_settings,
)

S = 5  # observation_dim
A = 3  # action_dim
B = 8  # batch
K = 4  # off-data actions
CONFIG = Config(
    device="cpu",
    hidden_sizes=(8, 7),
    batch_size=B,
    num_neg=K,
    tau=0.7,
    beta=2.0,
    alpha=1.5,
    gamma=0.9,
    polyak=0.05,
    lr=1e-3,
)
TRAINED = ("policy", "value", "critic")  # in the order of the agent's parameters


@pytest.fixture(autouse=True)
def one_thread():
    """As ``train`` does: small products gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    return net(p, f"{critic}.q{k}", np.concatenate([s, a], 1))[:, 0]


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
    gaps = [gap(p, k, batch, negatives) for k in (1, 2)]
    penalty = sum(max(0.0, one) for one in gaps)
    advantage = q_bar - value(frozen, s)
    positive = np.maximum(0, advantage)
    weights = np.minimum(np.exp(c.beta * positive), c.max_weight)
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
def parameters_of(agent):
    """All weights of the agent by name, in float64."""
    p = {}
    for network in (*TRAINED, "target_critic"):
        for name, parameter in getattr(agent, network).named_parameters():
            p[f"{network}.{name}"] = parameter.detach().double().numpy().copy()
    return p


def trained_names(agent):
    return [name for name in parameters_of(agent) if not name.startswith("target_")]


def twin_of(agent):
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(agent)
    twin = CIQL(S, A, agent.config)
    twin.load_state_dict(copy.deepcopy(agent.state_dict()))
    return twin


def by_name(agent, vector):
    """The agent's flat gradient, by the names of the parameters."""
    names = {}
    for network in TRAINED:
        for name, parameter in getattr(agent, network).named_parameters():
            names[parameter] = f"{network}.{name}"
    pieces = vector.double().split([parameter.numel() for parameter in agent.parameters])
    pairs = zip(agent.parameters, pieces, strict=True)
    found = {names[parameter]: piece.view_as(parameter).numpy() for parameter, piece in pairs}
    return {name: found[name] for name in trained_names(agent)}


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


def part_gaps(p, batch, negatives, parts):
    """The gaps (parts, 2) of a batch's parts, each alone."""
    gaps = []
    for rows in np.split(np.arange(B), parts):
        part = tuple(column[rows] for column in in_float64(batch))
        gaps.append([gap(p, k, part, negatives[rows].double().numpy()) for k in (1, 2)])
    return np.array(gaps)


CLAMPS = {  # is the clamp of (critic 1, critic 2) open?
    "closed": (False, False),
    "open on both": (True, True),
    "open on one": (False, True),
    "closed, but not on its parts": (False, False),
}


@pytest.fixture(scope="module", params=CLAMPS)
def case(request):
    """An agent with weights far from zero, a batch, off-data actions, and the reference of them."""
    wanted = CLAMPS[request.param]
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    agent = CIQL(S, A, CONFIG)
    for network in (agent.critic, agent.target_critic):  # apart from each other
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    for parameter in agent.value.parameters():
        parameter.data -= 0.2
    agent.policy.log_std.data.uniform_(-1, 0.5)
    for _ in range(100):
        batch = random_batch(generator)
        negatives = torch.rand(B, K, A, generator=generator) * 2 - 1
        whole = part_gaps(parameters_of(agent), batch, negatives, 1)[0]
        for k, network in enumerate((agent.critic.q1, agent.critic.q2)):
            if (whole[k] > 0) != wanted[k]:
                network[-1].weight.data *= -1
        p = parameters_of(agent)
        whole = part_gaps(p, batch, negatives, 1)[0]
        alone = np.concatenate([part_gaps(p, batch, negatives, parts) for parts in (2, 4)])
        on_parts = (alone > 0.01).any(0).all() or request.param != "closed, but not on its parts"
        if np.abs(whole).min() > 0.01 and on_parts:
            break
    assert tuple(whole > 0) == wanted and on_parts
    arguments = (in_float64(batch), negatives.double().numpy(), CONFIG)
    gradient = finite_differences(lambda at: total_loss(at, p, *arguments), p, trained_names(agent))
    assert max(np.abs(column).max() for column in gradient.values()) > 0.1
    return agent, batch, negatives, reference(p, p, *arguments), gradient


# -------------------------------------------------------------------------- losses, gradients, step
def test_losses_and_gradients(case):
    agent, batch, negatives, expected, expected_gradient = case
    gradient, found = agent.gradients(batch, negatives, with_penalty=True)
    assert_close({name: figure.item() for name, figure in found.items()}, expected, 1e-4, 1e-6)
    assert_close(by_name(agent, gradient), expected_gradient, 2e-3, 2e-5)


def test_gradients_without_penalty(case):
    """They are those of a closed clamp, and the gaps that decide whether it is are there."""
    agent, batch, negatives, expected, expected_gradient = case
    gradient, found = agent.gradients(batch, negatives, with_penalty=False)
    assert found["penalty"] == 0
    for name in ("gap1", "gap2"):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)
    if expected["penalty"] == 0:
        assert_close(by_name(agent, gradient), expected_gradient, 2e-3, 2e-5)
    else:
        changed = by_name(agent, gradient)["critic.q2.4.weight"]
        assert np.abs(changed - expected_gradient["critic.q2.4.weight"]).max() > 1e-2


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_step_takes_the_mean_of_the_parts(case, monkeypatch, parts):
    """Gradients and figures of a step, whatever its parts, are those of the whole batch."""
    agent, batch, negatives, expected, expected_gradient = case
    agent = twin_of(agent)
    agent.parts = parts
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.arange(B))
    monkeypatch.setattr(torch, "rand", lambda *args, **options: (negatives + 1) / 2)
    worked = []
    agent.map = lambda work, *parts: [
        worked.append(len(rows)) or work(rows, a) for rows, a in zip(*parts, strict=True)
    ]
    found = {name: figure.item() for name, figure in agent.update(batch).items()}
    is_open = expected["penalty"] > 0
    assert worked == [B // parts] * parts * (2 if is_open else 1)
    assert_close(found, expected | {"clamp_open": is_open}, 1e-4, 1e-6)
    gradient = torch.cat([vector.grad for vector in agent.vectors])
    assert_close(by_name(agent, gradient), expected_gradient, 2e-3, 2e-5)


def test_number_of_parts():
    for batch_size, batch_parts, expected in ((256, 4, 4), (6, 4, 2), (7, 4, 1), (4, 8, 4)):
        config = Config(device="cpu", batch_size=batch_size, batch_parts=batch_parts)
        assert CIQL(S, A, config).parts == expected


def test_update_is_adam_and_polyak(case):
    agent, batch, *_ = case
    agent = twin_of(agent)
    p = parameters_of(agent)
    adam = Adam(p, trained_names(agent))
    for _ in range(6):  # gradients that change, for Adam's averages
        batch = batch._replace(rewards=batch.rewards * -1.5)
        agent.update(batch)
        gradient = torch.cat([vector.grad for vector in agent.vectors])
        adam.step(p, by_name(agent, gradient), lambda name: CONFIG.lr)
        move_target(p, CONFIG.polyak)
        assert_close(parameters_of(agent), p, 1e-4, 2e-6)


def iql_losses(p, frozen, batch, c):
    """Kostrikov et al., 2021, equations 5 to 7: no penalty, and no max(0, ·) on the advantage."""
    s, a, r, s_next, terminated = batch
    q_bar = np.minimum(q(frozen, "target_critic", 1, s, a), q(frozen, "target_critic", 2, s, a))
    u = q_bar - value(p, s)
    value_loss = np.mean(np.where(u > 0, c.tau, 1 - c.tau) * u**2)
    y = r + c.gamma * (1 - terminated) * value(frozen, s_next)
    q_loss = sum(np.mean((q(p, "critic", k, s, a) - y) ** 2) for k in (1, 2))
    weights = np.minimum(np.exp(c.beta * (q_bar - value(frozen, s))), 100.0)
    return value_loss + q_loss - np.mean(weights * log_density(p, s, a))


def test_recipe_for_iql():
    """Several steps against IQL's own losses, with the policy's learning rate on its cosine."""
    config = Config(
        device="cpu",
        alpha=0,
        beta=3,
        tau=0.7,
        clamp_advantage=False,
        policy_lr_decay=True,
        hidden_sizes=(4,),
        batch_size=B,
        lr=1e-3,
        max_steps=8,
    )
    torch.manual_seed(1)
    agent = CIQL(S, A, config)
    for parameter in agent.target_critic.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    data = random_batch(torch.Generator().manual_seed(1), 20)
    p = parameters_of(agent)
    names = trained_names(agent)
    adam = Adam(p, names)
    for t in range(6):
        torch.manual_seed(t)
        index = torch.randint(20, (B,))
        batch = tuple(column[index.numpy()] for column in in_float64(data))
        frozen = {name: column.copy() for name, column in p.items()}
        advantage = np.minimum(
            q(p, "target_critic", 1, *batch[:2]), q(p, "target_critic", 2, *batch[:2])
        ) - value(p, batch[0])
        assert (advantage < -0.01).any() and (advantage > 0.01).any()
        gradient = finite_differences(
            lambda at, frozen=frozen, batch=batch: iql_losses(at, frozen, batch, config),
            p,
            names,
            1e-5,
        )
        policy_lr = 1e-3 * (1 + np.cos(np.pi * t / 8)) / 2
        adam.step(p, gradient, lambda name, lr=policy_lr: lr if "policy" in name else 1e-3)
        move_target(p, config.polyak)
        torch.manual_seed(t)
        agent.update(data)
        assert_close(parameters_of(agent), p, 1e-4, 1e-5)


# -------------------------------------------------------------------------------- each loss by hand
def test_expectile_loss_by_hand():
    diff = torch.tensor([2.0, -1.0, 0.0, -3.0], dtype=torch.float64)
    expected = (0.8 * 4 + 0.2 * 1 + 0 + 0.2 * 9) / 4
    assert expectile_loss(diff, 0.8).item() == pytest.approx(expected)


def test_expectile_loss_finds_the_expectile():
    """Its minimum over v solves τ E(x−v)⁺ = (1−τ) E(v−x)⁺, the expectile's definition."""
    x = np.random.default_rng(0).normal(size=400)
    grid = np.linspace(-1, 2, 3001)
    best = grid[np.argmin([expectile_loss(torch.from_numpy(x - v), 0.9).item() for v in grid])]
    above = np.maximum(x - best, 0).mean()
    below = np.maximum(best - x, 0).mean()
    assert 0.9 * above == pytest.approx(0.1 * below, rel=0.01)


def test_conservative_penalty_by_hand():
    q_data = torch.tensor([1.0, 3.0])
    q_neg = torch.tensor([4.0, 2.0, 3.0, 7.0])
    gap = conservative_gap(q_neg, q_data)
    assert gap.item() == 2.0
    assert conservative_penalty(gap).item() == 2.0
    assert conservative_penalty(gap - 3).item() == 0.0
    for clamp_open, expected in ((1.0, -1.0), (0.0, 0.0)):  # of the whole batch, for a part
        assert conservative_penalty(gap - 3, torch.tensor(clamp_open)).item() == expected


def test_awr_weights_by_hand():
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


# ------------------------------------------------------------------------------- settings, branches
def random_data(n=200):
    data = random_batch(torch.Generator().manual_seed(0), n)
    return data._replace(rewards=data.actions.sum(1))


def small(**settings):
    usual = {"hidden_sizes": (16, 16), "batch_size": 32, "batch_parts": 4, "lr": 1e-2}
    return Config(device="cpu", **(usual | settings))


def trained(config, steps=30, change=lambda agent: None, make_agent=CIQL):
    """An agent after these steps, and what they reported."""
    torch.manual_seed(0)
    agent = make_agent(S, A, config)
    change(agent)
    return agent, run_steps(agent, steps)


def run_steps(agent, steps, seed=0):
    torch.manual_seed(seed)
    data = random_data()
    history = []
    for _ in range(steps):
        figures = agent.update(data)
        history.append({name: figure.item() for name, figure in figures.items()})
    return history


def weights_of(agent):
    return torch.cat([vector.detach() for vector in agent.vectors])


def assert_sometimes_open(history):
    assert 0 < np.mean([row["clamp_open"] for row in history]) < 1


def test_alpha_zero_has_no_penalty():
    """The critics' loss is the TD error, and nothing is played off the data."""
    _, history = trained(small(alpha=0.0))
    assert all(row["penalty"] == row["gap1"] == row["clamp_open"] == 0 for row in history)
    _, with_penalty = trained(small(alpha=5.0))
    assert any(row["penalty"] > 0 for row in with_penalty)
    assert history[-1]["q_loss"] != with_penalty[-1]["q_loss"]


def test_beta_zero_is_behaviour_cloning():
    """The policy's loss is the plain negative log-likelihood: the critics do not matter to it."""
    agents = []
    for tau, gamma in ((0.5, 0.0), (0.9, 0.99)):
        agents.append(trained(small(beta=0.0, alpha=0.0, tau=tau, gamma=gamma))[0])
    for one, other in zip(*(agent.policy.parameters() for agent in agents), strict=True):
        assert torch.equal(one, other)
    batch = random_data()
    _, found = agents[0].gradients(batch, torch.zeros(200, 0, A), False)
    likelihood = agents[0].policy.log_prob(*batch[:2]).mean().item()
    assert found["policy_loss"].item() == pytest.approx(-likelihood)


def test_same_seed_same_bits():
    first = trained(small())[1]
    assert trained(small())[1] == first
    torch.manual_seed(1)
    assert CIQL(S, A, small()).update(random_data())["q_loss"].item() != first[0]["q_loss"]


def test_saved_agent_goes_on_to_the_same_bits():
    """With Adam's averages, and the policy's learning rate on its way down."""
    config = small(policy_lr_decay=True, max_steps=40)
    whole, _ = trained(config, 20)
    state = copy.deepcopy(whole.state_dict())
    run_steps(whole, 10, seed=1)
    torch.manual_seed(5)
    other = CIQL(S, A, config)
    other.load_state_dict(state)
    run_steps(other, 10, seed=1)
    assert torch.equal(weights_of(whole), weights_of(other))


def test_skipping_a_closed_clamp_is_exact():
    """Leaving out the penalty's backward pass gives the bits of always taking it."""

    def always(agent):
        agent.on_cpu = False

    for alpha in (1.0, 20.0):
        config = small(alpha=alpha, batch_parts=1)
        skipping, history = trained(config)
        assert_sometimes_open(history)
        assert torch.equal(weights_of(skipping), weights_of(trained(config, change=always)[0]))


def test_step_on_cuda_reads_nothing_on_the_host(monkeypatch):
    """Its path, here on the CPU: a read of a tensor would wait for the device."""
    torch.manual_seed(0)
    agent = CIQL(S, A, small(policy_lr_decay=True))
    agent.on_cpu = False
    agent.parts = 1
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


def test_step_on_cuda_is_one_graph(monkeypatch, capsys):
    """What is compiled for CUDA has no branch on a tensor; traced, it gives the same weights."""
    compile_with = torch.compile

    def compile_here(function, fullgraph, mode):
        assert fullgraph and mode == "reduce-overhead"
        return compile_with(function, fullgraph=True, backend="aot_eager")

    def traced(agent):
        agent.on_cpu = False
        agent.compile(random_data())

    monkeypatch.setattr(torch, "compile", compile_here)
    config = small(batch_parts=1)
    agent, _ = trained(config, 5, traced)
    assert capsys.readouterr().out == ""
    expected, _ = trained(config, 5)
    torch.testing.assert_close(weights_of(agent), weights_of(expected), rtol=1e-4, atol=1e-5)


def threaded(agent, threads, steps=300):
    """Weights after these steps, their parts worked by so many threads, and what they reported."""
    state = copy.deepcopy(agent.state_dict())
    with torch_settings(agent.config), thread_pool(threads) as pool:
        agent.map = pool.map
        history = run_steps(agent, steps)
    weights = weights_of(agent)
    agent.map = map
    agent.load_state_dict(state)
    return weights, history


def test_same_bits_with_any_number_of_threads():
    agent, _ = trained(small(lr=1e-3, hidden_sizes=(16,)), 0)
    assert agent.parts == 4
    expected, history = threaded(agent, 1)
    assert_sometimes_open(history)
    for threads in (2, 4):
        assert torch.equal(threaded(agent, threads)[0], expected)
    assert not torch.equal(expected, weights_of(agent))


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(("library", "alpha"), [("oneDNN", 1.0), ("MKL", 0.0)])
def test_compiled_step(monkeypatch, capfd, library, alpha):
    """It agrees with the eager one, uses that library, has its bits with any number of threads,
    and leaves no trace in the compiler."""
    monkeypatch.setattr(ciql_pybullet, "wants_onednn", lambda: library == "oneDNN")
    compiler_configs = (torch._dynamo.config, torch._inductor.config)
    operators = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    rules = [lowering.lowerings[operator] for operator in operators]
    configs = [config.get_config_copy() for config in compiler_configs]
    config = small(lr=1e-4, hidden_sizes=(64, 64), batch_size=256, alpha=alpha)  # oneDNN's: from 64
    agent, _ = trained(config, 0)
    eager, expected = threaded(agent, 1)
    if alpha > 0:
        assert_sometimes_open(expected)
    with (  # no graph of before, which may be of another version of the rule
        torch_settings(agent.config),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        agent.compile(random_data())
    assert "eagerly" not in capfd.readouterr().out
    assert [lowering.lowerings[operator] for operator in operators] == rules
    assert [config.get_config_copy() for config in compiler_configs] == configs

    with torch.compiler.set_stance("fail_on_recompile"):  # a recompile would be an eager step
        first, found = threaded(agent, 1)
        for threads in (2, 4):
            assert torch.equal(threaded(agent, threads)[0], first)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            threaded(agent, 1, 1)
        assert ("inner_product" in capfd.readouterr().out) == (library == "oneDNN")
    torch.testing.assert_close(first, eager, rtol=1e-3, atol=1e-3)
    for name in expected[0]:
        one = [row[name] for row in found]
        other = [row[name] for row in expected]
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("missing", ["compiler", "private switch"])
def test_step_that_cannot_be_compiled_runs_eagerly(monkeypatch, capsys, missing):
    if missing == "compiler":

        def broken(*args, **kwargs):
            raise RuntimeError("no compiler found\nand a page more")

        monkeypatch.setattr(torch, "compile", lambda step, **kwargs: broken)
        reason = "no compiler found"
    else:
        monkeypatch.delattr(lowering, "fallback_handler")
        monkeypatch.setattr(ciql_pybullet, "wants_onednn", lambda: True)
        reason = "fallback_handler"
    _, found = trained(small(), 3, lambda agent: agent.compile(random_data()))
    out = capsys.readouterr().out
    assert out.startswith("NOTE   the step could not be compiled and runs eagerly, slower:")
    assert reason in out and out.count("\n") == 1
    assert found == trained(small(), 3)[1]
    assert lowering.lowerings[torch.ops.aten.mm.default].__module__.startswith("torch.")


def test_figure_that_an_idea_adds():
    """A line in ``losses`` is all: the step reports it, as the mean over the batch."""

    class Idea(CIQL):
        def losses(self, batch, negative_actions, with_penalty, clamp_open=None):
            loss, figures = super().losses(batch, negative_actions, with_penalty, clamp_open)
            figures["reward"] = batch.rewards.mean()
            figures["largest_reward"] = batch.rewards.max()
            return loss, figures

    torch.manual_seed(0)
    agent = Idea(S, A, small())
    torch.manual_seed(1)
    rewards = random_data().rewards[torch.randint(200, (32,))]
    torch.manual_seed(1)
    figures = agent.update(random_data())
    assert figures["reward"].item() == pytest.approx(rewards.mean().item())
    of_parts = np.mean([part.max().item() for part in rewards.chunk(4)])
    assert figures["largest_reward"].item() == pytest.approx(of_parts)


def test_network_that_an_idea_replaces():
    class Idea(CIQL):
        def __init__(self, observation_dim, action_dim, config):
            super().__init__(observation_dim, action_dim, config)
            self.value = ValueNetwork(observation_dim, (12,))
            self.make_optimizer()

    agent, _ = trained(small(), 0, make_agent=Idea)
    before = [parameter.clone() for parameter in agent.value.parameters()]
    run_steps(agent, 3)
    after = list(agent.value.parameters())
    assert after[0].shape == (12, S)
    for old, new in zip(before, after, strict=True):
        assert not torch.equal(old, new)
    assert sum(parameter.numel() for parameter in after) == len(agent.value_vector)
    assert len(weights_of(agent)) == sum(parameter.numel() for parameter in agent.parameters)


def test_rates_of_an_optimiser_of_ones_own_are_resumed():
    class Idea(CIQL):
        def make_optimizer(self):
            super().make_optimizer()
            for group, lr in zip(self.optimizer.param_groups, (1e-3, 2e-3, 3e-3), strict=True):
                group["lr"] = lr

    whole, _ = trained(small(), 20, make_agent=Idea)
    saved, _ = trained(small(), 10, make_agent=Idea)
    state = copy.deepcopy(saved.state_dict())
    random_state = torch.get_rng_state()
    resumed, _ = trained(small(), 0, make_agent=Idea)
    resumed.load_state_dict(state)
    data = random_data()
    torch.set_rng_state(random_state)
    for _ in range(10):
        resumed.update(data)
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("name", ["policy", "value", "critic", "target_critic"])
def test_network_that_no_vector_holds_is_refused(name):
    agent, _ = trained(small(), 0)
    agent.prepare(random_data())
    setattr(agent, name, copy.deepcopy(getattr(agent, name)))
    with pytest.raises(TypeError, match="call make_optimizer again"):
        agent.prepare(random_data())


def test_data_are_normalised_as_the_policy_undoes_it():
    data = random_data(20)
    agent = CIQL(S, A, small())
    s = data.observations.double().numpy() * [0.01, 0.1, 1, 3, 5] + [0, 0, 7, -7, 7]
    raw = data._replace(
        observations=torch.tensor(s).float(), next_observations=torch.tensor(s[::-1].copy()).float()
    )
    prepared = agent.prepare(raw)
    deviation = np.sqrt(((s - s.mean(0)) ** 2).sum(0) / 19)
    expected = (s - s.mean(0)) / (deviation + 1e-3)
    np.testing.assert_allclose(prepared.observations, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(prepared.next_observations, expected[::-1], rtol=1e-3, atol=1e-4)
    for name in ("actions", "rewards", "terminations"):
        assert torch.equal(getattr(prepared, name), getattr(data, name))
    with torch.no_grad():
        mean_action = agent.policy(prepared.observations[:1])[0]
    np.testing.assert_allclose(agent.policy.act(s[0]), mean_action, rtol=1e-3, atol=1e-5)


def test_policy_acts_with_the_mean_it_was_trained_on():
    policy = GaussianPolicy(S, A, (8,))
    policy.observation_mean += 2
    policy.observation_std *= 3
    observation = np.arange(S, dtype=np.float32)
    action = policy.act(observation)
    z = torch.from_numpy((observation - 2) / 3)
    at_mean = policy.log_prob(z[None], torch.from_numpy(action)[None])
    assert at_mean.item() == pytest.approx(-0.5 * A * math.log(2 * math.pi))
    assert (at_mean > policy.log_prob(z[None], torch.from_numpy(action)[None] + 0.1)).all()
