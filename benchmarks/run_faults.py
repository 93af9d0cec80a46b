"""What a training run of four processes survives: kill -9 and SIGTERM at random moments.

    python -m benchmarks.run_faults --kills 30
    python -m benchmarks.run_faults --report > benchmarks/results/run_faults.md

A tiny student learns from a view cache by torchrun with four ranks on the CPU. The run is killed at
random steps and moments, started again with the same command (or by torchrun's `--max-restarts`)
and killed again; in the end its weights, averaged weights, AdamW state, generators and every logged
value have to be those of a run that nothing disturbed, bit for bit. After every kill the latest
checkpoint is read and verified. A broken promise ends the script with a traceback.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch

from benchmarks.cache_faults import make_videos, require, save
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.recipe import Recipe
from distill.recipe_file import dump_recipe
from distill.run.meter import RATES

RESULTS = Path(__file__).parent / "results" / "run_faults.json"
RANKS, CLIPS, BATCH, EPOCHS = 4, 14, 4, 80  # the last batch leaves two of the ranks without a clip
STEPS = EPOCHS * -(-CLIPS // BATCH)
SIZE = {"width": 32, "depth": 2, "heads": 2, "pooled_width": 16}
KINDS = {
    "rank": "`kill -9` of one rank, torchrun ends the others",
    "restart": "`kill -9` of one rank, `--max-restarts` starts all again",
    "job": "`kill -9` of torchrun and all ranks at once",
    "term": "SIGTERM to torchrun, ranks save and end",
}
END_SECONDS = 300.0


def tiny_recipe(videos: Path, folder: Path) -> Recipe:
    """A distillation in which all that a run goes on from takes part."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            # Saved as often as a write is done: kills fall before, in and after writes.
            "run": {"folder": str(folder), "log_steps": 1, "save_minutes": 1e-3},
            "data": {
                "train": {"list": str(videos / "train.csv")},
                "views": {"frames": 2, "image_size": 28},
                "workers": 1,
            },
            "model": {"size": SIZE, "drop_path": 0.3},
            "objective": {
                "kind": "distill",
                "teacher": {"size": SIZE, "random": True, "layers": 2, "interval": 1.0},
                "mask": {"ratio": 0.5},
                "cache": {
                    "folder": str(videos / "cache"),
                    "views": 2,
                    "codes": "fp16",
                    "tokens": "superset",
                },
            },
            "optim": {
                "lr": 2e-2,
                "lr_per_batch": None,
                "batch_size": BATCH,
                "epochs": EPOCHS,
                "warmup_epochs": 1,
                "layer_decay": 0.8,
                "clip_grad": 1.0,
                "ema": 0.9,
            },
        }
    )


def start(recipe: Path, log: Path, *, restarts: int) -> subprocess.Popen:
    """The job, in a process group of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *torchrun, f"--max-restarts={restarts}"]
            + ["-m", "distill", "train", str(recipe)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def ranks_of(job: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started and that are alive."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text()
        return [int(pid) for pid in text.split() if is_alive(int(pid))]
    return []


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def logged_step(folder: Path) -> int:
    """The last step whose line is whole."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 8192, 0))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines else 0


def saved_step(folder: Path) -> int:
    """Of the latest checkpoint, which has to be whole."""
    path = latest_checkpoint(folder / "checkpoints")
    return 0 if path is None else load_checkpoint(path).state["step"]


def wait_until(is_so, *, seconds: float = END_SECONDS, pause: float = 0.01) -> bool:
    """Whether it came to be so in that time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


class KilledRun:
    """A run that is killed, and started again, until it is at its end."""

    def __init__(self, recipe: Path, folder: Path, log: Path) -> None:
        self.recipe, self.folder, self.log = recipe, folder, log
        self.job: subprocess.Popen | None = None
        self.start_seconds = 20.0

    def live(self, kind: str, stream: random.Random, *, kills_left: int) -> bool:
        """Run on to a random moment ahead; whether the job is still there then."""
        begun = time.monotonic()
        if self.job is None:
            self.job = start(self.recipe, self.log, restarts=int(kind == "restart"))
        at = saved_step(self.folder)
        if stream.random() < 0.15:  # while it is starting
            time.sleep(stream.uniform(0, self.start_seconds))
            return self.job.poll() is None
        target = at + stream.uniform(0, 1.5) * (STEPS - at) / (kills_left + 1)
        patience = begun + 60 * END_SECONDS
        while logged_step(self.folder) <= target and self.job.poll() is None:
            require(time.monotonic() < patience, self.log.read_text())
            time.sleep(0.01)
        if logged_step(self.folder) <= at + 2:
            self.start_seconds = time.monotonic() - begun
        time.sleep(stream.uniform(0, 0.3))  # anywhere in a step, a save or a write
        return self.job.poll() is None

    def kill(self, kind: str, stream: random.Random) -> dict[str, int] | None:
        """End the job, or a rank of it, and see what is left; None where it had ended."""
        job, ranks = self.job, ranks_of(self.job)
        at = logged_step(self.folder)
        if kind == "job":
            os.killpg(job.pid, signal.SIGSTOP)  # so that all end at the same moment
            for pid in [*ranks, job.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif kind == "term":
            job.terminate()
        elif ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stream.choice(ranks), signal.SIGKILL)
        else:  # torchrun has not started them yet
            job.kill()
        is_gone = wait_until(lambda: not any(is_alive(pid) for pid in ranks))
        require(is_gone, f"{kind}: ranks are still there: {self.log.read_text()}")
        if kind != "restart" or not ranks:
            require(wait_until(lambda: job.poll() is not None), f"{kind}: torchrun goes on")
            self.job = None
        if (self.folder / "summary.json").exists():
            return None
        saved = saved_step(self.folder)
        checkpoints = self.folder / "checkpoints"
        return {
            "kills": 1,
            "in a write": int(any(checkpoints.glob(".step-*.tmp"))),
            "steps done again": max(at - saved, 0),
        }

    def finish(self) -> None:
        """Let it run to its end."""
        if self.job is None:
            self.job = start(self.recipe, self.log, restarts=0)
        code = self.job.wait()
        require(code == 0, f"ended with {code}: {self.log.read_text()}")


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """All tensors and generators that a run leaves, and what it logged but for rates."""
    last = load_checkpoint(latest_checkpoint(folder / "checkpoints"))
    found = {f"{file}/{key}": x for file, some in last.files().items() for key, x in some.items()}
    require(last.state["step"] == STEPS, f"{folder}: ends at step {last.state['step']}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{name: line[name] for name in line if name not in RATES} for line in lines]
    return {**found, "random": last.state["random"]}, told


def require_equal(found: Path, expected: Path) -> int:
    """Bit for bit; how many tensors were compared."""
    (ours, told), (theirs, should) = outcome(found), outcome(expected)
    require(ours.keys() == theirs.keys(), "other tensors than the undisturbed run")
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else None
        require(ours[name] == value if same is None else same, f"another {name}")
    require(told == should, "other logged values than the undisturbed run")
    return len(theirs) - 1


def run_kills(kills: int, seed: int, space: Path, on_kill) -> dict:
    """As many kills, of one run or, where one ends before all are done, of several."""
    make_videos(space / "videos", count=CLIPS)
    log = space / "log"

    def write(name: str) -> Path:
        path = space / f"{name}.yaml"
        path.write_text(dump_recipe(tiny_recipe(space / "videos", space / name)))
        return path

    KilledRun(write("undisturbed"), space / "undisturbed", log).finish()
    stream, kinds = random.Random(seed), list(KINDS)
    done, compared, runs = 0, 0, 0
    while done < kills:
        log.unlink()
        name = f"killed-{runs}"
        run = KilledRun(write(name), space / name, log)
        while done < kills:
            kind = kinds[done % len(kinds)]  # a job that torchrun has started again is killed whole
            if not run.live(kind, stream, kills_left=kills - done):
                break
            found = run.kill(kind, stream)
            if found is None:
                break
            done += 1
            on_kill(kind, found)
            if kind == "restart" and run.job is not None:
                new = wait_until(lambda run=run: len(ranks_of(run.job)) == RANKS or run.job.poll())
                require(new, f"torchrun starts nothing again: {log.read_text()}")
        run.finish()
        compared += require_equal(space / name, space / "undisturbed")
        runs += 1
    return {"runs": runs, "tensors": compared, "lines": STEPS}


def report(results: dict) -> str:
    """The results as a page."""
    about, count = results["about"], results["runs"]
    runs = "one run" if count == 1 else f"{count} runs"
    text = [
        "# What a training run survives",
        "",
        f"`{about['command']}`, then `--report`. {about['device']}, {about['date']}, commit "
        f"{about['commit']}.",
        "",
        f"{RANKS} ranks by torchrun with gloo distil a tiny student from a view cache: {STEPS} "
        f"steps, {CLIPS} clips,",
        "drop path, masks drawn anew in every epoch, averaged weights, a checkpoint as often as "
        "the last one is",
        "written. Killed at random steps and moments and started again with the same command; "
        f"{runs} took",
        f"all the kills. In the end {results['tensors']} tensors (weights, averages, AdamW's "
        f"moments), the generators and {results['lines']}",
        "logged lines were **equal, bit for bit**, to those of a run that nothing disturbed. "
        "After every kill the latest",
        "checkpoint was whole by its hashes.",
        "",
        "| kind | kills | checkpoint half written | steps done again |",
        "|---|---|---|---|",
    ]
    columns = ("kills", "in a write", "steps done again")
    total = Counter()
    for kind, title in KINDS.items():
        counts = results["kinds"].get(kind, {})
        total.update(counts)
        text.append(f"| {title} | " + " | ".join(str(counts.get(c, 0)) for c in columns) + " |")
    text.append("| **all** | " + " | ".join(str(total[c]) for c in columns) + " |")
    text += [
        "",
        f"{results['seconds']:,.0f} seconds on a machine that others kept busy. A kill leaves the "
        "system's own buffers alone:",
        "that checkpoints survive a power cut rests on fsync before rename, and is not tried here.",
        "",
        "The first runs of this script ended with other bits: all-reduce adds up in an order that "
        "hangs on where a",
        "gradient lies in DDP's buckets, which DDP fills anew after a process's first step. Since "
        "then gradients on a",
        "CPU add up in the order of ranks (`average_in_order`). Two ranks never showed it; on GPUs "
        "it is as it was.",
    ]
    return "\n".join(text)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only print the page of the results")
    options = parser.parse_args()
    if options.report:
        sys.stdout.write(report(json.loads(options.json.read_text())) + "\n")
        return
    torch.set_num_threads(1)
    counts = {kind: Counter() for kind in KINDS}
    began = time.monotonic()

    def on_kill(kind: str, found: dict[str, int]) -> None:
        counts[kind].update(found)
        done = sum(one["kills"] for one in counts.values())
        seconds = time.monotonic() - began
        sys.stderr.write(f"{done}/{options.kills} {kind} {found} after {seconds:.0f} s\n")

    about = {
        "command": f"python -m benchmarks.run_faults --kills {options.kills}",
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()}), shared with other jobs",
        "date": date.today().isoformat(),
        "commit": commit(),
    }
    with tempfile.TemporaryDirectory(prefix="run-faults-") as space:
        found = run_kills(options.kills, options.seed, Path(space), on_kill)
    seconds = round(time.monotonic() - began, 1)
    kinds = {kind: dict(one) for kind, one in counts.items()}
    save({"about": about, **found, "kinds": kinds, "seconds": seconds}, options.json)


if __name__ == "__main__":
    main()
