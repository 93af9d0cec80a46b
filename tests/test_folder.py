"""A folder of class folders in place of lists: what is read, and how it is divided."""

from pathlib import Path

import pytest
import yaml

from distill.checks.recipe import missing_inputs
from distill.data.folder import PARTS, class_names, read_folder
from distill.data.index import clip_id, list_bytes, read_list
from distill.errors import InputError
from distill.recipe import ClipList
from distill.recipe_file import load_recipe

CLASSES = ("jump", "run", "swim")


def fill(folder: Path, *, each: int = 20, classes=CLASSES) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            (folder / name / f"{number}.mp4").touch()
    return folder


@pytest.fixture
def videos(tmp_path):
    return fill(tmp_path / "videos")


def parts_of(folder: Path) -> dict[str, list[tuple[str, int]]]:
    return {part: read_folder(folder, part) for part in PARTS}


def test_every_video_is_in_one_part_and_every_class_in_each(videos):
    parts = parts_of(videos)
    assert {part: len(found) for part, found in parts.items()} == {
        "train": 42,
        "val": 6,
        "test": 12,
    }
    together = [item for found in parts.values() for item in found]
    assert sorted(together) == sorted(read_folder(videos)) and len(set(together)) == 60
    for found in parts.values():
        assert {label for _, label in found} == {0, 1, 2}
    assert all(path.split("/")[0] == CLASSES[label] for path, label in together)


def test_the_division_is_of_names_alone_and_a_new_video_hardly_moves_it(videos, tmp_path):
    before = parts_of(videos)
    again = parts_of(fill(tmp_path / "elsewhere", classes=reversed(CLASSES)))
    assert again == before
    (videos / "run/new.mp4").touch()
    after = parts_of(videos)
    moved = set(before["train"]) - set(after["train"])
    assert len(moved) <= 2 and {label for _, label in moved} <= {1}
    # What the hash gives: another hash would put other videos into the published test parts.
    assert [path for path, label in before["val"] if not label] == ["jump/10.mp4", "jump/5.mp4"]


def test_small_classes_give_one_video_to_each_part(tmp_path):
    folder = fill(tmp_path / "few", each=3)
    assert [len(found) for found in parts_of(folder).values()] == [3, 3, 3]
    (folder / "run/2.mp4").unlink()
    with pytest.raises(InputError, match=r"few/run: 2 videos, expected at least 3: one each for"):
        read_folder(folder, "train")
    assert len(read_folder(folder)) == 8  # all of it: nothing is divided


def test_only_videos_are_read_below_a_class_too_and_hidden_files_are_not(videos):
    deep = videos / "run" / "monday"
    deep.mkdir()
    for name in ("a.MOV", "notes.txt", ".b.mp4"):
        (deep / name).touch()
    (videos / ".cache").mkdir()
    (videos / "README.txt").touch()
    found = {path for path, _ in read_folder(videos)}
    assert "run/monday/a.MOV" in found and len(found) == 61


def test_a_folder_that_is_divided_already_stays_so(tmp_path):
    folder = tmp_path / "divided"
    fill(folder / "train", each=10)
    fill(folder / "test", each=2)
    parts = parts_of(folder)
    assert {part: len(found) for part, found in parts.items()} == {"train": 27, "val": 3, "test": 6}
    assert {path.split("/")[0] for path, _ in parts["val"]} == {"train"}
    fill(folder / "val", each=1)
    parts = parts_of(folder)
    assert {part: len(found) for part, found in parts.items()} == {"train": 30, "val": 3, "test": 6}
    assert class_names(folder) == CLASSES
    (folder / "test" / "sing").mkdir()
    with pytest.raises(InputError, match=r"test/sing: a class that train has no folder of"):
        read_folder(folder, "test")


def test_videos_beside_the_class_folders_have_no_class(videos, tmp_path):
    (videos / "lost.mp4").touch()
    with pytest.raises(InputError, match=r"videos: lost.mp4 is in no class folder; sort the"):
        class_names(videos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no folders; sort the videos"):
        class_names(tmp_path / "empty")


def test_a_list_may_be_a_folder_or_its_part(videos):
    whole = read_list(ClipList(list=str(videos)))
    assert (len(whole), whole[0].name, whole[0].label) == (60, "jump/0.mp4", 0)
    assert whole[0].id == clip_id("jump/0.mp4") and whole[0].path == f"{videos}/jump/0.mp4"
    test = ClipList(list=str(videos), part="test")
    assert [(clip.name, clip.label) for clip in read_list(test)] == read_folder(videos, "test")
    assert len(read_list(ClipList(list=str(videos), part="train", share=0.5))) == 21
    assert list_bytes(test).decode().splitlines()[0] == "jump/11.mp4 0"
    (videos / "list.csv").touch()
    with pytest.raises(InputError, match=r"list.csv: no such folder; `part` is of a folder"):
        read_list(ClipList(list=str(videos / "list.csv"), part="test"))


def test_a_recipe_takes_its_lists_and_classes_from_the_folder(videos):
    study = load_recipe("own", [f"data.folder={videos}", "data.test.list=other.csv"])
    recipe = study.stages["finetuned"]
    assert (recipe.objective.num_classes, recipe.objective.class_names) == (3, CLASSES)
    assert (recipe.data.train.list, recipe.data.train.part) == (str(videos), "train")
    assert (recipe.data.test.list, recipe.data.test.part) == ("other.csv", None)
    assert study.stages["distilled"].data.train == recipe.data.train
    with pytest.raises(InputError, match=r"objective.class_names: are 1, but num_classes is 3"):
        changed = recipe.model_dump(mode="json") | {"name": "x"}
        changed["data"]["folder"] = None
        changed["objective"]["class_names"] = ["one"]
        path = videos.parent / "changed.yaml"
        path.write_text(yaml.safe_dump(changed))
        load_recipe(path)


def test_a_folder_that_is_not_there_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = load_recipe("own_cpu", ["data.folder=nowhere"])
    for verb in ("train", "cache-teacher"):
        lines = missing_inputs(study.stages["distilled"], verb, stage="distilled")
        assert lines == ["data.folder: nowhere: no such folder; set data.folder=PATH"]
    assert study.stages["finetuned"].objective.num_classes == 10
