"""Checksums on made-up records; recomputation on real videos with a small random teacher."""

import dataclasses
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from test_cache_build import make_recipe, no_progress, write_video
from test_cache_inspect import CLIPS, VIEWS, make_cache
from typer.testing import CliRunner

from distill.cache import recompute as cache_recompute
from distill.cache import verify as cache_verify
from distill.cache.build import build_cache
from distill.cache.identity import cache_identity
from distill.cache.inspect import open_any
from distill.cache.recompute import LEAST_ERROR, recompute, recompute_lines
from distill.cache.shards import ShardWriter, read_shard_index, shard_sizes
from distill.cache.store import LocalFolder, open_folder, reported
from distill.cache.verify import verify_cache
from distill.cli import app
from distill.data.index import read_list
from distill.errors import InputError, StateError
from distill.models import build_teacher

RECORDS = CLIPS * VIEWS


def verify(folder, **settings):
    return verify_cache(folder, progress=no_progress, **settings)


def shards(folder):
    return sorted(Path(folder).glob("shard-*"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.fixture
def cache(tmp_path):
    """A sound cache of two shards: its recipe and folder."""
    ours, _, _ = make_cache(tmp_path)
    return ours, tmp_path / "cache"


def test_a_sound_cache_has_no_problem(cache):
    ours, folder = cache
    report = verify(folder, recipe=ours)
    assert (report.problems, report.damaged, report.num_twice, report.missing) == ([], [], 0, 0)
    size = sum(path.stat().st_size for path in shards(folder))
    assert (report.num_shards, report.num_records, report.size_bytes) == (2, RECORDS, size)
    assert list(report.lines()) == [
        f"cache {folder}: 10 records in 2 shards, {size / 1000:.2f} kB, read and compared with "
        "their checksums",
        f"cache {folder}: complete, with the recipe's settings",
    ]


def test_a_damaged_record_is_named_by_its_shard(cache):
    ours, folder = cache
    path = shards(folder)[1]
    index = read_shard_index(open_folder(folder), path.name)
    flip(path, int(index.starts[2]) + 3)
    flip(path, int(index.starts[4]) + 3)
    report = verify(folder)
    assert report.problems == [
        f"{path}: 2 of 5 records are damaged, the first that of clip {index.clip_ids[2]} in view "
        f"{index.views[2]} (its checksum differs); delete the shard and run 'distill "
        "cache-teacher' again to make its records anew"
    ]
    assert report.damaged == [path.name]
    assert path.exists()


def test_every_flipped_byte_of_a_shard_is_found(cache):
    _, folder = cache
    path = shards(folder)[0]
    sound = path.read_bytes()
    for place in np.random.default_rng(0).integers(len(sound), size=40).tolist() + [0, 9, -1]:
        flip(path, place)
        report = verify(folder)
        assert report.damaged == [path.name], place
        assert len(report.problems) == 1
        path.write_bytes(sound)
    assert not verify(folder).problems


def test_every_damaged_shard_gets_a_line(cache):
    _, folder = cache
    first, second = shards(folder)
    flip(first, first.stat().st_size - 1)
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size - 7)
    report = verify(folder)
    assert [line.split(": damaged shard (")[0] for line in report.problems] == [
        str(first),
        str(second),
    ]
    assert report.damaged == [first.name, second.name]
    assert report.num_records == 0


def test_damaged_shards_are_deleted_on_demand_and_nothing_else(cache):
    ours, folder = cache
    first, second = shards(folder)
    verify(folder)  # so that there is a manifest
    flip(first, first.stat().st_size // 2)
    before = {path.name for path in folder.iterdir()}
    report = verify(folder, recipe=ours, delete_damaged=True)
    assert report.deleted == [first.name]
    assert {path.name for path in folder.iterdir()} == before - {first.name}
    assert report.problems[1] == (
        f"cache {folder}: lacks 5 of the 10 records of 5 clips in 2 views; run 'distill "
        "cache-teacher' to add them"
    )
    assert list(report.lines())[-1] == (
        f"cache {folder}: deleted {first.name}; run 'distill cache-teacher' to make what was in "
        "them anew"
    )
    assert not verify(folder).problems


def test_a_shard_that_cannot_be_read_is_no_damage(cache, monkeypatch):
    _, folder = cache
    first = shards(folder)[0]
    whole = LocalFolder.read_range

    def fail(self, name, start, size):
        with reported(self.at(name), "read"):
            if name == first.name:
                raise OSError(5, "Input/output error")
        return whole(self, name, start, size)

    monkeypatch.setattr(LocalFolder, "read_range", fail)
    report = verify(folder, delete_damaged=True)
    (line,) = report.problems
    assert line.startswith(f"{first}: cannot be read (Input/output error); ")
    assert (report.damaged, report.deleted) == ([], [])
    assert first.exists()


def test_records_that_are_there_twice_are_counted(cache):
    ours, folder = cache
    where = open_folder(folder)
    opened = open_any(folder).cache
    identity = read_shard_index(where, shards(folder)[0].name).identity
    settings = {"fields": opened.index.fields, "identity": identity, "shard_bytes": 2**20}
    with ShardWriter(where, shard_seconds=99.0, **settings) as writer:
        for row in (1, 8):
            arrays, info = opened.read(row)
            clip_id, view = int(opened.index.clip_ids[row]), int(opened.index.views[row])
            writer.add(clip_id, view, arrays, {**info, "decoder": "another"})
    report = verify(folder, recipe=ours)
    assert (report.num_twice, report.num_records, report.problems) == (2, RECORDS + 2, [])
    assert list(report.lines())[1] == f"cache {folder}: 2 records are there twice; one counts"


def test_a_manifest_that_lies_is_found_and_deleted(cache, monkeypatch):
    _, folder = cache
    whole = cache_verify.load_index
    verify(folder)  # so that there is a manifest

    def lie(*args):
        index = whole(*args)
        return dataclasses.replace(index, starts=index.starts + 64)

    monkeypatch.setattr(cache_verify, "load_index", lie)
    report = verify(folder, delete_damaged=True)
    assert report.problems == [
        f"{folder}/manifest.safetensors: lists other records than the shards hold; delete it, it "
        "is made again"
    ]
    assert report.deleted == ["manifest.safetensors"]
    assert not (folder / "manifest.safetensors").exists()
    assert len(shards(folder)) == 2


def test_shards_of_another_cache_are_one_line(cache, tmp_path):
    ours, folder = cache
    other, _, _ = make_cache(tmp_path, folder="other", tokens="superset")
    (stranger,) = [path for path in shards(tmp_path / "other") if path.name > "shard-"][:1]
    (folder / stranger.name).write_bytes(stranger.read_bytes())
    (line,) = verify(folder).problems
    assert "of 3 shards are of another cache: objective.cache.tokens is " in line
    assert verify(folder).damaged == []


def test_missing_means_are_one_line(cache):
    _, folder = cache
    (folder / "means.safetensors").unlink()
    (line,) = verify(folder).problems
    assert "means.safetensors is not there; put that file back" in line


def test_damaged_means_are_one_line(cache):
    _, folder = cache
    flip(folder / "means.safetensors", -3)
    report = verify(folder, delete_damaged=True)
    (line,) = report.problems
    assert line.startswith(f"{folder}/means.safetensors: damaged means of the cache's codes; ")
    assert report.deleted == [], "they cannot be made again for the codes that are there"


def test_another_recipe_is_one_line(cache):
    ours, folder = cache
    mask = ours.objective.mask.model_copy(update={"ratio": 0.75})
    objective = ours.objective.model_copy(update={"mask": mask})
    report = verify(folder, recipe=ours.model_copy(update={"objective": objective}))
    (line,) = report.problems
    assert f"cache {folder}: holds objective.mask.ratio 0.5, the recipe asks for 0.75; " in line
    assert len(list(report.lines())) == 1, "it is not called complete"


def test_clips_in_quarantine_are_not_missing(cache, tmp_path):
    ours, folder = cache
    list_file = tmp_path / "train.csv"
    list_file.write_text(list_file.read_text() + "v/new.mp4,0\n")
    assert verify(folder, recipe=ours).missing == VIEWS
    new = read_list(ours.data.train)[-1]
    entry = f'{{"id": {new.id}, "name": "v/new.mp4", "path": "", "line": 6, "reason": "empty"}}\n'
    (folder / "quarantine-1.jsonl").write_text(entry)
    assert verify(folder, recipe=ours).missing == 0


def test_an_empty_folder_is_one_line(tmp_path):
    message = f"cache {tmp_path}: no shards there; is that the cache's folder?"
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        verify(tmp_path)


@pytest.mark.parametrize("size", [1, 4000, 10**9])
def test_records_are_read_in_runs_of_bounded_size(cache, monkeypatch, size):
    _, folder = cache
    monkeypatch.setattr(cache_verify, "READ_BYTES", size)
    where = open_folder(folder)
    for name in shard_sizes(where):
        index = read_shard_index(where, name)
        runs = list(cache_verify._runs(index))
        assert [first for first, _ in runs] == [0, *(last for _, last in runs)][:-1]
        assert runs[-1][1] == len(index.sizes)
        for first, last in runs:
            assert last == first + 1 or index.sizes[first:last].sum() <= size
    flip(shards(folder)[0], int(index.starts[3]) + 1)
    assert len(verify(folder).problems) == 1


def test_a_remote_cache_is_verified_as_well(tmp_path):
    name = f"verify-{tmp_path.name}"
    ours, _, _ = make_cache(tmp_path, folder=f"memory://{name}")
    assert not verify(f"memory://{name}", recipe=ours).problems
    files = fsspec.filesystem("memory")
    (path, *_) = files.glob(f"/{name}/shard-*")
    content = bytearray(files.cat_file(path))
    content[len(content) // 2] ^= 1
    files.pipe_file(path, bytes(content))
    report = verify(f"memory://{name}", delete_damaged=True)
    assert report.deleted == [path.rsplit("/", 1)[-1]]
    assert not files.exists(path)
    files.rm(f"/{name}", recursive=True)


def test_the_command_ends_with_2_and_a_line_for_each_damaged_file(cache):
    _, folder = cache
    good = CliRunner().invoke(app, ["cache", "verify", str(folder)])
    assert (good.exit_code, good.stderr) == (0, "")
    paths = shards(folder)
    for path in paths:
        flip(path, -1)
    bad = CliRunner().invoke(app, ["cache", "verify", str(folder), "--delete-damaged"])
    assert bad.exit_code == 2
    assert [line.split(": ")[0] for line in bad.stderr.splitlines()] == [str(p) for p in paths]
    assert not shards(folder)
    assert bad.stdout.splitlines()[-1].startswith(f"cache {folder}: deleted shard-")


def test_recomputing_takes_a_recipe(cache):
    result = CliRunner().invoke(app, ["cache", "verify", str(cache[1]), "--recompute", "3"])
    assert result.exit_code == 2
    assert result.stderr == (
        "to make records again takes their recipe: give it by --recipe RECIPE\n"
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A cache of five real videos at 4 bits: its recipe."""
    folder = tmp_path_factory.mktemp("real")
    for index in range(5):
        write_video(folder / f"{index}.mp4", seed=index)
    (folder / "train.csv").write_text("".join(f"{index}.mp4,0\n" for index in range(5)))
    recipe = make_recipe(folder, folder / "cache", cache={"codes": "4bit", "tokens": "superset"})
    build_cache(recipe, progress=no_progress)
    return recipe


def again(recipe, count=4, **settings):
    opened = open_any(recipe.objective.cache.folder)
    return recompute(opened, recipe, count, progress=no_progress, **settings)


def test_records_made_again_are_the_same_but_for_the_codes_error(real):
    report = again(real, count=10)
    assert (report.asked, report.made, report.problems) == (10, 10, [])
    assert report.same_pixels == report.same_tokens == 10
    assert report.shared_tokens == 1.0
    assert report.attention < 1e-5
    assert list(report.rows) == ["layer 0", "layer 1", "layer 2", "pooled"]
    for layer in range(3):
        found = report.rows[f"layer {layer}"]
        assert found.mean == pytest.approx(found.expected, rel=0.15)
        assert 1e-4 < found.expected < 9.6e-3 / 2, "half the noise of 4 bits, where no mean is"
        assert found.mean < found.largest
        assert found.limit == pytest.approx(1.5 * found.expected + LEAST_ERROR)
    assert report.rows["pooled"].mean < 1e-6, "half precision"
    assert recompute_lines(report)[0] == "pixels: 10 of 10 records the same bit for bit"


def test_another_video_under_the_same_name_is_found(real, tmp_path):
    folder = Path(real.data.train.list).parent
    for path in folder.glob("*.mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_video(tmp_path / "3.mp4", seed=99)
    train = real.data.train.model_copy(update={"prefix": str(tmp_path)})
    moved = real.model_copy(update={"data": real.data.model_copy(update={"train": train})})
    report = again(moved, count=10)
    assert (report.made, report.same_pixels) == (10, 8)
    lines = [line for line in report.problems if line.startswith(str(tmp_path / "3.mp4"))]
    assert len(lines) == 2
    assert "its pixels in view 0 are not those of the record (decoded by pyav" in lines[0]


def test_other_views_than_the_recipe_draws_are_found(real, monkeypatch):
    revised = real.objective.cache.model_copy(update={"seed": 5})
    objective = real.objective.model_copy(update={"cache": revised})
    report = again(real.model_copy(update={"objective": objective}), count=2)
    assert report.same_pixels == 0
    assert re.search(r"not those of the record \((frames|crop|flip) .*, now ", report.problems[0])


def test_another_teacher_is_found(real, monkeypatch):
    other = real.model_copy(update={"run": real.run.model_copy(update={"seed": 1})})
    monkeypatch.setattr(
        "distill.cache.live.build_teacher", lambda _, name: build_teacher(other, name)
    )
    report = again(real)
    assert report.same_pixels == 4
    assert sum("its teacher is another one" in line for line in report.problems) == 4
    assert re.search(
        r": layer 0: rows made again are .* from the cache's, where", report.problems[-4]
    )


def test_slightly_noisier_rows_are_found(real, monkeypatch):
    """Twice the codes' own error is no rounding."""
    whole = cache_recompute.make_records

    def noisy(*args):
        records = whole(*args)
        noise = torch.randn(records["middle"].shape, generator=torch.Generator().manual_seed(0))
        scale = records["middle"].std() * 0.1
        return {**records, "middle": records["middle"] + scale * noise}

    monkeypatch.setattr(cache_recompute, "make_records", noisy)
    report = again(real)
    assert [line.split(": ")[1] for line in report.problems] == ["layer 0", "layer 1", "layer 2"]


def test_a_video_that_is_gone_is_one_line(real, tmp_path):
    folder = Path(real.data.train.list).parent
    for path in folder.glob("[0-3].mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train = real.data.train.model_copy(update={"prefix": str(tmp_path)})
    moved = real.model_copy(update={"data": real.data.model_copy(update={"train": train})})
    report = again(moved, count=10)
    assert report.made == 8
    assert f"a clip cannot be decoded any more: {tmp_path / '4.mp4'}" in report.problems[0]


def test_a_list_of_other_clips_is_one_line(real, tmp_path):
    (tmp_path / "other.csv").write_text("a.mp4,0\nb.mp4,0\n")
    train = real.data.train.model_copy(update={"list": str(tmp_path / "other.csv")})
    other = real.model_copy(update={"data": real.data.model_copy(update={"train": train})})
    with pytest.raises(InputError, match=r"other.csv: has none of the 4 clips that were drawn"):
        again(other)


def test_the_command_makes_records_again(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = real.model_dump_json(exclude={"name"}, exclude_none=True)
    Path("r.yaml").write_text(tree)  # YAML is a superset of JSON
    folder = real.objective.cache.folder
    arguments = ["cache", "verify", folder, "--recipe", "r.yaml", "--recompute", "2", "--seed", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "complete, with the recipe's settings" in result.output
    assert "pixels: 2 of 2 records the same bit for bit" in result.output
    assert "layer 2" in result.output
    assert cache_identity(real)["objective.cache.tokens"] == "superset"
    wrong = CliRunner().invoke(app, [*arguments, "objective.mask.ratio=0.5"])
    assert wrong.exit_code == 2
    assert "holds objective.mask.ratio 0.8, the recipe asks for 0.5" in wrong.stderr
