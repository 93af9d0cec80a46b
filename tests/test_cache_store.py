"""Where a cache lies: every promise for a local folder, one in memory and an S3 server."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from distill.cache.store import (
    LocalFolder,
    RemoteFolder,
    is_url,
    machine_name,
    open_folder,
    remove_leftovers,
    temporary_name,
)
from distill.errors import InputError, StateError

KINDS = ("local", "file", "memory", "s3")


@pytest.fixture(scope="module")
def bucket():
    """A bucket of an S3 server on this machine, set up as the default of s3fs."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    settings = {**account, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="caches")
        yield "s3://caches"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def make_url(kind, tmp_path, request):
    match kind:
        case "local":
            return str(tmp_path / "a" / "cache")
        case "file":
            return f"file://{tmp_path}/a/cache"
        case "memory":
            return f"memory://{uuid.uuid4()}/cache"
        case "s3":
            return f"{request.getfixturevalue('bucket')}/{uuid.uuid4()}/cache"


@pytest.fixture(params=KINDS)
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return open_folder(make_url(request.param, tmp_path, request))


def test_what_is_written_is_read(folder):
    assert not folder.exists()
    assert folder.sizes() == {}
    folder.write("b.bin", b"0123456789")
    folder.write("a.bin", b"")
    assert folder.exists()
    assert list(folder.sizes().items()) == [("a.bin", 0), ("b.bin", 10)]
    assert folder.read("b.bin") == b"0123456789"
    assert folder.read_range("b.bin", 3, 4) == b"3456"
    assert folder.read_range("b.bin", 8, 9) == b"89"
    assert folder.read_range("b.bin", 3, 0) == b""
    folder.write("b.bin", b"other")
    assert folder.read("b.bin") == b"other"
    assert list(folder.sizes("b")) == ["b.bin"]


def test_create_replaces_nothing(folder):
    assert folder.create("means", b"first") is True
    assert folder.create("means", b"second") is False
    assert folder.read("means") == b"first"
    assert list(folder.sizes()) == ["means"]


def test_a_finished_file_is_moved_under_its_name(folder):
    path = folder.scratch() / temporary_name()
    path.write_bytes(b"x" * 70_000)
    folder.commit(path, "shard-1.safetensors")
    assert folder.sizes() == {"shard-1.safetensors": 70_000}
    assert folder.read_range("shard-1.safetensors", 69_998, 5) == b"xx"
    assert list(folder.scratch().iterdir()) == (
        [Path(folder.at("shard-1.safetensors"))] if folder.is_local else []
    )


def test_deleting_twice_is_no_error(folder):
    folder.write("a", b"1")
    folder.delete("a")
    folder.delete("a")
    assert folder.sizes() == {}


def test_folders_below_are_not_listed(folder):
    folder.write("a", b"1")
    open_folder(f"{folder.url}/below").write("b", b"2")
    assert folder.sizes() == {"a": 1}


def test_what_another_process_adds_is_seen_at_once(bucket):
    """By a client of its own: within a process a store knows what it has written."""
    folder, key = open_folder(f"{bucket}/{uuid.uuid4()}"), "shared"
    prefix = folder.url.removeprefix("s3://caches/")
    other = boto3.client("s3", region_name="us-east-1")
    folder.write("a", b"1")
    assert list(folder.sizes()) == ["a"]
    other.put_object(Bucket="caches", Key=f"{prefix}/{key}", Body=b"12")
    assert folder.sizes() == {"a": 1, key: 2}
    other.delete_object(Bucket="caches", Key=f"{prefix}/a")
    assert folder.sizes() == {key: 2}
    assert folder.exists()
    other.delete_object(Bucket="caches", Key=f"{prefix}/{key}")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../a", "a/b", "..", "", ".hidden", "a\0", "/etc/passwd"])
def test_no_name_leads_out_of_the_folder(folder, name):
    for use in (folder.read, folder.delete, lambda name: folder.write(name, b"")):
        with pytest.raises(ValueError, match="not the plain name of a file in a cache"):
            use(name)


def test_a_file_that_is_not_there_is_one_line(folder):
    folder.write("other", b"")
    message = f"{folder.at('none')}: cannot be read ("
    for use in (folder.read, lambda name: folder.read_range(name, 0, 1)):
        with pytest.raises(StateError) as error:
            use("none")
        assert str(error.value).startswith(message)
        assert str(error.value).endswith(
            "check that the folder or bucket is there; run 'distill cache-teacher' again if the "
            "file is lost"
        )
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_writers_that_come_at_once_one_creates(kind, tmp_path, request):
    folder = open_folder(make_url(kind, tmp_path, request))
    start, won = threading.Barrier(8), []

    def create(number):
        start.wait()
        if folder.create("means", b"%d" % number):
            won.append(b"%d" % number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [folder.read("means")]
    assert list(folder.sizes()) == ["means"]


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    folder = open_folder("s3://no-such-bucket/cache")
    assert folder.sizes() == {}
    with pytest.raises(
        StateError, match=r"^s3://no-such-bucket/cache/a: cannot be written \(The sp"
    ):
        folder.write("a", b"1")


def test_a_server_that_is_not_there_is_one_line(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    message = (
        r"^s3://caches/none/a: cannot be read \(Could not connect to the endpoint URL: .*\); c"
    )
    with pytest.raises(StateError, match=message):
        open_folder("s3://caches/none").read("a")
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_upload_that_arrives_cut_short_is_noticed(tmp_path, monkeypatch):
    folder = open_folder(f"memory://{uuid.uuid4()}")
    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(files, "put_file", lambda path, name: files.pipe_file(name, b"0123"))
    with pytest.raises(StateError, match=r"cannot be written \(4 of 10 bytes arrived\)"):
        folder.commit(path, "shard")
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device); make room and start again; what is committed s"),
        (errno.EROFS, "Read-only file system); check the permissions of the folder and who you "),
        (errno.EIO, "Input/output error); check the disk or the connection and start again; wha"),
    ],
)
def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, number, advice
):
    folder = open_folder(tmp_path / "cache")
    folder.write("means", b"old")

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for use in (folder.write, folder.create):
        with pytest.raises(StateError) as error:
            use("means", b"new")
        expected = f"{tmp_path / 'cache' / 'means'}: cannot be written ({advice}"
        assert str(error.value).startswith(expected)
    assert folder.sizes() == {"means": 3}
    assert folder.read("means") == b"old"


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(StateError, match=r"cache: cannot be made \(File exists\); "):
        open_folder(tmp_path / "cache").write("a", b"")
    with pytest.raises(StateError, match=r"cache: cannot be listed \(Not a directory\); "):
        open_folder(tmp_path / "cache").sizes()


def test_places_are_told_by_their_protocol(tmp_path):
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert open_folder(f"file://{tmp_path}/c").path == tmp_path / "c"
    assert open_folder("caches/k400").url == "caches/k400"
    assert open_folder("~/c").path == Path.home() / "c"
    remote = open_folder("memory://a/b/")
    assert isinstance(remote, RemoteFolder)
    assert (remote.url, remote.at("c")) == ("memory://a/b", "memory://a/b/c")
    assert open_folder(remote) is remote
    assert [is_url(text) for text in ("s3://a", "a/b", "/a://b", "C:\\a", Path("s3://a"))] == [
        True,
        False,
        False,
        False,
        False,
    ]


def test_a_protocol_that_is_unknown_or_not_installed_says_what_to_do(monkeypatch):
    with pytest.raises(InputError, match="^nope://x: no such protocol as nope://$"):
        open_folder("nope://x")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    message = "s3://b/c: s3:// needs another package: pip install 'distill-video[s3]'"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_folder("s3://b/c")
    with pytest.raises(InputError, match="gs:// needs another package: Install s3fs to access S3$"):
        open_folder("gs://b/c")


def test_leftovers_of_others_stay(tmp_path):
    machine = machine_name()
    others = [
        tmp_path / f"open-{machine}-{os.getppid()}-1",
        tmp_path / "open-another-machine-1-1",
        tmp_path / f"open-{machine}-2-{2**22 + 1}-1",  # a machine whose name begins like ours
        tmp_path / f"open-{socket.gethostname()}-{2**22 + 1}-1",  # another container's process
        tmp_path / "open-notes.txt",
    ]
    for path in others:
        path.touch()
    assert remove_leftovers(open_folder(tmp_path)) == 0
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_leftovers_of_a_writer_that_is_gone_are_removed(folder):
    code = "from distill.cache.store import temporary_name; print(temporary_name())"
    gone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [gone.stdout.strip(), temporary_name()]
    for name in names:
        (folder.scratch() / name).touch()
    assert remove_leftovers(folder) == 2
    assert list(folder.scratch().iterdir()) == []


def test_scratch_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = open_folder("memory://x")
    mine = folder.scratch()
    assert mine.parent == tmp_path
    assert mine.stat().st_mode & 0o77 == 0
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    mine.rename(tmp_path / re.sub(r"distill-\d+", "distill-12345", mine.name))
    with pytest.raises(StateError, match="cannot be made .it is another user's"):
        folder.scratch()
