"""What a record holds: a teacher's view as arrays, and what the view is as JSON values."""

import numpy as np
import torch
from einops import rearrange

from distill.cache.codes import Codec
from distill.data.index import Clip
from distill.data.load import View


def record_fields(records: dict[str, torch.Tensor], *, codec: Codec) -> dict[str, torch.Tensor]:
    """`view_records` in the form that the cache keeps: fields in their order, the batch in front.

    Of patches and pixels, and of next_arrival, there is what the records have.
    """
    num_patches = records["attention"].shape[1]
    middle = rearrange(records["middle"], "k b m e -> b k m e")
    fields = {"tokens": records["tokens"].to(torch.int16 if num_patches <= 2**15 else torch.int32)}
    for name in ("next_arrival", "patches", "pixels"):
        if name in records:
            fields[name] = records[name]
    return {
        **fields,
        **codec.encode(middle),
        "pooled": records["pooled"].half(),
        # Half precision would turn small weights into zero.
        "attention": records["attention"],
    }


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
