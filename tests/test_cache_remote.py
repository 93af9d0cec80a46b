"""A cache on an S3 server: built, resumed, read and damaged through a recipe's own settings."""

import contextlib
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cache_build import (
    CLIPS,
    assert_same_records,
    make_recipe,
    no_progress,
    records,
    write_video,
    write_videos,
)
from test_cache_store import bucket  # noqa: F401

from distill.cache import build as cache_build
from distill.cache.build import build_cache
from distill.cache.quarantine import quarantine_entries
from distill.cache.read import Cache, CachedBatches
from distill.cache.store import open_folder
from distill.checks.recipe import missing_inputs
from distill.errors import StateError
from distill.plan import make_plan
from distill.recipe_file import dump_recipe, load_recipe


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory):
    """The files of a cache that lies here."""
    recipe = small_shards(videos, tmp_path_factory.mktemp("built") / "cache")
    build_cache(recipe, progress=no_progress)
    return sorted(Path(recipe.objective.cache.folder).iterdir())


def upload(files, url):
    for path in files:
        open_folder(url).write(path.name, path.read_bytes())


@pytest.fixture
def url(request, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # of open shards
    return f"{request.getfixturevalue('bucket')}/{uuid.uuid4()}/k400"


def small_shards(videos, folder, **settings):
    return make_recipe(videos, folder, cache={"codes": "4bit", "shard_minutes": 1e-9}, **settings)


def test_a_cache_in_a_bucket_is_that_of_a_folder(videos, built, url):
    here, there = small_shards(videos, built[0].parent), small_shards(videos, url)
    report = build_cache(there, progress=no_progress)
    assert report.written == 2 * CLIPS
    assert report.lines()[0].startswith(f"cache {url}: 14 of 14 records (7 clips, 2 views): 14 new")
    assert_same_records(records(there), records(here))
    again = build_cache(there, progress=None)
    assert (again.present, again.written) == (14, 0)
    batches = [
        CachedBatches(Cache.open(recipe.objective.cache.folder, recipe), batch_size=3, seed=0)
        for recipe in (here, there)
    ]
    for one, other in zip(*(some.epoch(1) for some in batches), strict=True):
        for name in ("clip_id", "tokens", "codes", "scales"):
            assert torch.equal(one[name], other[name])
    assert list(open_folder(url).scratch().iterdir()) == [], "nothing is left on this machine"


def test_an_interrupted_build_goes_on_in_the_bucket(videos, url, monkeypatch):
    recipe = small_shards(videos, url)
    made, inner = [], cache_build.make_records

    def stopped(*arguments):
        made.append(arguments)
        if len(made) == 4:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(cache_build, "make_records", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_cache(recipe, progress=no_progress)
    kept = open_folder(url).sizes("shard-")
    assert len(kept) == 3
    monkeypatch.setattr(cache_build, "make_records", inner)
    report = build_cache(recipe, progress=no_progress)
    assert (report.present, report.written) == (6, 8)
    assert kept.items() <= open_folder(url).sizes("shard-").items()
    Cache.open(url, recipe)


def test_clips_in_quarantine_are_kept_in_the_bucket(tmp_path, url):
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4", seed=index)
    for index in (1, 2):
        (tmp_path / f"{index}.mp4").write_text("not a video\n")
    (tmp_path / "train.csv").write_text("".join(f"{index}.mp4,0\n" for index in range(4)))
    recipe = small_shards(tmp_path, url)
    report = build_cache(recipe, progress=no_progress)
    assert sorted(report.unreadable) == ["1.mp4", "2.mp4"]
    names = [entry["name"] for entry in quarantine_entries(open_folder(url))]
    assert sorted(names) == ["1.mp4", "2.mp4"]
    assert Cache.open(url, recipe).rows.shape == (2, 2)
    assert build_cache(recipe, progress=no_progress).quarantined == 2
    assert len(open_folder(url).sizes("quarantine-")) == 1


@pytest.mark.parametrize("part", ["record", "index", "means", "cut"])
def test_damage_in_the_bucket_is_one_line(videos, built, url, part):
    recipe = small_shards(videos, url)
    upload(built, url)
    folder = open_folder(url)
    name = "means.safetensors" if part == "means" else next(iter(folder.sizes("shard-")))
    content = folder.read(name)
    place = {"record": len(content) // 2, "index": -9, "means": -9, "cut": -1}[part]
    flipped = bytes([content[place] ^ 1]) + (content[place:][1:])
    folder.write(name, content[:place] + (b"" if part == "cut" else flipped))
    folder.delete("manifest.safetensors")
    with pytest.raises(StateError) as error:
        for _ in CachedBatches(Cache.open(url, recipe), batch_size=3, seed=0).epoch(0):
            pass
        for _ in CachedBatches(Cache.open(url, recipe), batch_size=3, seed=0).epoch(1):
            pass
    assert str(error.value).startswith(f"{url}/{name}: ")
    assert "\n" not in str(error.value)


def test_a_bucket_that_may_only_be_read_is_read(videos, built, url):
    """Without a manifest, which a reader would write."""
    recipe = small_shards(videos, url)
    upload(built, url)
    folder = open_folder(url)
    folder.delete("manifest.safetensors")
    refused = []

    @contextlib.contextmanager
    def forbidden():
        def refuse(path, name):
            refused.append(name)
            raise PermissionError("Access Denied")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder._files, "put_file", refuse)
            yield

    with forbidden():
        assert Cache.open(folder, recipe).rows.shape == (CLIPS, 2)
    assert len(refused) == 1
    assert "manifest.safetensors" not in folder.sizes()
    assert list(folder.scratch().iterdir()) == []


def test_a_recipe_keeps_its_caches_url(videos, tmp_path, url):
    path = tmp_path / "elsewhere" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(dump_recipe(small_shards(videos, url)))
    recipe = load_recipe(path)
    assert recipe.objective.cache.folder == url
    assert load_recipe(path, [f"objective.cache.folder={url}/2"]).objective.cache.folder == (
        f"{url}/2"
    )
    assert make_plan(recipe).cache.total_bytes > 0


def test_a_student_needs_no_videos_once_the_bucket_has_its_cache(videos, built, url):
    recipe = small_shards(videos, url)
    objective = recipe.objective
    known = objective.cache.model_copy(update={"teacher_hash": "random, seed 0"})
    train = recipe.data.train.model_copy(update={"list": None})
    away = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train": train}),
            "objective": objective.model_copy(update={"cache": known}),
        }
    )
    assert [line.split(":")[0] for line in missing_inputs(away, "train")] == ["data.train.list"]
    upload(built, url)
    assert missing_inputs(away, "train") == []
    cache = Cache.open(url, away)
    np.testing.assert_array_equal(cache.clip_ids, np.sort(cache.clip_ids))
    assert cache.rows.shape == (CLIPS, 2)


def test_the_server_sees_no_more_than_one_request_a_record(videos, built, url, monkeypatch):
    recipe = small_shards(videos, url)
    upload(built, url)
    cache = Cache.open(url, recipe)
    asked, inner = [], type(cache.folder).read_range

    def noted(self, name, start, size):
        asked.append((name, start, size))
        return inner(self, name, start, size)

    monkeypatch.setattr(type(cache.folder), "read_range", noted)
    list(CachedBatches(cache, batch_size=3, seed=0).epoch(0))
    index, rows = cache.index, cache.rows[:, 0]
    assert sorted(asked) == sorted(
        (index.shards[index.shard[row]], int(index.starts[row]), int(index.sizes[row]))
        for row in rows
    )
