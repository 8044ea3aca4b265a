"""Statistics and pictures of a study, from its two tables: summary.csv and curves.csv.

summary.csv has a row per run, curves.csv a row per evaluation; study.py writes them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

import ciql_pybullet as ciql
from ciql_pybullet import InputError

KEYS = ["dataset", "method", "seed"]  # which tell runs apart in both tables


# --------------------------------------------------------------------------------------- statistics
def figures_of(means: np.ndarray, env_id: str) -> dict[str, float | None]:
    """What tables say of a complete run, from the mean returns of its evaluations (E,)."""
    final, count = ciql.final_return(means)
    score = ciql.ROBOTS[env_id].score(final) if env_id in ciql.ROBOTS else None
    return {
        "final_return": final,
        "evaluations": count,  # of which it is the mean
        "curve_mean": means.mean(),
        "score": score,
    }


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval, NaN of a single seed; or Series of them."""

    value: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.1f}"
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def mean_interval(by_seed: Any) -> Interval:
    """The mean over seeds and Student's t interval: of a Series (seeds,), a frame (seeds, E)..."""
    mean = by_seed.mean()
    t = stats.t.ppf(0.975, by_seed.count() - 1)
    half = t * by_seed.sem()
    return Interval(mean, mean - half, mean + half)


def iqm_interval(figures: pd.DataFrame) -> Interval:
    """The mean of (seeds, data sets) without the lowest and the highest quarter.

    Its interval is of the bootstrap that resamples the seeds of each data set (Agarwal et al., Deep
    RL at the Edge of the Statistical Precipice, 2021), which is too narrow below eight seeds.
    """

    def iqm(*datasets: np.ndarray, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(datasets, axis), 0.25, axis)

    datasets = figures.to_numpy().T
    result = stats.bootstrap(datasets, iqm, n_resamples=2000, method="percentile", rng=0)
    return Interval(iqm(*datasets), *result.confidence_interval)


def table(runs: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Statistics of a column of complete runs, a row per method that has runs on every data set.

    Several data sets count by their mean per seed, of the seeds that all of them have: these means
    are independent of each other, so Student's t holds, however different the data sets are.
    Differences are taken seed by seed, between runs of the same version of the script: in another
    a seed may stand for other random numbers.
    """
    rows: dict[str, dict[str, str]] = {}
    for method, part in runs.groupby("method", sort=False):
        figures = part.pivot(index="seed", columns="dataset", values=figure).dropna()
        pairs = part.pivot(index=["seed", "commit"], columns="dataset", values=figure).dropna()
        if figures.empty or figures.shape[1] < runs["dataset"].nunique():
            continue
        cells = {"runs": str(figures.size)}
        cells["mean"] = str(mean_interval(figures.mean(axis=1)))
        if len(figures) >= 8:
            cells["interquartile mean"] = str(iqm_interval(figures))
        if not rows:
            first = pairs
        differences = (pairs - first).dropna().mean(axis=1)
        if rows and len(differences):
            cell = str(mean_interval(differences))
            if len(differences) < len(figures):
                cell += f", {len(differences)} seeds"
            cells[f"difference to {next(iter(rows))}"] = cell
        rows[str(method)] = cells
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


# ----------------------------------------------------------------------------------------- pictures
def panels_of(runs: pd.DataFrame, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure, and its panels with the runs that each shows, those of a data set."""
    datasets = runs.groupby("dataset", sort=False)
    size = (3 + width * len(datasets), height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(datasets), squeeze=False)[0]
    panels = []
    for panel, (dataset, part) in zip(axes, datasets, strict=True):
        panel.set_title(dataset, fontsize="small", parse_math=False)
        panels.append((panel, part))
    return figure, panels


def draw_curves(path: Path, complete: pd.DataFrame, curves: pd.DataFrame) -> None:
    """A panel per data set: mean over seeds and interval per method, and references in view."""
    methods = list(complete["method"].unique())
    figure, panels = panels_of(complete, width=5, height=4.5)
    for axes, runs in panels:
        points = curves.merge(runs[KEYS])
        for method, part in points.groupby("method", sort=False):
            by_seed = part.pivot(index="seed", columns="step", values="return_mean")
            mean, low, high = mean_interval(by_seed)
            color = f"C{methods.index(method)}"  # in all panels
            axes.plot(mean, color=color, label=f"{method} ({len(by_seed)})")
            axes.fill_between(mean.index, low, high, color=color, alpha=0.2, lw=0)
        drawn = len(axes.get_lines())
        value = runs["data_return"].iloc[0]
        axes.axhline(value, linestyle="--", label=f"data set, {value:.0f}")
        env_id = runs["env_id"].iloc[0]
        if env_id in ciql.ROBOTS:
            ciql.draw_score(axes, ciql.ROBOTS[env_id])
        bottom, top = axes.get_ylim()
        for line in axes.get_lines()[drawn:]:
            line.set_color("black")
            if not bottom <= line.get_ydata()[0] <= top:
                line.remove()
        axes.set(xlabel="gradient steps", ylabel="return of an episode")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def draw_scores(path: Path, scored: pd.DataFrame) -> None:
    """A panel per data set, a row per method: final scores of the seeds, mean and interval."""
    methods = list(scored["method"].unique())
    height = 1.4 + 0.35 * len(methods)
    figure, panels = panels_of(scored, width=3, height=height)
    for axes, runs in panels:
        rows = runs["method"].map(methods.index)
        axes.plot(runs["score"], rows, ".", color="C0", alpha=0.4)
        mean, low, _ = mean_interval(runs.groupby(rows)["score"])
        half = mean - low
        axes.errorbar(mean, mean.index, xerr=half, fmt="o", color="C0")
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.label_outer()  # names are at the left
    figure.supxlabel("final score (0 random, 100 expert): seeds, mean, 95 % interval", size="small")
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------ summary
def read_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The study's two tables, with final returns from the curves. Raises InputError."""
    text = {"dataset": str, "method": str, "commit": str, "error": str}
    try:
        summary = pd.read_csv(folder / "summary.csv", dtype=text).fillna({"commit": ""})
        complete = summary[summary["state"] == "complete"]
        if complete.empty:
            return summary, complete
        curves = pd.read_csv(folder / "curves.csv", dtype=text)
        means = curves.groupby(KEYS)["return_mean"]
        for n, run in complete.iterrows():
            own = means.get_group(tuple(run[KEYS]))
            figures = figures_of(own.to_numpy(), run["env_id"])
            summary.loc[n, list(figures)] = list(figures.values())
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder} cannot be read ({error!r}); name a study's folder") from error
    return summary, curves


def summarize(folder: Path, baseline: str = "") -> None:
    """Print the statistics of a study's two tables and draw its pictures. Raises InputError."""
    summary, curves = read_tables(folder)
    if baseline and baseline not in set(summary["method"]):
        methods = ", ".join(summary["method"].unique())
        raise InputError(f"baseline is {baseline}, but the methods of {folder} are {methods}")
    complete = summary[summary["state"] == "complete"]
    baseline_first = complete.iloc[np.argsort(complete["method"] != baseline, kind="stable")]
    for dataset, runs in baseline_first.groupby("dataset", sort=False):
        print(f"\n{dataset}, return\n{table(runs, 'final_return').to_string()}")
    scored = baseline_first.dropna(subset="score")
    if scored["dataset"].nunique() > 1:
        print(f"\nall data sets, score\n{table(scored, 'score').to_string()}")
    if len(complete):
        numbers = sorted(complete["evaluations"].unique())
        last = " or ".join(f"{number:.0f}" for number in numbers)
        print(f"\nof the last {last} evaluations of each run; [95 % interval over seeds]")
    versions = complete["commit"].nunique()
    if versions > 1:
        print(
            f"NOTE   these runs are of {versions} versions of the script (commit in summary.csv):"
            " differences pair the seeds within a version alone"
        )
    for run in summary[summary["state"] == "failed"].itertuples():
        print(f"FAILED {run.dataset}, {run.method}, seed {run.seed}: {run.error}")
    if len(complete):
        draw_curves(folder / "study_returns.png", complete, curves)
    if len(scored):
        draw_scores(folder / "study_scores.png", complete.dropna(subset="score"))
    print(f"wrote  {folder}")
