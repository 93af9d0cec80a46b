"""Ctrl-C, SIGTERM and SIGUSR1 as a request that a run grants at the next step.

SIGUSR1 is what `sbatch --signal=USR1@120` sends ahead of the end, and means what SIGTERM does.
"""

import signal
import threading
from types import FrameType

from distill.dist import joined_part

# Of a scheduler: their exit code is one, by which a job script knows that the job can go on.
ENDINGS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SystemExit):
    """A signal came and the run was saved; the exit code is 130 after SIGINT, otherwise 143."""


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag for the loop; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for signum in (signal.SIGINT, *ENDINGS):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, _: FrameType | None) -> None:
        self.signum = signal.SIGTERM if signum in ENDINGS else signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self, signum: int | None = None) -> None:
        """Raise Interrupted if a signal came here, or at another process that told its `signum`."""
        signum = self.signum if signum is None else signum
        if signum:
            raise Interrupted(128 + signum)

    def check_alone(self) -> None:
        """As `check`, unless others take part: they would wait for the process that stops."""
        if joined_part().count == 1:
            self.check()
