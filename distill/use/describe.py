"""What a file of weights says of itself, and the model that it is of, without the recipe."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from distill import recipe as schema
from distill.checkpoint import WEIGHTS_FILE, latest_checkpoint
from distill.cli.shell import one_stage
from distill.errors import InputError
from distill.recipe_file import load_recipe
from distill.students.classifier import VideoClassifier
from distill.students.encoder import TimmEncoder, VideoEncoder, create_video_model
from distill.students.timm_backbone import TimmBackbone, TimmClassifier, load_timm
from distill.students.warmstart import load_weights, weights_file

logger = logging.getLogger(__name__)

TIMM = "timm/"  # what a size of timm's begins with
Model = VideoClassifier | TimmClassifier | VideoEncoder | TimmEncoder


@dataclass(frozen=True)
class Description:
    """A model and how it is used: `model` are settings of `create_video_model`.

    `clips` and `crops` are the views of its evaluation, `views` how one is made, and
    `class_names` empty where they are not known. `metadata` is what it was read from.
    """

    recipe: str
    model: dict[str, Any]
    views: schema.Views
    clips: int
    crops: int
    precision: str
    class_names: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def num_classes(self) -> int:
        """0 for a distilled student, which has features and no classes."""
        return self.model["num_classes"]


def describe_model(recipe: schema.Recipe) -> dict[str, str]:
    """Metadata of a weights file: enough to build and use its model without the recipe."""
    model, views = recipe.model, recipe.data.views
    if model.timm:
        size = f"{TIMM}{model.timm}"
    else:
        size = model.size if isinstance(model.size, str) else model.size.model_dump_json()
    section = recipe.evaluate
    described = {
        "recipe": recipe.name,
        "objective": recipe.objective.kind,
        "size": size,
        "frames": str(views.frames),
        "image_size": str(views.image_size),
        "tubelet": str(model.tubelet),
        "positions": model.positions,
        "activation": model.activation,
        "views": views.model_dump_json(),
        "evaluate": json.dumps({"clips": section.clips, "crops": section.crops}),
        "precision": recipe.optim.precision,
    }
    if isinstance(recipe.objective, schema.Classify):
        described["num_classes"] = str(recipe.objective.num_classes)
        if recipe.objective.probe is not None:
            described["probe"] = recipe.objective.probe
            described["probe_norm"] = recipe.objective.probe_norm
        if recipe.objective.class_names:
            described["class_names"] = json.dumps(recipe.objective.class_names, ensure_ascii=False)
    return described


def read_names(path: str, num_classes: int) -> tuple[str, ...]:
    """Class names of a text file, one a line in the order of labels; raises InputError."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise InputError(f"{path}: cannot read class names: {reason}") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != num_classes:
        raise InputError(
            f"{path}: {len(names)} class names for a model of {num_classes} classes; give one a "
            "line, the first that of label 0"
        )
    return names


def read_description(metadata: Mapping[str, str], file: Path) -> Description:
    """Read what `describe_model` wrote; raises InputError for a file that does not say enough."""
    described = dict(metadata)
    size = described.get("size", "")
    try:
        is_timm = size.startswith(TIMM)
        model: dict[str, Any] = {
            "num_classes": int(described.get("num_classes", 0)),
            "frames": int(described["frames"]),
            "image_size": int(described["image_size"]),
        }
        if is_timm:
            model["timm"] = size.removeprefix(TIMM)
        else:
            model["size"] = json.loads(size) if size.startswith("{") else size
            model["tubelet"] = int(described["tubelet"])
            for name in ("positions", "activation", "probe", "probe_norm"):
                if name in described:
                    model[name] = described[name]
        if "views" not in described:  # written by an earlier version
            views = schema.Views(frames=model["frames"], image_size=model["image_size"])
            described["views"] = views.model_dump_json()
            logger.warning("%s: does not say how frames are sampled; taken as sparse", file)
        views = schema.Views.model_validate_json(described["views"])
        asked = json.loads(described.get("evaluate", '{"clips": 4, "crops": 3}'))
        names = tuple(json.loads(described.get("class_names", "[]")))
        return Description(
            recipe=described.get("recipe", file.stem),
            model=model,
            views=views,
            clips=int(asked["clips"]),
            crops=int(asked["crops"]),
            precision=described.get("precision", "fp32"),
            class_names=names,
            metadata=described,
        )
    except (KeyError, ValueError, TypeError, ValidationError):
        raise InputError(
            f"{file}: does not say which model it is of, as files of 'distill train' do; name the "
            "recipe or the row of the zoo that it belongs to: --recipe k400/L14"
        ) from None


def find_weights(checkpoint: str | Path) -> Path:
    """The file of weights of a run's folder, a checkpoint's, or the file itself.

    Raises InputError or WeightsError that says what the folder holds instead.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() and not (path / WEIGHTS_FILE).exists():
        latest = latest_checkpoint(path / "checkpoints")
        if latest is not None:
            raise InputError(f"{path}: the run has not ended; finish it, or name {latest}")
        runs = sorted(str(file.parent) for file in path.glob(f"*/{WEIGHTS_FILE}"))
        if runs:
            raise InputError(f"{path}: holds several runs; name one of {', '.join(runs)}")
    return weights_file(path)


def load_described(
    checkpoint: str | Path, *, recipe: str | None = None, names: str | None = None
) -> tuple[Model, Description, Path]:
    """The model of a run, checkpoint or file, in eval mode on the CPU; projectors stay behind.

    A file that does not say what it is of takes its `recipe`, by name or path. `names` is a file
    of class names. Raises InputError, or WeightsError for weights that do not fit.
    """
    file = find_weights(checkpoint)
    if recipe is not None:
        described = describe_model(one_stage(load_recipe(recipe), None))
    else:
        described = _metadata(file)
    found = read_description(described, file)
    if names is not None:
        if not found.num_classes:
            raise InputError(f"{file}: has features and no classes; leave --names")
        read = json.dumps(read_names(names, found.num_classes), ensure_ascii=False)
        found = read_description({**found.metadata, "class_names": read}, file)
    try:
        model = create_video_model(**found.model)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    head = "keep" if found.num_classes else "reset"
    if isinstance(model, TimmBackbone):
        report = load_timm(model, file, head=head)
    else:
        report = load_weights(model, file, head=head)
    if report.resized:
        name = report.resized[0]
        raise InputError(
            f"{file}: made for another number of frames or pixels: {name} would have to go from "
            f"{report.details[name]}; name the recipe that it was trained with"
        )
    return model.eval(), found, file


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
