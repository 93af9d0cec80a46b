"""Every view's logits, and what they are of: one file from which all numbers can be made again."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.checkpoint import write_tensors
from distill.data.index import Clip
from distill.errors import InputError

SCORES_FILE = "scores.safetensors"
RESULT_FILE = "evaluation.json"
LAYOUT = 1  # raised by hand when files written before can no longer be read


@dataclass(frozen=True)
class Scores:
    """Logits [R,C] in float32 of R views; [R] int64: which view of which clip, and its pixels.

    `pixels_hash` is xxh3-64 over a view's uint8 pixels as they went to the model.
    """

    clip_id: Tensor
    clip_index: Tensor
    crop_index: Tensor
    pixels_hash: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was asked, what the model said, and the manifest that says how (manifest.py).

    `unreadable` is the reason, by clip id, why views of a clip are missing.
    """

    scores: Scores
    clips: Sequence[Clip]
    unreadable: dict[int, str]
    manifest: dict


def in_order(scores: Scores, clips: Sequence[Clip]) -> Scores:
    """The views in the list's order, whoever made them; RuntimeError for a view that is twice."""
    row_of = {clip.id: row for row, clip in enumerate(clips)}
    rows = np.array([row_of[clip_id] for clip_id in scores.clip_id.tolist()], np.int64)
    keys = np.stack([scores.crop_index.numpy(), scores.clip_index.numpy(), rows])
    order = np.lexsort(keys)
    if (np.diff(keys[:, order], axis=1) == 0).all(axis=0).any():
        raise RuntimeError("a view was scored twice")
    return Scores(**{name: tensor[order] for name, tensor in vars(scores).items()})


def join(parts: Sequence[Scores]) -> Scores:
    """The views of all parts."""
    columns = ((name, [vars(part)[name] for part in parts]) for name in vars(parts[0]))
    return Scores(**{name: torch.cat(tensors) for name, tensors in columns})


def hash_pixels(pixels: np.ndarray) -> int:
    """xxh3-64 of a view's pixels, as a signed number."""
    digest = xxhash.xxh3_64_digest(np.ascontiguousarray(pixels))
    return struct.unpack(">q", digest)[0]


def hash_columns(*columns: Tensor) -> str:
    """xxh3-128 of int64 columns, row by row."""
    rows = torch.stack(columns, dim=1).contiguous().numpy()
    return xxhash.xxh3_128_hexdigest(rows.astype("<i8").tobytes())


def clip_title(clip: Clip) -> str:
    """What a clip is called in a report: its name, and which part of the video it is."""
    if clip.start_seconds is None or clip.end_seconds is None:
        return clip.name
    return f"{clip.name} ({clip.start_seconds:g} to {clip.end_seconds:g} s)"


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the scores with the clips' ids, labels, names and times, and the manifest."""

    def column(name: str, dtype: torch.dtype, unknown: float) -> Tensor:
        values = (getattr(clip, name) for clip in evaluation.clips)
        return torch.tensor([unknown if value is None else value for value in values], dtype=dtype)

    tensors = {
        **vars(evaluation.scores),
        "clips.id": column("id", torch.int64, 0),
        "clips.label": column("label", torch.int64, -1),
        "clips.start_seconds": column("start_seconds", torch.float64, float("nan")),
        "clips.end_seconds": column("end_seconds", torch.float64, float("nan")),
    }
    described = {
        "names": [clip.name for clip in evaluation.clips],
        "unreadable": [[clip_id, why] for clip_id, why in evaluation.unreadable.items()],
        "manifest": evaluation.manifest,
    }
    metadata = {name: json.dumps(value) for name, value in described.items()}
    write_tensors(path, tensors, metadata={"layout": str(LAYOUT), **metadata})


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote; raises InputError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; 'distill evaluate' writes it") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None
    if metadata.get("layout") != str(LAYOUT):
        raise InputError(
            f"{path}: not a file of scores that this version reads (layout "
            f"{metadata.get('layout', 'none')}, expected {LAYOUT}); evaluate again to make one"
        )
    names, unreadable, manifest = (
        json.loads(metadata[name]) for name in ("names", "unreadable", "manifest")
    )
    columns = zip(
        names,
        *(tensors.pop(f"clips.{name}").tolist() for name in ("id", "label")),
        *(tensors.pop(f"clips.{name}").tolist() for name in ("start_seconds", "end_seconds")),
        strict=True,
    )
    clips = [
        Clip(
            id=clip_id,
            path=name,
            name=name,
            label=label,
            start_seconds=None if np.isnan(start) else start,
            end_seconds=None if np.isnan(end) else end,
        )
        for name, clip_id, label, start, end in columns
    ]
    return Evaluation(Scores(**tensors), clips, {key: why for key, why in unreadable}, manifest)
