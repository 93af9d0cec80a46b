"""The command line: exit codes, one-line errors, help. Few subprocesses, as torch loads slowly."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import StateError

CLASSIFY = """\
data:
  train: {list: train.csv}
  test: {list: test.csv}
model:
  size: {width: 96, depth: 2, heads: 2}
objective: {kind: classify, num_classes: 5}
optim: {lr: 1e-3, batch_size: 8, epochs: 2}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe():
    Path("r.yaml").write_text(CLASSIFY)
    for name in ("train.csv", "test.csv"):
        Path(name).write_text("a.mp4 1\nb.mp4 2\n")
    return "r.yaml"


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def shell(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "distill", *arguments], capture_output=True, text=True
    )


def test_fresh_clone_names_every_missing_input():
    done = shell("train", "recipes/L14.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("recipes/L14.yaml: data.train.list: not set (")
    assert first.endswith("set data.train.list=PATH")
    assert second.startswith("recipes/L14.yaml: objective.teacher.weights.checkpoint: ")
    assert "huggingface.co/OpenGVLab/InternVideo2-Stage2_1B-224p-f4, which is gated" in second
    assert second.endswith("set objective.teacher.weights.checkpoint=PATH")
    assert list(Path().iterdir()) == []


def test_help_does_not_wait_for_torch():
    code = "import sys, distill.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_with_its_exit_code(recipe, monkeypatch, number, code):
    closed = []

    def wait(*_, folder):
        try:
            signal.raise_signal(number)
        finally:
            closed.append(number)  # as worker processes are

    monkeypatch.setattr("distill.evaluation.evaluate.evaluate_recipe", wait)
    # Jobs that a shell starts in the background, tests among them, begin with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("evaluate", recipe, "--checkpoint", recipe)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, closed) == (code, [number])


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("train", "cache-teacher", "evaluate", "plan", "schema", "cache"):
        assert f"│ {command} " in result.output
    assert "run the teacher once" in result.output


@pytest.mark.parametrize("command", ["train", "cache-teacher", "evaluate", "plan"])
def test_help_of_a_command_explains_recipe_and_overrides(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "A recipe file, or the name of a shipped one" in result.output
    assert "SECTION.KEY=VALUE" in result.output


@pytest.mark.parametrize("command", ["train", "cache-teacher", "evaluate", "plan"])
def test_bare_command_suggests_a_recipe(command):
    result = run(command)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"name a recipe, as in: distill {command} quickstart (shipped: B14, L14")


def test_mistake_in_a_recipe_is_one_line(recipe):
    Path(recipe).write_text(CLASSIFY.replace("lr: 1e-3", "lr: 1e-3, lrr: 2"))
    result = run("train", recipe)
    assert result.exit_code == 2
    assert result.stderr == "r.yaml: optim.lrr: unknown key, did you mean 'lr'?\n"


def test_unknown_recipe_and_option_have_the_same_exit_code():
    result = run("plan", "L15")
    assert result.exit_code == 2
    assert result.stderr.startswith("L15: no such file, did you mean 'L14'?")
    assert run("plan", "L14", "--nosuch").exit_code == 2


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_missing_list_is_found_before_anything_is_written(recipe, command):
    Path("test.csv").unlink()
    before = sorted(Path().iterdir())
    result = run(command, recipe)
    assert result.exit_code == 2
    assert result.stderr == (
        "r.yaml: data.test.list: test.csv: no such file; set data.test.list=PATH\n"
    )
    assert sorted(Path().iterdir()) == before


def test_wrong_state_is_one_line_and_bugs_are_tracebacks(recipe, monkeypatch):
    def refuse(*_):
        raise StateError("runs/r: was started with other settings")

    monkeypatch.setattr("distill.train.train", refuse)
    result = run("train", recipe)
    assert (result.exit_code, result.stderr) == (2, "runs/r: was started with other settings\n")

    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("distill.train.train", fail)
    result = run("train", recipe)
    assert isinstance(result.exception, ZeroDivisionError)


def test_train_passes_recipe_and_folder_and_shows_the_scores(recipe, monkeypatch):
    calls = []

    def train(loaded, folder):
        calls.append((loaded.optim.lr, folder))
        scores = {"top1": 12.5, "top5": 62.5, "seconds": 1.0}
        return {"parameters": 42, "train_seconds": 3.0, "evaluation": scores}

    monkeypatch.setattr("distill.train.train", train)
    result = run("train", recipe, "optim.lr=5e-4", "run.folder=out")
    assert result.exit_code == 0
    assert calls == [(5e-4, Path("out"))]
    assert "12.50" in result.output
    assert "62.50" in result.output


def test_train_runs_a_study(recipe, monkeypatch):
    text = CLASSIFY + "stages: {a: {}, b: {model: {weights: {checkpoint: 'stage:a'}}}}\n"
    Path("s.yaml").write_text(text)
    folders = []

    def train(loaded, folder):
        folder.mkdir(parents=True)
        folders.append(str(folder))
        return {"parameters": 42, "train_seconds": 3.0, "evaluation": None}

    monkeypatch.setattr("distill.study.train", train)
    assert run("train", "s.yaml").exit_code == 0
    assert folders == ["runs/s/a", "runs/s/b"]


def test_cache_teacher_passes_its_limit_and_part(monkeypatch):
    class Report:
        def lines(self):
            return ["cache c: 3 of 3 records"]

    calls = []

    def build(loaded, *, limit, part):
        calls.append((loaded.name, limit, str(part)))
        return Report()

    monkeypatch.setattr("distill.cache.build.build_cache", build)
    Path("l.csv").write_text("a.mp4 1\n")
    overrides = ["data.train.list=l.csv", "objective.teacher.weights.checkpoint=l.csv"]
    result = run("cache-teacher", "S14", *overrides, "--limit", "3", "--shard", "2/4")
    assert result.exit_code == 0
    assert calls == [("S14", 3, "part 2 of 4")]
    assert "cache c: 3 of 3 records" in result.output
    assert run("cache-teacher", "S14", "--limit", "0").exit_code == 2


def test_evaluate_takes_the_runs_own_weights_or_those_given(recipe, monkeypatch):
    calls = []

    def evaluate_recipe(loaded, path, *, folder):
        calls.append((str(path), folder))
        names = ("top1", "top5", "mean_class_accuracy", "map", "video_map_interpolated")
        scores = {name: 50.0 + number for number, name in enumerate(names)}
        intervals = {name: [40.0, 60.0] for name in names}
        return {
            **scores,
            **{f"{name}_of_read": value * 1.25 for name, value in scores.items()},
            "num_clips": 10,
            "num_videos": 10,
            "num_missing": 2,
            "confidence_intervals": {"confidence": 0.95, **intervals},
        }

    monkeypatch.setattr("distill.evaluation.evaluate.evaluate_recipe", evaluate_recipe)
    result = run("evaluate", recipe)
    assert result.exit_code == 2
    assert result.stderr == (
        "runs/r/model.safetensors: no such file; train first, or give --checkpoint FILE\n"
    )
    Path("w.safetensors").write_text("")
    result = run("evaluate", recipe, "--checkpoint", "w.safetensors", "--folder", "out")
    assert result.exit_code == 0
    assert calls == [("w.safetensors", Path("out"))]
    assert table_of(result.output) == [
        ["", "% of 10 clips", "95% interval", "% of 8 that could be read"],
        ["top-1", "50.00", "40.00 to 60.00", "62.50"],
        ["top-5", "51.00", "40.00 to 60.00", "63.75"],
        ["mean class accuracy", "52.00", "40.00 to 60.00", "65.00"],
        ["mAP", "53.00", "40.00 to 60.00", "66.25"],
        ["mAP of videos, interpolated as ActivityNet's", "54.00", "40.00 to 60.00", "67.50"],
    ]


def table_of(output: str) -> list[list[str]]:
    """The cells of a table on the console."""
    rows = [line.strip("│┃") for line in output.splitlines() if line[:1] in ("│", "┃")]
    return [[cell.strip() for cell in re.split("[│┃]", row)] for row in rows]


def test_evaluate_takes_one_thing_at_a_time():
    message = "give a RECIPE, --scores FILE or --compare A B: one of the three\n"
    for arguments in (["S14", "--scores", "f"], ["--scores", "f", "--compare", "a", "b"]):
        result = run("evaluate", *arguments)
        assert (result.exit_code, result.stderr) == (2, message)


def test_evaluate_asks_which_stage_of_a_study(recipe):
    Path("s.yaml").write_text(CLASSIFY + "stages: {a: {}, b: {}}\n")
    result = run("evaluate", "s.yaml")
    assert (result.exit_code, result.stderr) == (2, "s: choose one with --stage: a, b\n")
    result = run("evaluate", "s.yaml", "--stage", "b")
    assert result.stderr.startswith("runs/s/b/model.safetensors: no such file")
    result = run("evaluate", recipe, "--stage", "b")
    assert result.stderr == "r: has no stages; leave --stage\n"


def test_plan_prints_a_table_and_json():
    result = run("plan", "L14")
    assert result.exit_code == 0
    for text in ("0.8376 TFLOP", "0.8415 TFLOP", "5.101 TFLOP", "327,183,872", "peak 0.008"):
        assert text in result.output
    result = run("plan", "L14", "--json", "--tflops", "800")
    figures = json.loads(result.output)
    assert figures["steps"] == 53_800
    assert figures["sustained_tflops"] == 800
    assert figures["cache"]["record_bytes"]["codes"] == 1_736_064


def test_plan_of_a_study_has_a_part_for_each_stage(recipe):
    Path("s.yaml").write_text(CLASSIFY + "stages: {a: {}, b: {optim: {epochs: 5}}}\n")
    figures = json.loads(run("plan", "s.yaml", "--json").output)
    assert {name: part["steps"] for name, part in figures.items()} == {"a": 2, "b": 5}


def test_plan_of_students_has_a_part_for_each_and_one_for_all():
    figures = json.loads(run("plan", "SBL14", "--json").output)
    steps = {name: part["steps"] for name, part in figures["students"].items()}
    assert steps == {"S14": 26_900, "B14": 26_900, "L14": 53_800}
    assert figures["together"]["students"] == ["S14", "B14", "L14"]
    result = run("plan", "SBL14")
    assert result.output.index("SBL14/L14") < result.output.index("SBL14, together")
    assert "read once for all" in result.output


def test_what_students_lack_is_told_once():
    result = run("train", "SBL14", "students.B14.model.weights={checkpoint: b.pt}")
    assert result.exit_code == 2
    keys = [line.split(":")[1].strip() for line in result.stderr.splitlines()]
    assert keys == [
        "data.train.list",
        "objective.teacher.weights.checkpoint",
        "students.B14.model.weights.checkpoint",
    ]


def test_the_cache_of_students_is_made_once(monkeypatch):
    calls = []

    def build(loaded, **_):
        calls.append(loaded.name)
        return type("Report", (), {"lines": lambda self: ["cache c: done"]})()

    monkeypatch.setattr("distill.cache.build.build_cache", build)
    Path("l.csv").write_text("a.mp4 1\n")
    overrides = ["data.train.list=l.csv", "objective.teacher.weights.checkpoint=l.csv"]
    result = run("cache-teacher", "SBL14", *overrides)
    assert (result.exit_code, calls) == (0, ["SBL14/S14"])


def test_schema_is_json():
    schema = json.loads(run("schema").output)
    assert schema["properties"]["optim"]["$ref"] == "#/$defs/Optim"


def test_termination_handler_is_put_back(recipe):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run("plan", recipe)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
