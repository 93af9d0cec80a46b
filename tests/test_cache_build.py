"""Whole builds on real, encoded files, with a small random teacher."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from distill.cache import build as cache_build
from distill.cache import identity as cache_identity_module
from distill.cache import index as cache_index
from distill.cache import live as cache_live
from distill.cache.build import build_cache
from distill.cache.calibrate import read_codec, with_codec
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity
from distill.cache.index import load_index
from distill.cache.read import Cache, CachedBatches
from distill.cache.shards import read_shard_index, shard_sizes
from distill.cache.store import open_folder
from distill.data.index import read_list
from distill.data.load import ClipBatches, Quarantine, load_view
from distill.errors import InputError, StateError
from distill.job import open_cache
from distill.models import build_student, build_teacher
from distill.objective import DistillObjective
from distill.recipe import Recipe, Weights
from distill.students.warmstart import file_sha256
from distill.targets import CachedTargets, LiveTargets, view_records

CLIPS = 7


def write_video(path, *, seed):
    """Sixteen frames of coloured noise that drifts, 72 x 60 pixels, H.264."""
    stream = np.random.default_rng(seed)
    block = stream.integers(0, 256, (15, 18, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 72, 60, "yuv420p"
        for index in range(16):
            pixels = np.roll(block, index, axis=1).repeat(4, axis=0).repeat(4, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())


def write_videos(folder, count=CLIPS):
    """Clips and their list, in a folder; returns it."""
    for index in range(count):
        write_video(folder / f"{index}.mp4", seed=index)
    (folder / "train.csv").write_text("".join(f"{index}.mp4,0\n" for index in range(count)))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def make_recipe(videos, folder, *, cache=(), data=(), optim=(), **changes):
    teacher = {
        "size": {"width": 176, "depth": 5, "heads": 2, "mlp_ratio": 48 / 11, "pooled_width": 48},
        "random": True,
        "layers": 3,
        "interval": 1.34,
    }
    tree = {
        "name": "tiny",
        "data": {
            "train": {"list": str(videos / "train.csv")},
            "views": {"frames": 4, "image_size": 56},
            "workers": 1,
            "max_quarantined": 0.5,
            **dict(data),
        },
        "model": {
            "size": {"width": 96, "depth": 4, "heads": 3, "pooled_width": 48},
            "drop_path": 0.2,
        },
        "objective": {
            "kind": "distill",
            "teacher": teacher,
            "cache": {
                "folder": str(folder),
                "views": 2,
                "codes": "fp16",
                "batch_size": 2,
                **dict(cache),
            },
        },
        "optim": {"lr": 1e-3, "batch_size": 3, "epochs": 3, **dict(optim)},
        **changes,
    }
    return Recipe.model_validate(tree)


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory):
    """A cache from one uninterrupted build: its recipe and the build's report."""
    recipe = make_recipe(videos, tmp_path_factory.mktemp("built") / "cache")
    return recipe, build_cache(recipe, progress=no_progress)


@contextmanager
def no_progress(title, *, total, unit, done=0):
    yield Bar()


class Bar:
    def advance(self, count):
        pass

    def note(self, text):
        pass


def cache_folder(recipe):
    return Path(recipe.objective.cache.folder)


def records(recipe):
    """Every record of a cache by clip and view: its arrays, and its view's JSON."""
    store, identity = open_folder(recipe.objective.cache.folder), cache_identity(recipe)
    index = load_index(store, with_codec(identity, read_codec(store, identity)))
    cache = Cache(store, index, np.zeros((1, 1), int))
    return {
        (int(index.clip_ids[row]), int(index.views[row])): cache.read(row)
        for row in range(len(index))
    }


def assert_same_records(found, expected):
    assert found.keys() == expected.keys()
    for key, (arrays, info) in expected.items():
        assert found[key][1] == info
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[key][0][name], array, err_msg=name)


def num_committed(folder):
    store = open_folder(folder)
    return sum(len(read_shard_index(store, name).clip_ids) for name in shard_sizes(store))


def test_a_build_makes_every_view_of_every_clip(built, videos):
    recipe, report = built
    assert (report.num_clips, report.num_views, report.written) == (CLIPS, 2, 2 * CLIPS)
    assert (report.present, report.quarantined) == (0, 0)
    sizes = [path.stat().st_size for path in sorted(cache_folder(recipe).glob("shard-*"))]
    assert report.size_bytes == sum(sizes)
    clips = read_list(recipe.data.train)
    assert records(recipe).keys() == {(clip.id, view) for clip in clips for view in (0, 1)}
    assert report.lines()[0].startswith(
        f"cache {cache_folder(recipe)}: 14 of 14 records (7 clips, 2 views): 14 new in "
    )


def test_a_record_holds_what_the_teacher_saw(built):
    recipe, _ = built
    torch.manual_seed(recipe.run.seed)
    teacher = build_teacher(recipe)
    found = records(recipe)
    for clip in read_list(recipe.data.train)[:2]:
        for view in (0, 1):
            look = load_view(clip, view, views=recipe.data.views, seed=0)
            arrays, info = found[clip.id, view]
            batch = {
                "clip_id": torch.tensor([clip.id]),
                "view": torch.tensor([view]),
                "pixels": torch.from_numpy(np.asarray(look.pixels))[None],
            }
            expected = view_records(teacher, batch, mask=recipe.objective.mask, seed=0)
            assert_close(torch.from_numpy(arrays["patches"]), expected["patches"][0])
            assert_close(torch.from_numpy(arrays["tokens"]).long(), expected["tokens"][0])
            middle = torch.from_numpy(arrays["codes"]).float()
            assert_close(middle, expected["middle"][:, 0], rtol=0, atol=2e-4)
            pooled = torch.from_numpy(arrays["pooled"]).float()
            assert_close(pooled, expected["pooled"][0], rtol=0, atol=3e-4)
            attention = torch.from_numpy(arrays["attention"])
            assert_close(attention, expected["attention"][0], rtol=1e-4, atol=1e-6)
            assert info["name"] == clip.name
            assert info["frames"] == look.frames.tolist()
            assert info["pts_seconds"] == look.pts_seconds.tolist()
            assert info["crop"] == list(look.crop)
            assert info["flip"] == look.flip
            assert info["decoder"] == look.decoder


def test_opening_a_cache_reads_its_manifest_once(built, monkeypatch):
    recipe, _ = built
    folders, inner = [], cache_index._read_manifest
    monkeypatch.setattr(
        cache_index, "_read_manifest", lambda folder: folders.append(folder) or inner(folder)
    )
    Cache.open(cache_folder(recipe), recipe)
    assert len(folders) == 1


def test_a_second_build_does_nothing(built, monkeypatch):
    recipe, _ = built
    before = {path: path.stat() for path in cache_folder(recipe).iterdir()}
    monkeypatch.setattr(cache_live, "build_teacher", None)
    monkeypatch.setattr(cache_live, "ClipLoader", None)
    report = build_cache(recipe, progress=None)
    assert (report.present, report.written, report.size_bytes) == (2 * CLIPS, 0, 0)
    after = {path: path.stat() for path in cache_folder(recipe).iterdir()}
    assert after.keys() == before.keys()
    assert all(after[path].st_mtime_ns == before[path].st_mtime_ns for path in after)


BUILD = """
import sys
from distill.cache.build import build_cache
from distill.cache.calibrate import read_codec, with_codec
from distill.cache.codes import Codec
from distill.recipe import Recipe

if __name__ == "__main__":
    build_cache(Recipe.model_validate_json(open(sys.argv[1]).read()))
"""


def test_a_killed_build_goes_on_and_redoes_nothing(built, videos, tmp_path):
    """A real process, killed after its second shard; every batch closes a shard."""
    (tmp_path / "build.py").write_text(BUILD)
    recipe = make_recipe(videos, tmp_path / "cache", cache={"shard_minutes": 1e-9})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "build.py", tmp_path / "recipe.json"],
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 60
        while len(sorted(cache_folder(recipe).glob("shard-*"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.read_bytes() for path in sorted(cache_folder(recipe).glob("shard-*"))}
    num_kept = num_committed(cache_folder(recipe))
    assert 4 <= num_kept < 2 * CLIPS

    report = build_cache(recipe, progress=no_progress)
    assert (report.present, report.written) == (num_kept, 2 * CLIPS - num_kept)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert num_committed(cache_folder(recipe)) == 2 * CLIPS, "no record is there twice"
    assert not list(cache_folder(recipe).glob("open-*"))
    assert_same_records(records(recipe), records(built[0]))


def test_batches_keep_their_places_whatever_is_done_already(videos):
    clips = read_list(make_recipe(videos, "unused").data.train)
    wanted = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]], bool)
    batches = cache_build.fixed_batches(clips, wanted, size=3)
    places = [[(clips.index(task.clip), task.view) for task in batch] for batch in batches]
    assert places == [
        [(0, 0), (1, 0)],
        [(3, 0)],
        [(6, 0)],
        [(1, 1), (2, 1)],
        [(3, 1), (4, 1), (5, 1)],
        [(6, 1)],
    ]


def test_an_interrupt_keeps_what_was_done(videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache")

    @contextmanager
    def interrupted(title, *, total, unit, done=0):
        yield Interrupting()

    class Interrupting(Bar):
        count = 0

        def advance(self, count):
            self.count += count
            if self.count >= 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(recipe, progress=interrupted)
    assert num_committed(cache_folder(recipe)) == 4
    assert build_cache(recipe, progress=no_progress).written == 10


def test_progress_counts_what_is_there_already(videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache")
    build_cache(recipe, limit=3, progress=no_progress)
    seen = []

    @contextmanager
    def noted(title, *, total, unit, done=0):
        seen.append((total, unit, done))
        bar = Bar()
        bar.advance = seen.append
        yield bar

    build_cache(recipe, progress=noted)
    assert seen[0] == (14, "views", 6)
    assert sum(seen[1:]) == 8


def test_limit_takes_the_first_clips_and_more_extend_the_cache(built, videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache")
    report = build_cache(recipe, limit=2, progress=no_progress)
    assert (report.num_clips, report.written) == (2, 4)
    clips = read_list(recipe.data.train)
    assert {clip for clip, _ in records(recipe)} == {clip.id for clip in clips[:2]}
    report = build_cache(recipe, progress=no_progress)
    assert (report.present, report.written) == (4, 10)
    assert_same_records(records(recipe), records(built[0]))


def test_views_can_be_added(built, videos, tmp_path):
    one = make_recipe(videos, tmp_path / "cache", cache={"views": 1})
    assert build_cache(one, progress=no_progress).written == CLIPS
    two = make_recipe(videos, tmp_path / "cache")
    report = build_cache(two, progress=no_progress)
    assert (report.present, report.written) == (CLIPS, CLIPS)
    assert_same_records(records(two), records(built[0]))


def test_another_recipe_may_not_build_into_a_cache(built, videos):
    recipe, _ = built
    before = sorted(cache_folder(recipe).iterdir())
    other = make_recipe(videos, cache_folder(recipe), cache={"codes": "4bit"})
    message = (
        f"cache {cache_folder(recipe)}: holds objective.cache.codes fp16, the recipe asks for "
        "4bit; set objective.cache.codes=fp16, or set objective.cache.folder to a new folder and "
        "run 'distill cache-teacher'"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        build_cache(other, progress=no_progress)
    assert sorted(cache_folder(recipe).iterdir()) == before


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """Six clips of which the third is a text file."""
    folder = tmp_path_factory.mktemp("flawed")
    for index in range(6):
        write_video(folder / f"{index}.mp4", seed=index)
    (folder / "2.mp4").write_text("not a video\n")
    (folder / "train.csv").write_text("".join(f"{index}.mp4,0\n" for index in range(6)))
    return folder


def test_a_clip_that_cannot_be_decoded_is_left_out_and_counted(flawed, tmp_path):
    recipe = make_recipe(flawed, tmp_path / "cache")
    report = build_cache(recipe, progress=no_progress)
    assert (report.num_clips, report.written, report.quarantined) == (6, 10, 1)
    folder = cache_folder(recipe)
    assert report.lines()[1] == (
        f"cache {folder}: 1 clips could not be decoded and are left out; "
        f"{folder}/quarantine*.jsonl says why:"
    )
    assert report.lines()[2].startswith(f"  2.mp4: {flawed / '2.mp4'}: ")
    (path,) = folder.glob("quarantine-*.jsonl")
    (line,) = path.read_text().splitlines()
    assert "2.mp4" in json.dumps(json.loads(line))
    clips = read_list(recipe.data.train)
    cache = Cache.open(folder, recipe)
    kept = cache.index.clip_ids[cache.rows[:, 0]].tolist()
    assert kept == [clip.id for clip in clips if clip.name != "2.mp4"]
    again = build_cache(recipe, progress=None)
    assert (again.present, again.written, again.quarantined) == (10, 0, 1)


def test_too_many_clips_that_cannot_be_decoded_stop_the_build(flawed, tmp_path):
    recipe = make_recipe(flawed, tmp_path / "cache", data={"max_quarantined": 0.1})
    with pytest.raises(StateError):
        build_cache(recipe, progress=no_progress)


def test_a_wrong_folder_of_videos_puts_none_in_quarantine(videos, tmp_path):
    train = {"list": str(videos / "train.csv"), "prefix": str(tmp_path)}
    recipe = make_recipe(videos, tmp_path / "cache", data={"train": train})
    message = (
        f"{train['list']}: {tmp_path / '0.mp4'} is not there, nor are the clips after it; set the "
        "list's `prefix` to the folder that holds them"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        build_cache(recipe, progress=no_progress)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_hash_that_is_not_the_teachers_is_refused(videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache", cache={"teacher_hash": "ABCD"})
    message = (
        "objective.cache.teacher_hash is abcd, but the teacher's is random, seed 0; drop the hash "
        "from the recipe, or give the teacher it belongs to"
    )
    with pytest.raises(StateError, match=f"^{message}$"):
        build_cache(recipe, progress=no_progress)


def test_opening_and_building_a_cache_reads_the_teachers_file_for_its_hash_once(
    videos, tmp_path, monkeypatch
):
    random = make_recipe(videos, tmp_path / "cache")
    path = tmp_path / "teacher.safetensors"
    save_file(build_teacher(random).state_dict(), path)
    recipe = random.model_copy(
        update={
            "objective": random.objective.model_copy(
                update={
                    "teacher": random.objective.teacher.model_copy(
                        update={"random": False, "weights": Weights(checkpoint=str(path))}
                    )
                }
            )
        }
    )
    read = []

    def note(checkpoint):
        read.append(checkpoint)
        return file_sha256(checkpoint)

    monkeypatch.setattr(cache_identity_module, "file_sha256", note)
    cache = open_cache(recipe)
    assert cache.rows.shape == (CLIPS, 2)
    assert read == [str(path)]


def test_8_bit_records_are_about_half_the_size_of_half_precision_ones(built, videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache", cache={"codes": "8bit", "views": 1})
    build_cache(recipe, progress=no_progress)
    small, large = next(iter(records(recipe).values())), next(iter(records(built[0]).values()))
    assert small[0]["codes"].nbytes * 2 == large[0]["codes"].nbytes == 2 * 3 * 14 * 176
    assert small[0]["scales"].shape == (3, 14)


def loss_curve(recipe, batches, prepare, *, epochs=3):
    """Losses of a short training, as the training loop runs it."""
    torch.manual_seed(0)
    student = build_student(recipe)
    objective = DistillObjective(student, recipe.objective, seed=recipe.run.seed).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, eps=1e-6)
    curve, clips = [], []
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            prepared = prepare(batch)
            losses = objective(prepared)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            curve.append(torch.stack([value.detach() for value in losses.values()]))
            clips.append(batch["clip_id"].tolist())
    return torch.stack(curve), clips


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("fp16", 2**-11), ("8bit", 0.0015), ("4bit", 0.01), ("3bit", 0.02), ("2bit", 0.04)],
)
def test_cached_and_live_training_give_the_same_curve(videos, tmp_path, kind, tolerance):
    """Real files, decoded anew by the live run; two views, so that epoch 2 sees epoch 0's again."""
    recipe = make_recipe(
        videos, tmp_path / "cache", cache={"codes": kind, "seed": 5}, run={"seed": 1}
    )
    build_cache(recipe, progress=no_progress)
    cache = Cache.open(cache_folder(recipe), recipe)
    cached, cached_clips = loss_curve(
        recipe,
        CachedBatches(cache, batch_size=3, seed=recipe.run.seed),
        CachedTargets(cache.codec),
    )
    torch.manual_seed(recipe.run.seed)
    live, live_clips = loss_curve(
        recipe,
        ClipBatches(
            read_list(recipe.data.train),
            recipe.data,
            batch_size=3,
            seed=recipe.run.seed,
            views_per_clip=2,
            views_seed=recipe.objective.cache.seed,
            quarantine=Quarantine(None, total=CLIPS, max_share=0.0),
        ),
        LiveTargets(build_teacher(recipe), recipe.objective.mask, recipe.objective.cache.seed),
    )
    assert cached_clips == live_clips
    assert cached.shape == (9, 6)
    assert_close(cached, live, rtol=0, atol=tolerance)
    assert float(live[0, 0] - live[-1, 0]) > 20 * tolerance, "the curve goes somewhere"


def test_the_curve_would_tell_other_views_apart(built, videos):
    """What the comparison above is worth: another seed of views is far outside its tolerance."""
    recipe, _ = built
    cached, _ = loss_curve(
        recipe,
        CachedBatches(Cache.open(cache_folder(recipe), recipe), batch_size=3, seed=0),
        CachedTargets(Codec("fp16")),
        epochs=1,
    )
    other, _ = loss_curve(
        recipe,
        CachedBatches(Cache.open(cache_folder(recipe), recipe), batch_size=3, seed=1),
        CachedTargets(Codec("fp16")),
        epochs=1,
    )
    assert float((cached - other).abs().max()) > 5e-3


def test_the_number_of_workers_changes_no_record(built, videos, tmp_path):
    recipe = make_recipe(videos, tmp_path / "cache", data={"workers": 3}, cache={"views": 1})
    build_cache(recipe, progress=no_progress)
    expected = {key: value for key, value in records(built[0]).items() if key[1] == 0}
    assert_same_records(records(recipe), expected)
