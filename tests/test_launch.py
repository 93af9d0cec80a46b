"""Jobs of several processes as SLURM and torchrun start, stop and restart them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import (
    assert_alike,
    assert_same_run,
    classify,
    torchrun,
    wait_for_step,
    write_clips,
    write_recipe,
)

from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.recipe_file import load_recipe
from distill.train import train

HANG_IN_RANK_1 = """\
import os
import time

from distill import objective
from distill.run.watchdog import Watchdog

begin, forward = Watchdog.begin, objective.ClassifyObjective.forward
seen = []

def sleepy(self, batch):
    seen.append(batch)
    if os.environ["RANK"] == "1" and len(seen) == 2:
        time.sleep(1000)
    return forward(self, batch)

def impatient(self, step, *about):
    if step == 2:  # until then the recipe's time, however slow the machine
        self.limit_seconds /= 100
    begin(self, step, *about)

objective.ClassifyObjective.forward = sleepy
Watchdog.begin = impatient

if __name__ == "__main__":
    from distill.cli import main
    main()
"""

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "docs/slurm.sbatch"
STEPS = 9


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("videos"))


def recipe_of(videos: Path, folder: Path) -> Path:
    """A recipe file in the folder for a run in its `run`, with every step saved."""
    changes = {"optim__eps": 1e-4, "optim__epochs": STEPS // 3, "run__save_minutes": 1e-6}
    recipe = classify(videos, **changes)
    return write_recipe(recipe, folder / "r.yaml", folder / "run")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> dict[str, str]:
    """The environment of a batch script where `srun` and `scontrol` are ours."""
    folder = tmp_path_factory.mktemp("bin")
    commands = {
        "srun": f'exec {sys.executable} {ROOT}/tests/fake_srun.py "$@"',
        "distill": f'exec {sys.executable} -m distill "$@"',
        "scontrol": f'echo "$@" >> {folder}/told',
    }
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(10_000 + os.getpid()), "SLURM_NTASKS": "3"}
    return {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}", "TOLD": f"{folder}/told"}


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(videos, cluster, tmp_path_factory) -> Path:
    """The folder of a run by three tasks of SLURM's, with nothing between start and end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(["bash", str(SBATCH), str(recipe_of(videos, folder))], cluster)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("summary.json holds the results") == 1
    return folder / "run"


def descendants(pid: int) -> dict[int, str]:
    """All processes that a process has started, directly or not, with their command lines."""
    found = {}
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in map(int, children.read_text().split()):
        line = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip()
        found |= {child: line, **descendants(child)}
    return found


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The training processes of a job, first started first."""
    lines = descendants(process.pid).items()
    return [pid for pid, line in lines if re.search(r"-m distill train \S+$", line)]


def saved_step(run: Path) -> int:
    return load_checkpoint(latest_checkpoint(run / "checkpoints")).state["step"]


def flat(output: str) -> str:
    return re.sub(r"\s+", " ", output)


def test_tasks_of_slurm_train_together_as_one_process_alone(videos, undisturbed, tmp_path):
    train(load_recipe(recipe_of(videos, tmp_path)), tmp_path / "run")
    assert_alike(undisturbed, tmp_path / "run")


def test_a_job_told_to_end_is_queued_again_and_goes_on(videos, undisturbed, cluster, tmp_path):
    """SIGUSR1 to every process of the step, loader workers too, as SLURM sends it."""
    command = ["bash", str(SBATCH), str(recipe_of(videos, tmp_path))]
    told = Path(cluster["TOLD"])
    process = start(command, cluster)
    wait_for_step(tmp_path / "run", 2, process)
    for pid, line in descendants(process.pid).items():
        if "fake_srun" not in line:
            os.kill(pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert told.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    saved = saved_step(tmp_path / "run")
    assert 2 <= saved < STEPS
    assert f"saved after step {saved}" in flat(output)

    again = start(command, {**cluster, "SLURM_RESTART_COUNT": "1"})
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert f"goes on after step {saved}" in flat(output)
    assert told.read_text().count("requeue") == 1
    assert_same_run(tmp_path / "run", undisturbed)


def test_torchrun_restarts_a_job_of_which_a_rank_was_killed(videos, undisturbed, tmp_path):
    command = ["--max-restarts", "1", "-m", "distill", "train", str(recipe_of(videos, tmp_path))]
    process = start([sys.executable, *torchrun(3), *command])
    wait_for_step(tmp_path / "run", 2, process)
    ranks = ranks_of(process)
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    while set(ranks) & descendants(process.pid).keys():
        assert time.monotonic() < killed + 60
        time.sleep(0.05)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    step = int(re.search(r"goes on after step (\d+)", flat(output))[1])
    assert 1 <= step < STEPS  # the last save may not have been whole yet
    assert output.count("summary.json holds the results") == 1
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_error_is_not_queued_again(cluster, tmp_path):
    told = Path(cluster["TOLD"])
    before = told.read_text() if told.exists() else ""
    process = start(["bash", str(SBATCH), str(tmp_path / "none.yaml")], cluster)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert f"{tmp_path}/none.yaml: no such file" in flat(output)
    assert (told.read_text() if told.exists() else "") == before


def test_a_rank_that_hangs_is_named_with_its_stack_and_clips_and_ends_the_job(videos, tmp_path):
    (tmp_path / "main.py").write_text(HANG_IN_RANK_1)
    recipe = classify(videos, run__hang_minutes=30, optim__micro_batch=None)
    path = write_recipe(recipe, tmp_path / "r.yaml", tmp_path / "run")
    command = [sys.executable, *torchrun(2), str(tmp_path / "main.py"), "train", str(path)]
    process = start(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    told = re.findall(
        rf"{tmp_path}/run: rank (\d): nothing has moved for 0.3 minutes \(run.hang_minutes\), at "
        r"step 2, on the clips (\S+), (\S+); its stacks:",
        output,
    )
    # torchrun may end the other rank as soon as the first has told.
    ranks = {rank for rank, *_ in told}
    assert ranks and ranks <= {"0", "1"}
    assert len({clip for _, *clips in told for clip in clips}) == 2 * len(told)
    if "1" in ranks:
        assert re.search(r'File ".*/main.py", line \d+ in sleepy', output)
    line = "rank 1 has not come to where the others wait; the same command goes on from the last"
    assert f"{tmp_path}/run: {line} checkpoint\n" in output
