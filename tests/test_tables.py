"""Statistics, tables and pictures of studies, from made-up tables."""

import re

import numpy as np
import pandas as pd
import pytest
import tables
from scipy import stats


def test_intervals_are_those_of_scipy():
    """Of curves; a single seed has none."""
    returns = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)))
    expected = stats.ttest_1samp(returns, 0).confidence_interval()
    assert np.allclose(tables.mean_interval(returns)[1:], expected)
    value, low, high = tables.mean_interval(pd.Series([3.0]))
    assert value == 3 and np.isnan(low) and np.isnan(high)


def test_welch():
    """Seeds are no pairs, and two methods may spread differently: Welch's formula, written out."""
    one = np.array([111.0, 510, 912, 700])
    two = np.array([5.0, 7, 9])
    variances = np.array([one.var(ddof=1) / 4, two.var(ddof=1) / 3])
    degrees = variances.sum() ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 2)
    half = stats.t.ppf(0.975, degrees) * np.sqrt(variances.sum())
    difference = one.mean() - two.mean()
    comparison = tables.compare(pd.Series(one), pd.Series(two))
    expected = (difference, difference - half, difference + half)
    assert comparison.difference == pytest.approx(expected)
    p = 2 * stats.t.sf(difference / np.sqrt(variances.sum()), degrees)
    assert comparison.p == pytest.approx(p)


def test_holm():
    """The smallest p counts for all comparisons, the next for one less; never below the last."""
    corrected = tables.holm(np.array([0.04, 0.01, 0.015, 0.9]))
    assert corrected == pytest.approx([0.08, 0.04, 0.045, 0.9])
    assert tables.holm(np.array([0.02, 0.021])) == pytest.approx([0.04, 0.04])


def tables_of(returns, dataset="hopper-bullet-medium-v0"):
    """Rows of summary.csv and curves.csv: ``returns`` by method, a final return per seed.

    The curves begin with another figure, which is not of the last three evaluations.
    """
    facts = {"env_id": "HopperBulletEnv-v0", "data_return": 800.0, "version": "one", "error": ""}
    stale = {"state": "complete", "final_return": -1.0, "evaluations": 9, "score": -1.0}
    summary = []
    curves = []
    for method, values in returns.items():
        for seed, value in enumerate(values):
            keys = {"dataset": dataset, "method": method, "seed": seed}
            summary.append(keys | facts | stale)
            for step, mean in enumerate((-5000, value - 1, value, value + 1), start=1):
                curves.append(keys | {"step": 10 * step, "return_mean": mean})
    return summary, curves


@pytest.fixture
def study_of(tmp_path):
    """A function that writes such tables into a folder, which it returns."""

    def write(summary, curves, name="s"):
        (tmp_path / name).mkdir(exist_ok=True)
        pd.DataFrame(summary).to_csv(tmp_path / name / "summary.csv", index=False)
        pd.DataFrame(curves).to_csv(tmp_path / name / "curves.csv", index=False)
        return tmp_path / name

    return write


def has_line(out, pattern):
    return re.search(f"^ *{pattern} *$", out, re.MULTILINE)


def test_summary(study_of, capsys):
    """Means, and Welch's differences to the first method, or to the one that is named.

    Final returns are of the last evaluations in curves.csv, whatever summary.csv says.
    """
    one = [100.0, 500.0, 900.0]
    two = [5.0, 7, 12]
    summary, curves = tables_of({"CIQL": one, "IQL": two})
    failed = {"dataset": "d", "method": "IQL", "seed": 3, "state": "failed", "error": "its error"}
    folder = study_of([*summary, failed], curves)
    tables.summarize([folder])
    out = capsys.readouterr().out
    low, high = stats.ttest_ind(two, one, equal_var=False).confidence_interval()
    assert has_line(out, r"CIQL +3 +500 \[-494, 1494\]")
    assert has_line(out, rf"IQL +3 +8 \[-1, 17\] +-492 \[{low:.0f}, {high:.0f}\] +0\.17 +0\.17")
    assert "FAILED d, IQL, seed 3: its error" in out and "NOTE" not in out
    assert "the last 3 evaluations" in out and "for the 1 comparisons" in out

    tables.summarize([folder], baseline="IQL")
    assert has_line(capsys.readouterr().out, r"CIQL +3 +500 \[.*\] +492 \[.*\] +0\.17 +0\.17")
    assert not list(folder.glob("*.png"))  # a committed study stays as it is


def test_several_studies_are_one_family_of_comparisons(study_of, capsys):
    """And runs of two versions of the script are told."""
    one = study_of(*tables_of({"a": [1.0, 2, 3], "b": [11.0, 12, 13]}, "set1"), name="one")
    summary, curves = tables_of({"a": [1.0, 2, 3], "b": [1.0, 2, 4]}, "set2")
    summary[0]["version"] = "two"
    tables.summarize([one, study_of(summary, curves, name="two")])
    out = capsys.readouterr().out
    p = stats.ttest_ind([11.0, 12, 13], [1.0, 2, 3], equal_var=False).pvalue
    assert has_line(out, rf"b +3 +12 \[.*\] +10 \[.*\] +{p:.2g} +{2 * p:.2g}")
    assert "for the 2 comparisons" in out and "of 2 versions of the script" in out


def test_picture(study_of, monkeypatch):
    """Four seeds are a mean and Student's band, fewer a line each; a method has one colour."""
    figures = []
    keep = lambda figure, path, **options: figures.append(figure)
    monkeypatch.setattr(tables.Figure, "savefig", keep)
    finals = [900.0, 1000.0, 1100.0, 1400.0]
    tables.draw(study_of(*tables_of({"IQL": finals, "own": [700.0, 720.0]})))
    tables.draw(study_of(*tables_of({"cloning": finals, "IQL": finals})))
    (axes,) = figures[0].axes
    mean, *seeds, data = axes.get_lines()
    assert list(mean.get_xdata()) == [10, 20, 30, 40] == list(axes.get_xticks())
    assert mean.get_ydata()[2] == np.mean(finals)
    (band,) = axes.collections
    low, high = stats.ttest_1samp(finals, 0).confidence_interval()
    at_30 = [y for x, y in band.get_paths()[0].vertices if x == 30]
    assert (min(at_30), max(at_30)) == pytest.approx((low, high))
    assert [line.get_ydata()[2] for line in seeds] == [700, 720]
    assert list(data.get_ydata()) == [800, 800]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["IQL (4 seeds)", "own (2 seeds)", "data, 800"]
    cloning, iql, *_ = figures[1].axes[0].get_lines()
    assert iql.get_color() == mean.get_color() != cloning.get_color()


def test_long_names_of_a_grid_fit_into_the_picture(study_of, monkeypatch):
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    names = [f"CIQL alpha=0 beta={beta} tau=0.8 clamp_advantage=True" for beta in (1, 2, 3)]
    tables.draw(study_of(*tables_of({name: [900.0, 1000.0] for name in names})))
    (figure,) = figures
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 > 0 and legend.x1 < figure.bbox.x1
    assert axes.bbox.width > 0.7 * figure.bbox.width
