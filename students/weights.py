"""Reading a checkpoint's tensors from any layout upstream uses, without running its code."""

import argparse
import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRAPPERS = ("model", "module")  # upstream's order
PREFIXES = ("module.", "backbone.", "encoder.")
VISION_PREFIX = "vision_encoder."
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
ZIP_START, PICKLE_START = b"PK", b"\x80"  # of the files that torch writes, and once wrote
# What damaged pickles raise beside UnpicklingError: see "Module Interface" in Python's pickle.
DAMAGED = (EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error)
FOLDER_FILES = (DEEPSPEED_FILE, "model.safetensors", "pytorch_model.bin")

# Plain data beside the weights in upstream's own checkpoints: arguments, NumPy learning rates.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


class WeightsError(ValueError):
    """Weights that are missing, unreadable, or do not belong to the model."""


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights: `path`, or the one inside a run's or DeepSpeed folder.

    A folder may hold the file, or a DeepSpeed `latest` file that names the folder of the tag.
    Raises WeightsError when there is none, or more than one.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file; check the path of the weights")
    tag = path / "latest"
    folder = path
    if tag.is_file():
        name = tag.read_text(encoding="utf-8", errors="replace").strip()
        if name in ("", "..") or Path(name).name != name:
            raise WeightsError(f"{tag}: expected a folder's name, found {name[:80]!r}")
        folder = path / name
    found = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise WeightsError(
            f"{folder}: ZeRO stage 3 shards; join them with DeepSpeed's zero_to_fp32.py first"
        )
    count = f"{len(found)} of" if found else "none of"
    raise WeightsError(f"{folder}: holds {count} {', '.join(FOLDER_FILES)}; name the file itself")


def file_sha256(path: str | Path) -> str:
    """Hex digest of the file that `weights_file` finds."""
    digest = hashlib.sha256()
    with weights_file(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their state-dict name, on the CPU, in the stored dtype.

    Reads .safetensors and torch files (.pth, .pt, .bin; memory-mapped, and never running the
    code a pickle may carry), unwraps `model` and `module`, and strips the prefixes of wrappers.
    Of a multi-modality model it returns the vision encoder. Raises WeightsError.
    """
    return read_checkpoint(weights_file(path))[0]


def read_checkpoint(
    file: Path, *, part: str = VISION_PREFIX, is_whole: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, str]]:
    """As `read_weights`, with the names outside the wanted part and a safetensors' metadata.

    Where any name begins with `part`, the tensors of those alone are returned, without it; a
    file without any is taken as the part itself, or refused unless it may be so (`is_whole`).
    """
    metadata = {}
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: not a readable safetensors file ({error})") from error
    else:
        state = _read_torch(file)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(map(str, list(state)[:8])) or "nothing"
        raise WeightsError(
            f"{file}: expected a state dict, bare or under {' or '.join(WRAPPERS)}, found {names}"
        )
    if any(name.startswith(part) for name in state):
        others = tuple(name for name in state if not name.startswith(part))
        wanted = {
            name.removeprefix(part): value for name, value in state.items() if name.startswith(part)
        }
        return wanted, others, metadata
    if not is_whole:
        names = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{file}: expected a multi-modality checkpoint with {part}* entries, found {names} "
            "and the like; name it as model.weights.checkpoint instead"
        )
    for prefix in PREFIXES:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, (), metadata


def _read_torch(file: Path) -> dict:
    with file.open("rb") as opened:
        start = opened.read(48)  # of a pointer to a file, or of a web page, it says enough
    if not start.startswith((ZIP_START, PICKLE_START)):
        begins = f"it begins with {start!r}" if start else "it is empty"
        raise WeightsError(f"{file}: not a readable torch file ({begins})")
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"refused, reading it would run code ({code[1]}); save its bare state dict as "
            "safetensors where you trust it"
            if code
            else "not a readable torch file (damaged, or more than tensors and plain values)"
        )
        raise WeightsError(f"{file}: {reason}") from error
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{file}: not a readable torch file ({reason})") from error
    except DAMAGED as error:
        raise WeightsError(f"{file}: not a readable torch file (damaged or cut short)") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file}: expected a dict, found {type(content).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return dict(content[wrapper])
    return dict(content)
