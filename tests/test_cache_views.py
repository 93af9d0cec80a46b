"""What real caches keep of a view: its pixels made again, and the tokens that epochs see."""

import json

import numpy as np
import pytest
import torch
import videos
from PIL import Image
from test_cache_build import no_progress
from torch.testing import assert_close

from distill import draw
from distill.cache.build import build_cache
from distill.cache.read import Cache
from distill.data.index import read_list
from distill.data.load import load_view, replay_view
from distill.errors import StateError
from distill.job import build_job
from distill.recipe import Recipe
from distill.students.vit import patchify

VIEWS = 2
TEACHER = {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Videos in a list that trims them, and folders of frames in another."""
    folder = tmp_path_factory.mktemp("clips")
    videos.write(folder / "plain.mp4", num_frames=40)
    videos.write(folder / "uneven.mkv", num_frames=60, ticks=videos.UNEVEN)
    videos.write(folder / "open.mp4", num_frames=40, options=videos.OPEN_GOP)
    videos.write(folder / "tall.mp4", num_frames=30, width=80, height=112)
    lines = [
        "k400 plain.mp4 1.6 0.4 1.2 0",
        "k400 plain.mp4 1.6 0.8 1.6 0",
        "k400 uneven.mkv -1 -1 -1 1",
        "k400 open.mp4 1.6 0.2 1.0 1",
        "ssv2 tall.mp4 -1 -1 -1 2",
    ]
    (folder / "trimmed.txt").write_text("\n".join(lines) + "\n")
    for name, shape in (("wide", (120, 80)), ("square", (90, 90))):
        (folder / name).mkdir()
        for number in range(20):
            frame = videos.burn(number, width=shape[0], height=shape[1])
            Image.fromarray(frame).save(folder / name / f"{number:05}.png")
    (folder / "frames.csv").write_text("wide,20,0\nsquare,12,1\n")
    return folder


def make_recipe(clips, folder, *, name="trimmed.txt", crop="multiscale", mask="attention", **cache):
    return Recipe.model_validate(
        {
            "name": "tiny",
            "run": {"seed": 3},
            "data": {
                "train": {"list": str(clips / name)},
                "views": {"frames": 4, "image_size": 56, "crop": crop, "min_area": 0.3},
                "workers": 1,
            },
            "model": {"size": {"width": 96, "depth": 3, "heads": 3, "pooled_width": 48}},
            "objective": {
                "kind": "distill",
                "teacher": {"size": TEACHER, "random": True, "layers": 2, "interval": 1},
                "mask": {"kind": mask, "ratio": 0.8},
                "cache": {
                    "folder": str(folder),
                    "views": VIEWS,
                    "seed": 5,
                    "codes": "fp16",
                    "batch_size": 2,
                    **cache,
                },
            },
            "optim": {"lr": 1e-3, "batch_size": 2, "epochs": 3},
        }
    )


SETTINGS = {
    "trimmed": {"tokens": "superset", "pixels": "full"},
    "resized": {"crop": "resized", "tokens": "all"},
    "frames": {"name": "frames.csv", "crop": "center", "pixels": "full"},
    "centred": {"crop": "center", "mask": "tube", "tokens": "all", "pixels": "full"},
}


@pytest.fixture(scope="module")
def caches(clips, tmp_path_factory):
    """A cache and its recipe for each of `SETTINGS`."""
    folder = tmp_path_factory.mktemp("caches")
    recipes = {name: make_recipe(clips, folder / name, **SETTINGS[name]) for name in SETTINGS}
    for recipe in recipes.values():
        build_cache(recipe, progress=no_progress)
    return recipes


def records(recipe):
    """Every record of a cache as clip, view, arrays, and what its view is."""
    cache = Cache.open(recipe.objective.cache.folder, recipe)
    for clip, rows in zip(read_list(recipe.data.train), cache.rows, strict=True):
        for view, row in enumerate(rows):
            yield clip, view, *cache.read(int(row))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_cached_view_is_made_again_bit_for_bit(caches, name, monkeypatch):
    """From its record alone, without drawing anything."""
    recipe = caches[name]
    size = recipe.data.views.image_size
    drawn = [
        load_view(clip, view, views=recipe.data.views, seed=5) for clip, view, *_ in records(recipe)
    ]
    monkeypatch.setattr(draw, "generator", None)
    flips, resizes, count = set(), set(), 0
    for look, (clip, view, arrays, info) in zip(drawn, records(recipe), strict=True):
        again = replay_view(clip, info, image_size=size)
        if recipe.objective.cache.pixels == "full":
            np.testing.assert_array_equal(again.pixels, arrays["pixels"])
        else:
            patches = patchify(torch.from_numpy(again.pixels)[None])[0].numpy()
            np.testing.assert_array_equal(patches[arrays["tokens"]], arrays["patches"])
        np.testing.assert_array_equal(again.pixels, look.pixels)
        assert (info["name"], info["view"], info["seed"]) == (clip.name, view, 5)
        assert (again.crop, again.resize, again.flip) == (look.crop, look.resize, look.flip)
        assert (again.number, again.seed) == (look.number, look.seed) == (view, 5)
        assert again.decoder == look.decoder == info["decoder"]
        assert again.frames.tolist() == look.frames.tolist() == info["frames"]
        flips.add(info["flip"])
        resizes.add(info["resize"] is not None)
        count += 1
    assert count == VIEWS * (2 if name == "frames" else 5)
    assert flips == {True, False}
    assert resizes == {recipe.data.views.crop == "center"}


def test_decoders_and_trims_are_those_of_the_clips(caches):
    found = list(records(caches["trimmed"]))
    assert {info["decoder"].split()[0] for *_, info in found} == {"decord", "pyav"}
    spans = {0: (10, 30), 1: (20, 40), 3: (5, 25)}
    for place, (first, end) in spans.items():
        for *_, info in found[VIEWS * place : VIEWS * (place + 1)]:
            assert first <= min(info["frames"]) and max(info["frames"]) < end
    assert all(not info["flip"] for clip, *_, info in found if clip.source == "ssv2")


def test_what_a_view_is_is_plain_json(caches):
    (*_, info) = next(records(caches["frames"]))
    assert info["pts_seconds"] is None
    assert info["resize"] == [84, 56]
    text = json.dumps(info, allow_nan=False)
    assert json.loads(text) == info
    assert list(info) == [
        *("name", "view", "seed", "frames", "pts_seconds", "crop", "resize", "flip", "decoder")
    ]


@pytest.mark.parametrize("name", ["trimmed", "centred"])
def test_cached_and_live_runs_see_the_same_tokens_in_every_epoch(caches, name, tmp_path):
    recipe = caches[name]
    objective = recipe.objective.model_copy(update={"targets": "live"})
    live = recipe.model_copy(update={"objective": objective})
    cached_job = build_job(recipe, tmp_path, device=torch.device("cpu"))
    live_job = build_job(live, tmp_path, device=torch.device("cpu"))
    seen = {}
    for epoch in (0, VIEWS):  # the same view of every clip
        batches = zip(cached_job.batches.epoch(epoch), live_job.batches.epoch(epoch), strict=True)
        for raw_cached, raw_live in batches:
            found, expected = cached_job.prepare(raw_cached), live_job.prepare(raw_live)
            for field in ("clip_id", "tokens", "patches"):
                assert torch.equal(found[field], expected[field])
            assert_close(found["middle"].float(), expected["middle"], rtol=0, atol=1e-3)
            for clip, tokens in zip(found["clip_id"].tolist(), found["tokens"], strict=True):
                seen.setdefault(clip, []).append(tokens.tolist())
    visible = 16 if name == "centred" else 13
    assert len(seen) == 5
    for first, second in seen.values():
        assert len(first) == len(second) == visible
        assert first != second


def test_a_run_of_another_seed_sees_other_tokens_of_the_same_cache(caches, tmp_path):
    recipe = caches["trimmed"]
    cache = recipe.objective.cache.model_copy(update={"teacher_hash": "random, seed 3"})
    other = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"seed": 4}),
            "objective": recipe.objective.model_copy(update={"cache": cache}),
        }
    )
    tokens = []
    for each in (recipe, other):
        job = build_job(each, tmp_path, device=torch.device("cpu"))
        batches = [job.prepare(batch) for batch in job.batches.epoch(0)]
        ids = torch.cat([batch["clip_id"] for batch in batches]).tolist()
        rows = torch.cat([batch["tokens"] for batch in batches]).tolist()
        tokens.append(dict(zip(ids, rows, strict=True)))
    assert tokens[0].keys() == tokens[1].keys()
    assert all(tokens[0][clip] != tokens[1][clip] for clip in tokens[0])


@pytest.mark.parametrize("codes", ["fp16", "4bit"])
def test_fewer_layers_are_read_from_a_cache_of_more(clips, tmp_path, codes):
    whole = make_recipe(clips, tmp_path / "whole", codes=codes, tokens="superset")
    build_cache(whole, progress=no_progress)
    teacher = whole.objective.teacher.model_copy(update={"layers": 1})
    objective = whole.objective.model_copy(update={"teacher": teacher})
    part = whole.model_copy(update={"objective": objective})
    jobs = {
        name: build_job(recipe, tmp_path / name, device=torch.device("cpu"))
        for name, recipe in (("whole", whole), ("part", part))
    }
    found = {name: job.prepare(next(job.batches.epoch(1))) for name, job in jobs.items()}
    assert found["part"]["middle"].shape[0] == 1
    assert_close(found["part"]["middle"][0], found["whole"]["middle"][1], rtol=0, atol=1e-6)
    assert jobs["part"].objective(found["part"])["loss"].isfinite()

    fewer = part.objective.cache.model_copy(update={"folder": str(tmp_path / "part")})
    build_cache(
        part.model_copy(update={"objective": objective.model_copy(update={"cache": fewer})})
    )
    line = r"holds teacher blocks \[2\], the recipe asks for \[1,2\]; set objective.cache.folder"
    with pytest.raises(StateError, match=line):
        Cache.open(tmp_path / "part", whole)
