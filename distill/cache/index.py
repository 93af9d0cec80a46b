"""Which records a cache holds: flat arrays put together from its shards' own indexes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.cache.identity import require_identity
from distill.cache.shards import Field, read_shard_index, shard_paths
from distill.errors import StateError


@dataclass(frozen=True)
class CacheIndex:
    """R records sorted by view, then clip id; a few dozen bytes for each, whatever its size."""

    shards: tuple[Path, ...]
    fields: tuple[Field, ...]  # of a record; empty in an empty cache
    clip_ids: np.ndarray  # int64 [R]
    views: np.ndarray  # int64 [R]
    shard: np.ndarray  # int32 [R], into `shards`
    starts: np.ndarray  # int64 [R], bytes
    sizes: np.ndarray  # int64 [R], bytes
    xxh3: np.ndarray  # uint64 [R]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def find(self, clip_ids: np.ndarray, view: int) -> np.ndarray:
        """Rows int64 of clips in one view; -1 where there is no record."""
        first, last = np.searchsorted(self.views, [view, view + 1])
        known = self.clip_ids[first:last]
        place = np.searchsorted(known, clip_ids)
        place = np.minimum(place, max(len(known) - 1, 0))
        if not len(known):
            return np.full(len(clip_ids), -1)
        return np.where(known[place] == clip_ids, first + place, -1)


def load_index(folder: Path, identity: dict) -> CacheIndex:
    """Read the index of every shard of a cache; of records that are there twice the first wins.

    Raises StateError for a damaged shard and for one whose identity is not the given one.
    """
    paths = shard_paths(folder)
    columns, fields = [], ()
    for number, path in enumerate(paths):
        shard = read_shard_index(path)
        require_identity(shard.identity, identity, where=f"cache {folder}")
        fields = fields or shard.fields
        if shard.fields != fields:
            raise StateError(
                f"{path}: its records are laid out otherwise than those of {paths[0].name}; "
                "delete the one that is wrong and run 'distill cache-teacher' again"
            )
        owner = np.full(len(shard.views), number, np.int32)
        columns.append((shard.clip_ids, shard.views, owner, shard.starts, shard.sizes, shard.xxh3))
    dtypes = (np.int64, np.int64, np.int32, np.int64, np.int64, np.uint64)
    joined = [
        np.concatenate([np.empty(0, dtype), *(column[i] for column in columns)])
        for i, dtype in enumerate(dtypes)
    ]
    order = np.lexsort((joined[0], joined[1]))  # stable, so the first shard's come first
    joined = [column[order] for column in joined]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(joined[0]) != 0) | (np.diff(joined[1]) != 0)
    return CacheIndex(tuple(paths), fields, *(column[is_new] for column in joined))
