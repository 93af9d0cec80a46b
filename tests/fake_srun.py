"""What `srun` does for a job on one machine: starts the tasks, tells them who they are, waits.

For a machine without SLURM; tests put it on the PATH under that name.
"""

import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    """Run the command once for each of SLURM_NTASKS tasks; the highest exit code of any."""
    command = [word for word in arguments if not word.startswith("--")]
    count = int(os.environ["SLURM_NTASKS"])
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(count)
    ]
    # Of a task that a signal killed, srun gives 128 and the signal.
    return max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
