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
# Q bootstraps from the mean of V(s') and the Q of the policy's action
MIXED_TARGETS = DDPG_BC | {"q_weight": 0.5, "policy_share": 0.5, "layer_norm": True}
POLICY_TARGETS = MIXED_TARGETS | {"policy_share": 1.0}  # from that Q alone
NEAR = {"alpha": 1.0, "num_neg": 2}  # for NearActions and such targets
METHODS = {
    "CIQL": Method(ciql.CIQL, {}),
    "IQL": Method(ciql.CIQL, IQL),
    "cloning": Method(ciql.CIQL, {"alpha": 0.0, "beta": 0.0}),
    "DDPG+BC": Method(ciql.CIQL, DDPG_BC),
    "DDPG+BC+CQL": Method(ciql.CIQL, DDPG_BC | {"alpha": 1.0}),
    "DDPG+BC+near": Method(NearActions, DDPG_BC | {"alpha": 1.0}),
    "MixedTargets": Method(ciql.CIQL, MIXED_TARGETS),
    "MixedTargets+CQL": Method(ciql.CIQL, MIXED_TARGETS | {"alpha": 1.0}),
    "MixedTargets+near": Method(NearActions, MIXED_TARGETS | NEAR),
    "PolicyTargets": Method(ciql.CIQL, POLICY_TARGETS),
    "PolicyTargets+near": Method(NearActions, POLICY_TARGETS | NEAR),
    "AveragedPolicy": Method(AveragedPolicy, {}),
}
