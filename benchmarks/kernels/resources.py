"""What can be said of the kernels without a GPU: floors, and what they compile to.

Launches are not listed by hand: the public functions run on a CPU with a launcher that notes
kernel, argument types and constants, so that what is compiled is what a GPU would be given.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.kernels import report
from benchmarks.kernels.case import BOTH, Case, phase_calls
from benchmarks.kernels.measure import DATASHEET, Ceilings
from benchmarks.kernels.plan import Entry, tables
from benchmarks.kernels.step import REPLAY
from distill.kernels.gpu_build import CAPABILITIES, Build, build
from distill.kernels.jit import triton

CPU = torch.device("cpu")
PROCESSORS = 132  # of an H100 and H200; only grids depend on it
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Of a multiprocessor, CUDA's programming guide: shared bytes (each block takes 1 KB more), threads.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
ALWAYS = ("LOG2E", "HIDDEN", "EPS", "TINY", "LAYERS", "PAD")  # constants that are no choice
RECORDED = ("attention-S", "attention-L", "attention-88", "attention-128", "alignment")
RECORDED += ("alignment-8bit", "alignment-4bit", "alignment-3bit", "alignment-2bit")
RECORDED += ("linear-S-4bit", "rmsnorm-S", "rmsnorm-B", "rmsnorm-L", "patches-S")


@dataclass(frozen=True)
class Launch:
    """All that decides what a kernel compiles to."""

    kernel: object
    types: tuple[tuple[str, str | tuple[str, ...]], ...]
    constants: tuple[tuple[str, object], ...]
    multiples_of_16: tuple[str, ...]
    warps: int
    stages: int
    max_registers: int | None
    is_fused: bool

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def choice(self) -> str:
        """What was chosen for this launch, in words."""
        constants = ", ".join(
            f"{name} {value}"
            for name, value in self.constants
            if name.isupper() and name not in ALWAYS
        )
        limit = f", at most {self.max_registers} registers" if self.max_registers else ""
        return f"{constants}; {self.warps} warps, {self.stages} stages{limit}"

    def build(self, capability: int) -> Build:
        return build(
            self.kernel,
            capability,
            types=dict(self.types),
            constants=dict(self.constants),
            warps=self.warps,
            stages=self.stages,
            max_registers=self.max_registers,
            is_fused=self.is_fused,
            multiples_of_16=self.multiples_of_16,
        )


def _type(value: object) -> str | tuple[str, ...] | None:
    """Triton's for an argument; None for what it makes a constant by itself."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, tuple):
        return tuple(_type(each) for each in value)
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return None
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch_of(kernel, arguments: tuple, settings: dict) -> Launch:
    """A call of a kernel as Triton would compile it."""
    options = dict(settings)
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    most, is_fused = options.pop("maxnreg", None), options.pop("enable_fp_fusion", True)
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    is_constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    types, constants, multiples = [], [], []
    for name in kernel.arg_names:
        kind = None if is_constant[name] else _type(values[name])
        if kind is None:
            constants.append((name, values[name]))
            continue
        types.append((name, kind))
        if isinstance(values[name], int) and values[name] % 16 == 0:
            multiples.append(name)
    return Launch(
        kernel, tuple(types), tuple(constants), tuple(multiples), warps, stages, most, is_fused
    )


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are chosen on the CPU, and launches are noted instead of made."""
    found: dict[Launch, None] = {}

    def run(kernel, *arguments, grid, warmup, **settings) -> None:
        found[launch_of(kernel, arguments, settings)] = None

    launches: list[Launch] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.runtime.jit.JITFunction, "run", run))
        stub = SimpleNamespace(multi_processor_count=PROCESSORS)
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda device: stub))
        for name, module in list(sys.modules.items()):
            if name.startswith("distill.kernels.") and hasattr(module, "uses_triton"):
                stack.enter_context(patch.object(module, "uses_triton", lambda tensor: True))
        yield launches
    launches += found


def launches_of(case: Case) -> list[Launch]:
    """Of our own contenders, with their backward."""
    with recorded() as found:
        for contender in case.contenders:
            if contender.kind in ("ours", "form"):
                call = contender.make()
                inputs = case.make_inputs(0)
                phase_calls(call, inputs, BOTH if BOTH in case.work else "forward")()
    return found


def occupancy(made: Build, warps: int, capability: int) -> int:
    """Blocks that run at once on a multiprocessor."""
    of_thread = math.ceil(made.registers / 8) * 8
    return min(
        REGISTERS // (of_thread * 32 * warps),
        SHARED[capability] // (made.shared_bytes + 1024),
        THREADS // (32 * warps),
        BLOCKS,
    )


def resource_row(launch: Launch, made: dict[int, Build]) -> list[str]:
    cells = []
    for capability in made:
        one = made[capability]
        spilled = one.stack_bytes + one.local_bytes
        cells.append(
            f"{one.registers} / {spilled} / {one.shared_bytes / 1024:.1f} / "
            f"{one.matrix_instructions()} / {occupancy(one, launch.warps, capability)}"
        )
    return [f"`{launch.name}`", launch.choice, *cells]


def all_launches() -> list[Launch]:
    """Of every table whose kernels differ, on few rows.

    Their number is a multiple of 16 and a clip's is not, as in the tables: Triton asks for that.
    """
    entries = tables(CPU, is_tiny=False, backend="aot_eager", clips=16, tokens=3)
    found: dict[tuple[str, str], Launch] = {}
    for name in RECORDED:
        for launch in launches_of(entries[name].case()):
            found.setdefault((launch.name, launch.choice), launch)
    return sorted(found.values(), key=lambda launch: (launch.kernel.__module__, launch.name))


def resources(launches: list[Launch]) -> tuple[str, list[dict]]:
    """Markdown and figures of each launch for every capability."""
    rows, figures = [], []
    for launch in launches:
        made = {capability: launch.build(capability) for capability in CAPABILITIES}
        rows.append(resource_row(launch, made))
        for capability, one in made.items():
            figures.append(
                {
                    "kernel": launch.name,
                    "choice": launch.choice,
                    "capability": capability,
                    "registers": one.registers,
                    "spilled_bytes": one.stack_bytes + one.local_bytes,
                    "shared_bytes": one.shared_bytes,
                    "matrix_instructions": one.matrix_instructions(),
                    "blocks_at_once": occupancy(one, launch.warps, capability),
                }
            )
    heading = ("kernel", "choice", *(f"sm_{capability}" for capability in CAPABILITIES))
    return report.markdown(heading, rows), figures


def floors(entries: dict[str, Entry], sheets: tuple[str, ...]) -> tuple[str, list[dict]]:
    """Work of every table's phases, and the time that no implementation beats, by data sheet."""
    rows, figures = [], []
    for name, entry in entries.items():
        case = entry.case()
        for phase, work in case.work.items():
            if phase == REPLAY:  # the same work as that of a step
                continue
            ceilings = {sheet: Ceilings(*reversed(DATASHEET[sheet])) for sheet in sheets}
            times = {sheet: each.floor_ms(work) for sheet, each in ceilings.items()}
            bound = [
                "memory"
                if work.size / c.bytes_per_second > work.flops / c.flops_per_second
                else "arithmetic"
                for c in ceilings.values()
            ]
            rows.append(
                [
                    name,
                    case.shape,
                    phase,
                    f"{work.flops / 1e9:,.1f}",
                    f"{work.size / 1e6:,.1f}",
                    *(f"{ms:.3g} ({by})" for ms, by in zip(times.values(), bound, strict=True)),
                ]
            )
            figures.append(
                {
                    "table": name,
                    "phase": phase,
                    "flops": work.flops,
                    "bytes": work.size,
                    "floor_ms": times,
                }
            )
    heading = ["table", "shape", "phase", "GFLOP", "MB", *(f"floor on {s}, ms" for s in sheets)]
    return report.markdown(heading, rows), figures


INTRODUCTION = """No GPU has run this yet. What follows is computed: what each table's work comes to
and the time it would take at a data sheet's rates, and what this project's kernels compile to. The
measurements that replace this page, and their one command, are in [../README.md](../README.md).
"""
FLOORS = """Useful FLOPs, and bytes of inputs read and outputs written once. Floors are computed
from data sheets ({sheets})
and not measured: what a device reaches is lower, and a run there takes its own ceilings.
"""
RESOURCES = """Compiled ahead of time by Triton {triton}, for the launches of the tables above:
registers of a thread / bytes spilled / KB of shared memory / matrix instructions / blocks at once
on a multiprocessor. Constants are chosen in `kernels/` and checked in: nothing is searched for at
a first run.
"""


def page(device: str, about: dict[str, str]) -> dict:
    """What is written where there is no GPU."""
    sheets = ("H200", "H100", "A100")
    in_words = ", ".join(
        f"{name}: {flops / 1e12:.0f} TFLOP/s in bf16, {size / 1e12:.3g} TB/s"
        for name, (flops, size) in DATASHEET.items()
    )
    entries = tables(CPU, is_tiny=False, backend="aot_eager")
    floor_table, floor_figures = floors(entries, sheets)
    resource_table, resource_figures = resources(all_launches())
    parts = [
        "# Kernels: floors and compiled figures\n",
        INTRODUCTION,
        report.facts_of(f"none ({device})", about),
        "## Floors\n",
        FLOORS.format(sheets=in_words),
        floor_table,
        "## What the kernels take of a GPU\n",
        RESOURCES.format(triton=triton.__version__),
        resource_table,
    ]
    json = {"device": None, **about, "floors": floor_figures, "resources": resource_figures}
    return {"markdown": "\n".join(parts), "json": json}
