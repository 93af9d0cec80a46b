"""Recipe sections to models: the only place where the two meet."""

from typing import Any

import torch

from distill import recipe as schema
from distill.errors import InputError
from distill.students import DistillStudent, VideoClassifier, create_classifier, create_student
from distill.students.vit import VideoViT, resolve_size
from distill.students.warmstart import (
    LoadReport,
    WeightsError,
    file_sha256,
    load_vision_encoder,
    load_weights,
)
from distill.teachers import Teacher, create_teacher


def build_student(recipe: schema.Recipe) -> DistillStudent:
    """The distillation student of a `distill` recipe, with fresh weights.

    Raises InputError for a student whose tokens would not be the teacher's.
    """
    if recipe.model.tubelet != 1:
        raise InputError(
            f"{recipe.name}: model.tubelet: must be 1, as a teacher's targets are a patch each, "
            f"got {recipe.model.tubelet}"
        )
    teacher = recipe.objective.teacher
    teacher_size = resolve_size(schema.vit_size(teacher.size))
    return create_student(
        **_backbone(recipe),
        teacher_width=teacher_size.width,
        teacher_pooled=teacher_size.pooled_width,
        num_layers=teacher.layers,
        decoder=recipe.objective.decoder,
    )


def build_classifier(recipe: schema.Recipe) -> VideoClassifier:
    """The classifier of a `classify` recipe, with fresh weights."""
    return create_classifier(
        **_backbone(recipe),
        num_classes=recipe.objective.num_classes,
        probe=recipe.objective.probe,
        probe_norm=recipe.objective.probe_norm,
        head_drop_path=recipe.model.head_drop_path,
        fc_drop=recipe.objective.fc_drop,
        tubelet=recipe.model.tubelet,
    )


def _backbone(recipe: schema.Recipe) -> dict[str, Any]:
    """What every model of a recipe is built with, whatever stands on it."""
    model, views = recipe.model, recipe.data.views
    return {
        "size": schema.vit_size(model.size),
        "frames": views.frames,
        "image_size": views.image_size,
        "drop_path": model.drop_path,
        "activation": model.activation,
        "positions": model.positions,
        "checkpoint_blocks": model.checkpoint_blocks,
    }


def build_model(recipe: schema.Recipe) -> DistillStudent | VideoClassifier:
    """The model that a recipe trains, with fresh weights."""
    if isinstance(recipe.objective, schema.Distill):
        return build_student(recipe)
    return build_classifier(recipe)


def build_teacher(recipe: schema.Recipe) -> Teacher:
    """The frozen teacher of a `distill` recipe, with its weights; raises InputError without any.

    A random one is a function of the run's seed, and leaves the global generators as they are.
    """
    teacher, views = recipe.objective.teacher, recipe.data.views
    if teacher.weights is None and not teacher.random:
        raise InputError(
            "objective.teacher.weights: a teacher needs weights; "
            "set objective.teacher.weights.checkpoint=PATH"
        )
    weights = teacher.weights
    if weights is not None:
        check_sha256(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        return create_teacher(
            schema.vit_size(teacher.size),
            checkpoint=weights and weights.checkpoint,
            frames=views.frames,
            image_size=views.image_size,
            num_layers=teacher.layers,
            interval=teacher.interval,
            activation=teacher.activation,
            positions=teacher.positions,
            random=teacher.random,
            checkpoint_frames=weights and weights.frames,
            allow_unused=weights.allow_unused if weights else (),
        )


def load_recipe_weights(model: VideoViT, weights: schema.Weights) -> list[LoadReport]:
    """Load a recipe's `weights` section into a model; raises WeightsError with one line.

    Returns a report for each file: that of `extra` comes second.
    """
    extra = weights.extra
    check_sha256(weights)
    if extra is not None:
        check_sha256(extra)
    reports = [
        load_weights(
            model,
            weights.checkpoint,
            frames=weights.frames,
            head=weights.head,
            allow_missing=weights.allow_missing,
            allow_unused=weights.allow_unused,
        )
    ]
    if extra is not None:
        reports.append(load_vision_encoder(model, extra.checkpoint, frames=extra.frames))
    return reports


def check_sha256(weights: schema.Checkpoint) -> None:
    """Raise WeightsError when the file is not the one that the recipe names."""
    if weights.sha256 is not None:
        found = file_sha256(weights.checkpoint)
        if found != weights.sha256.lower():
            raise WeightsError(
                f"{weights.checkpoint}: sha256 is {found}, the recipe expects {weights.sha256}; "
                "fetch the file again, or set the recipe's sha256 if you trust this one"
            )
