"""Tables as JSON and as Markdown, with what was asked of them beside what was reached."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.kernels.case import Goal, Table, best, is_right, reached, share
from benchmarks.kernels.measure import DATASHEET, Ceilings, Row, Timing, Work

UNITS = {"time": "x", "memory": "x", "copy": "%", "floor": "%", "gemm": "%", "mfu": "%"}
OF = {
    "memory": "memory, against",
    "copy": "share of the copy's bandwidth",
    "floor": "share of the floor's speed",
    "gemm": "share of the product's rate",
    "mfu": "model FLOPs of the data sheet's peak",
}
AGAINST = {
    ("compile", "stock"): "the best stock path",
    ("flex",): "FlexAttention",
    ("eager",): "eager",
    ("compile",): "torch.compile",
    ("gemm",): "the product and the best loss after it",
    ("gemm-eager",): "the product and the eager loss",
}


def to_json(table: Table) -> dict:
    return asdict(table)


def from_json(found: dict) -> Table:
    rows = [
        Row(**{**row, "timings": {name: Timing(**t) for name, t in row["timings"].items()}})
        for row in found["rows"]
    ]
    goals = tuple(Goal(of, tuple(kinds), must, aim) for of, kinds, must, aim in found["goals"])
    ceilings = Ceilings(*found["ceilings"]) if found["ceilings"] else None
    work = {phase: Work(*work) for phase, work in found["work"].items()}
    return Table(**{**found, "rows": rows, "goals": goals, "ceilings": ceilings, "work": work})


def write_json(path: Path, value: object) -> None:
    """Whole or not at all: whoever reads it may be another process."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def peak_flops(device: str) -> float | None:
    """The data sheet's, of a device by its name."""
    return next((flops for name, (flops, _) in DATASHEET.items() if name in device), None)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _value(value: float, of: str) -> str:
    return f"{100 * value:.0f} %" if UNITS[of] == "%" else f"{value:.2f}x"


def goal_rows(table: Table, device: str) -> list[list[str]]:
    """What, against whom, reached, must, aim and verdict."""
    rows = []
    for goal in table.goals:
        found = reached(table, goal, peak_flops(device))
        what = AGAINST.get(goal.kinds, "")
        what = OF[goal.of] + (f" {what}" if what else "") if goal.of in OF else f"time, {what}"
        must = "-" if goal.must is None else _value(goal.must, goal.of)
        aim = "-" if goal.aim is None else _value(goal.aim, goal.of)
        if found is None:
            rows.append([table.name, what, "-", "not measured", must, aim, "not shown"])
            continue
        value, who = found
        verdict = [
            f"{name} {'met' if value >= wanted else 'not met'}"
            for name, wanted in (("must", goal.must), ("aim", goal.aim))
            if wanted is not None
        ]
        rows.append([table.name, what, who, _value(value, goal.of), must, aim, ", ".join(verdict)])
    return rows


def phase_rows(table: Table, phase: str) -> list[list[str]]:
    """A contender a row: times, rates, shares, memory, errors, and its time over ours."""
    ours = best(table, ("ours",), phase)
    work = table.work[phase]
    rows = []
    for row in table.rows:
        timing = row.timings.get(phase)
        worst = max(row.errors.values(), key=lambda e: float("inf") if e != e else e, default=None)
        error = "-" if worst is None else f"{worst:.1e}"
        if worst is not None and not is_right(row, table.rows):
            error += " WRONG"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        if timing is None:
            rows.append([row.name, *["-"] * 7, peak, error, row.note or "-"])
            continue
        seconds = timing.ms / 1e3
        against = "-" if ours is None else f"{timing.ms / ours.timings[phase].ms:.2f}x"
        by = timing.by if not row.note else f"{timing.by}; {row.note}"
        traffic = ["-", "-"]
        if work.size:
            rate = _number(work.size / seconds / 1e9)
            traffic = [rate, f"{100 * share(table, row, phase, 'copy'):.0f} %"]
        arithmetic = ["-", "-"]
        if work.flops:
            rate = _number(work.flops / seconds / 1e12)
            arithmetic = [rate, f"{100 * share(table, row, phase, 'gemm'):.0f} %"]
        rows.append(
            [
                row.name,
                f"{_number(timing.ms)} ±{100 * timing.spread / 2:.0f} %",
                against,
                *arithmetic,
                *traffic,
                f"{100 * share(table, row, phase, 'floor'):.0f} %",
                peak,
                error,
                by,
            ]
        )
    return rows


HEADING = (
    "way",
    "ms",
    "time over ours",
    "TFLOP/s",
    "of product",
    "GB/s",
    "of copy",
    "of floor",
    "peak MB",
    "error",
    "timed by",
)


def section(table: Table) -> str:
    """A table of every phase."""
    parts = [f"### {table.name}: {table.title}\n\n{table.shape}; {table.dtype}. {table.note}\n"]
    for phase, work in table.work.items():
        if not any(phase in row.timings for row in table.rows) and phase != list(table.work)[-1]:
            continue
        floor = "" if table.ceilings is None else f"; floor {table.ceilings.floor_ms(work):.3g} ms"
        parts.append(
            f"**{phase}**: {work.flops / 1e9:,.1f} GFLOP, {work.size / 1e6:,.1f} MB{floor}\n"
        )
        parts.append(markdown(HEADING, phase_rows(table, phase)))
    return "\n".join(parts)


def facts_of(device_name: str, about: dict[str, str]) -> str:
    lines = [f"- {name}: {value}" for name, value in {"device": device_name, **about}.items()]
    return "\n".join(lines) + "\n"


METHOD = """Times are medians; ± is half of what the middle half of the runs spans. On a GPU a
graph of calls on several sets of inputs, together larger than its cache, is replayed ("graph");
"events" are calls between events instead. Bytes are inputs read and outputs written once, FLOPs
those of the formula; `of floor` is the larger of both at the ceilings, over the time. Ceilings are
measured in the same process: a copy, counted twice, and a bf16 product of 8192^3. `peak MB` is what
a call takes beyond its inputs. The error is the largest of |found - exact| / |exact| of the output
and all gradients, exact in float64 (whole steps: float32); WRONG is more than twice eager's, and
counts for nothing. A way that failed says why.
"""


def measured(
    tables: Sequence[Table], device: str, about: dict[str, str], *, missing: Sequence[str] = ()
) -> str:
    """The whole page of a run on a device; `missing` tables were not come to."""
    goals = [row for table in tables for row in goal_rows(table, device)]
    heading = ("table", "what", "who", "reached", "must", "aim", "verdict")
    ceilings = next((table.ceilings for table in tables if table.ceilings), None)
    if ceilings:
        about = {
            **about,
            "copy": f"{ceilings.bytes_per_second / 1e12:.3g} TB/s read and written",
            "bf16 product": f"{ceilings.flops_per_second / 1e12:.4g} TFLOP/s",
        }
    return "\n".join(
        [
            "# Kernels\n",
            facts_of(device, about),
            METHOD,
            "## What was asked\n",
            markdown(heading, goals) if goals else "Nothing of these tables.\n",
            "## Tables\n",
            *(section(table) for table in tables),
            *([f"No time was left for {', '.join(missing)}.\n"] if missing else []),
        ]
    )
