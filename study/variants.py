"""Variants of CIQL, most of them no settings: what makes evaluations dip, does the penalty act, what does the shift cost.

    python study/variants.py --seeds 0 1 2 --out runs/variants
    python study/study.py --summarize runs/variants

Runs follow each other; the same command again skips those that are complete. Each is of --max-steps, 10,000 if it is
not given, and evaluated 20 times.
"""

import argparse
import contextlib
import itertools
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ciql_pybullet as ciql


class FallingPolicyRate(ciql.CIQL):
    """The policy's learning rate falls to zero by a cosine, as in IQL. Adam's move is proportional to the rate."""

    @torch.no_grad()
    def apply(self, gradients: Any) -> None:
        policy: list[torch.Tensor] = list(self.policy.parameters())
        before: list[torch.Tensor] = [p.clone() for p in policy]
        super().apply(gradients)
        done = self.adam_steps[0].item() / self.config.max_steps
        torch._foreach_copy_(policy, torch._foreach_lerp(before, policy, (1 + math.cos(math.pi * done)) / 2))


class AveragedPolicy(ciql.CIQL):
    """Evaluations play the average of the policy's weights over about the last 1,000 steps."""

    latest: "AveragedPolicy"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.average = ciql.copy.deepcopy(self.policy)
        AveragedPolicy.latest = self

    @torch.no_grad()
    def apply(self, gradients: Any) -> None:
        super().apply(gradients)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.policy.parameters()), 0.001)


class AveragedPool(ciql.EvaluationPool):
    def play(self, policy: ciql.GaussianPolicy, *arguments: Any) -> dict[str, float]:
        average = AveragedPolicy.latest.average
        average.observation_mean, average.observation_std = policy.observation_mean, policy.observation_std
        return super().play(average, *arguments)


class RawObservations(ciql.CIQL):
    """Observations are not normalised."""

    def prepare(self, data: ciql.Transitions) -> ciql.Transitions:
        return ciql.Transitions(*(column.to(self.device) for column in data))


def shifted_rewards(rows: dict[str, np.ndarray], read: Any = ciql.read_transitions) -> ciql.Transitions:
    """A transition takes the reward of its own row, which is that of the step before: the format's first trap."""
    return read(rows | {"rewards": np.roll(rows["rewards"], 1)})


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings, and what is replaced in the script
    "alpha=0": ({}, {}),
    "alpha=1": ({"alpha": 1.0}, {}),
    "alpha=5": ({"alpha": 5.0}, {}),
    "sigma floor exp(-1)": ({"min_log_std": -1.0}, {}),
    "weight cap 2": ({"max_weight": 2.0}, {}),
    "falling policy rate": ({}, {"CIQL": FallingPolicyRate}),
    "averaged policy": ({}, {"CIQL": AveragedPolicy, "EvaluationPool": AveragedPool}),
    "raw observations": ({}, {"CIQL": RawObservations}),
    "shifted rewards": ({}, {"read_transitions": shifted_rewards}),
}


def mean_q(checkpoint: dict[str, Any], data: ciql.Transitions, config: ciql.Config) -> tuple[float, float]:
    """Mean of Q1 and Q2 at the data's actions, and at uniform ones, of 10,000 states."""
    critic = ciql.DoubleQNetwork(*config.robot.dims, config.hidden_sizes)
    critic.load_state_dict(checkpoint["agent"]["critic"])
    policy, generator = ciql.load_policy(checkpoint), torch.Generator().manual_seed(0)
    index = torch.randint(len(data.rewards), (10_000,), generator=generator)
    s = (data.observations[index] - policy.observation_mean) / policy.observation_std
    off_data = torch.rand(data.actions[index].shape, generator=generator) * 2 - 1
    with torch.no_grad():
        on, off = (torch.stack(critic(s, a)).mean().item() for a in (data.actions[index], off_data))
    return on, off


def complete(out: Path, max_steps: int) -> dict[str, Any] | None:
    """The checkpoint of the complete run in ``out``, if there is one beside those that were stopped."""
    checkpoints = (ciql.load_checkpoint(path.parent) for path in out.glob("*/checkpoint.pt"))
    return next((checkpoint for checkpoint in checkpoints if checkpoint["step"] == max_steps), None)


def row_of(checkpoint: dict[str, Any], rows: dict[str, np.ndarray], data: ciql.Transitions) -> dict[str, Any]:
    """What summary.csv says of a run on the data set of these ``rows``, which are the transitions ``data``."""
    config, metrics = ciql.SETTINGS.validate_json(checkpoint["config"]), pd.DataFrame(checkpoint["rows"])
    last, episodes = metrics.iloc[-10:], config.eval_episodes
    on, off = mean_q(checkpoint, data, config)
    return {
        "state": "complete",
        "step": checkpoint["step"],
        "final_return": last["return_mean"].mean(),
        "score": config.robot.score(last["return_mean"].mean()),
        "within_std": last["return_mean"].std(),
        "predicted_std": math.sqrt((last["return_std"] ** 2).mean() / (episodes - 1)),  # if all are of one policy
        "open_steps": round(metrics["clamp_open"].sum() * config.log_interval),
        "q_data": on,
        "q_off_data": off,
        "data_return": ciql.episode_returns(rows).mean(),
        "env_id": config.robot.env_id,
        "error": "",
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("variants.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--datasets", nargs="+", default=["halfcheetah-bullet-medium-v0", "hopper-bullet-medium-v0"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    return parser.parse_args(arguments)


def main() -> None:
    own = parse(sys.argv[1:])
    own.out.mkdir(parents=True, exist_ok=True)

    def folder(dataset: str, variant: str, seed: int) -> Path:
        return own.out / f"{dataset}-{variant}-seed{seed}".replace(" ", "-")

    for seed, dataset, variant in itertools.product(own.seeds, own.datasets, own.variants):
        settings, replaced = VARIANTS[variant]
        out = folder(dataset, variant, seed)
        if complete(out, own.max_steps):
            continue
        common: dict[str, Any] = {
            "dataset": dataset,
            "seed": seed,
            "alpha": 0.0,
            "threads": 1,
            "max_steps": own.max_steps,
            "eval_interval": own.max_steps // 20,
            "log_interval": own.max_steps // 20,
            "out_dir": out,
            "plot": own.out / "p.png",
        }
        config = ciql.Config(**common | settings)
        with contextlib.ExitStack() as stack:
            for name, other in replaced.items():
                stack.enter_context(mock.patch.object(ciql, name, other))
            ciql.train(config)
    summary, curves = [], []
    for dataset in own.datasets:
        path = ciql.find_dataset(dataset)
        rows, source = ciql.read_rows(path)
        data, name = ciql.read_transitions(rows), dataset + (" (re-collected)" if source else "")
        for variant, seed in itertools.product(own.variants, own.seeds):
            checkpoint = complete(out := folder(dataset, variant, seed), own.max_steps)
            assert checkpoint, out
            run = {"label": variant, "seed": seed, "folder": out.name, "dataset": name}
            summary.append(run | row_of(checkpoint, rows, data))
            evaluations = pd.DataFrame(checkpoint["rows"])[["step", "return_mean", "return_std"]]
            curves += [run | row for row in evaluations.to_dict("records")]
    pd.DataFrame(summary).to_csv(own.out / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(own.out / "curves.csv", index=False)


if __name__ == "__main__":
    main()
