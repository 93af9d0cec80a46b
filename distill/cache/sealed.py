"""Safetensors files whose header and arrays are under one checksum, the header's padding too.

Bytes may lie before the arrays, under names of their own; those are not in the checksum, and
whoever puts them there keeps checksums of them among the arrays.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xxhash

FIRST_BYTES = 2**14
ALIGN_BYTES = 64  # of where the tensors begin
DTYPES = {
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "U32": np.uint32,
    "I64": np.int64,
    "U64": np.uint64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def canonical(value) -> str:
    """JSON text that is equal exactly when the values are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def arrays_digest(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """The checksum that seals metadata and arrays, with their names and dtypes."""
    names = [[name, _NAMES[array.dtype]] for name, array in arrays.items()]
    checksum = xxhash.xxh3_64(canonical([dict(metadata), names]).encode())
    for array in arrays.values():
        checksum.update(array.data)
    return checksum.hexdigest()


def sealed_header(
    metadata: Mapping[str, str],
    arrays: Mapping[str, np.ndarray],
    *,
    before: Mapping[str, int] | None = None,
    size_bytes: int | None = None,
) -> bytes:
    """What a file begins with: its header's length and the header, padded to `size_bytes` in all.

    `before` names the bytes that precede the one-dimensional arrays, and tells how many they are.
    Raises ValueError where `size_bytes` is too little.
    """
    digest = arrays_digest(metadata, arrays)
    entries, position = {"__metadata__": {**metadata, "index_xxh3": digest}}, 0
    sizes = [(name, "U8", count, count) for name, count in (before or {}).items()]
    sizes += [(name, _NAMES[a.dtype], len(a), a.nbytes) for name, a in arrays.items()]
    for name, dtype, count, size in sizes:
        offsets = [position, position + size]
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": offsets}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    size_bytes = size_bytes or 8 + len(text) + -(8 + len(text)) % ALIGN_BYTES
    if size_bytes < 8 + len(text):
        raise ValueError(f"a header of {len(text)} bytes in a place of {size_bytes - 8}")
    return struct.pack("<Q", size_bytes - 8) + text.ljust(size_bytes - 8)


def read_sealed(
    read: Callable[[int, int], bytes], size_bytes: int, *, before: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, np.ndarray], int]:
    """A file's metadata and its arrays by name, and where its tensors start.

    `read` gives so many bytes from a place in the file. Raises ValueError for anything that is not
    as `sealed_header` and the arrays' bytes were.
    """
    try:
        text = bytes(read(0, min(FIRST_BYTES, size_bytes)))  # from afar: most headers whole
        (length,) = struct.unpack("<Q", text[:8])
        if not 2 <= length <= size_bytes - 8:
            raise ValueError("a header of another length")
        start = 8 + length
        text = text[:start] if start <= len(text) else bytes(read(0, start))
        entries = json.loads(text[8:])
        metadata = entries.pop("__metadata__")
        first = {name: entries.pop(name)["data_offsets"][1] for name in before}
        places = [(*entry["data_offsets"], entry["dtype"]) for entry in entries.values()]
        if start + places[-1][1] != size_bytes:
            raise ValueError("a file of another length")
        begin = places[0][0]
        tail = memoryview(read(start + begin, places[-1][1] - begin))  # one range
        arrays = {
            name: np.frombuffer(tail[first_byte - begin : end - begin], DTYPES[dtype])
            for name, (first_byte, end, dtype) in zip(entries, places, strict=True)
        }
        del metadata["index_xxh3"]  # written again by what it should say
        if sealed_header(metadata, arrays, before=first, size_bytes=start) != text:
            raise ValueError("a header or index of another checksum")
    except (KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise ValueError("no header of such a file") from error
    return metadata, arrays, start
