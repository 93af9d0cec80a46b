"""What a record holds: a teacher's view as arrays, and what the view is as JSON values."""

import numpy as np
import torch
from einops import rearrange

from distill.cache.codes import Codec
from distill.data.index import Clip
from distill.data.load import View


def record_arrays(records: dict[str, torch.Tensor], *, codec: Codec) -> dict[str, np.ndarray]:
    """`view_records` as the cache keeps them: arrays by field, with the batch in front."""
    tokens = records["tokens"]
    num_patches = records["attention"].shape[1]
    middle = rearrange(records["middle"], "k b m e -> b k m e")
    fields = {
        "tokens": tokens.to(torch.int16 if num_patches <= 2**15 else torch.int32),
        "patches": records["patches"],
        **codec.encode(middle),
        "pooled": records["pooled"].half(),
        # Half precision would turn small weights into zero.
        "attention": records["attention"],
    }
    return {name: value.cpu().numpy() for name, value in fields.items()}


def view_info(clip: Clip, view: View) -> dict:
    """What a view is, in JSON values: enough to make its pixels again."""
    return {
        "name": clip.name,
        "frames": view.frames.tolist(),
        "pts_seconds": view.pts_seconds.tolist(),
        "crop": [int(value) for value in view.crop],
        "flip": bool(view.flip),
        "decoder": view.decoder,
    }
