"""What contradicts itself in the recipe of a student or classifier that is one of timm's models."""

from collections.abc import Iterator

import torch

from distill.recipe import Classify, Model, Recipe
from distill.students.timm_backbone import TimmBackbone

OWN = ("tubelet", "positions", "activation", "drop_path", "head_drop_path", "checkpoint_blocks")


def timm_errors(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys and what is wrong there, in words that follow the key."""
    model, views, section = recipe.model, recipe.data.views, recipe.objective
    if model.size is not None:
        yield ("model", "size"), f"contradicts model.timm={model.timm}; drop one of them"
    for name in OWN:
        if getattr(model, name) != Model.model_fields[name].default:
            yield ("model", name), "is no setting of one of timm's models; drop it"
    if model.weights and model.weights.extra:
        yield ("model", "weights", "extra"), "is for video transformers alone"
    if isinstance(section, Classify):
        if section.trainable == "pool":
            yield (
                ("objective", "trainable"),
                "must be all or head: one of timm's models has no attention pool",
            )
        if section.probe is not None:
            yield ("objective", "probe"), "is for video transformers alone; drop it"
        num_layers = 1
    else:
        num_layers = max(teacher.layers for teacher in section.teachers.values())
        for name, needed in (("pixels", "full"), ("tokens", "all")):
            if section.cache and getattr(section.cache, name) != needed:
                yield (
                    ("objective", "cache", name),
                    f"must be {needed}: one of timm's models sees whole frames",
                )
    try:
        with torch.device("meta"):
            TimmBackbone(
                model.timm, frames=views.frames, image_size=views.image_size, num_layers=num_layers
            )
    except ValueError as error:
        yield ("model", "timm"), str(error)
