"""A backbone with a classification head, for finetuning, probing and training from scratch."""

from torch import Tensor, nn

from distill.students.vit import (
    Activation,
    Positions,
    VideoViT,
    ViTSize,
    resolve_size,
)

HEAD_INIT_SCALE = 0.001  # upstream's init_scale: logits start near zero


class VideoClassifier(VideoViT):
    """Pooled tokens -> LayerNorm -> dropout -> linear head."""

    def __init__(
        self,
        size: ViTSize,
        *,
        num_classes: int,
        frames: int,
        image_size: int,
        tubelet: int = 1,
        positions: Positions = "joint",
        drop_path: float = 0.0,
        fc_drop: float = 0.0,
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
        )
        self.fc_norm = nn.LayerNorm(size.pooled_width, eps=1e-5)
        self.fc_dropout = nn.Dropout(fc_drop)
        self.head = nn.Linear(size.pooled_width, num_classes)
        self.init_weights()
        self.head.weight.data.mul_(HEAD_INIT_SCALE)
        self.head.bias.data.mul_(HEAD_INIT_SCALE)

    def forward(self, clip: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B,3,T,H,W], uint8 or normalised floating point, to logits [B,V]."""
        patches, _ = self.select_patches(clip, None)
        h, _ = self.encode(patches, keep=keep)
        pooled, _ = self.clip_projector(h)
        return self.head(self.fc_dropout(self.fc_norm(pooled)))


def create_classifier(
    size: str | ViTSize,
    *,
    num_classes: int,
    frames: int = 8,
    image_size: int = 224,
    drop_path: float = 0.0,
    fc_drop: float = 0.0,
    activation: Activation = "gelu_tanh",
    tubelet: int = 1,
    positions: Positions = "joint",
    checkpoint_blocks: int = 0,
) -> VideoClassifier:
    """Build a classifier with fresh weights; raises ValueError for settings that do not fit."""
    return VideoClassifier(
        resolve_size(size),
        num_classes=num_classes,
        frames=frames,
        image_size=image_size,
        tubelet=tubelet,
        positions=positions,
        drop_path=drop_path,
        fc_drop=fc_drop,
        activation=activation,
        checkpoint_blocks=checkpoint_blocks,
    )
