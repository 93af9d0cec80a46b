"""What a student loses by learning from a cache: codes, views and tokens, one axis at a time.

    python benchmarks/cache_fidelity.py runs/fidelity --json benchmarks/results/cache_fidelity.json

With the quickstart's teacher, videos and student, from a centre of 4-bit codes, 4 views and
visible tokens. Every arm is distilled and then finetuned with the same seeds, hence with the same
initial weights, order, views and masks; `live` runs the teacher in every epoch, on a new view each
time. Measured are the distilled student's loss on clips that it was not trained on, against the
teacher's own float32 targets whatever the arm was trained from; top-1 after finetuning; and the
bytes of a record. What has been measured is not run again, so a stopped study goes on where it
was; further arguments are overrides of the recipe, such as data.workers=1. `--report` trains
nothing and prints what there is.
"""

import argparse
import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from rich.console import Console
from safetensors.torch import load_file
from scipy.stats import t as student_t
from torch import Tensor

from distill.cache.read import Cache
from distill.checkpoint import write_json, write_tensors
from distill.cost import record_bytes
from distill.data.demo import SPLITS, make_demo
from distill.data.index import read_list
from distill.data.load import ClipBatches, Quarantine
from distill.engines.plain import pick_device, to_device
from distill.log import configure
from distill.models import build_student, build_teacher
from distill.objective import DistillObjective
from distill.recipe import Recipe, Study
from distill.recipe_file import load_recipe
from distill.students.warmstart import load_weights
from distill.study import run_study
from distill.targets import LiveTargets

TRAIN_CLIPS = 2000
EPOCHS = 16  # as often each of 1, 2, 4 and 8 views
CENTRE = {"codes": "4bit", "views": 4}
ARMS = {  # what each changes of the centre, most telling first
    "4bit": {},
    "fp16": {"codes": "fp16"},
    "2bit": {"codes": "2bit"},
    "8bit": {"codes": "8bit"},
    "3bit": {"codes": "3bit"},
    "live": {"views": EPOCHS},
    "8 views": {"views": 8},
    "1 view": {"views": 1},
    "2 views": {"views": 2},
    "superset": {"tokens": "superset"},
}
COMPARISONS = {  # title: arm it is against, arms
    "Codes, against fp16": ("fp16", ("8bit", "4bit", "3bit", "2bit")),
    "Views, against 4 of them": ("4bit", ("1 view", "2 views", "8 views")),
    "Tokens, against visible": ("4bit", ("superset",)),
    "Cached, against live": ("live", ("fp16", "4bit", "8 views", "superset")),
}
HELD_OUT = ("val", "test")
HELD_OUT_SEED = 1_000_003  # of views and masks that no run is trained on
BATCH = 50
TABLES = "## Arms, means over seeds"  # from here on the page is written anew
# Squared error of a code over the row's, less its mean: 1 / cos^2 - 1 of a rotated Lloyd-Max code.
NOISE = {"8bit": 4.2e-5, "4bit": 9.7e-3, "3bit": 3.57e-2, "2bit": 0.133}
DIFFERENCES = ("loss", "middle", "loss over clips", "middle over clips", "top1")


@dataclass(frozen=True)
class Place:
    """Where the study lies, and what is changed of the recipe everywhere."""

    folder: Path
    overrides: tuple[str, ...]

    def study(self, arm: str, seed: int) -> Study:
        """The quickstart's distillation and finetuning as this arm has them."""
        settings = {**CENTRE, **ARMS[arm]}
        # One cache for all numbers of views: fewer are the first of more.
        cache = "-".join(str(settings[name]) for name in settings if name != "views")
        changes = [
            f"run.folder={self.folder / 'runs' / _file_name(arm) / f'seed-{seed}'}",
            f"run.seed={seed}",
            f"data.demo.folder={self.folder / 'videos'}",
            *(f"data.{split}.list={self.folder / 'videos' / split}.csv" for split in SPLITS),
            f"data.demo.train_clips={TRAIN_CLIPS}",
            f"stages.distilled.optim.epochs={EPOCHS}",
            f"stages.finetuned.data.train.share={400 / TRAIN_CLIPS}",
            "stages.finetuned.optim.epochs=10",
            "stages.finetuned.optim.warmup_epochs=1",
            "evaluate.clips=1",
            f"stages.distilled.objective.targets={'live' if arm == 'live' else 'cached'}",
            f"stages.distilled.objective.cache.folder={self.folder / 'caches' / cache}",
            *(f"stages.distilled.objective.cache.{name}={settings[name]}" for name in settings),
        ]
        study = load_recipe("quickstart", [*changes, *self.overrides])
        stages = {name: study.stages[name] for name in ("distilled", "finetuned")}
        return study.model_copy(update={"stages": stages})

    def result(self, arm: str, seed: int) -> Path:
        return self.folder / "results" / f"{_file_name(arm)}-seed-{seed}.json"


def held_out(place: Place) -> dict[str, Tensor]:
    """Clips that no arm is trained on, with the teacher's own float32 targets; batch first.

    Made once, so that every arm is measured on the same numbers.
    """
    path = place.folder / "held_out.safetensors"
    if not path.exists():
        recipe = place.study("live", 0).stages["distilled"]
        clips = [clip for split in HELD_OUT for clip in read_list(getattr(recipe.data, split))]
        batches = ClipBatches(
            clips,
            recipe.data,
            batch_size=BATCH,
            seed=HELD_OUT_SEED,
            views_per_clip=1,
            quarantine=Quarantine(None, total=len(clips), max_share=0),
        )
        device = pick_device()
        targets = LiveTargets(
            build_teacher(recipe).to(device), recipe.objective.mask, HELD_OUT_SEED
        )
        found = [targets(to_device(batch, device)) for batch in batches.epoch(0)]
        names = ("clip_id", "patches", "tokens", "middle", "pooled")
        parts = {name: [batch[name] for batch in found] for name in names}
        parts["middle"] = [rearrange(x, "k b m e -> b k m e") for x in parts["middle"]]
        whole = {name: torch.cat(values).contiguous().cpu() for name, values in parts.items()}
        write_tensors(path, whole, metadata={"seed": str(HELD_OUT_SEED)})
    return load_file(path)


@torch.inference_mode()
def held_out_losses(recipe: Recipe, weights: str, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each clip's `loss` and `middle` [C] of a distilled student in evaluation."""
    student = build_student(recipe)
    load_weights(student, weights)
    device = pick_device()
    objective = DistillObjective(student, recipe.objective, seed=0).to(device).eval()
    found: dict[str, list[Tensor]] = {"loss": [], "middle": []}
    for place in range(len(clips["clip_id"])):  # one by one: the objective tells a batch's mean
        one = {name: value[place : place + 1].to(device) for name, value in clips.items()}
        losses = objective(
            {**one, "middle": rearrange(one["middle"], "b k m e -> k b m e"), "epoch": 0}
        )
        for name, values in found.items():
            values.append(losses[name].cpu())
    return {name: torch.stack(values) for name, values in found.items()}


def run(place: Place, arm: str, seed: int, clips: dict[str, Tensor]) -> None:
    """Distil, finetune and measure one arm with one seed, unless that has been done."""
    path = place.result(arm, seed)
    if path.exists():
        return
    study = place.study(arm, seed)
    summary = run_study(study)["stages"]
    recipe = study.stages["distilled"]
    losses = held_out_losses(recipe, summary["distilled"]["weights"], clips)
    size = None  # live runs keep no records
    if recipe.objective.targets == "cached":
        cache = Cache.open(recipe.objective.cache.folder, recipe)
        size = float(cache.index.sizes[cache.rows].mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path.with_suffix(".safetensors"), losses, metadata={"arm": arm})
    write_json(
        path,
        {
            "arm": arm,
            "seed": seed,
            "held_out_loss": float(losses["loss"].double().mean()),
            "held_out_middle": float(losses["middle"].double().mean()),
            "held_out_clips": len(losses["loss"]),
            "train_loss": summary["distilled"]["last"]["loss"],
            "top1": summary["finetuned"]["evaluation"]["top1"],
            "record_bytes": size,
            "steps": summary["distilled"]["steps"],
            "train_seconds": summary["distilled"]["train_seconds"],
        },
    )


def read_results(place: Place) -> dict[str, dict[int, dict]]:
    """Of each arm by seed: the figures, and each clip's losses [C] under `clips`."""
    found: dict[str, dict[int, dict]] = {}
    for arm in ARMS:
        for path in sorted(place.result(arm, 0).parent.glob(f"{_file_name(arm)}-seed-*.json")):
            figures = json.loads(path.read_text(encoding="utf-8"))
            clips = load_file(path.with_suffix(".safetensors"))
            found.setdefault(arm, {})[figures["seed"]] = {**figures, "clips": clips}
    return found


def compare(found: dict[str, dict[int, dict]], arm: str, reference: str) -> dict:
    """An arm less another, over the seeds that both have: losses in percent, top-1 in points.

    Each is a mean and half of its 95 % interval: Student's t over seeds, or, under `clips`, over
    the held-out clips with the networks as they are.
    """
    seeds = sorted(found[arm].keys() & found[reference].keys())
    pairs = [(found[arm][seed], found[reference][seed]) for seed in seeds]
    result: dict = {"arm": arm, "reference": reference, "seeds": len(seeds)}
    for name in ("loss", "middle"):
        base = statistics.mean(theirs[f"held_out_{name}"] for _, theirs in pairs)
        ours = [100 * (a[f"held_out_{name}"] - b[f"held_out_{name}"]) / base for a, b in pairs]
        clips = torch.stack([a["clips"][name] - b["clips"][name] for a, b in pairs]).double()
        result[name] = interval(ours)
        result[f"{name} over clips"] = interval((100 * clips.mean(0) / base).tolist())
    result["top1"] = interval([a["top1"] - b["top1"] for a, b in pairs])
    return result


def noise_response(found: dict[str, dict[int, dict]], name: str) -> dict[str, tuple] | None:
    """What each code costs if loss rises in proportion to its squared error, in percent.

    One slope a seed through all codes, by least squares with fp16 as the origin.
    """
    seeds = set.intersection(*(set(found.get(arm, ())) for arm in ("fp16", *NOISE)))
    if len(seeds) < 2:
        return None
    base = statistics.mean(found["fp16"][seed][name] for seed in seeds)
    slopes = []
    for seed in sorted(seeds):
        rise = {arm: found[arm][seed][name] - found["fp16"][seed][name] for arm in NOISE}
        products = sum(NOISE[arm] * rise[arm] for arm in NOISE)
        slopes.append(100 * products / base / sum(noise**2 for noise in NOISE.values()))
    mean, half = interval(slopes)
    return {arm: (mean * NOISE[arm], half * NOISE[arm]) for arm in NOISE}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % confidence interval by Student's t."""
    if len(values) < 2:
        return values[0], math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), spread * float(student_t.ppf(0.975, len(values) - 1))


def large_record_bytes(codes: str, tokens: str) -> int:
    """Bytes of a record of the 1B teacher's for S/14 (its recipe's views and mask)."""
    changes = [f"objective.cache.codes={codes}", f"objective.cache.tokens={tokens}"]
    return sum(record_bytes(load_recipe("S14", changes)).values())


def report(place: Place) -> tuple[dict, str]:
    """Figures, and the same as Markdown."""
    found = read_results(place)
    figures = {
        "arms": {
            arm: [
                {name: value for name, value in one.items() if name not in ("arm", "clips")}
                for _, one in sorted(seeds.items())
            ]
            for arm, seeds in found.items()
        },
        "comparisons": {
            title: [compare(found, arm, against) for arm in arms if arm in found]
            for title, (against, arms) in COMPARISONS.items()
            if against in found
        },
        "noise_response": {
            name: noise_response(found, f"held_out_{name}") for name in ("loss", "middle")
        },
        "bytes_1B_for_S14": {
            **{codes: large_record_bytes(codes, "visible") for codes in ("fp16", *NOISE)},
            "4bit superset": large_record_bytes("4bit", "superset"),
        },
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    return figures, "\n".join(_markdown(figures))


def _markdown(figures: dict) -> list[str]:
    arms = figures["arms"]
    half = arms["fp16"][0]["record_bytes"] if "fp16" in arms else math.nan
    lines = _table(
        TABLES.removeprefix("## "),
        (
            "arm",
            "seeds",
            "bytes a record",
            "fp16's over it",
            "held-out loss",
            "of it middle",
            "top-1",
        ),
        [
            (
                arm,
                str(len(runs)),
                f"{runs[0]['record_bytes']:,.0f}" if runs[0]["record_bytes"] else "none kept",
                f"{half / runs[0]['record_bytes']:.2f}" if runs[0]["record_bytes"] else "",
                *(
                    f"{statistics.mean(run[name] for run in runs):.{digits}f}"
                    for name, digits in (("held_out_loss", 4), ("held_out_middle", 4), ("top1", 1))
                ),
            )
            for arm, runs in arms.items()
        ],
    )
    for title, rows in figures["comparisons"].items():
        lines += _table(
            title,
            ("arm", "less", "seeds", *(f"{n}, %" for n in DIFFERENCES[:-1]), "top-1, points"),
            [
                (
                    row["arm"],
                    row["reference"],
                    str(row["seeds"]),
                    *(_plus_minus(row[name]) for name in DIFFERENCES),
                )
                for row in rows
            ],
        )
    responses = {name: rows for name, rows in figures["noise_response"].items() if rows}
    if responses:
        lines += _table(
            "Codes, if loss rises in proportion to their squared error",
            ("arm", *(f"{name}, %" for name in responses)),
            [(arm, *(_plus_minus(rows[arm]) for rows in responses.values())) for arm in NOISE],
        )
    large = figures["bytes_1B_for_S14"]
    lines += _table(
        "A record of the 1B teacher for S/14 (8 x 224 x 224, 80 % masked)",
        ("codes", "bytes a record", "fp16's over it"),
        [(codes, f"{size:,}", f"{large['fp16'] / size:.2f}") for codes, size in large.items()],
    )
    return lines


def _plus_minus(pair: tuple[float, float]) -> str:
    mean, half = pair
    text = f"{mean:+.2f} ± {half:.2f}"
    return f"**{text}**" if abs(mean) > half else text


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(headings) + " |"]
    lines += ["|" + "---|" * len(headings)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _file_name(arm: str) -> str:
    return arm.replace(" ", "-")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path, help="goes on where an earlier call was stopped")
    arguments.add_argument("overrides", nargs="*", help="of the recipe, as section.key=value")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--report", action="store_true", help="train nothing")
    arguments.add_argument("--json", type=Path, help="write figures here, tables to .md beside")
    options = arguments.parse_intermixed_args()
    configure()
    place = Place(options.folder, tuple(options.overrides))
    if not options.report:
        recipe = place.study("live", 0).stages["distilled"]
        make_demo(recipe.data.demo)
        clips = held_out(place)
        for arm in options.arms:
            for seed in options.seeds:
                run(place, arm, seed, clips)
    figures, text = report(place)
    Console().print(text, markup=False, soft_wrap=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        page = options.json.with_suffix(".md")
        above = (
            page.read_text(encoding="utf-8") if page.exists() else "# The cache and the student\n\n"
        )
        page.write_text(above.partition(TABLES)[0] + text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
