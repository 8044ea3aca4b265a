"""Many runs of ciql_pybullet.py, side by side on Ray Tune: data sets x settings x seeds, with statistics and pictures.
    python study/study.py --seeds 0 1 2 3 4 --grid alpha 0 1 --grid beta 1 3 --max-steps 50000 --study runs/penalty
    python study/study.py --seeds 0 1 2 --grid alpha,beta,tau 1,1,0.8 0,3,0.7 --study runs/two
    python study/study.py --summarize runs/penalty
--grid takes a setting and its values, or several settings that vary together. Every other flag is ciql_pybullet.py's
own and goes to all runs. The same command again skips the runs that are complete and resumes the others.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ciql_pybullet as ciql
from ciql_pybullet import InputError

Runs = dict[str, dict[str, Any]]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Runs]:
    """The study's own flags, and its runs by name: what varies, as strings, and all settings. Raises InputError."""
    parser = argparse.ArgumentParser("study.py", description=__doc__, exit_on_error=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="folder of summary and pictures")
    parser.add_argument("--storage", help="where runs are kept: a folder, a shared disk or s3://...; none: in --study")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--datasets", nargs="+", default=[ciql.Config().dataset], help="ids, or files (with --env-id)")
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
        if not values or {len(cell) for cell in axes[-1]} != {names.count(",") + 1}:
            raise InputError(f"--grid {names} needs values, each with a part for every setting in it")
    runs: Runs = {}
    for dataset, cells, seed in itertools.product(own.datasets, list(itertools.product(*axes)), own.seeds):
        varied = {name: value for cell in cells for name, value in cell.items()}
        flags = ["--threads", "1", *common, "--dataset", dataset, "--seed", seed]
        flags += ["--env-id", "None"] if dataset in ciql.DOWNLOAD_URLS else []  # which is for the files
        for name, value in varied.items():
            flags += [f"--{name.replace('_', '-')}", *value.split()]
        config = ciql.parse(flags)
        if config.resume or config.evaluate:
            raise InputError("a study neither resumes nor evaluates single runs; leave out --resume and --evaluate")
        stem, path = Path(dataset).stem, dataset if dataset in ciql.DOWNLOAD_URLS else str(Path(dataset).absolute())
        text = ciql.SETTINGS.dump_json(dataclasses.replace(config, dataset=path)).decode()
        label = " ".join(f"{name}={value}" for name, value in varied.items())
        name = "-".join([stem, *label.replace("=", "").split(), f"seed{seed}"])
        if name in runs:
            raise InputError("two runs of the study are the same; name each data set, value and seed once")
        runs[name] = {"dataset": stem, "label": label, "varied": varied, "seed": config.seed, "settings": text}
    return own, runs


def trial(space: dict[str, str], runs: Runs) -> None:
    """A trial of Ray Tune: one run, from the checkpoint on if there is one. It works in a folder of its own."""
    from ray import tune

    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # Tune's stream into log.txt has none
    run = runs[space["run"]]
    config = ciql.SETTINGS.validate_json(run["settings"])
    if config.dataset in ciql.DOWNLOAD_URLS and Path(run["file"]).exists():  # no run looks for its file again
        os.environ["D4RL_DATASET_DIR"] = cache = tempfile.mkdtemp(prefix="ciql-")
        Path(cache, f"{config.dataset}.hdf5").symlink_to(run["file"])
    shutil.rmtree("runs", ignore_errors=True)  # of an attempt that died
    if checkpoint := tune.get_checkpoint():
        checkpoint.to_directory("runs")
    resume = next((path.parent for path in Path("runs").glob("*/checkpoint.pt")), None)
    config = dataclasses.replace(config, out_dir=Path("runs"), resume=resume)
    try:
        ciql.train(config, lambda row, run: tune.report(row, checkpoint=tune.Checkpoint.from_directory(run.parent)))
    except (InputError, FloatingPointError) as error:  # it would fail again: no retry
        tune.report({"step": 0, "failure": str(error)})


def start_ray(own: argparse.Namespace) -> None:
    """Connect to the cluster, or start one of this machine. Raises InputError if that fails."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no word to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns
    options: dict[str, Any] = {} if own.ray_address else {"include_dashboard": False}
    options |= {"runtime_env": {"py_modules": [str(Path(ciql.__file__))]}, "log_to_driver": False, "logging_level": 40}
    try:
        ray.init(own.ray_address or "local", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        remedy = "start it (ray start --head), or set its token" if own.ray_address else "pip install -U ray"
        raise InputError(
            f"Ray does not answer at {own.ray_address or 'this machine'} ({error!s:.150}); {remedy}"
        ) from error


def run_study(own: argparse.Namespace, runs: Runs) -> Any:
    """Train what is not complete yet; returns Tune's results. Raises InputError before anything starts."""
    import ray
    from ray import tune

    folder, files = own.study.absolute(), {}
    for run in runs.values():
        config = ciql.SETTINGS.validate_json(run["settings"])
        ciql.check_run(dataclasses.replace(config, out_dir=folder), None)
        if config.dataset not in files:
            path = ciql.find_dataset(config.dataset)
            rows, source = ciql.read_rows(path, config.robot.dims)
            files[config.dataset] = path, ciql.episode_returns(rows), source
        path, returns, source = files[config.dataset]
        run |= {"file": str(path), "data_return": float(returns.mean()) if len(returns) else None}
        run["dataset"] += " (re-collected)" if source and config.dataset in ciql.DOWNLOAD_URLS else ""
    (known := folder / "study.json").parent.mkdir(parents=True, exist_ok=True)
    if known.exists() and json.loads(known.read_text()) != runs:
        raise InputError(f"{folder} holds a study with other settings or data; name another --study")
    with filelock.FileLock(folder / ".lock", timeout=0):
        known.write_text(json.dumps(runs, indent=1))
        start_ray(own)
        storage, name = own.storage or str(folder), lambda trial: trial.config["run"]
        gpu = own.gpu_share if ray.cluster_resources().get("GPU") and config.device != "cpu" else 0
        resources = {"cpu": config.threads, "gpu": gpu}
        trainable = tune.with_resources(tune.with_parameters(trial, runs=runs), resources)
        if tune.Tuner.can_restore(f"{storage}/tune"):
            tuner = tune.Tuner.restore(f"{storage}/tune", trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"run": tune.grid_search(list(runs))},
                tune_config=tune.TuneConfig(trial_name_creator=name, trial_dirname_creator=name),
                run_config=tune.RunConfig(
                    name="tune", storage_path=storage, log_to_file="log.txt", verbose=1,
                    sync_config=tune.SyncConfig(sync_artifacts=True),
                    failure_config=tune.FailureConfig(max_failures=3),
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                ),
            )  # fmt: skip
        results = tuner.fit()
        ray.shutdown()
    return results


def write_results(folder: Path, runs: Runs, results: Any) -> None:
    """Write summary.csv (a row a run) and curves.csv (a row an evaluation) of Tune's results."""
    summary, curves = [], []
    by_run = {result.config["run"]: result for result in results}
    for name, run in runs.items():
        result, config = by_run[name], ciql.SETTINGS.validate_json(run["settings"])
        frame = pd.DataFrame() if result.metrics_dataframe is None else result.metrics_dataframe
        failure = (result.metrics or {}).get("failure", "")
        own = {"dataset": run["dataset"], "label": run["label"], **run["varied"], "seed": run["seed"]}
        row: dict[str, Any] = {**own, "state": "incomplete", "step": 0, "folder": f"tune/{name}"}
        if "return_mean" in frame:
            curve = frame.dropna(subset="return_mean").drop_duplicates("step", keep="last")
            points = curve.reindex(columns=["step", "return_mean", "return_std", *ciql.METRICS]).to_dict("records")
            curves += [own | point for point in points]
            row["step"] = int(curve["step"].iloc[-1])
            if row["step"] == config.max_steps:
                row |= {"state": "complete", "final_return": curve["return_mean"].iloc[-10:].mean()}
                row["score"] = config.robot.score(row["final_return"])
        if failure or (result.error and row["state"] != "complete"):
            row |= {"state": "failed", "error": failure or " ".join(str(result.error).split())[-300:]}
        summary.append(row | {"data_return": run["data_return"], "env_id": config.robot.env_id})
    columns = ["dataset", "label", *run["varied"], "seed", "state", "step", "final_return", "score", "data_return"]
    pd.DataFrame(summary, columns=[*columns, "env_id", "folder", "error"]).to_csv(folder / "summary.csv", index=False)
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False)


iqm = functools.partial(trim_mean, proportiontocut=0.25)  # interquartile mean: without the lowest and highest quarter


def with_interval(strata: Sequence[Any], statistic: Callable[..., Any] = np.mean) -> tuple[Any, Any, Any]:
    """``statistic`` of all ``strata`` together, and its 95 % stratified-bootstrap interval: value, low, high.

    A stratum holds the figures of one data set, (seeds,) or (seeds, E); seeds are resampled within each; a single one has
    the interval NaN. Agarwal et al., Deep RL at the Edge of the Statistical Precipice, 2021 (arXiv 2108.13264).
    """

    def pooled(*samples: np.ndarray, axis: int) -> Any:
        return statistic(np.concatenate(samples, axis), axis=axis)

    value = pooled(*strata, axis=0)
    if min(map(len, strata)) < 2:
        return value, value * np.nan, value * np.nan
    strata = [np.asarray(stratum) for stratum in strata]
    result = bootstrap(strata, pooled, axis=0, vectorized=True, method="percentile", n_resamples=2000, rng=0)
    return value, *result.confidence_interval


def summarize(folder: Path) -> None:
    """Print the statistics of a study's CSVs and draw its pictures."""
    texts = {"label": str, "error": str, "state": str}
    try:
        summary, curves = (pd.read_csv(folder / f"{name}.csv", dtype=texts) for name in ("summary", "curves"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be summarised ({error}); name the folder of a study with results") from error
    summary["label"], curves["label"] = summary["label"].fillna("CIQL"), curves["label"].fillna("CIQL")
    complete = dict(list(summary[summary["state"] == "complete"].groupby("dataset", sort=False)))
    tables = {f"{name}, return": {name: part} for name, part in complete.items()}
    tables |= {"all data sets, score": complete} if len(complete) > 1 else {}
    for title, parts in tables.items():
        figure = "score" if title.endswith("score") else "final_return"
        by_seed = [part.set_index("seed") for part in parts.values()]
        labels = pd.concat(by_seed)["label"].unique()
        groups = {label: [part[part["label"] == label][figure] for part in by_seed] for label in labels}
        width = max(map(len, [*groups, title])) + 2
        print(f"\n{title:{width}}runs{'mean':>28}{'interquartile mean':>28}{'difference to the first':>28}")
        first = next(iter(groups.values()))
        for label, strata in groups.items():
            pairs = [(own - other).dropna() for own, other in zip(strata, first, strict=True)]
            figures = [with_interval(strata, statistic) for statistic in (np.mean, iqm)]
            figures += [with_interval(pairs)] if strata is not first and min(map(len, pairs)) else []
            cells = [f"{v:.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]") for v, low, high in figures]
            print(f"{label:{width}}{sum(map(len, strata)):4}{''.join(f'{cell:>28}' for cell in cells)}")
    print("\nof a run's last ten evaluations; [95 % stratified bootstrap over seeds]; differences seed by seed")
    for run in summary[summary["state"] == "failed"].itertuples():
        print(f"FAILED {run.folder}: {run.error}")
    if complete:
        draw_curves(folder, complete, curves)
        draw_scores(folder, complete)
    print(f"wrote  {', '.join(str(path) for path in sorted(folder.glob('*.[cp][sn][vg]')))}")


def draw_curves(folder: Path, complete: dict[str, pd.DataFrame], curves: pd.DataFrame) -> None:
    """Write study_returns.png: evaluation returns, mean over seeds and interval a combination, a panel a data set."""
    figure = Figure(figsize=(max(9, 6 * len(complete)), 4.5), layout="constrained")
    for axes, (dataset, part) in zip(
        figure.subplots(1, len(complete), squeeze=False)[0], complete.items(), strict=True
    ):
        for n, label in enumerate(dict.fromkeys(part["label"])):
            seeds = part[part["label"] == label]["seed"]
            rows_of = curves[(curves["dataset"] == dataset) & (curves["label"] == label) & curves["seed"].isin(seeds)]
            returns = rows_of.pivot(index="seed", columns="step", values="return_mean").dropna(axis=1)
            mean, low, high = with_interval([returns.to_numpy()])
            axes.plot(returns.columns, mean, color=f"C{n}", label=f"{label}, {len(returns)} seeds")
            axes.fill_between(returns.columns, low, high, color=f"C{n}", alpha=0.2, lw=0)
        robot = next(robot for robot in ciql.ROBOTS.values() if robot.env_id == part["env_id"].iloc[0])
        low, high = axes.get_ylim()  # of the curves: the references may be far away
        ciql.draw_references(axes, robot, part["data_return"].dropna().to_numpy())
        axes.set_ylim(low, max(high, 1.05 * part["data_return"].max()))
        axes.set_title(dataset)
    figure.savefig(folder / "study_returns.png", dpi=100)


def draw_scores(folder: Path, complete: dict[str, pd.DataFrame]) -> None:
    """Write study_scores.png: final scores of each combination, data sets side by side: seeds, mean and interval."""
    labels = pd.concat(complete.values())["label"].unique()
    figure = Figure(figsize=(max(6, 1.8 * len(complete) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    for x, part in enumerate(complete.values()):
        for n, label in enumerate(labels):
            values = part[part["label"] == label]["score"].to_numpy()
            if not len(values):
                continue
            place = x + (n - (len(labels) - 1) / 2) * 0.8 / len(labels)
            value, low, high = with_interval([values])
            axes.plot([place] * len(values), values, ".", color=f"C{n}", alpha=0.4)
            axes.plot([place], [value], "o", color=f"C{n}", label=label if x == 0 else None)
            axes.vlines([place], low, high, color=f"C{n}", linewidth=2)
    axes.set_xticks(range(len(complete)), [name.replace("-bullet-", "\n").replace("-v0", "") for name in complete])
    axes.set(ylabel="normalised score (0 random, 100 expert)", title="final scores: seeds, mean and 95 % interval")
    axes.legend(fontsize="small")
    figure.savefig(folder / "study_scores.png", dpi=100)


def main() -> None:
    try:
        own, runs = parse(sys.argv[1:])
        if not own.summarize:
            write_results(own.study, runs, run_study(own, runs))
        summarize(own.summarize or own.study)
    except (InputError, OSError) as error:
        other = isinstance(error, filelock.Timeout)
        remedy = " Another process works on this study: wait for it or stop it." if other else ""
        print(f"study: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        sys.exit(2)
    states = set(pd.read_csv((own.summarize or own.study) / "summary.csv")["state"])
    if "incomplete" in states:
        print(f"stopped; go on with the same command and --study {own.study}")
    sys.exit(130 if "incomplete" in states else 1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
