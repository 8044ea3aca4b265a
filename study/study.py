"""Many runs of ciql_pybullet.py side by side on Ray; tables.py has their statistics.

    python study/study.py --methods CIQL IQL cloning --seeds 0 1 2 --study runs/methods
    python study/study.py --seeds 0 1 2 --grid alpha 0 1 --max-steps 50000 --study runs/penalty
    python study/study.py --summarize runs/methods runs/penalty

A study is every combination of data sets, methods, settings and seeds. The same command again
skips the runs that are complete and resumes the others; with more seeds, values, data sets or
methods it trains only what is new.
"""

import contextlib
import dataclasses
import hashlib
import itertools
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
from typing import Any

import filelock
import numpy as np
import pandas as pd
import ray
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import variants
from tables import KEYS, draw, figures_of, summarize

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
    summarize: tuple[Path, ...] = ()  # train nothing: print the results in these studies' folders
    baseline: str = ""  # with --summarize: the method that differences are to; none: the first


Row = dict[str, Any]  # of summary.csv, with these columns after the keys and what varies:
COLUMNS = ["state", "step", "final_return", "evaluations", "score"]
COLUMNS += ["env_id", "data_return", "version", "folder", "error"]


@dataclass
class Run:
    """One training of a study."""

    method: str
    config: Config
    row: Row
    checksum: str = ""  # of its data


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
    found: dict[Config, tuple[Config, str, Row]] = {}
    for run in runs.values():
        c = run.config
        key = Config(c.dataset, c.env_id, c.max_episode_steps)
        if key not in found:
            env_id = ciql.environment_id(key)
            file = ciql.find_dataset(key.dataset)
            here = dataclasses.replace(key, dataset=str(file.absolute()), env_id=env_id)
            data = ciql.load_dataset(here)
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
    evaluations = ciql.evaluations_of(checkpoint["rows"])
    last = evaluations[-1]["step"] if evaluations else 0
    return checkpoint, checkpoint["step"] == last == checkpoint["config"].max_steps


JUDGED = {"max_steps", "eval_interval", "eval_episodes"}  # neutral settings that make final returns


def facts_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the runs of a method on a data set have in common, besides the seed."""
    return {
        name: value
        for name, value in vars(checkpoint["config"]).items()
        if name in JUDGED or name not in ciql.NEUTRAL_SETTINGS | {"seed"}
    } | {"data of checksum": checkpoint["facts"]["data_checksum"]}


def runs_to_train(runs: dict[str, Run], rows: dict[str, Row], folder: Path) -> list[Run]:
    """Those that are not complete.

    Raises InputError where a run differs from one that is there, of its method and data set and of
    any seed, in more than the seed: a table would average the two.
    """
    rest = []
    saved = {name: saved_run(folder / name) for name in rows | runs}
    for name, run in runs.items():
        if not saved[name][1]:
            rest.append(run)
        own = facts_of({"config": run.config, "facts": {"data_checksum": run.checksum}})
        for other, row in rows.items():
            checkpoint, _ = saved[other]
            is_kin = all(row[key] == str(run.row[key]) for key in ("dataset", "method"))
            if not checkpoint or not is_kin:
                continue
            for fact, value in facts_of(checkpoint).items():
                if own[fact] != value:
                    raise InputError(
                        f"{name} has {fact} {own[fact]}, but {other} is there with {value}; name"
                        " another --study"
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
def version_of(folder: Path) -> str:
    """The script that trained a run: the beginning of its text's SHA-256, or several."""
    digests = set()
    for path in folder.glob("code-from-step-*/ciql_pybullet.py"):
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return " ".join(sorted(digests))


def write_results(folder: Path, rows: dict[str, Row]) -> None:
    """Bring the rows up to date; write summary.csv, and curves.csv, a row per evaluation."""
    curves = []
    for name, row in rows.items():
        row["state"] = "failed" if row["error"] else "incomplete"
        row["step"] = 0
        checkpoint, is_complete = saved_run(folder / name)
        if not checkpoint:
            continue
        row["version"] = version_of(folder / name)
        row["step"] = checkpoint["step"]
        evaluations = ciql.evaluations_of(checkpoint["rows"])
        for point in evaluations:
            curves.append({key: row[key] for key in KEYS} | point)
        if is_complete:
            means = np.array([point["return_mean"] for point in evaluations])
            row |= figures_of(means, row["env_id"]) | {"state": "complete", "error": ""}
    summary = pd.DataFrame(list(rows.values()), dtype=object)
    for path, frame in (("summary.csv", summary), ("curves.csv", pd.DataFrame(curves))):
        ciql.write_whole(folder / path, frame.to_csv(index=False).encode())


# ----------------------------------------------------------------------------------------- commands
def run_study(own: Study, named: dict[str, Run]) -> int:
    """Train the named runs that are not complete; write and print the results; the exit code.

    Raises InputError before anything starts.
    """
    folder = own.study.absolute()
    add_data(named)
    rows = read_known(folder)
    rest = runs_to_train(named, rows, folder)
    for name, run in named.items():
        rows[name] = run.row
    print(f"study  {len(named)} runs, {len(rest)} of them to train; logs: {folder}/*.log")
    if rest:
        start_ray(own.ray_address)
        set_threads(rest)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock", timeout=0):  # one process at a time works on a study
        write_results(folder, rows)
        try:
            if rest:
                train_runs(rest, own.gpu_share)
        finally:
            ray.shutdown()
            write_results(folder, rows)
    summarize([folder])
    draw(folder)
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
            summarize(own.summarize, own.baseline)
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
