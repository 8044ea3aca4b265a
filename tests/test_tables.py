"""Statistics, tables and pictures of studies, from made-up tables."""

import re

import numpy as np
import pandas as pd
import pytest
import tables
from conftest import refused, snapshot
from scipy import stats
from tables import iqm_interval, mean_interval

import ciql_pybullet as ciql

HOPPER = ciql.ROBOTS["HopperBulletEnv-v0"]


def test_intervals_are_those_of_scipy():
    """Of a column, of a curve, of groups; a single seed has none."""
    returns = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)))
    expected = stats.ttest_1samp(returns, 0).confidence_interval()
    assert np.allclose(mean_interval(returns)[1:], expected)
    groups = returns[2].groupby([1, 1, 1, 1, 1])
    for column in (mean_interval(returns[2]), [part[1] for part in mean_interval(groups)]):
        assert np.allclose(column[1:], (expected.low[2], expected.high[2]))
    value, low, high = mean_interval(pd.Series([3.0]))
    assert value == 3 and np.isnan(low) and np.isnan(high)


def test_interquartile_mean():
    """Its interval resamples seeds within each data set, and so is blind to how these differ."""
    rng = np.random.default_rng(0)
    figures = pd.DataFrame(rng.normal(size=(8, 2)))
    value, low, high = iqm_interval(figures)
    assert value == pytest.approx(np.sort(figures.to_numpy().flatten())[4:12].mean())
    assert low < value < high
    _, low, high = iqm_interval(figures + [0, 1000])
    assert high - low < 2


def tables_of(returns, dataset="hopper-bullet-medium-v0"):
    """Rows of summary.csv and curves.csv: ``returns`` by method, a final return per seed.

    The curves begin with another figure, which is not of the last three evaluations.
    """
    facts = {"env_id": "HopperBulletEnv-v0", "data_return": 800.0, "commit": "one", "error": ""}
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
def summarized(tmp_path, capsys):
    """A function that summarizes such tables: what is printed."""

    def summarize(summary, curves, baseline=""):
        pd.DataFrame(summary).to_csv(tmp_path / "summary.csv", index=False)
        pd.DataFrame(curves).to_csv(tmp_path / "curves.csv", index=False)
        tables.summarize(tmp_path, baseline)
        return capsys.readouterr().out

    return summarize


def has_line(out, pattern):
    return re.search(f"^{pattern}$", out, re.MULTILINE)


def test_seeds_are_paired(summarized, tmp_path):
    """A difference is of runs of the same seed: narrow where seeds differ more than methods do.

    Final returns are of the last evaluations in curves.csv, whatever summary.csv says.
    """
    summary, curves = tables_of({"CIQL": [100.0, 500.0, 900.0], "IQL": [111, 510, 912]})
    failed = {"dataset": "d", "method": "IQL", "seed": 3, "state": "failed", "error": "its error"}
    out = summarized([*summary, failed], curves)
    assert has_line(out, r"CIQL +3 +500\.0 \[-493\.7, 1493\.7\] *")
    assert has_line(out, r"IQL +3 +511\.0 \[-483\.9, 1505\.9\] +11\.0 \[8\.5, 13\.5\]")
    assert "FAILED d, IQL, seed 3: its error" in out
    assert "interquartile" not in out and "NOTE" not in out
    for picture in ("study_returns.png", "study_scores.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_differences_to_a_baseline(summarized, tmp_path):
    """The table begins with the method that is named; pictures stay as they are."""
    made = tables_of({"one": [1.0, 2, 3], "two": [5.0, 7, 9]})
    summarized(*made)
    before = snapshot(tmp_path)
    out = summarized(*made, baseline="two")
    pattern = r"two +3 +7\.0 \[.*\] *\none +3 +2\.0 \[.*\] +-5\.0 \[-7\.5, -2\.5\]"
    assert has_line(out, pattern) and snapshot(tmp_path) == before
    with refused(f"the methods of {tmp_path} are one, two"):
        summarized(*made, baseline="three")


def test_versions_of_the_script(summarized):
    """Runs of two versions are not paired by seed, and the table says so."""
    summary, curves = tables_of({"CIQL": [1.0, 2, 3], "IQL": [5.0, 7, 10]})
    summary[-1]["commit"] = "two"  # IQL's seed 2
    out = summarized(summary, curves)
    low, high = stats.ttest_1samp([4.0, 5.0], 0).confidence_interval()
    assert has_line(out, rf"IQL +3 +7\.3 \[.*\] +4\.5 \[{low:.1f}, {high:.1f}\], 2 seeds")
    assert has_line(out, "NOTE +these runs are of 2 versions of the script.*")

    for row in summary[:3]:
        row["commit"] = "two"
    summary[-1]["commit"] = ""  # of a copy without git
    out = summarized(summary, curves)
    assert "difference" not in out.split("NOTE")[0] and "of 3 versions" in out


def test_several_data_sets(summarized):
    """Scores count by their mean per seed, for methods that ran on all; from 8 seeds on IQMs."""
    rng = np.random.default_rng(0)
    one, curves = tables_of({"a": rng.normal(size=8), "b": rng.normal(size=8), "c": [1.0]}, "one")
    two, more = tables_of({"a": rng.normal(size=8), "b": rng.normal(size=9)}, "two")
    out = summarized(one + two, curves + more)
    pooled = out[out.index("all data sets, score") :]
    finals = pd.DataFrame(curves + more).query("method == 'b' and seed < 8 and step == 30")
    scores = HOPPER.score(finals["return_mean"])
    interval = mean_interval(scores.groupby(finals["seed"]).mean())
    assert has_line(pooled, rf"b +16 +{re.escape(str(interval))}.*")
    assert "interquartile mean" in pooled and not has_line(pooled, "c .*")


def test_no_score_without_references(summarized, tmp_path):
    summary, curves = tables_of({"CIQL": [1.0, 2.0]})
    for row in summary:
        row.update(score=None, env_id="lab:Lab-v0", data_return=None)
    assert has_line(summarized(summary, curves), r"CIQL +2 +1\.5 \[-4\.9, 7\.9\] *")
    assert {path.name for path in tmp_path.glob("*.png")} == {"study_returns.png"}


def test_pictures(summarized, monkeypatch):
    """No line is in a legend that is not in view; scores have methods as rows."""
    summary, curves = tables_of({"CIQL": [900.0, 1000.0], "IQL alpha=1": [700.0, 720.0]})
    figures = []
    keep = lambda figure, path, **options: figures.append(figure)
    monkeypatch.setattr(tables.Figure, "savefig", keep)
    summarized(summary, [row for row in curves if row["step"] > 10])
    (returns,), (scores,) = (figure.axes for figure in figures)
    legend = [text.get_text() for text in returns.get_legend().get_texts()]
    assert legend == ["CIQL (2)", "IQL alpha=1 (2)", "data set, 800"]  # random 19, expert 2500
    assert [text.get_text() for text in scores.get_yticklabels()] == ["CIQL", "IQL alpha=1"]
    dots = scores.get_lines()[0]
    assert np.allclose(dots.get_xdata(), HOPPER.score(np.array([900, 1e3, 700, 720])))
    assert list(dots.get_ydata()) == [0, 0, 1, 1]
