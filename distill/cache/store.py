"""Where a cache lies: a local folder, or one in any store that fsspec speaks to.

A folder holds files and no folders. Every file appears whole or not at all: a local one is
written under a temporary name, synced and renamed; an object store shows an upload only when it
is complete. Nothing here retries, locks or keeps a listing.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from distill.errors import InputError, StateError

MADE_BY = "distill cache-teacher"  # what makes a view cache
EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol: the extra that installs what it needs
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class LocalFolder:
    """A folder of this machine or of a file system that it has mounted; `path` is where."""

    is_local = True

    def __init__(self, path: str | Path, *, made_by: str = MADE_BY) -> None:
        self.path = Path(path)
        self.url, self.made_by = str(path), made_by

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        """A file's name with the folder before it, for messages."""
        return str(self._path(name))

    def exists(self) -> bool:
        return self.path.is_dir()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each file whose name begins so, sorted by name; none where no folder is."""
        found = {}
        with reported(self.url, "listed"):
            try:
                with os.scandir(self.path) as entries:
                    for entry in entries:
                        if entry.name.startswith(prefix):
                            with contextlib.suppress(FileNotFoundError):  # gone since
                                status = entry.stat()
                                if stat.S_ISREG(status.st_mode):
                                    found[entry.name] = status.st_size
            except FileNotFoundError:
                return {}
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        with reported(self.at(name), "read"):
            return self._path(name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Bytes of a file from `start` on, fewer than `size` only at its end."""
        with reported(self.at(name), "read"), self._path(name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def map(self, name: str) -> memoryview:
        """A whole file that is not empty, in memory that the system may take back any time."""
        with reported(self.at(name), "read"), self._path(name).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file."""
        with reported(self.at(name), "written"), self._draft(content) as draft:
            os.replace(draft, self._path(name))
            sync_folder(self.path)

    def create(self, name: str, content: bytes) -> bool:
        """Make a file that is not there yet; False, and nothing done, where it is."""
        with reported(self.at(name), "written"), self._draft(content) as draft:
            try:
                os.link(draft, self._path(name))  # unlike a rename, it replaces no file
            except FileExistsError:
                return False
            sync_folder(self.path)
        return True

    def commit(self, path: Path, name: str) -> None:
        """Give a finished file of `scratch` its name, durably; it is gone from where it was."""
        with reported(self.at(name), "written"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(path, self._path(name))
            sync_folder(self.path)

    def scratch(self) -> Path:
        """A local folder, made where it is missing, for files that are still being written."""
        with reported(self.url, "made"):
            self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def delete(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        with reported(self.at(name), "deleted"):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.path / _checked(name)

    @contextlib.contextmanager
    def _draft(self, content: bytes) -> Iterator[Path]:
        path = self.scratch() / temporary_name()
        try:
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


class RemoteFolder:
    """A folder of an object store, or of anything else that fsspec has a protocol for."""

    is_local = False

    def __init__(self, url: str, *, made_by: str = MADE_BY) -> None:
        self.url, self.made_by = url.rstrip("/"), made_by
        with reported(self.url, "opened"):
            self._files, self._root = fsspec.url_to_fs(self.url)

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        return f"{self.url}/{_checked(name)}"

    def exists(self) -> bool:
        with reported(self.url, "listed"):
            self._files.invalidate_cache()
            return self._files.exists(self._root)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with reported(self.url, "listed"):
            self._files.invalidate_cache()  # others write here too
            try:
                entries = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        found = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"]
            for entry in entries
            if entry["type"] == "file" and entry["name"] != self._root
        }
        return dict(sorted(item for item in found.items() if item[0].startswith(prefix)))

    def read(self, name: str) -> bytes:
        with reported(self.at(name), "read"):
            return self._files.cat_file(self._path(name))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        if not size:
            return b""
        with reported(self.at(name), "read"):
            return self._files.cat_file(self._path(name), start=start, end=start + size)

    def map(self, name: str) -> memoryview:
        return memoryview(self.read(name))

    def write(self, name: str, content: bytes) -> None:
        with reported(self.at(name), "written"):
            self._files.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        with reported(self.at(name), "written"):
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def commit(self, path: Path, name: str) -> None:
        with reported(self.at(name), "written"):
            self._files.put_file(str(path), self._path(name))
            self._files.invalidate_cache()
            found, size = self._files.info(self._path(name))["size"], path.stat().st_size
            if found != size:
                raise OSError(f"{found} of {size} bytes arrived")
            path.unlink()

    def scratch(self) -> Path:
        place = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"distill-{os.getuid()}-{place}"
        with reported(str(path), "made"):
            path.mkdir(mode=0o700, exist_ok=True)
            if path.stat().st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it is another user's")
        return path

    def delete(self, name: str) -> None:
        with reported(self.at(name), "deleted"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{_checked(name)}"


Folder = LocalFolder | RemoteFolder


def open_folder(url: str | Path | Folder, *, made_by: str = MADE_BY) -> Folder:
    """A cache's folder by its path or URL, such as s3://bucket/caches/k400; it need not exist.

    `made_by` is the command that makes what is missing there, for messages.
    Raises InputError for a protocol that is not known or not installed.
    """
    if isinstance(url, Folder):
        return url
    if is_url(url):
        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            path = Path(urlsplit(url).netloc + urlsplit(url).path)
            return LocalFolder(path, made_by=made_by)
        try:
            return RemoteFolder(url, made_by=made_by)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            install = f"pip install 'distill-video[{extra}]'" if extra else f"{error}"
            raise InputError(f"{url}: {protocol}:// needs another package: {install}") from error
        except ValueError as error:
            raise InputError(f"{url}: no such protocol as {protocol}://") from error
    return LocalFolder(Path(url).expanduser(), made_by=made_by)


def is_url(path: str | Path) -> bool:
    """Whether this names a place by its protocol, and not a path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path) is not None


def remove_leftovers(folder: Folder) -> int:
    """Delete the open files of writers of this machine that are gone; returns how many."""
    removed = 0
    for path in folder.scratch().glob("open-*"):
        host, writer = _writer_of(path.name)
        if host != machine_name() or writer is None:
            continue
        if writer == os.getpid() or not _is_running(writer):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def temporary_name() -> str:
    """The name of a file that this process has open; see `remove_leftovers`."""
    return f"open-{unique_name()}"


def unique_name() -> str:
    """Machine, process and chance: no other file anywhere is called this."""
    return f"{machine_name()}-{os.getpid()}-{os.urandom(6).hex()}"


def machine_name() -> str:
    """The host and, since containers may share its name, whose numbers its processes have."""
    with contextlib.suppress(OSError):
        number = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
        return f"{socket.gethostname()}-{number}"
    return socket.gethostname()


def sync_folder(path: Path) -> None:
    """Make renames in a local folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def reported(where: str, verb: str) -> Iterator[None]:
    """Turn what a store says within the block into a StateError of one line."""
    try:
        yield
    except _store_errors() as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())
        number = getattr(error, "errno", None)
        if number in _FULL:
            advice = "make room and start again; what is committed stays"
        elif number in _FORBIDDEN or isinstance(error, PermissionError):
            advice = "check the permissions of the folder and who you are there"
        elif isinstance(error, FileNotFoundError):
            advice = "check that the folder or bucket is there"
            if verb == "read":
                advice += "; run 'distill cache-teacher' again if the file is lost"
        else:
            advice = "check the disk or the connection and start again; what is committed stays"
        raise StateError(f"{where}: cannot be {verb} ({reason}); {advice}") from error


def _store_errors() -> tuple[type[Exception], ...]:
    """What stores raise; s3fs lets some errors of its own client through."""
    errors: tuple[type[Exception], ...] = (OSError,)
    if "botocore.exceptions" in sys.modules:
        from botocore.exceptions import BotoCoreError, ClientError

        errors += (BotoCoreError, ClientError)
    return errors


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: not the plain name of a file in a cache")
    return name


def _writer_of(name: str) -> tuple[str, int | None]:
    """Machine and process in a temporary name; machines have hyphens in their names too."""
    match = re.fullmatch(r"open-(.*)-(\d+)-[0-9a-f]+", name)
    return (match[1], int(match[2])) if match else ("", None)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
