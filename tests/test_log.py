"""metrics.jsonl and TensorBoard hold what was written, also over a resume; bars work anywhere."""

import io
import json
import logging
import math

import pytest
import rich
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill import log
from distill.errors import StateError
from distill.log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def test_both_hold_every_value(tmp_path):
    run_log = RunLog(tmp_path, step=0)
    run_log.write(5, {"loss": 4.0, "layer_00": 2.5})
    run_log.write(10, {"loss": 3.5, "val/top1": 50.0})
    run_log.close()
    assert lines(tmp_path) == [
        {"step": 5, "loss": 4.0, "layer_00": 2.5},
        {"step": 10, "loss": 3.5, "val/top1": 50.0},
    ]
    assert scalars(tmp_path) == {
        "train/loss": [(5, 4.0), (10, 3.5)],
        "train/layer_00": [(5, 2.5)],
        "val/top1": [(10, 50.0)],
    }


def test_a_resume_takes_back_the_steps_that_are_done_again(tmp_path):
    first = RunLog(tmp_path, step=0)
    for step in (2, 4, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a kill
    second = RunLog(tmp_path, step=4)
    second.write(6, {"loss": 60.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2), (4, 4), (6, 60)]
    assert scalars(tmp_path)["train/loss"] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_a_resume_takes_back_the_checks_of_an_epoch_that_ends_again(tmp_path):
    """Saved after the last step of epoch 1, killed when its checks were written."""
    first = RunLog(tmp_path, step=0)
    for epoch, step in ((0, 2), (1, 4)):
        first.write(step, {"epoch": epoch, "loss": 1.0})
        first.write(step, {"epoch": epoch, "val/top1": 50.0})
    first.close()
    RunLog(tmp_path, step=4, epoch=1).close()
    found = [(line["step"], "loss" in line) for line in lines(tmp_path)]
    assert found == [(2, True), (2, False), (4, True)]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    run_log = RunLog(tmp_path, step=0)
    run_log.write(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    run_log.close()


@pytest.fixture
def console(monkeypatch):
    def use(**settings) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(rich, "_console", Console(file=text, width=100, **settings))
        return text

    return use


def test_without_a_terminal_there_is_a_line_now_and_then(console, monkeypatch):
    text = console()
    clock = iter([0.0, 10.0, 40.0, 40.0, 50.0, 100.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with log.progress("cache teacher", total=10, unit="clips", done=2) as bar:
        bar.advance(2)  # at 10 s: too soon for a line
        bar.note("loss 3.1")
        bar.advance(2)  # at 40 s
        bar.advance(4)  # at 50 s
    assert text.getvalue().splitlines() == [
        "cache teacher 6/10 clips  0.10 clips/s  0:00:40 left  loss 3.1",
        "cache teacher 10/10 clips  0.08 clips/s  loss 3.1",
    ]


def test_short_inner_bars_do_not_fill_a_log_file(console):
    text = console()
    with log.progress("train", total=2, unit="steps") as outer:
        for _ in range(2):
            with log.progress("evaluate", total=1, unit="views") as inner:
                inner.advance()
            outer.advance()
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == ["train 2/2 steps"]


def test_on_a_terminal_bars_nest_and_show_count_rate_and_note(console):
    text = console(force_terminal=True)
    with log.progress("train", total=4, unit="steps") as outer:
        for _ in range(2):
            outer.advance()
            outer.note("loss 3.1")
            with log.progress("evaluate", total=3, unit="views") as inner:
                inner.advance(3)
        assert "3/3" in text.getvalue()
    shown = text.getvalue()
    assert "train" in shown and "2/4" in shown and "loss 3.1" in shown and "steps/s" in shown
    assert not log._live
    with log.progress("again", total=1, unit="clips") as bar:
        bar.advance()
    assert "again" in text.getvalue()


def test_an_error_inside_a_bar_frees_the_console(console):
    console(force_terminal=True)
    with pytest.raises(KeyError), log.progress("train", total=4, unit="steps"):
        raise KeyError
    assert not log._live


def test_a_file_keeps_what_is_said_and_the_error_that_ends_a_run(tmp_path):
    path, logger = tmp_path / "log-3.txt", logging.getLogger("distill.test")
    with log.kept_in(path):
        pass
    assert not path.exists()
    with pytest.raises(StateError), log.kept_in(path):
        logger.warning("videos/7.mp4: cannot be decoded")
        raise StateError("step 2: loss nan")
    with pytest.raises(ZeroDivisionError), log.kept_in(path):
        raise ZeroDivisionError
    logger.warning("after the end")
    first, second, *rest = path.read_text().splitlines()
    assert first.endswith(" WARNING videos/7.mp4: cannot be decoded")
    assert second.endswith(" ERROR step 2: loss nan")
    assert rest[0].endswith(" ERROR Traceback (most recent call last):")
    assert rest[-1] == "ZeroDivisionError"


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("distill"), "handlers", [])
    with log.kept_in(tmp_path / "none" / "log.txt"):
        logging.getLogger("distill.test").warning("heard by nobody")
    assert capsys.readouterr().err == ""


def test_configure_sends_messages_to_the_console_once(console):
    text = console()
    logger = logging.getLogger("distill")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers.clear()
    try:
        log.configure(speaker="rank 3: ")
        log.configure()
        logging.getLogger("distill.train").info("runs/x: goes on after step %d", 12)
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
    assert text.getvalue().count("rank 3: runs/x: goes on after step 12") == 1


def test_non_finite_values_do_not_break_the_line(tmp_path):
    run_log = RunLog(tmp_path, step=0)
    run_log.write(1, {"grad_norm": math.inf})
    run_log.close()
    assert lines(tmp_path) == [{"step": 1, "grad_norm": math.inf}]
