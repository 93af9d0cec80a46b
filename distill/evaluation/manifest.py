"""What has to be known of a number before it is compared with another.

`question` is what was asked: two numbers with different ones are not comparable. `views` is how
the videos were looked at, down to a hash of every decoded pixel. `run` is who answered, and where.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from distill import recipe as schema
from distill.data.index import Clip, list_bytes
from distill.evaluation.scores import Scores, hash_columns
from distill.kernels import jit
from distill.students.warmstart import file_sha256

PACKAGES = ("distill-video", "torch", "timm", "numpy", "pillow", "av", "decord")


def make_manifest(
    recipe: schema.Recipe,
    scores: Scores,
    clips: Sequence[Clip],
    *,
    split: str,
    num_clips: int,
    num_crops: int,
    decoders: Mapping[str, int],
    weights: str | Path | None,
    device: torch.device,
    ranks: int,
) -> dict:
    """The manifest of an evaluation, as JSON values. Reads the whole of the file of weights.

    `decoders` counts views by the decoder that read them.
    """
    ids = torch.tensor([clip.id for clip in clips])
    labels = torch.tensor([clip.label for clip in clips])
    order = ids.argsort()  # a list in another order asks the same
    listed, views = getattr(recipe.data, split), recipe.data.views
    return {
        "question": {
            "clips": len(clips),
            "classes": recipe.objective.num_classes,
            "hash": hash_columns(ids[order], labels[order]),
        },
        "views": {
            "clips": num_clips,
            "crops": num_crops,
            "frames": views.frames,
            "image_size": views.image_size,
            "sampling": views.sampling.model_dump(mode="json"),
            "decoded": hash_views(scores),
        },
        "run": {
            "recipe": recipe.name,
            "split": split,
            "list": listed.list,
            "list_sha256": hashlib.sha256(list_bytes(listed)).hexdigest(),
            "weights": None if weights is None else str(weights),
            "weights_sha256": None if weights is None else file_sha256(weights),
            "model": recipe.model.model_dump(mode="json", include={"size", "tubelet"}),
            "precision": recipe.optim.precision,
            "kernels": jit.chosen() or "torch" if device.type == "cuda" else "torch",
            "batch_size": recipe.evaluate.batch_size,
            "device": device_name(device),
            "ranks": ranks,
            "decoders": dict(sorted(decoders.items())),
            "packages": {name: package_version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
    }


def hash_views(scores: Scores) -> str:
    """xxh3-128 over the pixels of all views, whatever the order in which they came."""
    columns = (scores.clip_id, scores.clip_index, scores.crop_index, scores.pixels_hash)
    rows = sorted(zip(*(column.tolist() for column in columns), strict=True))
    return hash_columns(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T)


def device_name(device: torch.device) -> str:
    """What a device is called, a CPU with the instructions that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def package_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
