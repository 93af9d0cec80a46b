"""The manifest: a copy of the shards' indexes that may be lost, damaged or behind the times."""

import errno
import os
import threading
import tracemalloc
import uuid

import numpy as np
import pytest
from safetensors import safe_open
from test_cache_shards import FIELDS, IDENTITY, info, read, values

from distill.cache import index as cache_index
from distill.cache.index import COLUMNS, MANIFEST_FILE, load_index
from distill.cache.shards import Field, ShardWriter, shard_sizes
from distill.cache.store import LocalFolder, open_folder
from distill.errors import StateError


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote = f"memory://{uuid.uuid4()}/cache"
    return open_folder(tmp_path / "cache" if request.param == "local" else remote)


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards whose own index is read."""
    names, inner = [], cache_index.read_shard_index

    def noted(folder, name, **settings):
        names.append(name)
        return inner(folder, name, **settings)

    monkeypatch.setattr(cache_index, "read_shard_index", noted)
    return names


def write(folder, keys, *, fields=FIELDS, identity=IDENTITY):
    settings = {"shard_bytes": 2**30, "shard_seconds": 3600.0}
    with ShardWriter(folder, fields=fields, identity=identity, **settings) as writer:
        for clip_id, view in keys:
            some = {field.name: values(clip_id, view)[field.name] for field in fields}
            writer.add(clip_id, view, some, info(clip_id, view))


def keys_of(index):
    return list(zip(index.views.tolist(), index.clip_ids.tolist(), strict=True))


def assert_same(found, expected):
    assert (found.shards, found.fields) == (expected.shards, expected.fields)
    for name, dtype in COLUMNS.items():
        column = getattr(found, name)
        assert column.dtype == dtype
        np.testing.assert_array_equal(column, getattr(expected, name))


def assert_readable(folder, index):
    for row, (view, clip) in enumerate(keys_of(index)):
        if folder.is_local:
            assert read(folder, index, row)[1] == info(clip, view)


def test_with_a_manifest_no_shard_is_opened(folder, opened):
    for clip in range(3):
        write(folder, [(clip, 0), (clip, 2)])
    first = load_index(folder, IDENTITY)
    assert sorted(opened) == list(shard_sizes(folder))
    opened.clear()
    again = load_index(folder, IDENTITY)
    assert opened == []
    assert_same(again, first)
    assert keys_of(again) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert_readable(folder, again)


def test_only_shards_that_the_manifest_does_not_know_are_opened(folder, opened):
    write(folder, [(5, 0), (1, 1)])
    load_index(folder, IDENTITY)
    known = set(shard_sizes(folder))
    write(folder, [(3, 0), (7, 0), (0, 1)])
    opened.clear()
    merged = load_index(folder, IDENTITY)
    assert set(opened) == set(shard_sizes(folder)) - known
    assert keys_of(merged) == [(0, 3), (0, 5), (0, 7), (1, 0), (1, 1)]
    assert_readable(folder, merged)
    folder.delete(MANIFEST_FILE)
    assert_same(load_index(folder, IDENTITY), merged)


@pytest.mark.parametrize("seed", range(8))
def test_however_shards_come_and_go_the_manifest_says_what_they_say(tmp_path, seed):
    """Random writes with records that are there twice, deletions, and openings in between."""
    folder, stream = open_folder(tmp_path), np.random.default_rng(seed)
    for _ in range(12):
        if stream.random() < 0.7 or not shard_sizes(folder):
            count = int(stream.integers(1, 6))
            write(folder, {(int(c), int(v)) for c, v in stream.integers(0, 4, (count, 2))})
        else:
            folder.delete(stream.choice(list(shard_sizes(folder))))
        if stream.random() < 0.5:
            load_index(folder, IDENTITY)
    found = load_index(folder, IDENTITY)
    folder.delete(MANIFEST_FILE)
    assert_same(found, load_index(folder, IDENTITY))
    assert keys_of(found) == sorted(set(keys_of(found)))
    assert_readable(folder, found)


def test_a_deleted_shards_records_are_gone_and_its_doubles_come_back(folder):
    write(folder, [(1, 0), (2, 0)])
    write(folder, [(2, 0), (3, 0)])
    first, second = shard_sizes(folder)
    assert keys_of(load_index(folder, IDENTITY)) == [(0, 1), (0, 2), (0, 3)]
    folder.delete(first)
    left = load_index(folder, IDENTITY)
    assert left.shards == (second,)
    assert (0, 2) in keys_of(left)
    assert len(left) == 2
    folder.delete(second)
    assert len(load_index(folder, IDENTITY)) == 0


def test_a_manifest_is_a_safetensors_file_with_34_bytes_a_row(tmp_path):
    write(open_folder(tmp_path), [(clip, 0) for clip in range(1000)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    path = tmp_path / MANIFEST_FILE
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, dtype in COLUMNS.items():
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name], getattr(index, name))
    assert 34_000 < path.stat().st_size < 36_000


def test_a_flipped_byte_of_the_manifest_is_noticed_anywhere(tmp_path, opened, caplog, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand times takes long
    folder = open_folder(tmp_path)
    write(folder, [(1, 0), (2, 0)])
    expected = load_index(folder, IDENTITY)
    sound = folder.read(MANIFEST_FILE)
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        (tmp_path / MANIFEST_FILE).write_bytes(damaged)
        opened.clear()
        assert_same(load_index(folder, IDENTITY), expected)
        assert len(opened) == 1, f"byte {place}"
        assert folder.read(MANIFEST_FILE) == sound, "mended"
    assert len(caplog.records) == len(sound)
    assert caplog.messages[0].startswith(f"{tmp_path / MANIFEST_FILE}: damaged (")
    assert caplog.messages[0].endswith("; made anew from the shards")


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1, -34])
def test_a_manifest_cut_short_is_made_anew(folder, opened, size):
    write(folder, [(1, 0), (2, 0)])
    expected = load_index(folder, IDENTITY)
    sound = folder.read(MANIFEST_FILE)
    folder.write(MANIFEST_FILE, sound[:size])
    opened.clear()
    assert_same(load_index(folder, IDENTITY), expected)
    assert len(opened) == 1
    assert folder.read(MANIFEST_FILE) == sound


def test_another_caches_manifest_is_of_no_use(tmp_path):
    here, there = open_folder(tmp_path / "here"), open_folder(tmp_path / "there")
    write(here, [(1, 0)])
    write(there, [(2, 0)])
    load_index(there, IDENTITY)
    here.write(MANIFEST_FILE, there.read(MANIFEST_FILE))
    assert keys_of(load_index(here, IDENTITY)) == [(0, 1)]


def test_a_shard_whose_size_has_changed_is_read_again_and_refused(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, [(1, 0), (2, 0)])
    load_index(folder, IDENTITY)
    (name,) = shard_sizes(folder)
    os.truncate(tmp_path / name, shard_sizes(folder)[name] - 1)
    with pytest.raises(StateError, match="damaged shard .a file of another length.; delete it"):
        load_index(folder, IDENTITY)


@pytest.mark.parametrize("has_manifest", [False, True])
def test_another_identity_is_refused_and_leaves_the_manifest_alone(tmp_path, has_manifest):
    folder = open_folder(tmp_path)
    write(folder, [(1, 0)])
    if has_manifest:
        load_index(folder, IDENTITY)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateError, match="holds data.views.frames 8, the recipe asks for 16; set "):
        load_index(folder, {**IDENTITY, "data.views.frames": 16})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_another_layout_are_named(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, [(1, 0)])
    (first,) = shard_sizes(folder)
    load_index(folder, IDENTITY)
    write(folder, [(2, 0)], fields=FIELDS[:2])
    (second,) = set(shard_sizes(folder)) - {first}
    message = f"{folder.at(second)}: its records are laid out otherwise than those of {first}; del"
    with pytest.raises(StateError) as error:
        load_index(folder, IDENTITY)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_who_may_not_write_reads_without(tmp_path, monkeypatch, number):
    folder = open_folder(tmp_path)
    write(folder, [(1, 0)])

    def refuse(path, name):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    assert keys_of(load_index(folder, IDENTITY)) == [(0, 1)]
    assert [path.name for path in tmp_path.iterdir()] == list(shard_sizes(folder))


def test_a_manifest_that_goes_away_while_it_is_opened_is_no_error(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    write(folder, [(1, 0)])
    load_index(folder, IDENTITY)
    inner = LocalFolder.map

    def deleted(self, name):
        self.delete(name)
        return inner(self, name)

    monkeypatch.setattr(LocalFolder, "map", deleted)
    assert keys_of(load_index(folder, IDENTITY)) == [(0, 1)]


def test_find_tells_rows_for_ids_in_any_order_and_views_of_any_size(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, [(5, 0), (9, 0), (5, 2), (-4, 2)])
    index = load_index(folder, IDENTITY)
    assert index.num_views == 3
    assert index.find(np.array([9, 4, 5, 10, 5]), 0).tolist() == [1, -1, 0, -1, 0]
    assert index.find(np.array([5, 9]), 0).tolist() == [0, 1]
    assert index.find(np.array([9, 5]), 1).tolist() == [-1, -1]
    assert index.find(np.array([5, 9, -4]), 2).tolist() == [3, -1, 2]
    for view in (3, 40_000, 2**40, -1):
        assert index.find(np.array([5]), view).tolist() == [-1]
    assert index.known_clips().tolist() == [-4, 5, 9]


def test_a_view_beyond_what_the_index_has_room_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="view 32767 of 291 bytes: more than an index has room"):
        write(open_folder(tmp_path), [(1, 32767)])
    write(open_folder(tmp_path), [(1, 32766)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    assert index.find(np.array([1]), 32766).tolist() == [0]


def tiny_records(folder, count):
    settings = {"shard_bytes": 2**30, "shard_seconds": 3600.0}
    fields = [Field("x", "uint8", (1,))]
    with ShardWriter(folder, fields=fields, identity=IDENTITY, **settings) as writer:
        for clip in range(count):
            writer.add(clip, 0, {"x": np.zeros(1, np.uint8)}, {})


def test_memory_does_not_grow_with_the_records_of_a_manifest(tmp_path):
    """On the way and once open, as the program's own memory: the columns are the file's."""
    folder = open_folder(tmp_path)
    tiny_records(folder, 20_000)
    tracemalloc.start()
    load_index(folder, IDENTITY)
    made = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made / 20_000 < 250, "without a manifest"
    load_index(folder, IDENTITY)
    tracemalloc.start()
    index = load_index(folder, IDENTITY)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 20_000
    assert kept < 30_000
    assert peak < 150_000, "8 bytes a record would be more"


def test_readers_that_come_at_once_all_open_it(tmp_path):
    """They find the manifest stale and write it at the same time."""
    folder, found = open_folder(tmp_path), []
    write(folder, [(1, 0), (2, 0)])
    start = threading.Barrier(5)

    def open_often():
        start.wait()
        for _ in range(20):
            found.append(keys_of(load_index(folder, IDENTITY)))

    readers = [threading.Thread(target=open_often) for _ in range(4)]
    for reader in readers:
        reader.start()
    start.wait()
    write(folder, [(3, 0)])
    write(folder, [(4, 0)])
    for reader in readers:
        reader.join()
    every = [(0, clip) for clip in (1, 2, 3, 4)]
    assert len(found) == 80
    assert all(keys in (every[:2], every[:3], every) for keys in found)
    assert keys_of(load_index(folder, IDENTITY)) == every
    assert set(folder.sizes()) == {MANIFEST_FILE, *shard_sizes(folder)}
