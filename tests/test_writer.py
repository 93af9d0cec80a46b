"""What is written beside the training: one thing at a time, and errors are told."""

import threading

import pytest

from distill.errors import StateError
from distill.run.writer import Writer


def fail() -> None:
    raise StateError("the disk is full")


def test_a_write_waits_for_the_one_before_it_and_the_block_for_the_last():
    events, may_end = [], threading.Event()

    def slow() -> None:
        may_end.wait(60)
        events.append("first")

    with Writer() as writer:
        writer.start(slow)
        events.append("goes on")
        threading.Timer(0.05, may_end.set).start()
        writer.start(lambda: events.append("second"))
    assert events == ["goes on", "first", "second"]


def test_an_error_is_raised_once_by_whatever_comes_next():
    with Writer() as writer:
        writer.start(fail)
        with pytest.raises(StateError, match="the disk is full"):
            writer.wait()
        writer.check()
        writer.start(fail)
        with pytest.raises(StateError, match="the disk is full"):
            writer.start(lambda: None)
    with pytest.raises(StateError, match="the disk is full"), Writer() as writer:
        writer.start(fail)


def test_an_error_of_the_block_is_raised_and_that_of_the_write_logged(caplog):
    with pytest.raises(KeyError), Writer() as writer:
        writer.start(fail)
        raise KeyError
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]
