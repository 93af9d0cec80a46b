"""From a folder of one's own videos in class folders to a finetuned student, by shipped recipes."""

import csv
import json
import re
import runpy
from pathlib import Path

import pytest
import toys
from safetensors import safe_open
from tiny_runs import write_video
from typer.testing import CliRunner

from distill.cli import app
from distill.recipe_file import load_recipe

CLASSES = ("dark", "grey", "light")  # as write_video makes them, in turn
FASTER = ("stages.distilled.optim.epochs=4", "stages.finetuned.optim.epochs=8", "run.log_steps=1")


def shell(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with videos/CLASS/NUMBER.mp4 in which own_cpu has run."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(24):
        place = folder / "videos" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        write_video(place / f"{number}.mp4", number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toys.load_here(patch)
        shell("train", "own_cpu", "data.folder=videos", *FASTER)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    toys.load_here(monkeypatch)


def test_one_command_ends_with_a_student_that_knows_the_classes(here):
    summary = json.loads(Path("runs/own_cpu/summary.json").read_text())
    (row,) = summary["rows"]
    assert row["name"] == "finetuned" and row["top1"] > 80  # of three: brightness is easily told
    with open("runs/own_cpu/finetuned/classes.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["clips"] for row in rows] == ["2", "2", "2"]
    with safe_open("runs/own_cpu/finetuned/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list(CLASSES)
        assert file.get_slice("head.weight").get_shape() == [3, 96]


def test_two_more_commands_export_the_student_and_write_a_report(here):
    text = shell("export", "runs/own_cpu/finetuned", "--to", "timm")
    assert "runs/own_cpu/finetuned/export/timm: " in text
    card = Path("runs/own_cpu/finetuned/export/timm/README.md").read_text()
    assert "own_cpu/finetuned" in card
    (video, *_) = sorted(Path("videos/light").iterdir())
    (found,) = json.loads(
        CliRunner()
        .invoke(app, ["predict", "runs/own_cpu/finetuned/export/timm", str(video), "--json"])
        .stdout
    )
    assert found["top"][0]["name"] == "light"
    assert "runs/own_cpu/report.html" in shell("report", "runs/own_cpu")
    page = Path("runs/own_cpu/report.html").read_text()
    assert all(name in page for name in (*CLASSES, "own_cpu/distilled", "own_cpu/finetuned"))


def test_no_video_is_learned_from_and_reported_on(here):
    recipe = load_recipe("runs/own_cpu/finetuned/recipe.yaml")
    assert (recipe.data.train.part, recipe.data.test.part) == ("train", "test")
    manifest = json.loads(Path("runs/own_cpu/finetuned/evaluation.json").read_text())["manifest"]
    assert manifest["question"]["clips"] == 6 and manifest["run"]["list"] == "videos"


def test_the_recipe_with_the_published_models_goes_the_same_way_as_a_toy(here):
    text = shell("train", "own", "data.folder=videos", "run.toy=true")
    assert "runs/own-toy: done" in text
    assert (
        json.loads(Path("runs/own-toy/summary.json").read_text())["rows"][0]["name"] == "finetuned"
    )
    with safe_open("runs/own-toy/finetuned/model.safetensors", "pt") as file:
        assert file.metadata()["num_classes"] == "3"


def test_without_its_downloads_the_recipe_says_what_it_needs(here):
    result = CliRunner().invoke(app, ["train", "own", "data.folder=videos"])
    assert result.exit_code == 2
    student, teacher = result.stderr.splitlines()
    assert "hf download OpenGVLab/InternVideo2_distillation_models" in student
    assert "which is gated: accept its terms on that page, then hf download" in teacher


def test_code_of_the_page_on_using_a_model_runs(here):
    page = (Path(__file__).parent.parent / "docs/export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    Path("runs/own").mkdir(exist_ok=True)
    Path("runs/own/finetuned").symlink_to("../own_cpu/finetuned")
    Path("holiday.mp4").symlink_to(sorted(Path("videos/dark").iterdir())[0])
    for block in blocks:
        Path("code.py").write_text(block)
        found = runpy.run_path("code.py")
    assert found["model"].predict("holiday.mp4")[0].name == "dark"
    assert found["model"].features("holiday.mp4").shape == (96,)
