"""What is written beside the training, by a thread of its own."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Writer:
    """Writes one thing at a time while the caller goes on; the end of the block waits for it.

    What goes wrong in a write is raised by the next `check` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
            if self._error is not None and self._error is not error:
                logger.error("%s", self._error)  # beside the error that the block ends with

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, after the end of what is being written."""
        self.wait()
        # A daemon, so that Ctrl-C in the middle of a wait that lasts too long ends the process.
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything has by now."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Go on when nothing is being written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised again where the run can stop
            self._error = error
