"""What every test starts from."""

import os

import pytest

# Before torch is imported: one thread in every process, so that all of them add up floats in the
# same order, and tests side by side do not wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def fresh_console(monkeypatch):
    """A console that asks for its width anew."""
    monkeypatch.setattr("rich._console", None)
