"""Many runs of ciql_pybullet.py, side by side on Ray Tune: data sets x settings x seeds, with statistics and pictures.

    python study/study.py --seeds 0 1 2 3 4 --grid alpha 0 1 --grid beta 1 3 --max-steps 50000 --study runs/penalty
    python study/study.py --seeds 0 1 2 --grid alpha,beta,tau 1,1,0.8 0,3,0.7 --study runs/two
    python study/study.py --summarize runs/penalty

--grid takes a setting and its values, or several settings that vary together. Every other flag is ciql_pybullet.py's
own and goes to all runs. The same command again skips the runs that are complete and resumes the others.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ciql_pybullet as ciql
from ciql_pybullet import Config, InputError

CURVE = ["step", "return_mean", "return_std", *ciql.METRICS]  # columns of curves.csv
LAST = 10  # evaluations at the end of a run whose mean is its final return
RETRIES = 3  # of a run whose process or node died


# --------------------------------------------------------------------------------------------- command line
def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """The study's own flags, and its runs: what varies, as strings, and all settings. Raises InputError."""
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        "study.py", description=description, epilog=details, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="folder of summary and pictures")
    parser.add_argument(
        "--storage", help="where runs are kept: a folder, a shared disk or s3://...; none: beside --study"
    )
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--datasets", nargs="+", default=[Config().dataset], help="ids, or files (with --env-id)")
    parser.add_argument("--grid", nargs="+", action="append", default=[], metavar=("SETTING", "VALUE"))
    parser.add_argument("--ray-address", help="of a Ray cluster, auto or HOST:PORT; none: this machine")
    parser.add_argument("--gpu-share", type=float, default=0.25, help="of a GPU that a run takes, where there is one")
    parser.add_argument("--summarize", type=Path, metavar="STUDY", help="print and draw a study's results again")
    try:
        own, common = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; --help lists the flags") from error
    axes = []
    for names, *values in own.grid:
        axes.append([dict(zip(names.split(","), value.split(","), strict=False)) for value in values])
        if not values or any(len(cell) != len(names.split(",")) for cell in axes[-1]):
            raise InputError(f"--grid {names} needs values, each with a part for every setting in it")
    runs = []
    for dataset, cells, seed in itertools.product(own.datasets, list(itertools.product(*axes)), own.seeds):
        varied = {name: value for cell in cells for name, value in cell.items()}
        flags = ["--threads", "1", *common, "--dataset", dataset, "--seed", seed]
        flags += ["--env-id", "None"] if dataset in ciql.DOWNLOAD_URLS else []  # which is for the files
        for name, value in varied.items():
            flags += [f"--{name.replace('_', '-')}", *value.split()]
        config = ciql.parse(flags)
        if config.resume or config.evaluate:
            raise InputError("a study neither resumes nor evaluates single runs; leave out --resume and --evaluate")
        path = dataset if dataset in ciql.DOWNLOAD_URLS else str(Path(dataset).absolute())
        settings = ciql.SETTINGS.dump_json(dataclasses.replace(config, dataset=path)).decode()
        label = " ".join(f"{name}={value}" for name, value in varied.items())
        name = "-".join([Path(dataset).stem, *(f"{key}{value}" for key, value in varied.items()), f"seed{seed}"])
        runs.append({"name": name.replace(" ", "x"), "dataset": Path(dataset).stem, "label": label, "varied": varied,
                     "seed": config.seed, "settings": settings})  # fmt: skip
    if len({run["name"] for run in runs}) < len(runs):
        raise InputError("two runs of the study are the same; name each data set, value and seed once")
    return own, runs


# ------------------------------------------------------------------------------------------------ training
def trial(space: dict[str, Any]) -> None:
    """A trial of Ray Tune: one run, from the checkpoint on if there is one. It works in a folder of its own."""
    from ray import tune

    run = space["run"]
    config = ciql.SETTINGS.validate_json(run["settings"])
    if config.dataset in ciql.DOWNLOAD_URLS and Path(run["file"]).exists():  # no run looks for its file again
        os.environ["D4RL_DATASET_DIR"] = cache = tempfile.mkdtemp(prefix="ciql-")
        Path(cache, f"{config.dataset}.hdf5").symlink_to(run["file"])
    shutil.rmtree("runs", ignore_errors=True)  # of an attempt that died
    if checkpoint := tune.get_checkpoint():
        checkpoint.to_directory("runs")
    resume = next(Path("runs").glob("*/checkpoint.pt"), None)
    try:
        ciql.train(
            dataclasses.replace(config, out_dir=Path("runs"), resume=resume.parent if resume else None),
            lambda row, folder: tune.report(row, checkpoint=tune.Checkpoint.from_directory(folder.parent)),
        )
    except (InputError, FloatingPointError) as error:  # it would fail again: no retry
        tune.report({"step": 0, "failure": str(error)})


def trial_name(trial: Any) -> str:
    return trial.config["run"]["name"]


def start_ray(own: argparse.Namespace) -> None:
    """Connect to the cluster, or start one of this machine. Raises InputError if that fails."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no word to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "1")
    local: dict[str, Any] = {} if own.ray_address else {"include_dashboard": False}
    modules = {"py_modules": [str(Path(ciql.__file__))]}
    try:
        ray.init(own.ray_address or "local", runtime_env=modules, log_to_driver=False, logging_level=40, **local)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = "start it (ray start --head), or set its token" if own.ray_address else "pip install -U ray"
        cause = " ".join(str(error).split())[:150]
        raise InputError(f"Ray does not answer at {own.ray_address or 'this machine'} ({cause}); {remedy}") from error


def run_study(own: argparse.Namespace, runs: list[dict[str, Any]]) -> Any:
    """Train what is not complete yet; returns Tune's results. Raises InputError before anything starts."""
    import filelock
    import ray
    from ray import tune

    folder = own.study.absolute()
    files = {}
    for run in runs:
        config = ciql.SETTINGS.validate_json(run["settings"])
        ciql.check_run(dataclasses.replace(config, out_dir=folder), None)
        if config.dataset not in files:
            files[config.dataset] = ciql.find_dataset(config.dataset)
            rows, _ = ciql.read_rows(files[config.dataset], config.robot.dims)
            returns = ciql.episode_returns(rows)
        run |= {"file": str(files[config.dataset]), "data_return": float(returns.mean()) if len(returns) else None}
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "study.json"
    if known.exists() and json.loads(known.read_text()) != runs:
        raise InputError(f"{folder} holds a study with other settings or data; name another --study")
    try:
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"{folder} is being worked on by another process; wait for it or stop it") from error
    with lock:
        known.write_text(json.dumps(runs, indent=1))
        start_ray(own)
        storage = own.storage or str(folder)
        path = os.path.join(storage, "tune")
        gpu = own.gpu_share if ray.cluster_resources().get("GPU") and config.device != "cpu" else 0
        trainable = tune.with_resources(trial, {"cpu": config.threads, "gpu": gpu})
        if tune.Tuner.can_restore(path):
            tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"run": tune.grid_search(runs)},
                tune_config=tune.TuneConfig(trial_name_creator=trial_name, trial_dirname_creator=trial_name),
                run_config=tune.RunConfig(
                    name="tune", storage_path=storage, log_to_file="log.txt", verbose=1,
                    sync_config=tune.SyncConfig(sync_artifacts=True),
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                ),
            )  # fmt: skip
        results = tuner.fit()
        ray.shutdown()
    return results


def write_results(folder: Path, results: Any) -> None:
    """Write summary.csv (a row a run) and curves.csv (a row an evaluation) of Tune's results."""
    summary, curves = [], []
    order = [run["name"] for run in json.loads((folder / "study.json").read_text())]
    for result in sorted(results, key=lambda result: order.index(result.config["run"]["name"])):
        run, frame = result.config["run"], result.metrics_dataframe
        config = ciql.SETTINGS.validate_json(run["settings"])
        frame = pd.DataFrame() if frame is None else frame
        failure = (result.metrics or {}).get("failure", "")
        own = {"dataset": run["dataset"], "label": run["label"], **run["varied"], "seed": run["seed"]}
        row: dict[str, Any] = {**own, "state": "incomplete", "step": 0, "folder": run["name"]}
        if "return_mean" in frame:
            curve = frame.dropna(subset="return_mean").drop_duplicates("step", keep="last")
            curves += [own | point for point in curve.reindex(columns=CURVE).to_dict("records")]
            row["step"] = int(curve["step"].iloc[-1])
            if row["step"] == config.max_steps:
                row |= {"state": "complete", "final_return": curve["return_mean"].iloc[-LAST:].mean()}
                row["score"] = config.robot.score(row["final_return"])
        if failure or (result.error and row["state"] != "complete"):
            row |= {"state": "failed", "error": failure or " ".join(str(result.error).split())[-300:]}
        summary.append(row | {"data_return": run["data_return"], "env_id": config.robot.env_id})
    columns = ["dataset", "label", *run["varied"], "seed", "state", "step", "final_return", "score", "data_return"]
    pd.DataFrame(summary, columns=[*columns, "env_id", "folder", "error"]).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False)


# ---------------------------------------------------------------------------------------------- statistics
def iqm(values: np.ndarray, axis: int = -1) -> Any:
    """Interquartile mean along ``axis``: without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def with_interval(strata: Sequence[np.ndarray], statistic: Callable[..., Any] = np.mean) -> tuple[Any, Any, Any]:
    """``statistic`` of all ``strata`` together, and its 95 % stratified-bootstrap interval: value, low, high.

    A stratum holds the figures of one data set, (seeds,) or (seeds, E); seeds are resampled within each. NaN for the
    interval of a single seed. Agarwal et al., Deep RL at the Edge of the Statistical Precipice, 2021 (arXiv 2108.13264).
    """
    from scipy.stats import bootstrap

    def pooled(*samples: np.ndarray, axis: int) -> Any:
        return statistic(np.concatenate(samples, axis), axis=axis)

    value = pooled(*strata, axis=0)
    if min(map(len, strata)) < 2:
        return value, value * math.nan, value * math.nan
    result = bootstrap(strata, pooled, axis=0, vectorized=True, method="percentile", n_resamples=2000, rng=0)
    return value, *result.confidence_interval


def summarize(folder: Path) -> None:
    """Print the statistics of a study's CSVs and draw its pictures."""
    try:
        summary = pd.read_csv(folder / "summary.csv", keep_default_na=True).fillna({"label": "CIQL", "error": ""})
        curves = pd.read_csv(folder / "curves.csv").fillna({"label": "CIQL"})
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be summarised ({error}); name the folder of a study with results") from error
    complete = summary[summary["state"] == "complete"]
    tables = {f"{name}, return": {name: part} for name, part in complete.groupby("dataset", sort=False)}
    scored = {name: part for name, part in complete.groupby("dataset", sort=False)}
    if len(scored) > 1:
        tables["all data sets, score"] = scored
    for title, parts in tables.items():
        figure = "score" if title.endswith("score") else "final_return"
        groups = {
            label: [part[part["label"] == label].set_index("seed")[figure] for part in parts.values()]
            for label in dict.fromkeys(pd.concat(parts.values())["label"])
        }
        width = max(map(len, [*groups, title])) + 2
        print(f"\n{title:{width}}runs{'mean':>28}{'interquartile mean':>28}{'difference to the first':>28}")
        first = next(iter(groups.values()))
        for label, strata in groups.items():
            pairs = [(own - other).dropna().to_numpy() for own, other in zip(strata, first, strict=True)]
            figures = [with_interval([s.to_numpy() for s in strata], f) for f in (np.mean, iqm)]
            if strata is not first and min(map(len, pairs)):
                figures.append(with_interval(pairs))
            cells = [f"{v:.1f}" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]") for v, low, high in figures]
            print(f"{label:{width}}{sum(map(len, strata)):4}{''.join(f'{cell:>28}' for cell in cells)}")
    print(f"\nof a run's last {LAST} evaluations; [95 % stratified bootstrap over seeds]; differences seed by seed")
    for _, run in summary[summary["state"] == "failed"].iterrows():
        print(f"FAILED {run['folder']}: {run['error']}")
    if len(complete):
        draw_curves(folder, complete, curves)
    if scored:
        draw_scores(folder, scored)
    print(f"wrote  {', '.join(str(path) for path in sorted(folder.glob('*.[cp][sn][vg]')))}")


def draw_curves(folder: Path, complete: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Write study_returns.png: evaluation returns, mean over seeds and interval a combination, a panel a data set."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(complete["dataset"]))
    columns = min(len(datasets), 3)
    rows = math.ceil(len(datasets) / columns)
    figure = Figure(figsize=(max(9, 6 * columns), 4.5 * rows), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False).flat
    for panel, dataset in zip(panels, datasets, strict=False):
        axes = panel.subplots()
        part = complete[complete["dataset"] == dataset]
        for n, label in enumerate(dict.fromkeys(part["label"])):
            seeds = part[part["label"] == label]["seed"]
            rows_of = curves[(curves["dataset"] == dataset) & (curves["label"] == label) & curves["seed"].isin(seeds)]
            returns = rows_of.pivot(index="seed", columns="step", values="return_mean").dropna(axis=1)
            mean, low, high = with_interval([returns.to_numpy()])
            axes.plot(returns.columns, mean, color=f"C{n}", label=f"{label}, {len(returns)} seeds")
            axes.fill_between(returns.columns, low, high, color=f"C{n}", alpha=0.2, lw=0)
        robot = next(robot for robot in ciql.ROBOTS.values() if robot.env_id == part["env_id"].iloc[0])
        ciql.draw_references(axes, robot, part["data_return"].dropna().to_numpy())
        axes.set_title(dataset, fontsize="medium")
    figure.savefig(folder / "study_returns.png", dpi=100)


def draw_scores(folder: Path, scored: dict[str, pd.DataFrame]) -> None:
    """Write study_scores.png: final scores of each combination, data sets side by side: seeds, mean and interval."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(pd.concat(scored.values())["label"]))
    figure = Figure(figsize=(max(6, 1.8 * len(scored) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    for x, part in enumerate(scored.values()):
        for n, label in enumerate(labels):
            values = part[part["label"] == label]["score"].to_numpy()
            if not len(values):
                continue
            place = x + (n - (len(labels) - 1) / 2) * 0.8 / len(labels)
            value, low, high = with_interval([values])
            axes.plot([place] * len(values), values, ".", color=f"C{n}", alpha=0.4)
            axes.plot([place], [value], "o", color=f"C{n}", label=label if x == 0 else None)
            axes.vlines([place], low, high, color=f"C{n}", linewidth=2)
    axes.set_xticks(range(len(scored)), [name.replace("-bullet-", "\n").removesuffix("-v0") for name in scored])
    axes.set(ylabel="normalised score (0 random, 100 expert)", title="final scores: seeds, mean and 95 % interval")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    figure.savefig(folder / "study_scores.png", dpi=100)


def main() -> None:
    try:
        own, runs = parse(sys.argv[1:])
        if own.summarize:
            summarize(own.summarize)
            return
        results = run_study(own, runs)
        write_results(own.study, results)
        summarize(own.study)
    except InputError as error:
        print(f"study: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    states = set(pd.read_csv(own.study / "summary.csv")["state"])
    if "incomplete" in states:
        print(f"stopped; go on with the same command and --study {own.study}")
        sys.exit(130)
    sys.exit(1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
