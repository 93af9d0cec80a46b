"""The quickstart's claim over three seeds: distilled and finetuned against from scratch.

    python benchmarks/quickstart.py runs/benchmark --json benchmarks/results/quickstart.json

Every seed draws its own labelled tenth, initial weights, masks and order. From scratch comes twice,
with the finetuning's steps and with the distillation's and finetuning's steps together; each takes
the learning rate that does best on `val`, a split that neither trains nor is reported. The teacher
is also shown the same test clips with their frames in a random order.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distill.data.demo import SPLITS, make_demo
from distill.evaluation.evaluate import evaluate
from distill.log import configure
from distill.models import build_classifier, load_recipe_weights
from distill.recipe import Recipe, Study
from distill.recipe_file import load_recipe
from distill.study import run_study
from distill.train import train

SEEDS = (0, 1, 2)
SCRATCH_LRS = (3e-4, 7e-4, 1.5e-3)


class ShuffledFrames(nn.Module):
    """A classifier that is shown each clip's frames in a random order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.random = torch.Generator().manual_seed(0)

    def forward(self, clip: Tensor) -> Tensor:
        orders = torch.rand(len(clip), clip.shape[2], generator=self.random).argsort(1)
        return self.model(
            torch.stack([one[:, order] for one, order in zip(clip, orders, strict=True)])
        )


def study(folder: Path, *overrides: str) -> Study:
    """The shipped quickstart with its videos and cache in `folder`, shared by all seeds."""
    places = [
        f"run.folder={folder / 'run'}",
        f"data.demo.folder={folder / 'videos'}",
        *(f"data.{split}.list={folder / 'videos' / split}.csv" for split in SPLITS),
        f"stages.distilled.objective.cache.folder={folder / 'cache'}",
    ]
    return load_recipe("quickstart", [*places, *overrides])


def steps_of(recipe: Recipe) -> int:
    """Optimiser steps of a stage, from the demo's size."""
    clips = recipe.data.demo.train_clips * recipe.data.train.share
    return recipe.optim.epochs * math.ceil(clips / recipe.optim.batch_size)


def from_scratch(folder: Path, *, seed: int, lr: float, epochs: int, split: str) -> float:
    """Top-1 in percent on `split` of a run from scratch."""
    place = folder / f"scratch-{epochs}-epochs-lr-{lr}-seed-{seed}-{split}"
    stages = study(
        folder,
        f"run.seed={seed}",
        f"stages.scratch.optim.lr={lr}",
        f"stages.scratch.optim.epochs={epochs}",
        f"evaluate.split={split}",
    ).stages
    return train(stages["scratch"], place)["evaluation"]["top1"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path, help="goes on where an earlier call was stopped")
    arguments.add_argument("--json", type=Path, help="write the figures here too")
    options = arguments.parse_args()
    configure()
    console = Console()
    folder = options.folder

    shipped = study(folder)
    make_demo(shipped.stages["teacher"].data.demo)
    short = shipped.stages["scratch"].optim.epochs
    per_epoch = steps_of(shipped.stages["scratch"]) / short
    long = round((steps_of(shipped.stages["distilled"]) / per_epoch) + short)

    results: dict[str, list[float]] = {}
    for seed in SEEDS:
        run = study(folder, f"run.seed={seed}", f"run.folder={folder / f'seed-{seed}'}")
        for row in run_study(run)["rows"]:
            if row["name"] != "scratch":  # which takes its learning rate from the grid below
                results.setdefault(row["name"], []).append(row["top1"])

    grid = Table("lr", title="from scratch, top-1 on val by learning rate (seed 0)")
    chosen = {}
    for epochs in (short, long):
        scores = {
            lr: from_scratch(folder, seed=0, lr=lr, epochs=epochs, split="val")
            for lr in SCRATCH_LRS
        }
        chosen[epochs] = (max(scores, key=scores.get), scores)
        grid.add_column(f"{round(epochs * per_epoch)} steps", justify="right")
    for lr in SCRATCH_LRS:
        grid.add_row(f"{lr:g}", *(f"{chosen[epochs][1][lr]:.2f}" for epochs in (short, long)))
    console.print(grid)
    for name, epochs in (("scratch", short), ("scratch, all steps", long)):
        lr = chosen[epochs][0]
        results[name] = [
            from_scratch(folder, seed=seed, lr=lr, epochs=epochs, split="test") for seed in SEEDS
        ]

    teacher = shipped.stages["teacher"]
    model = build_classifier(teacher)
    load_recipe_weights(model, teacher.model.weights)
    shuffled = evaluate(
        ShuffledFrames(model.eval()),
        teacher,
        split="test",
        num_clips=teacher.evaluate.clips,
        num_crops=teacher.evaluate.crops,
        device=torch.device("cpu"),
    )["top1"]

    table = Table("top-1 on test, %", *(f"seed {seed}" for seed in SEEDS), "mean")
    for name, values in results.items():
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f}")
    console.print(table)
    better = max(statistics.mean(results[name]) for name in ("scratch", "scratch, all steps"))
    gain = statistics.mean(results["finetuned"]) - better
    console.print(f"finetuned, over the better of the two from scratch: {gain:+.2f} points")
    console.print(f"teacher with shuffled frames: {shuffled:.2f} %")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "top1": results,
            "gain_points": gain,
            "teacher_shuffled_top1": shuffled,
            "scratch_grid_on_val": {
                f"{round(epochs * per_epoch)} steps": scores
                for epochs, (_, scores) in chosen.items()
            },
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
