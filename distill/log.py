"""What a run tells: progress on the one console, metrics.jsonl and TensorBoard."""

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import rich
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from distill.errors import InputError, StateError

LINE_SECONDS = 30.0  # between two progress lines where there is no terminal to redraw

_live: list[Progress] = []  # a console redraws one display, so inner bars join the outer one's
_lines: list["LineBar"] = []


def configure(level: int = logging.INFO, *, speaker: str = "") -> None:
    """Send the package's log messages to the console; the command line calls this once.

    `speaker` comes before each of them.
    """
    logger = logging.getLogger("distill")
    if not logger.handlers:
        handler = RichHandler(console=rich.get_console(), show_path=False, log_time_format="%X")
        handler.setFormatter(logging.Formatter(f"{speaker}%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class _FileHandler(logging.FileHandler):
    """Writes where it can: a full disk is for those to report who cannot go on without room."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, _: logging.LogRecord) -> None:
        """Say nothing."""


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Write what the package logs in the block to a file too, and the error that ends it.

    There is no file before there is something to write.
    """
    logger = logging.getLogger("distill")
    handler = _FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except (InputError, StateError) as error:
        _write_error(handler, str(error))
        raise
    except Exception as error:
        _write_error(handler, "".join(traceback.format_exception(error)).rstrip())
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def _write_error(handler: logging.Handler, text: str) -> None:
    """To the file alone: the console gets the error from whoever ends the process."""
    handler.handle(logging.LogRecord("distill", logging.ERROR, "", 0, text, None, None))


class Bar:
    """A running count on the console. `advance` is cheap enough for every step."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display, self._task = display, task

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._display.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show `text` behind the bar until the next note."""
        self._display.update(self._task, note=text)


class SilentBar(Bar):
    """What counts for nobody to see."""

    def __init__(self) -> None:
        """Nothing to show."""

    def advance(self, count: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


class LineBar(Bar):
    """The same where nothing can be redrawn (a pipe, a log file): a line now and then."""

    def __init__(self, title: str, *, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._note, self.has_printed = "", False
        self._start = self._printed = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self._printed >= LINE_SECONDS:
            self.print()

    def note(self, text: str) -> None:
        self._note = text

    def print(self) -> None:
        """Write where the count stands, its rate and the time left."""
        self._printed, self.has_printed = time.monotonic(), True
        rate = (self.done - self._first) / max(self._printed - self._start, 1e-9)
        parts = [f"{self.title} {self.done}/{self.total} {self.unit}"]
        parts.append(f"{rate:.2f} {self.unit}/s")
        if rate > 0 and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        rich.get_console().print(
            "  ".join([*parts, self._note]).rstrip(), markup=False, highlight=False, soft_wrap=True
        )


def size_text(size_bytes: float) -> str:
    """A size for people to read, in the unit that suits it."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes"))
    unit, name = next((unit, name) for unit, name in units if size_bytes >= unit)
    return f"{size_bytes / unit:.2f} {name}" if unit else f"{size_bytes:.0f} {name}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} {task.fields['unit']}/s")


@contextmanager
def progress(title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """Show a bar with rate and time left while the block runs; bars may be nested."""
    console = rich.get_console()
    if not console.is_terminal:
        bar = LineBar(title, total=total, unit=unit, done=done)
        is_inner = bool(_lines)
        _lines.append(bar)
        try:
            yield bar
        finally:
            _lines.pop()
        if bar.has_printed or not is_inner:
            bar.print()
        return
    if _live:
        display = _live[0]
    else:
        display = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        display.start()
    _live.append(display)
    task = display.add_task(title, total=total, completed=done, unit=unit, note="")
    try:
        yield Bar(display, task)
    finally:
        _live.pop()
        display.refresh()
        if _live:
            display.remove_task(task)
        else:
            display.stop()


class RunLog:
    """Writes metrics to `folder`/metrics.jsonl and `folder`/tensorboard.

    `step` is where the run stands: what an interrupted run wrote about later steps is taken back,
    because those steps are about to be done again. So is the end of `epoch`, the one that the run
    stands in, whose checks come without a loss.
    """

    def __init__(self, folder: Path, *, step: int, epoch: int = 0) -> None:
        # TensorBoard takes a second to import, which only a run has to pay.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if _is_past(json.loads(line), step, epoch)]
        partial = folder / ".metrics.jsonl.tmp"
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one line; names with a slash, such as `val/top1`, form groups in TensorBoard."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Show in TensorBoard how values spread."""
        self._board.add_histogram(name, values, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture uint8 [H,W,3] in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def settings(self, values: Mapping[str, float | str | bool]) -> None:
        """Settings for TensorBoard's table of runs, beside the loss."""
        from torch.utils.tensorboard.summary import hparams

        # Not `add_hparams`, which makes a second run of it.
        for part in hparams(dict(values), {"train/loss": 0.0})[:2]:
            self._board.file_writer.add_summary(part)

    def close(self) -> None:
        """Write out what TensorBoard still buffers."""
        self._lines.close()
        self._board.close()


def _is_past(line: Mapping[str, float], step: int, epoch: int) -> bool:
    return line["step"] <= step and ("loss" in line or line.get("epoch", epoch) < epoch)


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a kill may have cut the last one short."""
    if not path.exists():
        return []
    return [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
