"""The means of a cache's codes: which clips they come from, and that they never change."""

import threading

import numpy as np
import pytest
import torch
from test_cache_build import (
    cache_folder,
    make_recipe,
    no_progress,
    num_committed,
    write_video,
    write_videos,
)
from torch.testing import assert_close

from distill import draw
from distill.cache import live as cache_live
from distill.cache.build import build_cache
from distill.cache.calibrate import read_codec, sample_clips, with_codec, write_codec
from distill.cache.codes import Codec
from distill.cache.identity import MEANS, cache_identity
from distill.cache.read import Cache
from distill.cache.shards import read_shard_index, shard_sizes
from distill.cache.store import open_folder
from distill.data.index import Clip, read_list
from distill.data.load import load_view
from distill.errors import StateError
from distill.models import build_teacher
from distill.targets import view_records

CLIPS = 5
IDENTITY = {"objective.cache.codes": "4bit", "objective.cache.seed": 0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"), CLIPS)


def recipe_at(videos, folder, **cache):
    return make_recipe(videos, folder, cache={"codes": "4bit", "views": 1, **cache})


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory):
    recipe = recipe_at(videos, tmp_path_factory.mktemp("built") / "cache")
    build_cache(recipe, progress=no_progress)
    return recipe


def make_clips(count):
    names = [f"{index}.mp4" for index in range(count)]
    return [
        Clip(
            id=draw.key(name),
            path=name,
            name=name,
            label=None,
            start_seconds=None,
            end_seconds=None,
            total_seconds=None,
            source=None,
            num_frames=None,
            line=line,
        )
        for line, name in enumerate(names)
    ]


def test_the_sample_is_64_clips_from_the_whole_list_by_seed():
    clips = make_clips(10_000)
    sample = sample_clips(clips, seed=0)
    assert len({clip.id for clip in sample}) == 64
    places = [clip.line for clip in sample]
    quarters = np.bincount(np.array(places) // 2500, minlength=4)
    assert quarters.min() >= 7, "16 are expected in each quarter of the list"
    assert sample_clips(clips, seed=0) == sample
    assert len({clip.id for clip in sample_clips(clips, seed=1)} & {c.id for c in sample}) < 8


def test_the_sample_does_not_depend_on_the_lists_order():
    clips = make_clips(500)
    assert sample_clips(clips[::-1], seed=3) == sample_clips(clips, seed=3)


def test_a_short_list_is_sampled_whole():
    clips = make_clips(9)
    assert sorted(clip.id for clip in sample_clips(clips, seed=0)) == sorted(c.id for c in clips)


def test_means_are_those_of_the_rows_that_records_hold(built):
    torch.manual_seed(built.run.seed)
    teacher = build_teacher(built)
    rows = []
    for clip in read_list(built.data.train):
        look = load_view(clip, 0, views=built.data.views, seed=0)
        batch = {
            "clip_id": torch.tensor([clip.id]),
            "view": torch.tensor([0]),
            "pixels": torch.from_numpy(np.asarray(look.pixels))[None],
        }
        rows.append(view_records(teacher, batch, mask=built.objective.mask, seed=0)["middle"])
    expected = torch.cat(rows, dim=1).mean((1, 2))
    codec = read_codec(open_folder(cache_folder(built)), cache_identity(built))
    assert codec.means.shape == (3, 176)
    assert_close(codec.means, expected, rtol=0, atol=1e-6)
    assert float(expected.norm(dim=-1).min()) > 0.1, "there is something to subtract"


def test_a_limit_changes_no_means(built, videos, tmp_path):
    recipe = recipe_at(videos, tmp_path / "cache")
    assert build_cache(recipe, limit=1, progress=no_progress).written == 1
    content = (cache_folder(recipe) / "means.safetensors").read_bytes()
    assert content == (cache_folder(built) / "means.safetensors").read_bytes()


def test_shards_name_their_means(built):
    codec = read_codec(open_folder(cache_folder(built)), cache_identity(built))
    store = open_folder(cache_folder(built))
    for name in shard_sizes(store):
        assert read_shard_index(store, name).identity[MEANS] == codec.means_sha256
    assert Cache.open(cache_folder(built), built).codec.means_sha256 == codec.means_sha256


def test_means_are_there_before_the_first_record_and_are_not_measured_again(
    videos, tmp_path, monkeypatch
):
    recipe = recipe_at(videos, tmp_path / "cache")
    path = cache_folder(recipe) / "means.safetensors"
    seen = []

    def view_records_noted(*arguments, **settings):
        seen.append((path.exists(), num_committed(cache_folder(recipe))))
        return view_records(*arguments, **settings)

    monkeypatch.setattr(cache_live, "view_records", view_records_noted)
    build_cache(recipe, progress=no_progress)
    assert seen == [(False, 0)] * 3 + [(True, 0)] * 3, "three batches of at most two, twice"
    before = path.stat()
    seen.clear()
    more = recipe_at(videos, cache_folder(recipe), views=2)
    assert build_cache(more, progress=no_progress).written == CLIPS
    assert seen == [(True, CLIPS)] * 3
    assert path.stat() == before


def test_half_precision_needs_no_means(videos, tmp_path):
    recipe = recipe_at(videos, tmp_path / "cache", codes="fp16")
    build_cache(recipe, limit=1, progress=no_progress)
    store = open_folder(cache_folder(recipe))
    name, manifest = sorted(store.sizes(), reverse=True)
    assert manifest == "manifest.safetensors"
    assert MEANS not in read_shard_index(store, name).identity


def test_clips_that_cannot_be_decoded_are_left_out(tmp_path):
    write_video(tmp_path / "0.mp4", seed=0)
    (tmp_path / "1.mp4").write_text("not a video\n")
    (tmp_path / "train.csv").write_text("0.mp4,0\n1.mp4,0\n")
    recipe = recipe_at(tmp_path, tmp_path / "cache")
    assert build_cache(recipe, progress=no_progress).written == 1
    assert Cache.open(cache_folder(recipe), recipe).codec.means.isfinite().all()


def test_a_list_of_which_nothing_can_be_decoded_is_one_line(tmp_path):
    (tmp_path / "0.mp4").write_text("not a video\n")
    (tmp_path / "train.csv").write_text("0.mp4,0\n")
    message = "none of the 1 clips that the codes would be calibrated on can be decoded; check d"
    with pytest.raises(StateError, match=message):
        build_cache(recipe_at(tmp_path, tmp_path / "cache"), progress=no_progress)


def test_of_writers_that_come_at_once_all_get_the_same_means(tmp_path):
    start, got = threading.Barrier(8), []

    def write(number):
        start.wait()
        got.append(write_codec(open_folder(tmp_path), IDENTITY, torch.full((2, 4), float(number))))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len({codec.means_sha256 for codec in got}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["means.safetensors"]
    late = write_codec(open_folder(tmp_path), IDENTITY, torch.full((2, 4), 99.0))
    assert late.means_sha256 == got[0].means_sha256


def test_there_is_no_codec_before_the_means(tmp_path):
    assert read_codec(open_folder(tmp_path), IDENTITY) is None
    assert with_codec(IDENTITY, None) == with_codec(IDENTITY, Codec("fp16")) == IDENTITY


def test_a_flipped_byte_never_gives_other_means(tmp_path):
    means = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    write_codec(open_folder(tmp_path), IDENTITY, means)
    path = tmp_path / "means.safetensors"
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert torch.equal(read_codec(open_folder(tmp_path), IDENTITY).means, means)
        except StateError:
            refused += 1
    assert refused > 0.9 * len(content), "all but blanks that pad the header"
    path.write_bytes(content[:-1])
    message = (
        f"{path}: damaged means of the cache's codes; put the file back, or delete it and the "
        "folder's shards and run 'distill cache-teacher' again"
    )
    with pytest.raises(StateError) as error:
        read_codec(open_folder(tmp_path), IDENTITY)
    assert str(error.value) == message


def test_another_recipes_means_are_refused(tmp_path):
    write_codec(open_folder(tmp_path), IDENTITY, torch.zeros(1, 2))
    other = {**IDENTITY, "objective.cache.seed": 1}
    with pytest.raises(StateError, match="holds objective.cache.seed 0, the recipe asks for 1; s"):
        read_codec(open_folder(tmp_path), other)


@pytest.mark.parametrize(
    ("replace", "line"),
    [(False, "means.safetensors is not there"), (True, "means.safetensors holds af5570f5")],
)
def test_records_without_their_means_are_refused_by_readers_and_writers(
    built, videos, tmp_path, replace, line
):
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in cache_folder(built).glob("shard-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    recipe = recipe_at(videos, folder)
    if replace:
        write_codec(open_folder(folder), cache_identity(recipe), torch.zeros(1, 2))
    before = sorted(folder.iterdir())
    for use in (lambda: Cache.open(folder, recipe), lambda: build_cache(recipe, progress=None)):
        with pytest.raises(StateError, match=f"cache {folder}: its codes need the means .*{line}"):
            use()
    assert sorted(folder.iterdir()) == before
