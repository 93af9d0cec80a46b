"""Knowledge distillation for video foundation models."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.use.predict import LoadedModel


def load_model(checkpoint: str | PathLike[str], *, recipe: str | None = None) -> "LoadedModel":
    """The model of a run's folder, a checkpoint, an export or a file of weights, ready for use.

        model = distill.load_model("runs/quickstart/finetuned")
        model.predict("video.mp4")[0].name
        model.features("video.mp4")  # [P]

    `recipe` names what a released file is of. Raises ValueError for what cannot be loaded.
    """
    from distill.use.predict import (
        load_model as load,  # not at the top: importing does nothing heavy
    )

    return load(checkpoint, recipe=recipe)
