"""Opening the index of a cache of ten million records: seconds and memory.

    python benchmarks/cache_index.py --markdown benchmarks/results/cache_index.md

8,000 shards of 1,250 records each, with real indexes; the records themselves are holes in the
files, for opening looks at none. Each opening is a process of its own. Its memory is what it takes
beyond what it had before: at its most with the manifest's pages, as the system counts them, and in
the end without them, for those are the file's and shared by all processes that have it open.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console

from distill.cache.identity import cache_identity
from distill.cache.index import MANIFEST_FILE, load_index
from distill.cache.read import Cache
from distill.cache.sealed import sealed_header
from distill.cache.shards import Field, shard_metadata
from distill.cache.store import open_folder
from distill.data.index import clip_id, read_list
from distill.recipe_file import load_recipe

RECORD_BYTES = 2**21
VIEWS = 8
STEPS = {
    "manifest": "the manifest",
    "shards": "its shards, for want of a manifest, and writing one",
    "cache": "a cache without a list: its clips, and their rows in all views",
    "list": "the list file alone",
    "cache and list": "a cache with that list",
}


def make_recipe(folder: Path, *, has_list: bool):
    train = [f"data.train.list={folder / 'train.csv'}"] if has_list else []
    cache = [f"folder={folder / 'cache'}", f"views={VIEWS}", "codes=fp16", "teacher_hash=unknown"]
    return load_recipe("S14", train + [f"objective.cache.{setting}" for setting in cache])


def write_shards(folder: Path, *, records: int) -> None:
    """Shards of all views of random clips, as a build that goes view by view leaves them."""
    names = [f"v/{number}.mp4" for number in range(records // VIEWS)]
    (folder / "train.csv").write_text("".join(f"{name},0\n" for name in names))
    ids = np.array([clip_id(name) for name in names], np.int64)
    identity = cache_identity(make_recipe(folder, has_list=False))
    metadata = shard_metadata([Field("tokens", "int16", (410,))], identity)
    (folder / "cache").mkdir()
    stream = np.random.default_rng(0)
    for number, start in enumerate(range(0, records, 1250)):
        places = np.arange(start, min(start + 1250, records))
        arrays = {
            "offsets": np.arange(len(places) + 1) * RECORD_BYTES,
            "clip_ids": ids[places % len(ids)],
            "views": places // len(ids),
            "xxh3": stream.integers(0, 2**64 - 1, len(places), np.uint64),
        }
        header = sealed_header(metadata, arrays, before={"records": int(arrays["offsets"][-1])})
        with (folder / "cache" / f"shard-{number:016x}.safetensors").open("wb") as file:
            file.write(header)
            file.seek(int(arrays["offsets"][-1]), 1)
            for array in arrays.values():
                file.write(array.data)


def memory(name: str) -> float:
    """MB that this process has, by a name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def run_step(step: str, folder: Path) -> dict[str, float]:
    """Do one step in this process."""
    recipe = make_recipe(folder, has_list="list" in step)
    identity = cache_identity(recipe)
    before, anonymous = memory("VmRSS"), memory("RssAnon")
    start, processed = time.perf_counter(), time.process_time()
    match step:
        case "manifest" | "shards":
            opened = load_index(open_folder(folder / "cache"), identity)
        case "list":
            opened = read_list(recipe.data.train)
        case _:
            opened = Cache.open(folder / "cache", recipe, identity=identity)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - processed,
        "peak_mb": memory("VmHWM") - before,
        "kept_mb": memory("RssAnon") - anonymous,
        "count": len(opened.rows) if isinstance(opened, Cache) else len(opened),
    }


def measure(step: str, folder: Path, *, repeats: int) -> dict[str, float]:
    found = []
    for _ in range(repeats):
        if step == "shards":
            (folder / "cache" / MANIFEST_FILE).unlink(missing_ok=True)
        command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


def table(rows: dict[str, dict[str, float]], *, records: int) -> str:
    lines = [
        f"# Opening the index of {records:,} records",
        "",
        f"`python benchmarks/cache_index.py`, {date.today()}, CPU, page cache warm. {VIEWS} views, "
        f"{len(range(0, records, 1250)):,} shards; medians of processes of their own.",
        "",
        "| opening | seconds | of the processor | memory at its most, MB | "
        "kept beside the file's pages, MB |",
        "|---|---|---|---|---|",
    ]
    for step, row in rows.items():
        times = f"{row['seconds']:.2f} | {row['cpu_seconds']:.2f}"
        figures = f"{times} | {row['peak_mb']:,.0f} | {row['kept_mb']:,.0f}"
        lines.append(f"| {STEPS[step]} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--records", type=int, default=10_000_000)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--markdown", type=Path, help="write the table here too")
    arguments.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.step:
        sys.stdout.write(json.dumps(run_step(options.step, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), records=options.records)
        rows = {}
        for step in ("shards", "manifest", "cache", "list", "cache and list"):
            repeats = 1 if step == "shards" else options.repeats
            rows[step] = measure(step, Path(name), repeats=repeats)
    text = table(rows, records=options.records)
    Console().print(text, soft_wrap=True)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
