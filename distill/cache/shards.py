"""Shards: immutable safetensors files that hold view records packed back to back.

A record is its fixed fields in the shard's order, then a JSON text that says what the view is
(frames, crop, decoder, ...), padded with blanks. A shard holds the tensors

    records uint8 [bytes]    offsets int64 [n+1]    clip_ids int64 [n]    views int64 [n]
    xxh3 uint64 [n]          of each record

and in its metadata the layout of a record, the cache's identity and `index_xxh3`, a checksum
of everything but the records. It appears under its name only when whole: a writer fills a file
of its own under a temporary name, syncs it and renames it.
"""

import contextlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from distill.errors import StateError

ALIGN_BYTES = 64  # of a record's start and of the tensors
INDEX = (("offsets", "I64"), ("clip_ids", "I64"), ("views", "I64"), ("xxh3", "U64"))
NUMPY = {"U8": np.uint8, "I64": np.int64, "U64": np.uint64}
HEADER_SLACK_BYTES = 512  # room for the numbers that are known only when a shard is closed


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

    path: Path
    fields: tuple[Field, ...]
    identity: dict
    starts: np.ndarray  # int64 [n], bytes from the beginning of the file
    sizes: np.ndarray  # int64 [n], bytes
    clip_ids: np.ndarray  # int64 [n]
    views: np.ndarray  # int64 [n]
    xxh3: np.ndarray  # uint64 [n]


class ShardWriter:
    """Packs records into shards of about `shard_bytes`, closed after `shard_seconds` at most.

    Use as a context manager: the open shard is committed on leaving, also when an error other
    than one of the file system ends the block. A signal may do that in the middle of anything
    here: a record counts only once all of it is written, and its batch is.
    """

    def __init__(
        self,
        folder: Path,
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
        layout = [[field.name, field.dtype, list(field.shape)] for field in self.fields]
        self._metadata = {"identity": canonical(identity), "fields": canonical(layout)}
        self._file = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError):
            self._discard()
            return
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
        if self._file is None:
            self._open()
        checksum = xxhash.xxh3_64()
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
        """Finish the open shard, sync it and give it its name; nothing when none is open."""
        if self._file is None:
            return
        if not self._records:
            self._discard()
            return
        ends, clip_ids, views, checksums = zip(*self._records, strict=True)
        arrays = {
            "offsets": np.array((0, *ends), np.int64),
            "clip_ids": np.array(clip_ids, np.int64),
            "views": np.array(views, np.int64),
            "xxh3": np.array(checksums, np.uint64),
        }
        digest = _index_checksum(self._metadata, arrays)
        text = _header(self._metadata, arrays)
        if len(text) > self._header_bytes:
            raise RuntimeError(f"{self._path}: the header outgrew its {self._header_bytes} bytes")
        self._file.seek(8 + self._header_bytes + self._end)  # behind the last whole record
        self._file.truncate()
        for name, _ in INDEX:
            self._file.write(arrays[name].tobytes())
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes))
        self._file.write(text.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        size_bytes = os.fstat(self._file.fileno()).st_size
        file, self._file = self._file, None
        file.close()
        os.rename(self._path, self.folder / f"shard-{digest}.safetensors")
        sync_folder(self.folder)
        self.committed_bytes += size_bytes
        self.committed_shards += 1

    @property
    def _end(self) -> int:
        """Bytes of the open shard's whole records."""
        return self._records[-1][0] if self._records else 0

    def _open(self) -> None:
        self._path = self.folder / temporary_name()
        self._opened_seconds = time.monotonic()
        self._num_settled = 0  # records of whole batches
        self._records: list[tuple[int, int, int, int]] = []  # end, clip id, view, checksum
        # The header precedes the records, but its numbers come last: keep room for it.
        room = len(json.dumps(self._metadata)) + HEADER_SLACK_BYTES
        self._header_bytes = room + -(room + 8) % ALIGN_BYTES
        self._file = self._path.open("xb")
        self._file.seek(8 + self._header_bytes)

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = None


def read_shard_index(path: Path) -> ShardIndex:
    """Read and check everything in a shard but its records.

    Raises StateError for a shard that is damaged, by one line that says what to do.
    """
    try:
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            size_bytes = os.fstat(file.fileno()).st_size
            if not 2 <= header_bytes <= size_bytes - 8:
                raise ValueError("a header of another length")
            text = file.read(header_bytes)
            header = json.loads(text)
            start = 8 + header_bytes
            if start + header[INDEX[-1][0]]["data_offsets"][1] != size_bytes:
                raise ValueError("a file of another length")
            arrays = {}
            for name, dtype in INDEX:
                begin, end = header[name]["data_offsets"]
                file.seek(start + begin)
                arrays[name] = np.frombuffer(file.read(end - begin), NUMPY[dtype])
        metadata = header["__metadata__"]
        del metadata["index_xxh3"]  # written again by what it should say
        if _header(metadata, arrays).ljust(header_bytes) != text:
            raise ValueError("a header or index of another checksum")
        fields = tuple(
            Field(name, dtype, tuple(shape))
            for name, dtype, shape in json.loads(metadata["fields"])
        )
        starts = start + arrays["offsets"]  # the records are the first tensor
        return ShardIndex(
            path=path,
            fields=fields,
            identity=json.loads(metadata["identity"]),
            starts=starts[:-1],
            sizes=np.diff(starts),
            clip_ids=arrays["clip_ids"],
            views=arrays["views"],
            xxh3=arrays["xxh3"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, IndexError) as error:
        raise StateError(
            f"{path}: damaged shard ({error}); delete it and run 'distill cache-teacher' again to "
            "make its records anew"
        ) from error


class ShardReader:
    """Reads records of one open shard straight into the caller's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StateError(
                f"{path}: cannot be read ({error.strerror}); run 'distill cache-teacher' again if "
                "the shard is lost"
            ) from error

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, kind, error, trace) -> None:
        os.close(self._file)

    def read(self, parts: Sequence, *, start: int, xxh3: int, record: str) -> None:
        """Fill writable buffers with consecutive bytes from `start` and check them as one record.

        Raises StateError that names `record` when bytes are missing or others than written.
        """
        pending = [memoryview(part).cast("B") for part in parts if len(part)]
        buffers = list(pending)
        while pending:
            count = os.preadv(self._file, pending, start)
            if count == 0:
                raise self._damaged(record)
            start += count
            while pending and count >= len(pending[0]):
                count -= len(pending.pop(0))
            if count:
                pending[0] = pending[0][count:]
        checksum = xxhash.xxh3_64()
        for buffer in buffers:
            checksum.update(buffer)
        if checksum.intdigest() != xxh3:
            raise self._damaged(record)

    def _damaged(self, record: str) -> StateError:
        return StateError(
            f"{self.path}: {record} is damaged (its checksum differs); delete the shard and run "
            "'distill cache-teacher' again to make its records anew"
        )


def shard_paths(folder: Path) -> list[Path]:
    """The committed shards of a cache, by name."""
    return sorted(folder.glob("shard-*.safetensors"))


def remove_leftovers(folder: Path) -> int:
    """Delete the open shards of writers of this machine that are gone; returns how many."""
    removed = 0
    for path in folder.glob("open-*"):
        host, writer = _writer_of(path.name)
        if host != socket.gethostname() or writer is None:
            continue
        if writer == os.getpid() or not _is_running(writer):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical(value) -> str:
    """JSON text that is equal exactly when the values are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def temporary_name() -> str:
    """The name of a file that this process has open; see `remove_leftovers`."""
    return f"open-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"


def _writer_of(name: str) -> tuple[str, int | None]:
    """Machine and process in a temporary name; machines have hyphens in their names too."""
    match = re.fullmatch(r"open-(.*)-(\d+)-\d+", name)
    return (match[1], int(match[2])) if match else ("", None)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _header(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The safetensors header of records and their index, without the padding behind it."""
    digest = _index_checksum(metadata, arrays)
    header, position = {"__metadata__": {**metadata, "index_xxh3": digest}}, 0
    sizes = [("records", "U8", int(arrays["offsets"][-1]))]
    sizes += [(name, dtype, len(arrays[name])) for name, dtype in INDEX]
    for name, dtype, count in sizes:
        end = position + count * np.dtype(NUMPY[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [position, end]}
        position = end
    return json.dumps(header, separators=(",", ":")).encode()


def _index_checksum(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    checksum = xxhash.xxh3_64(canonical(dict(metadata)).encode())
    for name, _ in INDEX:
        checksum.update(arrays[name].tobytes())
    return checksum.hexdigest()
