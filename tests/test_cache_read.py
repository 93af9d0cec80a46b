import dataclasses
import gc
import json
import os
import re
import threading
import uuid

import numpy as np
import pytest
import torch
from test_cache_identity import recipe

from distill import draw
from distill.cache import read as cache_read
from distill.cache import shards as cache_shards
from distill.cache.buffers import BufferPool
from distill.cache.identity import cache_identity
from distill.cache.read import Cache, CachedBatches
from distill.cache.shards import Field, ShardReader, ShardWriter
from distill.cache.store import open_folder
from distill.data.index import read_list
from distill.dist import Part
from distill.errors import StateError

FIELDS = (Field("tokens", "int16", (3,)), Field("codes", "float16", (2, 4, 8)))
CLIPS, VIEWS = 23, 2


def values(clip_id, view):
    stream = np.random.default_rng([clip_id % 2**64, view])
    return {
        "tokens": stream.integers(0, 2048, 3).astype(np.int16),
        "codes": stream.standard_normal((2, 4, 8)).astype(np.float16),
    }


def make(tmp_path, *, keep=lambda clip, view: True, views=VIEWS):
    """A list of clips and a cache with their records, in shards of some five records."""
    (tmp_path / "train.csv").write_text("".join(f"v/{i}.mp4,0\n" for i in range(CLIPS)))
    ours = recipe(
        data__train__list=str(tmp_path / "train.csv"),
        objective__cache__folder=str(tmp_path / "cache"),
        objective__cache__views=views,
        objective__cache__codes="fp16",
    )
    clips = read_list(ours.data.train)
    folder = tmp_path / "cache"
    folder.mkdir()
    settings = {"fields": FIELDS, "identity": cache_identity(ours)}
    with ShardWriter(
        open_folder(folder), shard_bytes=1000, shard_seconds=99.0, **settings
    ) as writer:
        for view in range(VIEWS):
            for place, clip in enumerate(clips):
                if keep(place, view):
                    writer.add(clip.id, view, values(clip.id, view), {"name": clip.name})
                    writer.commit_if_full()
    return ours, clips, folder


def test_an_epoch_reads_its_view_of_every_clip_once(tmp_path):
    ours, clips, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=3)
    assert batches.steps_per_epoch == 5
    for epoch in (0, 1, 2, 5):
        read = list(batches.epoch(epoch))
        assert [len(batch["clip_id"]) for batch in read] == [5, 5, 5, 5, 3]
        ids = torch.cat([batch["clip_id"] for batch in read]).tolist()
        assert sorted(ids) == sorted(clip.id for clip in clips)
        for batch in read:
            assert batch["epoch"] == epoch
            assert batch["view"].tolist() == [epoch % VIEWS] * len(batch["view"])
            assert batch["tokens"].dtype == torch.int16
            for place, clip_id in enumerate(batch["clip_id"].tolist()):
                for name, value in values(clip_id, epoch % VIEWS).items():
                    np.testing.assert_array_equal(batch[name][place].numpy(), value)


def test_the_order_is_that_of_live_batches(tmp_path):
    """A permutation of the list's places, drawn from ("shuffle", seed, epoch)."""
    ours, clips, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=3)
    for epoch in (0, 1):
        order = draw.generator("shuffle", 3, epoch).permutation(CLIPS)
        ids = [clip for batch in batches.epoch(epoch) for clip in batch["clip_id"].tolist()]
        assert ids == [clips[place].id for place in order]


def test_an_epoch_can_be_entered_in_the_middle(tmp_path):
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=3)
    whole = [batch["clip_id"].tolist() for batch in batches.epoch(1)]
    assert [batch["clip_id"].tolist() for batch in batches.epoch(1, first_step=3)] == whole[3:]
    assert list(batches.epoch(1, first_step=5)) == []


@pytest.mark.parametrize("window", [1, 2, 16])
def test_the_prefetch_window_changes_no_batch(tmp_path, window):
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=4, seed=0)
    expected = [(batch["clip_id"], batch["codes"]) for batch in batches.epoch(0)]
    batches.window = window
    for batch, (clip_id, codes) in zip(batches.epoch(0), expected, strict=True):
        torch.testing.assert_close(batch["clip_id"], clip_id)
        torch.testing.assert_close(batch["codes"], codes)


def test_records_are_read_in_the_order_of_the_disk_inside_the_window(tmp_path, monkeypatch):
    ours, _, folder = make(tmp_path)
    monkeypatch.setattr(cache_read, "READ_THREADS", 1)
    places = []

    class Noted(ShardReader):
        def read(self, name, parts, *, start, **settings):
            places.append((name, start))
            super().read(name, parts, start=start, **settings)

    monkeypatch.setattr(cache_read, "ShardReader", Noted)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=4, seed=0)
    assert batches.window == 16
    list(batches.epoch(0))
    assert len(places) == CLIPS
    assert places == sorted(places)


def test_read_ahead_is_bounded_by_bytes(tmp_path, monkeypatch):
    ours, _, folder = make(tmp_path)
    cache = Cache.open(folder, ours)
    record_bytes = sum(field.size_bytes for field in FIELDS)
    monkeypatch.setattr(cache_read, "PREFETCH_BYTES", 12 * record_bytes)
    assert CachedBatches(cache, batch_size=5, seed=0).window == 2
    assert CachedBatches(cache, batch_size=12, seed=0).window == 1


def test_leaving_an_epoch_early_stops_its_threads(tmp_path, monkeypatch):
    ours, _, folder = make(tmp_path)
    read = []

    class Noted(ShardReader):
        def read(self, name, parts, **settings):
            read.append(name)
            super().read(name, parts, **settings)

    monkeypatch.setattr(cache_read, "ShardReader", Noted)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=1, seed=0)
    batches.window = 1
    before = threading.active_count()
    epoch = batches.epoch(0)
    next(epoch)
    assert threading.active_count() > before
    epoch.close()
    assert threading.active_count() == before
    assert len(read) <= 5, "one is out, one waits, one is being read"


@pytest.mark.parametrize("error", [KeyError("codes"), MemoryError("no room"), ValueError("x")])
def test_any_error_of_a_thread_reaches_the_consumer(tmp_path, monkeypatch, error):
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=0)
    batches.window = 2
    read, seen = Cache.read_into, []

    def fail(self, *args):
        seen.append(args)
        if len(seen) > 12:  # in the second window
            raise error
        return read(self, *args)

    monkeypatch.setattr(Cache, "read_into", fail)
    epoch = batches.epoch(0)
    assert [len(next(epoch)["clip_id"]) for _ in range(2)] == [5, 5]
    with pytest.raises(type(error)) as raised:
        next(epoch)
    assert raised.value is error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cache-")]


def test_waiting_is_counted(tmp_path):
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=0)
    assert batches.wait_seconds == 0.0
    list(batches.epoch(0))
    assert 0.0 < batches.wait_seconds < 10.0


def test_the_index_takes_a_few_dozen_bytes_a_record(tmp_path):
    ours, _, folder = make(tmp_path)
    index = Cache.open(folder, ours).index
    columns = (index.clip_ids, index.views, index.shard, index.starts, index.sizes, index.xxh3)
    assert all(isinstance(column, np.ndarray) for column in columns)
    assert sum(column.itemsize for column in columns) == 34


def test_a_subset_of_the_cached_clips_is_read_in_its_lists_order(tmp_path):
    ours, clips, folder = make(tmp_path)
    chosen = [clips[place] for place in (20, 3, 11)]
    (tmp_path / "train.csv").write_text("".join(f"{clip.name},0\n" for clip in chosen))
    cache = Cache.open(folder, ours)
    assert cache.index.clip_ids[cache.rows[:, 0]].tolist() == [clip.id for clip in chosen]
    assert cache.index.views[cache.rows[0]].tolist() == [0, 1]
    assert cache.clip_names([chosen[1].id, chosen[0].id]) == ["v/3.mp4", "v/20.mp4"]


def test_a_cache_needs_no_list(tmp_path):
    ours, clips, folder = make(tmp_path)
    data = ours.data.model_copy(update={"train": ours.data.train.model_copy(update={"list": None})})
    cache = Cache.open(folder, ours.model_copy(update={"data": data}))
    found = cache.index.clip_ids[cache.rows[:, 0]].tolist()
    assert found == sorted(clip.id for clip in clips)


def test_fewer_views_than_cached_may_be_asked_for_but_not_more(tmp_path):
    ours, _, folder = make(tmp_path, views=1)
    cache = Cache.open(folder, ours)
    assert cache.rows.shape == (CLIPS, 1)
    more = recipe(
        data__train__list=str(tmp_path / "train.csv"),
        objective__cache__views=3,
        objective__cache__codes="fp16",
    )
    message = (
        f"cache {folder}: lacks 23 of the 69 records of 23 clips in 3 views; run "
        "'distill cache-teacher' to add them"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        Cache.open(folder, more)


def test_missing_records_are_counted(tmp_path):
    ours, _, folder = make(tmp_path, keep=lambda clip, view: (clip, view) not in {(4, 0), (5, 1)})
    with pytest.raises(StateError, match="lacks 2 of the 46 records of 23 clips in 2 views; run"):
        Cache.open(folder, ours)


def test_an_empty_folder_is_one_line(tmp_path):
    ours, _, _ = make(tmp_path)
    message = f"cache {tmp_path / 'none'}: no records there; run 'distill cache-teacher' to make"
    with pytest.raises(StateError, match=re.escape(message)):
        Cache.open(tmp_path / "none", ours)


def test_a_list_whose_clips_are_all_in_quarantine_is_one_line(tmp_path):
    ours, clips, folder = make(tmp_path)
    (tmp_path / "train.csv").write_text("v/3.mp4,0\n")
    entry = {"id": clips[3].id, "name": "v/3.mp4", "reason": "empty"}
    (folder / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(
        StateError, match=r"every clip of .*train.csv is in .*quarantine\*.jsonl, w"
    ):
        Cache.open(folder, ours)


def test_another_recipes_cache_is_refused(tmp_path):
    ours, _, folder = make(tmp_path)
    objective = ours.objective.model_copy(
        update={"mask": ours.objective.mask.model_copy(update={"ratio": 0.75})}
    )
    message = (
        f"cache {folder}: holds objective.mask.ratio 0.8, the recipe asks for 0.75; set "
        "objective.mask.ratio=0.8, or set objective.cache.folder to a new folder and run "
        "'distill cache-teacher'"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        Cache.open(folder, ours.model_copy(update={"objective": objective}))


def test_a_damaged_record_stops_the_epoch_and_names_its_shard(tmp_path):
    ours, _, folder = make(tmp_path)
    cache = Cache.open(folder, ours)
    row = int(cache.rows[7, 0])
    path = folder / cache.index.shards[cache.index.shard[row]]
    sound = bytearray(path.read_bytes())
    sound[int(cache.index.starts[row]) + 9] ^= 4
    path.write_bytes(sound)
    clip = cache.index.clip_ids[row]
    message = f"{path}: the record of clip {clip} in view 0 is damaged (its checksum differs); "
    with pytest.raises(StateError, match=re.escape(message)):
        list(CachedBatches(cache, batch_size=5, seed=0).epoch(0))
    assert threading.active_count() < 5
    list(CachedBatches(cache, batch_size=5, seed=0).epoch(1))


def test_a_shard_that_goes_away_stops_the_epoch(tmp_path):
    ours, _, folder = make(tmp_path)
    cache = Cache.open(folder, ours)
    min(folder.glob("shard-*")).unlink()
    with pytest.raises(StateError, match="cannot be read .No such file or directory.; check that"):
        for epoch in (0, 1):
            list(CachedBatches(cache, batch_size=5, seed=0).epoch(epoch))


def test_memory_of_a_batch_is_used_again_once_its_tensors_are_gone(tmp_path):
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=1, seed=0)
    batches.window = 1
    places = {batch["codes"].data_ptr() for epoch in range(4) for batch in batches.epoch(epoch)}
    assert 1 <= len(places) <= 5, "one is out, one waits, one is being read"


@pytest.mark.parametrize("keep", ["tokens", "codes", "slice", "numpy"])
def test_memory_that_is_still_looked_at_is_left_alone(tmp_path, keep):
    """Any tensor or array that shares it keeps all of a batch's memory."""
    ours, _, folder = make(tmp_path)
    batches = CachedBatches(Cache.open(folder, ours), batch_size=2, seed=0)
    batches.window = 1
    kept = []
    for batch in batches.epoch(0):
        tensor = {"slice": batch["codes"][-1:, 0], "numpy": batch["codes"].numpy()}
        tensor = tensor.get(keep, batch.get(keep))
        kept.append((tensor, batch["clip_id"].tolist(), tensor + 0))
        del batch, tensor
    for epoch in range(1, 4):
        list(batches.epoch(epoch))
    assert len(kept) == -(-CLIPS // 2)
    for tensor, clip_ids, expected in kept:
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(expected))
        name = "tokens" if keep == "tokens" else "codes"
        clips = clip_ids[-1:] if keep == "slice" else clip_ids
        right = np.stack([values(clip, 0)[name] for clip in clips])
        np.testing.assert_array_equal(np.asarray(tensor), right[:, 0] if keep == "slice" else right)


def test_unused_memory_is_bounded():
    pool = BufferPool(4096, keep=3)
    taken = [pool.take() for _ in range(10)]
    assert len({piece.ctypes.data for piece in taken}) == 10
    taken.clear()
    gc.collect()
    assert len(pool._unused) == 3


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_read_what_one_reads(tmp_path, world_size):
    ours, _, folder = make(tmp_path)
    cache = Cache.open(folder, ours)
    whole = list(CachedBatches(cache, batch_size=6, seed=1).epoch(1))
    ranks = [
        list(CachedBatches(cache, batch_size=6, seed=1, part=Part(r, world_size)).epoch(1))
        for r in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        sizes = [len(part["clip_id"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for name in ("clip_id", "view", "tokens", "codes"):
            joined = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(joined, batch[name], rtol=0, atol=0)


def gaps(tmp_path):
    return make(tmp_path, keep=lambda clip, view: (clip + view) % 3 > 0)


def test_missing_records_are_told_by_their_places_in_the_batch(tmp_path):
    ours, clips, folder = gaps(tmp_path)
    cache = Cache.open(folder, ours, allow_missing=True)
    assert (cache.rows < 0).sum() == 15
    assert cache.clip_ids.tolist() == [clip.id for clip in clips]
    number = {clip.id: place for place, clip in enumerate(clips)}
    batches = CachedBatches(cache, batch_size=5, seed=3)
    for epoch in (0, 1):
        ids = []
        for batch in batches.epoch(epoch):
            lacking = [
                place
                for place, clip in enumerate(batch["clip_id"].tolist())
                if (number[clip] + epoch) % 3 == 0
            ]
            assert batch.get("missing", []) == lacking
            for place, clip_id in enumerate(batch["clip_id"].tolist()):
                for name, value in values(clip_id, epoch).items():
                    if place not in lacking:
                        np.testing.assert_array_equal(batch[name][place].numpy(), value)
            ids += batch["clip_id"].tolist()
        assert ids == [clips[place].id for place in batches.order(epoch)]


def test_an_empty_cache_may_be_opened_where_records_may_be_missing(tmp_path):
    ours, clips, _ = make(tmp_path)
    cache = Cache.open(tmp_path / "none", ours, allow_missing=True)
    (batch,) = CachedBatches(cache, batch_size=99, seed=0).epoch(1)
    assert sorted(batch["clip_id"].tolist()) == sorted(clip.id for clip in clips)
    assert batch["missing"] == list(range(CLIPS))
    assert batch.keys() == {"clip_id", "view", "missing", "epoch"}
    data = ours.data.model_copy(update={"train": ours.data.train.model_copy(update={"list": None})})
    with pytest.raises(StateError, match="no records there; run 'distill cache-teacher' to make"):
        Cache.open(tmp_path / "none", ours.model_copy(update={"data": data}), allow_missing=True)


def test_names_come_from_any_view(tmp_path):
    ours, clips, folder = gaps(tmp_path)
    cache = Cache.open(folder, ours, allow_missing=True)
    assert cache.clip_names([clips[0].id, clips[1].id]) == ["v/0.mp4", "v/1.mp4"]


class FakeCache:
    """As much of a cache as a shuffled order needs."""

    def __init__(self, count):
        self.folder, self.clip_ids, self.num_views = open_folder("."), np.arange(count), 1
        self.rows = self.clip_ids[:, None]
        self.index = dataclasses.make_dataclass("Index", ["fields"])(())


def orders_of(count, *, epochs):
    batches = CachedBatches(FakeCache(count), batch_size=1, seed=5)
    return [batches.order(epoch) for epoch in range(epochs)]


def shuffled_in_blocks(count, *, epochs, block):
    """What a shuffle buffer, or one of shards and inside them, comes close to."""
    stream = np.random.default_rng(0)
    starts = np.arange(0, count, block)
    return [
        np.concatenate([start + stream.permutation(block) for start in starts])
        for _ in range(epochs)
    ]


def unevenness(orders):
    """Chi-squared of the thirds of an epoch in which each of the clips comes."""
    count = len(orders[0])
    seen = np.zeros((count, 3))
    for order in orders:
        seen[order, np.arange(count) * 3 // count] += 1
    expected = len(orders) / 3
    return ((seen - expected) ** 2 / expected).sum()


def test_every_clip_is_as_likely_to_come_at_any_time():
    """30 clips in 300 epochs: 58 degrees of freedom times 30/29, as the thirds are of one size.

    So the mean is 60 and the deviation 11.1.
    """
    assert 60 - 4 * 11.1 < unevenness(orders_of(30, epochs=300)) < 60 + 5 * 11.1
    assert unevenness(shuffled_in_blocks(30, epochs=300, block=10)) == 18_000


def met_neighbours(orders, *, batch_size):
    """How many clips an epoch, on average, are in one batch with the next one on the disk."""
    met = []
    for order in orders:
        batch_of = np.empty(len(order), int)
        batch_of[order] = np.arange(len(order)) // batch_size
        met.append((batch_of[1:] == batch_of[:-1]).sum())
    return np.mean(met)


def test_neighbours_on_the_disk_come_apart():
    """They meet as often as any two: with batches of 64, 63 an epoch, give or take 8."""
    found = met_neighbours(orders_of(4096, epochs=20), batch_size=64)
    assert abs(found - 63) < 5 * 8 / 20**0.5
    blocks = shuffled_in_blocks(4096, epochs=20, block=512)
    assert met_neighbours(blocks, batch_size=64) > 400


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        CachedBatches(FakeCache(1000), batch_size=1, seed=seed).order(epoch)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for place, one in enumerate(orders):
        for other in orders[:place]:
            assert (one == other).sum() < 8, "one is expected"


def test_a_remote_cache_gives_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours, _, folder = make(tmp_path)
    remote = open_folder(f"memory://{uuid.uuid4()}/cache")
    for path in folder.iterdir():
        remote.write(path.name, path.read_bytes())
    batches = CachedBatches(Cache.open(remote, ours), batch_size=5, seed=3)
    assert batches.num_threads == 32
    expected = CachedBatches(Cache.open(folder, ours), batch_size=5, seed=3)
    for epoch in (0, 1):
        for batch, right in zip(batches.epoch(epoch), expected.epoch(epoch), strict=True):
            assert batch.keys() == right.keys()
            for name in ("clip_id", "view", "tokens", "codes"):
                torch.testing.assert_close(batch[name], right[name], rtol=0, atol=0)


def test_a_damaged_record_of_a_remote_cache_is_named(tmp_path):
    ours, _, folder = make(tmp_path)
    remote = open_folder(f"memory://{uuid.uuid4()}/cache")
    for path in folder.iterdir():
        remote.write(path.name, path.read_bytes())
    cache = Cache.open(remote, ours)
    row = int(cache.rows[7, 0])
    name = cache.index.shards[cache.index.shard[row]]
    sound = remote.read(name)
    place = int(cache.index.starts[row]) + 9
    for content in (sound[:place] + b"?" + sound[place + 1 :], sound[:place]):
        remote.write(name, content)
        message = f"{remote.at(name)}: the record of clip {cache.clip_ids[7]} in view 0 is damaged"
        with pytest.raises(StateError, match=re.escape(message)):
            cache.read(row)


def test_descriptors_are_kept_open_but_not_all(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_shards, "OPEN_FILES", 3)
    ours, _, folder = make(tmp_path)
    cache = Cache.open(folder, ours)
    before = len(os.listdir("/proc/self/fd"))
    assert len(cache.index.shards) > 7
    with ShardReader(cache.folder) as shards:
        for row in range(len(cache.index)):
            fields = {field.name: np.empty(field.shape, field.dtype) for field in FIELDS}
            parts = [memoryview(array.reshape(-1).view(np.uint8)) for array in fields.values()]
            cache.read_into(shards, row, parts)
            np.testing.assert_array_equal(
                fields["codes"],
                values(int(cache.index.clip_ids[row]), int(cache.index.views[row]))["codes"],
            )
            assert len(os.listdir("/proc/self/fd")) <= before + 3
        assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before
