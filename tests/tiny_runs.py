"""Runs of seconds on real videos, which several test files start, stop and compare."""

import json
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
from safetensors.torch import load_file
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.recipe_file import dump_recipe
from distill.run.interrupt import Interrupted, StopRequest
from distill.run.meter import RATES

# What another order of float32 sums leaves after a few steps.
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}

TRAIN_CLIPS, VAL_CLIPS, CLASSES = 10, 6, 3


def write_video(path: Path, number: int) -> None:
    """Ten frames whose brightness tells the class, and whose noise tells the clip."""
    rng = np.random.default_rng(number)
    level = 20 + 80 * (number % CLASSES)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            noise = rng.integers(0, 40, (48, 64, 3))
            frame = av.VideoFrame.from_ndarray((level + noise).astype(np.uint8), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_clips(folder: Path) -> Path:
    """Videos, train.csv and val.csv in the folder, which is returned."""
    for number in range(TRAIN_CLIPS + VAL_CLIPS):
        write_video(folder / f"{number}.mp4", number)
    lines = [f"{number}.mp4,{number % CLASSES}" for number in range(TRAIN_CLIPS + VAL_CLIPS)]
    (folder / "train.csv").write_text("\n".join(lines[:TRAIN_CLIPS]) + "\n")
    (folder / "val.csv").write_text("\n".join(lines[TRAIN_CLIPS:]) + "\n")
    return folder


SIZE = {"width": 32, "depth": 2, "heads": 2, "pooled_width": 16}


def classify(videos: Path, **changes) -> schema.Recipe:
    """Three steps an epoch, the last of two clips; every kind of randomness takes part."""
    tree = {
        "name": "tiny",
        "run": {"seed": 5, "log_steps": 1},
        "data": {
            "train": {"list": str(videos / "train.csv")},
            "val": {"list": str(videos / "val.csv")},
            "test": {"list": str(videos / "val.csv")},
            "views": {"frames": 2, "image_size": 28, "crop": "resized"},
            "workers": 1,
        },
        "model": {"size": SIZE, "drop_path": 0.3},
        "objective": {"kind": "classify", "num_classes": CLASSES, "fc_drop": 0.2},
        "optim": {
            "lr": 2e-2,
            "lr_per_batch": None,
            "batch_size": 4,
            "micro_batch": 3,
            "epochs": 2,
            "warmup_epochs": 0.5,
            "layer_decay": 0.8,
            "clip_grad": 1.0,
        },
        "evaluate": {"clips": 2, "crops": 1},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        section = tree
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return schema.Recipe.model_validate(tree)


def distil(videos: Path, targets: str, **changes) -> schema.Recipe:
    objective = {
        "kind": "distill",
        "teacher": {"size": SIZE, "random": True, "layers": 2, "interval": 1.0},
        "mask": {"kind": "attention", "ratio": 0.5},
        "targets": targets,
        "cache": {"folder": str(videos / "cache"), "views": 2, "codes": "fp16"},
    }
    return classify(videos, objective=objective, **{"optim__warmup_epochs": 1, **changes})


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(line: dict) -> dict:
    return {k: v for k, v in line.items() if k not in RATES}


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit for bit: the final weights, AdamW's state, and every logged value but the rates."""
    for name in ("model.safetensors", latest_checkpoint(expected / "checkpoints").name):
        if name == "model.safetensors":
            one, other = load_file(found / name), load_file(expected / name)
        else:
            one = load_checkpoint(found / "checkpoints" / name).optimizer
            other = load_checkpoint(expected / "checkpoints" / name).optimizer
        assert one.keys() == other.keys()
        for key in other:
            assert_close(one[key], other[key], rtol=0, atol=0, msg=f"{name}: {key}")
    lines = [[timeless(line) for line in metrics(folder)] for folder in (found, expected)]
    assert lines[0] == lines[1]


def assert_alike(found: Path, expected: Path) -> None:
    """The same steps, values and weights but for rounding, and the same hits in evaluations."""
    ours, theirs = metrics(found), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name in other.keys() - set(RATES):
            assert_close(line[name], other[name], **ROUNDING)
    for name in ("model.safetensors", "model_ema.safetensors"):
        if (expected / name).exists():
            assert_close(load_file(found / name), load_file(expected / name), **ROUNDING)


def stop_after(monkeypatch, step: int) -> None:
    """As if SIGTERM came during `step`."""
    checks = iter(range(1, 10_000))

    def check(self, _: int | None = None) -> None:
        if next(checks) == step:
            raise Interrupted(143)

    monkeypatch.setattr(StopRequest, "check", check)


def torchrun(ranks: int) -> list[str]:
    """Python's arguments that start as many processes, at a port that is free."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run_cli(recipe: Path, *, ranks: int = 1) -> subprocess.Popen:
    """The command, in one process or several that torchrun starts."""
    start = torchrun(ranks) if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *start, "-m", "distill", "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + 300
    path = folder / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_recipe(recipe: schema.Recipe, path: Path, folder: Path) -> Path:
    run = recipe.run.model_copy(update={"folder": str(folder)})
    path.write_text(dump_recipe(recipe.model_copy(update={"run": run})))
    return path
