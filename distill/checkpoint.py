"""What a run can go on from: folders that are whole or not there, and are checked on reading.

<run folder>/checkpoints/step-00000120/model.safetensors       weights
                                       optimizer.safetensors   its state, by parameter name
                                       model_ema.safetensors   averaged weights, if it has them
                                       state.json              position, random states, hashes
"""

import base64
import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from distill.errors import StateError
from distill.log import size_text

logger = logging.getLogger(__name__)

LAYOUT = 1  # raised by hand when files written before can no longer be read
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "model_ema.safetensors"
STATE_FILE = "state.json"
_CHUNK_BYTES = 1 << 24
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped; `state` holds JSON values.

    `ema` are the averaged weights of a run that keeps them.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict
    ema: dict[str, Tensor] | None = None

    def copy(self) -> "Checkpoint":
        """The same in memory of its own on the CPU, which no later step changes."""
        files = [
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in self.files().values()
        ]
        return Checkpoint(*files[:2], self.state, *files[2:])

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What each of its files of tensors holds."""
        averages = {} if self.ema is None else {EMA_FILE: self.ema}
        return {WEIGHTS_FILE: self.weights, OPTIMIZER_FILE: self.optimizer, **averages}


class DamagedError(StateError):
    """A checkpoint is not what was written."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, metadata: Mapping[str, str]) -> Path:
    """Write `folder`/step-XXXXXXXX, named by the state's `step`; returns its path.

    Everything is written under another name and reaches the disk before the rename, so a kill or
    a power cut leaves either the whole folder or none. Where the step's folder exists its weights
    are the same, and only the state is replaced. Raises StateError where it cannot be written, as
    on a full disk; other checkpoints stay as they were.
    """
    final = step_folder(folder, checkpoint.state["step"])
    partial = folder / f".{final.name}.tmp"
    try:
        if final.exists():
            _write_state(final, checkpoint.state, _read_state(final)["hashes"])
            return final
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {}
        for name, tensors in checkpoint.files().items():
            write_tensors(partial / name, tensors, metadata=metadata)
            hashes[name] = _hash_file(partial / name)
        _write_state(partial, checkpoint.state, hashes)
        os.replace(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritten(folder, checkpoint, error) from None
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one step's folder; raises DamagedError that names the file."""
    record = _read_state(path)
    for name, expected in record["hashes"].items():
        with _reading(path / name):
            found = _hash_file(path / name)
        if found != expected:
            raise _damaged(path / name, "does not match the hash in state.json")
    files = {name: safetensors.torch.load_file(path / name) for name in record["hashes"]}
    return Checkpoint(
        files[WEIGHTS_FILE], files[OPTIMIZER_FILE], record["state"], files.get(EMA_FILE)
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder with the highest step, or None before the first save."""
    return max(folder.glob("step-*"), default=None, key=lambda path: path.name)


def load_latest(folder: Path, *, damaged: Literal["stop", "previous"]) -> Checkpoint | None:
    """The checkpoint to go on from, verified, or None before the first save.

    If a later one is damaged, raises DamagedError with "stop". With "previous" the last one that
    is whole counts: those after it are renamed and no longer count, because the steps that they
    stood for are done again. Raises DamagedError where none is whole.
    """
    errors: dict[Path, DamagedError] = {}
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            found = load_checkpoint(path)
        except DamagedError as error:
            if damaged == "stop":
                raise
            errors[path] = error
            continue
        for bad, error in errors.items():
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(bad, aside)
            logger.warning(
                "%s; run.damaged_checkpoint is 'previous': goes on from %s, and %s is now %s",
                *(str(error).partition(";")[0], path.name, bad.name, aside.name),
            )
        return found
    if errors:
        raise DamagedError(f"{next(iter(errors.values()))}; no other checkpoint there is whole")
    return None


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of optimiser step `step` lies."""
    return folder / f"step-{step:08d}"


def prune_checkpoints(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` last checkpoints and the best one."""
    protected = set() if best_step is None else {step_folder(folder, best_step)}
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path not in protected:
            # A kill in the middle of a deletion must not leave a folder that looks damaged.
            doomed = path.with_name(f".{path.name}.tmp")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def remove_partial(folder: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, partial, metadata={"format": "pt", **metadata})
    _rename_synced(partial, path)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    _rename_synced(partial, path)


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Any write of the block that finds no room as a StateError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)  # safetensors leaves no errno
        if getattr(error, "errno", None) in _FULL or any(f"error {no})" in text for no in _FULL):
            raise StateError(
                f"{folder}: no room to write there ({_reason(error)}), "
                f"{size_text(shutil.disk_usage(folder).free)} are free; make room, and the same "
                "command goes on"
            ) from None
        raise


def random_state() -> dict:
    """The state of every generator a training step may draw from, as JSON values."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "numpy": [algorithm, [int(key) for key in keys], position, has_gauss, cached],
        "python": [version, list(internal), gauss_next],
    }


def restore_random_state(state: dict) -> None:
    """Undo everything that was drawn since `random_state` gave `state`."""
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_decode(text) for text in state["cuda"]])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write_state(folder: Path, state: dict, hashes: dict[str, str]) -> None:
    record = {"layout": LAYOUT, "hashes": hashes, "state": state}
    record["hash"] = _hash_record(record)
    write_json(folder / STATE_FILE, record)


def _read_state(folder: Path) -> dict:
    path = folder / STATE_FILE
    try:
        with _reading(path):
            record = json.loads(path.read_text(encoding="utf-8"))
        expected = record.pop("hash")
    except (ValueError, KeyError, AttributeError):
        raise _damaged(path, "is not what was written") from None
    if _hash_record(record) != expected:
        raise _damaged(path, "does not match its own hash")
    if record["layout"] != LAYOUT:
        raise StateError(
            f"{path}: has layout {record['layout']}, this version reads {LAYOUT}; "
            "finish the run with the version that started it"
        )
    return record


def _hash_record(record: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _damaged(path: Path, reason: str) -> DamagedError:
    folder = path.parent
    before = [name for name in _step_names(folder.parent) if name < folder.name]
    go_on = f"delete {folder} to start again"
    if before:
        go_on = f"set run.damaged_checkpoint=previous or delete {folder} to go on from {before[-1]}"
    return DamagedError(f"{path}: damaged checkpoint, the file {reason}; {go_on}")


def _unwritten(folder: Path, checkpoint: Checkpoint, error: Exception) -> StateError:
    step = checkpoint.state["step"]
    size_bytes = sum(
        tensor.nbytes for tensors in checkpoint.files().values() for tensor in tensors.values()
    )
    earlier = _step_names(folder)
    return StateError(
        f"{folder}: the checkpoint of step {step} could not be written ({_reason(error)}); it "
        f"needs {size_text(size_bytes)}, and {size_text(shutil.disk_usage(folder).free)} are free; "
        f"make room, and the same command goes on from "
        f"{earlier[-1] if earlier else 'the first step'}"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _step_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def _rename_synced(partial: Path, final: Path) -> None:
    _sync(partial)
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
