"""Methods by name: an agent, and the settings that are not the script's defaults.

An idea that is no setting is a subclass of ``CIQL`` that overrides what it changes, and a line in
``METHODS`` below. Networks that it adds as attributes are saved and resumed with the others.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ciql_pybullet as ciql
from ciql_pybullet import Metrics, Transitions


class AveragedPolicy(ciql.CIQL):
    """Evaluations play a running mean of the policy's weights, over about 1,000 steps.

    It begins with the weights before training, so it needs some thousand steps.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: ciql.Config) -> None:
        super().__init__(observation_dim, action_dim, config)
        self.average = copy.deepcopy(self.policy).requires_grad_(False)

    def update(self, data: Transitions) -> Metrics:
        metrics = super().update(data)
        ciql.move_towards(self.average, self.policy, 0.001)
        return metrics

    def evaluated_policy(self) -> nn.Module:
        return self.average


class NearActions(ciql.CIQL):
    """The penalty's actions are near the policy's own, where a policy that climbs Q reads it."""

    @torch.no_grad()
    def off_data_actions(self, batch: Transitions) -> Tensor:
        noise = 0.2 * torch.randn_like(super().off_data_actions(batch))
        return (self.policy(batch.observations)[:, None] + noise).clamp(-1, 1)


class ActorCritic(ciql.CIQL):
    """Q bootstraps from the policy, y = r + γ Q̄(s', μ(s')), and its critic has LayerNorm.

    With a ``policy_share`` below 1 the rest of that Q̄ is V(s'). These are the targets of TD3+BC
    (Fujimoto and Gu, 2021, arXiv 2106.06860), and the critic of ReBRAC (Tarasov et al., 2023, arXiv
    2305.09836).
    """

    policy_share = 1.0

    def make_critic(self) -> nn.Module:
        critic: Any = super().make_critic()
        for number, q in enumerate(critic.q):
            layers: list[Any] = []
            for layer in q:
                if isinstance(layer, nn.ReLU):
                    layers.append(nn.LayerNorm(layers[-1].out_features))
                layers.append(layer)
            critic.q[number] = nn.Sequential(*layers)
        return critic

    @torch.no_grad()
    def targets(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        q_bar, _ = super().targets(batch)
        s_next = batch.next_observations
        q_next = self.target_critic(s_next, self.policy(s_next)).amin(0)
        v_next = torch.lerp(self.value(s_next), q_next, self.policy_share)
        return q_bar, batch.rewards + self.config.gamma * (1 - batch.terminations) * v_next


class ActorCriticHalf(ActorCritic):
    """Q bootstraps from the mean of V(s') and Q̄(s', μ(s'))."""

    policy_share = 0.5


class ActorCriticNear(NearActions, ActorCritic):
    """Q bootstraps from the policy, and the penalty holds it down near the policy's actions."""


class Method(NamedTuple):
    """What a name stands for."""

    agent: type[ciql.CIQL]
    settings: dict[str, Any]


IQL = {
    "alpha": 0.0,
    "beta": 3.0,
    "tau": 0.7,
    "clamp_advantage": False,
    "policy_lr_decay": True,
}
# IQL's values, and a policy that climbs them
DDPG_BC = {"alpha": 0.0, "tau": 0.7, "policy_lr_decay": True, "q_weight": 1.0}
ACTOR_CRITIC = DDPG_BC | {"q_weight": 0.5}
METHODS = {
    "CIQL": Method(ciql.CIQL, {}),
    "IQL": Method(ciql.CIQL, IQL),
    "cloning": Method(ciql.CIQL, {"alpha": 0.0, "beta": 0.0}),
    "DDPG+BC": Method(ciql.CIQL, DDPG_BC),
    "DDPG+BC+CQL": Method(ciql.CIQL, DDPG_BC | {"alpha": 1.0}),
    "DDPG+BC+near": Method(NearActions, DDPG_BC | {"alpha": 1.0}),
    "ActorCritic": Method(ActorCritic, ACTOR_CRITIC),
    "ActorCritic+half": Method(ActorCriticHalf, ACTOR_CRITIC),
    "ActorCritic+near": Method(ActorCriticNear, ACTOR_CRITIC | {"alpha": 1.0, "num_neg": 2}),
    "AveragedPolicy": Method(AveragedPolicy, {}),
}
