"""Strong and weak scaling over CPU ranks, and a cluster of GPUs on paper.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json
    python -m benchmarks.scaling --report > benchmarks/results/scaling.md

An S/14 with half of its blocks learns from a view cache of records as large as the 1B teacher's,
one thread a rank, by the project's own loop; of a rank every step's wall time, CPU time and wait
for data are noted. Where ranks share a core, or the machine has other work, wall times tell of
that; CPU time for a clip then still tells what more ranks cost. The paper is
`benchmarks/cluster_model.py`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks.cache_faults import make_videos, save
from benchmarks.cluster_model import assumptions, model_page, work_of
from benchmarks.run_faults import commit
from distill import train as loop
from distill.cache.read import PREFETCH_BATCHES, Cache, CachedBatches
from distill.dist import joined
from distill.job import open_cache
from distill.recipe import Recipe
from distill.recipe_file import dump_recipe, load_recipe
from distill.students.vit import SIZES
from distill.teachers.internvideo2 import InternVideo2

RESULTS = Path(__file__).parent / "results" / "scaling.json"
RANKS = (1, 2, 4)
STEPS, BATCH = 4, 4  # the first step is left out; clips a step in all, of weak scaling at the most
LONG_STEPS = 4 * PREFETCH_BATCHES  # of one clip each: as many as are read ahead, four times
CLIPS = max(STEPS * BATCH, LONG_STEPS)
# S/14 with half of its blocks, as few as six distilled layers need.
STUDENT = {**asdict(SIZES["S14"]), "depth": 6}
# As wide as the 1B teacher, and made of noise: only the size of its records matters here.
TEACHER = {"width": 1408, "depth": 6, "heads": 16, "mlp_ratio": 0.1, "pooled_width": 768}
SET_CLIPS, SET_VIEWS = 10_000_000, 8


def recipe_of(space: Path, name: str, *, batch: int, steps: int = STEPS) -> Recipe:
    """One epoch of so many steps."""
    overrides = [
        f"data.train.list={space / 'videos/train.csv'}",
        "data.train.num_clips=null",
        "data.workers=1",
        *(f"model.size.{key}={value}" for key, value in STUDENT.items()),
        f"data.train.share={steps * batch / CLIPS}",
        "objective.teacher.weights=null",
        "objective.teacher.random=true",
        "objective.teacher.precision=fp32",
        "objective.teacher.interval=1.0",
        *(f"objective.teacher.size.{key}={value}" for key, value in TEACHER.items()),
        f"objective.cache.folder={space / 'cache'}",
        "objective.cache.views=1",
        "objective.cache.batch_size=1",
        f"optim.batch_size={batch}",
        "optim.micro_batch=null",
        "optim.precision=fp32",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "run.save_minutes=1000",
        "run.log_steps=1",
        f"run.folder={space / name}",
    ]
    return load_recipe("S14", overrides)


def see_noise(teacher: InternVideo2, clip: torch.Tensor):
    """In place of the teacher's forward."""
    clips, tokens = len(clip), 1 + teacher.num_patches
    states = [torch.randn(clips, tokens, teacher.embed_dim) for _ in teacher.return_layers]
    pooled = torch.randn(clips, teacher.pooled_width)
    return states, pooled, torch.randn(clips, tokens - 1).softmax(1)


def run_rank(recipe: Path, marks: Path) -> None:
    """What each process does: train, and note after every step where its clocks stand."""
    torch.set_num_threads(1)
    found, step = [], loop.Run.step

    def timed(run: loop.Run, batch: dict) -> None:
        step(run, batch)
        found.append((time.perf_counter(), time.process_time(), run.stream.wait_seconds))

    loop.Run.step = timed
    loaded = load_recipe(recipe)
    with joined() as part:
        loop.train(loaded, loaded.run.folder)
        (marks / f"{part.index}.json").write_text(json.dumps(found))


def measure(
    space: Path, kind: str, ranks: int, batch: int, number: int, *, steps: int = STEPS
) -> dict:
    """What every step of a job took, but for the first."""
    name = f"{kind}-{ranks}-{number}"
    path, marks = space / f"{name}.yaml", space / f"{name}-marks"
    marks.mkdir()
    path.write_text(dump_recipe(recipe_of(space, name, batch=batch, steps=steps)))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    worker = ["-m", "benchmarks.scaling", "--rank", str(path), "--marks", str(marks)]
    subprocess.run(
        [sys.executable, *(start if ranks > 1 else []), *worker],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    clocks = [json.loads((marks / f"{rank}.json").read_text()) for rank in range(ranks)]
    taken = [
        [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(one, one[1:], strict=False)]
        for one in clocks
    ]  # of each rank: wall, CPU and waiting seconds of each step
    first = taken[0]
    return {
        "kind": kind,
        "ranks": ranks,
        "batch": batch,
        "step_seconds": [wall for wall, _, _ in first],
        "cpu_seconds_per_clip": [
            sum(one[index][1] for one in taken) / batch for index in range(len(first))
        ],
        "data_wait": sum(wait for *_, wait in first) / sum(wall for wall, _, _ in first),
    }


def read_alone(cache: Cache) -> float:
    """Clips a second that one process reads and checks, with nothing else to do; the best of 5."""
    batches = CachedBatches(cache, batch_size=BATCH, seed=0)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        count = sum(len(batch["clip_id"]) for batch in batches.epoch(0))
        best = max(best, count / (time.perf_counter() - start))
    return best


def run_all(space: Path, rounds: int) -> dict:
    """Every job `rounds` times, in turns, so that other work on the machine meets all of them."""
    if not (space / "videos").exists():
        make_videos(space / "videos", count=CLIPS)
    InternVideo2.see = see_noise
    whole = recipe_of(space, "cache-only", batch=BATCH, steps=CLIPS // BATCH)
    cache = open_cache(whole)
    jobs = []
    for number in range(rounds):
        for ranks in RANKS:
            for kind, batch in (("strong", BATCH), ("weak", ranks)):
                jobs.append(measure(space, kind, ranks, batch, number))
                sys.stderr.write(f"{jobs[-1]}\n")
    long = measure(space, "long", 1, 1, 0, steps=LONG_STEPS)
    return {"jobs": jobs, "long": long, "read_alone": read_alone(cache)}


def medians(jobs: list[dict], kind: str, ranks: int) -> dict[str, float]:
    """Over the steps of all rounds."""
    some = [job for job in jobs if (job["kind"], job["ranks"]) == (kind, ranks)]

    def median(name: str) -> float:
        return statistics.median(value for job in some for value in job[name])

    return {
        "batch": some[0]["batch"],
        "seconds": median("step_seconds"),
        "cpu": median("cpu_seconds_per_clip"),
        "wait": statistics.median(job["data_wait"] for job in some),
    }


def report(results: dict) -> str:
    """The results as a page."""
    about, jobs = results["about"], results["jobs"]
    text = [
        "# Scaling",
        "",
        f"`{about['command']}`, then `--report`. {about['device']}, {about['date']}, commit "
        f"{about['commit']}, torch {about['torch']}.",
        "",
        "## Measured: ranks on a CPU",
        "",
        "S/14 with half of its blocks in float32 from a warm cache of records as large as the 1B "
        "teacher's (of noise), one "
        f"thread a rank, gloo; medians of {results['rounds'] * (STEPS - 1)} steps.",
        f"Strong scaling shares {BATCH} clips a step among the ranks, weak gives each one clip. "
        f"With {about['cores']} cores, more ranks than",
        "that share them, and the machine had other work: the wall time tells of that, the CPU "
        "time of what ranks cost.",
        *([about["note"]] if "note" in about else []),
        "",
        "| scaling | ranks | clips a step | seconds a step | clips/s, against one rank | CPU "
        "seconds a clip, against one rank | waiting for data |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("strong", "weak"):
        one = medians(jobs, kind, 1)
        for ranks in RANKS:
            found = medians(jobs, kind, ranks)
            rate = (found["batch"] / found["seconds"]) / (one["batch"] / one["seconds"])
            note = " (oversubscribed)" if ranks > about["cores"] else ""
            text.append(
                f"| {kind} | {ranks}{note} | {found['batch']} | {found['seconds']:.2f} | "
                f"{rate:.2f}x | {found['cpu']:.2f}, {found['cpu'] / one['cpu']:.2f}x | "
                f"{found['wait']:.2%} |"
            )
    alone = results["read_alone"]
    record_gb = 1e-9 * results["record_bytes"]
    long = results["long"]
    text += [
        "",
        f"One rank over {LONG_STEPS} steps of a clip, so that records are read ahead four times: "
        f"{long['data_wait']:.2%} of",
        "the time is spent waiting for data.",
        f"Nothing but reading and checking records, one process delivers {alone:,.0f} clips/s "
        f"({alone * record_gb:.2f} GB/s) on the same",
        "machine: from there on, a rank would wait for data.",
        "",
        "## On paper: 8, 32 and 256 GPUs",
        "",
        "No GPU was used. What is assumed:",
        "",
        *assumptions(),
        "",
        *model_page(
            {size: work_of(load_recipe(size)) for size in ("S14", "B14", "L14")},
            clips=SET_CLIPS,
            views=SET_VIEWS,
        ),
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--space", type=Path, help="keeps the cache for another call")
    parser.add_argument("--report", action="store_true", help="only print the page of the results")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank, options.marks)
        return
    if options.report:
        sys.stdout.write(report(json.loads(options.json.read_text())) + "\n")
        return
    about = {
        "command": f"python -m benchmarks.scaling --rounds {options.rounds}",
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()}), shared with other jobs",
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        found = run_all(options.space or Path(temporary), options.rounds)
    size = work_of(load_recipe("S14")).record_bytes_per_clip
    save({"about": about, "rounds": options.rounds, "record_bytes": size, **found}, options.json)


if __name__ == "__main__":
    main()
