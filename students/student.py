"""The distillation student: a backbone on visible tokens with projectors to its teachers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.students.heads import Decoder
from distill.students.vit import (
    Activation,
    Positions,
    VideoViT,
    ViTSize,
    resolve_size,
    take_rows,
)

TAKEN = ("clip", "img")  # by the first teacher, and by the image tables of released files


@dataclass(frozen=True)
class ProjectorSet:
    """Projectors to the middle layers of one more teacher, `width` wide.

    `has_cls` says whether that teacher's rows begin with a class token's.
    """

    width: int
    num_layers: int
    decoder: str
    has_cls: bool = False


class DecoderInputs(NamedTuple):
    """What the projectors take: K hidden states [B,M,D] and the pooled vector [B,P].

    `others` are the hidden states for the further teachers by their name, [B,M-1,D] for those
    without a class token.
    """

    states: list[Tensor]
    pooled: Tensor
    others: dict[str, list[Tensor]]


class DistillStudent(VideoViT):
    """Predicts the teacher's middle layers and pooled vector from the visible patches.

    Further teachers' middle layers are predicted by the projectors of `others`, a
    `{name}_decoder` each, from the same blocks plus the positions of `{name}_pos_embed`.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        teacher_width: int,
        teacher_pooled: int,
        num_layers: int,
        decoder: str,
        tubelet: int = 1,
        positions: Positions = "joint",
        drop_path: float = 0.0,
        activation: Activation = "gelu_tanh",
        checkpoint_blocks: int = 0,
        others: Mapping[str, ProjectorSet] | None = None,
    ) -> None:
        others = dict(others or {})
        super().__init__(
            size,
            frames=frames,
            image_size=image_size,
            tubelet=tubelet,
            positions=positions,
            drop_path=drop_path,
            activation=activation,
            checkpoint_blocks=checkpoint_blocks,
            extra_tables={
                "clip_": True,
                **{f"{name}_": projectors.has_cls for name, projectors in others.items()},
            },
        )
        self.num_layers, self.others = num_layers, others
        wanted = (num_layers, *(projectors.num_layers for projectors in others.values()))
        for count in wanted:
            if not 1 <= count <= size.depth:
                raise ValueError(f"num_layers must be 1 to {size.depth}, got {count}")
        self.return_layers = tuple(range(size.depth - max(wanted), size.depth))
        self.clip_decoder = nn.ModuleList(
            Decoder(size.width, teacher_width, kind=decoder) for _ in range(num_layers)
        )
        self.final_clip_decoder = (
            Decoder(size.pooled_width, teacher_pooled, kind=decoder)
            if teacher_pooled
            else nn.Identity()
        )
        for name, projectors in others.items():
            decoders = (
                Decoder(size.width, projectors.width, kind=projectors.decoder)
                for _ in range(projectors.num_layers)
            )
            self.add_module(f"{name}_decoder", nn.ModuleList(decoders))
        self.init_weights()

    def decoder_inputs(
        self,
        clip: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> DecoderInputs:
        """Hidden states of the last blocks plus each teacher's positions, and the pooled vector.

        Takes either a clip [B,3,T,H,W] with a mask [B,1+N] (True = dropped), or what a cache
        record holds: patches [B,M-1,U] and tokens [B,M-1].
        """
        from_clip = clip is not None and patches is None and tokens is None
        from_record = patches is not None and clip is None and mask is None
        if not (from_clip or from_record):
            raise ValueError("give either clip and mask, or patches and tokens")
        if from_clip:
            patches, tokens = self.select_patches(clip, mask)
        h, collected = self.encode(patches, tokens, collect=self.return_layers, keep=keep)
        pooled, _ = self.clip_projector(h)
        states = self._placed(collected[-self.num_layers :], tokens, prefix="clip_", has_cls=True)
        others = {
            name: self._placed(
                collected[-projectors.num_layers :],
                tokens,
                prefix=f"{name}_",
                has_cls=projectors.has_cls,
            )
            for name, projectors in self.others.items()
        }
        return DecoderInputs(states, pooled, others)

    def _placed(
        self, states: list[Tensor], tokens: Tensor | None, *, prefix: str, has_cls: bool
    ) -> list[Tensor]:
        """States [B,M,D] plus the positions of a table, the class row left out without one."""
        positions = self.position_table(prefix)
        if tokens is not None:
            index = F.pad(tokens.long() + 1, (1, 0)) if has_cls else tokens.long()
            positions = take_rows(positions, index)
        return [(state if has_cls else state[:, 1:]) + positions for state in states]

    def forward(
        self,
        clip: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns middle [K,B,M,E] and pooled [B,P], both of unit length on the last axis.

        A student of further teachers returns their middle layers too, by name.
        """
        inputs = self.decoder_inputs(clip, mask, patches=patches, tokens=tokens, keep=keep)
        middle = _project(self.clip_decoder, inputs.states)
        pooled = F.normalize(self.final_clip_decoder(inputs.pooled).float(), dim=-1)
        if not self.others:
            return middle, pooled
        others = {
            name: _project(self.get_submodule(f"{name}_decoder"), states)
            for name, states in inputs.others.items()
        }
        return middle, pooled, others


def _project(decoders: nn.ModuleList, states: list[Tensor]) -> Tensor:
    return torch.stack([decode(state) for decode, state in zip(decoders, states, strict=True)])


def create_student(
    size: str | ViTSize,
    *,
    frames: int = 8,
    image_size: int = 224,
    teacher_width: int = 1408,
    teacher_pooled: int = 768,
    num_layers: int = 6,
    decoder: str = "mlp",
    drop_path: float = 0.0,
    activation: Activation = "gelu_tanh",
    tubelet: int = 1,
    positions: Positions = "joint",
    checkpoint_blocks: int = 0,
    others: Mapping[str, ProjectorSet] | None = None,
) -> DistillStudent:
    """Build a student with fresh weights; `decoder` is "mlp" or "linear".

    A `teacher_pooled` of 0 says that the teacher has no pooled vector. `others` are further
    teachers by a name of lower-case letters and digits; stage-1 pretraining calls its second one
    "mae". Raises ValueError for an unknown size, settings that do not divide, and names that are
    taken.
    """
    for kind in (decoder, *(projectors.decoder for projectors in (others or {}).values())):
        if kind not in ("mlp", "linear"):
            raise ValueError(f"decoder must be 'mlp' or 'linear', got {kind!r}")
    for name in others or {}:
        if name in TAKEN or not re.fullmatch(r"[a-z][a-z0-9]*", name):
            raise ValueError(
                f"a further teacher's name must be lower-case letters and digits and none of "
                f"{', '.join(TAKEN)}, got {name!r}"
            )
    return DistillStudent(
        resolve_size(size),
        frames=frames,
        image_size=image_size,
        teacher_width=teacher_width,
        teacher_pooled=teacher_pooled,
        num_layers=num_layers,
        decoder=decoder,
        tubelet=tubelet,
        positions=positions,
        drop_path=drop_path,
        activation=activation,
        checkpoint_blocks=checkpoint_blocks,
        others=others,
    )
