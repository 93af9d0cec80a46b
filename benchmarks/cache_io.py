"""Random reads of a cache's records, checksums verified, beside six other ways to keep them.

    pip install lmdb webdataset tensorstore pylance
    python benchmarks/cache_io.py --markdown benchmarks/results/cache_io.md

Every format holds the same records: what a cache keeps of 8 frames of 224 pixels at 4 bits. Every
reader gets as many threads, delivers batches of the same size in a new random order in each round,
and is compared with raw `preadv` in the same round. Before it is timed, each is checked against
what was written. Reads are timed with the files in the page cache, and once more after the system
has been told to drop them (the host of a virtual machine may still have them in memory).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from io import BytesIO
from pathlib import Path

import lance
import lmdb
import numpy as np
import pyarrow
import tensorstore
import webdataset
import xxhash
from rich.console import Console

from distill.cache.index import load_index
from distill.cache.read import Cache, CachedBatches
from distill.cache.shards import Field, ShardWriter
from distill.cache.store import open_folder
from distill.log import configure

FIELDS = (
    Field("tokens", "int16", (410,)),
    Field("patches", "uint8", (410, 588)),
    Field("codes", "uint8", (6, 411, 704)),
    Field("scales", "float16", (6, 411)),
    Field("pooled", "float16", (768,)),
    Field("attention", "float32", (2048,)),
)
RECORD_BYTES = sum(field.size_bytes for field in FIELDS)
SHARD_RECORDS = 32
IDENTITY = {"objective.cache.codes": "4bit"}

Batches = Callable[[np.ndarray], Iterator[list]]  # order of the records -> records by batches


def make_record(number: int) -> np.ndarray:
    """Bytes that nothing compresses."""
    return np.random.default_rng(number).integers(0, 256, RECORD_BYTES, np.uint8)


def split_fields(record: np.ndarray) -> dict[str, np.ndarray]:
    """A record's bytes as its fields."""
    fields, start = {}, 0
    for field in FIELDS:
        part = record[start : start + field.size_bytes]
        fields[field.name] = part.view(field.dtype).reshape(field.shape)
        start += field.size_bytes
    return fields


def write_distill(folder: Path, records: list[np.ndarray]) -> None:
    settings = {"shard_bytes": SHARD_RECORDS * RECORD_BYTES, "shard_seconds": 1e9}
    with ShardWriter(open_folder(folder), fields=FIELDS, identity=IDENTITY, **settings) as writer:
        for number, record in enumerate(records):
            writer.add(number, 0, split_fields(record), {"frames": list(range(8))})
            writer.commit_if_full()


@contextmanager
def read_distill(folder: Path, *, count: int, threads: int, batch_size: int):
    index = load_index(open_folder(folder), IDENTITY)
    rows = index.find(np.arange(count), 0)[:, None]
    cache = Cache(open_folder(folder), index, rows)
    batches = CachedBatches(cache, batch_size=batch_size, seed=0)
    batches.num_threads = threads

    def run(order: np.ndarray) -> Iterator[list]:
        batches.order = lambda epoch: order
        for batch in batches.epoch(0):
            yield [batch[field.name].numpy() for field in FIELDS]

    yield run


@contextmanager
def read_raw(folder: Path, *, count: int, threads: int, batch_size: int):
    """`preadv` alone, from our own shards into memory that is there already."""
    index = load_index(open_folder(folder), IDENTITY)
    rows = index.find(np.arange(count), 0)
    files = [os.open(folder / name, os.O_RDONLY) for name in index.shards]
    places = [(files[index.shard[row]], int(index.starts[row])) for row in rows]
    memory = np.empty((batch_size, RECORD_BYTES), np.uint8)
    memory[:] = 1
    with ThreadPoolExecutor(threads) as pool:

        def read(slot: int, number: int) -> None:
            file, start = places[number]
            if os.preadv(file, [memory[slot]], start) != RECORD_BYTES:
                raise RuntimeError("a short read")

        def run(order: np.ndarray) -> Iterator[list]:
            for start in range(0, count, batch_size):
                some = order[start : start + batch_size]
                list(pool.map(read, range(len(some)), some))
                yield list(memory[: len(some)])

        yield run
    for file in files:
        os.close(file)


def write_memmap(folder: Path, records: list[np.ndarray]) -> None:
    array = np.lib.format.open_memmap(
        folder / "records.npy", "w+", np.uint8, (len(records), RECORD_BYTES)
    )
    for place, record in enumerate(records):
        array[place] = record
    array.flush()


@contextmanager
def read_memmap(folder: Path, *, count: int, threads: int, batch_size: int):
    array = np.load(folder / "records.npy", mmap_mode="r")
    memory = np.ones((batch_size, RECORD_BYTES), np.uint8)
    with ThreadPoolExecutor(threads) as pool:

        def run(order: np.ndarray) -> Iterator[list]:
            for start in range(0, count, batch_size):
                some = order[start : start + batch_size]
                list(pool.map(lambda s, n: np.copyto(memory[s], array[n]), range(len(some)), some))
                yield list(memory[: len(some)])

        yield run


def write_lmdb(folder: Path, records: list[np.ndarray]) -> None:
    size = 2 * len(records) * RECORD_BYTES + 2**24
    with lmdb.open(str(folder), map_size=size) as store:
        for number, record in enumerate(records):
            with store.begin(write=True) as change:
                change.put(b"%08d" % number, record.tobytes())


@contextmanager
def read_lmdb(folder: Path, *, count: int, threads: int, batch_size: int):
    memory = np.ones((batch_size, RECORD_BYTES), np.uint8)
    with (
        lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as store,
        ThreadPoolExecutor(threads) as pool,
    ):

        def read(slot: int, number: int) -> None:
            with store.begin(buffers=True) as look:
                memory[slot] = np.frombuffer(look.get(b"%08d" % number), np.uint8)

        def run(order: np.ndarray) -> Iterator[list]:
            for start in range(0, count, batch_size):
                some = order[start : start + batch_size]
                list(pool.map(read, range(len(some)), some))
                yield list(memory[: len(some)])

        yield run


def write_webdataset(folder: Path, records: list[np.ndarray]) -> None:
    for start in range(0, len(records), SHARD_RECORDS):
        with tarfile.open(folder / f"{start:08}.tar", "w") as tar:
            for number in range(start, min(start + SHARD_RECORDS, len(records))):
                entry = tarfile.TarInfo(f"{number:08}.bin")
                entry.size = RECORD_BYTES
                tar.addfile(entry, BytesIO(records[number].tobytes()))


@contextmanager
def read_webdataset(folder: Path, *, count: int, threads: int, batch_size: int):
    """As it lies in the files: there is no other order, save for shards and a shuffle buffer."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))

    def run(order: np.ndarray) -> Iterator[list]:
        batch = []
        for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
            batch.append(np.frombuffer(sample["bin"], np.uint8))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    yield run


def open_tensorstore(folder: Path, **settings):
    inner = [{"name": "bytes"}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, RECORD_BYTES], "codecs": inner}
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        },
        dtype=tensorstore.uint8,
        chunk_layout=tensorstore.ChunkLayout(write_chunk_shape=[SHARD_RECORDS, RECORD_BYTES]),
        **settings,
    ).result()


def write_tensorstore(folder: Path, records: list[np.ndarray]) -> None:
    store = open_tensorstore(folder, create=True, shape=[len(records), RECORD_BYTES])
    for start in range(0, len(records), SHARD_RECORDS):
        some = np.stack(records[start : start + SHARD_RECORDS])
        store[start : start + len(some)].write(some).result()


@contextmanager
def read_tensorstore(folder: Path, *, count: int, threads: int, batch_size: int):
    limits = {"data_copy_concurrency": {"limit": threads}}
    limits["file_io_concurrency"] = {"limit": threads}
    store = open_tensorstore(folder, open=True, context=tensorstore.Context(limits))

    def run(order: np.ndarray) -> Iterator[list]:
        for start in range(0, count, batch_size):
            some = order[start : start + batch_size]
            yield [done.result() for done in [store[int(number)].read() for number in some]]

    yield run


def write_lance(folder: Path, records: list[np.ndarray]) -> None:
    def tables():
        for start in range(0, len(records), SHARD_RECORDS):
            some = [record.tobytes() for record in records[start : start + SHARD_RECORDS]]
            yield pyarrow.record_batch([pyarrow.array(some, pyarrow.large_binary())], ["record"])

    schema = pyarrow.schema([("record", pyarrow.large_binary())])
    reader = pyarrow.RecordBatchReader.from_batches(schema, tables())
    lance.write_dataset(reader, str(folder), max_rows_per_file=SHARD_RECORDS, mode="overwrite")


@contextmanager
def read_lance(folder: Path, *, count: int, threads: int, batch_size: int):
    dataset = lance.dataset(str(folder))

    def run(order: np.ndarray) -> Iterator[list]:
        for start in range(0, count, batch_size):
            column = dataset.take(order[start : start + batch_size].tolist())["record"]
            yield [np.frombuffer(value.as_buffer(), np.uint8) for value in column]

    yield run


# name: how it is written (None: from our shards), how it is read, whether reads are verified
FORMATS = {
    "raw preadv": (None, read_raw, "no"),
    "distill": (write_distill, read_distill, "xxh3"),
    "np.memmap": (write_memmap, read_memmap, "no"),
    "LMDB": (write_lmdb, read_lmdb, "no"),
    "WebDataset (in order)": (write_webdataset, read_webdataset, "no"),
    "TensorStore (Zarr v3)": (write_tensorstore, read_tensorstore, "crc32c"),
    "Lance": (write_lance, read_lance, "no"),
}
MAPPED = ("np.memmap", "LMDB")  # the system drops no pages of a file that is mapped


def write_raw(folder: Path, records: list[np.ndarray]) -> None:
    for start in range(0, len(records), SHARD_RECORDS):
        with (folder / f"{start:08}.bin").open("wb") as file:
            for record in records[start : start + SHARD_RECORDS]:
                file.write(record.data)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def drop(folder: Path) -> None:
    """Have the system forget what it keeps of the files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def time_writes(place: Path, records: list[np.ndarray], *, rounds: int) -> dict[str, list[float]]:
    """MB/s of each round, synced to the disk; the last round's files stay."""
    writers = {"raw write": write_raw} | {n: f[0] for n, f in FORMATS.items() if f[0]}
    found = {name: [] for name in writers}
    for _ in range(rounds):
        for name, write in writers.items():
            folder = place / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            start = time.perf_counter()
            write(folder, records)
            sync(folder)
            seconds = time.perf_counter() - start
            found[name].append(len(records) * RECORD_BYTES / seconds / 1e6)
    shutil.rmtree(place / "raw write")
    return found


def folder_of(place: Path, name: str) -> Path:
    return place / (name if FORMATS[name][0] else "distill")


def check(place: Path, records: list[np.ndarray], **settings) -> None:
    """Raise RuntimeError for a reader that gives other bytes than were written."""
    order = np.random.default_rng(1).permutation(len(records))
    for name, (_, read, _) in FORMATS.items():
        wanted = np.arange(len(records)) if "in order" in name else order
        at = 0
        with read(folder_of(place, name), count=len(records), **settings) as run:
            for batch in run(wanted):
                if name == "distill":
                    parts = [field.reshape(len(field), -1).view(np.uint8) for field in batch]
                    batch = list(np.concatenate(parts, axis=1))
                for found in batch:
                    expected = xxhash.xxh3_64_digest(records[wanted[at]].data)
                    if xxhash.xxh3_64_digest(np.ascontiguousarray(found).data) != expected:
                        raise RuntimeError(f"{name}: another record than was written")
                    at += 1
        if at != len(records):
            raise RuntimeError(f"{name}: {at} of {len(records)} records")


def time_reads(
    place: Path, *, count: int, rounds: int, passes: int, is_cold: bool, **settings
) -> dict[str, list[float]]:
    """MB/s of each round, all formats in turn; with warm files in a first round not counted."""
    found = {name: [] for name in FORMATS}
    with ExitStack() as stack:
        opened = {}
        for number in range(rounds + (not is_cold)):
            for name, (_, read, _) in FORMATS.items():
                orders = [
                    np.random.default_rng([number, turn]).permutation(count)
                    for turn in range(passes)
                ]
                if is_cold:
                    if name in MAPPED:
                        drop(folder_of(place, name))
                    context = read(folder_of(place, name), count=count, **settings)
                    with context as run:
                        if name not in MAPPED:
                            time_run(run, orders)  # so that none has to ask for memory
                            drop(folder_of(place, name))
                        seconds = time_run(run, orders)
                else:
                    if name not in opened:
                        context = read(folder_of(place, name), count=count, **settings)
                        opened[name] = stack.enter_context(context)
                    seconds = time_run(opened[name], orders)
                if number or is_cold:
                    found[name].append(passes * count * RECORD_BYTES / seconds / 1e6)
    return found


def time_run(run: Batches, orders: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for order in orders:
        for _ in run(order):
            pass
    return time.perf_counter() - start


def lines_of(found: dict[str, list[float]], against: str, *, columns: bool) -> Iterator[str]:
    for name, rates in found.items():
        ratio = statistics.median(
            rate / other for rate, other in zip(rates, found[against], strict=True)
        )
        verified = f" {FORMATS[name][2]} |" if columns else ""
        yield f"| {name} |{verified} {statistics.median(rates):,.0f} | {ratio:.2f} |"


def report(options, writes, warm, cold) -> str:
    total = options.records * RECORD_BYTES / 1e6
    heading = "| format | verified | MB/s, median | of raw, median |\n|---|---|---|---|"
    parts = [
        "# Reading and writing a cache's records\n",
        f"`{options.command}`, {date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{options.threads} reading threads, batches of {options.batch_size}; "
        f"{options.records} records of {RECORD_BYTES:,} bytes, {total:,.0f} MB in each format.\n",
        f"## Random reads, files in memory ({options.rounds} rounds of {options.passes} passes)\n",
        "\n".join([heading, *lines_of(warm, "raw preadv", columns=True)]) + "\n",
        f"## Random reads, files dropped from memory ({options.cold_rounds} rounds)\n",
        "\n".join([heading, *lines_of(cold, "raw preadv", columns=True)]) + "\n",
        f"## Writes, synced to the disk ({options.write_rounds} rounds)\n",
        "| format | MB/s, median | of raw, median |\n|---|---|---|",
        "\n".join(lines_of(writes, "raw write", columns=False)) + "\n",
    ]
    return "\n".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--records", type=int, default=96)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--passes", type=int, default=3, help="over all records in a round")
    arguments.add_argument("--cold-rounds", type=int, default=3)
    arguments.add_argument("--write-rounds", type=int, default=3)
    arguments.add_argument(
        "--folder", type=Path, help="on the disk to measure; else a temporary one"
    )
    arguments.add_argument("--markdown", type=Path, help="write the tables here too")
    arguments.add_argument("--json", type=Path, help="write every round's figures here")
    options = arguments.parse_args()
    options.command = "python benchmarks/cache_io.py"
    configure()
    settings = {"threads": options.threads, "batch_size": options.batch_size}
    records = [make_record(number) for number in range(options.records)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        writes = time_writes(place, records, rounds=options.write_rounds)
        check(place, records, **settings)
        shared = {"count": options.records, **settings}
        warm = time_reads(
            place, rounds=options.rounds, passes=options.passes, is_cold=False, **shared
        )
        cold = time_reads(place, rounds=options.cold_rounds, passes=1, is_cold=True, **shared)
    text = report(options, writes, warm, cold)
    Console().print(text, soft_wrap=True, markup=False)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps({"warm": warm, "cold": cold, "write": writes}, indent=1))


if __name__ == "__main__":
    main()
