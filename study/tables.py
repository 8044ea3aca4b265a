"""Statistics and pictures of studies, from their two tables: summary.csv and curves.csv.

summary.csv has a row per run, curves.csv a row per evaluation; study.py writes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import variants
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
        "score": score,
    }


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval, NaN of a single seed; or Series of them."""

    value: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.0f}"
        return f"{self.value:.0f} [{self.low:.0f}, {self.high:.0f}]"


def mean_interval(by_seed: Any) -> Interval:
    """The mean over seeds and Student's t interval: of a Series (seeds,), a frame (seeds, E)..."""
    mean = by_seed.mean()
    t = stats.t.ppf(0.975, by_seed.count() - 1)
    half = t * by_seed.sem()
    return Interval(mean, mean - half, mean + half)


class Comparison(NamedTuple):
    """The difference of a method's mean to another's, and the p value of Welch's t test."""

    difference: Interval
    p: float


def compare(figures: pd.Series, to: pd.Series) -> Comparison:
    """Two methods by their final returns, (seeds,) each: seeds are no pairs."""
    difference = figures.mean() - to.mean()
    if min(len(figures), len(to)) < 2:
        return Comparison(Interval(difference, np.nan, np.nan), np.nan)
    test = stats.ttest_ind(figures, to, equal_var=False)
    low, high = test.confidence_interval()
    return Comparison(Interval(difference, low, high), test.pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number (Holm, 1979): (comparisons,) -> (comparisons,)."""
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(factors * p[order]).clip(max=1.0)
    return corrected


def table(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Statistics of the final returns of complete runs on a data set, a row per method."""
    methods = dict(list(runs.groupby("method", sort=False)["final_return"]))
    rows = []
    for method, figures in methods.items():
        row = {"method": method, "seeds": len(figures), "mean": str(mean_interval(figures))}
        if method != baseline and baseline in methods:
            comparison = compare(figures, methods[baseline])
            row |= {"difference": str(comparison.difference), "p": comparison.p}
        rows.append(row)
    return pd.DataFrame(rows, columns=["method", "seeds", "mean", "difference", "p"])


# ------------------------------------------------------------------------------------------ summary
def read_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A study's two tables, with final returns from the curves. Raises InputError."""
    text = {"dataset": str, "method": str, "version": str, "error": str}
    try:
        summary = pd.read_csv(folder / "summary.csv", dtype=text).fillna({"version": ""})
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


def summarize(folders: Sequence[Path], baseline: str = "") -> None:
    """Print the statistics of one or more studies, by their data sets. Raises InputError."""
    summary = pd.concat([read_tables(folder)[0] for folder in folders])
    methods = list(summary["method"].unique())
    baseline = baseline or methods[0]
    if baseline not in methods:
        raise InputError(f"baseline is {baseline}, but the methods are {', '.join(methods)}")
    complete = summary[summary["state"] == "complete"]
    tables = {
        dataset: table(runs, baseline) for dataset, runs in complete.groupby("dataset", sort=False)
    }
    rows = pd.concat(tables) if tables else pd.DataFrame({"p": []})
    rows["Holm"] = np.nan
    is_compared = rows["p"].notna()
    rows.loc[is_compared, "Holm"] = holm(rows.loc[is_compared, "p"].to_numpy(float))
    for dataset in tables:
        part = rows.loc[dataset].to_string(index=False, na_rep="", float_format="{:.2g}".format)
        print(f"\n{dataset}\n{part}")
    if tables:
        counts = complete["evaluations"].unique()
        last = " or ".join(f"{count:.0f}" for count in sorted(counts))
        print(
            f"\nmean return of the last {last} evaluations; [95 % intervals] over seeds: Student's,"
            f" and Welch's of the difference to {baseline}; Holm is p corrected for the"
            f" {is_compared.sum()} comparisons"
        )
    versions = complete["version"].unique()
    if len(versions) > 1:
        listed = ", ".join(versions)
        print(f"NOTE   these runs are of {len(versions)} versions of the script: {listed}")
    for run in summary[summary["state"] == "failed"].itertuples():
        print(f"FAILED {run.dataset}, {run.method}, seed {run.seed}: {run.error}")


# ----------------------------------------------------------------------------------------- pictures
def color_of(method: str, methods: Sequence[str]) -> str:
    """A method of variants.py has one colour in all pictures, others have those that are left."""
    known = list(variants.METHODS)
    others = [name for name in methods if name not in known]
    index = known.index(method) if method in known else len(known) + others.index(method)
    return f"C{index % 10}"


def draw(folder: Path) -> None:
    """Draw a study: a panel per data set, with the returns at the evaluations of each method.

    From four seeds on a method is its mean and a band, Student's 95 % interval; of fewer seeds each
    is a line.
    """
    summary, curves = read_tables(folder)
    complete = summary[summary["state"] == "complete"]
    if complete.empty:
        return
    methods = list(complete["method"].unique())
    datasets = complete.groupby("dataset", sort=False)
    figure = Figure(figsize=(2 + 5 * len(datasets), 5), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, (dataset, runs) in zip(panels, datasets, strict=True):
        points = curves.merge(runs[KEYS])
        for method, part in points.groupby("method", sort=False):
            by_seed = part.pivot(index="seed", columns="step", values="return_mean")
            color = color_of(str(method), methods)
            label = f"{method} ({len(by_seed)} seeds)"
            if len(by_seed) < 4:
                axes.plot(by_seed.T, color=color, lw=1, label=[label, *[""] * (len(by_seed) - 1)])
                continue
            mean, low, high = mean_interval(by_seed)
            axes.plot(mean, color=color, label=label)
            axes.fill_between(mean.index, low, high, color=color, alpha=0.2, lw=0)
        value = runs["data_return"].iloc[0]
        axes.axhline(value, color="black", linestyle="--", label=f"data, {value:.0f}")
        axes.set_title(dataset, fontsize="small", parse_math=False)
        axes.set_xticks(sorted(points["step"].unique()))
        axes.tick_params(axis="x", labelrotation=45)
        axes.grid(alpha=0.3)
        axes.set(xlabel="gradient steps", ylabel="return of an episode")
        _, labels = axes.get_legend_handles_labels()
        columns = max(1, min(3, 75 // max(map(len, labels))))  # no wider than the panel
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=columns)
    figure.savefig(folder / "study_returns.png", dpi=100)
