"""A backbone with a classification head, for finetuning, probing and training from scratch."""

from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from distill.students.vit import (
    MLP,
    Activation,
    Positions,
    VideoViT,
    ViTSize,
    resolve_size,
)

HEAD_INIT_SCALE = 0.001  # upstream's init_scale: logits start near zero

Probe = Literal["attentive_mlp", "cls_avg1", "cls_avgN", "cls_avg1_proj", "cls_avgN_proj"]
ProbeNorm = Literal["LN", "BN", "kaiming_BN"]

# Upstream's linear probes (models/internvideo2_cat.py): is the mean over patches taken per frame,
# and does the pooled vector join what the head sees?
MERGES = {
    "cls_avg1": (False, False),
    "cls_avgN": (True, False),
    "cls_avg1_proj": (False, True),
    "cls_avgN_proj": (True, True),
}


def keep_factors(uniform: Tensor, rate: float) -> Tensor:
    """Turn uniform draws in [0,1) into factors: 0 at the rate, 1/(1-rate) otherwise."""
    return (uniform >= rate).float() / max(1 - rate, 1e-9)


def drop(x: Tensor, model: nn.Module, keep: Tensor | None) -> Tensor:
    """What the head of a classifier in training takes: [B,F] scaled by `keep`, drawn if None."""
    if not model.training or model.fc_drop == 0:
        return x
    if keep is None:
        keep = keep_factors(torch.rand(x.shape, device=x.device), model.fc_drop)
    return x * keep.to(x.dtype)


class VideoClassifier(VideoViT):
    """Pooled tokens -> LayerNorm -> dropout -> linear head, with a probe in between if asked."""

    def __init__(
        self,
        size: ViTSize,
        *,
        num_classes: int,
        frames: int,
        image_size: int,
        probe: Probe | None = None,
        probe_norm: ProbeNorm = "LN",
        tubelet: int = 1,
        positions: Positions = "joint",
        drop_path: float = 0.0,
        head_drop_path: float = 0.0,
        fc_drop: float = 0.0,
        activation: Activation = "gelu_tanh",
        checkpoint_blocks: int = 0,
    ) -> None:
        if not 0 <= head_drop_path < 1:
            raise ValueError(f"head_drop_path must be at least 0 and below 1, got {head_drop_path}")
        super().__init__(
            size,
            frames=frames,
            image_size=image_size,
            tubelet=tubelet,
            positions=positions,
            drop_path=drop_path,
            activation=activation,
            checkpoint_blocks=checkpoint_blocks,
        )
        pooled = size.pooled_width
        self.probe, self.probe_norm = probe, probe_norm
        self.head_drop_path = head_drop_path
        features = pooled
        if probe == "attentive_mlp":
            mlp = MLP(pooled, hidden=4 * pooled, activation="gelu")
            self.extra_mlp = nn.Sequential(nn.LayerNorm(pooled, eps=1e-5), mlp)
        self.fc_norm = nn.LayerNorm(pooled, eps=1e-5)
        if probe in MERGES:
            per_frame, with_pooled = MERGES[probe]
            merged = pooled if per_frame else size.width
            self.down_norm = _merge_norm(merged, kind=probe_norm)
            self.down = (
                nn.Sequential(nn.Linear(size.width, pooled), nn.GELU())
                if per_frame
                else nn.Identity()
            )
            features = merged * (1 + (self.grid[0] if per_frame else 1)) + pooled * with_pooled
        self.fc_drop = fc_drop
        self.head = nn.Linear(features, num_classes)
        self.init_weights()
        self.head.weight.data.mul_(HEAD_INIT_SCALE)
        self.head.bias.data.mul_(HEAD_INIT_SCALE)
        if probe == "attentive_mlp":  # the identity at the start
            nn.init.zeros_(self.extra_mlp[1].fc2.weight)

    def forward(
        self,
        clip: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        head_keep: Tensor | None = None,
        fc_keep: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B,V] of clips [B,3,T,H,W], uint8 or normalised floating point.

        `features` are what `hidden` or `summary` have made of the clips already. `head_keep` [B]
        scales each clip's pooled vector, and `fc_keep` [B,F] what the head takes (both are drawn
        here when training without).
        """
        if features is None:
            features = self.hidden(clip, keep=keep)
        if "hidden" in features:
            features = self.summary(features["hidden"])
        if "pooled" in features and self.training and self.head_drop_path > 0:
            pooled = features["pooled"]
            if head_keep is None:
                head_keep = self.head_keep(torch.rand(len(pooled), device=pooled.device))
            features = {**features, "pooled": pooled * head_keep[:, None].to(pooled.dtype)}
        return self.head(drop(self._head_input(features), self, fc_keep))

    def head_keep(self, uniform: Tensor) -> Tensor:
        """Turn uniform draws [B] in [0,1) into factors of the pooled vector: 0, or 1/(1-rate)."""
        return keep_factors(uniform, self.head_drop_path)

    def hidden(self, clip: Tensor, *, keep: Tensor | None = None) -> dict[str, Tensor]:
        """What the blocks make of clips: hidden [B,1+N,D]."""
        patches, _ = self.select_patches(clip, None)
        return {"hidden": self.encode(patches, keep=keep)[0]}

    def summary(self, h: Tensor) -> dict[str, Tensor]:
        """What the layers above the pool take of the hidden state [B,1+N,D].

        The vector pooled [B,P]; for a merge tokens [B,1+t,D], the class token and the means, and
        the pooled vector only where that joins them.
        """
        per_frame, with_pooled = MERGES.get(self.probe, (None, True))
        summary = {}
        if per_frame is not None:
            steps = self.grid[0] if per_frame else 1
            means = reduce(h[:, 1:], "b (t s) d -> b t d", "mean", t=steps)
            summary["tokens"] = torch.cat([h[:, :1], means], dim=1)  # [B,1+t,D]
        if with_pooled:
            summary["pooled"], _ = self.clip_projector(h)
        return summary

    def _head_input(self, summary: dict[str, Tensor]) -> Tensor:
        """What the head sees of a `summary`."""
        pooled = summary.get("pooled")
        if self.probe not in MERGES:
            if self.probe == "attentive_mlp":
                pooled = pooled + self.extra_mlp(pooled)
            return self.fc_norm(pooled)
        merged = self.down(summary["tokens"])  # [B,1+t,D or P]
        if self.probe_norm == "LN":
            merged = rearrange(self.down_norm(merged), "b t d -> b (t d)")
        else:  # upstream flattens channel by channel here: the heads are not interchangeable
            channels = rearrange(merged, "b t d -> b d t")
            merged = rearrange(self.down_norm(channels), "b d t -> b (d t)")
        return merged if pooled is None else torch.cat([merged, self.fc_norm(pooled)], dim=1)


def _merge_norm(width: int, *, kind: ProbeNorm) -> nn.Module:
    match kind:
        case "LN":
            return nn.LayerNorm(width, eps=1e-5)
        case "BN":
            return nn.BatchNorm1d(width, eps=1e-5)
        case "kaiming_BN":
            return nn.BatchNorm1d(width, affine=False, eps=1e-6)
    raise ValueError(f"unknown probe_norm {kind!r}; choose one of LN, BN, kaiming_BN")


def create_classifier(
    size: str | ViTSize,
    *,
    num_classes: int,
    frames: int = 8,
    image_size: int = 224,
    probe: Probe | None = None,
    probe_norm: ProbeNorm = "LN",
    drop_path: float = 0.0,
    head_drop_path: float = 0.0,
    fc_drop: float = 0.0,
    activation: Activation = "gelu_tanh",
    tubelet: int = 1,
    positions: Positions = "joint",
    checkpoint_blocks: int = 0,
) -> VideoClassifier:
    """Build a classifier with fresh weights.

    `probe` is upstream's extra MLP after the pool ("attentive_mlp"), or which token means its
    linear probe puts together ("cls_avg1" to "cls_avgN_proj"), normalised by `probe_norm`; the
    published probes without either are this model with its pool or head alone trained. Raises
    ValueError for an unknown name or settings that do not fit.
    """
    if probe not in (None, "attentive_mlp", *MERGES):
        raise ValueError(
            f"unknown probe {probe!r}; choose one of attentive_mlp, {', '.join(MERGES)}"
        )
    return VideoClassifier(
        resolve_size(size),
        num_classes=num_classes,
        frames=frames,
        image_size=image_size,
        probe=probe,
        probe_norm=probe_norm,
        tubelet=tubelet,
        positions=positions,
        drop_path=drop_path,
        head_drop_path=head_drop_path,
        fc_drop=fc_drop,
        activation=activation,
        checkpoint_blocks=checkpoint_blocks,
    )
