"""Ends a job of several processes in which nothing moves, and says who does not."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from distill.dist import EXIT_LOST, joined_part

POLL_SECONDS = 1.0
ANSWER_SECONDS = 15.0  # for the watchdogs of all processes, which bark at about the same time
SHOWN_CLIPS = 64


class Watchdog:
    """A thread beside a run's loop, which has to `beat` at least every `minutes`.

    When it does not, every process writes the stacks of its threads and the clips it was on to
    stderr, and ends; so torchrun's `--max-restarts` or the queue may start the job again. Alone a
    process is not watched. Time during which the whole process was stopped does not count.
    """

    def __init__(self, folder: Path, *, minutes: float) -> None:
        self.folder, self.limit_seconds = folder, 60 * minutes
        self.step, self.clip_ids = 0, torch.empty(0, dtype=torch.int64)
        self.names: Callable[[list[int]], list[str]] = lambda ids: []
        self._waited_seconds = 0.0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if joined_part().count > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Something has been done."""
        self._waited_seconds = 0.0

    def begin(self, step: int, clip_ids: Tensor, names: Callable[[list[int]], list[str]]) -> None:
        """A step on these clips [B] begins."""
        self.step, self.clip_ids, self.names = step, clip_ids, names
        self.beat()

    def _watch(self) -> None:
        poll = min(POLL_SECONDS, self.limit_seconds / 4)
        while not self._end.wait(poll):
            self._waited_seconds += poll
            if self._waited_seconds > self.limit_seconds:
                self._bark()
                os._exit(EXIT_LOST)  # the main thread may be anywhere, and deaf

    def _bark(self) -> None:
        part = joined_part()
        clips = self.names(self.clip_ids.tolist())
        more = f" and {len(clips) - SHOWN_CLIPS} more" if len(clips) > SHOWN_CLIPS else ""
        _tell(
            f"{self.folder}: rank {part.index}: nothing has moved for {self.limit_seconds / 60:g} "
            f"minutes (run.hang_minutes), at step {self.step}, on the clips "
            f"{', '.join(clips[:SHOWN_CLIPS])}{more}; its stacks:"
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        _tell(f"{self.folder}: {self._verdict(waits_of_all(part.index, part.count))}")

    def _verdict(self, waits: list[int | None]) -> str:
        """What the numbers of waits that each rank has come to, None of no answer, say."""
        told = [count for count in waits if count is not None]
        late = [rank for rank, count in enumerate(waits) if count is None or count < max(told)]
        then = "the same command goes on from the last checkpoint"
        if not late:
            return f"all ranks wait for each other: look at the network; {then}"
        ranks = f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
        silent = " (no answer)" if all(waits[rank] is None for rank in late) else ""
        verb = "have" if len(late) > 1 else "has"
        return f"{ranks} {verb} not come to where the others wait{silent}; {then}"


def waits_of_all(rank: int, count: int) -> list[int | None]:
    """How many words with the others every rank has begun; None of those that do not answer."""
    group = distributed.distributed_c10d._get_default_group()
    store = distributed.distributed_c10d._get_default_store()
    found: list[int | None] = [None] * count
    found[rank] = group._get_sequence_number_for_group()
    patience = timedelta(seconds=ANSWER_SECONDS)
    with suppress(RuntimeError):  # the store is gone with its process
        store.set(f"hang/{rank}", str(found[rank]))
        for other in range(count):
            with suppress(distributed.DistStoreError):  # too late
                store.wait([f"hang/{other}"], patience)
                found[other] = int(store.get(f"hang/{other}"))
        # All have to have read before the first process ends, and with it perhaps the store.
        store.set(f"hang/{rank}/read", "")
        told = [other for other, waits in enumerate(found) if waits is not None]
        store.wait([f"hang/{other}/read" for other in told], patience)
    return found


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
