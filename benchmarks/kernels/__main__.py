"""python -m benchmarks.kernels: one table a kernel, ours beside every other way (see report.py).

On a GPU a process of its own measures; should one contender take the device down, it is noted and
another process goes on behind it. Every table is on disk as soon as a row of it is measured.
Without a GPU it writes what can be computed instead: floors, and what the kernels compile to.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernels import report, resources, tune
from benchmarks.kernels.case import RUNNING, Table, first_line
from benchmarks.kernels.measure import ceilings, free_memory, synchronize
from benchmarks.kernels.plan import Entry, tables

RESULTS = Path(__file__).parents[1] / "results"
RESTARTS = 6
GRACE = 20  # seconds before the budget's end, for the last rows and the page


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: to try it on a CPU")
    parser.add_argument("--tables", nargs="+", help="only these, in this order")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of it")
    parser.add_argument("--seconds", type=float, default=0.25, help="of every timing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kernels.md and .json")
    parser.add_argument("--commit", default=None, help="where git does not say it")
    parser.add_argument("--compile", default=None, help="torch.compile's backend")
    parser.add_argument("--tune", nargs="*", help="time all configurations, of these kernels")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip().splitlines()[-1] if found.stdout.strip() else "unknown"


def about(options: argparse.Namespace, argv: list[str]) -> dict[str, str]:
    """What stands above the tables, but for the device's name."""
    facts = {
        "command": f"`{' '.join(['python -m benchmarks.kernels', *argv])}`",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": options.commit or commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__} (CUDA "
        f"{torch.version.cuda}), Triton {version('triton')}, "
        f"Liger {version('liger-kernel')}",
    }
    if options.device == "cuda":
        facts["versions"] += f", cuDNN {torch.backends.cudnn.version()}"
        facts["driver, clocks"] = driver()
    return facts


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.L2_cache_size / 2**20:.0f} MB of L2"
        )
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_page(folder: Path, names: list[str], out: Path, device: str, facts: dict) -> str:
    """What `folder` holds of the tables, as Markdown and as JSON."""
    paths = [folder / f"{name}.json" for name in names]
    found = [
        report.from_json(json.loads(path.read_text())["table"]) for path in paths if path.exists()
    ]
    missing = [path.stem for path in paths if not path.exists()]
    page = report.measured(found, device, facts, missing=missing)
    (out / "kernels.md").write_text(page)
    whole = {"device": device, **facts, "tables": [report.to_json(table) for table in found]}
    report.write_json(out / "kernels.json", whole)
    return page


def work_through(
    entries: dict[str, Entry],
    folder: Path,
    *,
    device: torch.device,
    seconds: float,
    deadline: float,
    publish: Callable[[], object],
) -> None:
    """Measure every table that `folder` does not hold whole; a row at a time is saved there.

    `publish` is called after every table.
    """
    reachable = ceilings(device, seconds=seconds)
    for name, entry in entries.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else None
        if before and before["complete"]:
            continue
        done = report.from_json(before["table"]).rows if before else []

        def save(table: Table, *, complete: bool = False, path: Path = path) -> None:
            report.write_json(path, {"complete": complete, "table": report.to_json(table)})

        began = time.monotonic()
        if began > deadline:
            break
        settings = {"device": device, "ceilings": reachable, "seconds": seconds, "done": done}
        ends = min(deadline, began + entry.seconds)
        try:
            table = entry.run(entry.case(), **settings, deadline=ends, save=save)
        except Exception as error:  # noqa: BLE001 - the tables behind it are there to be measured
            traceback.print_exc()
            synchronize(device)  # raises what the device cannot recover from
            note = f"Not measured. {first_line(error)}"
            table = Table(name, "could not be begun", "", "", {}, reachable, (), note=note)
        save(table, complete=True)
        free_memory(device)
        sys.stdout.write(f"{name}: {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
        publish()


def died(folder: Path, names: list[str], how: str) -> bool:
    """Note in the row that was running that its process died; whether there was one."""
    for name in names:
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found and not found["complete"]:
            for row in found["table"]["rows"]:
                if row["note"] == RUNNING:
                    row["note"] = how
                    report.write_json(path, found)
                    return True
    return False


def watch(options: argparse.Namespace, argv: list[str], names: list[str], folder: Path) -> None:
    """Run workers until all tables are there, no time is left, or one dies without a row."""
    ends = time.monotonic() + options.budget - GRACE
    for _ in range(RESTARTS):
        left = ends - time.monotonic()
        if left < GRACE:
            return
        command = [sys.executable, "-m", "benchmarks.kernels", *argv, "--tables", *names]
        command += ["--worker", str(folder), "--budget", f"{left:.0f}"]
        try:
            code = subprocess.run(command, check=False, timeout=left + GRACE / 2).returncode
        except subprocess.TimeoutExpired:
            died(folder, names, "did not end before the time was up")
            return
        if code == 0 or not died(folder, names, f"took the process down (exit code {code})"):
            return


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    began = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if options.tune is not None:
        tune.main(options.tune, device, seconds=options.seconds, budget=options.budget)
        return
    facts, name = about(options, argv), device_name(device)
    options.out.mkdir(parents=True, exist_ok=True)
    if device.type != "cuda" and not options.tiny:
        page = resources.page(name, facts)
        (options.out / "kernels.md").write_text(page["markdown"])
        report.write_json(options.out / "kernels.json", page["json"])
        return

    backend = options.compile or ("inductor" if device.type == "cuda" else "aot_eager")
    entries = tables(device, is_tiny=options.tiny, backend=backend)
    unknown = set(options.tables or ()) - set(entries)
    if unknown:
        sys.exit(f"no tables {', '.join(sorted(unknown))}; there are {', '.join(entries)}")
    names = options.tables or list(entries)
    entries = {name: entries[name] for name in names}

    def publish(folder: Path) -> str:
        return write_page(folder, names, options.out, name, facts)

    def work(folder: Path, budget: float) -> None:
        settings = {"device": device, "seconds": options.seconds, "deadline": began + budget}
        work_through(entries, folder, **settings, publish=partial(publish, folder))

    if options.worker:
        work(options.worker, options.budget)
        return
    with tempfile.TemporaryDirectory() as parts:
        folder = Path(parts)
        if device.type == "cuda":
            watch(options, argv, names, folder)
        else:
            work(folder, options.budget)
        sys.stdout.write(publish(folder))


if __name__ == "__main__":
    main()
