"""Worker processes that may hang or crash: that costs one clip, never the run.

A thread hands one task at a time to each worker, watches the clock and the processes, replaces
workers that had to be killed, and puts results back in order. Workers are started by a fork
server that has already imported what they need and never ran anything: a new one is there at
once, and shares no threads or CUDA state with the trainer.
"""

import atexit
import collections
import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from distill.data.index import Clip
from distill.errors import InputError, StateError

if TYPE_CHECKING:
    from distill.data.load import Task, View

_PREFETCH_BATCHES = 2  # whole batches made ahead of the one the consumer holds
_START_SECONDS = 300.0  # a worker that has not begun by then never will
_MAX_FAILED_STARTS = 3
_TICK_SECONDS = 1.0


class Quarantine:
    """Clips that cannot be decoded, with the reason, in memory and as lines of JSON at `path`.

    `entries` are dicts with id, name, path, line and reason, those of earlier runs included. Of
    these only the given `clips`, or all without any, are `num_counted`, towards the share of
    `total`.
    `earlier` are entries from elsewhere, `where` is what a message calls the place of all of
    them, and `publish` is called after every new line of the file.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        total: int,
        max_share: float,
        clips: Sequence[Clip] | None = None,
        earlier: Sequence[dict[str, int | str]] = (),
        where: str | None = None,
        publish: Callable[[], None] | None = None,
    ):
        self.path = path
        self.entries: list[dict[str, int | str]] = list(earlier)
        self._where = where or path
        self._publish = publish
        self._total = total
        self._max_share = max_share
        if path is not None and path.exists():
            self.entries += parse_entries(path.read_bytes(), where=str(path))
        self._ids = {entry["id"] for entry in self.entries}
        earlier = self._ids if clips is None else {clip.id for clip in clips if clip in self}
        self.num_counted = len(earlier)
        self._is_mended = False

    def __contains__(self, clip: Clip) -> bool:
        return clip.id in self._ids

    def add(self, clip: Clip, reason: str) -> None:
        """Record a clip. Raises `StateError` once more than the allowed share is in."""
        if clip in self:
            return
        entry = {
            "id": clip.id,
            "name": clip.name,
            "path": clip.path,
            "line": clip.line,
            "reason": reason,
        }
        self._ids.add(clip.id)
        self.entries.append(entry)
        self.num_counted += 1
        if self.path is not None:
            self._append(self.path, json.dumps(entry, ensure_ascii=False) + "\n")
            if self._publish is not None:
                self._publish()
        self.check()

    def _append(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_mended:
                _cut_half_line(path)
                self._is_mended = True
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise StateError(
                f"{path}: cannot note a clip that cannot be decoded ({error.strerror}); make room, "
                "or check who may write there, and start again"
            ) from error

    def check(self) -> None:
        """Raise `StateError` where more than the allowed share is in."""
        if self.num_counted > self._max_share * self._total:
            raise StateError(
                f"{self.num_counted} of {self._total} clips cannot be decoded, more than "
                f"data.max_quarantined={self._max_share:g} allows; the last: "
                + str(self.entries[-1]["reason"])
                + (
                    f"; all are in {self._where}: mend them and delete it, or raise the share"
                    if self._where is not None
                    else "; mend them, or raise the share"
                )
            )


def _cut_half_line(path: Path) -> None:
    """Only before more is written: whoever just reads leaves the file of a running build alone."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def parse_entries(data: bytes, *, where: str) -> list[dict[str, int | str]]:
    """The entries in a quarantine's file; raises InputError for one that is something else."""
    whole = data[: data.rfind(b"\n") + 1]  # a killed run may have left half a line
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        if all(isinstance(entry["id"], int) for entry in entries):
            return entries
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{where}: not a quarantine list; remove it to try all clips again")


class ClipLoader:
    """Loads views in `workers` processes. `load` must be importable: it is sent by name."""

    def __init__(
        self,
        load: "Callable[[Task], View]",
        *,
        workers: int,
        timeout_seconds: float,
        quarantine: Quarantine,
    ):
        self._load = load
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._quarantine = quarantine
        self._keeps_workers, self._kept = False, None
        self.wait_seconds = 0.0

    @contextmanager
    def keeping_workers(self) -> "Iterator[None]":
        """Let runs inside the block take the workers of one before them that came to its end."""
        self._keeps_workers = True
        try:
            yield
        finally:
            self._keeps_workers = False
            if (kept := self._take_kept()) is not None:
                kept.stop()

    def _take_kept(self) -> "_Pool | None":
        kept, self._kept = self._kept, None
        return kept

    def _start_pool(self) -> "_Pool":
        kept = self._take_kept()
        if kept is not None and kept.is_alive():
            return kept
        if kept is not None:  # its workers were killed meanwhile
            kept.stop()
        pool = _Pool(self._load, self._workers, self._timeout_seconds, self._quarantine)
        pool.start()
        # A run that is left by an exception of the consumer's is still there when Python ends,
        # which would wait for workers that ignore its signal.
        atexit.register(pool.stop)
        return pool

    def run(self, batches: "Iterable[Sequence[Task]]") -> "Iterator[list[tuple[Task, View]]]":
        """The views of each batch, in order; failed clips are left out and quarantined.

        Raises `StateError` when too many clips fail, or workers cannot be started.
        """
        pool, source = self._start_pool(), iter(batches)
        try:
            num_waiting = 0
            while True:
                while num_waiting <= _PREFETCH_BATCHES:
                    tasks = next(source, None)
                    if tasks is None:
                        break
                    pool.submit(tasks)
                    num_waiting += 1
                if num_waiting == 0:
                    if self._keeps_workers and self._kept is None:
                        self._kept, pool = pool, None
                    return
                start = time.perf_counter()
                items = pool.take()
                self.wait_seconds += time.perf_counter() - start
                num_waiting -= 1
                yield items
        finally:
            if pool is not None:
                pool.stop()


@dataclasses.dataclass
class _Batch:
    tasks: "Sequence[Task]"
    views: "list[View | None]"
    num_missing: int


@dataclasses.dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    deadline: float
    is_ready: bool = False
    job: tuple[_Batch, int] | None = None


class _Pool(threading.Thread):
    """The thread that owns the workers; `submit`, `take` and `stop` are the consumer's."""

    def __init__(self, load, num_workers: int, timeout_seconds: float, quarantine: Quarantine):
        super().__init__(name="clip-loader", daemon=True)
        self._load = load
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._quarantine = quarantine
        self._inbox: collections.deque[_Batch] = collections.deque()
        self._open: collections.deque[_Batch] = collections.deque()
        self._pending: collections.deque[tuple[_Batch, int]] = collections.deque()
        self._outbox: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._failure: Exception | None = None
        self._is_stopping = False
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)

    def submit(self, tasks: "Sequence[Task]") -> None:
        self._inbox.append(_Batch(tasks, [None] * len(tasks), len(tasks)))
        self._ring.send_bytes(b"")

    def take(self) -> "list[tuple[Task, View]]":
        batch = self._outbox.get()
        if batch is None:
            raise self._failure or StateError("the loader stopped; its traceback is above")
        pairs = zip(batch.tasks, batch.views, strict=True)
        return [(task, view) for task, view in pairs if view is not None]

    def stop(self) -> None:
        atexit.unregister(self.stop)
        if self._ring.closed:  # at Python's end first, then by the run that was left open
            return
        self._is_stopping = True
        self._ring.send_bytes(b"")
        self.join()
        self._ring.close()
        self._bell.close()

    def run(self) -> None:
        try:
            while not self._is_stopping:
                self._admit()
                self._assign()
                self._deliver()
                self._wait()
        except (StateError, OSError) as error:
            self._failure = error
        finally:
            for worker in self._workers:
                _kill(worker)
            self._outbox.put(None)

    def _admit(self) -> None:
        while self._inbox:
            batch = self._inbox.popleft()
            self._open.append(batch)
            for slot, task in enumerate(batch.tasks):
                if task.clip in self._quarantine:
                    batch.num_missing -= 1
                else:
                    self._pending.append((batch, slot))

    def _assign(self) -> None:
        busy = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self._num_workers, busy + len(self._pending)):
            self._workers.append(self._start_worker())
        for worker in self._workers:
            if not worker.is_ready or worker.job is not None or not self._pending:
                continue
            batch, slot = self._pending.popleft()
            worker.job = batch, slot
            worker.deadline = time.monotonic() + self._timeout_seconds
            try:
                worker.pipe.send(batch.tasks[slot])
            except (BrokenPipeError, ConnectionResetError):  # died idle: not this clip's fault
                worker.job = None
                self._pending.appendleft((batch, slot))

    def _deliver(self) -> None:
        while self._open and self._open[0].num_missing == 0:
            self._outbox.put(self._open.popleft())

    def _wait(self) -> None:
        """Sleep until something happens, then hear all workers, and only then judge the late."""
        before = time.monotonic()
        watched = [worker for worker in self._workers if worker.job or not worker.is_ready]
        until = min((worker.deadline for worker in watched), default=before + _TICK_SECONDS)
        limit = min(max(until - before, 0.0), _TICK_SECONDS)
        pipes = {worker.pipe: worker for worker in self._workers}
        for ready in connection.wait([*pipes, self._bell], timeout=limit):
            if ready is self._bell:
                self._bell.recv_bytes()
            else:
                self._hear(pipes[ready])
        now = time.monotonic()
        if now - before > limit + _TICK_SECONDS:  # everything was suspended (Ctrl-Z, sleep)
            for worker in self._workers:
                worker.deadline += now - before - limit
        for worker in [worker for worker in watched if worker in self._workers]:
            if now > worker.deadline and (worker.job or not worker.is_ready):
                limit_seconds = self._timeout_seconds if worker.job else _START_SECONDS
                self._give_up(worker, f"ended after {limit_seconds:g} s without an answer")

    def _hear(self, worker: _Worker) -> None:
        try:
            view, reason = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self._give_up(worker, _describe_end(worker.process.exitcode))
            return
        if not worker.is_ready:
            worker.is_ready = True
            self._failed_starts = 0
            return
        self._settle(worker, view, reason)

    def _settle(self, worker: _Worker, view: "View | None", reason: str | None) -> None:
        batch, slot = worker.job
        worker.job = None
        batch.views[slot] = view
        batch.num_missing -= 1
        if view is None:
            self._quarantine.add(batch.tasks[slot].clip, reason)

    def _give_up(self, worker: _Worker, reason: str) -> None:
        _kill(worker)
        self._workers.remove(worker)
        if worker.job is not None:
            path = worker.job[0].tasks[worker.job[1]].clip.path
            self._settle(worker, None, f"{path}: its worker was {reason}")
            return
        if worker.is_ready:  # it died idle
            return
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise _cannot_start(reason)

    def _start_worker(self) -> _Worker:
        context = _context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._load), daemon=True)
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise _cannot_start(str(error)) from error
        finally:
            theirs.close()
        return _Worker(process, ours, time.monotonic() + _START_SECONDS)


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "distill.data.load"])
    return context


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _cannot_start(reason: str) -> StateError:
    return StateError(
        f"loader workers do not start ({reason}); see the traceback above; a script that loads "
        "clips has to keep its own work under `if __name__ == '__main__':`"
    )


def _describe_end(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _work(pipe: connection.Connection, load: "Callable[[Task], View]") -> None:
    """A worker's life. The first message says that it has begun, then one goes out per task."""
    # They come to all processes of a job and are the trainer's to handle; it closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    pipe.send((None, None))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            reply = load(task), None
        except InputError as error:
            reply = None, str(error)
        except MemoryError:
            reply = None, f"{task.clip.path}: not enough memory to decode it"
        pipe.send(reply)


def _end_with_parent() -> None:
    """A worker that hangs in a decoder would outlive a trainer that was killed."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
