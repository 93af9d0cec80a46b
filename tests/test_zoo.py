"""The published zoo as a table, and a file checked against its row."""

import csv
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich
import torch
import toys
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import InputError
from distill.models import build_model
from distill.recipe import Classify, vit_size
from distill.recipe_file import load_recipe
from distill.students import create_classifier, create_student
from distill.toy import SIZES
from distill.zoo import find_row, select_rows, zoo_rows
from distill.zoo_check import check_row

DATA = Path(__file__).parent / "data"
RECIPES = Path(__file__).parents[1] / "recipes"
COLUMNS = 100


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(rich.get_console(), "width", COLUMNS)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["zoo", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["zoo", *map(str, arguments)])
    assert result.exit_code == 2
    return " ".join(result.output.split())


def published() -> dict[str, dict[str, str]]:
    """Figures of upstream's scripts and tables by recipe, with what was put right."""
    with (DATA / "recipes.tsv").open() as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file, delimiter="\t")}
    with (DATA / "corrections.tsv").open() as file:
        for correction in csv.DictReader(file, delimiter="\t"):
            rows[correction["recipe"]][correction["column"]] = correction["ours"]
    return rows


def test_every_published_row_is_there_with_its_number_and_views():
    figures = published()
    assert {row.recipe for row in zoo_rows()} == set(figures)
    for row in zoo_rows():
        own = figures[row.recipe]
        for column in ("top1", "map", "frames", "clips", "crops"):
            value = getattr(row, column)
            assert ("-" if value is None else f"{value:g}") == own[column].removesuffix(".0"), row
    assert sum(row.top1 is not None for row in zoo_rows()) == 38
    assert sum(row.link is not None for row in zoo_rows()) == 29


def test_views_of_a_row_are_those_its_recipe_tests_with():
    for row in zoo_rows():
        recipe = load_recipe(row.recipe)
        assert row.frames == recipe.data.views.frames
        if isinstance(recipe.objective, Classify):
            section = recipe.evaluate
            assert (row.crops, row.clips) == (section.crops, section.clips)


def test_recipes_state_the_published_numbers():
    """Where none is published of a model itself, that of what is finetuned from it."""
    for row in zoo_rows():
        text = (RECIPES / f"{row.recipe}.yaml").read_text()
        number = re.search(r"^# Number:(.*(\n#   .*)*)", text, re.MULTILINE)[1]
        after = {"Pretraining": f"k710/{row.model}", "Distillation": f"k400/{row.model}"}
        of = find_row(after[row.section]) if row.section in after else row
        stated = re.findall(r"([0-9.]+) % (top-1|mAP)", number)
        named = ((of.top1, "top-1"), (of.map, "mAP"))
        assert stated == [(f"{value:.1f}", name) for value, name in named if value is not None]
        assert of.top1 or "none published" in number
        views = f"({of.frames} frames, {of.clips} clips x {of.crops} crops)"
        assert not of.top1 or views in number.replace("\n#  ", "")


def test_files_are_of_the_rows_model_and_data_set():
    for row in zoo_rows():
        if row.file is None:
            continue
        where = f"{row.repository}/{row.file}".lower()
        assert f"{row.model.lower()}_" in where or f"-{row.model.lower()}-" in where
        folder = row.recipe.partition("/")[0]
        if folder not in ("pretrain", "S14", "B14", "L14"):
            assert f"ft_{folder}_" in row.file
            assert f"_f{row.frames}" in row.file
    files = [row.link for row in zoo_rows() if row.file]
    assert len(set(files)) == len(files), "two rows name one file"


def test_the_table_fits_the_terminal_and_hides_nothing():
    text = run()
    assert max(map(len, text.splitlines())) <= COLUMNS
    for row in zoo_rows():
        assert f" {row.recipe} " in text
    assert "planned" not in text.lower()
    line = next(line for line in text.splitlines() if " k400/L14 " in line)
    assert " ".join(line.split()) == (
        "k400/L14 K-Mash, distilled, K710 8x3x4 90.4 % top-1 L14_ft_k710_ft_k400_f8"
    )
    assert "not published  not published" in text


def test_in_a_narrow_terminal_settings_and_files_fold_into_a_few_lines(monkeypatch):
    monkeypatch.setattr(rich.get_console(), "width", 80)
    text = run("--data", "Kinetics-400")
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 4 + 3 * 7


def test_json_and_markdown_hold_every_row():
    rows = json.loads(run("--json"))
    assert [row["recipe"] for row in rows] == [row.recipe for row in zoo_rows()]
    one = next(row for row in rows if row["recipe"] == "anet/6B-attentive")
    assert (one["top1"], one["map"], one["file"]) == (95.9, 98.2, None)
    text = run("--markdown")
    assert text.count("\n| [") == len(rows)
    link = find_row("k400/1B").link
    repository = "https://huggingface.co/OpenGVLab/InternVideo2-Stage1-1B-224p-K400"
    assert link == f"{repository}/resolve/main/1B_ft_k710_ft_k400_f8.pth"
    assert f"| 91.3 |  | [1B_ft_k710_ft_k400_f8.pth]({link}) |" in text


def test_rows_are_chosen_by_data_set_and_model():
    assert [row.recipe for row in select_rows(data="ssv2", model="L14")] == ["ssv2/L14"]
    assert len(select_rows(data="Kinetics-400")) == 7
    assert len(select_rows(data="k400")) == 12
    assert {row.model for row in select_rows(model="b14")} == {"B14"}
    with pytest.raises(InputError, match=r"^no row of k500; --data is one of pretrain, k710, k400"):
        select_rows(data="k500")


def test_a_row_says_what_is_known_of_it():
    text = run("--row", "recipes/ssv2/B14.yaml")
    assert "numbers: 73.5 % top-1 (8x3x4: frames x crops x clips)" in text
    assert "stage1/B14/B14_ft_ssv2_f8/pytorch_model.bin --local-dir weights" in text
    assert "note: the zoo links a Kinetics-700 file, and its script trains L/14" in text
    assert "weights: not published" in run("--row", "k400/6B")
    assert fail("--row", "k400/L15") == "--row k400/L15: no such row, did you mean 'k400/L14'?"
    assert fail("--check", "a.pth").startswith("--check takes the row that the file should be of")
    assert "numbers: not published (8 frames)" in run("--row", "pretrain/1B")
    assert fail("--row", "L14", "--data", "k400").startswith("--row is one row already")
    assert fail("--markdown", "--json").startswith("--markdown is for the table, not with --json")
    assert fail("optim.lr=1") == "optim.lr=1: settings are for --check FILE --row ROW"


# Checks, with toys in the layouts of released files


class Runs:
    """A pickle that runs a command when it is read without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    toys.make_data(folder)
    torch.manual_seed(0)
    for name, size, classes in (
        ("L14_k400.bin", "L14", 400),
        ("S14_k400.bin", "S14", 400),
        ("L14_k710.bin", "L14", 710),
        ("1B_k400_f8.pth", "1B", 400),
    ):
        model = create_classifier(vit_size(SIZES[size]), num_classes=classes, image_size=28)
        state = {key: value.half() for key, value in model.state_dict().items()}
        torch.save({"module": state} if name.endswith("pth") else state, folder / name)
    student = create_student(
        vit_size(SIZES["L14"]),
        image_size=28,
        teacher_width=SIZES["1B"].width,
        teacher_pooled=SIZES["1B"].pooled_width,
        num_layers=2,
    )
    torch.save(student.state_dict(), folder / "L14_dist.bin")
    pretrained = build_model(load_recipe("pretrain/1B", ["run.toy=true"])).state_dict()
    torch.save({"module": pretrained, "epoch": 299}, folder / "pretrain.pth")
    without = {key: value for key, value in pretrained.items() if not key.startswith("mae_")}
    torch.save({"module": without}, folder / "no_mae.pth")
    whole = (folder / "L14_k400.bin").read_bytes()
    (folder / "cut.bin").write_bytes(whole[: len(whole) // 2])
    (folder / "code.bin").write_bytes(pickle.dumps(Runs(str(folder / "ran")), protocol=2))
    return folder


def test_a_fitting_file_is_reported_and_says_which_list_is_missing(files):
    text = run("--check", files / "L14_k400.bin", "--row", "k400/L14", "run.toy=true")
    assert f"{files / 'L14_k400.bin'}: 87 tensors taken as they are" in text
    assert "k400/L14: the file fits" in text
    assert "not measured: data.test.list: not set (any copy of Kinetics-400;" in text
    assert "set data.test.list=FILE" in text


@pytest.mark.parametrize(
    ("name", "row"), [("L14_dist.bin", "L14"), ("pretrain.pth", "pretrain/1B")]
)
def test_students_files_fit_their_rows_and_have_nothing_to_measure(files, name, row):
    """With the projectors to every teacher, two of the pretrained one's."""
    text = run("--check", files / name, "--row", row, "run.toy=true")
    model = build_model(load_recipe(row, ["run.toy=true"]))
    assert text.splitlines() == [
        f"{files / name}: {len(model.state_dict())} tensors taken as they are",
        f"{row}: the file fits",
        "unlike the published setting: run.toy: a toy's model and pixels",
    ]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("S14_k400.bin", "k400/B14", "tensors have another shape than the model's"),
        ("L14_k710.bin", "k400/L14", "the file has 710 classes and the model 400"),
        ("L14_dist.bin", "k400/L14", "keep asked for, but the file has no head"),
        ("L14_k400.bin", "L14", "of the model would stay at init"),
        ("no_mae.pth", "pretrain/1B", "mae_pos_embed, mae_decoder.* (12) of the model would stay"),
        ("1B_k400_f8.pth", "k400/1B-f16", "pos_embed would have to go from 8x2x2 -> 16x2x2"),
        ("cut.bin", "k400/L14", "cut.bin: not a readable torch file"),
        ("code.bin", "k400/L14", "code.bin: refused, reading it would run code"),
        ("absent.bin", "k400/L14", "absent.bin: no such file"),
    ],
)
def test_a_file_that_is_not_the_rows_is_refused_with_the_reason(files, name, row, reason):
    text = fail("--check", files / name, "--row", row, "run.toy=true")
    assert reason in text
    model = find_row(row).model
    assert (
        f"{row}: expected the weights of {model}, {find_row(row).frames} frames of 28 pixels"
        in text
    )
    assert find_row(row).link in text
    assert not (files / "ran").exists()


def test_a_file_is_measured_and_compared_with_the_published_number(files, monkeypatch):
    monkeypatch.chdir(files)
    toys.load_here(monkeypatch)
    given = ("--check", "L14_k400.bin", "--row", "k400/L14", "run.toy=true")
    views = ("data.test.list=videos4.csv", "evaluate.clips=2")
    text = run(*given, *views)
    line = next(line for line in text.splitlines() if line.startswith("top-1: measured "))
    assert line.endswith(", published 90.4: -90.40, outside the interval")
    assert "of 4 clips; details in runs/k400/L14-toy/check-L14_k400" in text
    assert "unlike the published setting: evaluate.clips: 2, published with 4" in text
    found = json.loads(
        CliRunner().invoke(app, ["zoo", *given, *views, "--json"], catch_exceptions=False).stdout
    )
    assert found["numbers"]["top1"]["published"] == 90.4
    assert found["evaluation"]["num_clips"] == 4
    low, high = found["evaluation"]["confidence_intervals"]["top1"]
    assert (
        f"top-1: measured {found['numbers']['top1']['measured']:.2f} ({low:.2f} to {high:.2f})"
        in text
    )
    assert Path(found["folder"], "evaluation.json").exists()
    assert found["row"]["link"].endswith("L14_ft_k710_ft_k400_f8/pytorch_model.bin")
    assert "no such file" in fail(*given, "data.test.list=none.csv")


def test_published_map_is_compared_with_activitynets_own_over_whole_videos(tmp_path, monkeypatch):
    (tmp_path / "test.csv").write_text("a.mp4,9,0,4,1\na.mp4,9,4,9,1\n")
    names = ("top1", "map", "video_top1", "video_map", "video_map_interpolated")
    result = {name: 90.0 + place for place, name in enumerate(names)}
    result["confidence_intervals"] = {name: [result[name] - 1, result[name] + 1] for name in names}
    report = SimpleNamespace(lines=lambda: [])
    monkeypatch.setattr("distill.zoo_check.check_file", lambda *_: report)
    monkeypatch.setattr("distill.zoo_check.evaluate_recipe", lambda *_, folder: result)
    recipe = load_recipe("anet/6B-attentive", [f"data.test.list={tmp_path}/test.csv"])
    found = check_row(find_row("anet/6B-attentive"), recipe, "w.bin")["numbers"]
    assert found["top1"] == {"measured": 92.0, "interval": [91.0, 93.0], "published": 95.9}
    assert found["map"] == {"measured": 94.0, "interval": [93.0, 95.0], "published": 98.2}
