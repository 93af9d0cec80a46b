import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from distill.cache.identity import require_identity
from distill.cache.index import load_index
from distill.cache.read import Cache
from distill.cache.shards import Field, ShardWriter, read_shard_index
from distill.cache.store import open_folder, remove_leftovers
from distill.errors import StateError

FIELDS = (
    Field("tokens", "int16", (5,)),
    Field("codes", "float16", (2, 6, 7)),
    Field("attention", "float32", (9,)),
)
IDENTITY = {"objective.mask.ratio": 0.8, "data.views.frames": 8}


def values(clip_id, view):
    stream = np.random.default_rng([clip_id % 2**64, view])
    return {
        "tokens": stream.integers(0, 2048, 5).astype(np.int16),
        "codes": stream.standard_normal((2, 6, 7)).astype(np.float16),
        "attention": stream.random(9).astype(np.float32),
    }


def info(clip_id, view):
    return {"name": f"a/{clip_id} ü.mp4", "view": view, "pts_seconds": [0.1, 1 / 3]}


def shard_paths(folder):
    return sorted(folder.glob("shard-*"))


def num_records(path):
    return len(read_shard_index(open_folder(path.parent), path.name).clip_ids)


def write(folder, keys, **settings):
    settings = {"shard_bytes": 2**30, "shard_seconds": 3600.0, **settings}
    with ShardWriter(open_folder(folder), fields=FIELDS, identity=IDENTITY, **settings) as writer:
        for clip_id, view in keys:
            writer.add(clip_id, view, values(clip_id, view), info(clip_id, view))
            writer.commit_if_full()
    return writer


def read(folder, index, row):
    none = np.empty((0, 1), np.int64)
    return Cache(open_folder(folder), index, none, clip_ids=none[:, 0]).read(row)


def test_records_come_back_as_they_were_written(tmp_path):
    keys = [(7, 0), (-(2**62), 0), (3, 1), (7, 1)]
    write(tmp_path, keys)
    index = load_index(open_folder(tmp_path), IDENTITY)
    assert list(zip(index.clip_ids, index.views, strict=True)) == [
        (-(2**62), 0),
        (7, 0),
        (3, 1),
        (7, 1),
    ]
    for row, (clip_id, view) in enumerate(zip(index.clip_ids, index.views, strict=True)):
        arrays, found = read(tmp_path, index, row)
        for name, value in values(int(clip_id), int(view)).items():
            np.testing.assert_array_equal(arrays[name], value)
        assert found == info(int(clip_id), int(view))


def test_a_shard_is_a_safetensors_file_that_describes_itself(tmp_path):
    write(tmp_path, [(7, 0), (8, 0)])
    (path,) = shard_paths(tmp_path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: str(value.dtype) for name, value in tensors.items()} == {
        "records": "uint8",
        "offsets": "int64",
        "clip_ids": "int64",
        "views": "int64",
        "xxh3": "uint64",
    }
    assert json.loads(metadata["identity"]) == IDENTITY
    assert json.loads(metadata["fields"])[1] == ["codes", "float16", [2, 6, 7]]
    first, second, end = tensors["offsets"]
    record = tensors["records"][second:end].tobytes()
    assert record.startswith(b"".join(value.tobytes() for value in values(8, 0).values()))
    assert xxhash.xxh3_64_intdigest(record) == tensors["xxh3"][1]
    assert (first, second % 64, end) == (0, 0, len(tensors["records"]))


def test_find_tells_rows_and_missing_records(tmp_path):
    write(tmp_path, [(5, 0), (9, 0), (5, 2)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    clips = np.array([9, 4, 5, 10])
    assert index.find(clips, 0).tolist() == [1, -1, 0, -1]
    assert index.find(clips, 1).tolist() == [-1, -1, -1, -1]
    assert index.find(clips, 2).tolist() == [-1, -1, 2, -1]
    assert load_index(open_folder(tmp_path / "none"), IDENTITY).find(clips, 0).tolist() == [-1] * 4


def test_shards_close_when_full(tmp_path):
    writer = write(tmp_path, [(clip, 0) for clip in range(10)], shard_bytes=700)
    sizes = [num_records(path) for path in shard_paths(tmp_path)]
    record_bytes = int(load_index(open_folder(tmp_path), IDENTITY).sizes[0])
    assert record_bytes == 320
    assert sorted(sizes) == [1, 3, 3, 3]
    assert writer.committed_shards == 4
    assert writer.committed_bytes == sum(path.stat().st_size for path in shard_paths(tmp_path))


def test_shards_close_when_old(tmp_path):
    write(tmp_path, [(clip, 0) for clip in range(3)], shard_seconds=0.0)
    assert len(shard_paths(tmp_path)) == 3


def test_of_records_that_are_there_twice_one_counts(tmp_path):
    write(tmp_path, [(1, 0), (2, 0)])
    write(tmp_path, [(2, 0), (3, 0)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    assert len(shard_paths(tmp_path)) == 2
    assert index.clip_ids.tolist() == [1, 2, 3]


def test_an_error_keeps_the_whole_records_before_it(tmp_path):
    settings = {"fields": FIELDS, "identity": IDENTITY, "shard_bytes": 1, "shard_seconds": 1.0}
    with pytest.raises(StateError), ShardWriter(open_folder(tmp_path), **settings) as writer:
        writer.add(1, 0, values(1, 0), {})
        raise StateError("the teacher went away")
    assert load_index(open_folder(tmp_path), IDENTITY).clip_ids.tolist() == [1]


def test_a_full_disk_drops_the_open_shard_and_keeps_the_others(tmp_path):
    """The real error: a limit on the size of files, in a process of its own."""
    script = tmp_path / "writer.py"
    functions = inspect.getsource(values) + inspect.getsource(info)
    script.write_text(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        + WRITER.format(fields=FIELDS, identity=IDENTITY, functions=functions, size=10**9)
    )
    folder = tmp_path / "cache"
    write(folder, [(10**12, 0)])
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.stdout.startswith("x" * 10)
    (line,) = [line for line in done.stderr.splitlines() if line[:7] == "distill"]
    assert line == (
        f"distill.errors.StateError: cache {folder}: a shard: cannot be written (File too large); "
        "check the disk or the connection and start again; what is committed stays"
    )
    assert load_index(open_folder(folder), IDENTITY).clip_ids.tolist() == [10**12]
    assert not list(folder.glob("open-*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_shard_for_which_there_is_no_room_is_one_line(tmp_path, monkeypatch, number):
    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    message = f"cannot be written ({os.strerror(number)}); make room and start again; what is comm"
    with pytest.raises(StateError, match=re.escape(message)):
        write(tmp_path, [(1, 0)])
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    def fail(path, *args, **settings):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.open", fail)
    message = (
        f"cache {tmp_path}: a shard: cannot be written (Read-only file system); check the "
        "permissions of the folder and who you are there"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        write(tmp_path, [(1, 0)])


@pytest.mark.parametrize("whole_parts", range(4))
def test_a_signal_in_the_middle_of_a_record_leaves_the_whole_ones(
    tmp_path, monkeypatch, whole_parts
):
    """Ctrl-C after so many parts of the second record are in the file."""
    digest, seen = xxhash.xxh3_64, []

    class Checksum:
        def __init__(self):
            self.state = digest()
            self.intdigest = self.state.intdigest

        def update(self, part):  # is called before each part is written
            if len(seen) == len(FIELDS) + 1 + whole_parts:
                raise KeyboardInterrupt
            seen.append(part)
            self.state.update(part)

    settings = {"fields": FIELDS, "identity": IDENTITY, "shard_bytes": 9999, "shard_seconds": 99.0}
    with pytest.raises(KeyboardInterrupt), ShardWriter(open_folder(tmp_path), **settings) as writer:
        monkeypatch.setattr(xxhash, "xxh3_64", Checksum)
        try:
            for clip in (1, 2):
                writer.add(clip, 0, values(clip, 0), info(clip, 0))
                writer.commit_if_full()
        finally:
            monkeypatch.undo()
    index = load_index(open_folder(tmp_path), IDENTITY)
    assert index.clip_ids.tolist() == [1]
    assert read(tmp_path, index, 0)[1] == info(1, 0)


def test_a_signal_in_the_middle_of_a_batch_leaves_the_whole_batches(tmp_path):
    settings = {"fields": FIELDS, "identity": IDENTITY, "shard_bytes": 9999, "shard_seconds": 99.0}
    with pytest.raises(SystemExit), ShardWriter(open_folder(tmp_path), **settings) as writer:
        for clip in range(4):
            writer.add(clip, 0, values(clip, 0), info(clip, 0))
            if clip == 1:
                writer.commit_if_full()
        raise SystemExit(143)
    assert load_index(open_folder(tmp_path), IDENTITY).clip_ids.tolist() == [0, 1]


def test_fields_of_another_shape_are_refused(tmp_path):
    settings = {"fields": FIELDS, "identity": IDENTITY, "shard_bytes": 1, "shard_seconds": 1.0}
    wrong = {**values(1, 0), "tokens": np.zeros(6, np.int16)}
    message = r"field tokens: expected int16 \[5\], got int16 \[6\]"
    with (
        pytest.raises(ValueError, match=message),
        ShardWriter(open_folder(tmp_path), **settings) as writer,
    ):
        writer.add(1, 0, wrong, {})
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
import numpy as np
from distill.cache.shards import Field, ShardWriter
from distill.cache.store import open_folder

FIELDS = {fields}
{functions}
writer = ShardWriter(
    open_folder(sys.argv[1]),
    fields=FIELDS,
    identity={identity},
    shard_bytes={size},
    shard_seconds=99.0,
)
for clip in range(10**9):
    writer.add(clip, 0, values(clip, 0), info(clip, 0))
    writer.commit_if_full()
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def test_a_killed_writer_leaves_whole_shards_and_one_leftover(tmp_path):
    """Real processes, killed after numbers of records that hit shards at every stage."""
    script, folder = tmp_path / "writer.py", tmp_path / "cache"
    functions = inspect.getsource(values) + inspect.getsource(info)
    script.write_text(
        WRITER.format(fields=FIELDS, identity=IDENTITY, functions=functions, size=2000)
    )
    for kill_after in (1, 5, 6, 7, 8, 12, 13, 14, 31, 100):
        round_folder = folder / str(kill_after)
        round_folder.mkdir(parents=True)
        process = subprocess.Popen([sys.executable, script, round_folder], stdout=subprocess.PIPE)
        written = len(process.stdout.read(kill_after))
        process.send_signal(signal.SIGKILL)
        written += len(process.stdout.read())
        process.wait()
        process.stdout.close()

        index = load_index(open_folder(round_folder), IDENTITY)
        assert index.clip_ids.tolist() == list(range(len(index)))
        assert 0 <= written + 1 - len(index) <= 8, "at most the open shard is lost"
        for row in range(len(index)):
            arrays, found = read(round_folder, index, row)
            np.testing.assert_array_equal(arrays["codes"], values(row, 0)["codes"])
            assert found == info(row, 0)
        leftovers = [path for path in round_folder.iterdir() if path.name.startswith("open-")]
        assert len(leftovers) <= 1
        assert remove_leftovers(open_folder(round_folder)) == len(leftovers)
        assert len(list(round_folder.iterdir())) == len(index.shards) + bool(index.shards)


@pytest.mark.parametrize("has_manifest", [False, True])
def test_a_flipped_byte_anywhere_is_never_read_as_right(tmp_path, monkeypatch, has_manifest):
    """With a manifest a shard's own index is not read again: what is not noticed does no harm."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand times takes long
    write(tmp_path, [(1, 0), (2, 0)])
    (path,) = shard_paths(tmp_path)
    index = load_index(open_folder(tmp_path), IDENTITY)
    sound = path.read_bytes()
    first, last = int(index.starts[0]), int(index.starts[-1] + index.sizes[-1])
    silent = []
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        if not has_manifest:
            (tmp_path / "manifest.safetensors").unlink(missing_ok=True)
        try:
            index = load_index(open_folder(tmp_path), IDENTITY)
            for row, clip in enumerate((1, 2)):
                arrays, found = read(tmp_path, index, row)
                assert found == info(clip, 0)
                for name, value in values(clip, 0).items():
                    np.testing.assert_array_equal(arrays[name], value)
            silent.append(place)
        except StateError as error:
            assert str(path) in str(error) or "cache" in str(error)
            assert "\n" not in str(error)
    outside = [place for place in range(len(sound)) if not first <= place < last]
    assert silent == (outside if has_manifest else [])


def test_a_truncated_shard_is_refused_in_one_line(tmp_path):
    write(tmp_path, [(1, 0), (2, 0)])
    (path,) = shard_paths(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    message = (
        f"{path}: damaged shard (a file of another length); delete it and run "
        "'distill cache-teacher' again to make its records anew"
    )
    with pytest.raises(StateError, match=re.escape(message)):
        load_index(open_folder(tmp_path), IDENTITY)
    os.truncate(path, 3)
    with pytest.raises(StateError, match="damaged shard"):
        load_index(open_folder(tmp_path), IDENTITY)


def test_a_damaged_record_is_named(tmp_path):
    write(tmp_path, [(1, 0), (2, 3)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    row = int(index.find(np.array([2]), 3)[0])
    (path,) = shard_paths(tmp_path)
    with open(path, "r+b") as file:
        file.seek(int(index.starts[row]) + 20)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    read(tmp_path, index, 1 - row)
    message = (
        f"{path}: the record of clip 2 in view 3 is damaged (its checksum differs); delete the "
        "shard and run 'distill cache-teacher' again to make its records anew"
    )
    with pytest.raises(StateError, match=re.escape(message)):
        read(tmp_path, index, row)


def test_a_lost_shard_is_one_line(tmp_path):
    write(tmp_path, [(1, 0)])
    index = load_index(open_folder(tmp_path), IDENTITY)
    (tmp_path / index.shards[0]).unlink()
    message = (
        f"{tmp_path / index.shards[0]}: cannot be read (No such file or directory); check that the "
        "folder or bucket is there; run 'distill cache-teacher' again if the file is lost"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        read(tmp_path, index, 0)


def test_another_identity_is_refused_by_field_both_values_and_what_to_do(tmp_path):
    write(tmp_path, [(1, 0)])
    message = (
        f"cache {tmp_path}: holds data.views.frames 8, the recipe asks for 16; set "
        "data.views.frames=8, or set objective.cache.folder to a new folder and run "
        "'distill cache-teacher'"
    )
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        load_index(open_folder(tmp_path), {**IDENTITY, "data.views.frames": 16})


def test_a_field_that_only_one_side_knows_is_a_difference():
    require_identity({"a": 1, "b": None}, {"a": 1, "b": None}, where="cache c")
    with pytest.raises(StateError, match="cache c: holds b 2, the recipe asks for none; set obj"):
        require_identity({"a": 1, "b": 2}, {"a": 1}, where="cache c")
    with pytest.raises(StateError, match="cache c: holds b none, the recipe asks for 2"):
        require_identity({"a": 1}, {"a": 1, "b": 2}, where="cache c")
