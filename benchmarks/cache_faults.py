"""What a cache survives: kill -9 at random moments, full and read-only disks, clocks that go back.

    python benchmarks/cache_faults.py writer --kills 1000
    python benchmarks/cache_faults.py build --kills 50
    python benchmarks/cache_faults.py faults
    python benchmarks/cache_faults.py report > benchmarks/results/cache_faults.md

`writer` kills a process that only writes small records, `build` whole `distill cache-teacher`
processes, two to a cache, with their decoding workers. After every kill all that lies in the folder
is read and compared. Counts are kept in the file that `--json` names, so that a run of fewer kills
goes on where the last one stopped. Any broken promise ends the script with a traceback.
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
import yaml

from distill.cache.calibrate import read_codec, with_codec
from distill.cache.identity import MEANS_FILE, cache_identity
from distill.cache.index import CacheIndex, load_index
from distill.cache.read import Cache
from distill.cache.shards import read_shard_index, shard_sizes
from distill.cache.store import LocalFolder, remove_leftovers
from distill.cache.writer import RecordWriter
from distill.data.index import Clip
from distill.data.load import Task, View
from distill.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "cache_faults.json"
IDENTITY = {"made by": "benchmarks/cache_faults.py"}
CLIPS, BATCH = 400, 4  # of the small records
SHARD_BATCHES = 3
FORK = multiprocessing.get_context("fork")  # a writer is there at once
SIZE = {"width": 176, "depth": 5, "heads": 2, "mlp_ratio": 48 / 11, "pooled_width": 48}


TITLES = {
    "finished": "caches that were finished in the end",
    "killed writers": "writers killed",
    "kills with workers": "of them with their decoding workers",
    "most lost bytes": "bytes of the largest open file left",
    "records": "records made",
    "shards": "shards of the finished caches",
    "left: no open file": "left behind: no open file",
    "left: records being written": "left behind: a file of records",
    "left: whole, without its name yet": "left behind: a file with its header, not yet named",
}


class BrokenPromise(Exception):
    """What the cache says of itself is not so."""


def require(is_so: bool, text: str) -> None:
    if not is_so:
        raise BrokenPromise(text)


@dataclass
class Folder:
    """A cache under test: what is in it by the last look, and what was ever committed."""

    path: Path
    shards: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # inode, size, time
    owner: dict[tuple[int, int], str] = field(default_factory=dict)  # record: shard

    @property
    def records(self) -> int:
        return len(self.owner)


def expected_fields(clip_id: int, view: int) -> dict[str, np.ndarray]:
    """A record that is a function of its clip and view, of about a page."""
    random_bytes = np.random.default_rng([clip_id, view])
    return {
        "patches": random_bytes.integers(0, 256, (7, 588), dtype=np.uint8),
        "pooled": random_bytes.standard_normal(48).astype(np.float32),
    }


def look(folder: Folder, identity: dict, expected) -> int:
    """Check every promise of a folder after a kill; returns how many records are new.

    Every shard that has its name is whole, and every record in it is the expected one; what was
    committed before is untouched; and no record was made twice.
    """
    place = LocalFolder(folder.path)
    names = shard_sizes(place)
    gone = folder.shards.keys() - names.keys()
    require(not gone, f"{gone}: committed once, and gone")
    before = folder.records
    for name in names:
        status = (folder.path / name).stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if name in folder.shards:
            require(folder.shards[name] == stamp, f"{name}: committed once, and written again")
            continue
        shard = read_shard_index(place, name)
        require(shard.identity == identity, f"{name}: another identity")
        for key in zip(shard.clip_ids.tolist(), shard.views.tolist(), strict=True):
            twice = folder.owner.get(key)
            require(twice is None, f"{key}: in {twice} and again in {name}")
            folder.owner[key] = name
        folder.shards[name] = stamp
    index = load_index(place, identity)
    require(len(index) == folder.records, f"index of {len(index)}, not {folder.records}, records")
    check_records(place, index, expected, new_only=before)
    return folder.records - before


_checked: dict[str, set[str]] = {}


def check_records(place: LocalFolder, index: CacheIndex, expected, *, new_only: int) -> None:
    """Read the records of shards that were not read before, by checksum and by content."""
    if not len(index):
        return
    seen = _checked.setdefault(place.url, set()) if new_only else set()
    cache = Cache(place, index, np.zeros((1, 1), int))
    for row in range(len(index)):
        name = index.shards[index.shard[row]]
        if name in seen:
            continue
        key = int(index.clip_ids[row]), int(index.views[row])
        arrays, info = cache.read(row)
        fields, told = expected(key)
        require(told is None or info == told, f"{key}: {info}, expected {told}")
        for label, value in fields.items():
            require(np.array_equal(arrays[label], value), f"{key}: another {label}")
    _checked[place.url] = set(index.shards)


def leftovers(path: Path) -> Counter:
    """In which state a killed writer has left its open file."""
    found = Counter()
    for file in path.glob("open-*"):
        with file.open("rb") as opened:
            head = opened.read(8)
        if len(head) < 8 or not struct.unpack("<Q", head)[0]:
            found["records being written"] += 1
        else:
            found["whole, without its name yet"] += 1
    return found or Counter({"no open file": 1})


# The writer alone


def write_small(path: Path, told: mmap.mmap) -> None:
    """The process that is killed: makes what is missing, and tells what it has committed.

    `told` is -1 until it begins to write, then the bytes of its closed shards.
    """
    folder = LocalFolder(path)
    remove_leftovers(folder)
    index = load_index(folder, IDENTITY)
    clip_ids = np.arange(CLIPS, dtype=np.int64)
    missing = clip_ids[index.find(clip_ids, 0) < 0]
    size = sum(value.nbytes for value in expected_fields(0, 0).values())
    with RecordWriter(
        folder,
        identity=IDENTITY,
        clip_ids=missing,
        shard_bytes=SHARD_BATCHES * BATCH * size,
        shard_seconds=60.0,
    ) as writer:
        for start in range(0, len(missing), BATCH):
            batch = [int(clip_id) for clip_id in missing[start : start + BATCH]]
            records = [expected_fields(clip_id, 0) for clip_id in batch]
            fields = {
                name: torch.from_numpy(np.stack([record[name] for record in records]))
                for name in records[0]
            }
            told[:8] = struct.pack("<q", writer.committed_bytes)
            writer.put([(Task(small_clip(clip_id)), SMALL_VIEW) for clip_id in batch], fields)


def small_clip(clip_id: int) -> Clip:
    return Clip(id=clip_id, path=f"/{clip_id}.mp4", name=f"{clip_id}.mp4")


SMALL_VIEW = View(
    pixels=np.zeros((3, 1, 1, 1), np.uint8),
    frames=np.arange(4),
    pts_seconds=np.arange(4) / 25,
    crop=(0, 0, 56, 56),
    flip=False,
    decoder="none",
)


def expected_small(key: tuple[int, int]):
    return expected_fields(*key), None


def kill_writers(kills: int, seed: int, counts: Counter, space: Path) -> Iterator[None]:
    """Kill one writer after the other; every one goes on in the folder of the last."""
    told = mmap.mmap(-1, 8)
    started = time.monotonic()
    process = FORK.Process(target=write_small, args=(space / "whole", told))
    process.start()
    process.join()
    whole_seconds = time.monotonic() - started
    folder = None
    while counts["kills"] < kills:
        if folder is None:
            path = Path(tempfile.mkdtemp(prefix="writer-", dir=space))
            folder = Folder(path)
        stream = random.Random(f"{seed} {counts['kills']} {counts['finished']}")
        told[:8] = struct.pack("<q", -1)
        committed = sum(size for _, size, _ in folder.shards.values())
        process = FORK.Process(target=write_small, args=(folder.path, told))
        process.start()
        if stream.random() < 0.9:  # the others may die before they have begun
            while struct.unpack("<q", told[:8])[0] < 0 and process.is_alive():
                time.sleep(0.0005)
        time.sleep(stream.uniform(0, 0.25 * whole_seconds))
        process.kill()
        process.join()
        is_killed = process.exitcode == -signal.SIGKILL
        require(is_killed or process.exitcode == 0, f"a writer ended with {process.exitcode}")
        open_files = list(folder.path.glob("open-*"))
        require(len(open_files) <= 1, f"more than one open file of one writer: {open_files}")
        if is_killed:
            counts["kills"] += 1
            counts.update({f"left: {state}": n for state, n in leftovers(folder.path).items()})
            longest = max((file.stat().st_size for file in open_files), default=0)
            counts["most lost bytes"] = max(counts["most lost bytes"], longest)
        new = look(folder, IDENTITY, expected_small)
        counts["records"] += new
        now = sum(size for _, size, _ in folder.shards.values())
        require(
            now - committed >= struct.unpack("<q", told[:8])[0],
            "a shard that was told to be committed is not there",
        )
        if folder.records == CLIPS:
            check_records(
                LocalFolder(folder.path),
                load_index(LocalFolder(folder.path), IDENTITY),
                expected_small,
                new_only=0,
            )
            counts["shards"] += len(folder.shards)
            counts["finished"] += 1
            shutil.rmtree(folder.path)
            folder = None
        yield


# Whole builds


def make_videos(folder: Path, *, count: int) -> None:
    """Sixteen frames of coloured noise that drifts, 72 x 60 pixels, H.264."""
    folder.mkdir()
    for number in range(count):
        block = np.random.default_rng(number).integers(0, 256, (15, 18, 3), dtype=np.uint8)
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            video = container.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = 72, 60, "yuv420p"
            for index in range(16):
                pixels = np.roll(block, index, axis=1).repeat(4, axis=0).repeat(4, axis=1)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode())
    (folder / "train.csv").write_text("".join(f"{number}.mp4,0\n" for number in range(count)))


def build_recipe(videos: Path, folder: Path, *, views: int, shard_seconds: float) -> Recipe:
    """A tiny random teacher on real videos, with codes whose means are measured first."""
    teacher = {"size": SIZE, "random": True, "layers": 3, "interval": 1.34}
    cache = {
        "folder": str(folder),
        "views": views,
        "codes": "4bit",
        "batch_size": 2,
        "shard_minutes": shard_seconds / 60,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "train": {"list": str(videos / "train.csv")},
                "views": {"frames": 4, "image_size": 56},
                "workers": 1,
            },
            "model": {"size": {"width": 96, "depth": 4, "heads": 3, "pooled_width": 48}},
            "objective": {"kind": "distill", "teacher": teacher, "cache": cache},
            "optim": {"lr": 1e-3, "batch_size": 2, "epochs": 1},
        }
    )


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "distill", "cache-teacher", str(recipe), *options]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """A process in a group of its own, so that its workers can be killed with it."""
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)


def all_records(path: Path, recipe: Recipe) -> dict:
    """Every record of a finished cache by clip and view."""
    folder, identity = LocalFolder(path), cache_identity(recipe)
    index = load_index(folder, with_codec(identity, read_codec(folder, identity)))
    cache = Cache(folder, index, np.zeros((1, 1), int))
    return {
        (int(index.clip_ids[row]), int(index.views[row])): cache.read(row)
        for row in range(len(index))
    }


def shard_identity(path: Path, recipe: Recipe) -> dict:
    identity = cache_identity(recipe)
    return with_codec(identity, read_codec(LocalFolder(path), identity))


def kill_builds(kills: int, seed: int, counts: Counter, space: Path) -> Iterator[None]:
    """Kill one or both of the two writers of a cache, alone or with their decoding workers."""
    clips, views, writers = 32, 3, 2
    make_videos(space / "videos", count=clips)
    truth = build_recipe(space / "videos", space / "truth", views=views, shard_seconds=60)
    started = time.monotonic()
    whole = start(command(write_recipe(truth, space / "truth.yaml")), space / "log")
    wait_for_new_file(space / "truth", whole)
    begun = time.monotonic()
    require(whole.wait(600) == 0, (space / "log").read_text())
    start_seconds, work_seconds = begun - started, time.monotonic() - begun
    uninterrupted = all_records(space / "truth", truth)
    require(len(uninterrupted) == clips * views, "the uninterrupted build is not whole")
    folder = None
    while counts["kills"] < kills:
        if folder is None:
            folder = Folder(Path(tempfile.mkdtemp(prefix="build-", dir=space)))
        stream = random.Random(f"{seed} {counts['kills']} {counts['finished']}")
        recipe = build_recipe(
            space / "videos",
            folder.path,
            views=views,
            shard_seconds=stream.choice([0.1, 1.0, 60.0]),  # closed after every batch, or once
        )
        path = write_recipe(recipe, space / "recipe.yaml")
        log = space / "log"
        log.unlink(missing_ok=True)
        running = [
            start(command(path, "--shard", f"{number}/{writers}"), log)
            for number in range(1, writers + 1)
        ]
        # Some die while they are starting, most while there is something to lose.
        if stream.random() < 0.15:
            time.sleep(stream.uniform(0, start_seconds))
        else:
            for _ in range(stream.choice([1, 3, 4, 5])):  # probes and open shards come and go
                wait_for_new_file(folder.path, *running)
            time.sleep(stream.uniform(0, 0.3 * work_seconds))
        victims = stream.choice([running, running, running[:1], running[1:]])
        if not (folder.path / MEANS_FILE).exists():
            victims = running  # who is left would wait minutes for the means of who is not
        with_workers = stream.random() < 0.5
        num_killed = 0
        for process in victims:
            if process.poll() is None:
                num_killed += 1
                if with_workers:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
        open_files = list(folder.path.glob("open-*"))
        for process in running:
            process.wait(300)
            is_fine = process.returncode == 0 or process in victims
            require(is_fine, f"ended with {process.returncode}: {log.read_text()}")
        require(len(open_files) <= 2 * writers, f"too many open files: {open_files}")
        for process in running:
            wait_for_group(process.pid)
        if num_killed:
            counts["kills"] += 1
            counts["killed writers"] += num_killed
            counts["kills with workers"] += with_workers
            if read_codec(LocalFolder(folder.path), cache_identity(recipe)) is None:
                counts["kills before the means were there"] += 1
            counts.update({f"left: {state}": n for state, n in leftovers(folder.path).items()})
        if read_codec(LocalFolder(folder.path), cache_identity(recipe)) is not None:
            identity = shard_identity(folder.path, recipe)
            counts["records"] += look(folder, identity, uninterrupted.__getitem__)
        if folder.records == clips * views:
            found = all_records(folder.path, recipe)
            require(found.keys() == uninterrupted.keys(), "not the records of the whole build")
            counts["finished"] += 1
            counts["shards"] += len(folder.shards)
            shutil.rmtree(folder.path)
            folder = None
        yield


def wait_for_new_file(folder: Path, *running: subprocess.Popen) -> None:
    """Until a process has written something there, or all have ended."""
    before = set(folder.glob("*"))
    while set(folder.glob("*")) <= before and any(one.poll() is None for one in running):
        time.sleep(0.002)


def wait_for_group(group: int) -> None:
    """Decoding workers end by themselves when their writer is killed."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            require(time.monotonic() < deadline, f"process group {group} is still there")
            time.sleep(0.02)


# Other faults, each with the line it ends with


def run_faults(space: Path) -> list[dict]:
    """Every other fault once, by the shell's own means."""
    make_videos(space / "videos", count=24)
    truth = build_recipe(space / "videos", space / "truth", views=3, shard_seconds=60)
    path = write_recipe(truth, space / "truth.yaml")
    subprocess.run(command(path), check=True, capture_output=True)
    uninterrupted = all_records(space / "truth", truth)
    rows = [
        fault(space, uninterrupted) for fault in (disk_full, read_only, two_on_one_part, clock_back)
    ]
    return [{**row, "line": row["line"].replace(str(space), "caches")} for row in rows]


def said(done: subprocess.CompletedProcess) -> str:
    return done.stderr.strip() or done.stdout.strip()


def in_namespace(script: str, folder: Path, recipe: Path) -> subprocess.CompletedProcess:
    """Run a shell script as root of a mount namespace of its own."""
    quoted = " ".join(f"'{part}'" for part in command(recipe))
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script.format(folder=folder, build=quoted)],
        capture_output=True,
        text=True,
    )


def disk_full(space: Path, uninterrupted: dict) -> dict:
    """A build on a disk too small for it, and again after there is room."""
    folder = space / "full"
    folder.mkdir()
    recipe = build_recipe(space / "videos", folder, views=3, shard_seconds=0.05)
    path = write_recipe(recipe, space / "full.yaml")
    script = (
        "mount -t tmpfs -o size=400k tmpfs {folder} && {build} > /dev/null; echo code $? >&2; "
        "ls {folder} | grep -c shard- >&2; ls {folder} | grep -c open- >&2; "
        "mount -o remount,size=64m {folder} && {build} && cp {folder}/* " + str(space / "kept")
    )
    (space / "kept").mkdir()
    done = in_namespace(script, folder, path)
    line, code, shards, left = done.stderr.strip().splitlines()
    require(code == "code 2" and int(shards) > 0 and int(left) == 0, done.stderr)
    same_records(space / "kept", recipe, uninterrupted)
    return {
        "fault": "disk full (400 kB), then room for the rest",
        "line": line,
        "after": f"{shards} whole shards kept; the same command ends with equal records",
    }


def read_only(space: Path, uninterrupted: dict) -> dict:
    folder = space / "read-only"
    folder.mkdir()
    recipe = build_recipe(space / "videos", folder, views=3, shard_seconds=60)
    path = write_recipe(recipe, space / "read-only.yaml")
    script = "mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && {build}"
    done = in_namespace(script, folder, path)
    require(done.returncode == 2 and len(said(done).splitlines()) == 1, said(done))
    return {"fault": "read-only folder", "line": said(done), "after": "nothing was written"}


def two_on_one_part(space: Path, uninterrupted: dict) -> dict:
    """The same command twice at once: legal, wasteful, and said."""
    folder = space / "twice"
    recipe = build_recipe(space / "videos", folder, views=3, shard_seconds=0.15)
    path = write_recipe(recipe, space / "twice.yaml")
    both = [
        subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [process.communicate()[0] for process in both]
    require(all(process.returncode == 0 for process in both), "\n".join(told))
    same_records(folder, recipe, uninterrupted)
    text = " ".join(" ".join(told).split())  # the log's lines are wrapped
    warned = re.search(r"cache \S+: another process .*? --shard i/n", text)
    require(warned is not None, text)
    return {
        "fault": "the same part built twice at once",
        "line": warned[0],
        "after": "equal records, each of them counted once",
    }


BACKWARDS = """
import sys, time
from distill.cli import main

start, calls = time.monotonic(), [0]
def back():
    calls[0] += 1
    return start - 0.5 * calls[0]
time.monotonic = time.time = back
time.monotonic_ns = lambda: int(1e9 * back())
sys.argv[0] = "distill"
main()
"""


def clock_back(space: Path, uninterrupted: dict) -> dict:
    """A clock that goes half a second back at every look."""
    folder = space / "clock"
    recipe = build_recipe(space / "videos", folder, views=3, shard_seconds=60)
    path = write_recipe(recipe, space / "clock.yaml")
    done = subprocess.run(
        [sys.executable, "-c", BACKWARDS, "cache-teacher", str(path)],
        capture_output=True,
        text=True,
    )
    require(done.returncode == 0, said(done))
    same_records(folder, recipe, uninterrupted)
    return {
        "fault": "a clock that runs backwards",
        "line": next(line for line in done.stdout.splitlines() if "records (" in line),
        "after": "equal records",
    }


def same_records(folder: Path, recipe: Recipe, expected: dict) -> None:
    found = all_records(folder, recipe)
    require(found.keys() == expected.keys(), f"{folder}: {len(found)} of {len(expected)} records")
    for key, (arrays, info) in expected.items():
        require(found[key][1] == info, f"{folder}: {key} is another view")
        for name, value in arrays.items():
            require(np.array_equal(found[key][0][name], value), f"{folder}: {key}: other {name}")


def report(results: dict) -> str:
    """The results as a page."""
    titles = {
        "writer": "`kill -9` of a writer alone",
        "build": "`kill -9` of whole builds, two writers to a cache",
    }
    text = [
        "# What a view cache survives",
        "",
        "`python benchmarks/cache_faults.py writer --kills 1000`, `build --kills 50`, `faults`, "
        "`report`.",
        "Real processes on two cores of an Intel Xeon that others kept busy (hence the seconds), "
        "local disk; in",
        "several pieces, each of which went on from the counts of the last. After every kill each "
        "shard with a name is",
        "whole, each record in it is read and compared, nothing committed before has changed, no "
        "record is there twice,",
        "and a writer alone has left one open file at most. A cache that is finished at last is "
        "compared record by",
        "record with an uninterrupted one, and the next one is begun. A kill leaves the system's "
        "own buffers alone: that",
        "files survive a power cut rests on fsync before rename, and is not tried here.",
    ]
    for name, title in titles.items():
        if name not in results:
            continue
        counts = results[name]
        text += ["", f"## {title}", "", "| what | count |", "|---|---|"]
        text += [
            f"| {TITLES.get(key, key)} | {value:,} |"
            for key, value in counts.items()
            if key != "seconds"
        ]
        text.append("| bad reads, shards lost, records made twice | 0 |")
        text.append(f"| seconds | {counts['seconds']:,.0f} |")
    if "faults" in results:
        text += ["", "## Other faults", ""]
        for row in results["faults"]:
            text += [f"- **{row['fault']}**: {row['after']}. It says:", "", f"      {row['line']}"]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["writer", "build", "faults", "report"])
    parser.add_argument("--kills", type=int, default=20, help="in all, those of earlier runs too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if options.what == "report":
        sys.stdout.write(report(results) + "\n")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cache-faults-") as space:
        if options.what == "faults":
            results["faults"] = run_faults(Path(space))
        else:
            counts = Counter(results.get(options.what, {}))
            rounds = {"writer": kill_writers, "build": kill_builds}[options.what]
            before, started = counts["seconds"], time.monotonic()
            for _ in rounds(options.kills, options.seed, counts, Path(space)):
                counts["seconds"] = round(before + time.monotonic() - started, 1)
                results[options.what] = dict(sorted(counts.items()))
                save(results, options.json)
    save(results, options.json)


def save(results: dict, path: Path) -> None:
    """Whole or not at all: this script may be stopped, too."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main()
