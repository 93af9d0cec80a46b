"""What a record holds: a teacher's view as arrays, and what the view is as JSON values."""

import numpy as np
import torch
from einops import rearrange

from distill.cache.codes import Codec
from distill.data.index import Clip
from distill.data.load import View
from distill.recipe import MAIN, of_teacher


def record_fields(records: dict[str, torch.Tensor], *, codec: Codec) -> dict[str, torch.Tensor]:
    """`view_records` in the form that the cache keeps: fields in their order, the batch in front.

    There is what the records have; `codes` and `scales` are the main teacher's, `codes.NAME` and
    `scales.NAME` another's.
    """
    is_few = "attention" in records and records["attention"].shape[1] <= 2**15
    fields = {"tokens": records["tokens"].to(torch.int16 if is_few else torch.int32)}
    for name in ("next_arrival", "patches", "pixels"):
        if name in records:
            fields[name] = records[name]
    for name, own in {MAIN: codec, **codec.others}.items():
        middle = rearrange(records[of_teacher("middle", name)], "k b m e -> b k m e")
        fields |= {of_teacher(field, name): value for field, value in own.encode(middle).items()}
    if "pooled" in records:
        fields["pooled"] = records["pooled"].half()
    if "attention" in records:
        fields["attention"] = records["attention"]  # half precision makes small weights zero
    return fields


def record_arrays(records: dict[str, torch.Tensor], *, codec: Codec) -> dict[str, np.ndarray]:
    """`record_fields` as arrays."""
    fields = record_fields(records, codec=codec)
    return {name: value.cpu().numpy() for name, value in fields.items()}


def view_info(clip: Clip, view: View) -> dict:
    """What a training view is, in JSON values: `replay_view` makes its pixels from them again."""
    return {
        "name": clip.name,
        "view": view.number,
        "seed": view.seed,
        "frames": view.frames.tolist(),
        # Folders of frames have no clock, and JSON has no NaN.
        "pts_seconds": None if np.isnan(view.pts_seconds).any() else view.pts_seconds.tolist(),
        "crop": [int(value) for value in view.crop],
        "resize": None if view.resize is None else [int(value) for value in view.resize],
        "flip": bool(view.flip),
        "decoder": view.decoder,
    }
