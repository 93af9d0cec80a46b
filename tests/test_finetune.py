"""A run with all of finetuning: augmentation, repeats, mixing, decays, drop path, averages."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import videos
from safetensors.torch import load_file
from tiny_runs import metrics, stop_after, timeless
from torch.testing import assert_close

from distill import recipe as schema
from distill.checkpoint import latest_checkpoint, load_checkpoint
from distill.objective import ClassifyObjective
from distill.recipe_file import dump_recipe
from distill.run.interrupt import Interrupted
from distill.train import train

CLASSES = 3
TRAIN_CLIPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(TRAIN_CLIPS + 3):
        videos.write(folder / f"{number}.mp4", num_frames=20 + number)
    lines = [f"{number}.mp4,{number % CLASSES}\n" for number in range(TRAIN_CLIPS + 3)]
    (folder / "train.csv").write_text("".join(lines[:TRAIN_CLIPS]))
    (folder / "val.csv").write_text("".join(lines[TRAIN_CLIPS:]))
    return folder


def everything(folder: Path, **changes) -> schema.Recipe:
    """Four steps an epoch; the last has two views, and every batch two micro-batches else."""
    tree = {
        "name": "everything",
        "run": {"seed": 5, "log_steps": 1},
        "data": {
            "train": {"list": str(folder / "train.csv")},
            "val": {"list": str(folder / "val.csv")},
            "test": {"list": str(folder / "val.csv")},
            "views": {"frames": 2, "image_size": 28, "crop": "resized"},
            "augment": {"rand_augment": {}, "erase": {"probability": 0.5}, "repeats": 2},
            "workers": 1,
        },
        "model": {
            "size": {"width": 32, "depth": 2, "heads": 2, "pooled_width": 16, "layer_scale": 0.5},
            "drop_path": 0.3,
            "head_drop_path": 0.2,
            "checkpoint_blocks": 1,
        },
        "objective": {"kind": "classify", "num_classes": CLASSES, "fc_drop": 0.2, "mixing": {}},
        "optim": {
            "lr": 2e-2,
            "lr_per_batch": None,
            "batch_size": 4,
            "micro_batch": 2,
            "epochs": 2,
            "warmup_epochs": 0.5,
            "layer_decay": 0.8,
            "ema": 0.7,
        },
        "evaluate": {"clips": 1, "crops": 1},
        **changes,
    }
    return schema.Recipe.model_validate(tree)


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The final weights, raw and averaged, and all that the last checkpoint holds."""
    last = load_checkpoint(latest_checkpoint(folder / "checkpoints"))
    names = ("model.safetensors", "model_ema.safetensors")
    parts = {name: load_file(folder / name) for name in names}
    return {**parts, "weights": last.weights, "optimizer": last.optimizer, "ema": last.ema}


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    for part in theirs:
        assert ours[part].keys() == theirs[part].keys()
        for name in theirs[part]:
            assert_close(ours[part][name], theirs[part][name], rtol=0, atol=0, msg=name)
    lines = [[timeless(line) for line in metrics(place)] for place in (found, expected)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, dict]:
    place = tmp_path_factory.mktemp("finished")
    return place, train(everything(folder), place)


def test_averaged_weights_are_saved_and_evaluated_beside_the_raw_ones(finished, folder, tmp_path):
    place, summary = finished
    assert summary["steps"] == 8
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    checks = [line for line in lines if "val/top1" in line]
    assert [line["step"] for line in checks] == [4, 8]
    assert all(0 <= line[f"val/ema_{name}"] <= 100 for line in checks for name in ("top1", "top5"))
    assert summary["ema"]["weights"] == str(place / "model_ema.safetensors")
    raw, averaged = (load_file(place / f"{name}.safetensors") for name in ("model", "model_ema"))
    assert float((raw["head.weight"] - averaged["head.weight"]).abs().max()) > 1e-4
    scores = load_file(place / "ema/scores.safetensors")["logits"]
    assert not torch.equal(scores, load_file(place / "scores.safetensors")["logits"])

    for name, expected in (("model", place), ("model_ema", place / "ema")):
        again = everything(folder).model_dump(mode="json")
        again["optim"] |= {"epochs": 0, "warmup_epochs": 0, "ema": None}
        again["model"]["weights"] = {
            "checkpoint": str(place / f"{name}.safetensors"), "head": "keep"
        }  # fmt: skip
        result = train(schema.Recipe.model_validate(again), tmp_path / name)
        about = summary if name == "model" else summary["ema"]
        assert result["evaluation"]["top1"] == about["evaluation"]["top1"]
        found = load_file(tmp_path / name / "scores.safetensors")["logits"]
        assert_close(found, load_file(expected / "scores.safetensors")["logits"], rtol=0, atol=0)


def test_every_part_reaches_the_model(folder, tmp_path, monkeypatch):
    """Mixed soft targets of floating point pixels, two views of a clip side by side."""
    seen = []
    forward = ClassifyObjective.forward

    def spy(self, batch):
        seen.append({name: value for name, value in batch.items()})
        return forward(self, batch)

    monkeypatch.setattr(ClassifyObjective, "forward", spy)
    train(everything(folder), tmp_path)
    assert [len(batch["clip_id"]) for batch in seen] == [2] * 14
    first = seen[0]
    assert first["pixels"].dtype == torch.float32
    assert first["repeat"].tolist() == [0, 1] and len(set(first["clip_id"].tolist())) == 1
    targets = torch.cat([batch["target"] for batch in seen])
    assert_close(targets.sum(1), torch.ones(len(targets)))
    assert [batch["epoch"] for batch in seen] == [0] * 7 + [1] * 7
    views = [batch["view"].tolist() for batch in seen]
    assert views == [[0, 1]] * 7 + [[2, 3]] * 7


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_ends_with_the_same_bits(finished, folder, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        # An evaluation looks for a stop after its batch too, of raw and of averaged weights.
        stop_after(patch, step if step <= 4 else step + 2)
        with pytest.raises(Interrupted):
            train(everything(folder), tmp_path)
    assert load_checkpoint(latest_checkpoint(tmp_path / "checkpoints")).state["step"] == step
    assert not (tmp_path / "summary.json").exists()
    train(everything(folder), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_a_killed_run_ends_with_the_same_bits(finished, folder, tmp_path):
    place = tmp_path / "run"
    run = {"seed": 5, "log_steps": 1, "save_minutes": 1e-9, "folder": str(place)}
    (tmp_path / "everything.yaml").write_text(dump_recipe(everything(folder, run=run)))
    command = [sys.executable, "-m", "distill", "train", str(tmp_path / "everything.yaml")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list(place.glob("checkpoints/step-0000000[2-7]")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (place / "summary.json").exists()
    train(everything(folder, run=run), place)
    assert_same_run(place, finished[0])
