"""A recipe shrunk until it runs in seconds on a CPU, with all of its structure.

What a recipe does stays: sampling and frames, augmentation, mixing, masks, what is trained, what
becomes of a head, layer decay, drop path, the peak of the learning rate. How much of it shrinks:
widths, depths, pixels, batches, epochs. Shrinking a toy changes nothing.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.checks.recipe import STAGE
from distill.recipe import Classify, Distill, Recipe, Size, vit_size
from distill.students import create_student

SIZES = {
    "S14": Size(width=32, depth=4, heads=2, pooled_width=32),
    "B14": Size(width=48, depth=4, heads=3, pooled_width=32),
    "L14": Size(width=64, depth=5, heads=4, pooled_width=32),
    "1B": Size(width=80, depth=6, heads=5, mlp_ratio=48 / 11, pooled_width=32),
    "6B": Size(width=96, depth=6, heads=3, pooled_width=32),
}
TIMM, TIMM_TEACHER = "test_resnet", "test_vit"  # timm's own toys, in place of any of its models
SUFFIX = "-toy"  # of every folder that a toy writes to or starts from
RUN_WEIGHTS = "model.safetensors"  # as a run leaves them; other files are released ones


def toy_recipe(recipe: Recipe) -> Recipe:
    """The recipe with small numbers in place of large ones.

    Teachers are random. A model of a size of its own, as the quickstart's, keeps that and its
    weights; the others start from weights in the toy's folder of what the recipe starts from.
    """
    values = recipe.model_dump(mode="json")
    values["run"]["folder"] = _folder(values["run"]["folder"])
    _shrink_data(values["data"])
    if values["model"]["timm"]:
        values["model"]["timm"] = TIMM
    elif isinstance(values["model"]["size"], str):
        _shrink_model(values["model"])
    if isinstance(recipe.objective, Classify):
        if values["objective"]["features"]:
            _in_folder(values["objective"]["features"])
    else:
        _shrink_distillation(values["objective"])
    _shrink_optim(values["optim"])
    values["evaluate"]["batch_size"] = min(values["evaluate"]["batch_size"], 8)
    return Recipe.model_validate(values)


def _shrink_data(data: dict[str, Any]) -> None:
    data["workers"] = 1
    views = data["views"]
    if views["image_size"] > 56:  # 224 to 28 and 336 to 42 pixels, two and three patches
        views["image_size"] = 14 * max(2, round(views["image_size"] / 112))
    splits = [data[split] for split in ("train", "val", "test") if data[split]]
    for clips in splits:
        clips["num_clips"] = clips["num_clips"] and min(clips["num_clips"], 64)
    demo = data["demo"]
    if demo is not None:
        before = demo["folder"]
        _in_folder(demo)
        for split in ("train_clips", "val_clips", "test_clips"):
            demo[split] = min(demo[split], 20)
        for clips in splits:
            if Path(clips["list"] or "").parent == Path(before):
                clips["list"] = str(Path(demo["folder"]) / Path(clips["list"]).name)


def _shrink_model(model: dict[str, Any]) -> None:
    model["size"] = SIZES[model["size"]].model_dump(mode="json")
    model["checkpoint_blocks"] = min(model["checkpoint_blocks"], 2)
    weights = model["weights"]
    for one in (weights, weights["extra"]) if weights else ():
        if one and not one["checkpoint"].startswith(STAGE):
            path = Path(one["checkpoint"])
            one["checkpoint"] = str(Path(_folder(str(path.parent))) / path.name)
            one["sha256"] = None


def _shrink_distillation(objective: dict[str, Any]) -> None:
    for teacher in (objective["teacher"], *objective.get("others", {}).values()):
        if isinstance(teacher["size"], str):
            teacher["size"] = SIZES[teacher["size"]].model_dump(mode="json")
            teacher["layers"] = min(teacher["layers"], 2)
            teacher["weights"], teacher["random"] = None, True
        elif teacher["model"]:
            teacher |= {"model": TIMM_TEACHER, "layers": min(teacher["layers"], 2)}
            teacher |= {"image_size": 64, "weights": None, "random": True}
    monitor = objective.get("monitor")
    if monitor:
        for name, most in (("every_epochs", 1), ("clips", 8), ("exact_clips", 2)):
            monitor[name] = min(monitor[name], most)
    cache = objective["cache"]
    if cache:
        _in_folder(cache)
        cache["teacher_hash"] = None
        for name, most in (("views", 2), ("batch_size", 4), ("shard_mb", 1)):
            cache[name] = min(cache[name], most)


def _shrink_optim(optim: dict[str, Any]) -> None:
    if optim["lr_per_batch"]:  # the small batch learns at the rate of the large one
        scale = optim["batch_size"] / optim["lr_per_batch"]
        for name in ("lr", "min_lr", "warmup_lr"):
            optim[name] *= scale
        optim["lr_per_batch"] = None
    optim["batch_size"] = min(optim["batch_size"], 4)
    if optim["micro_batch"]:
        optim["micro_batch"] = min(optim["micro_batch"], 2)
    epochs = min(optim["epochs"], 2)
    if optim["epochs"]:
        optim["warmup_epochs"] *= epochs / optim["epochs"]
    optim["epochs"] = epochs


def _in_folder(section: dict[str, Any]) -> None:
    section["folder"] = _folder(section["folder"])


def _folder(folder: str) -> str:
    return folder if folder.endswith(SUFFIX) else folder + SUFFIX


def make_toy_weights(recipe: Recipe) -> None:
    """Write random weights where a toy starts from a released file, in that file's layout.

    Stage 1 (`module`, with projectors) for a recipe's weights, and stage 2 (`vision_encoder.`,
    beside other parts) for the `extra` ones. What a run leaves is made by that run alone.
    """
    weights = recipe.model.weights
    if weights is None or not isinstance(recipe.model.size, Size):
        return
    for section, prefix in ((weights, ""), (weights.extra, "vision_encoder.")):
        if (
            section is None
            or SUFFIX not in section.checkpoint
            or section.checkpoint.endswith(RUN_WEIGHTS)
        ):
            continue
        path = Path(section.checkpoint)
        if path.exists():
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.run.seed)
            student = _released_student(recipe, frames=section.frames)
        state = {prefix + name: value for name, value in student.state_dict().items()}
        if prefix:
            state["temp"] = torch.ones(())
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"module": state}, path)


def _released_student(recipe: Recipe, *, frames: int | None) -> nn.Module:
    """What a released file holds: for a student that goes on distilling, its own projectors too."""
    if isinstance(recipe.objective, Distill):
        from distill.models import build_student  # not at the top: recipes are read without models

        return build_student(recipe)
    return create_student(
        vit_size(recipe.model.size),
        frames=frames or recipe.data.views.frames,
        image_size=recipe.data.views.image_size,
        num_layers=2,
        decoder="linear",
    )
