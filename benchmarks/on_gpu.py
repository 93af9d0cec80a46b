"""python -m benchmarks.on_gpu OUT: all that waits for a GPU, in one call of at most ten minutes.

In the order of what is worth most: the tests of tests/gpu, a file at a time, then the kernels'
tables. What each prints goes to a file of its own in OUT as it is printed, the tables as they are
measured, and summary.json says after every step how it ended; so nothing that is done is lost,
whenever the machine is. Tests of whole steps need the PACKAGES that recipes do; without those they
are left out, by name.
Arguments behind `--` go to benchmarks.kernels.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Names of tests/gpu/test_cuda_NAME.py.
FILES = ["self_check", "attention", "alignment", "rmsnorm", "steps", "codes", "compile", "overlap"]
PACKAGES = ("pydantic", "rich", "safetensors")
NEED_PACKAGES = ("test_cuda_steps.py", "test_cuda_compile.py", "test_cuda.py")
TEST_SECONDS = 240  # of all tests together
GRACE_SECONDS = 15.0  # for a summary after an interrupt


class Step(NamedTuple):
    """A command, and by which second from the start it has to be done."""

    name: str
    command: list[str]
    ends: float


def steps(out: Path, *, budget: float, others: Sequence[str] = ()) -> tuple[list[Step], list[str]]:
    """What is to be run, and the names of tests that cannot be."""
    is_whole = all(importlib.util.find_spec(name) for name in PACKAGES)
    files = [f"test_cuda_{name}.py" for name in FILES] + ["test_cuda.py"]
    left_out = [name for name in files if name in NEED_PACKAGES and not is_whole]
    found = []
    for name in files:
        if name not in left_out:
            command = ["pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "--durations=10"]
            command += ["--override-ini", "addopts=", f"tests/gpu/{name}"]  # one GPU, one process
            found.append(Step(name.removesuffix(".py"), ["-m", *command], TEST_SECONDS))
    tables = ["-m", "benchmarks.kernels", "--out", str(out), *others]
    return [*found, Step("kernels", tables, budget)], left_out


def run(step: Step, out: Path, *, began: float) -> dict:
    """How a step ended; one that is late is interrupted, and killed if it does not heed that."""
    start = time.monotonic()
    left = began + step.ends - start
    if left <= 0:
        return {"step": step.name, "exit": "not run: no time left", "seconds": 0.0}
    command = [sys.executable, *step.command]
    if step.name == "kernels":
        command += ["--budget", f"{left - GRACE_SECONDS:.0f}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (out / f"{step.name}.txt").open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code: object = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = "did not end in its time"
    return {"step": step.name, "exit": code, "seconds": round(time.monotonic() - start, 1)}


def work_through(todo: Sequence[Step], out: Path, *, left_out: Sequence[str]) -> list[dict]:
    """Run the steps one after another, with a summary on disk after each."""
    began, done = time.monotonic(), []
    for step in todo:
        done.append(run(step, out, began=began))
        part = out / "summary.part"
        part.write_text(json.dumps({"steps": done, "left out": list(left_out)}, indent=1) + "\n")
        part.replace(out / "summary.json")
        sys.stdout.write(f"{done[-1]['step']}: {done[-1]['exit']}, {done[-1]['seconds']} s\n")
        sys.stdout.flush()
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it")
    parser.add_argument("others", nargs="*", help="behind --, of benchmarks.kernels")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo, left_out = steps(out, budget=options.budget, others=options.others)
    done = work_through(todo, out, left_out=left_out)
    return int(any(each["exit"] != 0 for each in done) or bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
