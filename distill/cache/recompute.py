"""Records made again: does a cache hold what its recipe's videos and teacher give?

A sample is decoded and run through the teacher once more. Pixels have to be the same bit for bit.
Rows cannot be: codes add an error of known size, and a teacher rounds otherwise in a batch of
other clips. Hence each layer's error is set beside the one that its codes ought to have.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from distill import log
from distill.cache.codes import Codec
from distill.cache.inspect import OpenedCache, coding_noise, sample_rows
from distill.cache.live import cached_teachers, make_records, view_loader
from distill.data.index import read_list
from distill.data.load import Quarantine, Task, View
from distill.engines.plain import pick_device
from distill.errors import InputError
from distill.kernel_choice import using_kernels
from distill.recipe import MAIN, Recipe, of_teacher
from distill.students.vit import patchify

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
FACTOR = 1.5  # of the expected error, an average, that is still taken for rounding
LEAST_ERROR = 1e-6  # what float32 sums leave of 1 - cosine
LEAST_SHARED = 0.9  # of a mask's tokens; rounding may swap some that come in close together


@dataclass(frozen=True)
class RowError:
    """1 - cosine of a cache's rows and fresh ones: mean, largest, and the mean to be expected.

    `limit` is the mean beyond which it is no rounding.
    """

    mean: float
    largest: float
    expected: float
    limit: float


@dataclass
class RecomputeReport:
    """What `recompute` finds. Every problem is a line."""

    asked: int
    made: int = 0
    same_pixels: int = 0
    same_tokens: int = 0
    shared_tokens: float = 1.0  # of the masks' tokens, the least of all records
    attention: float = 0.0  # largest difference, as a share of the record's largest weight
    rows: dict[str, RowError] = field(default_factory=dict)  # by layer, and of the pooled vector
    problems: list[str] = field(default_factory=list)


def recompute(
    opened: OpenedCache,
    recipe: Recipe,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[..., AbstractContextManager] = log.progress,
) -> RecomputeReport:
    """Make `count` records again, drawn by `seed`, and compare them with those of the cache.

    Raises InputError where the recipe's list has none of their clips, and what a teacher without
    weights raises.
    """
    cache, index = opened.cache, opened.cache.index
    clips = {clip.id: clip for clip in read_list(recipe.data.train, seed=recipe.run.seed)}
    drawn = sample_rows(len(index), count, seed=seed)
    rows = {
        Task(clips[clip_id], view=int(index.views[row])): int(row)
        for row, clip_id in zip(drawn, index.clip_ids[drawn].tolist(), strict=True)
        if clip_id in clips
    }
    if not rows:
        raise InputError(
            f"{recipe.data.train.list}: has none of the {len(drawn)} clips that were drawn from "
            f"cache {cache.folder}; set data.train.list to the list that it was made from"
        )
    report = RecomputeReport(asked=len(rows))
    teachers = cached_teachers(recipe)
    quarantine = Quarantine(None, total=len(rows), max_share=1.0)
    tasks, size = list(rows), recipe.objective.cache.batch_size
    batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    errors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with (
        using_kernels([recipe], pick_device()),
        progress(f"recompute {cache.folder}", total=len(rows), unit="records") as bar,
        closing(view_loader(recipe, quarantine).run(batches)) as loaded,
    ):
        for batch, items in zip(batches, loaded, strict=True):
            records = make_records(recipe, teachers, items) if items else {}
            for place, (task, view) in enumerate(items):
                fresh = {
                    name: (value[:, place] if name.startswith("middle") else value[place]).cpu()
                    for name, value in records.items()
                }
                arrays, info = cache.read(rows[task])
                _compare_view(report, task, view, arrays, info, frames=opened.grid[0])
                _compare_fields(report, fresh, arrays)
                for name, found in _row_errors(fresh, arrays, cache.codec).items():
                    errors.setdefault(name, []).append(found)
            report.made += len(items)
            bar.advance(len(batch))
    sections = recipe.objective.teachers
    rounding = {
        name: max(teachers[name].depth * UNIT_ROUNDOFF[own.precision] ** 2, LEAST_ERROR)
        for name, own in sections.items()
    }
    report.rows = {
        name: _summary(parts, rounding=rounding.get(name.partition(" ")[0], rounding[MAIN]))
        for name, parts in errors.items()
    }
    _judge(report, quarantine, where=f"cache {cache.folder}")
    return report


def recompute_table(report: RecomputeReport) -> Table:
    """The errors of rows for a console."""
    table = Table(title="1 - cosine of rows made again", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for name in ("mean", "largest", "expected", "mean / expected"):
        table.add_column(name, justify="right")
    for name, error in report.rows.items():
        ratio = f"{error.mean / error.expected:.2f}" if error.expected > LEAST_ERROR else ""
        values = (f"{value:.2e}" for value in (error.mean, error.largest, error.expected))
        table.add_row(name, *values, ratio)
    return table


def recompute_lines(report: RecomputeReport) -> list[str]:
    """The other fields, in a line each."""
    made = report.made
    return [
        f"pixels: {report.same_pixels} of {made} records the same bit for bit",
        f"masks: {report.same_tokens} of {made} the same, at least {report.shared_tokens:.1%} of "
        "the tokens of each",
        f"attention: at most {report.attention:.1e} of the largest weight apart",
    ]


def _compare_view(
    report: RecomputeReport,
    task: Task,
    view: View,
    arrays: dict[str, np.ndarray],
    info: dict,
    *,
    frames: int,
) -> None:
    """Pixels, bit for bit; in a line what is different about the first that are not the same."""
    pixels = view.pixels[:, :: view.pixels.shape[1] // frames]  # the student's
    if "pixels" in arrays:
        is_same = np.array_equal(arrays["pixels"], pixels)
    else:
        patches = patchify(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]
        is_same = np.array_equal(arrays["patches"], patches[arrays["tokens"].astype(np.int64)])
    if is_same:
        report.same_pixels += 1
        return
    now = {"frames": view.frames.tolist(), "crop": list(view.crop), "flip": view.flip}
    changed = [f"{name} {info[name]}, now {now[name]}" for name in now if info[name] != now[name]]
    why = "; ".join(changed) or f"decoded by {info['decoder']}, now by {view.decoder}"
    report.problems.append(
        f"{task.clip.path}: its pixels in view {task.view} are not those of the record ({why}); "
        "put the video back that was cached, or make the cache anew"
    )


def _compare_fields(
    report: RecomputeReport, fresh: dict[str, Tensor], arrays: dict[str, np.ndarray]
) -> None:
    tokens = arrays["tokens"].astype(np.int64)
    share = len(np.intersect1d(tokens, fresh["tokens"].numpy())) / len(tokens)
    report.same_tokens += share == 1
    report.shared_tokens = min(report.shared_tokens, share)
    if "attention" not in arrays:
        return
    gap = np.abs(arrays["attention"] - fresh["attention"].numpy()).max()
    report.attention = max(report.attention, float(gap / arrays["attention"].max()))


def _row_errors(
    fresh: dict[str, Tensor], arrays: dict[str, np.ndarray], codec: Codec
) -> dict[str, tuple[Tensor, Tensor]]:
    """1 - cosine, and the expected one, of every row that both have, by teacher and layer."""
    _, ours, theirs = np.intersect1d(
        fresh["tokens"].numpy(), arrays["tokens"].astype(np.int64), return_indices=True
    )
    ours, theirs = torch.from_numpy(ours), torch.from_numpy(theirs)
    errors = {}
    for name, own in {MAIN: codec, **codec.others}.items():
        middle = fresh[of_teacher("middle", name)].double()
        decoded = own.decode(*_coded(arrays, name)).double()  # [K,M,E]
        rows = ours, theirs
        if decoded.shape[1] > len(arrays["tokens"]):  # the class token's row comes first
            rows = (F.pad(places + 1, (1, 0)) for places in rows)
        middle, decoded = (x[:, places] for x, places in zip((middle, decoded), rows, strict=True))
        noise = coding_noise(own.kind)
        for layer, (have, want) in enumerate(zip(decoded, middle, strict=True)):
            # Noise of codes is at right angles to the residual, hence to the row but for its mean.
            residual = want if own.means is None else want - own.means[layer].double()
            added = noise * residual.square().sum(dim=-1) / want.square().sum(dim=-1)
            label = f"{name} layer {layer}".strip()
            errors[label] = _angles(have, want), 1 - (1 + added).rsqrt()
    if "pooled" in arrays:
        pooled = torch.from_numpy(arrays["pooled"]).double()[None]
        errors["pooled"] = _angles(pooled, fresh["pooled"].double()[None]), torch.zeros(1)
    return errors


def _coded(arrays: dict[str, np.ndarray], name: str) -> tuple[Tensor, Tensor | None]:
    codes, scales = (arrays.get(of_teacher(field, name)) for field in ("codes", "scales"))
    return torch.from_numpy(codes), None if scales is None else torch.from_numpy(scales)


def _angles(have: Tensor, want: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(have, want, dim=-1)


def _summary(parts: Sequence[tuple[Tensor, Tensor]], *, rounding: float) -> RowError:
    found, expected = (torch.cat(column) for column in zip(*parts, strict=True))
    usual = float(expected.mean())
    return RowError(
        mean=float(found.mean()),
        largest=float(found.max()),
        expected=usual,
        limit=FACTOR * usual + rounding,
    )


def _judge(report: RecomputeReport, quarantine: Quarantine, *, where: str) -> None:
    """A line for each thing that is not as it should be, besides pixels."""
    for entry in quarantine.entries:
        report.problems.append(f"{where}: a clip cannot be decoded any more: {entry['reason']}")
    if report.shared_tokens < LEAST_SHARED:
        report.problems.append(
            f"{where}: a mask made again has only {report.shared_tokens:.0%} of the record's "
            "tokens; its teacher's attention or its draws have changed"
        )
    for name, error in report.rows.items():
        if not error.mean <= error.limit:
            report.problems.append(
                f"{where}: {name}: rows made again are {error.mean:.2e} (1 - cosine) from the "
                f"cache's, where rounding and codes explain {error.limit:.2e}; its teacher is "
                "another one, or runs otherwise"
            )
