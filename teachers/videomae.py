"""VideoMAEv2's encoder as a frozen teacher: a plain transformer on tubelets, no class token.

Facts from OpenGVLab/VideoMAEv2 (models/modeling_pretrain.py) and OpenGVLab/InternVideo2
(single_modality/models/videomae.py). The latter hands its attention tensors over with heads and
tokens swapped; VideoMAEv2's own, which made the weights, is standard, and so is this.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from distill.students.resize import resize_patches
from distill.students.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PATCH,
    PatchEmbed,
    ViTSize,
    patchify,
    return_layers,
)
from distill.students.warmstart import KERNEL, LoadReport, copy_weights
from distill.students.weights import read_checkpoint, weights_file
from distill.teachers.frozen import Teacher

TABLE_GRID = (8, 16, 16)  # tokens that the released weights' positions count


def sine_table(rows: int, width: int) -> Tensor:
    """[1,rows,width]: sines in even channels and cosines in odd ones of the flat position.

    Both of channels 2i and 2i + 1 have the period 10000^(2i/width) in radians.
    """
    rate = 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * rate  # [rows,width/2]
    return rearrange([angle.sin(), angle.cos()], "two n d -> 1 n (d two)").float()


class VideoMAE(Teacher):
    """Blocks with LayerNorm, erf GELU and biases of q and v; the last is followed by a norm.

    Positions are fixed. On another grid than the released weights' they are resized, as learned
    tables are.
    """

    has_cls = False
    has_attention = False
    pooled_width = None

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        num_layers: int,
        interval: float,
        tubelet: int = 2,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        from timm.models.beit import Block  # not at the top: timm takes long to import

        super().__init__()
        if frames % tubelet or image_size % PATCH:
            raise ValueError(
                f"{frames} frames of {image_size} px do not divide into tubelets of {tubelet} "
                f"and patches of {PATCH} px"
            )
        self.size, self.tubelet = size, tubelet
        self.frames, self.image_size = frames, image_size
        self.grid = (frames // tubelet, image_size // PATCH, image_size // PATCH)
        self.depth = size.depth
        self.return_layers = return_layers(size.depth, num_layers, interval)
        self.embed_dim = size.width
        self.patch_embed = PatchEmbed(size.width, tubelet=tubelet)
        self.mean, self.std = self.patch_embed.mean, self.patch_embed.std = mean, std
        self.blocks = nn.ModuleList(
            Block(
                size.width,
                size.heads,
                qkv_bias=True,
                mlp_ratio=size.mlp_ratio,
                norm_layer=lambda width, **where: nn.LayerNorm(width, eps=1e-6, **where),
            )
            for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        table = torch.empty(1, self.num_patches, size.width)
        self.register_buffer("positions", table, persistent=False)
        self.fill_buffers()
        self.init_weights()
        self.freeze()

    def fill_buffers(self) -> None:
        """Compute what no checkpoint holds: the positions, and the zeros that timm adds to k."""
        table = sine_table(math.prod(TABLE_GRID), self.size.width)
        self.positions.copy_(resize_patches(table, grid=TABLE_GRID[:2], to=self.grid[:2]))
        for block in self.blocks:
            block.attn.k_bias.zero_()

    def init_weights(self) -> None:
        """Draw linear weights from a normal of `size.init_std`, with biases of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.size.init_std, a=-2, b=2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def see(self, clip: Tensor) -> tuple[list[Tensor], None, None]:
        expected = (3, self.frames, self.image_size, self.image_size)
        if tuple(clip.shape[1:]) != expected:
            raise ValueError(f"expected a clip [B,{str(expected)[1:-1]}], got {list(clip.shape)}")
        h = self.patch_embed(patchify(clip, tubelet=self.tubelet)) + self.positions  # [B,N,E]
        states = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index == self.depth - 1:
                h = self.norm(h)
            if index in self.return_layers:
                states.append(h)
        return states, None, None

    def attention_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.size.heads, self.num_patches, self.size.width // self.size.heads


def load_videomae(
    model: VideoMAE, path: str | Path, *, allow_unused: Sequence[str] = ()
) -> LoadReport:
    """Copy the encoder of a VideoMAE checkpoint; the rest of the file goes unused.

    Files of the bare encoder load too. A kernel of several frames is averaged over time for
    tubelets of one frame. Raises WeightsError.
    """
    file = weights_file(path)
    state, others, _ = read_checkpoint(file, part="encoder.")
    mapped = {}
    kernel = state.get(KERNEL)
    if model.tubelet == 1 and kernel is not None and kernel.ndim == 5 and kernel.shape[2] > 1:
        state[KERNEL] = kernel.float().mean(dim=2, keepdim=True)
        mapped[KERNEL] = f"tubelet {kernel.shape[2]} -> 1"
    return copy_weights(model, state, file, mapped=mapped, allow_unused=allow_unused, unused=others)
