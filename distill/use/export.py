"""A trained model for use elsewhere: written, loaded again as its users will, and compared.

Every export is a folder: weights or a graph, config.json (architecture, preprocessing, class
names) and README.md, a model card. What is compared is what the target's own loader gives for
real clips with what the original gives; a folder whose comparison fails is not left behind.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.checkpoint import WEIGHTS_FILE, write_json, write_tensors, write_text
from distill.data.demo import render_clip, write_video
from distill.data.load import load_eval_view
from distill.errors import InputError, StateError
from distill.students.timm_backbone import TimmBackbone
from distill.use.describe import Description, Model, load_described
from distill.use.predict import as_clip, pooled_width

Target = Literal["safetensors", "timm", "hub", "onnx", "torch-export"]
Network = Callable[[Tensor], Tensor]  # normalised clips [B,3,T,S,S] to logits or features

TARGETS = get_args(Target)
CONFIG_FILE, CARD_FILE = "config.json", "README.md"
ONNX_FILE, GRAPH_FILE = "model.onnx", "model.pt2"
ARCHITECTURE = "distill_video"  # its name in timm
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of the largest value, or of 1 where that is smaller
BATCHES = (1, 2, 3)  # compared; the batch of a graph is free
TIMED_RUNS = 5
MAX_BATCH = 4096  # that a graph is checked for; tokens of all clips must fit an int32
SINGLE_FILE_BYTES = 1_800_000_000  # a protocol buffer ends at 2 GB


@dataclass(frozen=True)
class Exported:
    """What was written and how it compares: `difference` is the largest to the original's outputs.

    Latencies are medians of a few runs of one clip on this CPU.
    """

    target: Target
    folder: Path
    files: dict[str, int]
    difference: float
    latency_seconds: float
    original_seconds: float


def export(
    checkpoint: str | Path,
    target: Target,
    *,
    folder: str | Path | None = None,
    recipe: str | None = None,
    names: str | None = None,
    video: str | None = None,
    licence: str | None = None,
) -> Exported:
    """Write a model's export, load it again as the target does, and compare the two.

    `folder` is by default export/TARGET beside the weights; an earlier export there is replaced.
    Clips for the comparison are of `video`, or of videos made for it. Raises InputError for what
    cannot be exported or loaded, and StateError where the outputs differ.
    """
    from distill.use.model_card import model_card

    check_packages(target)
    model, description, file = load_described(checkpoint, recipe=recipe, names=names)
    final = Path(folder).expanduser() if folder else file.parent / "export" / target
    check_place(final)
    pixels = check_clips(description, video)
    clips = normalise(pixels, *statistics_of(model))
    with torch.inference_mode():
        expected = model(pixels).float()
    partial = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_json(partial / CONFIG_FILE, config(model, description))
        match target:
            case "onnx":
                write_onnx(partial / ONNX_FILE, model, description, clips)
            case "torch-export":
                write_graph(partial / GRAPH_FILE, model, clips)
            case _:
                path = partial / WEIGHTS_FILE
                write_tensors(path, model.state_dict(), metadata=description.metadata)
        network = load_target(partial, target)
        difference = compare(network, clips, expected, where=f"{target} export of {file}")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        card = model_card(
            model, description, file, target=target, sizes=sizes, difference=difference,
            licence=licence,
        )  # fmt: skip
        write_text(partial / CARD_FILE, card)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        latency, original = latency_seconds(network, clips), latency_seconds(model, clips)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{final}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(target, final, files, difference, latency, original)


def check_packages(target: Target) -> None:
    """Raise InputError that names the extra for packages that a target lacks."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if target == "onnx" and missing:
        raise InputError(
            f"--to onnx needs {', '.join(missing)}: pip install 'distill-video[export]'"
        )


def check_place(folder: Path) -> None:
    """Raise InputError for a folder that holds anything but an earlier export."""
    if not folder.exists():
        return
    is_export = False
    if folder.is_dir():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            is_export = config.get("architecture") == ARCHITECTURE
    if not is_export and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: is there and is no export; choose another place with --out")


def statistics_of(model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of each channel that a model's input is normalised with."""
    source = model if isinstance(model, TimmBackbone) else model.patch_embed
    return tuple(source.mean), tuple(source.std)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Clips uint8 [B,3,T,S,S] as an export takes them, by the formula of config.json."""
    values = pixels.numpy().astype(np.float64) / 255
    shape = (1, 3, 1, 1, 1)
    values = (values - np.reshape(mean, shape)) / np.reshape(std, shape)
    return torch.from_numpy(values.astype(np.float32))


def check_clips(description: Description, video: str | None) -> Tensor:
    """Views uint8 [3,3,T,S,S] of a video, or of one made here, decoded as in evaluation."""
    count = max(BATCHES)
    with TemporaryDirectory() as folder:
        if video is None:
            path = Path(folder) / "digits.mp4"
            write_video(path, render_clip(0, "test", number=0, seed=0))
            video = str(path)
        views = [
            load_eval_view(
                as_clip(video),
                clip_index=number,
                num_clips=count,
                crop_index=0,
                num_crops=1,
                views=description.views,
            )
            for number in range(count)
        ]
    return torch.from_numpy(np.stack([view.pixels for view in views]))


def config(model: Model, description: Description) -> dict[str, Any]:
    """What config.json holds: timm's fields, which others ignore, and how a clip is made."""
    mean, std = statistics_of(model)
    views, classes = description.views, description.num_classes
    names = list(description.class_names)
    size = views.image_size
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "num_features": pooled_width(model),
        "model_args": description.model,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": classes,
            "classifier": "head" if classes else None,
            "first_conv": None,
        },
        **({"label_names": names} if names else {}),
        "preprocessing": {
            "input": "clip",
            "shape": ["batch", 3, views.frames, size, size],
            "axes": "batch, RGB channel, frame, row, column",
            "value": "float32: (pixel / 255 - mean) / std, of pixels from 0 to 255",
            "mean": list(mean),
            "std": list(std),
            "frames": views.frames,
            "sampling": views.sampling.model_dump(mode="json"),
            "resize": {
                "short_side": size,
                "interpolation": "bilinear",
                "antialias": views.antialias,
            },
            "crop": "center" if description.crops == 1 else "evenly along the longer side",
            "evaluated_with": {"clips": description.clips, "crops": description.crops},
            "output": "logits" if classes else "features",
        },
    }


def write_graph(path: Path, model: nn.Module, clips: Tensor) -> None:
    """Write the graph that torch.export makes of a model, its batch free."""
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    with naming_failure(path):
        program = torch.export.export(model, (clips[:2],), dynamic_shapes={"clip": batch})
        torch.export.save(program, path)


@contextlib.contextmanager
def naming_failure(path: Path) -> Iterator[None]:
    """What a model cannot be traced for, as some of timm's, as a StateError of one line."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StateError(f"{path.name}: no graph can be made of this model: {reason}") from error


def write_onnx(path: Path, model: nn.Module, description: Description, clips: Tensor) -> None:
    """Write a model as ONNX, its batch free, with config.json's contents in its metadata."""
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with contextlib.redirect_stdout(io.StringIO()), naming_failure(path):
        program = torch.onnx.export(
            model,
            (clips[:2],),
            dynamo=True,
            dynamic_shapes={"clip": batch},
            input_names=["clip"],
            output_names=["logits" if description.num_classes else "features"],
            verbose=False,
        )
        contents = config(model, description)
        for name in ("preprocessing", "label_names"):
            if name in contents:
                program.model.metadata_props[name] = json.dumps(contents[name])
        program.save(str(path), external_data=size > SINGLE_FILE_BYTES)


def load_target(folder: Path, target: Target) -> Network:
    """The export as its users load it: what takes normalised clips and gives the outputs."""
    match target:
        case "safetensors":
            return load_described(folder)[0]
        case "timm":
            import timm

            import distill.students.timm_models  # noqa: F401  registers the name

            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        case "hub":
            from distill.students.hub import VideoModel

            with contextlib.redirect_stdout(io.StringIO()):
                return VideoModel.from_pretrained(str(folder))
        case "torch-export":
            return torch.export.load(folder / GRAPH_FILE).module()
        case "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(
                str(folder / ONNX_FILE), providers=["CPUExecutionProvider"]
            )
            return lambda clip: torch.from_numpy(session.run(None, {"clip": clip.numpy()})[0])


def compare(network: Network, clips: Tensor, expected: Tensor, *, where: str) -> float:
    """The largest difference over batches of several sizes; StateError where it is too large."""
    difference = 0.0
    for size in BATCHES:
        with torch.inference_mode():
            found = network(clips[:size]).float()
        if found.shape != expected[:size].shape:
            raise StateError(
                f"{where}: gives {list(found.shape)} for a batch of {size}, expected "
                f"{list(expected[:size].shape)}"
            )
        difference = max(difference, float((found - expected[:size]).abs().max()))
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise StateError(
            f"{where}: differs from the original by {difference:.2g}, more than {allowed:.2g}; "
            "it was not kept"
        )
    return difference


def latency_seconds(network: Network, clips: Tensor) -> float:
    """The median time for a batch of one clip, after one that does not count."""
    seconds = []
    with torch.inference_mode():
        network(clips[:1])
        for _ in range(TIMED_RUNS):
            start = time.perf_counter()
            network(clips[:1])
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
