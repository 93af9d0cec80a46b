"""Caches with gaps on real videos, with a small random teacher that sees one clip at a time.

Alone in its batch a clip is always rounded alike, so that live records are the cached ones.
"""

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from test_cache_build import no_progress
from tiny_runs import SIZE, distil, metrics, stop_after, timeless, write_video
from torch.testing import assert_close

from distill.cache import hybrid
from distill.cache.build import build_cache
from distill.cache.hybrid import open_hybrid
from distill.cache.read import Cache, CachedBatches
from distill.data.index import read_list
from distill.errors import InputError, StateError
from distill.recipe_file import load_recipe
from distill.run.interrupt import Interrupted
from distill.train import train

CLIPS, CACHED = 10, 6
BATCHES = [4, 4, 2]  # of an epoch


def make_videos(folder: Path, *, broken: tuple[int, ...] = ()) -> Path:
    for number in range(CLIPS):
        write_video(folder / f"{number}.mp4", number)
    for number in broken:
        (folder / f"{number}.mp4").write_text("not a video\n")
    (folder / "train.csv").write_text("".join(f"{number}.mp4,0\n" for number in range(CLIPS)))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def recipe(videos: Path, cache: Path | str, *, targets: str = "hybrid", **changes):
    settings = {
        "data__val": None,
        "data__test": None,
        "objective__cache__folder": str(cache),
        "objective__cache__codes": "4bit",
        "objective__cache__tokens": "superset",
        "objective__cache__batch_size": 1,
        "optim__epochs": 3,
    }
    return distil(videos, targets, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> Path:
    """A cache without gaps."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build_cache(recipe(videos, folder), progress=no_progress)
    return folder


@pytest.fixture(scope="module")
def partial(videos, tmp_path_factory) -> Path:
    """A cache of the list's first six clips."""
    folder = tmp_path_factory.mktemp("partial") / "cache"
    build_cache(recipe(videos, folder), limit=CACHED, progress=no_progress)
    return folder


def open_batches(ours, folder: Path):
    return open_hybrid(ours, folder, progress=no_progress)


def assert_same_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == {*theirs, "is_cached"}
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert_close(mine[name], value, rtol=0, atol=0, msg=name)
            else:
                assert mine[name] == value


def test_a_run_does_not_depend_on_how_much_is_cached(videos, whole, partial, tmp_path):
    expected = train(recipe(videos, whole, targets="cached"), tmp_path / "cached")
    found = train(recipe(videos, partial), tmp_path / "hybrid")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("hybrid", "cached")]
    for name, value in weights[1].items():
        assert_close(weights[0][name], value, rtol=0, atol=0, msg=name)
    assert found["last"] == expected["last"]
    assert expected["hit_rate"] is None
    assert found["hit_rate"] == CACHED / CLIPS
    lines = metrics(tmp_path / "hybrid")
    rates = [line.pop("hit_rate") for line in lines if "loss" in line]
    assert [timeless(line) for line in lines] == [
        timeless(line) for line in metrics(tmp_path / "cached")
    ]
    hits = [rate * size for rate, size in zip(rates, 3 * BATCHES, strict=True)]
    assert sum(hits) == pytest.approx(3 * CACHED)
    assert all(hit == pytest.approx(round(hit)) for hit in hits)


def test_an_interrupted_run_keeps_its_count(videos, partial, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            train(recipe(videos, partial), tmp_path)
    summary = train(recipe(videos, partial), tmp_path)
    assert summary["hit_rate"] == CACHED / CLIPS
    assert sum("hit_rate" in line for line in metrics(tmp_path)) == 9


@pytest.mark.parametrize(("epoch", "first"), [(0, 0), (3, 0), (1, 2)])
def test_batches_are_those_of_a_whole_cache(videos, whole, partial, tmp_path, epoch, first):
    cached = CachedBatches(
        Cache.open(whole, recipe(videos, whole)), batch_size=4, seed=recipe(videos, whole).run.seed
    )
    batches = open_batches(recipe(videos, partial), tmp_path)
    assert batches.steps_per_epoch == 3
    assert_same_batches(batches.epoch(epoch, first), cached.epoch(epoch, first))
    assert batches.wait_seconds > 0


def test_what_came_from_the_cache_is_marked(videos, partial, tmp_path):
    ours = recipe(videos, partial)
    first = {clip.id for clip in read_list(ours.data.train)[:CACHED]}
    for batch in open_batches(ours, tmp_path).epoch(0):
        is_first = [clip_id in first for clip_id in batch["clip_id"].tolist()]
        assert batch["is_cached"].tolist() == is_first


def test_an_empty_cache_is_live_with_the_means_of_a_build(videos, whole, tmp_path):
    ours = recipe(videos, tmp_path / "cache")
    batches = open_batches(ours, tmp_path)
    means = [load_file(path / "means.safetensors") for path in (tmp_path / "cache", whole)]
    assert_close(means[0], means[1], rtol=0, atol=0)
    assert not list((tmp_path / "cache").glob("shard-*"))
    cached = CachedBatches(Cache.open(whole, recipe(videos, whole)), batch_size=4, seed=5)
    assert_same_batches(batches.epoch(1), cached.epoch(1))
    assert not any(batch["is_cached"].any() for batch in batches.epoch(1))


def test_a_cache_without_gaps_needs_neither_teacher_nor_videos(
    videos, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(hybrid, "cached_teachers", None)
    monkeypatch.setattr(hybrid, "check_videos", None)
    batches = open_batches(recipe(videos, whole), tmp_path)
    assert batches.live is None
    assert all(batch["is_cached"].all() for batch in batches.epoch(0))


def test_a_remote_cache_may_have_gaps_too(videos, whole, partial, tmp_path):
    files, name = fsspec.filesystem("memory"), f"hybrid-{tmp_path.name}"
    for path in partial.iterdir():
        files.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    cached = CachedBatches(Cache.open(whole, recipe(videos, whole)), batch_size=4, seed=5)
    batches = open_batches(recipe(videos, f"memory://{name}"), tmp_path)
    assert_same_batches(batches.epoch(0), cached.epoch(0))
    files.rm(f"/{name}", recursive=True)


def test_views_that_no_epoch_reads_may_be_missing(videos, tmp_path, monkeypatch):
    one = recipe(videos, tmp_path / "cache", objective__cache__views=1)
    build_cache(one, progress=no_progress)
    monkeypatch.setattr(hybrid, "cached_teachers", None)
    batches = open_batches(recipe(videos, tmp_path / "cache", optim__epochs=1), tmp_path)
    assert batches.live is None


@pytest.fixture(scope="module")
def flawed(tmp_path_factory) -> Path:
    """Ten clips of which the last two, in no cache, cannot be decoded."""
    return make_videos(tmp_path_factory.mktemp("flawed"), broken=(8, 9))


def test_a_clip_that_cannot_be_decoded_is_left_out(flawed, tmp_path):
    changes = {"data__max_quarantined": 0.5, "optim__batch_size": 4}
    ours = recipe(flawed, tmp_path / "cache", **changes)
    build_cache(ours, limit=CACHED, progress=no_progress)
    batches = open_batches(ours, tmp_path)
    clips = read_list(ours.data.train)
    read = list(batches.epoch(0))
    order = batches.cached.order(0).tolist()
    expected = [
        [clips[place].id for place in order[start : start + 4] if place < 8] for start in (0, 4, 8)
    ]
    assert [batch["clip_id"].tolist() for batch in read] == expected
    for batch in read:
        lengths = {len(value) for value in batch.values() if isinstance(value, torch.Tensor)}
        assert lengths == {len(batch["clip_id"])}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in lines) == ["8.mp4", "9.mp4"]
    assert batches.clip_names([clips[3].id, clips[9].id]) == ["3.mp4", "9.mp4"]


def test_a_batch_that_loses_all_clips_takes_the_next_one(flawed, tmp_path):
    changes = {"data__max_quarantined": 0.5, "optim__batch_size": 1}
    ours = recipe(flawed, tmp_path / "cache", **changes)
    batches = open_batches(ours, tmp_path)
    clips = read_list(ours.data.train)
    order = batches.cached.order(0).tolist()
    read = list(batches.epoch(0))
    assert [len(batch["clip_id"]) for batch in read] == [1] * CLIPS
    for place, batch in zip(range(CLIPS), read, strict=True):
        following = next(p for p in order[place:] + order[:place] if p < 8)
        assert batch["clip_id"].item() == clips[following].id
    batch = open_batches(ours, tmp_path).epoch(0)
    assert next(batch).keys() == {
        *("clip_id", "view", "tokens", "next_arrival", "patches", "codes", "scales", "pooled"),
        *("attention", "is_cached", "epoch"),
    }
    batch.close()


def test_too_many_clips_that_cannot_be_decoded_stop_the_run(flawed, tmp_path):
    ours = recipe(flawed, tmp_path / "cache", data__max_quarantined=0.1)
    with pytest.raises(StateError, match="2 of 10 clips cannot be decoded, more than data.max_qu"):
        list(open_batches(ours, tmp_path).epoch(0))


def test_a_wrong_folder_of_videos_is_found_at_once(videos, partial, tmp_path):
    train_list = {"list": str(videos / "train.csv"), "prefix": str(tmp_path)}
    with pytest.raises(InputError, match="6.mp4 is not there, nor are the clips after it; set the"):
        open_batches(recipe(videos, partial, data__train=train_list), tmp_path)


def test_another_recipes_cache_is_refused(videos, partial, tmp_path):
    ours = recipe(videos, partial, objective__mask__ratio=0.25)
    with pytest.raises(StateError, match="holds objective.mask.ratio 0.5, the recipe asks for 0.2"):
        open_batches(ours, tmp_path)


def test_hybrid_targets_need_a_cache(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "data: {train: {list: train.csv}}\n"
        f"model: {{size: {json.dumps(SIZE)}}}\n"
        "objective:\n"
        "  kind: distill\n"
        "  targets: hybrid\n"
        f"  teacher: {{size: {json.dumps(SIZE)}, random: true, layers: 2, interval: 1.0}}\n"
        "optim: {lr: 1e-3, batch_size: 4, epochs: 1}\n"
    )
    message = "objective.cache: missing: give it a folder, or set objective.targets=live"
    with pytest.raises(InputError, match=message):
        load_recipe(path)
