"""Every recipe of the zoo against the figures of upstream's scripts, with what was put right.

`data/recipes.tsv` holds upstream's figures, `data/corrections.tsv` those that a recipe has
otherwise, with the reason.
"""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.augment import draw_crop
from distill.data.sample import eval_indices, train_indices
from distill.models import build_model
from distill.objective import ClassifyObjective
from distill.optim import make_schedule, param_groups
from distill.recipe import Classify, RandAugment, Recipe
from distill.recipe_file import load_recipe, shipped_recipes

DATA = Path(__file__).parent / "data"
FOLDERS = (
    *("pretrain", "k710", "k400", "k600", "k700", "mit", "ssv1", "ssv2", "anet", "hacs"),
    *("ucf101", "hmdb51"),
)
SEGMENTS = ("SSV2", "HMDB51")  # data sets whose readers take segments of whole frames


def read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


SCRIPTS = {row["recipe"]: row for row in read("recipes.tsv")}
CORRECTIONS = read("corrections.tsv")
ROWS = {name: dict(row) for name, row in SCRIPTS.items()}
for _one in CORRECTIONS:
    ROWS[_one["recipe"]][_one["column"]] = _one["ours"]
SHIPPED = shipped_recipes()
RECIPES = {name: load_recipe(name) for name in ROWS}
CLASSIFIERS = [name for name, one in RECIPES.items() if isinstance(one.objective, Classify)]
STUDENTS = [name for name in RECIPES if name not in CLASSIFIERS]

# Width, depth, MLP width of the published sizes.
SIZES = {
    "small": (384, 12, 1536),
    "base": (768, 12, 3072),
    "large": (1024, 24, 4096),
    "1B": (1408, 40, 6144),
    "6B": (3200, 48, 12800),
}
STARTS = {
    "1B_pt.pth": "weights/InternVideo2-Stage1-1B-224p-f8/pretrain.pth",
    "6B_pt.pth": "runs/pretrain/6B/model.safetensors",
    "1B_pt_stage2.pth": "weights/InternVideo2-stage2_1b-224p-f4.pt",
    "6B_pt_stage2.pth": "weights/internvideo2-s2_6b-224p-f4_with_audio_encoder.pt",
}


def number(text: str) -> float:
    return 0.0 if text == "-" else float(text)


def size_of(row: dict[str, str]) -> tuple[int, int, int]:
    return SIZES[row["model"].split("_")[-3]]


def backbone_parameters(row: dict[str, str]) -> int:
    """Blocks, patch embedding, class token, position table and attention pool."""
    d, depth, f = size_of(row)
    patches = int(row["frames"]) * (int(row["resolution"]) // 14) ** 2
    block = 4 * d**2 + 2 * d * f + f + 8 * d
    return depth * block + 589 * d + d + (patches + 1) * d + pool_parameters(d)


def pool_parameters(d: int) -> int:
    return 3 * d**2 + 9 * d + 768 * d + 768


def head_parameters(row: dict[str, str]) -> int:
    """All that stands on the pool of a classifier."""
    d, classes, steps = size_of(row)[0], int(row["classes"]), int(row["frames"])
    if "_ap_" in row["model"]:
        return 4_723_968 + 1536 + 769 * classes
    if "_cat_" in row["model"]:  # the class token and each frame's mean go down to 768
        down = 769 * d - d + 768 + 1536
        return 1536 + down + 768 * (steps + 2) * classes + classes
    return 1536 + 769 * classes


def projector_parameters(row: dict[str, str]) -> int:
    """All of a student beyond its backbone; its teachers are 1408 wide, or InternVL 3200."""
    d, patches = size_of(row)[0], 256 * int(row["frames"])
    table = (patches + 1) * d

    def decoder(width: int, out: int, *, is_mlp: bool) -> int:
        return is_mlp * (width**2 + width) + (width + 1) * out + 2 * out

    if row["model"].startswith("distill_"):
        return table + 6 * decoder(d, 1408, is_mlp=True) + decoder(768, 768, is_mlp=True)
    linear = 6 * decoder(d, 3200, is_mlp=False) + decoder(768, 768, is_mlp=False)
    return table + linear + patches * d + 4 * decoder(d, 1408, is_mlp=True)


def test_there_is_a_recipe_for_every_row_and_a_row_for_every_recipe():
    in_folders = {name for name in SHIPPED if name.partition("/")[0] in FOLDERS and "/" in name}
    ours = {f"k400/{size}-attentive" for size in ("S14", "B14", "L14")}  # it probes 1B and 6B
    assert in_folders - ours | {"S14", "B14", "L14"} == set(ROWS)
    assert ours <= in_folders
    assert len(ROWS) == 67


def test_corrections_are_of_what_the_scripts_say():
    for one in CORRECTIONS:
        assert SCRIPTS[one["recipe"]][one["column"]] == one["script"]
        assert one["ours"] != one["script"]
        assert one["reason"]
    keys = [(one["recipe"], one["column"]) for one in CORRECTIONS]
    assert len(set(keys)) == len(keys)


def test_formulas_give_the_published_parameter_counts():
    counts = {
        name: backbone_parameters(ROWS[name]) + head_parameters(ROWS[name])
        for name in ("k400/L14", "k710/S14", "k400/1B-f16", "k400/6B", "ssv2/6B-attentive")
    }
    assert counts == {
        "k400/L14": 309_238_416,
        "k710/S14": 23_591_366,
        "k400/1B-f16": 1_023_901_328,
        "k400/6B": 5_942_044_304,
        "ssv2/6B-attentive": 5_953_148_078,
    }
    students = {
        name: backbone_parameters(ROWS[name]) + projector_parameters(ROWS[name])
        for name in STUDENTS
    }
    assert students == {
        "S14": 29_169_792,
        "B14": 102_252_288,
        "L14": 327_183_872,
        "pretrain/1B": 1_070_042_752,
        "pretrain/6B": 6_075_947_392,
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_model_and_what_of_it_learns(name):
    row, recipe = ROWS[name], RECIPES[name]
    with torch.device("meta"):
        model = build_model(recipe)
        objective = ClassifyObjective(model, recipe.objective, seed=0)
    d, depth, _ = size_of(row)
    backbone, head = backbone_parameters(row), head_parameters(row)
    assert sum(one.numel() for one in model.parameters()) == backbone + head
    assert recipe.objective.num_classes == int(row["classes"])
    assert model.grid == (int(row["frames"]), *[int(row["resolution"]) // 14] * 2)
    assert max(model.drop_path_rates) == pytest.approx(number(row["drop_path"]))
    assert recipe.objective.fc_drop == number(row["fc_drop"])
    assert recipe.model.checkpoint_blocks == int(row["checkpoint_blocks"])
    assert recipe.model.head_drop_path == 0, "upstream's code never calls it"
    learnt = sum(one.numel() for one in objective.parameters() if one.requires_grad)
    trained = {"all": backbone + head, "pool": pool_parameters(d) + head, "head": head}
    assert learnt == trained[row["trains"]]

    groups = param_groups(model, recipe.optim)
    decay = number(row["layer_decay"])
    scales = {group["lr_scale"] for group in groups}
    layers = range(depth + 2) if row["trains"] == "all" else [depth + 1]
    expected = sorted({decay ** (depth + 1 - layer) for layer in layers})
    assert sorted(scales) == pytest.approx(expected)
    assert {group["weight_decay"] for group in groups} == {0.0, number(row["weight_decay"])}
    for group in groups:
        for parameter_name, parameter in zip(group["names"], group["params"], strict=True):
            is_table = parameter_name in ("pos_embed", "cls_token")
            is_plain = parameter.ndim == 1 or is_table
            assert group["weight_decay"] == (0 if is_plain else number(row["weight_decay"]))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_its_groups_and_its_views(name):
    row, recipe = ROWS[name], RECIPES[name]
    with torch.device("meta"):
        model = build_model(recipe)
    parameters = dict(model.named_parameters())
    assert sum(one.numel() for one in parameters.values()) == (
        backbone_parameters(row) + projector_parameters(row)
    )
    assert model.grid == (int(row["frames"]), *[int(row["resolution"]) // 14] * 2)
    assert max(model.drop_path_rates) == pytest.approx(number(row["drop_path"]))
    assert recipe.model.checkpoint_blocks == int(row["checkpoint_blocks"])
    assert recipe.model.weights is None

    groups = param_groups(model, recipe.optim)
    assert {group["lr_scale"] for group in groups} == {1.0}
    decays = {key: group["weight_decay"] for group in groups for key in group["names"]}
    assert decays == {
        key: 0.0
        if one.ndim == 1 or key.endswith("pos_embed") or key == "cls_token"
        else number(row["weight_decay"])
        for key, one in parameters.items()
    }

    views = recipe.data.views
    n, k, rng = 300, views.frames, np.random.default_rng(0)
    drawn = np.stack([train_indices(views.sampling, n, k, rng) for _ in range(400)])
    assert drawn.min(axis=0).tolist() == [i * (n // k) for i in range(k)]
    assert drawn.max(axis=0).tolist() == [i * (n // k) + n // k - 1 for i in range(k)]
    crops = [draw_crop(views, width=340, height=256, rng=rng) for _ in range(400)]
    sides = [256, 224, 192, 168]  # of 1, 7/8, 3/4 and 0.66 of the short side
    pairs = {(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) < 2}
    assert {(crop.width, crop.height) for crop in crops} == pairs
    assert (views.flip, views.never_flip) == (0.5, ("ssv2",))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_starting_weights_and_head(name):
    row, weights = ROWS[name], RECIPES[name].model.weights
    assert weights.checkpoint == starts_from(row["init_from"])
    assert weights.source
    extra = None if row["init_extra"] == "-" else STARTS[row["init_extra"]]
    assert (weights.extra and weights.extra.checkpoint) == extra
    assert extra is None or weights.extra.frames == 4
    is_710 = "k710" in row["init_from"] and "k400" not in row["init_from"]
    policies = {"400": "first", "600": "k600", "700": "k700"}
    head = policies.get(row["classes"], "reset") if is_710 else "reset"
    assert weights.head == ("keep" if name == "mit/6B-336" else head)


def starts_from(name: str) -> str:
    """Where a recipe finds what upstream calls so."""
    if name in STARTS:
        return STARTS[name]
    size = re.match(r"[SBL]14|[16]B", name).group()
    steps = re.findall(r"(?:_ft|_ap)_(k710|k400|mit)", name)
    if steps:
        probe = "-attentive" if "_ap_" in name else ""
        return f"runs/{steps[-1]}/{size}{probe}/model.safetensors"
    return f"runs/{size}/model.safetensors"


def test_weights_that_a_run_leaves_are_those_of_a_recipe():
    for recipe in RECIPES.values():
        weights = recipe.model.weights
        if weights is not None and weights.checkpoint.startswith("runs/"):
            before = weights.checkpoint.split("/", 1)[1].removesuffix("/model.safetensors")
            assert weights.checkpoint == f"{RECIPES[before].run.folder}/model.safetensors"
            assert RECIPES[before].model.size == recipe.model.size


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_views_and_augmentation(name):
    row, recipe = ROWS[name], RECIPES[name]
    views, augment, objective = recipe.data.views, recipe.data.augment, recipe.objective
    assert (views.frames, views.image_size) == (int(row["frames"]), int(row["resolution"]))
    assert views.flip == (0 if row["dataset"] == "SSV2" else 0.5)
    assert augment.repeats == int(row["num_sample"])
    magnitude, ops, std = re.fullmatch(
        r"rand-m(\d+)-n(\d)-mstd([\d.]+)-inc1", row["randaug"]
    ).groups()
    assert augment.rand_augment == RandAugment(
        magnitude=float(magnitude), num_ops=int(ops), magnitude_std=float(std)
    )
    assert augment.erase.probability == number(row["reprob"])
    assert objective.label_smoothing == number(row["smoothing"])
    mixing = objective.mixing
    assert (mixing.mixup_alpha, mixing.cutmix_alpha) == (
        number(row["mixup"]),
        number(row["cutmix"]),
    )
    assert mixing.cutmix_share == 0.5
    section = recipe.evaluate
    assert (section.clips, section.crops) == (int(row["clips"]), int(row["crops"]))

    rng = np.random.default_rng(0)
    k, clips, n = views.frames, section.clips, 300
    for clip in range(clips):
        found = eval_indices(views.sampling, n, k, clip=clip, num_clips=clips)
        assert found.tolist() == eval_frames(row["dataset"], n, k, clip=clip, clips=clips)
    drawn = train_indices(views.sampling, n, k, rng)
    if row["dataset"] == "UCF101":
        assert np.diff(drawn).tolist() == [4] * (k - 1)
    else:
        edges = np.arange(k + 1) * (n // k if row["dataset"] in SEGMENTS else (n - 1) / k)
        assert (drawn >= np.round(edges[:-1])).all()
        assert (drawn <= np.round(edges[1:])).all()
        assert len(set(drawn % (n // k))) > 1
    crops = [draw_crop(views, width=340, height=256, rng=rng) for _ in range(200)]
    shares = [crop.width * crop.height / (340 * 256) for crop in crops]
    assert {crop.size for crop in crops} == {views.image_size}
    assert 0.07 < min(shares) < 0.2
    assert 0.8 < max(shares) <= 1


def eval_frames(dataset: str, n: int, k: int, *, clip: int, clips: int) -> list[int]:
    """Frames of a test clip as upstream's readers take them."""
    if dataset == "UCF101":
        start = (n - 4 * k) * clip // (clips - 1)
        return [start + 4 * i for i in range(k)]
    if dataset in SEGMENTS:
        if clips == 1:
            return [i * (n // k) + n // k // 2 for i in range(k)]
        return [int(clip * n / k / clips + n / k * i) for i in range(k)]
    segment = (n - 1) / k
    return [round(segment * i) + int(segment / (clips + 1) * (clip + 1)) for i in range(k)]


@pytest.mark.parametrize("name", RECIPES)
def test_schedule_and_optimiser(name):
    row, recipe = ROWS[name], RECIPES[name]
    assert isinstance(recipe, Recipe)
    optim = recipe.optim
    schedule = make_schedule(optim, steps_per_epoch=100)
    assert schedule.peak == pytest.approx(number(row["peak_lr"]))
    assert schedule.floor == pytest.approx(number(row["min_lr"]))
    assert schedule.num_steps == 100 * int(row["epochs"])
    assert schedule.warmup_steps == 100 * number(row["warmup_epochs"])
    warms_up_from = 1e-6 if name in CLASSIFIERS else 0.0
    assert schedule.start == pytest.approx(warms_up_from * optim.batch_size / 256)
    highest = max(schedule.lr_at(step) for step in range(schedule.num_steps))
    assert highest == pytest.approx(number(row["peak_lr"]))
    last = schedule.lr_at(schedule.num_steps - 1)
    assert schedule.floor <= last <= schedule.floor + 0.01 * schedule.peak
    assert optim.batch_size == int(row["effective_batch"])
    views_per_gpu = int(row["batch_per_gpu"]) * int(row["num_sample"])
    assert optim.micro_batch == views_per_gpu
    assert optim.batch_size == views_per_gpu * gpus(name)
    assert optim.betas == tuple(map(float, row["betas"].split()))
    assert (optim.eps, optim.weight_decay) == (number(row["eps"]), number(row["weight_decay"]))
    assert (optim.clip_grad or 0) == number(row["clip_grad"])
    assert optim.layer_decay == (number(row["layer_decay"]) or 1)
    assert recipe.model.drop_path == number(row["drop_path"])
    assert (optim.precision, optim.ema) == ("bf16", None)


def gpus(name: str) -> int:
    return int(ROWS[name]["gpus"])
