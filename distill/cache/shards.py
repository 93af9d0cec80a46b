"""Shards: immutable safetensors files that hold view records packed back to back.

A record is its fixed fields in the shard's order, then a JSON text that says what the view is
(frames, crop, decoder, ...), padded with blanks. A shard holds the tensors

    records uint8 [bytes]    offsets int64 [n+1]    clip_ids int64 [n]    views int64 [n]
    xxh3 uint64 [n]          of each record

and in its metadata the layout of a record, the cache's identity and `index_xxh3`, a checksum
of everything but the records. It appears under its name only when whole: a writer fills a local
file of its own under a temporary name, and the cache's folder takes it when it is done.
"""

import contextlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import xxhash

from distill.cache.sealed import ALIGN_BYTES, canonical, read_sealed, sealed_header
from distill.cache.store import Folder, reported, temporary_name
from distill.errors import StateError

PREFIX, SUFFIX = "shard-", ".safetensors"
MAX_VIEW, MAX_RECORD_BYTES = 2**15 - 2, 2**32 - ALIGN_BYTES
HEADER_SLACK_BYTES = 512  # room for the numbers that are known only when a shard is closed
OPEN_FILES = 256  # descriptors kept; the usual limit of a process is 1,024


@dataclass(frozen=True)
class Field:
    """One fixed field of a record, C-contiguous and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ShardIndex:
    """What is in a shard: where each record lies in the file, whose it is, its checksum."""

    name: str
    fields: tuple[Field, ...]
    identity: dict
    starts: np.ndarray  # int64 [n], bytes from the beginning of the file
    sizes: np.ndarray  # int64 [n], bytes
    clip_ids: np.ndarray  # int64 [n]
    views: np.ndarray  # int64 [n]
    xxh3: np.ndarray  # uint64 [n]


class ShardWriter:
    """Packs records into shards of about `shard_bytes`, closed after `shard_seconds` at most.

    Use as a context manager: the open shard is committed on leaving, also when an error ends the
    block. A signal may do that in the middle of anything here: a record counts only once all of
    it is written, and its batch is. Where writing itself fails, the open shard is dropped and a
    StateError says why; what is committed stays.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        fields: Sequence[Field],
        identity: Mapping,
        shard_bytes: int,
        shard_seconds: float,
    ) -> None:
        self.folder, self.fields = folder, tuple(fields)
        self.shard_bytes, self.shard_seconds = shard_bytes, shard_seconds
        self.committed_bytes = 0
        self.committed_shards = 0
        self.names: list[str] = []  # of what is committed
        self.num_replaced = 0  # shards that another writer had made to the last bit
        self._metadata = shard_metadata(self.fields, identity)
        self._file = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, Exception) and self._file is not None:
            del self._records[self._num_settled :]  # a signal's: a batch stays whole
        self.commit()

    def add(self, clip_id: int, view: int, values: Mapping[str, np.ndarray], info: dict) -> None:
        """Append one record; raises ValueError for a field of another dtype or shape."""
        parts = []
        for field in self.fields:
            value = np.ascontiguousarray(values[field.name])
            if value.dtype != np.dtype(field.dtype) or value.shape != field.shape:
                raise ValueError(
                    f"field {field.name}: expected {field.dtype} {list(field.shape)}, got "
                    f"{value.dtype} {list(value.shape)}"
                )
            parts.append(value.reshape(-1).view(np.uint8).data)
        text = json.dumps(info, separators=(",", ":")).encode()
        size = sum(len(part) for part in parts) + len(text)
        parts.append(text + b" " * (-size % ALIGN_BYTES))
        if view > MAX_VIEW or size > MAX_RECORD_BYTES:
            raise ValueError(f"view {view} of {size} bytes: more than an index has room for")
        checksum = xxhash.xxh3_64()
        with self._dropped_on_failure():
            if self._file is None:
                self._open()
            for part in parts:
                checksum.update(part)
                self._file.write(part)
        end = self._end + size + -size % ALIGN_BYTES
        self._records.append((end, clip_id, view, checksum.intdigest()))

    def commit_if_full(self) -> None:
        """Close the open shard when it is large or old enough; call between batches."""
        if self._file is None:
            return
        self._num_settled = len(self._records)
        is_old = time.monotonic() - self._opened_seconds >= self.shard_seconds
        if is_old or self._end >= self.shard_bytes:
            self.commit()

    def commit(self) -> None:
        """Finish the open shard and give it its name; nothing when none is open."""
        if self._file is None:
            return
        if not self._records:
            self._drop()
            return
        ends, clip_ids, views, checksums = zip(*self._records, strict=True)
        arrays = {
            "offsets": np.array((0, *ends), np.int64),
            "clip_ids": np.array(clip_ids, np.int64),
            "views": np.array(views, np.int64),
            "xxh3": np.array(checksums, np.uint64),
        }
        header = sealed_header(
            self._metadata, arrays, before={"records": self._end}, size_bytes=self._start
        )
        digest = json.loads(header[8:])["__metadata__"]["index_xxh3"]
        name = f"{PREFIX}{digest}{SUFFIX}"
        self.num_replaced += name in self.folder.sizes(name)
        with self._dropped_on_failure():
            self._file.seek(self._start + self._end)  # behind the last whole record
            self._file.truncate()
            for array in arrays.values():
                self._file.write(array.data)
            size_bytes = self._file.tell()
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            # A signal may have come after this was done and before it was noted.
            if self._path.exists():
                self.folder.commit(self._path, name)
            self._file.close()
        self._file = None
        self.committed_bytes += size_bytes
        self.committed_shards += 1
        self.names.append(name)

    @property
    def _end(self) -> int:
        """Bytes of the open shard's whole records."""
        return self._records[-1][0] if self._records else 0

    def _open(self) -> None:
        self._path = self.folder.scratch() / temporary_name()
        self._opened_seconds = time.monotonic()
        self._num_settled = 0  # records of whole batches
        self._records: list[tuple[int, int, int, int]] = []  # end, clip id, view, checksum
        # The header precedes the records, but its numbers come last: keep room for it.
        room = len(json.dumps(self._metadata)) + HEADER_SLACK_BYTES
        self._start = room + -room % ALIGN_BYTES
        self._file = self._path.open("xb")
        self._file.seek(self._start)

    @contextlib.contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        try:
            with reported(f"cache {self.folder}: a shard", "written"):
                yield
        except StateError:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file = None


def shard_metadata(fields: Sequence[Field], identity: Mapping) -> dict[str, str]:
    """What a shard's header says of its records besides where they lie."""
    layout = [[field.name, field.dtype, list(field.shape)] for field in fields]
    return {"identity": canonical(identity), "fields": canonical(layout)}


def parse_metadata(metadata: Mapping[str, str]) -> tuple[tuple[Field, ...], dict]:
    """The fields and the identity in `shard_metadata`."""
    layout = json.loads(metadata["fields"])
    fields = tuple(Field(name, dtype, tuple(shape)) for name, dtype, shape in layout)
    return fields, json.loads(metadata["identity"])


def shard_sizes(folder: Folder) -> dict[str, int]:
    """Name and bytes of the committed shards of a cache, by name."""
    found = folder.sizes(PREFIX)
    return {name: size for name, size in found.items() if name.endswith(SUFFIX)}


def read_shard_index(folder: Folder, name: str, *, size_bytes: int | None = None) -> ShardIndex:
    """Read and check everything in a shard but its records; looks up its size if not told it.

    Raises StateError for a shard that is damaged, by one line that says what to do.
    """
    try:
        if size_bytes is None:
            size_bytes = folder.sizes(name).get(name, 0)
        metadata, arrays, start = read_sealed(
            lambda first, count: folder.read_range(name, first, count),
            size_bytes,
            before=("records",),
        )
        fields, identity = parse_metadata(metadata)
        starts = start + arrays["offsets"]  # the records are the first tensor
        return ShardIndex(
            name=name,
            fields=fields,
            identity=identity,
            starts=starts[:-1],
            sizes=np.diff(starts),
            clip_ids=arrays["clip_ids"],
            views=arrays["views"],
            xxh3=arrays["xxh3"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{folder.at(name)}: damaged shard ({error}); delete it and run "
            f"'{folder.made_by}' again to make its records anew"
        ) from error


class ShardReader:
    """Reads records of a cache's shards straight into the caller's memory, from any thread.

    Use as a context manager. Local files stay open while they are in use and some time after;
    from other stores a record is one ranged request.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._files: OrderedDict[str, list[int]] = OrderedDict()  # descriptor, how many use it
        self._lock = Lock()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1][0])

    def read(
        self, name: str, parts: Sequence[memoryview], *, start: int, xxh3: int, key: tuple[int, int]
    ) -> None:
        """Fill buffers of bytes with a shard's bytes from `start` on, checked as one record.

        Raises StateError that names the record by `key`, clip id and view, when bytes are missing
        or others than written.
        """
        if self.folder.is_local:
            with self._open(name) as file:
                try:
                    is_whole = _read_into(file, parts, start)
                except OSError:
                    with reported(self.folder.at(name), "read"):
                        raise
        else:
            size = sum(len(part) for part in parts)
            content = memoryview(self.folder.read_range(name, start, size))
            is_whole = len(content) == size
            for part in parts if is_whole else ():
                part[:], content = content[: len(part)], content[len(part) :]
        checksum = xxhash.xxh3_64()
        for part in parts:
            checksum.update(part)
        if not is_whole or checksum.intdigest() != xxh3:
            raise StateError(
                f"{self.folder.at(name)}: the record of clip {key[0]} in view {key[1]} is damaged "
                "(its checksum differs); delete the shard and run "
                f"'{self.folder.made_by}' again to make its records anew"
            )

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[int]:
        with self._lock:
            entry = self._files.get(name)
            if entry is None:
                with reported(self.folder.at(name), "read"):
                    entry = [os.open(self.folder.path / name, os.O_RDONLY | os.O_CLOEXEC), 0]
                self._files[name] = entry
            entry[1] += 1
            self._files.move_to_end(name)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if len(self._files) > OPEN_FILES:
                    for other, (file, users) in list(self._files.items()):
                        if not users:
                            del self._files[other]
                            os.close(file)
                            break


def _read_into(file: int, parts: Sequence[memoryview], start: int) -> bool:
    """Fill the parts; False where the file ends first."""
    pending = [part for part in parts if len(part)]
    while pending:
        count = os.preadv(file, pending, start)
        if count == 0:
            return False
        start += count
        while pending and count >= len(pending[0]):
            count -= len(pending.pop(0))
        if count:
            pending[0] = pending[0][count:]
    return True
