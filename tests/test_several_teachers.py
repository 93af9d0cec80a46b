"""A student of several teachers, as in stage-1 pretraining: from videos to losses, all tiny."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from test_cache_build import BUILD, no_progress, write_videos
from torch.testing import assert_close

from distill.cache.build import build_cache
from distill.cache.identity import cache_identity, other_teachers
from distill.cache.inspect import inspect_cache, open_any
from distill.cache.read import Cache
from distill.cache.recompute import recompute
from distill.cache.verify import verify_cache
from distill.data.index import read_list
from distill.data.load import load_view
from distill.errors import StateError
from distill.job import build_job
from distill.models import build_teacher
from distill.recipe import Recipe, read_views
from distill.students.vit import patchify
from distill.train import train

CLIPS = 6
INTERNVL = {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48, "layer_scale": 0.3}
MAE = {
    "kind": "videomae",
    "size": {"width": 64, "depth": 2, "heads": 2, "init_std": 0.1},
    "random": True,
    "frames": 8,
    "layers": 2,
    "interval": 1,
    "weight": 0.5,
}
VIDEO = {
    "size": {"width": 80, "depth": 3, "heads": 2, "pooled_width": 32, "layer_scale": 0.3},
    "random": True,
    "layers": 1,
    "interval": 1,
    "decoder": "linear",
}
IMAGE = {
    "kind": "timm",
    "model": "test_vit",
    "random": True,
    "image_size": 64,
    "layers": 2,
    "interval": 1,
}
ALL = {"mae": MAE, "video": VIDEO, "image": IMAGE}


@pytest.fixture(scope="module", autouse=True)
def here():
    """Clips come from workers in other processes' runs alone."""
    with pytest.MonkeyPatch.context() as patch:
        toys.load_here(patch)
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("clips"), CLIPS)


def make_recipe(clips, folder, *, others=None, teacher=None, objective=None, **cache) -> Recipe:
    """A recipe with InternVL as its main teacher, four frames to a student."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "run": {"seed": 3, "log_steps": 1},
            "data": {
                "train": {"list": str(clips / "train.csv")},
                "views": {"frames": 4, "image_size": 56, "sampling": {"kind": "segment"}},
                "workers": 1,
            },
            "model": {"size": {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48}},
            "objective": {
                "kind": "distill",
                "teacher": {
                    "kind": "internvl",
                    "size": INTERNVL,
                    "random": True,
                    "layers": 2,
                    "interval": 1,
                    **(teacher or {}),
                },
                "others": ALL if others is None else others,
                "mask": {"kind": "attention-per-frame", "ratio": 0.75},
                "cache": {
                    "folder": str(folder),
                    "views": 2,
                    "codes": "8bit",
                    "batch_size": 2,
                    "shard_minutes": 1e-9,
                    **cache,
                },
                **(objective or {}),
            },
            "optim": {"lr": 1e-3, "batch_size": 2, "epochs": 2},
        }
    )


@pytest.fixture(scope="module")
def built(clips, tmp_path_factory):
    recipe = make_recipe(clips, tmp_path_factory.mktemp("built") / "cache")
    report = build_cache(recipe, progress=no_progress)
    assert (report.written, report.in_cache) == (2 * CLIPS, 2 * CLIPS)
    return recipe


def records(recipe):
    """Arrays of every record by clip id and view."""
    cache = Cache.open(recipe.objective.cache.folder, recipe)
    return {
        (int(clip), view): cache.read(int(row))[0]
        for clip, rows in zip(cache.clip_ids, cache.rows, strict=True)
        for view, row in enumerate(rows)
    }


def metrics(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_record_holds_what_each_teacher_says_of_its_own_frames(built):
    cache = Cache.open(built.objective.cache.folder, built)
    arrays, info = cache.read(int(cache.rows[2, 1]))
    shapes = {name: array.shape for name, array in arrays.items()}
    # 4 frames of 16 - int(12.0) = 4 patches
    assert shapes == {
        "tokens": (16,),
        "patches": (16, 588),
        "codes": (2, 17, 96),
        "scales": (2, 17),
        "codes.mae": (2, 16, 64),
        "scales.mae": (2, 16),
        "codes.video": (1, 17, 80),
        "scales.video": (1, 17),
        "codes.image": (2, 16, 64),
        "scales.image": (2, 16),
        "pooled": (48,),
        "attention": (64,),
    }
    assert np.bincount(arrays["tokens"] // 16).tolist() == [4, 4, 4, 4]
    assert len(info["frames"]) == 8
    clip = read_list(built.data.train)[2]
    view = load_view(clip, 1, views=read_views(built), seed=0)
    assert view.frames.tolist() == info["frames"]
    pixels = torch.from_numpy(view.pixels)[None]
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    assert torch.equal(
        torch.from_numpy(arrays["patches"]), patchify(pixels[:, :, ::2])[0, tokens]
    ), "a student sees every second frame, from the first on"
    for name, codec in {"": cache.codec, **cache.codec.others}.items():
        teacher = build_teacher(built, name)
        frames = pixels if name == "mae" else pixels[:, :, ::2]
        assert teacher.frames == frames.shape[2]
        states, _, _ = teacher.hidden(frames)
        rows = F.pad(tokens + 1, (1, 0)) if teacher.has_cls else tokens
        expected = torch.stack([F.normalize(state[0, rows].float(), dim=-1) for state in states])
        dot = f".{name}" if name else ""
        found = codec.decode(*(torch.from_numpy(arrays[f"{x}{dot}"]) for x in ("codes", "scales")))
        assert_close(found, expected, rtol=0, atol=0.01)
        assert codec.means.shape == (len(expected), teacher.embed_dim)
    assert_close(
        torch.from_numpy(arrays["attention"]).reshape(4, 16).sum(1), torch.ones(4), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("tokens", ["visible", "superset"])
def test_cached_and_live_runs_have_the_same_losses(clips, tokens, tmp_path):
    """Step by step and part by part, up to half precision."""
    cached = make_recipe(clips, tmp_path / "cache", tokens=tokens, codes="fp16")
    live = make_recipe(
        clips, tmp_path / "cache", tokens=tokens, codes="fp16", objective={"targets": "live"}
    )
    summary = train(cached, tmp_path / "cached")
    train(live, tmp_path / "live")
    found, expected = metrics(tmp_path / "cached"), metrics(tmp_path / "live")
    names = ["loss", "middle", "pooled", "layer_00", "layer_01"]
    names += ["mae", "mae_layer_00", "mae_layer_01", "video", "video_layer_00"]
    names += ["image", "image_layer_00", "image_layer_01"]
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-3)
        parts = mine["middle"] + mine["pooled"] + 0.5 * mine["mae"] + mine["video"] + mine["image"]
        assert mine["loss"] == pytest.approx(parts, rel=1e-5)
        assert mine["mae"] == pytest.approx((mine["mae_layer_00"] + mine["mae_layer_01"]) / 2)
    assert set(names) <= set(summary["last"])
    assert found[-1]["loss"] < found[0]["loss"]


def test_codes_of_eight_bits_change_the_losses_by_their_rounding(built, tmp_path):
    live = built.model_copy(
        update={"objective": built.objective.model_copy(update={"targets": "live"})}
    )
    for name, recipe in (("cached", built), ("live", live)):
        train(recipe, tmp_path / name)
    for mine, theirs in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "live"), strict=True):
        for name in ("loss", "middle", "mae", "video", "image"):
            assert mine[name] == pytest.approx(theirs[name], abs=5e-3)


def test_a_killed_build_goes_on_with_all_teachers(built, clips, tmp_path):
    recipe = make_recipe(clips, tmp_path / "cache")
    (tmp_path / "build.py").write_text(BUILD)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, tmp_path / "build.py", tmp_path / "recipe.json"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "cache").glob("shard-*"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    report = build_cache(recipe, progress=no_progress)
    assert 4 <= report.present < 2 * CLIPS and report.present + report.written == 2 * CLIPS
    found, expected = records(recipe), records(built)
    assert found.keys() == expected.keys()
    for key, arrays in expected.items():
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[key][name], value, err_msg=name)


@pytest.mark.parametrize("names", [(), ("mae",), ("video", "image")])
def test_fewer_teachers_are_read_from_a_cache_of_more(built, clips, tmp_path, names):
    folder = built.objective.cache.folder
    others = {name: ALL[name] for name in names}
    if "mae" in names:
        others["mae"] = {**MAE, "layers": 1}
    part = make_recipe(clips, folder, others=others, teacher={"layers": 1})
    whole = build_job(built, tmp_path, device=torch.device("cpu"))
    job = build_job(part, tmp_path, device=torch.device("cpu"))
    found, expected = (one.prepare(next(one.batches.epoch(0))) for one in (job, whole))
    assert {name for name in found if name.startswith("middle.")} == {f"middle.{n}" for n in names}
    assert_close(found["middle"], expected["middle"][1:])
    for name in names:
        layers = 1 if name == "mae" else ALL[name]["layers"]
        assert_close(found[f"middle.{name}"], expected[f"middle.{name}"][-layers:])
    losses = job.objective(found)
    assert losses["loss"].isfinite() and set(names) <= set(losses)
    assert verify_cache(folder, recipe=part, progress=no_progress).problems == []


def test_more_teachers_than_are_cached_are_refused(clips, tmp_path):
    folder = tmp_path / "cache"
    alone = make_recipe(clips, folder, others={"video": VIDEO})
    build_cache(alone, progress=no_progress)
    more = make_recipe(clips, folder, others={"mae": MAE, "video": VIDEO})
    line = (
        f"cache {folder}: holds nothing of objective.others.mae; leave that teacher out of the "
        "recipe, or set objective.cache.folder to a new folder and run 'distill cache-teacher'"
    )
    for attempt in (lambda: Cache.open(folder, more), lambda: build_cache(more)):
        with pytest.raises(StateError) as error:
            attempt()
        assert str(error.value) == line


ASKED = ", the recipe asks for "
SETTINGS = [
    ({"layers": 1}, f" blocks [0,1]{ASKED}[1]; set objective.cache.folder"),
    ({"precision": "bf16"}, f".precision fp32{ASKED}bf16; set objective.others.mae.precision=fp32"),
    ({"frames": 4}, f".frames 8{ASKED}none; set objective.others.mae.frames=8, or"),
    ({"mean": (0.5, 0.5, 0.5)}, f".mean none{ASKED}[0.5,0.5,0.5]; set objective.cache.folder"),
    ({"std": (0.5, 0.5, 0.5)}, f".std none{ASKED}[0.5,0.5,0.5]; set objective.cache.folder"),
    ({"size": {**MAE["size"], "heads": 4}}, ".size 64x2x2, mlp_ratio 4.0, pooled_width 768, the"),
    (
        {"random": False, "weights": {"checkpoint": "m.pth", "sha256": "AB12"}},
        f" weights (sha256) random, seed 3{ASKED}ab12; set objective.cache.folder",
    ),
]


def test_no_setting_of_a_teacher_is_without_a_test(built):
    """But its kind and its model, which have tests of their own."""
    told = {re.match(r"( blocks|\.\w+| weights \(sha256\))", line)[1] for _, line in SETTINGS}
    place = "objective.others.mae"
    found = {name.removeprefix(place) for name in cache_identity(built) if name.startswith(place)}
    assert found == (told | {".kind"}) - {".mean", ".std"}


def test_another_kind_of_teacher_is_named(built, clips):
    folder = built.objective.cache.folder
    kind = {**ALL, "mae": {**MAE, "kind": "internvideo2"}}
    for other, line in (
        (
            make_recipe(clips, folder, others=kind),
            "others.mae.kind videomae, the recipe asks for i",
        ),
        (
            make_recipe(clips, folder, teacher={"kind": "internvideo2"}),
            "teacher.kind internvl, the recipe asks for internvideo2; set objective.te",
        ),
    ):
        with pytest.raises(StateError, match=f"^cache {folder}: holds objective.{line}"):
            Cache.open(folder, other)


@pytest.mark.parametrize(("change", "line"), SETTINGS)
def test_another_setting_of_a_teacher_is_named(built, clips, change, line):
    folder = built.objective.cache.folder
    other = make_recipe(clips, folder, others={**ALL, "mae": {**MAE, **change}})
    with pytest.raises(StateError) as error:
        Cache.open(folder, other, allow_missing=True)
    assert str(error.value).startswith(f"cache {folder}: holds objective.others.mae{line}")


def test_a_model_of_timms_and_its_image_size_are_named(built, clips):
    folder = built.objective.cache.folder
    for change, line in (
        (
            {"model": "test_vit2"},
            "model test_vit, the recipe asks for test_vit2; set objective.oth",
        ),
        ({"image_size": 32}, "image_size 64, the recipe asks for 32; set objective.others.image.i"),
    ):
        other = make_recipe(clips, folder, others={**ALL, "image": {**IMAGE, **change}})
        with pytest.raises(StateError, match=f"holds objective.others.image.{line}"):
            Cache.open(folder, other)


def test_the_activation_is_part_of_every_teacher_that_has_one(built, clips):
    folder = built.objective.cache.folder
    video = {**ALL, "video": {**VIDEO, "activation": "gelu"}}
    for other, place in (
        (make_recipe(clips, folder, teacher={"activation": "gelu"}), "teacher"),
        (make_recipe(clips, folder, others=video), "others.video"),
    ):
        line = f"holds objective.{place}.activation gelu_tanh, the recipe asks for gelu;"
        with pytest.raises(StateError, match=line):
            Cache.open(folder, other)


def test_the_order_of_teachers_has_no_say(clips):
    """In the fields of a record, in the losses, or in a student's first weights."""
    orders = [ALL, dict(reversed(ALL.items()))]
    recipes = [make_recipe(clips, "unused", others=order) for order in orders]
    assert recipes[0] == recipes[1]
    for recipe in recipes:
        assert list(recipe.objective.others) == ["image", "mae", "video"]
        assert other_teachers(cache_identity(recipe)) == ["image", "mae", "video"]


def test_settings_of_a_loss_are_not_a_caches(built, clips):
    folder = built.objective.cache.folder
    others = {**ALL, "mae": {**MAE, "weight": 2.0, "decoder": "linear"}}
    assert cache_identity(make_recipe(clips, folder, others=others)) == cache_identity(built)


def test_a_cache_of_several_teachers_is_inspected_and_verified(built):
    folder = built.objective.cache.folder
    report = inspect_cache(folder)
    teachers = [layer.teacher for layer in report.layers]
    assert teachers == ["", "", "image", "image", "mae", "mae", "video"]
    assert report.field_bytes["codes.mae"] == 2 * 16 * 64
    assert report.visible_by_frame == pytest.approx([0.25] * 4)
    assert verify_cache(folder, recipe=built, progress=no_progress).problems == []
    again = recompute(open_any(folder), built, 4, progress=no_progress)
    assert again.problems == [] and again.same_pixels == again.same_tokens == 4
    expected = ["layer 0", "layer 1", "image layer 0", "image layer 1"]
    expected += ["mae layer 0", "mae layer 1", "video layer 0", "pooled"]
    assert list(again.rows) == expected
    assert all(0 < again.rows[name].expected < 1e-3 for name in expected[:-1])


def test_rows_of_another_teacher_are_found(built, clips, monkeypatch):
    """Only one of three has other weights than the cache's."""

    def build(recipe, name):
        seed = recipe.run.seed + (name == "mae")
        run = recipe.run.model_copy(update={"seed": seed})
        return build_teacher(recipe.model_copy(update={"run": run}), name)

    monkeypatch.setattr("distill.cache.live.build_teacher", build)
    again = recompute(open_any(built.objective.cache.folder), built, 2, progress=no_progress)
    assert len(again.problems) == 2
    assert all(": mae layer " in line for line in again.problems)


def test_gaps_are_filled_by_all_teachers(built, clips, tmp_path):
    partial = make_recipe(clips, tmp_path / "cache", objective={"targets": "hybrid"})
    build_cache(partial, limit=4, progress=no_progress)
    expected = train(built, tmp_path / "cached")
    found = train(partial, tmp_path / "hybrid")
    assert found["hit_rate"] == 4 / 6
    for name, value in expected["last"].items():
        assert found["last"][name] == pytest.approx(value, abs=2e-3)
