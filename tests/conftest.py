"""What every test starts from."""

import os

os.environ |= {
    # Before torch is imported: one thread in every process, so that all of them add up floats in
    # the same order, and tests side by side do not wait for each other's threads.
    "OMP_NUM_THREADS": "1",
    # Before the console is made: wide enough for every table.
    "COLUMNS": "200",
}
