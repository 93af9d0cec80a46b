"""Memory for batches that is used again as soon as nothing refers to it any more.

Fresh memory for every batch would cost as much as reading it: the system clears each page.
"""

import contextlib
import mmap
import weakref
from collections import deque

import numpy as np


class BufferPool:
    """Hands out `size_bytes` of memory; at most `keep` unused pieces wait for their next turn."""

    def __init__(self, size_bytes: int, *, keep: int) -> None:
        self.size_bytes = size_bytes
        self._unused: deque[mmap.mmap] = deque(maxlen=keep)

    def take(self) -> np.ndarray:
        """Uint8 memory with anything in it; it comes back when the last view of it dies."""
        try:
            memory = self._unused.pop()
        except IndexError:
            memory = mmap.mmap(-1, max(self.size_bytes, 1))
            with contextlib.suppress(AttributeError, OSError):  # not on every system
                memory.madvise(mmap.MADV_HUGEPAGE)
        # Views of views refer to this array, not to the memory below it, which is no array.
        owner = np.frombuffer(memory, np.uint8)
        weakref.finalize(owner, self._unused.append, memory).atexit = False
        return owner
