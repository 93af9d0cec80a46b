"""The quickstart in a shrunken form: real videos, cache, student and table; stopped, resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.recipe_file import load_recipe
from distill.students.warmstart import file_sha256

SHRUNKEN = (
    "data.demo.train_clips=120",
    "data.demo.val_clips=10",
    "data.demo.test_clips=20",
    "data.train.share=0.5",
    "run.log_steps=1",
    "evaluate.clips=1",
    "stages.distilled.optim.epochs=8",
    "stages.finetuned.optim.epochs=2",
    "stages.scratch.optim.epochs=2",
)
DEADLINE_SECONDS = 240


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "train", "quickstart", *SHRUNKEN],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {path.name}: {process.communicate()[0]}")
        time.sleep(0.05)


def test_quickstart_is_stopped_goes_on_and_ends_with_its_table(tmp_path):
    run = tmp_path / "runs/quickstart"
    process = start(tmp_path)
    wait_for(run / "distilled/metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    shards = {path: path.stat().st_mtime_ns for path in run.glob("cache/*.safetensors")}
    assert shards
    assert list((run / "distilled/checkpoints").glob("step-*"))
    assert not (run / "summary.json").exists()

    process = start(tmp_path)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert "make videos" not in output  # nor are the cache's shards made anew
    assert {path: path.stat().st_mtime_ns for path in run.glob("cache/*.safetensors")} == shards
    assert "goes on after step" in " ".join(output.split())

    summary = json.loads((run / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["teacher", "finetuned", "scratch"]
    assert rows["teacher"]["parameters"] == 938_762
    assert rows["finetuned"]["parameters"] == rows["scratch"]["parameters"] == 432_586
    assert rows["teacher"]["top1"] >= 70  # 20 clips of a teacher that knows them
    steps = {name: stage["steps"] for name, stage in summary["stages"].items()}
    assert steps == {"teacher": 0, "distilled": 16, "finetuned": 8, "scratch": 8}
    for name, row in rows.items():
        (line,) = (line for line in output.splitlines() if f" {name} " in line and "│" in line)
        assert f"{row['parameters']:,}" in line
        assert f"{row['top1']:.2f}" in line


def test_shipped_teacher_is_small_and_is_the_file_that_the_recipe_names():
    stages = load_recipe("quickstart").stages
    evaluated, distilled = stages["teacher"].model.weights, stages["distilled"].objective.teacher
    path = Path(evaluated.checkpoint)
    assert path.stat().st_size <= 5_000_000
    assert file_sha256(path) == evaluated.sha256 == distilled.weights.sha256
    assert Path(distilled.weights.checkpoint) == path


def test_student_from_scratch_differs_from_the_finetuned_one_in_its_weights_alone():
    stages = load_recipe("quickstart").stages
    finetuned, scratch = stages["finetuned"], stages["scratch"]
    assert scratch.model.weights is None
    assert finetuned.model.model_copy(update={"weights": None}) == scratch.model
    assert finetuned.data == scratch.data
    assert finetuned.optim == scratch.optim
    assert stages["distilled"].data.train.share == 1.0
    assert finetuned.data.train.share == 0.1
