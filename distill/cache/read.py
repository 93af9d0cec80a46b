"""Reading a view cache: checked on opening, then batches of records in a shuffled order."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from distill import draw
from distill.cache.calibrate import read_codec, with_codec
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity, distill_section
from distill.cache.index import CacheIndex, load_index
from distill.cache.shards import ShardReader
from distill.data.index import read_list
from distill.data.load import Quarantine
from distill.errors import StateError
from distill.recipe import Recipe

QUARANTINE_FILE = "quarantine.jsonl"
READ_THREADS = 4
PREFETCH_BYTES = 256 * 2**20  # read ahead at a time, in the order in which it lies on the disk
PREFETCH_BATCHES = 16
TORCH = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Cache:
    """An open view cache: which record holds which view of the recipe's clips.

    `rows` int64 [C,V] are places in `index`, with the clips in the order of the recipe's list;
    clips in the cache's quarantine are left out. `codec` decodes the records' codes.
    """

    def __init__(
        self, folder: Path, index: CacheIndex, rows: np.ndarray, *, codec: Codec | None = None
    ) -> None:
        self.folder, self.index, self.rows, self.codec = folder, index, rows, codec

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe, *, identity: dict | None = None) -> "Cache":
        """Check a cache against a recipe; reads indexes only, and no teacher's file if its hash
        is in the recipe or `identity`, the recipe's `cache_identity`, is given.

        Raises StateError, in one line that says what to do, for a cache that is missing,
        damaged, incomplete or made with other settings.
        """
        folder = Path(folder)
        num_views = distill_section(recipe).cache.views
        identity = identity or cache_identity(recipe)
        codec = read_codec(folder, identity)
        index = load_index(folder, with_codec(identity, codec))
        if not len(index):
            raise StateError(
                f"cache {folder}: no records there; run 'distill cache-teacher' to make them"
            )
        section = recipe.data.train
        if section.list is None:
            clip_ids = np.unique(index.clip_ids)
        else:
            clips = read_list(section, seed=recipe.run.seed)
            clip_ids = np.array([clip.id for clip in clips], np.int64)
        clip_ids = clip_ids[~np.isin(clip_ids, quarantined_ids(folder))]
        if not len(clip_ids):
            raise StateError(
                f"cache {folder}: every clip of {section.list} is in its {QUARANTINE_FILE}, which "
                "says why; mend the videos and delete that file"
            )
        rows = np.stack([index.find(clip_ids, view) for view in range(num_views)], axis=1)
        missing = int((rows < 0).sum())
        if missing:
            raise StateError(
                f"cache {folder}: lacks {missing} of the {rows.size} records of {len(clip_ids)} "
                f"clips in {num_views} views; run 'distill cache-teacher' to add them"
            )
        return cls(folder, index, rows, codec=codec)

    @property
    def num_views(self) -> int:
        return self.rows.shape[1]

    def read(self, row: int) -> tuple[dict[str, np.ndarray], dict]:
        """One record by its place in the index: its fields and what its view is."""
        arrays = {field.name: np.empty(field.shape, field.dtype) for field in self.index.fields}
        with ShardReader(self.index.shards[self.index.shard[row]]) as shard:
            text = self.read_into(shard, row, arrays)
        return arrays, json.loads(bytes(text))

    def read_into(self, shard: ShardReader, row: int, arrays: dict[str, np.ndarray]) -> bytearray:
        """Read a record into contiguous arrays, one a field; returns the view's JSON text."""
        index = self.index
        parts = [arrays[field.name].reshape(-1).view(np.uint8) for field in index.fields]
        text = bytearray(int(index.sizes[row]) - sum(len(part) for part in parts))
        shard.read(
            [*parts, text],
            start=int(index.starts[row]),
            xxh3=int(index.xxh3[row]),
            record=f"the record of clip {index.clip_ids[row]} in view {index.views[row]}",
        )
        return text

    def clip_names(self, clip_ids: Sequence[int]) -> list[str]:
        """Names, as in the list, of clips that the cache holds."""
        rows = self.index.find(np.asarray(clip_ids, np.int64), 0)
        return [self.read(int(row))[1]["name"] for row in rows]


def quarantined_ids(folder: Path) -> np.ndarray:
    """Ids int64 of the clips that the build of a cache could not decode."""
    entries = Quarantine(folder / QUARANTINE_FILE, total=1, max_share=1.0).entries
    return np.array([entry["id"] for entry in entries], np.int64)


class CachedBatches:
    """Batches of a cache's records: epoch e reads view e mod V of every clip, shuffled.

    The order is that of live batches, a function of (seed, epoch) and the list. A batch holds
    clip_id and view int64 [B], every field of a record with B in front, and the epoch. Memory
    is bounded by the prefetch window. `wait_seconds` is how long the consumer has waited.
    """

    def __init__(self, cache: Cache, *, batch_size: int, seed: int) -> None:
        self.cache, self.batch_size, self.seed = cache, batch_size, seed
        self.wait_seconds = 0.0
        batch_bytes = batch_size * int(cache.index.sizes[cache.rows[0, 0]])
        self.window = min(max(PREFETCH_BYTES // batch_bytes, 1), PREFETCH_BATCHES)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.cache.rows) // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[dict]:
        """The batches of an epoch from `first_step` on; the last one may be smaller.

        Raises StateError for a damaged record, naming its shard.
        """
        rows = self.cache.rows[:, epoch % self.cache.num_views]
        order = draw.generator("shuffle", self.seed, epoch).permutation(len(rows))
        starts = range(first_step * self.batch_size, len(rows), self.batch_size)
        batches = [rows[order[start : start + self.batch_size]] for start in starts]
        windows = [
            batches[start : start + self.window] for start in range(0, len(batches), self.window)
        ]
        with (
            ThreadPoolExecutor(READ_THREADS, thread_name_prefix="cache-reader") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="cache-window") as ahead,
        ):
            coming = [ahead.submit(self._read_window, window, pool) for window in windows[:1]]
            for number in range(1, len(windows) + 1):
                start = time.perf_counter()
                ready = coming.pop().result()  # raises whatever went wrong in a thread
                self.wait_seconds += time.perf_counter() - start
                for window in windows[number : number + 1]:
                    coming.append(ahead.submit(self._read_window, window, pool))
                while ready:
                    yield {**ready.pop(0), "epoch": epoch}

    def _read_window(self, window: list[np.ndarray], pool: ThreadPoolExecutor) -> list[dict]:
        index = self.cache.index
        batches = [self._allocate(rows) for rows in window]
        places = [
            (int(row), batch, place)
            for rows, batch in zip(window, batches, strict=True)
            for place, row in enumerate(rows)
        ]
        places.sort(key=lambda item: (index.shard[item[0]], index.starts[item[0]]))
        share = -(-len(places) // READ_THREADS)
        parts = [places[start : start + share] for start in range(0, len(places), share)]
        for done in [pool.submit(self._read_places, part) for part in parts]:
            done.result()
        return batches

    def _allocate(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        index = self.cache.index
        batch = {
            "clip_id": torch.from_numpy(index.clip_ids[rows]),
            "view": torch.from_numpy(index.views[rows]),
        }
        for field in index.fields:
            batch[field.name] = torch.empty(
                (len(rows), *field.shape),
                dtype=TORCH[field.dtype],
                pin_memory=torch.cuda.is_available(),
            )
        return batch

    def _read_places(self, places: list[tuple[int, dict, int]]) -> None:
        index = self.cache.index
        begin = 0
        while begin < len(places):
            number = index.shard[places[begin][0]]
            end = begin
            with ShardReader(index.shards[number]) as shard:
                while end < len(places) and index.shard[places[end][0]] == number:
                    row, batch, place = places[end]
                    arrays = {
                        field.name: batch[field.name][place].numpy() for field in index.fields
                    }
                    self.cache.read_into(shard, row, arrays)
                    end += 1
            begin = end
