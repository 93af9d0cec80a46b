"""Building a view cache: the teacher looks once at every view of every clip.

What is committed is never done again: a build subtracts the records that are there and makes the
rest, in batches whose clips are the same whatever was done before.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill import log
from distill.cache.calibrate import (
    measure_means,
    read_codec,
    sample_clips,
    with_codec,
    write_codec,
)
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity, distill_section, teacher_hash
from distill.cache.index import load_index
from distill.cache.read import QUARANTINE_FILE, quarantined_ids
from distill.cache.record import record_arrays, view_info
from distill.cache.shards import Field, ShardWriter, remove_leftovers
from distill.data.index import Clip, check_videos, read_list
from distill.data.load import ClipLoader, Quarantine, Task, View, collate, load_task
from distill.engine import pick_device, to_device
from distill.errors import StateError
from distill.models import build_teacher
from distill.recipe import Recipe
from distill.targets import view_records
from distill.teachers import Teacher

MEGABYTE = 2**20


@dataclass(frozen=True)
class BuildReport:
    """What a build has done. Clips are the list's (or the first `limit` of them)."""

    folder: Path
    num_clips: int
    num_views: int
    present: int  # records that were there before
    written: int
    quarantined: int  # clips that cannot be decoded, of this build and those before
    size_bytes: int  # of what was written
    seconds: float

    def lines(self) -> list[str]:
        """The report for the console."""
        total = self.num_clips * self.num_views
        text = [
            f"cache {self.folder}: {self.present + self.written} of {total} records "
            f"({self.num_clips} clips, {self.num_views} views): {self.written} new in "
            f"{self.seconds:.0f} s, {self.size_bytes / MEGABYTE:.1f} MB"
        ]
        if self.quarantined:
            text.append(
                f"cache {self.folder}: {self.quarantined} clips could not be decoded and are left "
                f"out; {self.folder / QUARANTINE_FILE} says why"
            )
        return text


def build_cache(
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[..., AbstractContextManager] = log.progress,
    identity: dict | None = None,
) -> BuildReport:
    """Make the records that a recipe's cache lacks; nothing, not even the teacher, if none.

    `limit` takes the first clips of the list only; `identity` is the recipe's `cache_identity`
    where it is known, which spares hashing a teacher's file again. Records are committed shard
    by shard, so a kill at any time loses at most the open one. Clips that cannot be decoded go
    to the folder's quarantine.jsonl. Raises StateError for a folder that holds another recipe's
    cache and when too many clips fail, InputError for what is wrong with the recipe's inputs.
    """
    started = time.monotonic()
    section = distill_section(recipe)
    folder = Path(folder or section.cache.folder)
    identity = identity or cache_identity(recipe)
    listed = read_list(recipe.data.train, seed=recipe.run.seed)
    clips = listed[:limit]
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    codec = read_codec(folder, identity)
    index = load_index(folder, with_codec(identity, codec))
    clip_ids = np.array([clip.id for clip in clips], np.int64)
    skipped = np.isin(clip_ids, quarantined_ids(folder))
    is_there = np.stack([index.find(clip_ids, v) >= 0 for v in range(section.cache.views)])
    wanted = ~is_there & ~skipped  # [V,C]
    written = size_bytes = 0
    if wanted.any():
        # A wrong folder would fill the quarantine.
        check_videos([clips[i] for i in np.flatnonzero(wanted.any(axis=0))], recipe.data.train)
        teacher = _teacher(recipe).to(pick_device())
        if codec is None:
            sample = sample_clips(listed, seed=section.cache.seed)
            with progress(f"calibrate {folder}", total=len(sample), unit="clips") as bar:
                codec = _calibrate(recipe, folder, identity, sample, teacher, bar.advance)
        with progress(
            f"cache {folder}", total=is_there.size, unit="views", done=int((~wanted).sum())
        ) as bar:
            identity = with_codec(identity, codec)
            for count, size in _write(recipe, folder, identity, clips, wanted, teacher, codec):
                bar.advance(count)
                written, size_bytes = written + count, size
    return BuildReport(
        folder=folder,
        num_clips=len(clips),
        num_views=section.cache.views,
        present=int(is_there.sum()),
        written=written,
        quarantined=int(np.isin(clip_ids, quarantined_ids(folder)).sum()),
        size_bytes=size_bytes,
        seconds=time.monotonic() - started,
    )


def _calibrate(
    recipe: Recipe,
    folder: Path,
    identity: dict,
    clips: list[Clip],
    teacher: Teacher,
    advance: Callable[[int], None],
) -> Codec:
    """Measure the means of a new cache on the given clips, and keep them in its folder."""
    # Clips that fail here go to no quarantine: they may lie beyond `limit`.
    quarantine = Quarantine(None, total=len(clips), max_share=1.0)
    means = measure_means(
        clips,
        loader=_loader(recipe, quarantine),
        middle=lambda items: _records(recipe, teacher, items)["middle"],
        batch_size=recipe.objective.cache.batch_size,
        advance=advance,
    )
    return write_codec(folder, identity, means)


def _write(
    recipe: Recipe,
    folder: Path,
    identity: dict,
    clips: list[Clip],
    wanted: np.ndarray,
    teacher: Teacher,
    codec: Codec,
) -> Iterator[tuple[int, int]]:
    """Make the wanted records [V,C]; yields how many a batch added, and all bytes so far."""
    cache = recipe.objective.cache
    quarantine = Quarantine(
        folder / QUARANTINE_FILE, total=len(clips), max_share=recipe.data.max_quarantined
    )
    loader = _loader(recipe, quarantine)
    with ExitStack() as stack:
        writer = None
        batches = stack.enter_context(
            closing(loader.run(_batches(clips, wanted, size=cache.batch_size)))
        )
        for items in batches:
            if not items:
                continue
            arrays = record_arrays(_records(recipe, teacher, items), codec=codec)
            if writer is None:
                fields = [Field(n, str(a.dtype), a.shape[1:]) for n, a in arrays.items()]
                writer = stack.enter_context(
                    ShardWriter(
                        folder,
                        fields=fields,
                        identity=identity,
                        shard_bytes=cache.shard_mb * MEGABYTE,
                        shard_seconds=60 * cache.shard_minutes,
                    )
                )
            for place, (task, view) in enumerate(items):
                record = {name: array[place] for name, array in arrays.items()}
                writer.add(task.clip.id, task.view, record, view_info(task.clip, view))
            writer.commit_if_full()  # only here: a batch is redone as a whole or not at all
            yield len(items), writer.committed_bytes
    if writer is not None:
        yield 0, writer.committed_bytes


def _loader(recipe: Recipe, quarantine: Quarantine) -> ClipLoader:
    data = recipe.data
    return ClipLoader(
        functools.partial(load_task, views=data.views, seed=recipe.objective.cache.seed),
        workers=data.workers,
        timeout_seconds=data.decode_timeout_seconds,
        quarantine=quarantine,
    )


def _records(
    recipe: Recipe, teacher: Teacher, items: list[tuple[Task, View]]
) -> dict[str, torch.Tensor]:
    section = recipe.objective
    return view_records(
        teacher,
        to_device(collate(items), pick_device()),
        mask=section.mask,
        seed=section.cache.seed,
        precision=section.teacher.precision,
        tokens=section.cache.tokens,
        pixels=section.cache.pixels,
    )


def _batches(clips: list[Clip], wanted: np.ndarray, *, size: int) -> Iterator[list[Task]]:
    """Tasks view by view, cut at fixed places of the list, without what is there already.

    A teacher's rounding depends on the batch, so fixed batches make a resumed cache equal to an
    uninterrupted one.
    """
    for view, row in enumerate(wanted):
        for start in range(0, len(clips), size):
            places = np.flatnonzero(row[start : start + size]) + start
            if len(places):
                yield [Task(clips[place], view=view) for place in places]


def _teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher; StateError when its weights are not those the cache is to hold."""
    section = recipe.objective
    if section.cache.teacher_hash is not None:
        expected = section.cache.teacher_hash.lower()
        own = section.cache.model_copy(update={"teacher_hash": None})
        objective = section.model_copy(update={"cache": own})
        found = teacher_hash(recipe.model_copy(update={"objective": objective}))
        if found != expected:
            raise StateError(
                f"objective.cache.teacher_hash is {expected}, but the teacher's is {found}; drop "
                "the hash from the recipe, or give the teacher it belongs to"
            )
    return build_teacher(recipe)
