"""Teachers' targets behind one call: computed on the spot, or read from the view cache.

Both callables take a batch on the device and return the batch a `DistillObjective` takes. With a
`Redraw` both see the same tokens of a record in the same epoch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.cache.codes import Codec
from distill.engines.plain import autocast
from distill.kernels.coded_targets import CodedTargets
from distill.kernels.jit import uses_triton
from distill.mask import Redraw, draw_kept
from distill.recipe import MAIN, KeptPixels, KeptTokens, Mask, of_teacher
from distill.students.vit import patchify, take_rows
from distill.teachers import Teacher


class OtherTeacher(NamedTuple):
    """A teacher beside the main one, and the precision that it runs in."""

    teacher: Teacher
    precision: str


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
    others: Mapping[str, OtherTeacher] | None = None,
) -> dict[str, Tensor]:
    """What a record of each view holds, from clip_id [B], view [B] and pixels uint8 [B,3,T,H,W].

    Returns tokens int64 [B,S] ascending and, where `tokens` keeps more than the visible ones,
    next_arrival [B,R] of their races; patches uint8 [B,S,U], or the student's frames; and in
    float32 middle [K,B,1+S,E] (class token first) and pooled [B,P], both of unit length, and
    attention [B,N], of these what the teacher has; and middle.NAME of each of the `others`. With
    `redraw` a record has the tokens that the batch's epoch sees, alone. The one way from
    teachers to targets: cached and live ones differ by the codes alone. The teacher
    runs in `precision` ("fp32", "bf16" or "fp16").
    """
    clip = batch["pixels"]
    with autocast(clip.device, precision):
        states, pooled, attention = teacher.hidden(clip)
    if attention is not None:
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
    seen = clip[:, :, :: clip.shape[2] // teacher.grid[0]]  # a student's token is a patch
    if pixels == "full":
        record["pixels"] = seen
    else:
        record["patches"] = take_rows(patchify(seen), record["tokens"])
    record["middle"] = _unit_rows(states, record["tokens"], has_cls=teacher.has_cls)
    del states  # large, and the others have theirs
    for name, (other, its_precision) in (others or {}).items():
        with autocast(clip.device, its_precision):
            states, _, _ = other.hidden(clip)
        record[of_teacher("middle", name)] = _unit_rows(
            states, record["tokens"], has_cls=other.has_cls
        )
        del states
    if pooled is not None:
        record["pooled"] = F.normalize(pooled.float(), dim=-1)
    if attention is not None:
        record["attention"] = attention
    return record


def _unit_rows(states: Sequence[Tensor], tokens: Tensor, *, has_cls: bool) -> Tensor:
    """Rows of K states at tokens [B,S], float32 and of unit length: [K,B,S,E].

    The class token's row, where states begin with one, comes first: [K,B,1+S,E]. Kept rows
    first, unit length after: the full stack would be five times as large.
    """
    rows = F.pad(tokens + 1, (1, 0)) if has_cls else tokens
    return torch.stack([F.normalize(take_rows(x, rows).float(), dim=-1) for x in states])


class LiveTargets:
    """Runs the teachers, in the recipe's precision, on a batch of `ClipBatches`.

    `tokens` and `pixels` are those that the recipe's cache would keep, and `redraw` how an epoch
    sees the tokens.
    """

    def __init__(
        self,
        teacher: Teacher,
        mask: Mask,
        seed: int,
        *,
        precision: str = "fp32",
        tokens: KeptTokens = "visible",
        pixels: KeptPixels = "visible",
        redraw: Redraw | None = None,
        others: Mapping[str, OtherTeacher] | None = None,
    ) -> None:
        if (tokens == "visible") != (redraw is None):
            raise ValueError(f"tokens {tokens!r}: masks are drawn anew only among more tokens")
        self.teacher, self.mask, self.seed, self.precision = teacher, mask, seed, precision
        self.tokens, self.pixels, self.redraw, self.others = tokens, pixels, redraw, others

    def __call__(self, batch: dict) -> dict:
        records = view_records(
            self.teacher,
            batch,
            mask=self.mask,
            seed=self.seed,
            precision=self.precision,
            tokens=self.tokens,
            pixels=self.pixels,
            redraw=self.redraw,
            others=self.others,
        )
        return {"clip_id": batch["clip_id"], "epoch": batch["epoch"], **records}


class CachedTargets:
    """Decodes a batch of `CachedBatches` with its cache's codec, unless the loss's kernels do.

    `redraw` is how an epoch sees the records' tokens; None where each view has its own mask.
    `layers` are, of teachers by name, the places of the layers to take; None for all of all.
    `pixels` says whether the student takes visible patches or full frames, as they were kept.
    """

    def __init__(
        self,
        codec: Codec,
        redraw: Redraw | None = None,
        *,
        layers: Mapping[str, list[int]] | None = None,
        pixels: KeptPixels = "visible",
    ) -> None:
        self.redraw, self.layers, self.pixels = redraw, layers or {}, pixels
        self.codecs = {
            name: codec.of_layers(self.layers[name]) if name in self.layers else codec
            for name, codec in {MAIN: codec, **codec.others}.items()
        }

    def __call__(self, batch: dict) -> dict:
        if ("next_arrival" in batch) != (self.redraw is not None):
            raise ValueError("records that keep more than the visible tokens need a redraw")
        tokens, patches, places = batch["tokens"].long(), batch.get("patches"), None
        attention = batch.get("attention")
        if self.redraw is not None:
            places = _places(self.redraw, batch, {**batch, "tokens": tokens}, attention)
            tokens = tokens.gather(1, places)
            patches = None if patches is None else take_rows(patches, places)
        if self.pixels == "full":
            seen = {"pixels": batch["pixels"]}
        else:
            if patches is None:
                patches = take_rows(patchify(batch["pixels"]), tokens)
            seen = {"patches": patches}
        found = {
            "clip_id": batch["clip_id"],
            "epoch": batch["epoch"],
            "tokens": tokens,
            **seen,
            **{
                of_teacher("middle", name): self._middle(name, batch, places)
                for name in self.codecs
            },
        }
        if "pooled" in batch:
            found["pooled"] = batch["pooled"].float()
        if attention is not None:
            found["attention"] = attention
        return found

    def _middle(self, name: str, batch: dict, places: Tensor | None) -> Tensor | CodedTargets:
        """A teacher's rows [K,B,M,E] at `places` [B,M-1] of the tokens, or codes of them."""
        codes, scales = (batch.get(of_teacher(field, name)) for field in ("codes", "scales"))
        if name in self.layers:
            codes = codes[:, self.layers[name]]
            scales = None if scales is None else scales[:, self.layers[name]]
        if places is not None:
            if codes.shape[2] > batch["tokens"].shape[1]:
                places = F.pad(places + 1, (1, 0))  # the class token's row, then the patches'
            codes = _take_token_rows(codes, places)
            scales = None if scales is None else _take_token_rows(scales, places)
        if uses_triton(codes) and scales is not None:
            return self.codecs[name].targets(codes, scales)
        return rearrange(self.codecs[name].decode(codes, scales), "b k m e -> k b m e")


def _places(redraw: Redraw, batch: dict, record: dict, attention: Tensor | None) -> Tensor:
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
