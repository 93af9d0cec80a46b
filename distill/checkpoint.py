"""What a run can go on from: folders that are whole or not there, and are checked on reading.

<run folder>/checkpoints/step-00000120/model.safetensors       weights
                                       optimizer.safetensors   its state, by parameter name
                                       model_ema.safetensors   averaged weights, if it has them
                                       state.json              position, random states, hashes
"""

import base64
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from distill.errors import StateError

LAYOUT = 1  # raised by hand when files written before can no longer be read
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "model_ema.safetensors"
STATE_FILE = "state.json"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped; `state` holds JSON values.

    `ema` are the averaged weights of a run that keeps them.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict
    ema: dict[str, Tensor] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, metadata: Mapping[str, str]) -> Path:
    """Write `folder`/step-XXXXXXXX, named by the state's `step`; returns its path.

    Everything is written under another name and reaches the disk before the rename, so a kill or
    a power cut leaves either the whole folder or none. Where the step's folder exists its weights
    are the same, and only the state is replaced.
    """
    final = step_folder(folder, checkpoint.state["step"])
    if final.exists():
        hashes = _read_state(final)["hashes"]
        _write_state(final, checkpoint.state, hashes)
        return final
    partial = folder / f".{final.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hashes = {}
    files = {WEIGHTS_FILE: checkpoint.weights, OPTIMIZER_FILE: checkpoint.optimizer}
    if checkpoint.ema is not None:
        files[EMA_FILE] = checkpoint.ema
    for name, tensors in files.items():
        write_tensors(partial / name, tensors, metadata=metadata)
        hashes[name] = _hash_file(partial / name)
    _write_state(partial, checkpoint.state, hashes)
    os.replace(partial, final)
    _sync(folder)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one step's folder; raises StateError that names the damaged file."""
    record = _read_state(path)
    for name, expected in record["hashes"].items():
        if not (path / name).exists():
            raise _damaged(path / name, "is missing")
        if _hash_file(path / name) != expected:
            raise _damaged(path / name, "does not match the hash in state.json")
    files = {name: safetensors.torch.load_file(path / name) for name in record["hashes"]}
    return Checkpoint(
        files[WEIGHTS_FILE], files[OPTIMIZER_FILE], record["state"], files.get(EMA_FILE)
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder with the highest step, or None before the first save."""
    return max(folder.glob("step-*"), default=None, key=lambda path: path.name)


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
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = record.pop("hash")
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
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


def _damaged(path: Path, reason: str) -> StateError:
    others = sorted(other.name for other in path.parent.parent.glob("step-*"))
    before = [name for name in others if name < path.parent.name]
    go_on = f"go on from {before[-1]}" if before else "start again"
    return StateError(
        f"{path}: damaged checkpoint, the file {reason}; delete {path.parent} to {go_on}"
    )


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
