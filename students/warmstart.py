"""Copying released weights into our models: strict, reported, nothing left to chance.

What is fitted and how follows the loaders of OpenGVLab/InternVideo2's single_modality folder
(run_finetuning.py, models/internvideo2_teacher.py), where a bad load was only printed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from distill.students.classifier import MERGES, VideoClassifier
from distill.students.resize import (
    inflate_kernel,
    readings,
    resize_joint,
    resize_patches,
    resize_spatial,
    resize_temporal,
    square_side,
)
from distill.students.vit import SIZES, VideoViT
from distill.students.weights import (
    WeightsError,
    file_sha256,
    read_checkpoint,
    read_weights,
    weights_file,
)

__all__ = [
    "HeadPolicy",
    "LoadReport",
    "WeightsError",
    "file_sha256",
    "k710_rows",
    "load_vision_encoder",
    "load_weights",
    "read_weights",
    "weights_file",
]

HeadPolicy = Literal["keep", "first", "k600", "k700", "reset"]
K710_CLASSES = 710
KERNEL = "patch_embed.proj.weight"

# What may stay behind without being named: it is clear what it is and that it has no use here.
IMAGE_TABLES = ("img_pos_embed", "clip_img_pos_embed")
PROJECTORS = re.compile(r"(final_)?[a-z0-9]+_decoder\.|[a-z0-9]+_pos_embed")  # to any teacher
CLASSIFIER_HEADS = ("extra_mlp.", "fc_norm.", "down_norm.", "down.", "head.")


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file and of the model, by name.

    `taken` were copied as they are; `details` says from what to what the resized and the mapped
    ones went. What a file that `is_extra` does not hold stays as the first file has it.
    """

    path: str
    taken: tuple[str, ...]
    resized: tuple[str, ...]
    mapped: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]
    details: Mapping[str, str]
    is_extra: bool = False

    def lines(self) -> list[str]:
        """One line per outcome for the log; tensors that stayed behind grouped by module."""
        lines = [f"{self.path}: {len(self.taken)} tensors taken as they are"]
        for word, names in (("resized", self.resized), ("mapped", self.mapped)):
            lines += [f"{word}: {name}, {self.details[name]}" for name in names]
        if self.left_at_init:
            left = "left as they were" if self.is_extra else "left at init"
            lines.append(f"{left}: {_grouped(self.left_at_init)}")
        if self.unused:
            lines.append(f"unused: {_grouped(self.unused)}")
        return lines


def load_weights(
    model: VideoViT,
    path: str | Path,
    *,
    frames: int | None = None,
    head: HeadPolicy = "reset",
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> LoadReport:
    """Copy a checkpoint into a model; everything is accounted for, or nothing is copied.

    Position tables are interpolated to the model's frames and image size. `frames` is the
    checkpoint's number of frames, for when neither its metadata nor its tables tell. `head` says
    what becomes of a classification head: "keep" it, take the "first" rows (K710 to K400) or
    the rows of "k600" or "k700" among K710's, or "reset": leave the model's at init.
    `allow_missing` and `allow_unused` name prefixes of further tensors that may stay at init or
    be left out. Raises WeightsError that names everything unexplained.
    """
    file = weights_file(path)
    return _copy(
        model,
        file,
        read_checkpoint(file),
        frames=frames,
        head=head,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )


def load_vision_encoder(
    model: VideoViT, path: str | Path, *, frames: int | None = None
) -> LoadReport:
    """Copy the vision encoder of a multi-modality checkpoint over weights that are there already.

    As upstream's --finetune_extra (run_linear_probing.py): what stands on the attention pool
    stays as it is. Raises WeightsError, also for a file without `vision_encoder.` entries.
    """
    file = weights_file(path)
    content = read_checkpoint(file, is_whole=False)
    heads = CLASSIFIER_HEADS
    report = _copy(model, file, content, frames=frames, head="reset", allow_missing=heads)
    return replace(report, is_extra=True)


def _copy(
    model: VideoViT,
    file: Path,
    content: tuple[dict[str, Tensor], tuple[str, ...], dict[str, str]],
    *,
    frames: int | None,
    head: HeadPolicy,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> LoadReport:
    """`load_weights` of what `read_checkpoint` gave."""
    state, others, metadata = content
    wanted = model.state_dict()
    _check_probe(model, metadata, head, file)
    steps = _time_steps(state, frames, metadata, file)
    mapped = _fit_kernel(state, wanted) | fit_head(state, wanted, head, file)
    resized = _fit_tables(state, model, steps, file)

    reset = ("head.",) if head == "reset" and "head.weight" in wanted else ()
    return copy_weights(
        model,
        {name: value for name, value in state.items() if not name.startswith(reset)},
        file,
        resized=resized,
        mapped=mapped,
        allow_missing=(*_new_heads(state, reset), *allow_missing),
        allow_unused=(*_idle_parts(state, wanted), *allow_unused),
        unused=(*(name for name in state if name.startswith(reset)), *others),
    )


def copy_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    file: Path,
    *,
    resized: Mapping[str, str] | None = None,
    mapped: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    unused: tuple[str, ...] = (),
) -> LoadReport:
    """Copy a state dict that fits into a model, or nothing of it; the end of every loading.

    `resized` and `mapped` say what was done to which of its tensors, and `unused` are those of
    the file that are not in it. Raises WeightsError that names every tensor of another shape,
    and those missing or left over that no prefix of `allow_missing` or `allow_unused` explains.
    """
    wanted = model.state_dict()
    incoming = {name: value for name, value in state.items() if name in wanted}
    _check_shapes(incoming, wanted, file)
    missing = tuple(name for name in wanted if name not in incoming)
    left_over = tuple(name for name in state if name not in incoming)
    _check_names(
        file,
        missing=_unexplained(missing, tuple(allow_missing)),
        unused=_unexplained(left_over, tuple(allow_unused)),
    )
    model.load_state_dict(incoming, strict=False)
    details = {**(mapped or {}), **(resized or {})}
    return LoadReport(
        path=str(file),
        taken=tuple(name for name in wanted if name in incoming and name not in details),
        resized=tuple(resized or {}),
        mapped=tuple(mapped or {}),
        left_at_init=missing,
        unused=left_over + unused,
        details=details,
    )


def k710_rows(target: Literal["k600", "k700"]) -> list[int]:
    """Row of the Kinetics-710 head for every class of Kinetics-600 or -700.

    From upstream's k710/label_mixto600.json and label_mixto700.json.
    """
    text = files("distill.students").joinpath("k710_label_maps.json").read_text()
    return json.loads(text)[target]


def _check_probe(model: VideoViT, metadata: dict[str, str], head: HeadPolicy, file: Path) -> None:
    """Refuse the head of another probe, whose features may have the same number."""
    if head == "reset" or "num_classes" not in metadata or not isinstance(model, VideoClassifier):
        return
    probe = metadata.get("probe")
    norm = metadata.get("probe_norm") if probe in MERGES else None
    own = (model.probe, model.probe_norm if model.probe in MERGES else None)
    if (probe, norm) != own:
        raise WeightsError(
            f"{file}: its head is for probe {_probe_name(probe, norm)}, the model's for "
            f"{_probe_name(*own)}; set objective.probe and probe_norm to the file's, or head to "
            "reset"
        )


def _probe_name(probe: str | None, norm: str | None) -> str:
    return f"{probe or 'none'}{f' with {norm}' if norm else ''}"


def _fit_kernel(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, str]:
    tubelet = wanted[KERNEL].shape[2]
    kernel = state.get(KERNEL)
    if kernel is not None and kernel.ndim == 4:  # of images
        state[KERNEL] = inflate_kernel(kernel[:, :, None], tubelet=tubelet)
        return {KERNEL: f"image -> tubelet {tubelet}"}
    if kernel is None or kernel.ndim != 5 or kernel.shape[2] != 1 or tubelet == 1:
        return {}
    state[KERNEL] = inflate_kernel(kernel, tubelet=tubelet)
    return {KERNEL: f"tubelet 1 -> {tubelet}"}


def fit_head(
    state: dict[str, Tensor], wanted: dict[str, Tensor], head: str, file: Path
) -> dict[str, str]:
    """Change the head's rows in `state` to the model's, and say from what to what, by name."""
    if head not in get_args(HeadPolicy):
        raise WeightsError(f"head: {head!r} is none of {', '.join(get_args(HeadPolicy))}")
    if head == "reset":
        return {}
    if "head.weight" not in wanted:
        raise WeightsError(f"{file}: head: {head} asked for, but the model has no head")
    if "head.weight" not in state or "head.bias" not in state:
        raise WeightsError(
            f"{file}: head: {head} asked for, but the file has no head; set head to reset"
        )
    rows, classes = state["head.weight"].shape[0], wanted["head.weight"].shape[0]
    if head == "keep":
        if rows == classes:
            return {}
        raise WeightsError(
            f"{file}: head: keep asked for, but the file has {rows} classes and the model "
            f"{classes}; set head to first, k600, k700 (from K710) or reset"
        )
    if head == "first":
        index = list(range(classes))
        fits = rows >= classes
    else:
        index = k710_rows(head)
        fits = rows == K710_CLASSES and classes == len(index)
    if not fits:
        takes = f"{K710_CLASSES} classes to {len(index)}" if head != "first" else "the first rows"
        raise WeightsError(
            f"{file}: head: {head} takes {takes}, but the file has {rows} classes and the model "
            f"{classes}"
        )
    names = ("head.weight", "head.bias")
    state.update({name: state[name][index] for name in names})
    return {name: f"{rows} -> {classes} classes ({head})" for name in names}


def _time_steps(
    state: dict[str, Tensor], frames: int | None, metadata: dict[str, str], file: Path
) -> int | None:
    """Time steps of the file's tables, None when neither recipe nor metadata give its frames."""
    text = metadata.get("frames", "")
    if text.isdigit():
        if frames not in (None, int(text)):
            raise WeightsError(f"{file}: frames: {frames} given, but the file says {text}")
        frames = int(text)
    kernel = state.get(KERNEL)
    tubelet = kernel.shape[2] if kernel is not None and kernel.ndim == 5 else 1
    return None if frames is None else frames // tubelet


def _fit_tables(
    state: dict[str, Tensor], model: VideoViT, steps: int | None, file: Path
) -> dict[str, str]:
    t, side, _ = model.table_grid
    details = {}
    for name, own in model.named_parameters():
        table = state.get(name)
        if "pos_embed" not in name or table is None or name.endswith("_cls"):
            continue
        if table.ndim != 3 or table.shape[-1] != own.shape[-1]:
            continue  # another model's: reported with the other shapes
        rows = table.shape[1]
        if name.endswith("_temporal"):
            if rows != t:
                state[name] = resize_temporal(table, steps=t)
                details[name] = f"{rows} -> {t} time steps"
        elif name.endswith("_spatial"):
            if rows != side * side and (found := square_side(rows)):
                state[name] = resize_spatial(table, side=side)
                details[name] = f"{found}x{found} -> {side}x{side} patches"
        else:
            has_cls = own.shape[1] > math.prod(model.table_grid)
            grid = _table_grid(rows - has_cls, model, steps, f"{file}: {name}")
            if grid != (t, side):
                resize = resize_joint if has_cls else resize_patches
                state[name] = resize(table, grid=grid, to=(t, side))
                details[name] = f"{_times(grid)} -> {_times((t, side))} patches"
    return details


def _table_grid(rows: int, model: VideoViT, steps: int | None, where: str) -> tuple[int, int]:
    """Time steps and side that a table of `rows` patch positions was made for."""
    if steps is not None:
        found = square_side(rows // steps) if steps and rows % steps == 0 else None
        if found:
            return steps, found
        raise WeightsError(
            f"{where} has {rows} patch positions, which are not {steps} square grids; check the "
            "checkpoint's number of frames"
        )
    found = readings(rows, to=model.table_grid[:2])
    if len(found) == 1:
        return found[0]
    fits = " or ".join(map(_times, found)) or "neither of the model's image size nor its frames"
    raise WeightsError(
        f"{where} has {rows} patch positions: {fits}; set frames to the checkpoint's frames"
    )


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}x{grid[1]}"


def _new_heads(state: dict[str, Tensor], reset: tuple[str, ...]) -> tuple[str, ...]:
    """What a new classifier may leave at init: its head, and what the file has nothing of."""
    if not reset:
        return ()
    absent = (p for p in CLASSIFIER_HEADS if not any(name.startswith(p) for name in state))
    return (*reset, *absent)


def _idle_parts(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What of a file has no place in a model like this one."""
    if any(map(PROJECTORS.match, wanted)):
        return IMAGE_TABLES
    projectors = tuple(filter(PROJECTORS.match, state))
    if "head.weight" in wanted:
        return (*IMAGE_TABLES, *projectors)
    return (*IMAGE_TABLES, *projectors, "fc_norm.", "head.")  # a classifier can teach


def _unexplained(names: tuple[str, ...], prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if not name.startswith(prefixes)]


def _check_shapes(incoming: dict[str, Tensor], wanted: dict[str, Tensor], file: Path) -> None:
    wrong = [name for name, value in incoming.items() if value.shape != wanted[name].shape]
    if not wrong:
        return
    name = wrong[0]
    text = (
        f"{file}: {len(wrong)} of {len(incoming)} tensors have another shape than the model's, "
        f"{name} {list(incoming[name].shape)} instead of {list(wanted[name].shape)}"
    )
    found, own = _size_name(incoming), _size_name(wanted)
    raise WeightsError(text if found == own else f"{text}; the file is {found}, the model {own}")


def _size_name(state: dict[str, Tensor]) -> str:
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    width = state[KERNEL].shape[0] if KERNEL in state else 0
    names = (n for n, s in SIZES.items() if (s.width, s.depth) == (width, depth))
    return next(names, f"{width} wide and {depth} deep")


def _check_names(file: Path, *, missing: list[str], unused: list[str]) -> None:
    problems = []
    if missing:
        problems.append(f"{_grouped(missing)} of the model would stay at init")
    if unused:
        problems.append(f"{_grouped(unused)} of the file would go unused")
    if problems:
        settings = [s for s, n in (("allow_missing", missing), ("allow_unused", unused)) if n]
        raise WeightsError(
            f"{file}: {'; '.join(problems)}; if that is meant, name the prefixes in "
            f"{' and '.join(settings)}"
        )


def _grouped(names: Sequence[str]) -> str:
    """Names shortened to modules with counts: `blocks.* (12), cls_token`."""
    counts = Counter(f"{name.partition('.')[0]}.*" if "." in name else name for name in names)
    return ", ".join(
        f"{group} ({count})" if group.endswith("*") else group for group, count in counts.items()
    )
