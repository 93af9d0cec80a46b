"""Training clips per second, from the view cache against online, in one run.

    python benchmarks/cached_vs_online.py            # S/14, B/14 and L/14, about ten minutes

Online is what the published code does, mended and cleaned: decode, augment, run the frozen
InternVideo2-1B, draw the mask, step the student. Cached reads the same view's record from disk and
steps the student. Both go through the project's own batches, targets and engine, one clip a batch,
float32, so that the ratio is that of the work. Weights are random: time does not depend on them.

The bound is the ratio that the arithmetic allows: (teacher + student) / student, as measured with
plain reference code on two CPU cores.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distill.cache.build import build_cache
from distill.data.demo import photograph, write_video
from distill.engines.plain import Engine
from distill.job import build_job
from distill.log import configure
from distill.recipe_file import load_recipe

BOUNDS = {"S14": 51, "B14": 18, "L14": 7}


def write_clip(path: Path) -> None:
    """Ten seconds of 320x240 video: a window that wanders over a photograph."""
    image = photograph("china.jpg")
    time_step = np.arange(250)
    left = np.rint((image.shape[1] - 320) * (0.5 + 0.5 * np.sin(time_step / 40))).astype(int)
    frames = np.stack([image[:240, x : x + 320] for x in left]).astype(np.uint8)
    write_video(path, frames)


def time_steps(recipe, folder: Path, *, steps: int) -> list[float]:
    """Seconds of each of `steps` whole training steps, data included, after one that warms up."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = build_job(recipe, folder, device=device)
    engine = Engine(
        job.objective, job.model, optim=recipe.optim, prepare=job.prepare, device=device
    )
    job.objective.train()
    seconds = []
    for number in range(steps + 1):
        start = time.perf_counter()
        for batch in job.batches.epoch(number):
            losses = engine.step(batch, step=number + 1, lr=1e-5)
            losses["loss"].item()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sizes", nargs="+", default=list(BOUNDS), choices=list(BOUNDS))
    arguments.add_argument("--online-steps", type=int, default=2)
    arguments.add_argument("--cached-steps", type=int, default=5)
    arguments.add_argument("--json", type=Path, help="write the figures here too")
    options = arguments.parse_args()
    configure()

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder / "clip.mp4")
        (folder / "train.csv").write_text("clip.mp4 -1\n")  # no label
        for size in options.sizes:
            overrides = [
                f"data.train.list={folder / 'train.csv'}",
                "data.workers=1",
                "objective.teacher.weights=null",
                "objective.teacher.random=true",
                "objective.teacher.precision=fp32",
                f"objective.cache.folder={folder / 'cache'}",
                "objective.cache.views=1",
                "objective.cache.batch_size=1",
                "optim.batch_size=1",
                "optim.micro_batch=1",
                "optim.precision=fp32",
            ]
            recipe = load_recipe(size, overrides)
            build_cache(recipe)
            cached = time_steps(recipe, folder / size, steps=options.cached_steps)
            live = load_recipe(size, [*overrides, "objective.targets=live"])
            online = time_steps(live, folder / f"{size}-live", steps=options.online_steps)
            rows.append(
                {
                    "student": size,
                    "cached_seconds": statistics.median(cached),
                    "online_seconds": statistics.median(online),
                    "ratio": statistics.median(online) / statistics.median(cached),
                    "bound": BOUNDS[size],
                }
            )

    table = Table("student", title="seconds a clip, median", title_justify="left")
    for heading in ("online", "cached", "online / cached", "bound"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["student"],
            f"{row['online_seconds']:.2f}",
            f"{row['cached_seconds']:.3f}",
            f"{row['ratio']:.1f}x",
            f"{row['bound']}x",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"float32, batch 1, {options.online_steps} online and {options.cached_steps} cached steps"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
