"""Toys: the shipped recipes shrunk by one setting, and two real steps of every one of them."""

import functools
import json
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file
from typer.testing import CliRunner

import distill.job
from distill.cli import app
from distill.errors import InputError
from distill.objective import BACKBONE, POOL
from distill.recipe import Classify, Distill, Recipe, Size, Students, Study
from distill.recipe_file import dump_recipe, load_recipe, shipped_recipes
from distill.study import run_students
from distill.toy import SIZES, make_toy_weights, toy_recipe
from distill.train import train

TOY = ["run.toy=true"]
LOADED = {name: load_recipe(name) for name in shipped_recipes()}
SINGLE, TOGETHER, STUDIES = (
    [name for name, recipe in LOADED.items() if isinstance(recipe, kind)]
    for kind in (Recipe, Students, Study)
)
# Settings that a toy may have in another number or place; all others stay.
SHRUNK = (
    "run.folder",
    "run.toy",
    "data.workers",
    "data.views.image_size",
    "data.train.num_clips",
    "data.val.num_clips",
    "data.test.num_clips",
    "data.demo",
    "data.train.list",
    "data.val.list",
    "data.test.list",
    "model.size",
    "model.timm",
    "model.checkpoint_blocks",
    "model.weights.checkpoint",
    "model.weights.extra.checkpoint",
    "optim.lr",
    "optim.min_lr",
    "optim.warmup_lr",
    "optim.lr_per_batch",
    "optim.batch_size",
    "optim.micro_batch",
    "optim.epochs",
    "optim.warmup_epochs",
    "evaluate.batch_size",
    "objective.features.folder",
    "objective.cache.folder",
    "objective.cache.views",
    "objective.cache.batch_size",
    "objective.cache.shard_mb",
    "objective.monitor.every_epochs",
    "objective.monitor.clips",
    "objective.monitor.exact_clips",
    "objective.teacher.size",
    "objective.teacher.layers",
    "objective.teacher.weights",
    "objective.teacher.random",
)


@functools.cache
def toy_of(name: str) -> Recipe:
    return load_recipe(name, TOY)


def flat(values: dict, above: str = "") -> dict:
    """The settings by dotted path, without those that a toy may change."""
    found = {}
    for key, value in values.items():
        path = above + key
        if path in SHRUNK or (path.startswith("objective.others.") and path.count(".") > 2):
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{path}.")
        else:
            found[path] = value
    return found


@pytest.mark.parametrize("name", SINGLE)
def test_a_toy_keeps_what_the_recipe_does(name):
    recipe, toy = LOADED[name], toy_of(name)
    assert flat(toy.model_dump()) == flat(recipe.model_dump())
    assert toy.run.folder == f"{recipe.run.folder}-toy"
    assert toy.optim.batch_size == 4
    assert 0 < toy.optim.epochs <= 2
    scale = recipe.optim.batch_size / (recipe.optim.lr_per_batch or recipe.optim.batch_size)
    assert toy.optim.lr == pytest.approx(recipe.optim.lr * scale)
    share = toy.optim.warmup_epochs / toy.optim.epochs
    assert share == pytest.approx(recipe.optim.warmup_epochs / recipe.optim.epochs)


@pytest.mark.parametrize("name", SINGLE)
def test_a_toy_of_a_toy_is_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = toy_of(name)
    assert toy_recipe(toy) == toy
    Path("recipe.yaml").write_text(dump_recipe(toy))
    assert load_recipe("recipe.yaml") == toy


def test_named_sizes_stay_different_and_images_keep_their_order():
    assert len({(size.width, size.depth) for size in SIZES.values()}) == len(SIZES) == 5
    images = [toy_of(name).data.views.image_size for name in ("mit/6B", "mit/6B-336")]
    assert images == [28, 42]
    blocks = [toy_of(name).model.checkpoint_blocks for name in ("k400/L14", "k400/1B")]
    assert blocks == [0, 2]


def test_overrides_are_set_in_the_toy():
    recipe = load_recipe("k400/L14", ["optim.epochs=7", *TOY, "optim.lr=0.5", "model.size=S14"])
    assert (recipe.optim.epochs, recipe.optim.lr, recipe.model.size) == (7, 0.5, "S14")
    assert recipe.optim.batch_size == 4
    with pytest.raises(InputError, match=r"^optim\.micro_batch=8: must be at most optim\.batch_si"):
        load_recipe("k400/L14", [*TOY, "optim.micro_batch=8"])


def test_a_toy_starts_from_the_toy_of_what_the_recipe_starts_from():
    chain = [toy_of(name) for name in ("L14", "k710/L14", "k400/L14")]
    starts = [recipe.model.weights and recipe.model.weights.checkpoint for recipe in chain]
    assert starts == [None, *(f"{recipe.run.folder}/model.safetensors" for recipe in chain[:2])]
    extra = toy_of("ssv2/1B-attentive").model.weights.extra
    assert extra.checkpoint == "weights-toy/InternVideo2-stage2_1b-224p-f4.pt"
    assert extra.frames == 4


def test_a_toy_study_keeps_sizes_of_its_own_and_goes_elsewhere():
    study = load_recipe("quickstart", TOY)
    whole = load_recipe("quickstart")
    for stage, recipe in study.stages.items():
        assert recipe.run.folder == f"runs/quickstart-toy/{stage}"
        assert recipe.model.size == whole.stages[stage].model.size
        assert recipe.model.weights == whole.stages[stage].model.weights
        assert recipe.data.train.list == "runs/quickstart/videos-toy/train.csv"
        assert recipe.data.demo.train_clips == 20
    assert study.stages["distilled"].objective.cache.folder == "runs/quickstart/cache-toy"
    together = load_recipe("SBL14", TOY).students
    assert [recipe.model.size for recipe in together.values()] == [
        Size(**SIZES[name].model_dump()) for name in together
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    toys.make_data(folder)
    for part, number in [
        (part, number) for part in ("train", "val", "test") for number in range(8)
    ]:
        if part == "train" or number < 2:
            place = folder / "classes" / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.mp4").hardlink_to(folder / f"{number}.mp4")
    return folder


def lists(recipe: Recipe, kind: str | None = None) -> list[str]:
    """For two steps of one epoch, and an evaluation of two clips where there is one."""
    if kind is None:
        is_frames = recipe.data.views.sampling.kind == "segment" and "/" in recipe.name
        kind = "folders" if is_frames else "videos"
    number = 8 // recipe.data.augment.repeats
    given = [f"data.train.list={kind}{number}.csv", "optim.epochs=1", "optim.warmup_epochs=0"]
    if isinstance(recipe.objective, Classify):
        given.append(f"data.test.list={kind}2.csv")
    if recipe.data.demo is not None:  # the study that it belongs to makes its own videos
        given += ["data.demo=null", "data.val=null"]
    return given


def toy_to_run(name: str, workplace: Path, *, kind: str | None = None) -> Recipe:
    """The toy with lists for two steps of an epoch, from random weights where it has some."""
    given = lists(toy_of(name), kind)
    start = toys.start_weights(toy_of(name), workplace)
    if start is not None:
        given.append(f"model.weights.checkpoint={start}")
    recipe = load_recipe(name, [*TOY, *given])
    make_toy_weights(recipe)
    return recipe


@pytest.fixture
def started(monkeypatch) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What a run says of the weights that it starts from, and the state it then has."""
    said, state = [], {}
    load = distill.job.load_recipe_weights

    def spy(model, weights):
        reports = load(model, weights)
        said.extend(line for report in reports for line in report.lines())
        state.update({key: value.clone() for key, value in model.state_dict().items()})
        return reports

    monkeypatch.setattr(distill.job, "load_recipe_weights", spy)
    return said, state


def changes_on_loading(recipe: Recipe) -> set[str]:
    """What loading its weights should say of a toy recipe: tables resized, rows of heads taken."""
    weights, views = recipe.model.weights, recipe.data.views
    side = views.image_size // 14
    steps = 16 if recipe.name.endswith("attentive") and "k710" in weights.checkpoint else 8
    said = set()
    for frames in (steps, weights.extra and weights.extra.frames):
        before, after = f"{frames}x2x2", f"{views.frames}x{side}x{side}"
        if frames and before != after:
            said.add(f"resized: pos_embed, {before} -> {after} patches")
    if weights.head not in ("reset", "keep"):
        classes = recipe.objective.num_classes
        text = f"710 -> {classes} classes ({weights.head})"
        said |= {f"mapped: head.weight, {text}", f"mapped: head.bias, {text}"}
    return said


def test_toys_of_all_recipes_are_run_here():
    folder = Path(__file__).parents[1] / "recipes"
    files = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)
    assert sorted([*SINGLE, *TOGETHER, *STUDIES]) == names
    assert len(SINGLE) == 72
    assert (TOGETHER, STUDIES) == (["SBL14"], ["own", "own_cpu", "quickstart"])


@pytest.mark.parametrize("name", SINGLE)
def test_two_steps_of_every_recipe(name, workplace, monkeypatch, started):
    monkeypatch.chdir(workplace)
    toys.load_here(monkeypatch)
    recipe = toy_to_run(name, workplace)
    summary = train(recipe, Path(recipe.run.folder))
    assert summary["steps"] == 2
    assert 0 < summary["last"]["loss"] < 20
    said, before = started
    if recipe.model.weights is not None:
        changes = {line for line in said if line.startswith(("resized", "mapped"))}
        assert changes == changes_on_loading(recipe)
    assert bool(before) == (recipe.model.weights is not None)
    after = load_file(summary["weights"])
    if isinstance(recipe.objective, Distill):
        assert summary["evaluation"] is None
        return
    assert summary["evaluation"]["num_clips"] == 2
    assert summary["evaluation"]["num_missing"] == 0
    frozen = {"all": (), "pool": BACKBONE, "head": (*BACKBONE, *POOL)}[recipe.objective.trainable]
    for key, value in before.items():
        if key.startswith(frozen):
            assert torch.equal(after[key], value), f"{key} should be frozen"
    if not before:  # from scratch
        return
    learnt = {key for key in before if not torch.equal(after[key], before[key])}
    expected = {"head.weight", "clip_projector.cross_attn.proj.weight", "patch_embed.proj.weight"}
    assert {key for key in expected if not key.startswith(frozen)} <= learnt


@pytest.mark.parametrize("name", TOGETHER)
def test_two_steps_of_students_together(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    toys.load_here(monkeypatch)
    settings = ["data.train.list=videos8.csv", "optim.epochs=1", "optim.warmup_epochs=0"]
    students = load_recipe(name, [*TOY, *settings])
    summaries = run_students(students)["students"]
    assert list(summaries) == list(students.students)
    for summary in summaries.values():
        assert summary["steps"] == 2
        assert 0 < summary["last"]["loss"] < 20


@pytest.mark.parametrize("name", STUDIES)
def test_two_steps_of_every_stage_of_a_study(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    toys.load_here(monkeypatch)
    clips = {"train": 8, "val": 2, "test": 2}
    settings = ["data.folder=classes"]
    if toy_of(name).stages["finetuned"].data.demo is not None:
        settings = [f"data.demo.{split}_clips={number}" for split, number in clips.items()]
    trained = [stage for stage, one in LOADED[name].stages.items() if one.optim.epochs]
    for stage in trained:
        settings += [f"stages.{stage}.optim.{key}" for key in ("epochs=1", "warmup_epochs=0")]
    result = CliRunner().invoke(app, ["train", name, *TOY, *settings])
    assert result.exit_code == 0, result.output
    study = toy_of(name)
    stages = json.loads(Path(study.run.folder, "summary.json").read_text())["stages"]
    assert {stage: one["steps"] for stage, one in stages.items()} == {
        stage: 2 * (stage in trained) for stage in study.stages
    }
    for stage, summary in stages.items():
        if isinstance(study.stages[stage].objective, Classify):
            assert summary["evaluation"]["num_clips"] == 2


@pytest.mark.parametrize("name", ["anet/6B-attentive", "hacs/6B-attentive"])
def test_intervals_of_untrimmed_videos(name, workplace, monkeypatch):
    """Trained on and tested: two of the same video, of which a score for the video is made."""
    monkeypatch.chdir(workplace)
    toys.load_here(monkeypatch)
    recipe = toy_to_run(name, workplace, kind="intervals")
    folder = Path(f"{recipe.run.folder}-intervals")
    assert train(recipe, folder)["steps"] == 2
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["num_clips"], result["num_videos"], result["num_missing"]) == (2, 1, 0)
    assert {"map", "video_map", "video_map_interpolated"} < result.keys()
    views = load_file(folder / "scores.safetensors")
    seen: dict[int, list[int]] = {}
    for clip, pixels in zip(views["clip_id"].tolist(), views["pixels_hash"].tolist(), strict=True):
        seen.setdefault(clip, []).append(pixels)
    first, second = seen.values()  # of 0 to 0.6 seconds and of 0.2 to 0.6
    assert len(first) == len(second) == recipe.evaluate.clips * recipe.evaluate.crops
    assert set(first).isdisjoint(second)
