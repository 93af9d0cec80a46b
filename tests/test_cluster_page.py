"""docs/cluster.md says what its script does; tests/test_docs.py reads its commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/cluster.md").read_text()


def test_the_page_and_the_script_wait_for_the_same_time():
    script = (ROOT / "docs/slurm.sbatch").read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", script, re.MULTILINE)
    assert f"sbatch --signal=USR1@{seconds}" in PAGE
    assert f"{seconds} seconds there" in PAGE
