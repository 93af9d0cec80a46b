"""A teacher's targets behind one call: computed on the spot, or read from the view cache.

Both callables take a batch on the device and return the batch a `DistillObjective` takes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.cache.codes import Codec
from distill.engine import autocast
from distill.mask import draw_tokens
from distill.recipe import Mask
from distill.students.vit import patchify, take_rows
from distill.teachers import Teacher


@torch.no_grad()
def view_records(
    teacher: Teacher, batch: dict, *, mask: Mask, seed: int, precision: str = "fp32"
) -> dict[str, Tensor]:
    """What a record of each view holds, from clip_id [B], view [B] and pixels uint8 [B,3,T,H,W].

    Returns tokens int64 [B,M-1] ascending, patches uint8 [B,M-1,U], and in float32 middle
    [K,B,M,E] (class token first) and pooled [B,P], both of unit length, and attention [B,N].
    The one way from a teacher to targets: cached and live ones differ by the codes alone.
    The teacher runs in `precision` ("fp32", "bf16" or "fp16").
    """
    pixels = batch["pixels"]
    with autocast(pixels.device, precision):
        states, pooled, attention = teacher.hidden(pixels)
    tokens = draw_tokens(
        mask,
        clip_ids=batch["clip_id"],
        view=batch["view"],
        seed=seed,
        grid=teacher.grid,
        attention=attention,
    )
    rows = F.pad(tokens + 1, (1, 0))  # the class token's row, then the visible patches'
    # Visible rows first, unit length after: the full stack would be five times as large.
    middle = torch.stack([F.normalize(take_rows(x, rows).float(), dim=-1) for x in states])
    patches = take_rows(patchify(pixels, tubelet=teacher.tubelet), tokens)
    return {
        "tokens": tokens,
        "patches": patches,
        "middle": middle,
        "pooled": F.normalize(pooled.float(), dim=-1),
        "attention": attention.float().clone(),  # out of inference mode
    }


class LiveTargets:
    """Runs the teacher, in the recipe's precision, on a batch of `ClipBatches`."""

    def __init__(self, teacher: Teacher, mask: Mask, seed: int, *, precision: str = "fp32") -> None:
        self.teacher, self.mask, self.seed, self.precision = teacher, mask, seed, precision

    def __call__(self, batch: dict) -> dict:
        records = view_records(
            self.teacher, batch, mask=self.mask, seed=self.seed, precision=self.precision
        )
        return {"clip_id": batch["clip_id"], "epoch": batch["epoch"], **records}


class CachedTargets:
    """Decodes a batch of `CachedBatches` with its cache's codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def __call__(self, batch: dict) -> dict:
        middle = self.codec.decode(batch["codes"], batch.get("scales"))
        return {
            "clip_id": batch["clip_id"],
            "epoch": batch["epoch"],
            "tokens": batch["tokens"].long(),
            "patches": batch["patches"],
            "middle": rearrange(middle, "b k m e -> k b m e"),
            "pooled": batch["pooled"].float(),
            "attention": batch["attention"],
        }
