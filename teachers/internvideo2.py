"""InternVideo2's vision encoder as a frozen teacher: the students' transformer on all tokens."""

from torch import Tensor

from distill.students.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    Positions,
    VideoViT,
    ViTSize,
    return_layers,
)
from distill.teachers.frozen import Teacher


class InternVideo2(Teacher, VideoViT):
    """A frozen backbone without drop path."""

    has_cls = True
    has_attention = True

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        num_layers: int,
        interval: float,
        activation: Activation = "gelu_tanh",
        tubelet: int = 1,
        positions: Positions = "joint",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__(
            size,
            frames=frames,
            image_size=image_size,
            activation=activation,
            tubelet=tubelet,
            positions=positions,
        )
        self.depth = size.depth
        self.return_layers = return_layers(size.depth, num_layers, interval)
        self.embed_dim, self.pooled_width = size.width, size.pooled_width
        self.mean, self.std = self.patch_embed.mean, self.patch_embed.std = mean, std
        for block in self.blocks:
            block.attn.is_fused = False  # has no backward to win; `tune` times what there is
        self.init_weights()
        self.freeze()

    def see(self, clip: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        patches, _ = self.select_patches(clip, None)
        h, states = self.encode(patches, collect=self.return_layers)
        pooled, attention = self.clip_projector(h)
        return states, pooled, attention[:, 1:]

    def attention_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.size.heads, 1 + self.num_patches, self.size.width // self.size.heads
