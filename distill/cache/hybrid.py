"""Cached where a record is there, live where it is missing: a cache that may have gaps.

What is missing is decoded, run through the teacher and coded with the cache's own codec, into the
fields that its record would have. A run's result therefore does not depend on how much of the
cache is there, but for the teacher's rounding in batches of other clips.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill import log
from distill.cache.calibrate import read_codec, sample_clips
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity
from distill.cache.live import cached_teachers, calibrate, make_records, view_loader
from distill.cache.read import Cache, CachedBatches
from distill.cache.record import record_fields
from distill.cache.store import open_folder
from distill.data.index import Clip, check_videos, read_list
from distill.data.load import Quarantine, Task, View
from distill.dist import joined_part
from distill.errors import StateError
from distill.recipe import Recipe
from distill.teachers import Teacher

logger = logging.getLogger(__name__)


class LiveRecords:
    """Makes the records that a cache lacks, with its codec. `loader` decodes their views."""

    def __init__(
        self, recipe: Recipe, teachers: dict[str, Teacher], codec: Codec, quarantine: Quarantine
    ) -> None:
        self.recipe, self.teachers, self.codec = recipe, teachers, codec
        self.quarantine = quarantine
        self.loader = view_loader(recipe, quarantine)

    def __call__(self, items: Sequence[tuple[Task, View]]) -> dict[str, Tensor]:
        """Fields of records on the CPU, the batch in front, with clip_id and view int64 [B]."""
        size = self.recipe.objective.cache.batch_size
        parts = []
        for start in range(0, len(items), size):
            records = make_records(self.recipe, self.teachers, items[start : start + size])
            fields = record_fields(records, codec=self.codec)
            parts.append({name: value.cpu() for name, value in fields.items()})
        tasks = [task for task, _ in items]
        return {
            "clip_id": torch.tensor([task.clip.id for task in tasks], dtype=torch.int64),
            "view": torch.tensor([task.view for task in tasks], dtype=torch.int64),
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        }


class HybridBatches:
    """Batches as those of `CachedBatches` over a cache opened with `allow_missing`.

    `clips` are those of the cache's rows, and `live` makes what is missing; None where nothing
    is. Every batch also holds is_cached bool [B]. Views for the next batches are decoded ahead.
    Clips that cannot be decoded go to the quarantine and are left out of their batches, which
    keep their places; a batch that loses all its clips takes the next one in the order instead.
    """

    def __init__(
        self, cached: CachedBatches, clips: Sequence[Clip], live: LiveRecords | None
    ) -> None:
        self.cached, self.clips, self.live = cached, clips, live

    @property
    def steps_per_epoch(self) -> int:
        return self.cached.steps_per_epoch

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for reading and decoding, in all."""
        return self.cached.wait_seconds + (self.live.loader.wait_seconds if self.live else 0.0)

    def keeping_workers(self) -> AbstractContextManager[None]:
        """Let epochs inside the block take the workers of those before them."""
        return self.live.loader.keeping_workers() if self.live else nullcontext()

    def clip_names(self, clip_ids: Sequence[int]) -> list[str]:
        """Names, as in the list, of clips."""
        names = {clip.id: clip.name for clip in self.clips}
        return [names[clip_id] for clip_id in clip_ids]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[dict]:
        """The batches of an epoch from `first_step` on; the last one may be smaller.

        Raises StateError for a damaged record, and when too many clips cannot be decoded.
        """
        cache, size = self.cached.cache, self.cached.batch_size
        view = epoch % cache.num_views
        order = self.cached.order(epoch)
        is_missing = cache.rows[order, view] < 0
        starts = range(first_step * size, len(order), size)
        gaps = []
        for start in starts:
            places, _ = self.cached.part.share(order[start : start + size])
            lost, _ = self.cached.part.share(is_missing[start : start + size])
            gaps.append(
                [
                    (int(place), Task(self.clips[places[place]], view=view))
                    for place in np.flatnonzero(lost)
                ]
            )
        with ExitStack() as stack:
            batches = stack.enter_context(closing(self.cached.epoch(epoch, first_step)))
            items = iter(())
            if any(gaps):
                run = self.live.loader.run([task for _, task in own] for own in gaps if own)
                items = stack.enter_context(closing(run))
            for start, own, batch in zip(starts, gaps, batches, strict=True):
                batch.pop("missing", None)
                batch["is_cached"] = torch.ones(len(batch["clip_id"]), dtype=torch.bool)
                if own:
                    following = (
                        Task(self.clips[place], view=view) for place in np.roll(order, -start)
                    )
                    batch = self._fill(batch, own, next(items), following)
                yield batch

    def _fill(
        self,
        batch: dict,
        gaps: Sequence[tuple[int, Task]],
        found: Sequence[tuple[Task, View]],
        following: Iterable[Task],
    ) -> dict:
        """Put live records where they are missing, and drop the places that get none."""
        have = {task.clip.id for task, _ in found}
        places = [place for place, task in gaps if task.clip.id in have]
        size = len(batch["clip_id"])
        if not places and len(gaps) == size:
            found, places = self._next_good(following), [0]
        if found:
            at = torch.tensor(places)
            for name, value in self.live(found).items():
                if name not in batch:  # of an empty cache nobody knows the fields
                    batch[name] = torch.empty((size, *value.shape[1:]), dtype=value.dtype)
                batch[name][at] = value
            batch["is_cached"][at] = False
        lost = {place for place, _ in gaps} - set(places)
        if not lost:
            return batch
        kept = torch.tensor([place for place in range(size) if place not in lost])
        return {
            name: value[kept] if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _next_good(self, following: Iterable[Task]) -> list[tuple[Task, View]]:
        with closing(self.live.loader.run([task] for task in following)) as batches:
            for items in batches:
                if items:
                    return items
        raise StateError("none of the clips can be decoded; see the quarantine for the reasons")


def open_hybrid(
    recipe: Recipe,
    folder: Path,
    *,
    progress: Callable[..., AbstractContextManager] = log.progress,
) -> HybridBatches:
    """Open a recipe's cache, whatever is in it, and what makes the rest.

    Clips that cannot be decoded go to the quarantine of the run's `folder`. Means are measured
    first where the cache has none yet, and kept in it, so that a build goes on with the same
    ones. Without gaps neither the videos nor the teacher are looked at.
    """
    section, seed = recipe.objective.cache, recipe.run.seed
    where = open_folder(section.folder)
    identity = cache_identity(recipe)
    clips = read_list(recipe.data.train, seed=seed)
    has_means = read_codec(where, identity) is not None
    teachers = None
    if not has_means:
        check_videos(clips, recipe.data.train)
        teachers = cached_teachers(recipe)
        sample = sample_clips(clips, seed=section.seed)
        with progress(f"calibrate {where}", total=len(sample), unit="clips") as bar:
            calibrate(recipe, where, identity, sample, teachers, advance=bar.advance)
    cache = Cache.open(where, recipe, identity=identity, allow_missing=True)
    part = joined_part()
    cached = CachedBatches(cache, batch_size=recipe.optim.batch_size, seed=seed, part=part)
    by_id = {clip.id: clip for clip in clips}
    own = [by_id[clip_id] for clip_id in cache.clip_ids.tolist()]
    missing = cache.rows[:, : recipe.optim.epochs] < 0  # of the views that are read
    logger.info(
        "cache %s: %d of %d records are there; the rest is made live",
        where,
        missing.size - int(missing.sum()),
        missing.size,
    )
    if not missing.any():
        return HybridBatches(cached, own, None)
    check_videos([own[place] for place in np.flatnonzero(missing.any(axis=1))], recipe.data.train)
    quarantine = Quarantine(
        folder / part.name("quarantine.jsonl"),
        total=-(-len(own) // part.count),
        max_share=recipe.data.max_quarantined,
        clips=own,
    )
    teachers = teachers or cached_teachers(recipe)
    return HybridBatches(cached, own, LiveRecords(recipe, teachers, cache.codec, quarantine))
