"""Every command line of the READMEs works, at small size; tables and names are the code's."""

# ruff: noqa: S102  (the examples are run)
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import make_bullet_dataset
import numpy as np
import pytest
import tables
import tyro
from conftest import ROOT, flags, hopper_file

import ciql_pybullet as ciql
import study

README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
OTHERS = [(ROOT / name / "README.md").read_text() for name in ("data", "study", "study/results")]


def python_of(text, words):
    """The Python example of a text that has these words."""
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (example,) = [example for example in examples if words in example]
    return example


def commands_of(text):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(python|pip|tensorboard) ", line)]
    return [re.sub(r" +#.*", "", command) for command in commands]


SMALL = {"device": "cpu", "compile": False, "max_steps": 4, "log_interval": 2, "eval_episodes": 1}


@pytest.fixture
def workplace(tmp_path, monkeypatch, no_network):
    """This folder has a finished run, a data set in the cache and one of the user's own."""
    (tmp_path / "cache").mkdir()
    hopper_file(tmp_path / "cache" / "hopper-bullet-mixed-v0.hdf5")
    hopper_file(tmp_path / "my.hdf5")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    ciql.train(ciql.Config(dataset="hopper-bullet-mixed-v0", name="RUN", **SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("line", commands_of(README))
def test_command(workplace, succeeds, line):
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", line))
    program, *arguments = shlex.split(line.split(" && ")[-1].removeprefix("python "))
    if program == "tensorboard":
        assert list(Path(arguments[-1]).glob("*/events.*"))
    elif program == "-m":
        assert arguments == ["pytest", "tests"]
    else:
        assert program == "ciql_pybullet.py"
        if "--resume" in arguments:
            arguments[-1] = "6"  # steps
        elif "--evaluate" not in arguments:
            arguments += flags(**SMALL, eval_interval=4)
        assert succeeds(*arguments)


@pytest.mark.slow
def test_what_a_run_leaves(workplace, succeeds):
    """A film, a policy for the Python example, and columns that the reference explains."""
    succeeds("--evaluate", "runs/RUN", "--film")
    assert 1000 < Path("runs/RUN/policy.gif").stat().st_size < 3e6
    columns = Path("runs/RUN/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"`{column}`" for column in columns} - {"`step`"} <= set(re.findall("`.*?`", REFERENCE))
    names = {"observation": np.zeros(15)}
    exec(python_of(REFERENCE, "load_policy"), names)
    assert names["action"].shape == (3,)


def test_recording_a_file(capsys):
    """The example's file is read as it was played, and a fall of Hopper is where it is shown."""
    seeded = "env.action_space.seed(0)\nenv.reset()"
    exec(python_of(REFERENCE, "import gymnasium, h5py").replace("env.reset()", seeded, 1), {})
    dataset = ciql.read_dataset("my.hdf5")
    assert dataset.layout == "D4RL's layout" and len(dataset.returns) == 10
    falls = dataset.transitions.terminations.nonzero().flatten()
    assert len(falls) == 10
    capsys.readouterr()
    exec(python_of(REFERENCE, "fall"), {})
    shown = [float(number) for number in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)]
    end = falls[0]
    assert np.allclose(shown, dataset.transitions.rewards[end - 2 : end + 3], atol=1e-3)
    assert shown[2] < min(shown[:2])


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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(0, "term"), (1, "setting")])
def test_example_of_how_to_change_it(workplace, monkeypatch, succeeds, fails, number, name):
    """A loss term with a column, a setting of one's own: in a copy."""
    Path("copy.py").write_text(patched(re.findall(r"```diff\n(.*?)```", README, re.DOTALL)[number]))
    spec = importlib.util.spec_from_file_location("changed", "copy.py")
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed", copy)
    spec.loader.exec_module(copy)
    own = {"reward_scale": 0.5} if name == "setting" else {}
    arguments = flags(dataset="hopper-bullet-mixed-v0", out_dir="own", **SMALL, **own)
    trained = succeeds(*arguments, main=copy.main)
    (folder,) = Path("own").iterdir()
    again = succeeds("--evaluate", folder, main=copy.main)
    assert re.findall(r"return .*", again) == re.findall(r"return .* episodes .*", trained)
    columns = (folder / "metrics.csv").read_text().split("\n")[0].split(",")
    assert ("effort" in columns) == (name == "term")
    assert ("reward_scale=0.5" in folder.name) == (name == "setting")


def test_settings_table():
    """The reference names every setting, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", REFERENCE, re.MULTILINE)
    shown = {name: value.replace("empty", "") for name, value in rows}
    for field in dataclasses.fields(ciql.Config):
        value = shown[field.name].replace("_", "")
        assert value == str(field.default).replace("_", "") or float(value) == field.default


def test_inline_dependencies_are_the_requirements():
    """What ``uv run`` reads at the top of the script (PEP 723) is what pip installs.

    pip has no way to let the fork stand for pybullet, so there pybullet_envs_gymnasium comes first.
    """
    script = (ROOT / "ciql_pybullet.py").read_text()
    block = re.match(r"# /// script\n(.*?)# ///\n", script, re.DOTALL)[1]
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.replace('"', "'") for line in lines if not line.startswith("#")]
    (envs,) = [line for line in required if line.startswith("pybullet_envs_gymnasium")]
    plain, _, marker = envs.partition("; ")
    assert inline["dependencies"] == [plain if line == envs else line for line in required]
    (override,) = inline["tool"]["uv"]["override-dependencies"]
    assert override in required and override.endswith(marker)
    assert f"pip install --no-deps {plain}" in README


OTHER_COMMANDS = [line.split(" && ")[-1] for text in OTHERS for line in commands_of(text)]


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_command_of_another_readme(command):
    """They take minutes to days, so they are parsed, not run; other tests run such commands."""
    program, *arguments = shlex.split(command)[1:]
    assert program in ("study/study.py", "data/make_bullet_dataset.py", "install")
    if program == "study/study.py":
        own, runs = study.parse(arguments)
        for folder in own.summarize:
            assert runs and (folder.parts[0] == "runs" or list(ROOT.glob(str(folder))))
    assert program == "study/study.py" or set(re.findall(r"\S+-v0", command)) <= set(ciql.DATASETS)
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", command))


def cells_of(text):
    """The cells of a table of final returns: (data set, method, text of the cell)."""
    cells = []
    lines = re.findall(r"^\| data .*\n(?:\|.*\n)+", text, re.MULTILINE)
    for block in lines:
        header, _, *rows = block.splitlines()
        names = [name.strip() for name in header.strip("|").split("|")]
        for row in rows:
            dataset, *values = [value.strip() for value in row.strip("|").split("|")]
            for name, value in zip(names[1:], values, strict=True):
                cells.append((dataset.split(" (")[0], name, value.replace("**", "")))
    return cells


RUNGS = {  # the ladder from CIQL to IQL: a column, and the method in the studies' tables
    "no penalty": "CIQL alpha=0 beta=1 tau=0.8 clamp_advantage=True",
    "β 3": "CIQL alpha=0 beta=3 tau=0.8 clamp_advantage=True",
    "τ 0.7": "CIQL alpha=0 beta=3 tau=0.7 clamp_advantage=True",
    "no clamp": "CIQL alpha=0 beta=3 tau=0.7 clamp_advantage=False",
}


@pytest.mark.parametrize("text", [README, OTHERS[2]], ids=["README", "results"])
def test_figures_are_those_of_the_studies(text):
    """Each cell is its row and column of the studies' tables; a column "A − B" is a difference."""
    finals = {}
    for folder in (ROOT / "study" / "results").glob("*/summary.csv"):
        summary, _ = tables.read_tables(folder.parent)
        for (dataset, method), runs in summary.groupby(["dataset", "method"]):
            name = dataset.replace("-bullet", "").partition("-v0")[0]
            finals[name, method] = runs["final_return"]
    cells = cells_of(text)
    assert cells
    for dataset, column, cell in cells:
        one, _, other = column.partition(" − ")
        one = RUNGS.get(one, one)
        other = RUNGS.get(other, other)
        if other:
            difference = tables.compare(finals[dataset, one], finals[dataset, other]).difference
            assert cell == str(difference), (dataset, column)
        else:
            assert cell == str(tables.mean_interval(finals[dataset, one])), (dataset, column)


RECORD = ["--level", "-1000", "--window", "4", "--rows", "150", "--out", "sets", "--id"]
KINDS = [f"hopper-bullet-{kind}-v0" for kind in ("random", "medium", "mixed")]


@pytest.mark.slow
def test_data_program(tmp_path, fails):
    """It writes files that are read as what was played: a fall of Hopper is a termination."""
    program = [sys.executable, ROOT / "data" / "make_bullet_dataset.py", *RECORD, *KINDS]
    result = subprocess.run(program, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for kind in KINDS:
        dataset = ciql.read_dataset(tmp_path / "sets" / f"{kind}.hdf5")
        t = dataset.transitions
        assert t.observations.shape[1] == 15 and t.actions.abs().max() <= 1
        assert t.terminations.sum() >= 1 and len(t.rewards) <= 150
        # a transition's reward is for moving on: never the 0 beside an episode's first observation
        assert (t.rewards != 0).all()
    assert len(dataset.returns) == 4
    assert f"stopped at {dataset.returns.mean():.1f} over 4 episodes" in dataset.source
    main = lambda: make_bullet_dataset.main(tyro.cli(make_bullet_dataset.Recipe))
    fails(*RECORD, KINDS[0], named="is there already", main=main)
    fails(*RECORD, "hopper-medium", named="id is", main=main)
