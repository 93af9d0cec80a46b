"""Students that learn from one stream of records: each ends as if it had been alone."""

import fcntl
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import SIZE, assert_same_run, distil, stop_after, write_video
from typer.testing import CliRunner

import distill.train
from distill.cache.read import CachedBatches
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.cli import app
from distill.errors import StateError
from distill.job import WATCHED_CLIPS
from distill.objective import DistillObjective
from distill.recipe import Students
from distill.recipe_file import dump_recipe, load_recipe
from distill.run.interrupt import Interrupted
from distill.study import run_students
from distill.train import train, train_together

CLIPS = 10
# In an epoch 5, 2 and 4 steps: the last batch of the stream, of four clips, is two whole ones of
# the first, a smaller one of the second, and a whole and a smaller one of the third.
STUDENTS = {
    "small": {"optim__batch_size": 2, "optim__micro_batch": None},
    "wide": {
        "optim__batch_size": 6,
        "optim__epochs": 2,
        "optim__micro_batch": 4,
        "model__size": {**SIZE, "width": 48},
    },
    "deep": {
        "optim__batch_size": 3,
        "optim__micro_batch": 2,
        "optim__lr": 5e-3,
        "model__size": {**SIZE, "depth": 3},
        "objective__decoder": "linear",
    },
}
STEPS = {"small": 15, "wide": 4, "deep": 12}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(CLIPS):
        write_video(folder / f"{number}.mp4", number)
    (folder / "train.csv").write_text("".join(f"{number}.mp4,0\n" for number in range(CLIPS)))
    return folder


def recipe(videos: Path, name: str, **changes):
    settings = {
        "name": name,
        "optim__epochs": 3,
        "data__val": None,
        "data__test": None,
        "objective__mask__ratio": 0.7,  # three of eight patches, of the six that are kept
        "objective__cache__tokens": "superset",
        "objective__cache__codes": "4bit",
    }
    return distil(videos, "cached", **{**settings, **STUDENTS[name], **changes})


@pytest.fixture(scope="module")
def apart(videos, tmp_path_factory) -> dict[str, Path]:
    """Each student's folder after a run of its own."""
    folders = {name: tmp_path_factory.mktemp(name) for name in STUDENTS}
    for name, folder in folders.items():
        assert train(recipe(videos, name), folder)["steps"] == STEPS[name]
    return folders


def train_all(videos: Path, folder: Path, *, saving: tuple[str, ...] = ()) -> dict[str, dict]:
    """All students at once, those in `saving` with a checkpoint after every step."""
    recipes = [
        recipe(videos, name, **({"run__save_minutes": 1e-9} if name in saving else {}))
        for name in STUDENTS
    ]
    summaries = train_together(recipes, [folder / name for name in STUDENTS])
    return dict(zip(STUDENTS, summaries, strict=True))


def assert_as_apart(folder: Path, apart: dict[str, Path]) -> None:
    for name in STUDENTS:
        assert_same_run(folder / name, apart[name])


def positions(folder: Path) -> dict[str, int]:
    """Steps that each student has saved."""
    found = {name: latest_checkpoint(folder / name / "checkpoints") for name in STUDENTS}
    return {
        name: load_checkpoint(path).state["step"] if path else 0 for name, path in found.items()
    }


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int, int]]:
    """Batch size, epoch and first batch of every stream that is trained from."""
    noted, read_epoch = [], CachedBatches.epoch

    def epoch(self, number, first_step=0):
        if self.batch_size != WATCHED_CLIPS:
            noted.append((self.batch_size, number, first_step))
        return read_epoch(self, number, first_step)

    monkeypatch.setattr(CachedBatches, "epoch", epoch)
    return noted


def test_each_student_ends_with_the_bits_of_a_run_of_its_own(videos, apart, tmp_path, reads):
    summaries = train_all(videos, tmp_path)
    assert reads == [(6, 0, 0), (6, 1, 0), (6, 2, 0)]
    assert_as_apart(tmp_path, apart)
    for name, steps in STEPS.items():
        alone = json.loads((apart[name] / "summary.json").read_text())
        assert (summaries[name]["steps"], summaries[name]["name"]) == (steps, name)
        assert summaries[name]["last"] == alone["last"]
        assert summaries[name]["parameters"] == alone["parameters"]


# Of 11 steps in an epoch of all: between two students inside a batch of the stream, at the end
# of an epoch, and when one has finished.
@pytest.mark.parametrize("step", [4, 11, 25])
def test_students_stopped_after_any_step_end_with_the_same_bits(
    videos, apart, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            train_all(videos, tmp_path)
    assert sum(positions(tmp_path).values()) == step
    train_all(videos, tmp_path)
    assert_as_apart(tmp_path, apart)


class Killed(BaseException):
    """Nothing handles it, as nothing handles kill -9."""


@pytest.mark.parametrize(
    ("saving", "saves", "saved", "read_then"),
    [
        (tuple(STUDENTS), 2, (2, 0, 0), [(6, 0, 0), (6, 1, 0), (6, 2, 0)]),
        (tuple(STUDENTS), 12, (6, 2, 4), [(6, 1, 0), (6, 2, 0)]),
        (tuple(STUDENTS), 20, (10, 4, 6), [(6, 1, 1), (6, 2, 0)]),
        (("small",), 7, (7, 0, 0), [(6, 0, 0), (6, 1, 0), (6, 2, 0)]),  # in another epoch
    ],
)
def test_students_killed_between_two_saves_go_on_from_where_each_is(
    videos, apart, tmp_path, monkeypatch, reads, saving, saves, saved, read_then
):
    with monkeypatch.context() as patch:
        kill_after(patch, saves)
        with pytest.raises(Killed):
            train_all(videos, tmp_path, saving=saving)
    assert tuple(positions(tmp_path).values()) == saved
    reads.clear()
    train_all(videos, tmp_path)
    assert reads == read_then
    assert_as_apart(tmp_path, apart)


def kill_after(monkeypatch, saves: int) -> None:
    save, left = distill.train.save_checkpoint, iter(range(saves))

    def killed(*arguments, **settings):
        if next(left, None) is None:
            raise Killed
        return save(*arguments, **settings)

    monkeypatch.setattr(distill.train, "save_checkpoint", killed)


def test_real_kill_9_between_the_saves_of_two_students(videos, apart, tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
import distill.train
from distill.recipe_file import load_recipe

save, left = distill.train.save_checkpoint, iter(range(9))

def killed(*arguments, **settings):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*arguments, **settings)

distill.train.save_checkpoint = killed
paths = [Path(path) for path in sys.argv[1:]]
distill.train.train_together([load_recipe(path) for path in paths],
                             [path.with_suffix("") for path in paths])
"""
    paths = [tmp_path / f"{name}.yaml" for name in STUDENTS]
    for name, path in zip(STUDENTS, paths, strict=True):
        path.write_text(dump_recipe(recipe(videos, name, run__save_minutes=1e-9)))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert positions(tmp_path) == {"small": 5, "wide": 2, "deep": 2}
    train_all(videos, tmp_path)
    assert_as_apart(tmp_path, apart)


def test_a_student_goes_on_alone_and_others_without_it(videos, apart, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        with pytest.raises(Interrupted):
            train_all(videos, tmp_path)
    train(recipe(videos, "wide"), tmp_path / "wide")
    opened, build_job = [], distill.train.build_job

    def noted(one, *arguments, **settings):
        opened.append(one.name)
        return build_job(one, *arguments, **settings)

    monkeypatch.setattr(distill.train, "build_job", noted)
    train_all(videos, tmp_path)
    assert opened == ["small", "deep"]
    assert_as_apart(tmp_path, apart)


def test_a_non_finite_loss_names_the_student(videos, tmp_path, monkeypatch):
    forward = DistillObjective.forward

    def poisoned(self, batch):
        outputs = forward(self, batch)
        is_wide = len(self.student.cls_token.flatten()) == 48
        return {**outputs, "loss": outputs["loss"] * (math.nan if is_wide else 1.0)}

    monkeypatch.setattr(DistillObjective, "forward", poisoned)
    with pytest.raises(StateError) as caught:
        train_all(videos, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/wide: step 1: loss nan, ")
    assert len(json.loads((tmp_path / "wide" / "non_finite.json").read_text())["clips"]) == 6
    assert not (tmp_path / "small" / "non_finite.json").exists()


@pytest.fixture
def students(videos, tmp_path, monkeypatch) -> Students:
    monkeypatch.chdir(tmp_path)
    for name in STUDENTS:
        Path(f"{name}.yaml").write_text(dump_recipe(recipe(videos, name)))
    Path("all.yaml").write_text("students: [small, wide, deep]\nrun: {folder: out}\n")
    return load_recipe("all.yaml")


def test_a_recipe_of_students_trains_them_and_tells_of_each(students, apart):
    result = CliRunner().invoke(app, ["train", "all.yaml"])
    assert result.exit_code == 0, result.output
    assert_as_apart(Path("out"), apart)
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["name"], list(summary["students"])) == ("all", list(STUDENTS))
    for name, steps in STEPS.items():
        own = json.loads(Path(f"out/{name}/summary.json").read_text())
        assert summary["students"][name] == own
        loss = own["last"]["loss"]
        line = f"{name}: {steps} steps, loss {loss:.4f}: out/{name}/model.safetensors"
        assert line in result.output.splitlines()
    assert run_students(students) == summary


def test_two_processes_do_not_train_the_same_students(students):
    Path("out").mkdir()
    with Path("out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="^out: another process is training there"):
            run_students(students)
