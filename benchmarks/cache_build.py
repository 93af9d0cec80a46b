"""What writing costs a build: batches of full records at the rate at which a fast GPU brings them.

    python benchmarks/cache_build.py > benchmarks/results/cache_build.md

The teacher is a pause, for a GPU leaves the CPU alone: as long as a batch of 16 clips takes at half
of an H100's peak. Records are those of a 1B teacher at 4 bits and hold noise. Three arms take
turns: no writing, writing between two batches, and the build's own thread.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distill.cache.shards import Field, ShardWriter
from distill.cache.store import LocalFolder
from distill.cache.writer import RecordWriter
from distill.data.index import Clip
from distill.data.load import Task, View

CLIPS_PER_SECOND = 97  # a 1B teacher at half of an H100's bf16 peak
BATCH, TOKENS, LAYERS, WIDTH = 16, 411, 6, 1408
IDENTITY = {"made by": "benchmarks/cache_build.py"}
SHARD_BYTES = 512 * 2**20


def make_fields() -> dict[str, torch.Tensor]:
    """A batch of records as the codec leaves them."""
    noise = np.random.default_rng(0)
    rows = (BATCH, LAYERS, TOKENS)
    return {
        "tokens": torch.from_numpy(noise.integers(0, 2048, (BATCH, TOKENS - 1), dtype=np.int16)),
        "patches": torch.from_numpy(
            noise.integers(0, 256, (BATCH, TOKENS - 1, 588), dtype=np.uint8)
        ),
        "codes": torch.from_numpy(noise.integers(0, 256, (*rows, WIDTH // 2), dtype=np.uint8)),
        "scales": torch.from_numpy(noise.random(rows, dtype=np.float32)),
        "pooled": torch.from_numpy(noise.random((BATCH, 768), dtype=np.float32)).half(),
        "attention": torch.from_numpy(noise.random((BATCH, 2048), dtype=np.float32)),
    }


def make_items(batch: int) -> list[tuple[Task, View]]:
    view = View(
        pixels=np.zeros((3, 1, 1, 1), np.uint8),
        frames=np.arange(8),
        pts_seconds=np.arange(8) / 25,
        crop=(0, 0, 224, 224),
        flip=False,
        decoder="none",
    )
    ids = range(batch * BATCH, (batch + 1) * BATCH)
    return [(Task(Clip(id=i, path=f"/{i}.mp4", name=f"{i}.mp4")), view) for i in ids]


def run(folder: Path, arm: str, *, batches: int, pause_seconds: float) -> float:
    """Seconds that a build of so many batches takes, its last shard committed."""
    fields, place = make_fields(), LocalFolder(folder)
    started = time.perf_counter()
    if arm == "thread":
        with RecordWriter(
            place,
            identity=IDENTITY,
            clip_ids=np.empty(0, np.int64),
            shard_bytes=SHARD_BYTES,
            shard_seconds=300.0,
        ) as writer:
            for batch in range(batches):
                time.sleep(pause_seconds)
                writer.put(make_items(batch), fields)
    elif arm == "between":
        arrays = {name: value.numpy() for name, value in fields.items()}
        layout = [Field(name, str(a.dtype), a.shape[1:]) for name, a in arrays.items()]
        with ShardWriter(
            place,
            fields=layout,
            identity=IDENTITY,
            shard_bytes=SHARD_BYTES,
            shard_seconds=300.0,
        ) as shards:
            for batch in range(batches):
                time.sleep(pause_seconds)
                for number, (task, _) in enumerate(make_items(batch)):
                    record = {name: array[number] for name, array in arrays.items()}
                    shards.add(task.clip.id, 0, record, {"name": task.clip.name})
                shards.commit_if_full()
    else:
        for batch in range(batches):
            time.sleep(pause_seconds)
            make_items(batch)
    return time.perf_counter() - started


def measure(batches: int, repeats: int, say: Callable[[str], object]) -> None:
    arms: dict[str, list[float]] = {"nothing": [], "between": [], "thread": []}
    pause_seconds = BATCH / CLIPS_PER_SECOND
    for _ in range(repeats):
        for arm, seconds in arms.items():
            with tempfile.TemporaryDirectory(prefix="cache-build-") as folder:
                seconds.append(run(Path(folder), arm, batches=batches, pause_seconds=pause_seconds))
    size = sum(value.nbytes for value in make_fields().values()) * batches
    base = statistics.median(arms["nothing"])
    titles = {
        "nothing": "nothing is written",
        "between": "written between two batches",
        "thread": "written by the build's thread",
    }
    say("| | seconds, median | over nothing written | MB/s |\n|---|---|---|---|\n")
    for arm, seconds in arms.items():
        median = statistics.median(seconds)
        rate = "" if arm == "nothing" else f"{size / median / 1e6:.0f}"
        say(f"| {titles[arm]} | {median:.2f} | {100 * (median / base - 1):+.1f} % | {rate} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    say = sys.stdout.write
    say("# What writing costs a build\n\n")
    say(
        f"`python benchmarks/cache_build.py --batches {options.batches} --repeats "
        f"{options.repeats}`, on two cores of an Intel Xeon shared with other jobs, local disk. A "
        f"teacher that brings {CLIPS_PER_SECOND} clips a second is stood for by a pause.\n\n"
    )
    measure(options.batches, options.repeats, say)


if __name__ == "__main__":
    main()
