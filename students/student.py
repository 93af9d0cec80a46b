"""The distillation student: a backbone on visible tokens with projectors to the teacher."""

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


class DistillStudent(VideoViT):
    """Predicts the teacher's middle layers and pooled vector from the visible patches."""

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
    ) -> None:
        super().__init__(
            size,
            frames=frames,
            image_size=image_size,
            tubelet=tubelet,
            positions=positions,
            drop_path=drop_path,
            activation=activation,
            checkpoint_blocks=checkpoint_blocks,
            extra_tables=("clip_",),
        )
        if not 1 <= num_layers <= size.depth:
            raise ValueError(f"num_layers must be 1 to {size.depth}, got {num_layers}")
        self.return_layers = tuple(range(size.depth - num_layers, size.depth))
        self.clip_decoder = nn.ModuleList(
            Decoder(size.width, teacher_width, kind=decoder) for _ in range(num_layers)
        )
        self.final_clip_decoder = (
            Decoder(size.pooled_width, teacher_pooled, kind=decoder)
            if teacher_pooled
            else nn.Identity()
        )
        self.init_weights()

    def decoder_inputs(
        self,
        clip: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Hidden states [B,M,D] of the K last blocks plus positions, and the pooled vector [B,P].

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
        table = self.position_table("clip_")
        if tokens is None:
            positions = table
        else:
            cls = torch.zeros_like(tokens[:, :1])
            positions = take_rows(table, torch.cat([cls, tokens + 1], dim=1).long())
        pooled, _ = self.clip_projector(h)
        return [state + positions for state in collected], pooled

    def forward(
        self,
        clip: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns middle [K,B,M,E] and pooled [B,P], both of unit length on the last axis."""
        states, pooled = self.decoder_inputs(clip, mask, patches=patches, tokens=tokens, keep=keep)
        middle = [decode(state) for decode, state in zip(self.clip_decoder, states, strict=True)]
        pooled = self.final_clip_decoder(pooled)
        return torch.stack(middle), F.normalize(pooled.float(), dim=-1)


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
) -> DistillStudent:
    """Build a student with fresh weights; `decoder` is "mlp" or "linear".

    Raises ValueError for an unknown size or settings that do not divide.
    """
    if decoder not in ("mlp", "linear"):
        raise ValueError(f"decoder must be 'mlp' or 'linear', got {decoder!r}")
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
    )
