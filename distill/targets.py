"""A teacher's targets behind one call: computed on the spot, or read from the view cache.

Both callables take a batch on the device and return the batch a `DistillObjective` takes. With a
`Redraw` both see the same tokens of a record in the same epoch.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.cache.codes import Codec
from distill.engine import autocast
from distill.kernels.jit import uses_triton
from distill.mask import Redraw, draw_kept
from distill.recipe import KeptPixels, KeptTokens, Mask
from distill.students.vit import patchify, take_rows
from distill.teachers import Teacher


@torch.no_grad()
def view_records(
    teacher: Teacher,
    batch: dict,
    *,
    mask: Mask,
    seed: int,
    precision: str = "fp32",
    tokens: KeptTokens = "visible",
    pixels: KeptPixels = "visible",
    redraw: Redraw | None = None,
) -> dict[str, Tensor]:
    """What a record of each view holds, from clip_id [B], view [B] and pixels uint8 [B,3,T,H,W].

    Returns tokens int64 [B,S] ascending and, where `tokens` keeps more than the visible ones,
    next_arrival [B,1] of their race; patches uint8 [B,S,U], or pixels as they came; and in
    float32 middle [K,B,1+S,E] (class token first) and pooled [B,P], both of unit length, and
    attention [B,N]. With `redraw` a record has the tokens that the batch's epoch sees, alone.
    The one way from a teacher to targets: cached and live ones differ by the codes alone.
    The teacher runs in `precision` ("fp32", "bf16" or "fp16").
    """
    clip = batch["pixels"]
    with autocast(clip.device, precision):
        states, pooled, attention = teacher.hidden(clip)
    attention = attention.float().clone()  # out of inference mode
    kept, next_arrival = draw_kept(
        mask,
        tokens,
        clip_ids=batch["clip_id"],
        view=batch["view"],
        seed=seed,
        grid=teacher.grid,
        attention=attention,
    )
    record = {"tokens": kept}
    if tokens != "visible":
        record["next_arrival"] = next_arrival
    if redraw is not None:
        # Before any rows are taken: all of a teacher's would be five times the visible ones.
        record = {"tokens": kept.gather(1, _places(redraw, batch, record, attention))}
    if pixels == "full":
        record["pixels"] = clip
    else:
        record["patches"] = take_rows(patchify(clip, tubelet=teacher.tubelet), record["tokens"])
    rows = F.pad(record["tokens"] + 1, (1, 0))  # the class token's row, then the patches'
    # Kept rows first, unit length after: the full stack would be five times as large.
    record["middle"] = torch.stack(
        [F.normalize(take_rows(x, rows).float(), dim=-1) for x in states]
    )
    record["pooled"] = F.normalize(pooled.float(), dim=-1)
    record["attention"] = attention
    return record


class LiveTargets:
    """Runs the teacher, in the recipe's precision, on a batch of `ClipBatches`.

    `tokens` are those that the recipe's cache would keep, and `redraw` how an epoch sees them.
    """

    def __init__(
        self,
        teacher: Teacher,
        mask: Mask,
        seed: int,
        *,
        precision: str = "fp32",
        tokens: KeptTokens = "visible",
        redraw: Redraw | None = None,
    ) -> None:
        if (tokens == "visible") != (redraw is None):
            raise ValueError(f"tokens {tokens!r}: masks are drawn anew only among more tokens")
        self.teacher, self.mask, self.seed, self.precision = teacher, mask, seed, precision
        self.tokens, self.redraw = tokens, redraw

    def __call__(self, batch: dict) -> dict:
        records = view_records(
            self.teacher,
            batch,
            mask=self.mask,
            seed=self.seed,
            precision=self.precision,
            tokens=self.tokens,
            redraw=self.redraw,
        )
        return {"clip_id": batch["clip_id"], "epoch": batch["epoch"], **records}


class CachedTargets:
    """Decodes a batch of `CachedBatches` with its cache's codec, unless the loss's kernels do.

    `redraw` is how an epoch sees the records' tokens; None where each view has its own mask.
    `layers` are the places of the layers to take, None for all.
    """

    def __init__(
        self, codec: Codec, redraw: Redraw | None = None, *, layers: list[int] | None = None
    ) -> None:
        self.codec = codec if layers is None else codec.of_layers(layers)
        self.redraw, self.layers = redraw, layers

    def __call__(self, batch: dict) -> dict:
        if ("next_arrival" in batch) != (self.redraw is not None):
            raise ValueError("records that keep more than the visible tokens need a redraw")
        tokens, codes, scales = batch["tokens"].long(), batch["codes"], batch.get("scales")
        if self.layers is not None:
            codes = codes[:, self.layers]
            scales = None if scales is None else scales[:, self.layers]
        patches = batch.get("patches")
        if self.redraw is not None:
            places = _places(self.redraw, batch, {**batch, "tokens": tokens}, batch["attention"])
            tokens = tokens.gather(1, places)
            rows = F.pad(places + 1, (1, 0))  # the class token's row, then the visible patches'
            codes = _take_token_rows(codes, rows)
            scales = None if scales is None else _take_token_rows(scales, rows)
            patches = None if patches is None else take_rows(patches, places)
        if patches is None:
            patches = take_rows(patchify(batch["pixels"]), tokens)
        if uses_triton(codes) and scales is not None:
            middle = self.codec.targets(codes, scales)
        else:
            middle = rearrange(self.codec.decode(codes, scales), "b k m e -> k b m e")
        return {
            "clip_id": batch["clip_id"],
            "epoch": batch["epoch"],
            "tokens": tokens,
            "patches": patches,
            "middle": middle,
            "pooled": batch["pooled"].float(),
            "attention": batch["attention"],
        }


def _places(redraw: Redraw, batch: dict, record: dict, attention: Tensor) -> Tensor:
    """The places of a record's tokens that the batch's epoch sees: int64 [B,M-1]."""
    return redraw.places(
        clip_ids=batch["clip_id"],
        epoch=batch["epoch"],
        tokens=record["tokens"],
        next_arrival=record["next_arrival"],
        attention=attention,
    )


def _take_token_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [B,M] of codes [B,K,1+S,...] as whole rows, where a gather goes byte by byte."""
    clips, layers, count = table.shape[:3]
    start = torch.arange(clips * layers, device=table.device) * count
    index = rearrange(start, "(b k) -> b k 1", b=clips) + rows[:, None]  # [B,K,M]
    taken = table.flatten(0, 2).index_select(0, index.flatten())
    return taken.unflatten(0, index.shape)
