"""The one video transformer: teachers, students and classifiers are this with other numbers.

Architecture and state-dict keys follow InternVideo2's single-modality models
(OpenGVLab/InternVideo2, single_modality/models/internvideo2*.py).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.kernels.attention import attention, pack_evenly, stock_attention
from distill.kernels.patch_embed import patch_embed
from distill.kernels.rmsnorm import EPS, rmsnorm
from distill.students.heads import AttentionPool

PATCH = 14  # pixels on a side; every released model uses it
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Activation = Literal["gelu_tanh", "gelu"]
Positions = Literal["joint", "separable"]


@dataclass(frozen=True)
class ViTSize:
    """Width, depth and heads of a transformer; `pooled_width` is what its attention pool emits.

    `init_std` and `layer_scale` are the initial spread of linear weights and gain of branches.
    The published sizes keep upstream's; a narrow model trained for minutes wants both larger.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    pooled_width: int = 768
    init_std: float = 0.02
    layer_scale: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % 16 or self.width % self.heads:
            raise ValueError(
                f"width {self.width} must be divisible by 16 and by the number of heads "
                f"({self.heads})"
            )


SIZES = {
    "S14": ViTSize(384, 12, 6),
    "B14": ViTSize(768, 12, 12),
    "L14": ViTSize(1024, 24, 16),
    "1B": ViTSize(1408, 40, 16, 48 / 11),
    "6B": ViTSize(3200, 48, 25),
}


def resolve_size(size: str | ViTSize) -> ViTSize:
    """Look a size up by name; raises ValueError that lists the names."""
    if isinstance(size, ViTSize):
        return size
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def return_layers(depth: int, num_layers: int, interval: float) -> tuple[int, ...]:
    """Block indices whose outputs are distilled, ascending: depth - int(i * interval) - 1.

    The truncation acts on the product, as upstream's does (single_modality/models/
    internvideo2_teacher.py), so the gaps of 40 blocks at 3.34 are not all equal. Raises
    ValueError when the layers leave the model or repeat.
    """
    layers = sorted(depth - int(i * interval) - 1 for i in range(num_layers))
    if not layers or layers[0] < 0 or len(set(layers)) != num_layers:
        raise ValueError(
            f"{num_layers} layers at interval {interval} do not fit into {depth} blocks"
        )
    return tuple(layers)


def patchify(clip: Tensor, *, tubelet: int = 1) -> Tensor:
    """Cut [B,3,T,H,W] into [B,N,3*tubelet*14*14] patches, frame-major, then row, then column.

    Values inside a patch are ordered as in the flattened convolution kernel, so that
    `F.linear(patches, weight.flatten(1))` is the patch embedding. Keeps the dtype.
    """
    return rearrange(
        clip, "b c (t u) (h p) (w q) -> b (t h w) (c u p q)", u=tubelet, p=PATCH, q=PATCH
    )


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows: table [B,N,D] (or [1,N,D], shared) and index [B,M] give [B,M,D]."""
    if table.shape[0] == 1 and index.shape[0] != 1:
        return table[0][index]
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def visible_tokens(mask: Tensor) -> Tensor:
    """Indices [B,M-1] of the visible patches of a bool mask [B,1+N] (True = dropped).

    The class token (column 0) must be visible and every row must keep the same number;
    raises ValueError otherwise.
    """
    patches = ~mask[:, 1:]
    counts = patches.sum(1)
    if bool(mask[:, 0].any()) or bool((counts != counts[0]).any()):
        raise ValueError("a mask must keep the class token and equally many patches in each clip")
    order = torch.arange(patches.shape[1], device=mask.device).expand_as(patches)
    return order[patches].view(mask.shape[0], -1)


class PatchEmbed(nn.Module):
    """Holds the 3-D convolution's parameters; patches arrive already cut.

    uint8 patches are normalised with `mean` and `std`, ImageNet's where nobody sets others.
    """

    def __init__(self, width: int, *, tubelet: int) -> None:
        super().__init__()
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.proj = nn.Conv3d(3, width, (tubelet, PATCH, PATCH), stride=(tubelet, PATCH, PATCH))

    def forward(self, patches: Tensor) -> Tensor:
        weight, bias = self.proj.weight.flatten(1), self.proj.bias
        if patches.dtype == torch.uint8:
            return patch_embed(patches, weight, bias, mean=self.mean, std=self.std)
        return F.linear(patches.to(weight.dtype), weight, bias)


class Attention(nn.Module):
    """Self-attention with q and k RMS-normalised over the full width, heads together."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.is_fused = True  # norms and attention as one, where kernels are chosen
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width, eps=EPS)
        self.k_norm = nn.RMSNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        packing = pack_evenly(*x.shape[:2])
        attend = attention if self.is_fused else stock_attention
        gains = (self.q_norm.weight, self.k_norm.weight)
        qkv = self.qkv(x).flatten(0, 1)  # [B*M,3D]
        out = attend(qkv, *gains, packing, heads=self.heads)
        return self.proj(out.view(x.shape))


class MLP(nn.Module):
    """Two linears with a GELU between; released weights were trained with the tanh form."""

    def __init__(self, width: int, *, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain per channel, applied in float32."""

    def __init__(self, width: int, *, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma.float()).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block. `keep` [2,B] scales each branch per clip (drop path)."""

    def __init__(self, size: ViTSize, *, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(size.width, eps=EPS)
        self.attn = Attention(size.width, heads=size.heads)
        self.ls1 = LayerScale(size.width, init=size.layer_scale)
        self.norm2 = nn.RMSNorm(size.width, eps=EPS)
        hidden = int(size.width * size.mlp_ratio)
        self.mlp = MLP(size.width, hidden=hidden, activation=activation)
        self.ls2 = LayerScale(size.width, init=size.layer_scale)

    def forward(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        of_attn, of_mlp = (None, None) if keep is None else keep
        is_narrower = torch.is_autocast_enabled(h.device.type)
        # What the linears would make of normalised rows anyway.
        dtype = torch.get_autocast_dtype(h.device.type) if is_narrower else None
        _, x = rmsnorm(h, self.norm1.weight, dtype=dtype)
        h, x = rmsnorm(
            h,
            self.norm2.weight,
            branch=self.attn(x),
            gamma=self.ls1.gamma,
            keep=of_attn,
            dtype=dtype,
        )
        h, _ = rmsnorm(h, None, branch=self.mlp(x), gamma=self.ls2.gamma, keep=of_mlp)
        return h


def sincos(positions: Tensor, width: int) -> Tensor:
    """1-D code [len, width]: a sine half, then a cosine half, period 10000^(2k/width)."""
    rate = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.double()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_table(width: int, grid: tuple[int, int, int]) -> Tensor:
    """Joint 3-D table [1, 1+t*h*w, width]: width/4 for time, 3/8 for column, 3/8 for row.

    Row 0, the class token's, is zero.
    """
    t, h, w = grid
    time = sincos(torch.arange(t), width // 4)[:, None, None].expand(t, h, w, -1)
    column = sincos(torch.arange(w), width * 3 // 8)[None, None].expand(t, h, w, -1)
    row = sincos(torch.arange(h), width * 3 // 8)[None, :, None].expand(t, h, w, -1)
    table = rearrange(torch.cat([time, column, row], dim=-1), "t h w d -> (t h w) d")
    return torch.cat([torch.zeros(1, width), table])[None]


def separable_tables(width: int, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Spatial [1,h*w,D], temporal [1,t,D] and class [1,1,D] tables in upstream's order of keys."""
    t, h, w = grid
    column = sincos(torch.arange(w), width // 2)[None].expand(h, w, -1)
    row = sincos(torch.arange(h), width // 2)[:, None].expand(h, w, -1)
    spatial = rearrange(torch.cat([column, row], dim=-1), "h w d -> 1 (h w) d")
    temporal = sincos(torch.arange(t), width)[None]
    return {"spatial": spatial, "temporal": temporal, "cls": torch.zeros(1, 1, width)}


class VideoViT(nn.Module):
    """Backbone: patch embedding, class token, positions, blocks and the attention pool.

    A uint8 clip or uint8 patches are normalised inside with ImageNet statistics; floating
    point input is taken as already normalised. `extra_tables` are further position tables by
    their prefix, and whether they have a class row.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        tubelet: int = 1,
        positions: Positions = "joint",
        drop_path: float = 0.0,
        activation: Activation = "gelu_tanh",
        checkpoint_blocks: int = 0,
        extra_tables: Mapping[str, bool] | None = None,
    ) -> None:
        super().__init__()
        if frames % tubelet or image_size % PATCH:
            raise ValueError(
                f"{frames} frames of {image_size} px do not divide into tubelets of {tubelet} "
                f"and patches of {PATCH} px"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        if activation not in get_args(Activation) or positions not in get_args(Positions):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))} and positions one "
                f"of {', '.join(get_args(Positions))}, got {activation!r} and {positions!r}"
            )
        self.size, self.tubelet, self.positions = size, tubelet, positions
        self.frames, self.image_size = frames, image_size
        self.checkpoint_blocks = checkpoint_blocks
        self.pooled_width = size.pooled_width
        self.grid = (frames // tubelet, image_size // PATCH, image_size // PATCH)
        self.table_grid = self.grid  # what the position tables are of
        self.drop_path_rates = tuple(
            drop_path * index / max(size.depth - 1, 1) for index in range(size.depth)
        )

        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        for prefix, has_cls in {"": True, **(extra_tables or {})}.items():
            self._add_positions(prefix, has_cls=has_cls)
        self.patch_embed = PatchEmbed(size.width, tubelet=tubelet)
        self.blocks = nn.ModuleList(Block(size, activation=activation) for _ in range(size.depth))
        self.clip_projector = AttentionPool(size.width, size.pooled_width)

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    def _add_positions(self, prefix: str, *, has_cls: bool) -> None:
        if self.positions == "joint":
            table = sincos_table(self.size.width, self.table_grid)
            table = table if has_cls else table[:, 1:].clone()
            self.register_parameter(f"{prefix}pos_embed", nn.Parameter(table))
            return
        for name, table in separable_tables(self.size.width, self.table_grid).items():
            if has_cls or name != "cls":
                self.register_parameter(f"{prefix}pos_embed_{name}", nn.Parameter(table))

    def position_table(self, prefix: str = "") -> Tensor:
        """The [1,1+N,D] table, put together from its parts when they are separable.

        One without a class row is [1,N,D].
        """
        if self.positions == "joint":
            return self.get_parameter(f"{prefix}pos_embed")
        spatial = self.get_parameter(f"{prefix}pos_embed_spatial")
        temporal = self.get_parameter(f"{prefix}pos_embed_temporal")
        patches = rearrange(temporal[:, :, None] + spatial[:, None], "1 t s d -> 1 (t s) d")
        cls = dict(self.named_parameters(recurse=False)).get(f"{prefix}pos_embed_cls")
        return patches if cls is None else torch.cat([cls, patches], dim=1)

    def init_weights(self) -> None:
        """Draw every weight as upstream does (normal 0.02, residual outputs divided by depth).

        The patch convolution keeps the framework's uniform default, as upstream's does.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.size.init_std, a=-2, b=2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02, a=-2, b=2)
        for index, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data.div_(math.sqrt(2 * index))
            block.mlp.fc2.weight.data.div_(math.sqrt(2 * index))

    def select_patches(self, clip: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches [B,M-1,U] of a clip and their indices (None when all are visible)."""
        expected = (3, self.frames, self.image_size, self.image_size)
        if tuple(clip.shape[1:]) != expected:
            raise ValueError(f"expected a clip [B,{str(expected)[1:-1]}], got {list(clip.shape)}")
        patches = patchify(clip, tubelet=self.tubelet)
        if mask is None:
            return patches, None
        tokens = visible_tokens(mask)
        return take_rows(patches, tokens), tokens

    def encode(
        self,
        patches: Tensor,
        tokens: Tensor | None = None,
        *,
        collect: Collection[int] = (),
        keep: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks on visible patches alone.

        Takes patches [B,M-1,U], their indices [B,M-1] and the drop-path factors [2L,B] (drawn
        here when training without them); returns the last hidden state [B,M,D] and the hidden
        states after the blocks in `collect`, by ascending depth.
        """
        table = self.position_table()
        visible = table.shape[1] - 1 if tokens is None else tokens.shape[1]
        values = 3 * self.tubelet * PATCH * PATCH
        if tuple(patches.shape[1:]) != (visible, values):
            raise ValueError(f"expected patches [B,{visible},{values}], got {list(patches.shape)}")
        positions = table[:, 1:] if tokens is None else take_rows(table[:, 1:], tokens.long())
        x = self.patch_embed(patches) + positions  # [B,M-1,D]
        cls = (self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1)
        h = torch.cat([cls.to(x.dtype), x], dim=1)  # [B,M,D]
        if keep is None and self.training and self.drop_path_rates[-1] > 0:
            keep = self.drop_path_keep(
                torch.rand(2 * len(self.blocks), h.shape[0], device=h.device)
            )
        collected = []
        for index, block in enumerate(self.blocks):
            factors = None if keep is None else keep[2 * index : 2 * index + 2]
            if self.training and index < self.checkpoint_blocks:
                h = checkpoint(block, h, factors, use_reentrant=False)
            else:
                h = block(h, factors)
            if index in collect:
                collected.append(h)
        return h, collected

    def drop_path_keep(self, uniform: Tensor) -> Tensor:
        """Turn uniform draws [2L,B] in [0,1) into branch factors: 0, or 1/(1-rate)."""
        rates = torch.linspace(0, self.drop_path_rates[-1], len(self.blocks), device=uniform.device)
        rates = rates.repeat_interleave(2)[:, None]  # [2L,1]
        return (uniform >= rates).float() / (1 - rates)
