"""A step of SLURM's as a job of several processes: what torchrun says, from what `srun` says.

Names and meanings of the variables: `man srun`, "OUTPUT ENVIRONMENT VARIABLES".
"""

import re
from collections.abc import Iterator, Mapping
from itertools import takewhile

from distill.errors import InputError

FIRST_PORT, NUM_PORTS = 15_000, 16_000  # below those that systems give away by themselves


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task of `srun`'s.

    Nothing where torchrun has set them, and nothing outside a step of several tasks: in the shell
    of an salloc or in a batch script, which know the number of tasks too, a command is alone. An
    address or a port that is set already stays. Raises InputError for what `srun` never says.
    """
    if "RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    # Not SLURM_LAUNCH_NODE_IPADDR: an srun in a shell is launched from where no task runs.
    return {
        "RANK": str(_number(environment, "SLURM_PROCID")),
        "WORLD_SIZE": str(_number(environment, "SLURM_STEP_NUM_TASKS")),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or next(node_names(nodes)),
        # Of the step too, as several may share a machine.
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(FIRST_PORT + (job + 1009 * step) % NUM_PORTS),
    }


def has_gpu_of_its_own(environment: Mapping[str, str]) -> bool:
    """Whether SLURM shows each task the GPUs of its own alone, as `--gpus-per-task` has it do."""
    per_task = environment.get("SLURM_TRES_PER_TASK", "")
    return "SLURM_GPUS_PER_TASK" in environment or "gpu" in per_task


def node_names(nodes: str) -> Iterator[str]:
    """The hosts of a list as SLURM writes it: `a-1,gpu[03-05,9]` has four.

    Raises InputError for what is no such list.
    """
    span = r"\d+(?:-\d+)?"
    part = rf"(?:[^\[\],]|\[{span}(?:,{span})*\])+"
    if not re.fullmatch(rf"{part}(?:,{part})*", nodes):
        raise InputError(
            f"SLURM_STEP_NODELIST={nodes}: expected hosts such as node[03-05,9]; set MASTER_ADDR "
            "to the host of the first task"
        )
    for group in re.findall(part, nodes):
        yield from _expanded(group)


def _expanded(group: str) -> Iterator[str]:
    """`r[1-2]n[07,9]`: r1n07, r1n9, r2n07, r2n9."""
    head = "".join(takewhile(lambda letter: letter != "[", group))
    if head == group:
        yield group
        return
    numbers, tail = group[len(head) + 1 :].split("]", 1)
    for piece in numbers.split(","):
        first, _, last = piece.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expanded(tail):
                yield f"{head}{number:0{len(first)}}{rest}"


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "nothing")
    if not text.isdecimal():
        raise InputError(
            f"{name}={text}: expected the number that srun sets; start the command with srun, or "
            "unset SLURM_STEP_NUM_TASKS to run it alone"
        )
    return int(text)
