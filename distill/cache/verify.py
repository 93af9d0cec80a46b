"""Is a cache sound? Every record is read and compared with its checksum."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from distill import log
from distill.cache.calibrate import read_codec, with_codec
from distill.cache.identity import MEANS, adopt_more, cache_identity, require_identity
from distill.cache.index import MANIFEST_FILE, load_index
from distill.cache.quarantine import quarantined_ids
from distill.cache.shards import ShardIndex, read_shard_index, shard_sizes
from distill.cache.store import Folder, open_folder
from distill.data.index import read_list
from distill.errors import StateError
from distill.recipe import Recipe

THREADS = 4
REMOTE_THREADS = 32  # each waits for a server most of the time
READ_BYTES = 32 * 2**20  # at a time, of whole records


@dataclass
class VerifyReport:
    """What `verify_cache` finds. Every problem is a line; without any, the cache is sound."""

    folder: str
    num_shards: int = 0
    num_records: int = 0
    size_bytes: int = 0
    num_twice: int = 0  # records that are there more than once, which is waste and no harm
    problems: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # names of files that can be made anew
    deleted: list[str] = field(default_factory=list)
    missing: int | None = None  # of the records that a recipe asks for; None without one

    def lines(self) -> Iterator[str]:
        """The report for a console, problems apart."""
        yield (
            f"cache {self.folder}: {self.num_records} records in {self.num_shards} shards, "
            f"{log.size_text(self.size_bytes)}, read and compared with their checksums"
        )
        if self.num_twice:
            yield f"cache {self.folder}: {self.num_twice} records are there twice; one counts"
        if self.missing == 0 and not self.problems:
            yield f"cache {self.folder}: complete, with the recipe's settings"
        if self.deleted:
            yield (
                f"cache {self.folder}: deleted {', '.join(self.deleted)}; run 'distill "
                "cache-teacher' to make what was in them anew"
            )


def verify_cache(
    folder: str | Path | Folder,
    *,
    recipe: Recipe | None = None,
    delete_damaged: bool = False,
    progress: Callable[..., AbstractContextManager] = log.progress,
) -> VerifyReport:
    """Read all of a cache and compare it with its checksums; with a recipe, with that too.

    Damaged shards and a manifest that says something else than they do can be deleted, as they
    can be made again. Raises StateError for a folder that is empty or cannot be read.
    """
    folder = open_folder(folder)
    sizes = shard_sizes(folder)
    if not sizes:
        raise StateError(f"cache {folder}: no shards there; is that the cache's folder?")
    report = VerifyReport(str(folder), num_shards=len(sizes), size_bytes=sum(sizes.values()))
    threads = THREADS if folder.is_local else REMOTE_THREADS
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        shards = _read_indexes(folder, sizes, report, pool=pool)
        report.num_records = sum(len(shard.clip_ids) for shard in shards)
        with progress(f"verify {folder}", total=report.num_records, unit="records") as bar:
            _check_records(folder, shards, report, pool=pool, advance=bar.advance)
    sound = [shard for shard in shards if shard.name not in report.damaged]
    expected = None if recipe is None else cache_identity(recipe)
    identity = _check_identities(folder, shards, expected, report)
    if identity is not None and len(shards) == len(sizes):
        _check_manifest(folder, shards, identity, report)
    if recipe is not None:
        _check_complete(folder, sound, recipe, report)
    if delete_damaged:
        for name in report.damaged:
            folder.delete(name)
            report.deleted.append(name)
    return report


def _read_indexes(
    folder: Folder, sizes: dict[str, int], report: VerifyReport, *, pool: ThreadPoolExecutor
) -> list[ShardIndex]:
    def read(name: str) -> ShardIndex | StateError:
        try:
            return read_shard_index(folder, name, size_bytes=sizes[name])
        except StateError as error:
            return error

    found = []
    for name, shard in zip(sizes, pool.map(read, sizes), strict=True):
        if isinstance(shard, StateError):
            report.problems.append(str(shard))
            # Else the store could not give it, which may pass.
            if isinstance(shard.__cause__, (ValueError, KeyError, TypeError)):
                report.damaged.append(name)
        else:
            found.append(shard)
    return found


def _check_records(
    folder: Folder,
    shards: Sequence[ShardIndex],
    report: VerifyReport,
    *,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> None:
    """Compare all records with their checksums; one line for each shard that has bad ones."""
    waiting: deque[tuple[ShardIndex, int, Future]] = deque()
    bad: dict[str, list[int]] = {}
    unread: dict[str, StateError] = {}

    def take() -> None:
        shard, count, done = waiting.popleft()
        try:
            bad.setdefault(shard.name, []).extend(done.result())
        except StateError as error:
            unread.setdefault(shard.name, error)
        advance(count)

    for shard in shards:
        for first, last in _runs(shard):
            waiting.append(
                (shard, last - first, pool.submit(_bad_records, folder, shard, first, last))
            )
            if len(waiting) > 2 * REMOTE_THREADS:
                take()
    while waiting:
        take()
    for shard in shards:
        places = bad.get(shard.name)
        if places:
            report.damaged.append(shard.name)
            report.problems.append(
                f"{folder.at(shard.name)}: {len(places)} of {len(shard.clip_ids)} records are "
                f"damaged, the first that of clip {shard.clip_ids[places[0]]} in view "
                f"{shard.views[places[0]]} (its checksum differs); delete the shard and run "
                "'distill cache-teacher' again to make its records anew"
            )
        if shard.name in unread:
            report.problems.append(str(unread[shard.name]))


def _runs(shard: ShardIndex) -> Iterator[tuple[int, int]]:
    """Records in a row that are read at once, as places from and to."""
    first = 0
    ends = shard.starts + shard.sizes
    while first < len(ends):
        last = int(np.searchsorted(ends, shard.starts[first] + READ_BYTES, side="right"))
        last = max(last, first + 1)
        yield first, last
        first = last


def _bad_records(folder: Folder, shard: ShardIndex, first: int, last: int) -> list[int]:
    """Places of records whose bytes have another checksum than they were written with."""
    begin = int(shard.starts[first])
    end = int(shard.starts[last - 1] + shard.sizes[last - 1])
    content = memoryview(folder.read_range(shard.name, begin, end - begin))
    bad = []
    for place in range(first, last):
        start = int(shard.starts[place]) - begin
        record = content[start : start + int(shard.sizes[place])]
        if xxhash.xxh3_64_intdigest(record) != shard.xxh3[place]:
            bad.append(place)
    return bad


def _check_identities(
    folder: Folder, shards: Sequence[ShardIndex], recipe_identity: dict | None, report: VerifyReport
) -> dict | None:
    """Whether all shards are of one cache, and that its means are theirs.

    Returns the shards' identity where that is so.
    """
    if not shards:
        return None
    written = shards[0].identity
    others = [shard for shard in shards if shard.identity != written]
    for shard in others[:1]:
        name = next(n for n in {**written, **shard.identity} if _differ(written, shard.identity, n))
        report.problems.append(
            f"{folder.at(shard.name)}: {len(others)} of {len(shards)} shards are of another cache: "
            f"{name} is {shard.identity.get(name)}, in {shards[0].name} {written.get(name)}; give "
            "each a folder of its own"
        )
    if others:
        return None  # whose means they should be is not known
    expected = {n: value for n, value in written.items() if n != MEANS}
    if recipe_identity is not None:
        expected, _ = adopt_more(written, recipe_identity)  # as a reader does
    try:
        codec = read_codec(folder, expected)
        require_identity(written, with_codec(expected, codec), where=f"cache {folder}")
    except StateError as error:
        report.problems.append(str(error))
        return None
    return written


def _differ(one: dict, other: dict, name: str) -> bool:
    return (name in one, one.get(name)) != (name in other, other.get(name))


def _check_manifest(
    folder: Folder, shards: Sequence[ShardIndex], identity: dict, report: VerifyReport
) -> None:
    """Whether readers, who ask the manifest first, find what the shards say."""
    index = load_index(folder, identity)
    names = {name: place for place, name in enumerate(index.shards)}
    columns = {
        name: np.concatenate([getattr(shard, name) for shard in shards])
        for name in ("views", "clip_ids", "starts", "sizes", "xxh3")
    }
    owners = [np.full(len(shard.views), names.get(shard.name, -1)) for shard in shards]
    columns["shard"] = np.concatenate(owners)
    order = np.lexsort([columns[name] for name in ("shard", "clip_ids", "views")])
    columns = {name: column[order] for name, column in columns.items()}
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(columns["clip_ids"]) != 0) | (np.diff(columns["views"]) != 0)
    report.num_twice = int((~is_first).sum())
    if all(np.array_equal(getattr(index, n), column[is_first]) for n, column in columns.items()):
        return
    report.damaged.append(MANIFEST_FILE)
    report.problems.append(
        f"{folder.at(MANIFEST_FILE)}: lists other records than the shards hold; delete it, it is "
        "made again"
    )


def _check_complete(
    folder: Folder, shards: Sequence[ShardIndex], recipe: Recipe, report: VerifyReport
) -> None:
    """Whether sound shards hold every view of the recipe's clips."""
    known = {
        view: np.concatenate(
            [np.empty(0, np.int64), *(s.clip_ids[s.views == view] for s in shards)]
        )
        for view in range(recipe.objective.cache.views)
    }
    if recipe.data.train.list is None:
        clip_ids = np.unique(np.concatenate(list(known.values())))
    else:
        clips = read_list(recipe.data.train, seed=recipe.run.seed)
        clip_ids = np.fromiter((clip.id for clip in clips), np.int64, len(clips))
    clip_ids = clip_ids[~np.isin(clip_ids, quarantined_ids(folder))]
    report.missing = sum(int((~np.isin(clip_ids, ids)).sum()) for ids in known.values())
    if report.missing:
        report.problems.append(
            f"cache {folder}: lacks {report.missing} of the {len(clip_ids) * len(known)} records "
            f"of {len(clip_ids)} clips in {len(known)} views; run 'distill cache-teacher' to add "
            "them"
        )
