"""Studies: stages in order, each from the weights of the one before, and one table."""

import fcntl
import json
from pathlib import Path

import pytest
from rich.console import Console

from distill import study as module
from distill.errors import StateError
from distill.recipe_file import load_recipe
from distill.study import resolve_stages, results_table, run_study, table_rows

STUDY = """\
data:
  train: {list: train.csv}
  val: {list: val.csv}
  test: {list: test.csv}
model:
  size: {width: 96, depth: 4, heads: 2}
optim: {lr: 1e-3, batch_size: 8, epochs: 2}
stages:
  teacher:
    objective: {kind: classify, num_classes: 5}
  student:
    objective:
      kind: distill
      teacher:
        size: {width: 96, depth: 4, heads: 2}
        weights: {checkpoint: 'stage:teacher'}
        layers: 2
        interval: 1
      cache: {folder: cache}
  finetune:
    model: {weights: {checkpoint: 'stage:student'}}
    objective: {kind: classify, num_classes: 5}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(STUDY)
    return load_recipe("s.yaml")


@pytest.fixture
def trained(monkeypatch):
    """Stands for training: notes what it is asked for, and keeps what is finished."""
    calls = []

    def train(recipe, folder):
        path = Path(folder) / "summary.json"
        if path.exists():
            return json.loads(path.read_text())
        calls.append((recipe, str(folder)))
        scores = {"top1": 50.0 + len(calls), "top5": 90.0, "seconds": 2.0}
        is_scored = recipe.objective.kind == "classify"
        summary = {
            "parameters": 1000 * len(calls),
            "train_seconds": 10.0,
            "evaluation": scores if is_scored else None,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary))
        (path.parent / "model.safetensors").write_text(f"weights of call {len(calls)}")
        return summary

    monkeypatch.setattr(module, "train", train)
    return calls


def test_stages_run_in_order_from_the_weights_of_those_before(study, trained):
    run_study(study)
    folders = ["runs/s/teacher", "runs/s/student", "runs/s/finetune"]
    assert [folder for _, folder in trained] == folders
    student, finetune = trained[1][0], trained[2][0]
    weights = student.objective.teacher.weights
    assert weights.checkpoint == "runs/s/teacher/model.safetensors"
    assert finetune.model.weights.checkpoint == "runs/s/student/model.safetensors"


def test_any_of_several_teachers_may_be_an_earlier_stage(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = "others: {second: {size: *size, weights: {checkpoint: 'stage:teacher'}, layers: 1}}"
    text = STUDY.replace("size: {width", "size: &size {width", 1)
    text = text.replace("{checkpoint: 'stage:teacher'}", "{checkpoint: main.pth}")
    Path("s.yaml").write_text(text.replace("      cache:", f"      {other}\n      cache:"))
    study = load_recipe("s.yaml")
    run_study(study)
    objective = trained[1][0].objective
    assert objective.others["second"].weights.checkpoint == "runs/s/teacher/model.safetensors"
    assert objective.teacher.weights.checkpoint == "main.pth"
    Path("runs/s/teacher/model.safetensors").write_text("others")
    with pytest.raises(StateError, match="^runs/s/student: began from runs/s/teacher, which has"):
        run_study(study)


def test_summary_has_a_row_for_each_evaluated_stage_with_the_time_of_all_it_builds_on(
    study, trained
):
    summary = run_study(study)
    assert summary["rows"] == [
        {"name": "teacher", "parameters": 1000, "top1": 51.0, "top5": 90.0, "seconds": 12.0},
        {"name": "finetune", "parameters": 3000, "top1": 53.0, "top5": 90.0, "seconds": 32.0},
    ]
    assert set(summary["stages"]) == {"teacher", "student", "finetune"}
    assert json.loads(Path("runs/s/summary.json").read_text()) == summary


def test_finished_stages_are_not_run_again(study, trained):
    first = run_study(study)
    assert len(trained) == 3
    assert run_study(study) == first
    assert len(trained) == 3


def test_interrupted_study_goes_on_with_the_next_stage(study, trained):
    run_study(study)
    Path("runs/s/finetune/summary.json").unlink()
    run_study(study)
    assert [folder for _, folder in trained[3:]] == ["runs/s/finetune"]


@pytest.mark.parametrize("begun", ["summary.json", "checkpoints/step-00000001/state.json"])
def test_stage_of_weights_that_are_no_more_is_refused(study, trained, begun):
    run_study(study)
    Path("runs/s/teacher/summary.json").unlink()
    Path("runs/s/student/summary.json").unlink()
    path = Path("runs/s/student") / begun
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    for _ in range(2):  # the second time finds the teacher finished
        with pytest.raises(StateError) as error:
            run_study(study)
        assert str(error.value) == (
            "runs/s/student: began from runs/s/teacher, which has been trained anew since; "
            "delete runs/s/student to train it again"
        )


def test_stage_that_was_trained_anew_with_the_same_result_keeps_what_follows(study, trained):
    run_study(study)
    weights = Path("runs/s/teacher/model.safetensors").read_text()
    Path("runs/s/teacher/summary.json").unlink()
    trained.clear()
    assert run_study(study)["stages"]["finetune"]["parameters"] == 3000
    assert Path("runs/s/teacher/model.safetensors").read_text() == weights


def test_two_processes_do_not_run_the_same_study(study, trained):
    folder = Path("runs/s")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="^runs/s: another process is training there; wait"):
            run_study(study)
    assert trained == []


def test_files_of_ones_own_are_left_alone(study):
    recipe = study.stages["teacher"]
    assert resolve_stages(recipe, study) == recipe


def test_averaged_weights_have_a_row_of_their_own():
    scores = {"top1": 50.0, "top5": 90.0, "seconds": 3.0}
    summary = {"parameters": 7, "train_seconds": 10.0, "evaluation": scores}
    averaged = {"evaluation": {**scores, "top1": 60.0, "seconds": 4.0}, "weights": "x"}
    rows = table_rows({"a": {**summary, "ema": averaged}, "b": {**summary, "ema": None}})
    found = [(row["name"], row["top1"], row["seconds"]) for row in rows]
    assert found == [("a", 50.0, 13.0), ("a, averaged", 60.0, 14.0), ("b", 50.0, 13.0)]


def test_table_shows_the_rows():
    summary = {
        "parameters": 23_043_840,
        "train_seconds": 100.4,
        "evaluation": {"top1": 87.654, "top5": 99.0, "seconds": 20.0},
    }
    rows = table_rows({"scratch": summary, "distill": {**summary, "evaluation": None}})
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table(rows, title="t"))
    (line,) = [line for line in capture.get().splitlines() if "scratch" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "scratch", "23,043,840", "87.65", "99.00", "120",
    ]  # fmt: skip
    assert "distill" not in capture.get()
