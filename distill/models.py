"""Recipe sections to models: the only place where the two meet."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from distill import recipe as schema
from distill.errors import InputError
from distill.mask import token_grid
from distill.students import DistillStudent, VideoClassifier, create_classifier, create_student
from distill.students.student import ProjectorSet
from distill.students.timm_backbone import (
    TimmBackbone,
    TimmClassifier,
    TimmStudent,
    load_timm,
)
from distill.students.vit import PATCH, VideoViT, resolve_size
from distill.students.warmstart import (
    LoadReport,
    WeightsError,
    file_sha256,
    load_vision_encoder,
    load_weights,
)
from distill.teachers import Teacher, create_teacher


def build_student(recipe: schema.Recipe) -> DistillStudent | TimmStudent:
    """The distillation student of a `distill` recipe, with fresh weights.

    Raises InputError for a student whose tokens would not be the teacher's.
    """
    if recipe.model.tubelet != 1:
        raise InputError(
            f"{recipe.name}: model.tubelet: must be 1, as a teacher's targets are a patch each, "
            f"got {recipe.model.tubelet}"
        )
    section, views = recipe.objective, recipe.data.views
    shapes = {name: teacher_shape(recipe, name) for name in section.teachers}
    projectors = {
        "teacher_width": shapes[schema.MAIN].width,
        "teacher_pooled": shapes[schema.MAIN].pooled_width,
        "num_layers": section.teacher.layers,
        "decoder": section.decoder,
        "others": {
            name: ProjectorSet(
                width=shapes[name].width,
                num_layers=other.layers,
                decoder=other.decoder,
                has_cls=shapes[name].has_cls,
            )
            for name, other in section.others.items()
        },
    }
    if recipe.model.timm is None:
        return create_student(**_backbone(recipe), **projectors)
    return TimmStudent(
        recipe.model.timm,
        frames=views.frames,
        image_size=views.image_size,
        side=views.image_size // PATCH,
        **projectors,
    )


def build_classifier(recipe: schema.Recipe) -> VideoClassifier | TimmClassifier:
    """The classifier of a `classify` recipe, with fresh weights."""
    if recipe.model.timm is not None:
        return TimmClassifier(
            recipe.model.timm,
            num_classes=recipe.objective.num_classes,
            frames=recipe.data.views.frames,
            image_size=recipe.data.views.image_size,
            fc_drop=recipe.objective.fc_drop,
        )
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


def build_model(recipe: schema.Recipe) -> nn.Module:
    """The model that a recipe trains, with fresh weights."""
    if isinstance(recipe.objective, schema.Distill):
        return build_student(recipe)
    return build_classifier(recipe)


def build_teacher(recipe: schema.Recipe, name: str = schema.MAIN) -> Teacher:
    """A frozen teacher of a `distill` recipe, with its weights; raises InputError without any.

    A random one is a function of the run's seed, and leaves the global generators as they are.
    Raises InputError for one whose tokens are not the student's.
    """
    teacher = recipe.objective.teachers[name]
    place = teacher_place(name)
    if teacher.weights is None and not teacher.random:
        raise InputError(
            f"{place}.weights: a teacher needs weights; set {place}.weights.checkpoint=PATH"
        )
    if teacher.weights is not None:
        check_sha256(teacher.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        built = _create_teacher(teacher, recipe.data.views)
    grid = token_grid(recipe.data.views)
    if built.grid != grid:
        raise InputError(
            f"{place}: its tokens are {_times(built.grid)} of a clip, the student's "
            f"{_times(grid)}; set {place}.image_size to one that gives as many"
        )
    return built


def _create_teacher(teacher: schema.Teacher, views: schema.Views) -> Teacher:
    weights = teacher.weights
    frames = teacher.frames or views.frames
    settings = {
        "checkpoint": weights and weights.checkpoint,
        "random": teacher.random,
        "frames": frames,
        "image_size": teacher.image_size or views.image_size,
        "num_layers": teacher.layers,
        "interval": teacher.interval,
        "mean": teacher.mean,
        "std": teacher.std,
        "allow_unused": weights.allow_unused if weights else (),
    }
    size = schema.vit_size(teacher.size) if teacher.kind != "timm" else f"timm/{teacher.model}"
    tubelet = frames // views.frames
    match teacher.kind:
        case "internvideo2":
            return create_teacher(
                size,
                **settings,
                tubelet=tubelet,
                activation=teacher.activation,
                positions=teacher.positions,
                checkpoint_frames=weights and weights.frames,
            )
        case "internvl":
            return create_teacher(
                size, family="internvl", **settings, activation=teacher.activation
            )
        case "videomae":
            return create_teacher(size, family="videomae", **settings, tubelet=tubelet)
        case "timm":
            return create_teacher(size, **settings, side=views.image_size // PATCH)


@dataclass(frozen=True)
class TeacherShape:
    """What a student and a record need to know of a teacher; `pooled_width` 0 is none."""

    width: int
    pooled_width: int
    has_cls: bool
    has_attention: bool


def teacher_shape(recipe: schema.Recipe, name: str = schema.MAIN) -> TeacherShape:
    """The shape of a teacher's targets, without its weights."""
    teacher = recipe.objective.teachers[name]
    if teacher.kind == "timm":
        built = meta_teacher(recipe, name)
        return TeacherShape(
            built.embed_dim, built.pooled_width or 0, built.has_cls, built.has_attention
        )
    size = resolve_size(schema.vit_size(teacher.size))
    if teacher.kind == "videomae":
        return TeacherShape(size.width, 0, has_cls=False, has_attention=False)
    return TeacherShape(size.width, size.pooled_width, has_cls=True, has_attention=True)


def meta_teacher(recipe: schema.Recipe, name: str = schema.MAIN) -> Teacher:
    """A teacher without memory for its weights: to count and to ask."""
    section = recipe.objective.teachers[name]
    return _meta_teacher(
        section.model_copy(update={"weights": None, "random": True}), recipe.data.views
    )


@cache
def _meta_teacher(teacher: schema.Teacher, views: schema.Views) -> Teacher:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _create_teacher(teacher, views)


def teacher_depth(recipe: schema.Recipe, name: str = schema.MAIN) -> int:
    """How many blocks a teacher has."""
    teacher = recipe.objective.teachers[name]
    if teacher.kind == "timm":
        return meta_teacher(recipe, name).depth
    return resolve_size(schema.vit_size(teacher.size)).depth


def teacher_place(name: str) -> str:
    """A teacher's section in a recipe."""
    return f"objective.others.{name}" if name else "objective.teacher"


def _times(grid: tuple[int, int, int]) -> str:
    return "x".join(map(str, grid))


def load_recipe_weights(
    model: VideoViT | TimmBackbone, weights: schema.Weights
) -> list[LoadReport]:
    """Load a recipe's `weights` section into a model; raises WeightsError with one line.

    Returns a report for each file: that of `extra` comes second.
    """
    extra = weights.extra
    check_sha256(weights)
    if isinstance(model, TimmBackbone):
        return [
            load_timm(
                model,
                weights.checkpoint,
                head=weights.head,
                allow_missing=weights.allow_missing,
                allow_unused=weights.allow_unused,
            )
        ]
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
