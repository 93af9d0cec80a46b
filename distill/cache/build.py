"""Building a view cache: the teacher looks once at every view of every clip.

What is committed is never done again: a build subtracts the records that are there and makes the
rest, in batches whose clips are the same whatever was done before and however many processes
share the work. Workers decode ahead of the teacher, and a thread writes behind it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill import log
from distill.cache.calibrate import read_codec, sample_clips, with_codec
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity, distill_section
from distill.cache.index import load_index
from distill.cache.live import cached_teachers, calibrate, make_records, view_loader
from distill.cache.quarantine import open_quarantine, quarantine_files, quarantined_ids
from distill.cache.record import record_fields
from distill.cache.store import Folder, open_folder, remove_leftovers, temporary_name
from distill.cache.writer import RecordWriter
from distill.data.index import Clip, check_videos, read_list
from distill.data.load import Quarantine, Task
from distill.dist import WHOLE, Part
from distill.engines.plain import pick_device
from distill.kernel_choice import using_kernels
from distill.recipe import Recipe
from distill.teachers import Teacher

MEGABYTE = 2**20
MEANS_WAIT_SECONDS = 120.0  # for another process to measure them, which may be gone
MEANS_POLL_SECONDS = 1.0
SHOWN_CLIPS = 3  # of those that cannot be decoded; the rest are counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """What a build has done. Clips are the list's (or the first `limit` of them)."""

    folder: Folder
    num_clips: int
    num_views: int
    part: Part
    total: int  # records that are this part's to make, quarantined clips included
    present: int  # of these, records that were there before
    written: int
    size_bytes: int  # of what was written
    seconds: float
    in_cache: int  # records of the clips that are there in the end, whoever made them
    unreadable: dict[str, str]  # clips that cannot be decoded, of all builds: name and reason

    @property
    def quarantined(self) -> int:
        """How many of the clips cannot be decoded."""
        return len(self.unreadable)

    def lines(self) -> list[str]:
        """The report for the console."""
        where = f"cache {self.folder}"
        made = f"{self.written} new in {self.seconds:.0f} s"
        if self.written and self.seconds:
            made += f" ({self.written / self.seconds:.2f} views/s)"
        made += f", {log.size_text(self.size_bytes)}"
        whole = self.num_clips * self.num_views
        listed = f"({self.num_clips} clips, {self.num_views} views)"
        text = [f"{where}: {self.in_cache} of {whole} records {listed}: {made}"]
        if self.part.count > 1:
            done = self.present + self.written
            text.append(f"{where}: {self.part} has {done} of its {self.total} records")
        if self.quarantined:
            shown = list(self.unreadable.items())[:SHOWN_CLIPS]
            text.append(
                f"{where}: {self.quarantined} clips could not be decoded and are left out; "
                f"{quarantine_files(self.folder)} says why:"
            )
            text += [f"  {name}: {reason}" for name, reason in shown]
            if self.quarantined > len(shown):
                text.append(f"  and {self.quarantined - len(shown)} more")
        return text


def build_cache(
    recipe: Recipe,
    *,
    folder: str | Path | Folder | None = None,
    limit: int | None = None,
    part: Part = WHOLE,
    progress: Callable[..., AbstractContextManager] = log.progress,
    identity: dict | None = None,
) -> BuildReport:
    """Make the records that a recipe's cache lacks; nothing, not even the teacher, if none.

    `limit` takes the first clips of the list only, and `part` a share of their batches: the
    parts together make the whole, at once or one after the other, and records are the same in
    any division. `identity` is the recipe's `cache_identity` where it is known, which spares
    hashing a teacher's file again. Records are committed shard by shard, so a kill at any time
    loses at most the open one. Clips that cannot be decoded go to the folder's quarantine.
    Raises StateError for a folder that holds another recipe's cache or cannot be written, and
    when too many clips fail, InputError for what is wrong with the recipe's inputs.
    """
    started = time.monotonic()
    section = distill_section(recipe)
    folder = open_folder(folder or section.cache.folder)
    identity = identity or cache_identity(recipe)
    listed = read_list(recipe.data.train, seed=recipe.run.seed)
    clips = listed[:limit]
    remove_leftovers(folder)
    codec = read_codec(folder, identity)
    clip_ids = np.array([clip.id for clip in clips], np.int64)
    is_there = _is_there(folder, with_codec(identity, codec), clip_ids, section.cache.views)
    wanted = ~is_there & ~np.isin(clip_ids, quarantined_ids(folder))  # [V,C]
    part_of = np.arange(len(clips)) // section.cache.batch_size % part.count  # [C]
    is_own = part_of == part.index
    own, present = wanted & is_own, int((is_there & is_own).sum())
    total = int(is_own.sum()) * section.cache.views
    written = size_bytes = 0
    if own.any():
        check_writable(folder)  # rather than after the means were measured
        # A wrong folder would fill the quarantine.
        check_videos([clips[i] for i in np.flatnonzero(wanted.any(axis=0))], recipe.data.train)
        with using_kernels([recipe], pick_device()):
            teachers = cached_teachers(recipe)
            if codec is None:
                first = int(part_of[wanted.any(axis=0)][0])  # it has work, so it loads a teacher
                codec = _await_means(folder, identity, Part(first, part.count), own=part)
            if codec is None:
                sample = sample_clips(listed, seed=section.cache.seed)
                with progress(f"calibrate {folder}", total=len(sample), unit="clips") as bar:
                    codec = calibrate(
                        recipe, folder, identity, sample, teachers, advance=bar.advance
                    )
            title = f"cache {folder}" + (f", {part}" if part.count > 1 else "")
            done, identity = total - int(own.sum()), with_codec(identity, codec)
            with (
                progress(title, total=total, unit="views", done=done) as bar,
                closing(_write(recipe, folder, identity, clips, own, teachers, codec)) as batches,
            ):
                for count, size_bytes, waited in batches:
                    written += count
                    size = log.size_text(size_bytes)
                    bar.note(f"{size}, {waited:.0%} of the time waiting for videos")
                    bar.advance(count)
        is_there = _is_there(folder, identity, clip_ids, section.cache.views)
    quarantine = _quarantine(recipe, folder, clips)
    quarantine.check()  # with what other parts have found
    own_ids = set(clip_ids.tolist())
    return BuildReport(
        folder=folder,
        num_clips=len(clips),
        num_views=section.cache.views,
        part=part,
        total=total,
        present=present,
        written=written,
        size_bytes=size_bytes,
        seconds=max(time.monotonic() - started, 0.0),
        in_cache=int(is_there.sum()),
        unreadable={
            entry["name"]: entry["reason"] for entry in quarantine.entries if entry["id"] in own_ids
        },
    )


def check_writable(folder: Folder) -> None:
    """Raise StateError now for what would stop a build at its first shard."""
    name = temporary_name()
    folder.write(name, b"nothing yet")
    folder.delete(name)


def _is_there(folder: Folder, identity: dict, clip_ids: np.ndarray, num_views: int) -> np.ndarray:
    """Which records of the clips a cache holds: bool [V,C]."""
    index = load_index(folder, identity)
    return np.stack([index.find(clip_ids, view) >= 0 for view in range(num_views)])


def _await_means(folder: Folder, identity: dict, measurer: Part, *, own: Part) -> Codec | None:
    """The codec of the means that another part measures, None where that is ours to do.

    So it is, too, where they do not come in time: the other part may not have been started yet.
    """
    if measurer == own:
        return None
    logger.info(
        "cache %s: %s measures the means of its codes; waiting for %.0f minutes at most",
        folder,
        measurer,
        MEANS_WAIT_SECONDS / 60,
    )
    until = time.monotonic() + MEANS_WAIT_SECONDS
    while time.monotonic() < until:
        codec = read_codec(folder, identity)
        if codec is not None:
            return codec
        time.sleep(MEANS_POLL_SECONDS)
    logger.info("cache %s: %s has not brought the means; measuring them here", folder, measurer)
    return None


def _write(
    recipe: Recipe,
    folder: Folder,
    identity: dict,
    clips: list[Clip],
    wanted: np.ndarray,
    teachers: dict[str, Teacher],
    codec: Codec,
) -> Iterator[tuple[int, int, float]]:
    """Make the wanted records [V,C].

    Yields how many a batch added, all bytes so far and the share of the time that was spent
    waiting for videos.
    """
    cache = recipe.objective.cache
    loader = view_loader(recipe, _quarantine(recipe, folder, clips))
    started = time.monotonic()
    with (
        RecordWriter(
            folder,
            identity=identity,
            clip_ids=np.array([clips[i].id for i in np.flatnonzero(wanted.any(axis=0))], np.int64),
            shard_bytes=cache.shard_mb * MEGABYTE,
            shard_seconds=60 * cache.shard_minutes,
        ) as writer,
        closing(loader.run(fixed_batches(clips, wanted, size=cache.batch_size))) as batches,
    ):
        for items in batches:
            if items:
                writer.put(items, record_fields(make_records(recipe, teachers, items), codec=codec))
            elapsed = max(time.monotonic() - started, 1e-9)
            yield len(items), writer.record_bytes, min(loader.wait_seconds / elapsed, 1.0)
    yield 0, writer.committed_bytes, min(loader.wait_seconds / elapsed, 1.0)


def _quarantine(recipe: Recipe, folder: Folder, clips: list[Clip]) -> Quarantine:
    return open_quarantine(folder, clips=clips, max_share=recipe.data.max_quarantined)


def fixed_batches(clips: list[Clip], wanted: np.ndarray, *, size: int) -> Iterator[list[Task]]:
    """Tasks view by view, cut at fixed places of the list, without what is there already.

    A teacher's rounding depends on the batch, so fixed batches make a resumed cache equal to an
    uninterrupted one.
    """
    for view, row in enumerate(wanted):
        for start in range(0, len(clips), size):
            places = np.flatnonzero(row[start : start + size]) + start
            if len(places):
                yield [Task(clips[place], view=view) for place in places]
