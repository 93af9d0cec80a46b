"""What every test starts from."""

import os
import sys

import pytest

os.environ |= {
    # Before torch is imported: one thread in every process, so that all of them add up floats in
    # the same order, and tests side by side do not wait for each other's threads.
    "OMP_NUM_THREADS": "1",
    # Before a console is made: wide enough for every table.
    "COLUMNS": "200",
}


@pytest.fixture(autouse=True)
def plain_console():
    """The one console as it begins, whatever a command before made of it."""
    if "rich" in sys.modules:  # the kernels do without it
        sys.modules["rich"].reconfigure()
