"""What contradicts itself in a distillation: its teachers, masks and cache."""

import re
from collections.abc import Iterator

import torch

from distill.recipe import Distill, Recipe, Teacher, Views, read_views, vit_size
from distill.students.vit import PATCH, ViTSize, resolve_size
from distill.teachers import create_teacher, return_layers

ATTENTIVE = ("internvideo2", "internvl")  # teachers whose pool says where to look
TEACHER_NAME = re.compile(r"[a-z][a-z0-9]*")
TAKEN_NAMES = ("clip", "img", "layer", "loss", "middle", "pooled")  # of weights and losses

Keys = tuple[str, ...]


def named_teachers(section: Distill) -> Iterator[tuple[Keys, Teacher]]:
    """Every teacher of a distillation and where it stands in the recipe."""
    for name, teacher in section.teachers.items():
        yield ("objective", "others", name) if name else ("objective", "teacher"), teacher


def distill_errors(
    recipe: Recipe, section: Distill, *, student: ViTSize | None
) -> Iterator[tuple[Keys, str]]:
    """The keys and what is wrong there, in words that follow the key; `student` is its size."""
    cache = section.cache
    if recipe.model.tubelet != 1:
        yield ("model", "tubelet"), "must be 1, as a teacher's targets are a patch each"
    for keys, teacher in named_teachers(section):
        for key, message in _teacher_errors(teacher, recipe, place=".".join(keys), student=student):
            yield (*keys, key), message
        if teacher.weights and teacher.weights.extra:
            yield (*keys, "weights", "extra"), "is for model.weights alone"
    if section.targets != "live" and cache is None:
        yield (
            ("objective", "cache"),
            "missing: give it a folder, or set objective.targets=live",
        )
    if cache and cache.tokens == "superset" and section.mask.kind == "tube":
        yield (
            ("objective", "cache", "tokens"),
            "a tube mask has no superset; set visible (the mask of a view stays) or all",
        )
    kind = section.teacher.kind
    if section.mask.kind.startswith("attention") and kind not in ATTENTIVE:
        yield (
            ("objective", "mask", "kind"),
            f"needs the attention of {' or '.join(ATTENTIVE)} as objective.teacher, and "
            f"{kind} has none; set random or tube",
        )
    for name in section.others:
        if not TEACHER_NAME.fullmatch(name) or name in TAKEN_NAMES:
            yield (
                ("objective", "others", name),
                f"is no name for a teacher: expected small letters and digits, and none of "
                f"{', '.join(TAKEN_NAMES)}",
            )


def _teacher_errors(
    teacher: Teacher, recipe: Recipe, *, place: str, student: ViTSize | None
) -> Iterator[tuple[str, str]]:
    """Of one teacher: the setting below `place` and the message."""
    views, kind = recipe.data.views, teacher.kind
    main, cache = recipe.objective.teacher, recipe.objective.cache
    if student and teacher.layers > student.depth:
        yield "layers", f"is {teacher.layers}, but the student has {student.depth} blocks"
    if kind == "timm":
        if teacher.model is None:
            yield "model", "missing: the name of a model of timm"
        else:
            yield from _image_teacher_errors(teacher, views)
        if teacher.size is not None:
            yield "size", "is no setting of kind timm, whose models have names; drop it"
    else:
        if teacher.model is not None:
            yield "model", f"is no setting of kind {kind}, but of timm; drop it"
        if teacher.size is None:
            yield "size", "missing"
        else:
            try:
                depth = resolve_size(vit_size(teacher.size)).depth
            except ValueError as error:
                yield "size", str(error)
            else:
                try:
                    return_layers(depth, teacher.layers, teacher.interval)
                except ValueError as error:
                    yield "interval", str(error)
        if teacher.image_size not in (None, views.image_size):
            yield (
                "image_size",
                f"must be data.views.image_size, {views.image_size}: its patches of {PATCH} px "
                "are the student's tokens",
            )
    if kind != "internvideo2":
        if teacher.positions != "joint":
            yield "positions", f"is no setting of kind {kind}; drop it"
        if kind != "internvl" and teacher.activation != "gelu_tanh":
            yield "activation", f"is no setting of kind {kind}; drop it"
    frames = teacher.frames or views.frames
    if kind in ("internvl", "timm") and frames != views.frames:
        yield (
            "frames",
            f"must be data.views.frames, {views.frames}: {kind} sees each frame by itself",
        )
    elif frames % views.frames:
        yield "frames", f"must be a multiple of data.views.frames, {views.frames}"
    elif read_views(recipe).frames % frames:
        yield "frames", f"must divide the {read_views(recipe).frames} that another teacher takes"
    if teacher.random and teacher.weights:
        yield "random", f"contradicts {place}.weights"
    if not (
        teacher.random or teacher.weights or (teacher is main and cache and cache.teacher_hash)
    ):
        yield (
            "weights",
            "missing: a teacher is random only where the recipe says 'random: true'",
        )


def _image_teacher_errors(teacher: Teacher, views: Views) -> Iterator[tuple[str, str]]:
    """What timm has to say, of a teacher without memory for its weights."""
    try:
        with torch.device("meta"):
            create_teacher(
                f"timm/{teacher.model}",
                image_size=teacher.image_size or views.image_size,
                num_layers=teacher.layers,
                interval=teacher.interval,
                random=True,
            )
    except ValueError as error:
        yield "model", str(error)
