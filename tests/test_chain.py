"""Recipes that build on each other, end to end by their toys: only lists are given."""

import json
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file
from typer.testing import CliRunner

from distill.cli import app

LISTS = ("data.train.list=videos4.csv", "data.test.list=videos2.csv")


def shell(verb: str, recipe: str, *given: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [verb, recipe, "run.toy=true", *given])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs", f"{name}-toy", "model.safetensors"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """A folder in which a toy of S14.yaml has run."""
    folder = tmp_path_factory.mktemp("chain")
    toys.make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toys.load_here(patch)
        shell("train", "S14", LISTS[0])
    return folder


@pytest.fixture
def chain(distilled, monkeypatch, caplog):
    monkeypatch.chdir(distilled)
    toys.load_here(monkeypatch)
    return caplog


def test_distilled_then_finetuned_on_k710_and_on_k400(chain):
    text = shell("train", "k400/S14", *LISTS, code=2)
    assert text.startswith(
        "k400/S14: model.weights.checkpoint: runs/k710/S14-toy/model.safetensors"
    )
    assert "(distill train recipes/k710/S14.yaml makes it; upstream's: hf download" in text
    assert "; of a toy, its own toy does: run.toy=true); set model.weights.checkpoint" in text

    shell("train", "k710/S14", *LISTS)
    assert "unused: clip_decoder.* (12), clip_pos_embed, final_clip_decoder.* (6)" in chain.text
    shell("train", "k400/S14", *LISTS)
    assert "mapped: head.weight, 710 -> 400 classes (first)" in chain.text

    stages = {name: weights_of(name) for name in ("S14", "k710/S14", "k400/S14")}
    assert [stages[name]["head.weight"].shape[0] for name in ("k710/S14", "k400/S14")] == [710, 400]
    for before, after in (("S14", "k710/S14"), ("k710/S14", "k400/S14")):
        old, new = (stages[name]["blocks.0.attn.qkv.weight"] for name in (before, after))
        moved = (new - old).norm() / old.norm()
        assert 0 < moved < 0.1, "went on from the weights before, and did not start anew"
    summary = json.loads(Path("runs/k400/S14-toy/summary.json").read_text())
    assert (summary["steps"], summary["evaluation"]["num_clips"]) == (4, 2)
    assert summary["evaluation"]["clips"] * summary["evaluation"]["crops"] == 12

    text = shell("evaluate", "k400/S14", *LISTS)
    assert f"{summary['evaluation']['top1']:.2f}" in text


def test_distilled_then_probed(chain):
    shell("train", "k400/S14-attentive", *LISTS)
    before, after = weights_of("S14"), weights_of("k400/S14-attentive")
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
        assert torch.equal(before[name], after[name])
    pool = "clip_projector.cross_attn.proj.weight"
    assert 0 < (after[pool] - before[pool]).norm() / before[pool].norm() < 0.1
    assert after["head.weight"].shape == (400, 32)


def test_a_plan_names_what_is_missing(chain):
    text = shell("plan", "k600/S14")
    missing = text[text.index("missing before it can train") :]
    assert "data.train.list: not set (any copy of Kinetics-600;" in missing
    assert "data.test.list: not set" in missing
    assert "model.weights.checkpoint: runs/k710/S14-toy" not in missing
    assert "model.weights.checkpoint: runs/k710/L14-toy" in shell("plan", "k600/L14")
    found = json.loads(CliRunner().invoke(app, ["plan", "k600/L14", "--json"]).stdout)
    keys = [line.partition(":")[0] for line in found["missing"]]
    assert keys == ["data.train.list", "data.test.list", "model.weights.checkpoint"]
    assert "missing before it can train" not in shell("plan", "S14", LISTS[0])
