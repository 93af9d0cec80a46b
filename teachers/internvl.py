"""InternVL's vision encoder as a frozen teacher: the same transformer, frame by frame.

Facts from OpenGVLab/InternVideo2 (single_modality/models/internvl_clip_vision.py), which takes
it from InternVL-C 13B at 224 px.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor

from distill.students.vit import IMAGENET_MEAN, IMAGENET_STD, Activation, ViTSize
from distill.teachers.internvideo2 import InternVideo2


class InternVL(InternVideo2):
    """Each frame is an image with a class token of its own and the same positions.

    A clip's class row and pooled vector are the means over its frames, its patch tokens are
    those of the frames one after another, and each frame has paid its own patches attention.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        num_layers: int,
        interval: float,
        activation: Activation = "gelu_tanh",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__(
            size,
            frames=1,
            image_size=image_size,
            num_layers=num_layers,
            interval=interval,
            activation=activation,
            mean=mean,
            std=std,
        )
        self.frames = frames
        self.grid = (frames, *self.table_grid[1:])
        # Upstream's state dict has the class token behind the positions.
        self.register_parameter("cls_token", self._parameters.pop("cls_token"))

    def see(self, clip: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        patches, _ = self.select_patches(clip, None)
        patches = rearrange(patches, "b (t n) u -> (b t) n u", t=self.frames)
        h, states = self.encode(patches, collect=self.return_layers)
        pooled, attention = self.clip_projector(h)
        pooled = reduce(pooled, "(b t) p -> b p", "mean", t=self.frames)
        attention = rearrange(attention[:, 1:], "(b t) n -> b (t n)", t=self.frames)
        return [self._join(state) for state in states], pooled, attention

    def _join(self, state: Tensor) -> Tensor:
        """[B*T,1+n,E] of frames to [B,1+T*n,E] of clips."""
        cls = reduce(state[:, :1], "(b t) 1 e -> b 1 e", "mean", t=self.frames)
        patches = rearrange(state[:, 1:], "(b t) n e -> b (t n) e", t=self.frames)
        return torch.cat([cls, patches], dim=1)

    def attention_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        _, heads, _, width = super().attention_shape(batch_size)
        return batch_size * self.frames, heads, 1 + self.num_patches // self.frames, width
