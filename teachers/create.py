"""From a name or a size to a frozen teacher with its weights."""

import dataclasses
import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distill.students.timm_backbone import load_timm
from distill.students.vit import SIZES, Activation, Positions, ViTSize
from distill.students.warmstart import WeightsError, load_weights
from distill.teachers.frozen import Teacher
from distill.teachers.image import ImageTeacher
from distill.teachers.internvideo2 import InternVideo2
from distill.teachers.internvl import InternVL
from distill.teachers.videomae import VideoMAE, load_videomae

Family = Literal["internvideo2", "internvl", "videomae", "timm"]


@dataclass(frozen=True)
class Published:
    """A released teacher, and how InternVideo2's recipes take it."""

    family: Family
    size: ViTSize


TEACHERS = {
    "internvideo2_1B": Published("internvideo2", SIZES["1B"]),
    "internvideo2_6B": Published("internvideo2", SIZES["6B"]),
    "internvl_6b": Published("internvl", dataclasses.replace(SIZES["6B"], layer_scale=0.1)),
    "videomae_g": Published("videomae", SIZES["1B"]),  # the same numbers, other blocks
}

# What a caller does not have to say.
DEFAULTS: dict[Family, dict[str, Any]] = {
    "internvideo2": {"frames": 8, "image_size": 224, "num_layers": 6, "interval": 3.34},
    "internvl": {"frames": 8, "image_size": 224, "num_layers": 6, "interval": 1.0},
    "videomae": {"frames": 16, "image_size": 224, "num_layers": 4, "interval": 1.0},
    "timm": {"frames": 8, "num_layers": 1, "interval": 1.0},
}
TIMM = "timm/"  # what the names of timm's models begin with
BUILD = {
    "internvideo2": InternVideo2,
    "internvl": InternVL,
    "videomae": VideoMAE,
    "timm": ImageTeacher,
}


def create_teacher(
    name_or_size: str | ViTSize,
    *,
    family: Family = "internvideo2",
    checkpoint: str | Path | None = None,
    frames: int | None = None,
    image_size: int | None = None,
    num_layers: int | None = None,
    interval: float | None = None,
    activation: Activation | None = None,
    tubelet: int | None = None,
    positions: Positions | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    side: int | None = None,
    random: bool = False,
    checkpoint_frames: int | None = None,
    allow_unused: tuple[str, ...] = (),
) -> Teacher:
    """Build a frozen teacher; `name_or_size` is a row of TEACHERS or of SIZES, or a ViTSize.

    It may also be `timm/` and the name of a model there, whose features are resized to `side` by
    `side` tokens a frame; its image size, mean and std are that model's own where None. A size
    is built as `family` says; what else is None is as DEFAULTS has it and as upstream normalises
    (ImageNet's mean and std). `frames` are those that the teacher sees. Weights come from
    `checkpoint` (whose report stays in `load_report`); every one must be there. Raises
    WeightsError without a checkpoint unless `random` asks for random weights, and ValueError for
    settings that do not fit or that the family does not have.
    """
    family, size = resolve_teacher(name_or_size, family=family)
    if checkpoint is None and not random:
        raise WeightsError(
            f"teacher {name_or_size}: no checkpoint; give its weights, or ask for a random "
            "teacher by name (random: true) if this is a measurement"
        )
    if checkpoint is not None and random:
        raise WeightsError(f"{checkpoint}: a random teacher takes no checkpoint; drop one of them")
    asked = {
        "frames": frames,
        "image_size": image_size,
        "num_layers": num_layers,
        "interval": interval,
        "activation": activation,
        "tubelet": tubelet,
        "positions": positions,
        "mean": mean,
        "std": std,
        "side": side,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    build = BUILD[family]
    if foreign := sorted(given.keys() - inspect.signature(build).parameters.keys()):
        raise ValueError(f"teacher {name_or_size}: {family} has no {', '.join(foreign)}")

    # Drawing a billion weights takes longer than reading them; timm has buffers beside its own.
    with nullcontext() if random or family == "timm" else torch.device("meta"):
        teacher = build(size, **{**DEFAULTS[family], **given})
    if checkpoint is None:
        return teacher
    if isinstance(teacher, ImageTeacher):
        teacher.load_report = load_timm(teacher, checkpoint, allow_unused=allow_unused)
        return teacher
    teacher.to_empty(device="cpu")
    if isinstance(teacher, VideoMAE):
        teacher.fill_buffers()
        teacher.load_report = load_videomae(teacher, checkpoint, allow_unused=allow_unused)
    elif isinstance(teacher, InternVL):  # whose file holds a whole vision-language model
        teacher.load_report = load_weights(teacher, checkpoint, frames=1, allow_unused=("",))
    else:
        teacher.load_report = load_weights(
            teacher, checkpoint, frames=checkpoint_frames, allow_unused=allow_unused
        )
    return teacher


def resolve_teacher(
    name_or_size: str | ViTSize, *, family: Family = "internvideo2"
) -> tuple[Family, ViTSize | str]:
    """Family and size of a row of TEACHERS, or of SIZES; of one of timm's models, its name.

    Raises ValueError that lists the names.
    """
    if isinstance(name_or_size, str) and name_or_size.startswith(TIMM):
        return "timm", name_or_size.removeprefix(TIMM)
    if isinstance(name_or_size, ViTSize):
        return family, name_or_size
    if name_or_size in TEACHERS:
        return TEACHERS[name_or_size].family, TEACHERS[name_or_size].size
    if name_or_size in SIZES:
        return family, SIZES[name_or_size]
    raise ValueError(
        f"unknown teacher {name_or_size!r}; choose one of {', '.join((*TEACHERS, *SIZES))}, or "
        f"{TIMM} and the name of a model there"
    )
