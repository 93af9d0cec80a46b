"""Times every configuration of the kernels and prints the best, ready to be pasted.

    python -m benchmarks.kernels --tune                 # all of them
    python -m benchmarks.kernels --tune attention       # CONFIGS of kernels/attention.py alone

Attention's configurations are rows of a table by kernel and length; the other kernels' are
constants of their modules. One is varied at a time, with the others at their best so far, and what
does not compile or fit, or is wrong, is left out.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernels.alignment import Shape as AlignmentShape
from benchmarks.kernels.alignment import alignment_case, linear_case
from benchmarks.kernels.attention import Shape as AttentionShape
from benchmarks.kernels.attention import attention_case
from benchmarks.kernels.case import Case, Inputs, errors_of, first_line, phase_calls
from benchmarks.kernels.measure import free_memory, num_sets, time_calls
from benchmarks.kernels.rows import decode_case, patch_case, rmsnorm_case
from distill.kernels import (
    alignment,
    attention,
    coded_targets,
    codes,
    linear_alignment,
    patch_embed,
    rmsnorm,
)

WRONG = 5e-2  # relative error of a result that no rounding explains
TILES, STEPS, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
SHAPES = {  # by the head's width in registers and the row of CONFIGS
    (64, "short"): AttentionShape((411,) * 128, 6, 64),
    (64, "long"): AttentionShape((2049,) * 16, 6, 64),
    (128, "any"): AttentionShape((411,) * 64, 8, 128),
}
LOSS = AlignmentShape(6, 128, 411, 1408)


class Choice:
    """One setting: a row of a table or a constant of a module."""

    def __init__(self, where: object, key: object, values: list) -> None:
        self.where, self.key, self.values = where, key, values

    @property
    def value(self) -> object:
        if isinstance(self.where, dict):
            return self.where[self.key]
        return getattr(self.where, self.key)

    @value.setter
    def value(self, value: object) -> None:
        if isinstance(self.where, dict):
            self.where[self.key] = value
        else:
            setattr(self.where, self.key, value)

    def line(self) -> str:
        """As it stands in the file."""
        if isinstance(self.where, dict):
            kernel, *rest = self.key
            fields = self.value._asdict().items()
            config = ", ".join(f"{name}={value}" for name, value in fields if value is not None)
            key = ", ".join(f'"{k}"' if isinstance(k, str) else str(k) for k in (kernel, *rest))
            return f"    ({key}): Config({config}),"
        return f"{self.key} = {self.value}"


def attention_spaces(common: dict) -> Iterator[tuple[str, Callable[[], Case], list[Choice]]]:
    configs = [
        attention.Config(*values) for values in itertools.product(TILES, STEPS, WARPS, STAGES)
    ]
    for (block, length), shape in SHAPES.items():
        make = partial(attention_case, "attention", "attention", shape, **common)
        choices = [
            Choice(attention.CONFIGS, (kernel, block, length), configs)
            for kernel in ("fwd", "dq", "dkv")
        ]
        yield f"attention, {length} sequences, heads of {block}", make, choices
    shape = SHAPES[64, "short"]
    make = partial(attention_case, "attention", "attention", shape, **common)
    choices = [
        Choice(attention, "RSTD_VALUES", [2048, 4096, 8192]),
        Choice(attention, "NORM_ROWS", [8, 16, 32]),
        Choice(attention, "NORM_PARTS", [128, 256, 512]),
        Choice(attention, "NORM_WARPS", [2, 4, 8]),
    ]
    yield "attention's norms", make, choices


def spaces(device: torch.device) -> Iterator[tuple[str, Callable[[], Case], list[Choice]]]:
    """Name, case and choices of every kernel; names begin with the module's."""
    common = {"device": device, "backend": "aot_eager"}
    yield from attention_spaces(common)
    loss = partial(alignment_case, "alignment", "alignment", LOSS, **common)
    choices = [
        Choice(alignment, "TILE", [2048, 4096, 8192]),
        Choice(alignment, "NUM_STAGES", [1, 2, 3]),
        Choice(alignment, "PROGRAMS", [1, 2, 3, 4]),
        Choice(alignment, "MAX_REGISTERS", [96, 128, 168, 255]),
    ]
    yield "alignment, bf16 targets", partial(loss, bits=None), choices
    choices = [
        Choice(alignment, "DECODED_BYTES", [2**24, 2**25, 3 * 2**24, 2**26]),
        Choice(coded_targets, "TILE", [2048, 4096, 8192]),
        Choice(coded_targets, "NUM_WARPS", [4, 8, 16]),
        Choice(coded_targets, "PROGRAMS", [1, 2, 3, 4]),
        Choice(coded_targets, "MAX_REGISTERS", [96, 128, 168, 255]),
    ]
    yield "coded_targets, 4 bits", partial(loss, bits=4), choices
    linear = partial(linear_case, "linear", "linear", LOSS._replace(inner=384), **common)
    choices = [
        Choice(linear_alignment, "DECODED_BYTES", [2**24, 2**25, 2**26, 2**27]),
        Choice(linear_alignment, "TILE", [1024, 2048, 4096]),
        Choice(linear_alignment, "NUM_WARPS", [2, 4, 8]),
    ]
    yield "linear_alignment, S", partial(linear, bits=None), choices
    norm = partial(rmsnorm_case, "rmsnorm", 128, 411, 768, **common)
    choices = [
        Choice(rmsnorm, "VALUES", [512, 1024, 2048, 4096]),
        Choice(rmsnorm, "WARPS", [2, 4, 8]),
        Choice(rmsnorm, "BWD_PARTS", [264, 528, 640, 1056]),
    ]
    yield "rmsnorm, B", norm, choices
    patches = partial(patch_case, "patches", 128, 410, 384, **common)
    choices = [
        Choice(patch_embed, "BLOCK", [32, 64, 128]),
        Choice(patch_embed, "NUM_WARPS", [4, 8]),
        Choice(patch_embed, "NUM_STAGES", [2, 3, 4]),
        Choice(patch_embed, "SPLITS", [8, 16, 32]),
    ]
    yield "patch_embed, S", patches, choices
    codes_choices = [
        Choice(codes, "BLOCK_ROWS", [4, 8, 16]),
        Choice(codes, "BLOCK_GROUPS", [16, 32, 64]),
        Choice(codes, "NUM_WARPS", [2, 4, 8]),
    ]
    # The Gram form alone decodes without turning rows.
    yield "codes, 4 bits", partial(linear, bits=4), codes_choices
    decode = partial(decode_case, "decode", LOSS, 4, device, backend="aot_eager")
    yield "coded_targets, decoded alone", decode, choices_of_decoding()


def choices_of_decoding() -> list[Choice]:
    return [
        Choice(coded_targets, "TILE", [2048, 4096, 8192]),
        Choice(coded_targets, "NUM_WARPS", [4, 8, 16]),
        Choice(coded_targets, "PROGRAMS", [1, 2, 3, 4]),
    ]


def milliseconds(
    case: Case, sets: list[Inputs], exact: dict, *, device: torch.device, seconds: float
) -> float:
    """Of our own contender as it is set now; raises where it is wrong."""
    ours = next(contender for contender in case.contenders if contender.kind == "ours").make()
    phase = list(case.work)[-1]
    errors = errors_of(case, phase_calls(ours, sets[0], phase)(), exact)
    for name, error in errors.items():
        if not error <= WRONG:
            raise ValueError(f"{name} is off by {error:.1e}")
    calls = [phase_calls(ours, inputs, phase) for inputs in sets]
    return time_calls(calls, device=device, seconds=seconds).ms


def improve(
    choice: Choice, measure: Callable[[], float], start: float, *, deadline: float
) -> tuple[float, list[str]]:
    """Leave `choice` at its fastest value; the milliseconds there and a line for every value."""
    best, best_ms, lines = choice.value, start, []
    for value in choice.values:
        if value == best or time.monotonic() > deadline:
            continue
        choice.value = value
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001 - a configuration that cannot be is left out
            lines.append(f"# {choice.line().strip()}  {first_line(error)}")
            error.__traceback__ = None
            continue
        lines.append(f"# {choice.line().strip()}  {found:.4f} ms")
        if found < best_ms:
            best, best_ms = value, found
    choice.value = best
    return best_ms, lines


def main(names: list[str], device: torch.device, *, seconds: float, budget: float) -> None:
    """Time all choices of the kernels whose names begin so, or of all."""
    deadline = time.monotonic() + budget
    for name, make, choices in spaces(device):
        if names and not name.startswith(tuple(names)):
            continue
        case = make()
        first = case.make_inputs(0)
        exact = case.exact(first)
        size = sum(x.numel() * x.element_size() for x in first.leaves)
        sets = [first, *(case.make_inputs(seed) for seed in range(1, num_sets(device, size)))]
        measure = partial(milliseconds, case, sets, exact, device=device, seconds=seconds)
        start = current = measure()
        lines = []
        for choice in choices:
            current, tried = improve(choice, measure, current, deadline=deadline)
            lines += tried
        late = ", cut short: no time left" if time.monotonic() > deadline else ""
        lines += [f"# {name}: {start:.4f} ms before, {current:.4f} ms now{late}"]
        lines += [choice.line() for choice in choices]
        sys.stdout.write("\n".join(lines) + "\n\n")
        sys.stdout.flush()
        del case, first, exact, sets, measure
        free_memory(device)
