"""Many runs of ciql_pybullet.py side by side on Ray, with statistics and pictures.

    python study/study.py --methods CIQL IQL cloning --seeds 0 1 2 --study runs/methods
    python study/study.py --seeds 0 1 2 --grid alpha 0 1 --max-steps 50000 --study runs/penalty
    python study/study.py --summarize runs/methods

A study is every combination of data sets, methods, settings and seeds. The same command again
skips the runs that are complete and resumes the others; with more seeds, values, data sets or
methods it trains only what is new.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import ray
import tyro
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import variants

import ciql_pybullet as ciql
from ciql_pybullet import Config, InputError


# ------------------------------------------------------------------------------- what it is made of
@dataclass(frozen=True)
class Study:
    """Many runs of ciql_pybullet.py; every flag that is not below is its own and goes to all."""

    study: Path = Path("runs/study")  # folder of runs, tables and pictures
    datasets: tuple[str, ...] = (Config.dataset,)  # ids, or files (with --env-id)
    methods: tuple[str, ...] = ("CIQL",)  # names in study/variants.py
    grid: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # a setting and its values
    seeds: tuple[int, ...] = (0,)
    ray_address: str = ""  # of a Ray cluster, auto or HOST:PORT; none: this machine
    gpu_share: float = 0.25  # of a GPU per run, where there is one
    summarize: str = ""  # train nothing: print and draw the results in this study's folder again
    baseline: str = ""  # with --summarize: the method that differences are to; none: the first


KEYS = ["dataset", "method", "seed"]  # which tell runs apart in both tables
Row = dict[str, Any]  # of summary.csv, with these columns after the keys and what varies:
COLUMNS = ["state", "step", "final_return", "evaluations", "curve_mean", "score"]
COLUMNS += ["env_id", "data_return", "commit", "folder", "error"]


@dataclass
class Run:
    """One training of a study."""

    method: str
    config: Config
    row: Row
    checksum: int = 0  # of its data


def parse_grid(words: Sequence[str]) -> list[dict[str, str]]:
    """("alpha,beta", "0,3", "1,1") -> [{"alpha": "0", "beta": "3"}, {"alpha": "1", ...}]."""
    rows = [word.split(",") for word in words]
    if len(rows) < 2 or len(set(map(len, rows))) > 1:
        raise InputError(f"--grid {' '.join(words)} needs values with a part for every setting")
    names = rows[0]
    return [dict(zip(names, values, strict=True)) for values in rows[1:]]


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of the script: {"hidden_sizes": "64 64"} -> --hidden-sizes 64 64."""
    flags = []
    for name, value in settings.items():
        words = str(value).split()
        if words == ["False"]:
            flags.append(f"--no-{name}")
        else:
            flags.append(f"--{name}")
        if words not in (["True"], ["False"]):
            flags += words
    return flags


def config_of(method: str, common: Sequence[str], varied: dict[str, str]) -> Config:
    """The settings of a method, with those that all runs have, and those of a grid."""
    if method not in variants.METHODS:
        raise InputError(f"{method} is none of the methods {', '.join(variants.METHODS)}")
    recipe = variants.METHODS[method].settings
    flags = ["--threads", "1", *flags_of(recipe), *common, *flags_of(varied)]
    config = ciql.parse(flags)
    values = vars(config)
    for name in ("dataset", "seed", "name", "out_dir", "resume", "evaluate"):
        if values[name] != vars(Config())[name]:
            raise InputError(f"--{name} is of single runs; use --datasets, --seeds, --study")
    for name, value in recipe.items():
        if name not in varied and values[name] != value:
            raise InputError(
                f"--{name} {values[name]} would make {method} another method, as its own is"
                f" {value}; use --grid {name}, which tables show"
            )
    return config


def parse(arguments: Sequence[str]) -> tuple[Study, dict[str, Run]]:
    """The study's own flags, and the runs that the command line names. Raises InputError."""
    own, common = tyro.cli(Study, args=arguments, prog="study.py", return_unknown_args=True)
    if not 0 < own.gpu_share <= 1:
        raise InputError(f"gpu_share is {own.gpu_share}, but must be in (0, 1]")
    if own.baseline and not own.summarize:
        raise InputError("--baseline is set, but works with --summarize alone")

    runs: dict[str, Run] = {}
    cells = list(itertools.product(*map(parse_grid, own.grid)))
    for method, parts in itertools.product(own.methods, cells):
        varied = {name: value for part in parts for name, value in part.items()}
        common_config = config_of(method, common, varied)
        words = [f"{name}={value}" for name, value in varied.items()]
        label = " ".join([method, *words])
        for dataset, seed in itertools.product(own.datasets, own.seeds):
            stem = Path(dataset).stem
            name = f"{stem}-{label}-seed{seed}".replace("=", "").replace(" ", "-")
            name = re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)
            if name in runs:
                raise InputError(f"two runs of the study are {name}; name each value and seed once")
            config = dataclasses.replace(
                common_config,
                dataset=dataset,
                env_id="" if dataset in ciql.DATASETS else common_config.env_id,
                seed=seed,
                name=name,
                out_dir=str(own.study.absolute()),
                plot=Path(common_config.plot).name,  # it is in the run's folder
            )
            ciql.check(config)
            row: Row = {"dataset": stem, "method": label, **varied, "seed": seed}
            row |= dict.fromkeys(COLUMNS, "")
            row["folder"] = name
            runs[name] = Run(method, config, row)
    if not runs:
        raise InputError("the study has no runs; name data sets, methods and seeds")
    return own, runs


def add_data(runs: dict[str, Run]) -> None:
    """Find and check the data of each run, and note them there. Raises InputError."""
    found: dict[Config, tuple[Config, int, Row]] = {}
    for run in runs.values():
        c = run.config
        key = Config(c.dataset, c.env_id, c.max_episode_steps)
        if key not in found:
            env_id = ciql.environment_id(key)
            file = ciql.find_dataset(key.dataset)
            here = dataclasses.replace(key, dataset=str(file.absolute()), env_id=env_id)
            data = ciql.load_dataset(here, ciql.check_environment(env_id))
            row = {"env_id": env_id, "data_return": pd.Series(data.returns).mean()}
            if data.source and key.dataset in ciql.DATASETS:
                row["dataset"] = f"{key.dataset} (re-collected)"
            found[key] = here, ciql.checksum_of(data.transitions), row
        # All runs are on the file that was found, so that none asks the network again.
        here, run.checksum, row = found[key]
        run.config = dataclasses.replace(c, dataset=here.dataset, env_id=here.env_id)
        run.row |= row


# ---------------------------------------------------------------------------- what is there already
def read_known(folder: Path) -> dict[str, Row]:
    """The rows of summary.csv by run, as they were written.

    Raises InputError for another table, and for results whose runs are gone: writing the tables
    anew would lose them.
    """
    path = folder / "summary.csv"
    if not path.exists():
        return {}
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {*KEYS, "state", "folder", "error"}.issubset(rows):
        raise InputError(f"{path} is of another version; name another --study")
    for name in rows.loc[rows["state"] == "complete", "folder"]:
        if not (folder / name / "checkpoint.pt").exists():
            raise InputError(f"{folder / name} is gone; put it back, or name another --study")
    return {row["folder"]: row for row in rows.to_dict("records")}


def saved_run(folder: Path) -> tuple[dict[str, Any], bool]:
    """The checkpoint in a run's folder ({}: none), and whether its last policy was evaluated.

    Raises InputError for a checkpoint that is damaged.
    """
    if not (folder / "checkpoint.pt").exists():
        return {}, False
    checkpoint = ciql.load_checkpoint(folder)
    evaluated = ciql.last_step(checkpoint["rows"], "return_mean")
    return checkpoint, checkpoint["step"] == evaluated == checkpoint["config"].max_steps


def runs_to_train(runs: dict[str, Run], folder: Path) -> list[Run]:
    """Those that are not complete. Raises InputError if one that is there would become another."""
    free = ciql.NEUTRAL_SETTINGS - {"env_id", "max_steps", "eval_interval", "eval_episodes"}
    rest = []
    for name, run in runs.items():
        checkpoint, is_complete = saved_run(folder / name)
        if not is_complete:
            rest.append(run)
        if not checkpoint:
            continue
        saved = vars(checkpoint["config"]) | {"data of checksum": checkpoint["checksum"]}
        facts = vars(run.config) | {"data of checksum": run.checksum}
        for fact, value in facts.items():
            if fact not in free and value != saved[fact]:
                raise InputError(
                    f"{name} is there already, with {fact} {saved[fact]} and not {value};"
                    " name another --study"
                )
    return rest


# ----------------------------------------------------------------------------------------- training
def start_ray(address: str) -> None:
    """Connect to the cluster, or start one of this machine. Raises InputError if that fails."""
    # Without the first it reports to its makers, without the second it retries for ever.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": "3"}
    paths = [str(ROOT), str(ROOT / "study"), os.getcwd()]
    paths.append("${PYTHONPATH}")  # a node's own
    try:
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"Ray does not answer at {address or 'this machine'} ({error!s:.150}); start it"
            " (ray start --head), set its token, or pip install -U ray"
        ) from error
    # What a queue sends when time is up, or a lost terminal, is as Ctrl-C; Ray's handlers abort.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)


def set_threads(runs: list[Run]) -> None:
    """Give runs of 0 threads the cores of the largest node. Raises InputError for more of them."""
    cores = 0
    for node in ray.nodes():
        if node["Alive"]:
            cores = max(cores, int(node["Resources"].get("CPU", 0)))
    for run in runs:
        threads = run.config.threads or cores
        if threads > cores:
            raise InputError(
                f"threads is {threads}, but the largest node has {cores} cores; lower it"
            )
        run.config = dataclasses.replace(run.config, threads=threads)


def train_run(run: Run) -> str:
    """Train a run, or go on with it; what it prints goes beside its folder. Returns its error.

    That is no exception, as it would come again: Ray retries what dies, and nothing else.
    """
    # Ray cancels by SIGINT, which a shell may have had ignored for all that it started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        open(Path(run.config.out_dir, f"{run.config.name}.log"), "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        tempfile.TemporaryDirectory(prefix="ciql-") as place,
        contextlib.chdir(place),  # where the second copy of its picture goes
    ):
        try:
            ciql.train(run.config, make_agent=variants.METHODS[run.method].agent)
        except SystemExit as stop:  # it is saved
            if stop.code != 128 + signal.SIGINT:
                raise  # this machine goes down, not the study: it goes on elsewhere
        except Exception as error:  # noqa: BLE001  (of its environment it may be any)
            traceback.print_exc()
            return " ".join("".join(traceback.format_exception_only(error)).split())
    return ""


def train_runs(runs: list[Run], gpu_share: float) -> None:
    """Train the runs until they are complete or fail; those get an error. On Ctrl-C all save."""
    has_gpu = "GPU" in ray.cluster_resources()
    task = ray.remote(max_calls=1)(train_run)  # a process for each run
    waiting = {}
    for run in runs:
        gpu = gpu_share if has_gpu and run.config.device != "cpu" else 0
        options = task.options(num_cpus=run.config.threads, num_gpus=gpu, max_retries=3)
        waiting[options.remote(run)] = run
    try:
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            try:
                error = ray.get(ready)
            except ray.exceptions.RayError as death:  # its process died again and again
                error = " ".join(str(death).split())[:300]
            run = waiting.pop(ready)
            run.row["error"] = error
            outcome = f"FAILED: {error}" if error else "is complete"
            print(f"{run.config.name} {outcome}; {len(waiting)} to go")
    finally:
        for ready in waiting:
            ray.cancel(ready)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=60)


# ------------------------------------------------------------------------------------------- tables
def figures_of(means: np.ndarray, env_id: str) -> dict[str, float | None]:
    """What tables say of a complete run, from the mean returns of its evaluations (E,)."""
    final = ciql.final_return(means)
    score = ciql.ROBOTS[env_id].score(final.value) if env_id in ciql.ROBOTS else None
    return {
        "final_return": final.value,
        "evaluations": final.evaluations,  # of which it is the mean
        "curve_mean": means.mean(),
        "score": score,
    }


def write_results(folder: Path, rows: dict[str, Row]) -> None:
    """Bring the rows up to date; write summary.csv, and curves.csv, a row per evaluation."""
    curves = []
    for name, row in rows.items():
        row["state"] = "failed" if row["error"] else "incomplete"
        row["step"] = 0
        checkpoint, is_complete = saved_run(folder / name)
        if not checkpoint:
            continue
        settings = json.loads((folder / name / "config.json").read_text())
        commits = [process["commit"] for process in settings["processes"]]
        row["commit"] = " ".join(dict.fromkeys(commits))
        row["step"] = checkpoint["step"]
        for point in checkpoint["rows"]:
            if "return_mean" in point:
                curves.append({key: row[key] for key in KEYS} | point)
        if is_complete:
            means = ciql.curve_of(checkpoint["rows"]).means
            row |= figures_of(means, row["env_id"]) | {"state": "complete", "error": ""}
            if not np.isfinite(means).all():
                row |= {"state": "failed", "error": "a return is NaN or infinite"}
    summary = pd.DataFrame(list(rows.values()), dtype=object)
    for path, frame in (("summary.csv", summary), ("curves.csv", pd.DataFrame(curves))):
        ciql.write_whole(folder / path, frame.to_csv(index=False).encode())


# --------------------------------------------------------------------------------------- statistics
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


# ----------------------------------------------------------------------------------------- commands
def run_study(own: Study, named: dict[str, Run]) -> int:
    """Train the named runs that are not complete; write and print the results; the exit code.

    Raises InputError before anything starts.
    """
    folder = own.study.absolute()
    add_data(named)
    rows = read_known(folder)
    for name, run in named.items():
        rows[name] = run.row
    rest = runs_to_train(named, folder)
    print(f"study  {len(named)} runs, {len(rest)} of them to train; logs: {folder}/*.log")
    if rest:
        start_ray(own.ray_address)
        set_threads(rest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); name another --study") from error
    with ciql.lock_folder(folder):  # one process at a time works on a study
        write_results(folder, rows)
        try:
            if rest:
                train_runs(rest, own.gpu_share)
        finally:
            ray.shutdown()
            write_results(folder, rows)
    summarize(own.study)
    complete = [run.row["state"] == "complete" for run in named.values()]
    return 0 if all(complete) else 1


def main() -> None:
    """Exit code 2 for bad input, 1 where a run or the machine failed, 130 for Ctrl-C."""
    streams: Any = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.path.append(os.getcwd())  # where the MODULE of env_id may be
    code = 0
    try:
        own, runs = parse(sys.argv[1:])
        if own.summarize:
            summarize(Path(own.summarize), own.baseline)
        else:
            code = run_study(own, runs)
    except KeyboardInterrupt:
        print("stopped; go on with the same command")
        code = 130
    except (InputError, OSError, ray.exceptions.RayError) as error:
        code = 2 if isinstance(error, InputError) else 1
        print(f"study: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
