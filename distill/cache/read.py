"""Reading a view cache: checked on opening, then batches of records in a shuffled order."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from distill import draw
from distill.cache.buffers import BufferPool
from distill.cache.calibrate import read_codec, with_codec
from distill.cache.codes import Codec
from distill.cache.identity import adopt_more, cache_identity, distill_section
from distill.cache.index import CacheIndex, found_identity, load_index
from distill.cache.quarantine import quarantine_files, quarantined_ids
from distill.cache.sealed import ALIGN_BYTES
from distill.cache.shards import ShardReader
from distill.cache.store import Folder, open_folder
from distill.data.index import read_list
from distill.dist import WHOLE, Part
from distill.errors import StateError
from distill.recipe import Recipe

READ_THREADS = 4
REMOTE_THREADS = 32  # each waits for a server most of the time
PREFETCH_BYTES = 256 * 2**20  # read ahead at a time, in the order in which it lies on the disk
PREFETCH_BATCHES = 16
RECORDS_A_TURN = 4  # that a thread reads before it asks for more
TORCH = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Cache:
    """An open view cache: which record holds which view of the recipe's clips.

    `clip_ids` int64 [C] are the recipe's clips in the order of its list, less those in the
    cache's quarantine; `rows` int64 [C,V] are their records' places in `index`, -1 for a record
    that is missing. `codec` decodes the records' codes; where a teacher by the name has more
    layers there than the recipe's, those are at the places `layers`.
    """

    def __init__(
        self,
        folder: Folder,
        index: CacheIndex,
        rows: np.ndarray,
        *,
        clip_ids: np.ndarray | None = None,
        codec: Codec | None = None,
        layers: dict[str, list[int]] | None = None,
    ) -> None:
        self.folder, self.index, self.rows = folder, index, rows
        self.codec, self.layers = codec, layers
        self.clip_ids = index.clip_ids[rows[:, 0]] if clip_ids is None else clip_ids

    @classmethod
    def open(
        cls,
        folder: str | Path | Folder,
        recipe: Recipe,
        *,
        identity: dict | None = None,
        allow_missing: bool = False,
    ) -> "Cache":
        """Check a cache against a recipe; reads indexes only, and no teacher's file if its hash
        is in the recipe or `identity`, the recipe's `cache_identity`, is given.

        A cache of more layers or other teachers than the recipe's will do where no record may be
        missing. Raises StateError, in one line that says what to do, for one that is damaged or
        made with other settings and, unless `allow_missing`, for one without all of its records.
        """
        folder = open_folder(folder)
        num_views = distill_section(recipe).cache.views
        identity = identity or cache_identity(recipe)
        layers = None
        try:
            codec, index = _read_index(folder, identity)
        except StateError:
            identity, layers = adopt_more(found_identity(folder) or {}, identity)
            if layers is None or allow_missing:  # what is made live has the recipe's own layers
                raise
            codec, index = _read_index(folder, identity)
            codec = codec and codec.of_teachers(recipe.objective.others)
        section = recipe.data.train
        if not len(index) and (section.list is None or not allow_missing):
            raise StateError(
                f"cache {folder}: no records there; run 'distill cache-teacher' to make them"
            )
        if section.list is None:
            clip_ids = index.known_clips()
        else:
            clips = read_list(section, seed=recipe.run.seed)
            clip_ids = np.fromiter((clip.id for clip in clips), np.int64, len(clips))
        clip_ids = clip_ids[~np.isin(clip_ids, quarantined_ids(folder))]
        if not len(clip_ids):
            raise StateError(
                f"cache {folder}: every clip of {section.list} is in {quarantine_files(folder)}, "
                "which says why; mend the videos and delete that file"
            )
        rows = _find_rows(index, clip_ids, num_views)
        missing = int((rows < 0).sum())
        if missing and not allow_missing:
            raise StateError(
                f"cache {folder}: lacks {missing} of the {rows.size} records of {len(clip_ids)} "
                f"clips in {num_views} views; run 'distill cache-teacher' to add them"
            )
        return cls(folder, index, rows, clip_ids=clip_ids, codec=codec, layers=layers)

    @property
    def num_views(self) -> int:
        return self.rows.shape[1]

    def read(self, row: int) -> tuple[dict[str, np.ndarray], dict]:
        """One record by its place in the index: its fields and what its view is."""
        arrays = {field.name: np.empty(field.shape, field.dtype) for field in self.index.fields}
        with ShardReader(self.folder) as shards:
            text = self.read_into(shards, row, [_as_bytes(array) for array in arrays.values()])
        return arrays, json.loads(bytes(text))

    def read_into(self, shards: ShardReader, row: int, parts: Sequence[memoryview]) -> bytearray:
        """Read a record's fields into memory, one part each; returns the view's JSON text."""
        index = self.index
        text = bytearray(int(index.sizes[row]) - sum(len(part) for part in parts))
        shards.read(
            index.shards[index.shard[row]],
            [*parts, memoryview(text)],
            start=int(index.starts[row]),
            xxh3=int(index.xxh3[row]),
            key=(index.clip_ids[row], index.views[row]),
        )
        return text

    def clip_names(self, clip_ids: Sequence[int]) -> list[str]:
        """Names, as in the list, of clips that the cache holds."""
        ids = np.asarray(clip_ids, np.int64)
        rows = np.max([self.index.find(ids, view) for view in range(self.index.num_views)], axis=0)
        return [self.read(int(row))[1]["name"] for row in rows]


class CachedBatches:
    """Batches of a cache's records: epoch e reads view e mod V of every clip, shuffled.

    A batch holds clip_id and view int64 [B], every field of a record with B in front, and the
    epoch; where the cache lacks records also `missing`, the places in the batch at which the
    fields hold nothing. Each part's process gets its own share of every batch of `batch_size`;
    one that no clip of a batch is left for gets the first one, and `is_spare`. Memory is bounded
    by the prefetch window, and that of a batch is used again once its tensors are gone.
    `wait_seconds` is how long the consumer has waited.
    """

    def __init__(self, cache: Cache, *, batch_size: int, seed: int, part: Part = WHOLE) -> None:
        self.cache, self.batch_size, self.seed, self.part = cache, batch_size, seed, part
        self.wait_seconds = 0.0
        self.num_threads = READ_THREADS if cache.folder.is_local else REMOTE_THREADS
        self._most = -(-batch_size // part.count)
        places, self._buffer_bytes = {}, 0
        for field in cache.index.fields:
            places[field.name] = self._buffer_bytes
            size = self._most * field.size_bytes
            self._buffer_bytes += size + -size % ALIGN_BYTES
        self._places = places  # of fields in a batch's memory
        self.window = min(max(PREFETCH_BYTES // max(self._buffer_bytes, 1), 1), PREFETCH_BATCHES)
        self._buffers = BufferPool(self._buffer_bytes, keep=2 * self.window + 2)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.cache.clip_ids) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Places int64 [C] of the clips, in the order in which all ranks together read them.

        Any of the C! orders, by (seed, epoch) alone; that of live batches.
        """
        count = len(self.cache.clip_ids)
        return draw.generator("shuffle", self.seed, epoch).permutation(count)

    def keeping_workers(self) -> AbstractContextManager[None]:
        """There are none: its threads end with an epoch."""
        return nullcontext()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[dict]:
        """The batches of an epoch from `first_step` on; the last one may be smaller.

        Raises StateError for a damaged record, naming its shard.
        """
        order = self.order(epoch)
        view = epoch % self.cache.num_views
        shares = [
            self.part.share(order[start : start + self.batch_size])
            for start in range(first_step * self.batch_size, len(order), self.batch_size)
        ]
        windows = [
            [places for places, _ in shares[start : start + self.window]]
            for start in range(0, len(shares), self.window)
        ]
        with (
            ShardReader(self.cache.folder) as shards,
            ThreadPoolExecutor(self.num_threads, thread_name_prefix="cache-reader") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="cache-window") as ahead,
        ):

            def submit(window: list[np.ndarray]):
                return ahead.submit(self._read_window, window, view, shards=shards, pool=pool)

            is_spare = (spare for _, spare in shares)
            coming = [submit(window) for window in windows[:1]]
            for number in range(1, len(windows) + 1):
                start = time.perf_counter()
                ready = coming.pop().result()  # raises whatever went wrong in a thread
                self.wait_seconds += time.perf_counter() - start
                coming += [submit(window) for window in windows[number : number + 1]]
                while ready:
                    batch = {**ready.pop(0), "epoch": epoch}
                    yield {**batch, "is_spare": True} if next(is_spare) else batch

    def _read_window(
        self,
        window: list[np.ndarray],
        view: int,
        *,
        shards: ShardReader,
        pool: ThreadPoolExecutor,
    ) -> list[dict]:
        index = self.cache.index
        batches = [self._allocate(places, view) for places in window]
        sizes = [field.size_bytes for field in index.fields]
        memory = [
            [_as_bytes(batch[field.name].numpy()) for field in index.fields] for batch in batches
        ]
        owner = np.repeat(np.arange(len(window)), [len(places) for places in window])
        within = np.concatenate([np.arange(len(places)) for places in window])
        rows = self.cache.rows[np.concatenate(window), view]
        for batch, places in zip(batches, window, strict=True):
            missing = np.flatnonzero(self.cache.rows[places, view] < 0)
            if len(missing):
                batch["missing"] = missing.tolist()
        there = np.flatnonzero(rows >= 0)
        found = rows[there]
        there = there[np.lexsort((index.starts[found], index.shard[found]))]

        def read(some: np.ndarray) -> None:
            for place in some:
                at = int(within[place])
                parts = [
                    part[at * size : (at + 1) * size]
                    for part, size in zip(memory[owner[place]], sizes, strict=True)
                ]
                self.cache.read_into(shards, int(rows[place]), parts)

        turns = range(0, len(there), RECORDS_A_TURN)
        for done in [pool.submit(read, there[at : at + RECORDS_A_TURN]) for at in turns]:
            done.result()
        return batches

    def _allocate(self, places: np.ndarray, view: int) -> dict:
        index, is_pinned = self.cache.index, torch.cuda.is_available()
        batch = {
            "clip_id": torch.from_numpy(self.cache.clip_ids[places]),
            "view": torch.full((len(places),), view),
        }
        memory = None if is_pinned else self._buffers.take()
        for field in index.fields:
            shape = (len(places), *field.shape)
            if is_pinned:  # torch keeps pinned memory of its own for the next batch
                batch[field.name] = torch.empty(shape, dtype=TORCH[field.dtype], pin_memory=True)
            else:
                start = self._places[field.name]
                part = memory[start : start + len(places) * field.size_bytes]
                batch[field.name] = torch.from_numpy(part.view(field.dtype).reshape(shape))
        return batch


def _as_bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _read_index(folder: Folder, identity: dict) -> tuple[Codec | None, CacheIndex]:
    codec = read_codec(folder, identity)
    return codec, load_index(folder, with_codec(identity, codec))


def _find_rows(index: CacheIndex, clip_ids: np.ndarray, num_views: int) -> np.ndarray:
    """Places int64 [C,V] of the clips' records in the index, -1 for one that is not there."""
    order = np.argsort(clip_ids, kind="stable")  # sorted ids are found several times as fast
    rows = np.empty((len(clip_ids), num_views), np.int64)
    for view in range(num_views):
        rows[order, view] = index.find(clip_ids[order], view)
    return rows
