"""The thread that writes: order, errors, signals, and a writer that is killed again and again."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import task, view

from distill.cache import writer as cache_writer
from distill.cache.index import load_index
from distill.cache.shards import ShardWriter, shard_sizes
from distill.cache.store import open_folder
from distill.cache.writer import QUEUED_BATCHES, RecordWriter
from distill.errors import StateError

FAULTS = Path(__file__).parents[1] / "benchmarks" / "cache_faults.py"
IDENTITY = {"made by": "a test"}


def make_writer(path, *, clip_ids=(), shard_bytes=2**30):
    return RecordWriter(
        open_folder(path),
        identity=IDENTITY,
        clip_ids=np.array(clip_ids, np.int64),
        shard_bytes=shard_bytes,
        shard_seconds=60.0,
    )


def put(writer, *numbers):
    """Hand over a batch of these clips; a record's one field is its clip's number."""
    fields = {"pooled": torch.tensor(numbers, dtype=torch.float32)[:, None]}
    writer.put([(task("clip", number), view(number)) for number in numbers], fields)


def committed(path):
    return sorted(load_index(open_folder(path), IDENTITY).clip_ids.tolist())


def failing(monkeypatch, *, at):
    """Make the disk full at a clip; returns what was written, in order."""
    written, add = [], ShardWriter.add

    def add_until(self, clip_id, *arguments):
        if clip_id == at:
            self._drop()
            raise StateError("cache c: a shard: cannot be written (No space left on device)")
        written.append(clip_id)
        add(self, clip_id, *arguments)

    monkeypatch.setattr(ShardWriter, "add", add_until)
    return written


def test_batches_are_written_in_their_order_beside_the_caller(tmp_path, monkeypatch):
    threads, written = set(), failing(monkeypatch, at=None)
    look_around = RecordWriter._look_around
    monkeypatch.setattr(
        RecordWriter,
        "_look_around",
        lambda self: (threads.add(threading.current_thread().name), look_around(self)),
    )
    with make_writer(tmp_path, shard_bytes=1) as writer:
        for number in range(0, 20, 2):
            put(writer, number, number + 1)
    assert written == committed(tmp_path) == list(range(20))
    assert threads == {"record-writer_0", "MainThread"}
    assert len(shard_sizes(open_folder(tmp_path))) == 10
    assert writer.committed_bytes == sum(shard_sizes(open_folder(tmp_path)).values())
    assert writer.record_bytes == 20 * 4


def test_a_teacher_that_is_faster_than_the_disk_waits(tmp_path, monkeypatch):
    """The disk is held up: with one batch in its hands it lets so many more be queued."""
    gate, handed = threading.Event(), []
    add = ShardWriter.add

    def add_later(self, *arguments):
        gate.wait(30)
        add(self, *arguments)

    monkeypatch.setattr(ShardWriter, "add", add_later)

    def hand_over():
        with make_writer(tmp_path) as writer:
            for number in range(10):
                put(writer, number)
                handed.append(number)

    caller = threading.Thread(target=hand_over)
    caller.start()
    deadline = time.monotonic() + 30
    while len(handed) < QUEUED_BATCHES and time.monotonic() < deadline:
        time.sleep(0.005)
    caller.join(0.1)
    assert handed == list(range(QUEUED_BATCHES))
    gate.set()
    caller.join(30)
    assert committed(tmp_path) == list(range(10))


def test_an_error_in_the_thread_stops_the_caller_and_everything_after_it(tmp_path, monkeypatch):
    """Clip 4 fails in the middle of its batch; batches that were queued behind are not written."""
    written = failing(monkeypatch, at=4)
    message = r"^cache c: a shard: cannot be written \(No space"
    with pytest.raises(StateError, match=message), make_writer(tmp_path) as writer:
        for number in range(0, 100, 2):
            put(writer, number + 1, number)
    assert written == [1, 0, 3, 2, 5]
    assert committed(tmp_path) == []
    assert list(tmp_path.glob("open-*")) == []


def test_an_error_after_the_last_batch_is_raised_on_leaving(tmp_path, monkeypatch):
    failing(monkeypatch, at=0)
    message = "No space left on device"
    with pytest.raises(StateError, match=message), make_writer(tmp_path) as writer:
        put(writer, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StateError, OSError])
def test_what_was_handed_over_is_committed_whatever_ends_the_build(tmp_path, kind):
    with pytest.raises(kind), make_writer(tmp_path) as writer:
        put(writer, 0, 1)
        put(writer, 2, 3)
        raise kind
    assert committed(tmp_path) == [0, 1, 2, 3]


def test_a_signal_while_it_leaves_does_not_lose_the_open_shard(tmp_path, monkeypatch):
    shutdown, add = cache_writer.ThreadPoolExecutor.shutdown, ShardWriter.add
    calls = []

    def add_slowly(self, *arguments):
        time.sleep(0.05)
        add(self, *arguments)

    def interrupted(self, wait):
        calls.append(wait)
        if len(calls) == 1:
            raise KeyboardInterrupt
        shutdown(self, wait)

    monkeypatch.setattr(ShardWriter, "add", add_slowly)
    monkeypatch.setattr(cache_writer.ThreadPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt), make_writer(tmp_path) as writer:
        put(writer, 0, 1)
    assert committed(tmp_path) == [0, 1]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("others", [(0, 1), (1, 2)])
def test_two_that_make_the_same_records_are_told(tmp_path, caplog, others):
    """The same shard to the last bit replaces the other's; another holds a record of ours."""
    with (
        caplog.at_level(logging.WARNING),
        make_writer(tmp_path, clip_ids=[0, 1, 3], shard_bytes=1) as writer,
    ):
        with make_writer(tmp_path, clip_ids=[7]) as other:
            put(other, *others)
        put(writer, 0, 1)
        put(writer, 3)
    assert warnings_of(caplog) == [
        f"cache {tmp_path}: another process makes the same records; nothing is lost but time: "
        "give each its own --shard i/n"
    ]


def test_other_parts_of_a_build_are_no_news(tmp_path, caplog):
    with make_writer(tmp_path) as earlier:
        put(earlier, 0, 9)
    with caplog.at_level(logging.WARNING), make_writer(tmp_path, clip_ids=[0, 1]) as writer:
        with make_writer(tmp_path, clip_ids=[2]) as other:
            put(other, 2)
        put(writer, 0, 1)
    assert warnings_of(caplog) == []
    assert committed(tmp_path) == [0, 1, 2, 9]


def test_a_writer_that_is_killed_at_random_loses_at_most_its_open_shard(tmp_path):
    """What the benchmark does a thousand times; it ends with a traceback at a broken promise."""
    results = tmp_path / "results.json"
    command = [sys.executable, FAULTS, "writer", "--kills", "15", "--seed", "1", "--json", results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(results.read_text())["writer"]
    assert counts["kills"] == 15
    assert counts["records"] > 100
