"""Decodes codes by the Triton kernel in Triton's interpreter: python tests/interpret.py IN OUT.

A process of its own, since the interpreter has to be chosen before Triton is imported. IN holds
`NAME.codes`, `NAME.scales` and `NAME.levels`, and its metadata widths and dtypes by NAME; OUT
gets NAME's rows. Memory that nothing has written holds NaN.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill.kernels.codes import _decode_codes_fwd


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    with safe_open(sys.argv[1], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cases = json.loads(file.metadata()["cases"])
    found = {}
    for name, (width, dtype) in cases.items():
        parts = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "levels"))
        found[name] = _decode_codes_fwd(*parts, width=width, dtype=getattr(torch, dtype))
    save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
