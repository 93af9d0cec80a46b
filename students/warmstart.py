"""Reading released weights into our models: strict, reported, and without running any code.

The layouts and the interpolation follow OpenGVLab/InternVideo2's single_modality loaders
(run_finetuning.py, models/internvideo2_teacher.py), where a bad load was only printed.
"""

import argparse
import codecs
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.students.vit import PATCH, SIZES, VideoViT

HeadPolicy = Literal["keep", "first", "k600", "k700", "reset"]

K710_CLASSES = 710
WRAPPERS = ("model", "module")  # upstream's order
PREFIXES = ("module.", "backbone.", "encoder.")
VISION_PREFIX = "vision_encoder."
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
FOLDER_FILES = (DEEPSPEED_FILE, "model.safetensors", "pytorch_model.bin")

# Left out without being named by the recipe, because it is clear what they are.
OTHER_TOWERS = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")
IMAGE_TABLES = ("img_pos_embed", "clip_img_pos_embed")
PROJECTORS = (
    "clip_pos_embed",
    "mae_pos_embed",
    "clip_decoder.",
    "final_clip_decoder.",
    "mae_decoder.",
)
CLASSIFIER_HEADS = ("extra_mlp.", "fc_norm.", "down_norm.", "down.", "head.")

# Plain data in the pickles of upstream's runs; nothing here can run code.
_SAFE_GLOBALS = (
    argparse.Namespace,
    codecs.encode,
    np.dtype,
    np.ndarray,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
)


class WeightsError(ValueError):
    """Weights that are missing, unreadable, or do not belong to the model."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file and of the model, by name.

    `taken` holds the names that were copied as they are; `details` says from what to what the
    resized and mapped ones went.
    """

    path: str
    taken: tuple[str, ...]
    resized: tuple[str, ...]
    mapped: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]
    details: Mapping[str, str]

    def lines(self) -> list[str]:
        """One line per outcome for the log, tensors grouped by module."""
        lines = [f"{self.path}: {len(self.taken)} tensors taken as they are"]
        for word, names in (("resized", self.resized), ("mapped", self.mapped)):
            lines += [f"{word}: {name} {self.details[name]}" for name in names]
        if self.left_at_init:
            lines.append(f"left at init: {_grouped(self.left_at_init)}")
        if self.unused:
            lines.append(f"unused: {_grouped(self.unused)}")
        return lines


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights: `path`, or the one inside a run's or DeepSpeed folder.

    A folder may hold the file, or a DeepSpeed `latest` file that names the folder of the tag.
    Raises WeightsError when there is none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file; check the path of the weights")
    tag = path / "latest"
    folder = path / tag.read_text().strip() if tag.is_file() else path
    found = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise WeightsError(
            f"{folder}: ZeRO stage 3 shards; join them with DeepSpeed's zero_to_fp32.py first"
        )
    has = f"holds {len(found)} of" if found else "holds none of"
    raise WeightsError(f"{folder}: {has} {', '.join(FOLDER_FILES)}; name the file itself")


def file_sha256(path: str | Path) -> str:
    """Hex digest of the file that `weights_file` finds."""
    with weights_file(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their state-dict name, on the CPU, in the stored dtype.

    Reads .safetensors and torch files (.pth, .pt, .bin; memory-mapped, and never running the
    code a pickle may carry), unwraps `model` and `module`, and strips the prefixes of wrappers
    and of the multi-modality model's vision encoder. Raises WeightsError.
    """
    return _read(weights_file(path))[0]


def load_weights(
    model: VideoViT,
    path: str | Path,
    *,
    frames: int | None = None,
    head: HeadPolicy = "reset",
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> LoadReport:
    """Copy a checkpoint into a model; either everything is accounted for or nothing is copied.

    Position tables are interpolated in float32 to the model's frames and image size. `frames`
    is the checkpoint's number of frames, for when neither its metadata nor its tables tell.
    `head` says what becomes of a classification head: "keep" it as it is, the "first" rows
    (K710 to K400), the rows of "k600" or "k700" among K710's, or "reset" to leave the model's
    at init. `allow_missing` and `allow_unused` name prefixes of further tensors that may stay
    at init or be left out. Raises WeightsError naming everything that is unexplained.
    """
    file = weights_file(path)
    state, metadata = _read(file)
    wanted = model.state_dict()
    has_head = "head.weight" in wanted
    if head != "reset" and not has_head:
        raise WeightsError(f"{file}: head: {head} asked for, but the model has no head")
    if head not in ("keep", "first", "k600", "k700", "reset"):
        raise WeightsError(f"unknown head policy {head!r}")

    details: dict[str, str] = {}
    state = _inflate_kernel(state, wanted, details)
    if has_head:
        state = _map_head(state, wanted, head, details, file)
    mapped = tuple(details)
    state = _resize_tables(state, model, _source_frames(frames, metadata, file), details, file)
    resized = tuple(name for name in details if name not in mapped)

    skip = ("head.",) if has_head and head == "reset" else ()
    incoming = {k: v for k, v in state.items() if k in wanted and not k.startswith(skip)}
    _check_shapes(incoming, wanted, model, file)
    missing = tuple(name for name in wanted if name not in incoming)
    unused = tuple(name for name in state if name not in incoming)
    _check_names(
        file,
        missing=missing,
        may_miss=(*_new_heads(wanted, state, head), *allow_missing),
        unused=unused,
        may_leave=(*_explained_unused(wanted), *skip, *allow_unused),
    )
    model.load_state_dict(incoming, strict=False)
    taken = tuple(name for name in wanted if name in incoming and name not in details)
    return LoadReport(str(file), taken, resized, mapped, missing, unused, details)


# --- reading -----------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as handle:
                state = {name: handle.get_tensor(name) for name in handle.keys()}
                metadata = handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: not a readable safetensors file ({error})") from error
    else:
        state, metadata = _read_torch(file), {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(map(str, list(state)[:8])) or "nothing"
        raise WeightsError(f"{file}: holds no state dict of tensors, but {names}")
    return _strip(state), metadata


def _read_torch(file: Path) -> dict:
    try:
        with torch.serialization.safe_globals(list(_SAFE_GLOBALS)):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise WeightsError(
            f"{file}: refused, it holds more than plain tensors and running a checkpoint's code "
            f"is never allowed ({reason}); save its state dict as safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{file}: not a readable torch file ({first})") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file}: expected a dict, found {type(content).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return dict(content[wrapper])
    return dict(content)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith(VISION_PREFIX) for name in state):
        return {name.removeprefix(VISION_PREFIX): value for name, value in state.items()}
    for prefix in PREFIXES:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


# --- fitting -----------------------------------------------------------------------------


def _inflate_kernel(state: dict, wanted: dict, details: dict[str, str]) -> dict:
    """Spread an image model's patch kernel over a tubelet, so that a still clip looks the same."""
    name = "patch_embed.proj.weight"
    tubelet = wanted[name].shape[2]
    if name not in state or state[name].ndim != 5 or state[name].shape[2] == tubelet:
        return state
    if state[name].shape[2] != 1:
        return state
    kernel = repeat(state[name].float() / tubelet, "d c 1 p q -> d c u p q", u=tubelet)
    details[name] = f"tubelet 1 -> {tubelet}"
    return {**state, name: kernel}


def k710_rows(target: Literal["k600", "k700"]) -> list[int]:
    """Row of the Kinetics-710 head for every class of Kinetics-600 or -700 (upstream's maps)."""
    text = files("distill.students").joinpath("k710_label_maps.json").read_text()
    return json.loads(text)[target]


def _map_head(state: dict, wanted: dict, head: str, details: dict[str, str], file: Path) -> dict:
    if head == "reset":
        return state
    classes = wanted["head.weight"].shape[0]
    if "head.weight" not in state or "head.bias" not in state:
        raise WeightsError(f"{file}: head: {head} asked for, but the file has no head; use reset")
    rows = state["head.weight"].shape[0]
    if head == "keep":
        if rows != classes:
            raise WeightsError(
                f"{file}: head has {rows} classes, the model {classes}; set head to first, "
                "k600, k700 (from K710) or reset"
            )
        return state
    if head == "first":
        if rows < classes:
            raise WeightsError(
                f"{file}: head: first asked for {classes} classes, the file has only {rows}"
            )
        index = list(range(classes))
    else:
        index = k710_rows(head)
        if rows != K710_CLASSES or classes != len(index):
            raise WeightsError(
                f"{file}: head: {head} maps {K710_CLASSES} classes to {len(index)}, but the "
                f"file has {rows} and the model {classes}"
            )
    state = dict(state)
    for name in ("head.weight", "head.bias"):
        state[name] = state[name][index]
        details[name] = f"{rows} -> {classes} classes ({head})"
    return state


def _source_frames(frames: int | None, metadata: dict[str, str], file: Path) -> int | None:
    if "frames" not in metadata:
        return frames
    stored = int(metadata["frames"])
    if frames not in (None, stored):
        raise WeightsError(f"{file}: frames: {frames} given, but its metadata says {stored}")
    return stored


def _resize_tables(
    state: dict, model: VideoViT, frames: int | None, details: dict[str, str], file: Path
) -> dict:
    t, h, _ = model.grid
    kernel = state.get("patch_embed.proj.weight")
    source_tubelet = kernel.shape[2] if kernel is not None and kernel.ndim == 5 else 1
    if "patch_embed.proj.weight" in details:
        source_tubelet = 1
    steps = None
    if frames is not None:
        if frames % source_tubelet:
            raise WeightsError(
                f"{file}: frames: {frames} does not divide into its tubelets of {source_tubelet}"
            )
        steps = frames // source_tubelet
    state = dict(state)
    for name, table in state.items():
        own = dict(model.named_parameters()).get(name)
        if "pos_embed" not in name or own is None or table.ndim != 3:
            continue
        if table.shape[-1] != own.shape[-1]:
            continue  # another width: reported with the other shapes
        if name.endswith("_spatial"):
            side = _side(table.shape[1])
            if side is None:
                raise WeightsError(f"{file}: {name} has {table.shape[1]} rows, not a square grid")
            if side != h:
                state[name] = _resize(table, grid=(1, side), to=(1, h))
                details[name] = f"{side}x{side} -> {h}x{h} patches"
        elif name.endswith("_temporal"):
            if table.shape[1] != t:
                state[name] = _resize_time(table.float()[:, :, None], t)[:, :, 0]
                details[name] = f"{table.shape[1]} -> {t} time steps"
        elif not name.endswith("_cls"):
            source = _source_grid(table.shape[1] - 1, (t, h), steps, name, file)
            if source != (t, h):
                cls, patches = table[:, :1].float(), table[:, 1:]
                state[name] = torch.cat([cls, _resize(patches, grid=source, to=(t, h))], dim=1)
                details[name] = "{0}x{1}x{1} -> {2}x{3}x{3} patches".format(*source, t, h)
    return state


def _side(rows: int) -> int | None:
    side = math.isqrt(rows)
    return side if side and side * side == rows else None


def _source_grid(
    rows: int, grid: tuple[int, int], steps: int | None, name: str, file: Path
) -> tuple[int, int]:
    """Time steps and side of a table's square grid, from `steps` or from the model's grid."""
    t, side = grid
    readings = []
    if steps is not None:
        if rows % steps == 0 and (found := _side(rows // steps)):
            return steps, found
    elif rows == t * side * side:
        return grid
    else:
        if rows % (side * side) == 0:
            readings.append((rows // (side * side), side))
        if rows % t == 0 and (found := _side(rows // t)):
            readings.append((t, found))
        if len(readings) == 1:
            return readings[0]
    fits = " or ".join("{0}x{1}x{1}".format(*reading) for reading in readings) or "no square grid"
    hint = f"it has {steps} time steps" if steps else "set frames to the checkpoint's frames"
    raise WeightsError(f"{file}: {name} has {rows} patch positions, which is {fits}; {hint}")


def _resize(patches: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolate [1,t*s*s,D] linearly in time, then bicubically in space; float32 throughout."""
    (t0, s0), (t1, s1) = grid, to
    table = rearrange(patches.float(), "1 (t s) d -> 1 t s d", t=t0)
    if t0 != t1:
        table = _resize_time(table, t1)
    if s0 != s1:
        table = rearrange(table, "1 t (h w) d -> t d h w", h=s0)
        table = F.interpolate(table, size=(s1, s1), mode="bicubic", align_corners=False)
        table = rearrange(table, "t d h w -> 1 t (h w) d")
    return rearrange(table, "1 t s d -> 1 (t s) d")


def _resize_time(table: Tensor, steps: int) -> Tensor:
    """[1,t,S,D] to [1,steps,S,D], with half-pixel centres."""
    columns = rearrange(table, "1 t s d -> s d t")
    columns = F.interpolate(columns, size=steps, mode="linear", align_corners=False)
    return rearrange(columns, "s d t -> 1 t s d")


# --- accounting --------------------------------------------------------------------------


def _new_heads(wanted: dict, state: dict, head: str) -> tuple[str, ...]:
    """Prefixes that may stay at init: with head "reset", what the file has nothing of."""
    if head != "reset" or "head.weight" not in wanted:
        return ()
    absent = [p for p in CLASSIFIER_HEADS if not any(name.startswith(p) for name in state)]
    return (*absent, "head.")


def _explained_unused(wanted: dict) -> tuple[str, ...]:
    explained = (*OTHER_TOWERS, *IMAGE_TABLES)
    if not any(name.startswith(PROJECTORS) for name in wanted):
        explained += PROJECTORS
        if "head.weight" not in wanted:  # a teacher takes a classifier's backbone
            explained += ("fc_norm.", "head.")
    return explained


def _check_shapes(incoming: dict, wanted: dict, model: VideoViT, file: Path) -> None:
    wrong = [name for name in incoming if incoming[name].shape != wanted[name].shape]
    if not wrong:
        return
    name = wrong[0]
    text = (
        f"{file}: {len(wrong)} of {len(incoming)} tensors have another shape than the model's, "
        f"{name} {list(incoming[name].shape)} instead of {list(wanted[name].shape)}"
    )
    found = _named_size(incoming)
    if found and found != model.size:
        names = {value: key for key, value in SIZES.items()}
        own = names.get(model.size, f"of width {model.size.width}")
        text += f"; the file is {names[found]}, the model {own}"
    raise WeightsError(text)


def _named_size(state: dict):
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    width = state["cls_token"].shape[-1] if "cls_token" in state else 0
    return next((s for s in SIZES.values() if (s.width, s.depth) == (width, depth)), None)


def _check_names(
    file: Path,
    *,
    missing: tuple[str, ...],
    may_miss: tuple[str, ...],
    unused: tuple[str, ...],
    may_leave: tuple[str, ...],
) -> None:
    problems = []
    lacking = tuple(name for name in missing if not name.startswith(may_miss))
    if lacking:
        problems.append(f"the model's {_grouped(lacking)} would stay at init (allow_missing)")
    extra = tuple(name for name in unused if not name.startswith(may_leave))
    if extra:
        problems.append(f"the file's {_grouped(extra)} would go unused (allow_unused)")
    if problems:
        raise WeightsError(
            f"{file}: {'; '.join(problems)}; if that is meant, name the prefixes there"
        )


def _grouped(names: Sequence[str]) -> str:
    """Shorten names to modules with counts: `blocks.* (12), cls_token`."""
    groups: dict[str, int] = {}
    for name in names:
        top, _, rest = name.partition(".")
        groups[f"{top}.*" if rest else top] = groups.get(f"{top}.*" if rest else top, 0) + 1
    return ", ".join(f"{n} ({c})" if n.endswith("*") else n for n, c in groups.items())
