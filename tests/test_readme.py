"""Every command line of the READMEs works, at small size; tables and names are the code's."""

import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import tyro
from conftest import ROOT, hopper_file, run_main

sys.path[:0] = [str(ROOT / "study"), str(ROOT / "data")]
import make_bullet_dataset

import ciql_pybullet
import study
from ciql_pybullet import Config, Transitions, read_dataset, read_transitions

README = (ROOT / "README.md").read_text()
OTHERS = [
    (ROOT / folder / "README.md").read_text() for folder in ("data", "study", "study/results")
]


def commands_of(text):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|pip|tensorboard) ", line)]


COMMANDS = commands_of(README)
SMALL = "--device cpu --no-compile --max-steps 4 --log-interval 2 --eval-episodes 1"


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 10


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a finished run, a data set in the cache and one of the user's own."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "cache").mkdir()
    hopper_file(folder / "cache" / "hopper-bullet-mixed-v0.hdf5")
    hopper_file(folder / "my.hdf5")
    own = {
        "D4RL_DATASET_DIR": str(folder / "cache"),
        "WANDB_MODE": "offline",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    environment = os.environ | own  # a thread each, as two run at a time

    def run(command):
        return subprocess.run(
            shlex.split(command),
            check=False,
            cwd=folder,
            capture_output=True,
            text=True,
            env=environment,
            timeout=100,
        )

    flags = f"--dataset hopper-bullet-mixed-v0 {SMALL} --name RUN"
    first = run(f"{sys.executable} {ROOT}/ciql_pybullet.py {flags}")
    assert first.returncode == 0, first.stderr
    run.folder = folder
    return run


def in_small(command):
    """The same command line at small size, run from the clone."""
    command = command.split(" && ")[-1]
    if command.startswith("tensorboard"):
        return (
            f"{sys.executable} -m tensorboard.main {command.removeprefix('tensorboard ')} --inspect"
        )
    if "-m pytest" in command or "benchmark" in command or "--help" in command:
        return (
            command.replace(
                "python ", f"{sys.executable} {'' if '-m' in command else f'{ROOT}/'}", 1
            )
            + " --help"
        )
    command = re.sub(
        r" --max-steps \d+", "", command.replace("python ", f"{sys.executable} {ROOT}/", 1)
    )
    if "--evaluate" in command:
        return command
    return f"{command} --max-steps 6" if "--resume" in command else f"{command} {SMALL}"


@pytest.fixture(scope="module")
def results(workplace):
    """What each command line gave; two run at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(workplace, map(in_small, COMMANDS)), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_command(results, command):
    result = results[command]
    if "--wandb-project" in command and not importlib.util.find_spec("wandb"):
        assert (result.returncode, result.stderr.count("\n")) == (
            2,
            1,
        ) and "pip install wandb" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert result.stdout
    for name in re.findall(r"-r (\S+)", command):  # .ci/run installs with them
        assert (ROOT / name).is_file()


def test_film(results, workplace):
    assert any("--film" in command for command in COMMANDS)
    film = f"{workplace('pwd').stdout.strip()}/runs/RUN/policy.gif"
    with PIL.Image.open(film) as image:
        assert image.format == "GIF" and image.n_frames > 1 and image.size == (320, 240)
    assert os.path.getsize(film) < 3e6


PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_python(workplace, code):
    result = workplace(f"env PYTHONPATH={ROOT} {sys.executable} -c {shlex.quote(code)}")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_load_policy(workplace):
    (code,) = [code for code in PYTHON if "load_policy" in code]
    before = "import numpy; observation = numpy.zeros(15)\n"
    run_python(workplace, before + code + "assert action.shape == (3,)\n")


def test_writing_a_file(tmp_path, monkeypatch):
    """What the example writes is read as it was: 3 steps and a fall, 2 steps and a cut."""
    (code,) = [code for code in PYTHON if "h5py.File" in code]
    monkeypatch.chdir(tmp_path)
    episodes = []
    for steps, terminated in ((3, True), (2, False)):
        episodes.append(
            types.SimpleNamespace(
                observations=np.full((steps, 2), steps) + np.arange(steps)[:, None],
                next_observations=np.full((steps, 2), steps) + np.arange(1, steps + 1)[:, None],
                actions=np.zeros((steps, 1)),
                rewards=np.arange(steps) + 10.0,
                terminated=terminated,
            )
        )
    exec(code, {"episodes": episodes})  # noqa: S102
    transitions = read_transitions("my.hdf5")
    assert transitions.rewards.tolist() == [10, 11, 12, 10, 11]
    assert transitions.terminations.tolist() == [0, 0, 1, 0, 0]
    assert transitions.observations[:, 0].tolist() == [3, 4, 5, 2, 3]
    assert transitions.next_observations[:, 0].tolist() == [4, 5, 6, 3, 4]


def test_minari(monkeypatch):
    """The example, on an object with the two attributes of a Minari data set that it uses."""
    (code,) = [code for code in PYTHON if "minari" in code]
    episode = types.SimpleNamespace(
        observations=np.arange(8.0).reshape(4, 2),
        actions=np.zeros((3, 1)),
        rewards=np.arange(3.0),
        terminations=np.array([False, False, True]),
    )
    spec = types.SimpleNamespace(env_spec=types.SimpleNamespace(id="Mine-v0"))
    dataset = types.SimpleNamespace(iterate_episodes=lambda: iter([episode] * 2), spec=spec)
    minari = types.SimpleNamespace(load_dataset=lambda name: dataset)
    monkeypatch.setitem(sys.modules, "minari", minari)
    given = []
    monkeypatch.setattr(ciql_pybullet, "train", lambda config, data: given.extend((config, data)))
    exec(code, {"__name__": "__main__"})  # noqa: S102
    config, data = given
    assert config.env_id == "Mine-v0"
    assert data.observations.tolist() == [[0, 1], [2, 3], [4, 5]] * 2
    assert data.next_observations.tolist() == [[2, 3], [4, 5], [6, 7]] * 2
    assert data.terminations.tolist() == [0, 0, 1] * 2


def patched(diff):
    """The script with the changes of a diff in the README; hunks are apart by @@."""
    source = (ROOT / "ciql_pybullet.py").read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_examples_of_how_to_change_it(workplace, tmp_path):
    """A loss term with a column, and another policy, both in one copy of the script."""
    term, policy = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    for n, diff in enumerate((term, policy)):
        script = tmp_path / f"changed{n}.py"
        script.write_text(patched(diff))
        flags = f"--dataset hopper-bullet-mixed-v0 {SMALL} --out-dir {tmp_path} --name run{n}"
        result = workplace(f"{sys.executable} {script} {flags}")
        assert result.returncode == 0, result.stderr
        again = workplace(f"{sys.executable} {script} --evaluate {tmp_path}/run{n}")
        assert again.returncode == 0, again.stderr
        evaluations = [re.findall(r"return .*", run.stdout)[-1] for run in (result, again)]
        assert evaluations[0] == evaluations[1]
    columns = [(tmp_path / f"run{n}" / "metrics.csv").read_text().split("\n")[0] for n in (0, 1)]
    assert "effort" in columns[0] and "effort" not in columns[1]


def test_example_of_an_agent(tmp_path):
    (code,) = [code for code in PYTHON if "(ciql.CIQL)" in code]
    names = {"ciql": ciql_pybullet}
    exec(code, names)  # noqa: S102
    config = Config(device="cpu", hidden_sizes=(8,), batch_size=4)
    agent = names["SmallTargets"](2, 1, config)
    rewards = torch.tensor([1.0, -4.0, 2.0])
    data = Transitions(torch.randn(3, 2), torch.zeros(3, 1), rewards, torch.randn(3, 2), rewards)
    assert agent.prepare(data).rewards.tolist() == [0.25, -1.0, 0.5]


def test_columns_of_metrics_are_explained(workplace, results):
    header = (workplace.folder / "runs" / "RUN" / "metrics.csv").read_text().splitlines()[0]
    for column in header.split(","):
        assert f"`{column}`" in README or column == "step", column


def test_settings_table():
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    section = README.split("## Settings and recipes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    assert len(rows) >= 10
    for name, value in rows:
        default = defaults[name]
        shown = [float(v) for v in value.replace(",", "").replace("−", "-").split()]
        assert shown == list(default if isinstance(default, tuple) else (default,)), name


def test_inline_dependencies_are_the_requirements():
    """What ``uv run`` reads at the top of the script (PEP 723) is what pip installs."""
    script = (ROOT / "ciql_pybullet.py").read_text()
    block = re.match(r"# /// script\n(.*?)# ///\n", script, re.DOTALL)[1]
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert inline["dependencies"] == [line for line in lines if not line.startswith("#")]
    assert inline["requires-python"] == "==3.11.*"


def test_names_in_the_readme_exist():
    for name in (
        "expectile_loss",
        "conservative_penalty",
        "awr_weights",
        "load_policy",
        "CIQL",
        "Config",
        "train",
    ):
        assert f"`{name}" in README or f"import {name}" in README
        assert hasattr(ciql_pybullet, name)


def test_commands_of_the_other_readmes():
    """They take minutes to days, so they are parsed, not run; other tests run such commands."""
    commands = [command.split(" && ")[-1] for text in OTHERS for command in commands_of(text)]
    assert sum("study.py" in command for command in commands) >= 4
    for command in commands:
        program, *arguments = shlex.split(command)[1:]
        if program == "study/study.py":
            own, runs = study.parse(arguments)
            assert runs
            folder = Path(own.summarize or "runs")
            assert folder.parts[0] == "runs" or (ROOT / folder).is_dir()
        elif program == "data/make_bullet_dataset.py":
            assert set(re.findall(r"\S+-v0", command)) <= set(ciql_pybullet.DATASETS)
        elif program == "install":
            assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", command))
        else:
            raise AssertionError(command)


def test_results_are_redrawn_from_their_csvs(tmp_path, capsys):
    """And the figures that the READMEs show are what is printed."""
    shutil.copytree(ROOT / "study" / "results", tmp_path / "results")
    folders = [path.parent for path in (tmp_path / "results").glob("*/summary.csv")]
    assert folders
    for folder in folders:
        for picture in folder.glob("*.png"):
            picture.unlink()
        study.summarize(folder)
        assert len(list(folder.glob("*.png"))) == 2
    for command in (command for text in OTHERS for command in commands_of(text)):
        if "--baseline" in command:
            own, _ = study.parse(shlex.split(command)[2:])
            study.summarize(tmp_path / "results" / Path(own.summarize).name, own.baseline)
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    everything = " ".join(printed)
    interval = r"\[[-\d.]+, [-\d.]+\]"
    cells = re.findall(rf"-?[\d.]+ {interval}", README)
    assert len(cells) >= 5 and all(cell in everything for cell in cells)
    shown = [
        " ".join(line.split())
        for text in OTHERS
        for line in re.findall(rf"^[^|].*{interval}$", text, re.MULTILINE)
        if "=" in line.split()[0] or "policy" in line
    ]
    assert len(shown) >= 20 and set(shown) <= printed, set(shown) - printed


def test_data_program(tmp_path, monkeypatch, capsys):
    """It writes files that are read as what was played: a fall of Hopper is a termination."""
    ids = [f"hopper-bullet-{kind}-v0" for kind in ("random", "medium", "mixed")]
    common = ["--level", "-1000", "--window", "4", "--rows", "150", "--out", "sets", "--id"]
    command = [sys.executable, ROOT / "data" / "make_bullet_dataset.py", *common, *ids]
    result = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "sets").iterdir()}
    assert len(before) == 3
    for wrong, cause in (
        ([ids[1]], "is there already"),
        (["hopper-medium"], "id is"),
        ([ids[0], "ant-bullet-mixed-v0"], "id is"),
        (["ant-bullet-mixed-v0", "--window", "0"], "window"),
    ):
        main = lambda: make_bullet_dataset.main(tyro.cli(make_bullet_dataset.Recipe))
        code, _, err = run_main(monkeypatch, capsys, [*common, *wrong], main)
        assert (code, err.count("\n")) == (2, 1) and cause in err
    assert {path: path.read_bytes() for path in (tmp_path / "sets").iterdir()} == before
    for kind in ("random", "medium", "mixed"):
        t = read_transitions(tmp_path / "sets" / f"hopper-bullet-{kind}-v0.hdf5")
        assert t.observations.shape[1] == 15 and t.actions.abs().max() <= 1
        assert t.terminations.sum() >= 1
        # a transition's reward is for moving on: never the 0 beside an episode's first observation
        assert (t.rewards != 0).all()
        assert len(t.rewards) <= 150
    mixed = read_dataset(tmp_path / "sets" / "hopper-bullet-mixed-v0.hdf5")
    assert len(mixed.returns) == 4
    assert f"stopped at {mixed.returns.mean():.1f} over 4 episodes" in mixed.source
