"""Exported models by the Hugging Face hub's own loader: `VideoModel.from_pretrained(folder)`.

The folder, or a repository with its files, holds weights and settings and no code.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from distill.students.encoder import create_video_model


class VideoModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="distill-video",
    tags=["video", "knowledge-distillation"],
):
    """A model of `create_video_model`, with how its clips are made and what its classes are called.

    Takes clips [B,3,T,H,W], uint8 or normalised floating point, and gives logits [B,V] or, without
    a classifier, features [B,P].
    """

    def __init__(
        self,
        model_args: dict,
        preprocessing: dict | None = None,
        label_names: list | None = None,
    ) -> None:
        super().__init__()
        self.module = create_video_model(**model_args)  # the mixin saves what `module` holds
        self.preprocessing, self.label_names = preprocessing, label_names

    def forward(self, clip: Tensor) -> Tensor:
        return self.module(clip)

    @classmethod
    def _load_as_safetensor(
        cls, model: "VideoModel", model_file: str | Path, map_location: str, strict: bool
    ) -> Any:
        """Into `module`, as it was saved, and always strictly: the mixin would let tensors go."""
        super()._load_as_safetensor(model.module, model_file, map_location, True)
        return model.eval()
