"""Models as they are used: with a classifier, or as what makes a vector of a clip."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.students.classifier import Probe, ProbeNorm, VideoClassifier, create_classifier
from distill.students.timm_backbone import TimmBackbone, TimmClassifier
from distill.students.vit import Activation, Positions, VideoViT, ViTSize, resolve_size


class VideoEncoder(VideoViT):
    """A distilled student without its projectors: clips [B,3,T,H,W] to pooled vectors [B,P]."""

    def forward(self, clip: Tensor) -> Tensor:
        return embed(self, clip)


class TimmEncoder(TimmBackbone):
    """The same on one of timm's models."""

    def forward(self, clip: Tensor) -> Tensor:
        return embed(self, clip)


def embed(model: VideoViT | TimmBackbone, clip: Tensor) -> Tensor:
    """The pooled vector [B,P] of clips, below any classifier.

    What the attention pool emits or, on a model of timm's, its own pooled vector over all frames.
    """
    if isinstance(model, TimmBackbone):
        return model.show(clip)[1]
    patches, _ = model.select_patches(clip, None)
    hidden, _ = model.encode(patches)
    return model.clip_projector(hidden)[0]


def create_video_model(
    *,
    size: str | ViTSize | Mapping[str, Any] | None = None,
    timm: str | None = None,
    num_classes: int = 0,
    frames: int = 8,
    image_size: int = 224,
    tubelet: int = 1,
    positions: Positions = "joint",
    activation: Activation = "gelu_tanh",
    probe: Probe | None = None,
    probe_norm: ProbeNorm = "LN",
) -> VideoClassifier | TimmClassifier | VideoEncoder | TimmEncoder:
    """A model for use, from settings that JSON can hold; without classes an encoder.

    `size` is a name or the fields of a `ViTSize`, and `timm` a model's name there in its place.
    Nothing random is left in it, such as drop path. Raises ValueError for what does not fit.
    """
    if (size is None) == (timm is None):
        raise ValueError(f"give either a size or a timm model, got {size!r} and {timm!r}")
    if timm is not None:
        clip = {"frames": frames, "image_size": image_size}
        if num_classes:
            return TimmClassifier(timm, num_classes=num_classes, **clip)
        return TimmEncoder(timm, **clip)
    backbone = {
        "frames": frames,
        "image_size": image_size,
        "tubelet": tubelet,
        "positions": positions,
        "activation": activation,
    }
    size = ViTSize(**size) if isinstance(size, Mapping) else size
    if num_classes:
        classes = {"num_classes": num_classes, "probe": probe, "probe_norm": probe_norm}
        return create_classifier(size, **classes, **backbone)
    encoder = VideoEncoder(resolve_size(size), **backbone)
    encoder.init_weights()
    return encoder
