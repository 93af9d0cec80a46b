"""A student that is one of timm's models: distilled from cached targets or live ones, finetuned."""

import json
from pathlib import Path

import pytest
import timm
import toys
from safetensors.torch import load_file
from test_cache_build import write_videos
from timm.models import register_model
from tiny_video import TinyVideo
from torch.testing import assert_close

from distill.recipe import Recipe
from distill.train import train

TEACHER = {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48, "layer_scale": 0.3}


@pytest.fixture(scope="module", autouse=True)
def here():
    """Clips come from workers in other processes' runs alone."""
    with pytest.MonkeyPatch.context() as patch:
        toys.load_here(patch)
        yield


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


@register_model
def tiny_video(**settings) -> TinyVideo:
    """A video model of somebody's own, given to timm as any model is."""
    return TinyVideo(**settings)


def test_a_video_model_of_timms_registry_is_a_student(videos, tmp_path):
    assert timm.is_model("tiny_video")
    recipe = make_recipe(videos, distil(tmp_path, targets="live"), timm="tiny_video")
    optim = recipe.optim.model_copy(update={"lr_per_batch": None})
    distilled = train(recipe.model_copy(update={"optim": optim}), tmp_path / "live")
    metrics = (tmp_path / "live" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["middle"] + line["pooled"], rel=1e-5)
        assert line["middle"] == pytest.approx((line["layer_00"] + line["layer_01"]) / 2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    state = load_file(distilled["weights"])
    assert state["trunk.stem.weight"].shape == (8, 3, 2, 8, 8)  # of two frames together
    assert state["clip_decoder.1.head.2.weight"].shape == (96, 12)
    classify = {"kind": "classify", "num_classes": 2, "trainable": "head"}
    weights = {"checkpoint": distilled["weights"]}
    recipe = make_recipe(videos, classify, timm="tiny_video", weights=weights)
    probed = load_file(train(recipe, tmp_path / "probe")["weights"])
    assert_close(probed["trunk.stem.weight"], state["trunk.stem.weight"], rtol=0, atol=0)
