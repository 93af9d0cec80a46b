"""Calls of kernels in Triton's interpreter: python tests/interpret.py IN OUT.

A process of its own, since the interpreter has to be chosen before Triton is imported, and one for
all calls of a test file. IN holds what to call, as `module.function` of `distill.kernels` or of
applied.py here, with its arguments; OUT gets what is returned. Every operation takes its kernels
there, and memory that nothing has written holds NaN.
"""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from distill.kernels import jit

if __name__ == "__main__":
    jit.uses_triton = lambda tensor: True  # before the modules below take it by name
    processors = SimpleNamespace(multi_processor_count=3)
    torch.cuda.get_device_properties = lambda device: processors

from distill.kernels.attention import Packing
from distill.kernels.coded_targets import CodedTargets

Call = tuple[str, tuple, dict]  # `module.function`, arguments, settings


def interpret(calls: dict[str, Call], folder: Path) -> dict:
    """What each call returns, by its name in `calls`."""
    torch.save(calls, folder / "in")
    subprocess.run([sys.executable, __file__, folder / "in", folder / "out"], check=True)
    return torch.load(folder / "out", weights_only=True)


def find(place: str):
    """What stands at `module.name`, or `module.name.name`, of `distill.kernels` or applied.py."""
    module, *names = place.split(".")
    package = "" if module == "applied" else "distill.kernels."
    return functools.reduce(getattr, names, importlib.import_module(package + module))


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    with torch.serialization.safe_globals([CodedTargets, Packing]):
        calls = torch.load(sys.argv[1], weights_only=True)
    found = {
        name: find(place)(*arguments, **settings)
        for name, (place, arguments, settings) in calls.items()
    }
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
