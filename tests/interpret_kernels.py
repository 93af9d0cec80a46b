"""Runs Triton kernels in Triton's interpreter: python tests/interpret_kernels.py IN OUT.

A process of its own, since the interpreter has to be chosen before Triton is imported. IN holds
what to call by name, as `module.function` of `distill.kernels` or of applied.py here, with its
arguments; OUT gets what is returned. Memory
that nothing has written holds NaN.
"""

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    found = {}
    for name, (place, arguments, settings) in torch.load(sys.argv[1], weights_only=False).items():
        module, function = place.split(".")
        package = "" if module == "applied" else "distill.kernels."
        call = getattr(importlib.import_module(package + module), function)
        found[name] = call(*arguments, **settings)
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
