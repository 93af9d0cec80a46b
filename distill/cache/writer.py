"""Writing records beside the teacher: packing, checksums and the disk have their own thread."""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
from torch import Tensor

from distill.cache.record import view_info
from distill.cache.shards import Field, ShardWriter, read_shard_index, shard_sizes
from distill.cache.store import Folder
from distill.data.load import Task, View
from distill.errors import StateError

QUEUED_BATCHES = 2  # a teacher that is faster than the disk waits for it

logger = logging.getLogger(__name__)


class RecordWriter:
    """Takes whole batches of records and writes them in a thread, in their order.

    Use as a context manager: leaving it, by whatever error or signal, writes what `put` has
    taken and commits the open shard. What goes wrong in the thread is raised by the next `put`
    or on leaving; from then on nothing more is written, for a batch is there as a whole or not
    at all. Where another process turns out to make records of the same `clip_ids`, a warning
    says so: it costs time alone.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        identity: dict,
        clip_ids: np.ndarray,
        shard_bytes: int,
        shard_seconds: float,
    ) -> None:
        self._folder, self._identity, self._clip_ids = folder, identity, clip_ids
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._shards: ShardWriter | None = None
        self._waiting: deque[Future] = deque()
        self._is_broken = self._has_warned = False
        self.record_bytes = 0  # written so far, in open shards too

    @property
    def committed_bytes(self) -> int:
        """Size of the shards that are closed."""
        return 0 if self._shards is None else self._shards.committed_bytes

    def __enter__(self) -> "RecordWriter":
        self._seen = set(shard_sizes(self._folder))
        self._stack = ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record-writer")
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._thread.shutdown(wait=True)
        finally:
            with self._stack:  # commits the open shard; it is gone where writing went wrong
                for done in self._waiting:
                    done.result()  # waits, too, where a signal has ended the wait above
        self._look_around()

    def put(self, items: Sequence[tuple[Task, View]], fields: dict[str, Tensor]) -> None:
        """Hand over a batch's records: fields on any device, with the batch in front."""
        self._waiting.append(self._thread.submit(self._write, items, fields))
        while self._waiting and (len(self._waiting) > QUEUED_BATCHES or self._waiting[0].done()):
            self._waiting[0].result()  # raises what went wrong
            self._waiting.popleft()

    def _write(self, items: Sequence[tuple[Task, View]], fields: dict[str, Tensor]) -> None:
        if self._is_broken:
            return
        self._is_broken = True  # until the whole batch is written
        arrays = {name: value.cpu().numpy() for name, value in fields.items()}  # waits for a GPU
        if self._shards is None:
            self._shards = self._stack.enter_context(
                ShardWriter(
                    self._folder,
                    fields=[Field(n, str(a.dtype), a.shape[1:]) for n, a in arrays.items()],
                    identity=self._identity,
                    shard_bytes=self._shard_bytes,
                    shard_seconds=self._shard_seconds,
                )
            )
        for place, (task, view) in enumerate(items):
            record = {name: array[place] for name, array in arrays.items()}
            self._shards.add(task.clip.id, task.view, record, view_info(task.clip, view))
        num_closed = self._shards.committed_shards
        self._shards.commit_if_full()  # only here, so that no shard ends inside a batch
        if self._shards.committed_shards > num_closed:
            self._look_around()
        self.record_bytes += sum(array.nbytes for array in arrays.values())
        self._is_broken = False

    def _look_around(self) -> None:
        """Warn, once, of another process that makes the same records."""
        if self._shards is None or self._has_warned:
            return
        names = set(shard_sizes(self._folder))
        others = names - self._seen - set(self._shards.names)
        self._seen |= names
        is_met = self._shards.num_replaced > 0
        for name in others:
            with suppress(StateError):  # whoever reads the cache next will say so
                found = read_shard_index(self._folder, name).clip_ids
                is_met = is_met or bool(np.isin(found, self._clip_ids).any())
        if is_met:
            self._has_warned = True
            logger.warning(
                "cache %s: another process makes the same records; nothing is lost but time: "
                "give each its own --shard i/n",
                self._folder,
            )
