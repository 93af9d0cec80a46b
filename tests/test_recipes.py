"""The shipped recipes: all of them load, say what they need, and build what their name says."""

import functools
from pathlib import Path

import pytest
import torch

from distill.models import build_model
from distill.recipe import Recipe
from distill.recipe_file import load_recipe, recipe_hash, shipped_recipes
from distill.students.vit import SIZES

SHIPPED = shipped_recipes()
load = functools.cache(load_recipe)


def size_in(name: str) -> str:
    """`k400/1B-f16` is a 1B."""
    return name.split("/")[-1].split("-")[0]


def header(name: str) -> list[str]:
    lines = SHIPPED[name].read_text().splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def test_every_recipe_of_the_repository_is_shipped():
    folder = Path(__file__).parent.parent / "recipes"
    files = [path.name for path in folder.rglob("*.yaml")]
    assert len(SHIPPED) == sum(not name.startswith("_") for name in files) < len(files)
    assert {"S14", "B14", "L14", "k400/L14"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_is_called_what_its_path_says(name):
    assert load(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_loads(name):
    assert load_recipe(SHIPPED[name]) == load(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_opens_with_command_hardware_and_number(name):
    first, *rest = header(name)
    assert first.startswith(f"# distill train recipes/{name}.yaml")
    assert sum(line.startswith("# Hardware:") for line in rest) == 1
    assert sum(line.startswith("# Number:") for line in rest) == 1


@pytest.mark.parametrize("name", [name for name in SHIPPED if size_in(name) in SIZES])
def test_recipe_builds_the_size_it_is_named_after(name):
    recipe = load(name)
    with torch.device("meta"):
        size = build_model(recipe).size
    assert size == SIZES[size_in(name)]


@pytest.mark.parametrize(
    ("name", "batch_size", "micro_batch"),
    [("S14", 4096, 128), ("B14", 4096, 128), ("L14", 2048, 64)],
)
def test_distillation_settings_are_the_published_ones(name, batch_size, micro_batch):
    recipe = load(name)
    optim, objective, views = recipe.optim, recipe.objective, recipe.data.views
    assert (optim.batch_size, optim.micro_batch) == (batch_size, micro_batch)
    assert (optim.lr, optim.lr_per_batch, optim.min_lr, optim.warmup_lr) == (1e-3, 256, 1e-5, 0)
    assert (optim.epochs, optim.warmup_epochs) == (100, 20)
    assert (optim.weight_decay, optim.betas, optim.eps) == (0.05, (0.9, 0.98), 1e-6)
    assert (optim.clip_grad, optim.layer_decay, optim.precision) == (5.0, 1.0, "bf16")
    assert recipe.model.drop_path == 0.05
    assert recipe.model.weights is None
    assert (views.frames, views.image_size, views.crop, views.flip) == (8, 224, "multiscale", 0.5)
    assert (views.sampling.kind, views.never_flip) == ("segment", ("ssv2",))
    assert (objective.mask.kind, objective.mask.ratio) == ("attention", 0.8)
    assert (objective.decoder, objective.loss_weights) == ("mlp", (1, 1))
    teacher = objective.teacher
    assert (teacher.size, teacher.layers, teacher.interval) == ("1B", 6, 3.34)
    assert (teacher.random, teacher.weights.frames) == (False, 4)


def test_students_of_one_teacher_share_one_cache():
    sections = [load(name).objective.cache for name in ("S14", "B14", "L14")]
    assert sections[0] == sections[1] == sections[2]


def test_students_together_are_those_of_their_own_recipes():
    together = load("SBL14").students
    assert list(together) == ["S14", "B14", "L14"]
    for name, recipe in together.items():
        alone = load(name)
        assert recipe_hash(recipe) == recipe_hash(alone)
        assert recipe.objective.cache == alone.objective.cache


def test_run_folders_do_not_collide():
    loaded = [load(name) for name in SHIPPED]
    folders = [one.run.folder for one in loaded]
    assert len(set(folders)) == len(folders)
    assert all(isinstance(one, Recipe) for one in map(load, ("S14", "B14", "L14")))
