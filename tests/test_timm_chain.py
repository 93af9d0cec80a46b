"""A student that is one of timm's models: distilled from cached targets or live ones, finetuned."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_cache_build import write_videos
from torch.testing import assert_close

from distill.recipe import Recipe
from distill.train import train

TEACHER = {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48, "layer_scale": 0.3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = write_videos(tmp_path_factory.mktemp("videos"), 6)
    lines = "".join(f"{number}.mp4,{number % 2}\n" for number in range(6))
    (folder / "train.csv").write_text(lines)
    return folder


def make_recipe(videos, objective, **model) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "run": {"log_steps": 1},
            "data": {
                "train": {"list": str(videos / "train.csv")},
                "test": {"list": str(videos / "train.csv")},
                "views": {"frames": 4, "image_size": 56},
                "workers": 1,
            },
            "model": {"timm": "test_resnet", **model},
            "objective": objective,
            "optim": {"lr": 1e-3, "batch_size": 3, "epochs": 2},
            "evaluate": {"clips": 1, "crops": 1, "every_epochs": 0},
        }
    )


def distil(cache, *, targets) -> dict:
    return {
        "kind": "distill",
        "teacher": {"size": TEACHER, "random": True, "layers": 2, "interval": 1},
        "mask": {"kind": "random", "ratio": 0.5},
        "targets": targets,
        "cache": {
            "folder": str(cache),
            "views": 1,
            "codes": "fp16",
            "tokens": "all",
            "pixels": "full",
            "batch_size": 3,
        },
    }


def test_a_model_of_timms_is_distilled_and_finetuned(videos, tmp_path):
    losses = {}
    for targets in ("cached", "live"):
        folder = tmp_path / targets
        train(make_recipe(videos, distil(tmp_path / "cache", targets=targets)), folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[targets] = [line for line in map(json.loads, lines) if "loss" in line]
    assert len(losses["cached"]) == len(losses["live"]) == 4
    for mine, theirs in zip(losses["cached"], losses["live"], strict=True):
        for name in ("loss", "middle", "pooled", "layer_00", "layer_01"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-3)
    weights = tmp_path / "cached" / "model.safetensors"
    trunk = {name: value for name, value in load_file(weights).items() if name.startswith("trunk.")}
    classify = {"kind": "classify", "num_classes": 2, "trainable": "head"}
    recipe = make_recipe(videos, classify, weights={"checkpoint": str(weights)})
    summary = train(recipe, tmp_path / "probe")
    assert 0 <= summary["evaluation"]["top1"] <= 100
    probed = load_file(tmp_path / "probe" / "model.safetensors")
    for name, value in trunk.items():
        assert_close(probed[name], value, rtol=0, atol=0, msg=name)
    recipe = make_recipe(
        videos, {**classify, "trainable": "all"}, weights={"checkpoint": str(weights)}
    )
    train(recipe, tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert any(not tuned[name].equal(value) for name, value in trunk.items())
    assert Path(summary["weights"]).exists()
