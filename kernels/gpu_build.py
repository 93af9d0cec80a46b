"""Compiling a Triton kernel for a GPU that is not there, and what it takes of one."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block, CUDA's guide


@dataclass(frozen=True)
class Build:
    """What a compiled kernel takes of a thread (registers, bytes spilled) and of a block."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    ptx: str

    def matrix_instructions(self) -> int:
        """How many there are, of whichever kind the capability has."""
        return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", self.ptx))


def build(
    kernel,
    capability: int,
    *,
    types: dict[str, str | tuple[str, ...]],
    constants: dict,
    warps: int,
    stages: int = 3,
    max_registers: int | None = None,
    is_fused: bool = False,
    multiples_of_16: tuple[str, ...] = (),
) -> Build:
    """Compile `kernel` with arguments of Triton's `types` ("*fp32", "i32") and `constants`.

    A tuple of types is a tuple of arguments.
    Pointers are taken to be aligned to 16 bytes, as torch's are; Triton finds out by itself which
    sizes are multiples of 16 when it launches a kernel. `is_fused` lets a product and a sum be one
    rounding.
    """
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    aligned = {}
    for name, kinds in types.items():
        for index, kind in enumerate(kinds if isinstance(kinds, tuple) else (kinds,)):
            if kind.startswith("*") or name in multiples_of_16:
                place = (places[name], index) if isinstance(kinds, tuple) else (places[name],)
                aligned[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": warps,
            "num_stages": stages,
            "maxnreg": max_registers,
            "enable_fp_fusion": is_fused,
        },
    )
    return Build(
        **_resources(made.asm["cubin"]), shared_bytes=made.metadata.shared, ptx=made.asm["ptx"]
    )


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "local_bytes": found["LOCAL"],
    }
