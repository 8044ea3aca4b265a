"""Many runs of ciql_pybullet.py side by side on Ray Tune, with statistics and pictures.

    python study/study.py --seeds 0 1 2 --grid alpha 0 1 --max-steps 50000 --study runs/penalty
    python study/study.py --seeds 0 1 2 --grid alpha,beta,tau 1,1,0.8 0,3,0.7 --study runs/two
    python study/study.py --summarize runs/penalty

A study is every combination of data sets, variants, settings and seeds. The same command again
skips the runs that are complete and resumes the others; with more seeds, values, data sets or
variants it trains only what is new.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import filelock
import numpy as np
import pandas as pd
import pyarrow.fs
import ray
import tyro
from matplotlib.figure import Figure
from ray import tune
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import variants

import ciql_pybullet as ciql
from ciql_pybullet import Config, InputError


# ------------------------------------------------------------------------------- what it is made of
@dataclass(frozen=True)
class Study:
    """Many runs of ciql_pybullet.py; every flag that is not below is its own and goes to all."""

    study: Path = Path("runs/study")  # folder of tables and pictures
    storage: str = ""  # where runs are kept: a folder or s3://...; none: in the study's folder
    datasets: tuple[str, ...] = (Config.dataset,)  # ids, or files (with --env-id)
    variants: tuple[str, ...] = ("CIQL",)  # agents in study/variants.py
    grid: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # a setting and its values
    seeds: tuple[int, ...] = (0,)
    ray_address: str = ""  # of a Ray cluster, auto or HOST:PORT; none: this machine
    gpu_share: float = 0.25  # of a GPU per run, where there is one
    summarize: str = ""  # train nothing: print and draw the results in this study's folder again
    baseline: str = ""  # with --summarize: the method that differences are to; none: the first


@dataclass
class Run:
    """One training of a study, as study.json keeps it."""

    name: str
    dataset: str  # as tables call it
    label: str  # of its method, in tables
    variant: str
    varied: dict[str, str]  # the settings of the grids
    config: Config
    storage: str  # folder or address of its checkpoints
    file: str = ""  # of its data
    data_return: float | None = None  # mean of the data's episodes
    error: str = ""  # of its last attempt

    def facts(self) -> dict[str, Any]:
        """What must stay as it is when a later command names the run again."""
        facts = dataclasses.asdict(self.config)
        for name in ("device", "threads", "compile", "film", "plot", "out_dir", "wandb_project"):
            del facts[name]
        return facts | {"storage": self.storage, "data of mean return": self.data_return}


def parse_grid(words: Sequence[str]) -> list[dict[str, str]]:
    """("alpha,beta", "0,3", "1,1") -> [{"alpha": "0", "beta": "3"}, {"alpha": "1", ...}]."""
    if len(words) < 2 or len({word.count(",") for word in words}) > 1:
        raise InputError(f"--grid {' '.join(words)} needs values with a part for every setting")
    names = words[0].split(",")
    return [dict(zip(names, word.split(","), strict=True)) for word in words[1:]]


def flags_of(settings: dict[str, str]) -> list[str]:
    """Settings as flags of the script: {"hidden_sizes": "64 64"} -> --hidden-sizes 64 64."""
    flags = []
    for name, value in settings.items():
        if value == "False":
            flags.append(f"--no-{name}")
        else:
            flags.append(f"--{name}")
        if value not in ("True", "False"):
            flags += value.split()
    return flags


def parse(arguments: Sequence[str]) -> tuple[Study, dict[str, Run]]:
    """The study's own flags, and the runs that the command line names. Raises InputError."""
    for word in arguments:
        if word != ciql.printable(word):
            raise InputError(f"{word} is not UTF-8, which Ray needs; rename it")
    own, common = tyro.cli(Study, args=arguments, prog="study.py", return_unknown_args=True)
    if not 0 < own.gpu_share <= 1:
        raise InputError(f"gpu_share is {own.gpu_share}, but must be in (0, 1]")
    if own.baseline and not own.summarize:
        raise InputError("--baseline is set, but works with --summarize alone")
    storage = str(own.study.absolute())
    if own.storage:
        place = own.storage if "://" in own.storage else Path(own.storage).absolute()
        storage = f"{place}/{own.study.name}"

    settings = []
    for cells in itertools.product(*map(parse_grid, own.grid)):
        varied = {name: value for cell in cells for name, value in cell.items()}
        config = ciql.parse(["--threads", "1", *common, *flags_of(varied)])
        for name in ("dataset", "seed", "name", "resume", "evaluate"):
            if getattr(config, name) != getattr(Config, name):
                raise InputError(f"--{name} is of single runs; use --datasets, --seeds, --study")
        settings.append((varied, config))

    runs: dict[str, Run] = {}
    axes = (own.datasets, own.variants, settings, own.seeds)
    for dataset, variant, (varied, config), seed in itertools.product(*axes):
        if variant not in variants.VARIANTS:
            raise InputError(f"{variant} is none of the variants {', '.join(variants.VARIANTS)}")
        stem = Path(dataset).stem
        words = [] if variant == "CIQL" else [variant]
        words += [f"{name}={value}" for name, value in varied.items()]
        name = "-".join([stem, *words, f"seed{seed}"]).replace("=", "")
        name = re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)
        if name in runs:
            raise InputError(f"two runs of the study are {name}; name each value and seed once")
        config = dataclasses.replace(config, seed=seed, dataset=str(Path(dataset).absolute()))
        if dataset in ciql.DATASETS:
            config = dataclasses.replace(config, dataset=dataset, env_id="")
        ciql.check(config)
        label = " ".join(words) or "CIQL"
        runs[name] = Run(name, stem, label, variant, varied, config, storage)
    if not runs:
        raise InputError("the study has no runs; name data sets, variants and seeds")
    return own, runs


def environment_of(env_id: str) -> ciql.Environment:
    """What is known of an environment, or what it says of itself. Raises InputError."""
    if env_id in ciql.ROBOTS:
        return ciql.ROBOTS[env_id]
    with contextlib.closing(ciql.EvaluationPool(env_id, 1)) as pool:
        return pool.environment()


def add_data(runs: dict[str, Run]) -> None:
    """Find and check the data of each run, and note them there. Raises InputError."""
    files: dict[str, tuple[Path, ciql.Dataset]] = {}
    for run in runs.values():
        config = run.config
        if config.dataset not in files:
            environment = environment_of(ciql.environment_id(config))
            file = ciql.find_dataset(config.dataset)
            data = ciql.load_dataset(dataclasses.replace(config, dataset=str(file)), environment)
            files[config.dataset] = file, data
        file, data = files[config.dataset]
        run.file = str(file)
        if len(data.returns):
            run.data_return = float(data.returns.mean())
        if data.source and config.dataset in ciql.DATASETS:
            run.dataset += " (re-collected)"


# ---------------------------------------------------------------------------- what is there already
@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Context in which no other process works on the study. A new one that is refused goes again.

    Raises InputError if the folder cannot be had.
    """
    is_new = not os.path.exists(folder)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"another process works on {folder}; wait for it or stop it") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); name another --study") from error
    try:
        yield
    except InputError:
        if is_new:
            shutil.rmtree(folder)
        raise
    finally:
        lock.release()


def read_study(folder: Path) -> dict[str, Run]:
    """The runs that study.json knows. Raises InputError if it cannot be read."""
    path = folder / "study.json"
    runs = {}
    try:
        for values in json.loads(path.read_text()) if path.exists() else []:
            config = ciql.config_from_json(json.dumps(values.pop("config")))
            run = Run(**values, config=config)
            runs[run.name] = run
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of another version; name another --study") from error
    return runs


def write_study(folder: Path, runs: dict[str, Run]) -> None:
    values = [dataclasses.asdict(run) for run in runs.values()]
    ciql.write_whole(folder / "study.json", json.dumps(values, indent=1).encode())


def check_same(runs: dict[str, Run], known: dict[str, Run]) -> None:
    """Raise InputError if a run that is known would become another."""
    for run in runs.values():
        old = known.get(run.name, run).facts()
        for name, value in run.facts().items():
            if value != old[name]:
                raise InputError(
                    f"{run.name} is there already, with {name} {old[name]} and not {value};"
                    " name another --study"
                )


class Saved(NamedTuple):
    """The last checkpoint of a run."""

    folder: str  # of the run, in its storage
    checkpoint: tune.Checkpoint  # which holds that folder
    progress: ciql.Progress  # its step, its rows of metrics.csv, ...


def find_saved(runs: dict[str, Run]) -> dict[str, Saved]:
    """The last checkpoint of each run that has one, whichever command it was that trained it.

    Their paths are STORAGE/tune-TIME/NAME/checkpoint_NUMBER/RUN/checkpoint.pt, in order of time.
    """
    saved = {}
    for storage in {run.storage for run in runs.values()}:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(storage)
        everything = pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
        paths = [PurePosixPath(file.path) for file in filesystem.get_file_info(everything)]
        for path in sorted(path for path in paths if path.name == "checkpoint.pt"):
            folder = path.parent
            name = folder.parents[1].name
            if name not in runs:
                continue
            checkpoint = tune.Checkpoint(str(folder.parent), filesystem)
            # One that was being written when its process was killed cannot be read.
            with contextlib.suppress(InputError), checkpoint.as_directory() as place:
                progress = ciql.load_checkpoint(Path(place, folder.name))["progress"]
                saved[name] = Saved(str(folder), checkpoint, progress)
    return saved


def state_of(run: Run, saved: dict[str, Saved]) -> str:
    if run.name in saved and saved[run.name].progress.step == run.config.max_steps:
        return "complete"
    return "failed" if run.error else "incomplete"


# ----------------------------------------------------------------------------------------- training
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no word to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns
    "RAY_AIR_NEW_OUTPUT": "0",  # else it prints tables
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # runs have logs of their own
}


def start_ray(address: str) -> None:
    """Connect to the cluster, or start one of this machine. Raises InputError if that fails."""
    os.environ.update(RAY_SETTINGS)
    try:
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            runtime_env={"py_modules": [ciql.__file__, variants.__file__]},
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = (
            "start it (ray start --head), or set its token" if address else "pip install -U ray"
        )
        raise InputError(
            f"Ray does not answer at {address or 'this machine'} ({error!s:.150}); {remedy}"
        ) from error


def set_threads(runs: dict[str, Run]) -> None:
    """Give runs of 0 threads the cores of the largest node. Raises InputError for more of them."""
    cores = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
    for run in runs.values():
        threads = run.config.threads or cores
        if threads > cores:
            raise InputError(
                f"threads is {threads}, but the largest node has {cores} cores; lower it"
            )
        run.config = dataclasses.replace(run.config, threads=threads)


def trial(space: dict[str, str], runs: dict[str, Run]) -> None:
    """A trial of Tune: the run of that name, from its last checkpoint on if there is one.

    It works in a folder that Tune gives it, where the log goes.
    """
    run = runs[space["run"]]
    with (
        open("log.txt", "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        tempfile.TemporaryDirectory(prefix="ciql-") as place,
    ):
        if run.config.dataset in ciql.DATASETS and Path(run.file).exists():
            os.environ["D4RL_DATASET_DIR"] = place  # no run looks for its file again
            Path(place, f"{run.config.dataset}.hdf5").symlink_to(run.file)
        config = dataclasses.replace(run.config, out_dir=f"{place}/runs")
        saved = find_saved({run.name: run})
        if saved:
            saved[run.name].checkpoint.to_directory(config.out_dir)
            resume = Path(config.out_dir, Path(saved[run.name].folder).name)
            config = dataclasses.replace(config, resume=str(resume))

        def report(row: dict[str, float], folder: Path) -> None:
            tune.report(row, checkpoint=tune.Checkpoint.from_directory(str(folder.parent)))

        try:
            ciql.train(config, make_agent=variants.VARIANTS[run.variant], report=report)
        except (InputError, FloatingPointError) as error:  # it would fail again: no retry
            tune.report({"failure": str(error)})


class Events(tune.Callback):
    """Print a line for what becomes of a run."""

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        print(f"started {trial}")

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        event = f"FAILED: {result.get('failure')}"
        if "step" in result:
            event = f"at step {result['step']:,}, return {result['return_mean']:.1f}"
        print(f"{trial} {event}")


def train_runs(runs: dict[str, Run], gpu_share: float) -> None:
    """Train the runs until they are complete, fail or are interrupted. Failed ones get an error."""
    has_gpu = "GPU" in ray.cluster_resources()

    def resources(space: dict[str, str]) -> tune.PlacementGroupFactory:
        config = runs[space["run"]].config
        gpu = gpu_share if has_gpu and config.device != "cpu" else 0
        return tune.PlacementGroupFactory([{"CPU": config.threads, "GPU": gpu}])

    def name_of(trial: Any) -> str:
        return trial.config["run"]

    trainable = tune.with_parameters(trial, runs=runs)
    results: Any = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"run": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(trial_name_creator=name_of, trial_dirname_creator=name_of),
        run_config=tune.RunConfig(
            name=time.strftime("tune-%Y%m%d-%H%M%S", time.gmtime()),
            storage_path=next(iter(runs.values())).storage,
            verbose=0,
            callbacks=[Events()],
            sync_config=tune.SyncConfig(sync_artifacts=True),
            failure_config=tune.FailureConfig(max_failures=3),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    for result in results:
        failure = (result.metrics or {}).get("failure") or result.error
        if failure:
            run = runs[Path(result.path).name]
            run.error = " ".join(str(failure).split())[-300:]


# ------------------------------------------------------------------------------------------ results
def clamp_open_steps(progress: ciql.Progress) -> int:
    """Steps with an open clamp: a row holds their share of the steps since the row before."""
    steps = float(progress.sums.get("clamp_open", 0))  # since the last row
    before = 0.0
    for row in progress.rows:
        if "clamp_open" in row:
            steps += row["clamp_open"] * (row["step"] - before)
            before = row["step"]
    return round(steps)


def write_results(folder: Path, runs: dict[str, Run], saved: dict[str, Saved]) -> None:
    """Write summary.csv, a row per run, and curves.csv, a row per evaluation."""
    summary = []
    curves = []
    for name, run in runs.items():
        own = {"dataset": run.dataset, "label": run.label, **run.varied, "seed": run.config.seed}
        env_id = ciql.environment_id(run.config)
        row: dict[str, Any] = own | {
            "state": state_of(run, saved),
            "step": 0,
            "final_return": None,
            "score": None,
            "clamp_open_steps": None,
            "data_return": run.data_return,
            "env_id": env_id,
            "folder": "",
            "error": run.error,
        }
        if name in saved:
            progress = saved[name].progress
            points = [point for point in progress.rows if "return_mean" in point]
            curves += [own | point for point in points]
            row["step"] = progress.step
            row["clamp_open_steps"] = clamp_open_steps(progress)
            row["folder"] = saved[name].folder.removeprefix(f"{folder}/")
        if row["state"] == "complete":
            row["final_return"] = np.mean([point["return_mean"] for point in points[-10:]])
            if env_id in ciql.ROBOTS:
                row["score"] = ciql.ROBOTS[env_id].score(row["final_return"])
        summary.append(row)
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False)


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
    half = stats.t.ppf(0.975, by_seed.count() - 1) * by_seed.sem()
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
    Differences are taken seed by seed.
    """
    rows: dict[str, dict[str, Any]] = {}
    for label, part in runs.groupby("label", sort=False):
        figures = part.pivot(index="seed", columns="dataset", values=figure).dropna()
        if figures.empty or figures.shape[1] < runs["dataset"].nunique():
            continue
        by_seed = figures.mean(axis=1)
        cells = {"runs": figures.size, "mean": mean_interval(by_seed)}
        if len(by_seed) >= 8:
            cells["interquartile mean"] = iqm_interval(figures)
        if not rows:
            first = by_seed
        differences = (by_seed - first).dropna()
        if rows and len(differences):
            cells["difference to the first"] = mean_interval(differences)
        rows[label] = {name: str(cell) for name, cell in cells.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def summarize(folder: Path, baseline: str = "") -> None:
    """Print the statistics of a study's two tables and draw its pictures. Raises InputError."""
    path = folder / "summary.csv"
    try:
        summary = pd.read_csv(path, dtype={"label": str, "error": str})
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a study's folder") from error
    if baseline:
        if baseline not in set(summary["label"]):
            methods = ", ".join(summary["label"].unique())
            raise InputError(f"baseline is {baseline}, but the methods of {folder} are {methods}")
        summary = summary.iloc[np.argsort(summary["label"] != baseline, kind="stable")]
    complete = summary[summary["state"] == "complete"]
    scored = complete.dropna(subset="score")
    for dataset, runs in complete.groupby("dataset", sort=False):
        print(f"\n{dataset}, return\n{table(runs, 'final_return').to_string()}")
    if scored["dataset"].nunique() > 1:
        print(f"\nall data sets, score\n{table(scored, 'score').to_string()}")
    print("\nof a run's last ten evaluations; [95 % interval over seeds]")
    for run in summary[summary["state"] == "failed"].itertuples():
        print(f"FAILED {run.dataset}, {run.label}, seed {run.seed}: {run.error}")
    if len(complete):
        draw_curves(folder, complete)
    if len(scored):
        draw_scores(folder, scored)
    print(f"wrote  {folder}")


def draw_curves(folder: Path, complete: pd.DataFrame) -> None:
    """Write study_returns.png: a panel per data set, mean over seeds and interval per method."""
    keys = ["dataset", "label", "seed"]
    curves = pd.read_csv(folder / "curves.csv", dtype={"label": str}).merge(complete[keys])
    datasets = dict(list(complete.groupby("dataset", sort=False)))
    height = 4.5 + 0.2 * complete["label"].nunique()  # the legend is below: labels may be long
    figure = Figure(figsize=(max(9, 6 * len(datasets)), height), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, (dataset, runs) in zip(panels, datasets.items(), strict=True):
        of_dataset = curves[curves["dataset"] == dataset]
        for label, points in of_dataset.groupby("label", sort=False):
            by_seed = points.pivot(index="seed", columns="step", values="return_mean")
            mean, low, high = mean_interval(by_seed)
            (line,) = axes.plot(mean, label=f"{label}, {len(by_seed)} seeds")
            axes.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.2, lw=0)
        value = runs["data_return"].iloc[0]
        if not np.isnan(value):
            axes.axhline(value, color="black", linestyle="--", label=f"data set, {value:.0f}")
        env_id = runs["env_id"].iloc[0]
        if env_id in ciql.ROBOTS:
            ciql.draw_score(axes, ciql.ROBOTS[env_id])
        axes.set(xlabel="gradient steps", ylabel="return of an episode", title=dataset)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(folder / "study_returns.png", dpi=100)


def draw_scores(folder: Path, scored: pd.DataFrame) -> None:
    """Write study_scores.png: final scores, data sets side by side; seeds, mean and interval."""
    datasets = list(scored["dataset"].unique())
    labels = scored["label"].unique()
    size = (max(6, 1.8 * len(datasets) + 2), 4.5 + 0.2 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for n, label in enumerate(labels):
        runs = scored[scored["label"] == label]
        x = runs["dataset"].map(datasets.index) + 0.8 * ((n + 0.5) / len(labels) - 0.5)
        axes.plot(x, runs["score"], ".", color=f"C{n}", alpha=0.4)
        mean, low, _ = mean_interval(runs.groupby(x)["score"])
        axes.errorbar(mean.index, mean, mean - low, fmt="o", color=f"C{n}", label=label)
    names = [dataset.replace("-bullet-", "\n").replace("-v0", "") for dataset in datasets]
    axes.set_xticks(range(len(datasets)), names)
    axes.set(ylabel="normalised score (0 random, 100 expert)")
    axes.set(title="final scores: seeds, mean and 95 % interval")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(folder / "study_scores.png", dpi=100)


# ----------------------------------------------------------------------------------------- commands
def run_study(own: Study, named: dict[str, Run]) -> int:
    """Train the named runs that are not complete; write and print the results; the exit code.

    Raises InputError before anything starts.
    """
    folder = own.study.absolute()
    add_data(named)
    with only_process(folder):
        known = read_study(folder)
        check_same(named, known)
        runs = known | named
        saved = find_saved(runs)
        rest = {name: run for name, run in named.items() if state_of(run, saved) != "complete"}
        print(f"study  {len(named)} runs, {len(rest)} of them to train")
        if rest:
            start_ray(own.ray_address)
            set_threads(rest)
            write_study(folder, runs)
            with contextlib.suppress(KeyboardInterrupt):  # Tune's: the runs are incomplete then
                train_runs(rest, own.gpu_share)
            ray.shutdown()
            saved = find_saved(runs)
        write_study(folder, runs)
        write_results(folder, runs, saved)
    summarize(own.study)
    states = {state_of(run, saved) for run in named.values()}
    if "incomplete" in states:
        return 130
    return 1 if "failed" in states else 0


def main() -> None:
    """Exit code 2 for bad input, 1 where a run or the machine failed, 130 for Ctrl-C."""
    ciql.prepare_process()
    code = 0
    try:
        own, runs = parse(sys.argv[1:])
        if own.summarize:
            summarize(Path(own.summarize), own.baseline)
        else:
            code = run_study(own, runs)
    except KeyboardInterrupt:
        code = 130
    except (InputError, OSError, ray.exceptions.RayError) as error:
        code = 2 if isinstance(error, InputError) else 1
        print(f"study: {ciql.printable(' '.join(str(error).split()))}", file=sys.stderr)
    if code == 130:
        print("stopped; go on with the same command")
    sys.exit(code)


if __name__ == "__main__":
    main()
