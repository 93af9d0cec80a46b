"""Deterministic parameters and inputs behind the golden outputs in this folder.

Every .npz in golden/ holds outputs of the reference InternVideo2 implementation in float32 on
CPU, with its parameters set by `fill` and its inputs made by `clip` and `visible_mask`.
A compatible model filled the same way must reproduce them within `TOLERANCE`.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def _normal(name: str, shape) -> torch.Tensor:
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(stream.standard_normal(tuple(shape)).astype(np.float32))


@torch.no_grad()
def fill(model: torch.nn.Module, *, positions: bool = False) -> torch.nn.Module:
    """Set every parameter from its state-dict name alone.

    Position tables keep their init unless `positions`, which fills them like biases.
    """
    for name, parameter in model.named_parameters():
        if "pos_embed" in name and not positions:
            continue
        noise = _normal(name, parameter.shape)
        leaf, owner = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2] if name.count(".") else ""
        if leaf == "gamma":  # LayerScale: large enough that every block matters
            value = 0.3 + 0.1 * noise
        elif leaf == "weight" and "norm" in owner:
            value = 1.0 + 0.1 * noise
        elif leaf == "weight":
            value = noise / math.sqrt(parameter[0].numel())
        else:  # biases, the class token
            value = 0.02 * noise
        parameter.copy_(value)
    return model


def clip(batch: int, frames: int, size: int, seed: int = 0) -> torch.Tensor:
    """A float32 clip batch of shape (batch, 3, frames, size, size)."""
    stream = np.random.RandomState(seed)
    return torch.from_numpy(
        stream.standard_normal((batch, 3, frames, size, size)).astype(np.float32)
    )


def visible_mask(batch: int, tokens: int, visible: int, seed: int = 1) -> torch.Tensor:
    """Bool mask (batch, 1 + tokens): True is masked out; the class token (first) stays visible."""
    stream = np.random.RandomState(seed)
    mask = np.ones((batch, 1 + tokens), dtype=bool)
    mask[:, 0] = False
    for row in mask:
        row[1 + stream.permutation(tokens)[:visible]] = False
    return torch.from_numpy(mask)


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def golden_keys(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """State-dict names and shapes of golden/NAME_keys.txt, in order."""
    lines = (GOLDEN / f"{name}_keys.txt").read_text().splitlines()
    return [_key(line) for line in lines if "\t" in line]


def golden_sections(name: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """As `golden_keys`, of a file with several models under `# title` lines."""
    sections: dict[str, list] = {}
    for line in (GOLDEN / f"{name}_keys.txt").read_text().splitlines():
        if line.startswith("# "):
            sections[line[2:]] = keys = []
        elif line:
            keys.append(_key(line))
    return sections


def keys_of(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """State-dict names and shapes of a model, in order."""
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def _key(line: str) -> tuple[str, tuple[int, ...]]:
    name, shape = line.split("\t")
    return name, tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
