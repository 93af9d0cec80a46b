"""Which records a cache holds: flat arrays put together from its shards' own indexes.

They are kept in a manifest, so that opening a cache need not read every shard. It is no more than
a copy: without it, or where it is damaged or speaks of shards that are gone, the shards are read
again, and those that it does not know yet are added. Whoever may write there brings it up to date.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from distill.cache.identity import require_identity
from distill.cache.sealed import canonical, read_sealed, sealed_header
from distill.cache.shards import (
    Field,
    ShardIndex,
    parse_metadata,
    read_shard_index,
    shard_metadata,
    shard_sizes,
)
from distill.cache.store import Folder, reported, temporary_name
from distill.errors import StateError

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.safetensors"
COLUMNS = {
    "clip_ids": np.int64,
    "starts": np.int64,
    "xxh3": np.uint64,
    "shard": np.int32,
    "sizes": np.uint32,
    "views": np.int16,
}
INDEX_THREADS = 16  # shards' indexes read at a time

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class CacheIndex:
    """R records sorted by view, then clip id; 34 bytes for each.

    From a manifest of a local folder the arrays are views of the file, read only.
    """

    shards: tuple[str, ...]  # names of files in the cache's folder
    fields: tuple[Field, ...]  # of a record; empty in an empty cache
    clip_ids: np.ndarray  # int64 [R]
    views: np.ndarray  # int16 [R]
    shard: np.ndarray  # int32 [R], into `shards`
    starts: np.ndarray  # int64 [R], bytes
    sizes: np.ndarray  # uint32 [R], bytes
    xxh3: np.ndarray  # uint64 [R]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def known_clips(self) -> np.ndarray:
        """Ids int64 of all clips, sorted."""
        known = np.empty(0, np.int64)
        for view in range(self.num_views):
            clip_ids = self.clip_ids[self._ends(view) : self._ends(view + 1)]
            if not np.array_equal(known, clip_ids):
                known = np.union1d(known, clip_ids) if len(known) else clip_ids
        return known

    @property
    def num_views(self) -> int:
        """One more than the last view that any clip has."""
        return int(self.views[-1]) + 1 if len(self) else 0

    def find(self, clip_ids: np.ndarray, view: int) -> np.ndarray:
        """Rows int64 of clips in one view; -1 where there is no record. Fastest for sorted ids."""
        if not 0 <= view < self.num_views:
            return np.full(len(clip_ids), -1)
        first, last = self._ends(view), self._ends(view + 1)
        known = self.clip_ids[first:last]
        if np.array_equal(known, clip_ids):
            return np.arange(first, last)
        if not len(known):
            return np.full(len(clip_ids), -1)
        place = np.minimum(np.searchsorted(known, clip_ids), len(known) - 1)
        return np.where(known[place] == clip_ids, first + place, -1)

    def _ends(self, view: int) -> int:
        """How many records are of earlier views."""
        # Of the column's own type, or all of the column would be converted.
        return int(np.searchsorted(self.views, self.views.dtype.type(view)))


@dataclass(frozen=True)
class _Part:
    """Records of some shards: what a manifest holds."""

    sizes: dict[str, int]  # bytes of each shard, by name; `columns["shard"]` counts in this order
    fields: tuple[Field, ...]
    identity: dict
    columns: Columns


def load_index(folder: Folder, identity: dict) -> CacheIndex:
    """Which records a cache holds; of those that are there twice one counts.

    Raises StateError for a damaged shard and for one whose identity is not the given one.
    """
    sizes = shard_sizes(folder)
    manifest = _read_manifest(folder)
    is_of_some = manifest is not None and manifest.sizes.items() <= sizes.items()
    parts = [manifest] if is_of_some else []
    known = manifest.sizes if is_of_some else {}
    names = [name for name in sizes if name not in known]
    with ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="shard-index") as pool:
        shards = pool.map(lambda n: read_shard_index(folder, n, size_bytes=sizes[n]), names)
        parts += [_part_of(shard, sizes[shard.name]) for shard in shards]
    for part in parts:
        require_identity(part.identity, identity, where=f"cache {folder}")
        if part.fields != parts[0].fields:
            raise StateError(
                f"{folder.at(next(iter(part.sizes)))}: its records are laid out otherwise than "
                f"those of {next(iter(parts[0].sizes))}; delete the one that is wrong and run "
                f"'{folder.made_by}' again"
            )
    fields = parts[0].fields if parts else ()
    columns = _merged(parts, list(sizes)) if names or not is_of_some else manifest.columns
    if names:
        # Every reader does without it, so that a full or read-only disk is no error.
        with contextlib.suppress(StateError):
            _write_manifest(folder, _Part(sizes, fields, identity, columns))
    return CacheIndex(tuple(sizes), fields, **columns)


def found_identity(folder: Folder) -> dict | None:
    """The identity of a cache's first shard, None without any; it speaks for no other shard."""
    name = next(iter(shard_sizes(folder)), None)
    return None if name is None else read_shard_index(folder, name).identity


def _part_of(shard: ShardIndex, size_bytes: int) -> _Part:
    columns = {
        "clip_ids": shard.clip_ids,
        "starts": shard.starts,
        "xxh3": shard.xxh3,
        "shard": np.zeros(len(shard.views), np.int32),
        "sizes": shard.sizes.astype(np.uint32),
        "views": shard.views.astype(np.int16),
    }
    return _Part({shard.name: size_bytes}, shard.fields, shard.identity, columns)


def _merged(parts: Sequence[_Part], names: Sequence[str]) -> Columns:
    """All parts' records, sorted and each once: the one of the first shard by name."""
    places = {name: place for place, name in enumerate(names)}
    renamed = [
        np.array([places[name] for name in part.sizes], np.int32)[part.columns["shard"]]
        for part in parts
    ]
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(part.columns[name] for part in parts)])
        for name, dtype in COLUMNS.items()
        if name != "shard"
    }
    columns["shard"] = np.concatenate([np.empty(0, np.int32), *renamed])
    order = np.lexsort([columns[name] for name in ("shard", "clip_ids", "views")])
    same = np.zeros(len(order), bool)
    for name in ("clip_ids", "views"):
        columns[name] = columns[name][order]
    np.logical_and(
        *(columns[name][1:] == columns[name][:-1] for name in ("clip_ids", "views")), out=same[1:]
    )
    for name in ("clip_ids", "views"):
        columns[name] = columns[name][~same]
    order = order[~same]
    for name in ("starts", "xxh3", "shard", "sizes"):
        columns[name] = columns[name][order]
    return {name: columns[name] for name in COLUMNS}


def _read_manifest(folder: Folder) -> _Part | None:
    """The manifest, if there is one and it is whole."""
    size = folder.sizes(MANIFEST_FILE).get(MANIFEST_FILE, 0)
    if not size:
        return None
    try:
        content = folder.map(MANIFEST_FILE)
        metadata, columns, _ = read_sealed(
            lambda first, count: content[first : first + count], len(content)
        )
        fields, identity = parse_metadata(metadata)
        return _Part(json.loads(metadata["shards"]), fields, identity, columns)
    except (ValueError, KeyError, TypeError) as error:
        where = folder.at(MANIFEST_FILE)
        logger.warning("%s: damaged (%s); made anew from the shards", where, error)
    except StateError:  # replaced or deleted since it was listed
        pass
    return None


def _write_manifest(folder: Folder, part: _Part) -> None:
    metadata = {**shard_metadata(part.fields, part.identity), "shards": canonical(part.sizes)}
    path = folder.scratch() / temporary_name()
    try:
        with reported(str(path), "written"), path.open("xb") as file:
            file.write(sealed_header(metadata, part.columns))
            for column in part.columns.values():
                file.write(column.data)
        folder.commit(path, MANIFEST_FILE)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
