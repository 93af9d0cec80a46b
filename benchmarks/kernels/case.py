"""One table: what is computed, by whom, how it is checked, and what it is held against."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.measure import (
    Ceilings,
    Row,
    Work,
    free_memory,
    num_sets,
    peak_bytes,
    relative_error,
    synchronize,
    time_calls,
)
from distill.kernels import jit

FORWARD, BOTH = "forward", "forward and backward"
AGREES = 2.0  # times eager's own error, up to which a result is right
ROUNDING = 1e-4  # of a result, besides
HALF_ERROR = 5e-2  # where eager itself failed: bf16 operands stay well below
EAGER = ("eager", "gemm-eager")
RUNNING = "running"  # in a row's note, for whoever finds it there after the process died


class Skipped(Exception):  # noqa: N818 - no error: a contender that cannot be had here, and why
    """Raised by a contender that is not to be had here."""


class Inputs(NamedTuple):
    """Arguments of a call, the leaves among them, and upstream gradients of its outputs."""

    arguments: tuple
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


class Contender(NamedTuple):
    """`make` returns the call, a tensor or a tuple of tensors for `Inputs.arguments`."""

    name: str
    kind: str  # "ours", "eager", "compile", "stock", "flex", "gemm" or "other"
    make: Callable[[], Callable]


class Goal(NamedTuple):
    """A ratio of ours to the best row of `kinds`, or a share; `of` says of what."""

    of: str  # "time", "memory", "copy", "floor", "gemm" or "mfu"
    kinds: tuple[str, ...]
    must: float | None
    aim: float | None


@dataclass
class Case:
    """A table before it is measured."""

    name: str
    title: str
    shape: str
    make_inputs: Callable[[int], Inputs]  # by seed
    work: dict[str, Work]  # by phase
    contenders: list[Contender]
    exact: Callable[[Inputs], dict[str, Tensor]]  # results by name, of float64
    results: tuple[str, ...]  # names of outputs, then of leaves' gradients; "" is not compared
    goals: tuple[Goal, ...] = ()
    note: str = ""
    dtype: str = "bf16"


@dataclass
class Table:
    """A table as measured."""

    name: str
    title: str
    shape: str
    dtype: str
    work: dict[str, Work]
    ceilings: Ceilings | None
    goals: tuple[Goal, ...]
    rows: list[Row] = field(default_factory=list)
    note: str = ""


def table_of(case: Case, ceilings: Ceilings | None) -> Table:
    names = ("name", "title", "shape", "dtype", "work", "goals", "note")
    return Table(ceilings=ceilings, **{name: getattr(case, name) for name in names})


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """What operations on a GPU run within; outside it is torch."""
    jit.choose(choice)
    try:
        yield
    finally:
        jit.choose("torch")


def by_torch(call: Callable) -> Callable:
    """`call` with none of this project's kernels."""

    def run(*arguments):
        with kernels("torch"):
            return call(*arguments)

    return run


def by_triton(call: Callable) -> Callable:
    def run(*arguments):
        with kernels("triton"):
            return call(*arguments)

    return run


def compiled(call: Callable, *, backend: str) -> Callable:
    """By torch.compile as a whole, with none of this project's kernels.

    What was compiled before is forgotten: two functions may share their code.
    """
    torch._dynamo.reset()
    return by_torch(torch.compile(call, fullgraph=True, dynamic=False, backend=backend))


def _tuple(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def phase_calls(call: Callable, inputs: Inputs, phase: str) -> Callable[[], tuple]:
    """What is timed: outputs, followed by gradients of the leaves."""

    def forward() -> tuple:
        return _tuple(call(*inputs.arguments))

    def both() -> tuple:
        outputs = forward()
        pairs = [
            (out, up.to(out.dtype))
            for out, up in zip(outputs, inputs.upstream, strict=True)
            if out.requires_grad
        ]
        gradients = torch.autograd.grad([p[0] for p in pairs], inputs.leaves, [p[1] for p in pairs])
        return (*outputs, *gradients)

    if phase == BOTH:
        return both
    return forward


def errors_of(case: Case, found: tuple, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by result; one that is missing is an error itself."""
    if len(found) != len(case.results):
        raise ValueError(f"{len(found)} results, expected {len(case.results)}")
    return {
        name: relative_error(tensor.detach(), exact[name])
        for name, tensor in zip(case.results, found, strict=True)
        if name
    }


def is_right(row: Row, rows: list[Row]) -> bool:
    """Whether its errors are about those of eager, which is as exact as its precision is."""
    eager = next((r for r in rows if r.kind in EAGER and r.errors), None)
    for name, error in row.errors.items():
        allowed = AGREES * eager.errors[name] + ROUNDING if eager else HALF_ERROR
        if not error <= min(allowed, HALF_ERROR):  # NaN is not
            return False
    return bool(row.errors)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".replace("|", "/")
    return text[:160]


def measure(
    contender: Contender,
    case: Case,
    sets: list[Inputs],
    exact: dict[str, Tensor],
    *,
    device: torch.device,
    seconds: float,
) -> Row:
    """One row; whatever goes wrong on the way is in its note."""
    row = Row(contender.name, contender.kind)
    try:
        call = contender.make()
        last = list(case.work)[-1]
        found = phase_calls(call, sets[0], last)()
        row.errors = errors_of(case, found, exact)
        del found
        row.peak_bytes = peak_bytes(phase_calls(call, sets[0], last), device=device)
        for phase in case.work:
            calls = [phase_calls(call, inputs, phase) for inputs in sets]
            row.timings[phase] = time_calls(calls, device=device, seconds=seconds)
    except Skipped as reason:
        row.note = str(reason)
    except Exception as error:  # noqa: BLE001 - a baseline that fails is a row that says so
        traceback.print_exc(limit=-2)
        row.note = first_line(error)
        error.__traceback__ = None  # it would keep tensors
    synchronize(device)  # raises what the device cannot recover from
    return row


def run_case(
    case: Case,
    *,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    deadline: float,
    done: list[Row],
    save: Callable[[Table], None],
) -> Table:
    """Measure all contenders that are not in `done`; `save` gets the table after every row.

    After `deadline`, of time.monotonic(), nothing is compiled any more by torch.compile: that alone
    takes more than a second or two.
    """
    table = table_of(case, ceilings)
    table.rows = list(done)
    known = {row.name for row in done}
    first = case.make_inputs(0)
    exact = case.exact(first)
    free_memory(device)
    size = sum(x.numel() * x.element_size() for x in tensors_of(first.arguments))
    others = (case.make_inputs(seed) for seed in range(1, num_sets(device, size)))
    sets = [first, *others]
    for contender in case.contenders:
        if contender.name in known:
            continue
        table.rows.append(Row(contender.name, contender.kind, note=RUNNING))
        save(table)
        if time.monotonic() > deadline and "compile" in contender.name:
            table.rows[-1].note = "not run: no time left"
        else:
            table.rows[-1] = measure(contender, case, sets, exact, device=device, seconds=seconds)
        free_memory(device)
        save(table)
    return table


def tensors_of(arguments) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for each in arguments:
            yield from tensors_of(each)


def best(table: Table, kinds: tuple[str, ...], phase: str) -> Row | None:
    """The fastest right row of these kinds."""
    rows = [
        row
        for row in table.rows
        if row.kind in kinds and phase in row.timings and is_right(row, table.rows)
    ]
    return min(rows, key=lambda row: row.timings[phase].ms, default=None)


def share(table: Table, row: Row, phase: str, of: str) -> float:
    """Of a ceiling: "copy", "gemm" or "floor", the slower of both."""
    work, ceilings = table.work[phase], table.ceilings
    seconds = row.timings[phase].ms / 1e3
    if of == "copy":
        return work.size / seconds / ceilings.bytes_per_second
    if of == "gemm":
        return work.flops / seconds / ceilings.flops_per_second
    return ceilings.floor_ms(work) / row.timings[phase].ms


def reached(table: Table, goal: Goal, peak_flops: float | None) -> tuple[float, str] | None:
    """What the best of our rows reaches of a goal, and against whom; None if it is not known."""
    phase = list(table.work)[-1]
    ours = best(table, ("ours",), phase)
    if ours is None:
        return None
    if goal.of in ("copy", "gemm", "floor"):
        return share(table, ours, phase, goal.of), ours.name
    if goal.of == "mfu":
        if not peak_flops:
            return None
        rate = table.work[phase].flops / (ours.timings[phase].ms / 1e3)
        return rate / peak_flops, ours.name
    other = best(table, goal.kinds, phase)
    if other is None:
        return None
    if goal.of == "memory":
        if not ours.peak_bytes or not other.peak_bytes:
            return None
        return other.peak_bytes / ours.peak_bytes, f"{ours.name} / {other.name}"
    ratio = other.timings[phase].ms / ours.timings[phase].ms
    return (ratio if math.isfinite(ratio) else 0.0), f"{ours.name} / {other.name}"
