"""Agents that are no settings of ciql_pybullet.py; study.py trains those that --variants names.

An idea is a subclass of ``CIQL`` that overrides what it changes, and a name in ``VARIANTS`` below.
Networks that it adds as attributes are saved and resumed with the others.
"""

import copy

import torch
from torch import Tensor, nn

import ciql_pybullet as ciql
from ciql_pybullet import Metrics, Transitions


class AveragedPolicy(ciql.CIQL):
    """Evaluations play a mean of the policy's weights over about the last 1,000 steps."""

    def prepare(self, data: Transitions) -> Transitions:
        prepared = super().prepare(data)
        self.average = copy.deepcopy(self.policy)
        return prepared

    def update(self, data: Transitions) -> Metrics:
        metrics = super().update(data)
        pairs = zip(self.average.parameters(), self.policy.parameters(), strict=True)
        with torch.no_grad():
            for mean, latest in pairs:
                mean.lerp_(latest, 0.001)
        return metrics

    def evaluated_policy(self) -> nn.Module:
        return self.average


class RawObservations(ciql.CIQL):
    """Observations are not normalised."""

    def prepare(self, data: Transitions) -> Transitions:
        return Transitions(*(column.to(self.device) for column in data))


class ShiftedRewards(ciql.CIQL):
    """A transition takes the reward of the step before: what reading the format wrongly costs."""

    def prepare(self, data: Transitions) -> Transitions:
        return super().prepare(data._replace(rewards=data.rewards.roll(1)))


class PenaltyPerState(ciql.CIQL):
    """The penalty's ReLU is of each state, not of the batch's mean, so that it is seldom closed."""

    def losses(
        self,
        batch: Transitions,
        negative_actions: Tensor,
        with_penalty: bool,
        clamp_open: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        loss, metrics = super().losses(batch, negative_actions, with_penalty=False)
        if self.config.alpha == 0:
            return loss, metrics
        states = batch.observations.repeat_interleave(self.config.num_neg, 0)
        on_data = torch.stack(self.critic(batch.observations, batch.actions))
        off_data = torch.stack(self.critic(states, negative_actions.flatten(0, 1)))
        gaps = off_data.unflatten(1, (-1, self.config.num_neg)).mean(-1) - on_data
        penalty = torch.relu(gaps).mean(1).sum()
        metrics["penalty"] = penalty.detach()
        return loss + self.config.alpha * penalty, metrics


VARIANTS: dict[str, type[ciql.CIQL]] = {
    "CIQL": ciql.CIQL,
    "AveragedPolicy": AveragedPolicy,
    "RawObservations": RawObservations,
    "ShiftedRewards": ShiftedRewards,
    "PenaltyPerState": PenaltyPerState,
}
