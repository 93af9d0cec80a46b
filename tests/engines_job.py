"""`engines_job.py FOLDER CASE...`: what tests of engines want from processes of their own."""

import sys
from pathlib import Path

if __name__ == "__main__":  # loader workers import this file too, and do without torch
    from engines import run_all

    run_all(Path(sys.argv[1]), sys.argv[2:])
