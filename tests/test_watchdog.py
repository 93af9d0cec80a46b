"""What a watchdog makes of the waits that every rank has come to."""

from pathlib import Path

import pytest

from distill.run.watchdog import Watchdog

AGAIN = "; the same command goes on from the last checkpoint"


@pytest.mark.parametrize(
    ("waits", "verdict"),
    [
        ([7, 7, 6, 7], "rank 2 has not come to where the others wait"),
        ([6, 7, 7, 5], "ranks 0, 3 have not come to where the others wait"),
        ([7, None], "rank 1 has not come to where the others wait (no answer)"),
        ([7, None, 6], "ranks 1, 2 have not come to where the others wait"),
        ([7, 7], "all ranks wait for each other: look at the network"),
    ],
)
def test_who_is_behind_is_named(waits, verdict):
    assert Watchdog(Path("run"), minutes=1)._verdict(waits) == verdict + AGAIN


def test_a_process_alone_is_not_watched():
    with Watchdog(Path("run"), minutes=1e-9) as watchdog:
        assert watchdog._thread is None
