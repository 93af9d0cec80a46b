"""What a machine has and lacks for distill's work, found by trying it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from distill.log import size_text

State = Literal["fine", "note", "broken"]

DISTRIBUTION = "distill-video"
PIP = "pip install"
DISK_MB = 64
SLOW_DISK_MB = 100  # a second; a GPU reads more of records that are megabytes each
LITTLE_SPACE = 10 * 2**30
LITTLE_SHARED = 2**30
NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
FRAMES, SIDE = 16, 64  # of the video that decoders are tried on


@dataclass(frozen=True)
class Finding:
    """What was found, and the command or setting that mends it; only `broken` stops work."""

    name: str
    state: State
    found: str
    mend: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Try everything, one finding after the other; `folder` is where runs or caches will lie.

    Nothing is imported before it is tried: a broken installation is found, not run into.
    """
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        _machine,
        _packages,
        _gpu,
        _decoders,
        lambda: _disk(folder),
        _processes,
    )
    for check in checks:
        yield from check()


def _machine() -> Iterator[Finding]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{platform.system()} {platform.machine()}, {cores} cores, {size_text(memory_bytes)}"
    yield Finding("machine", "fine", text)
    yield Finding("python", "fine", f"{platform.python_version()}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Every package of the installation's own list of what it requires."""
    found, wrong = [], []
    for name, wanted in _requirements():
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            wrong.append((name, wanted))
    if not found and not wrong:
        yield Finding("packages", "note", "distill itself is not installed", f"{PIP} -e .")
        return
    yield Finding("packages", "fine", ", ".join(found))
    for name, wanted in wrong:
        yield Finding(name, "broken", "not installed", f"{PIP} '{wanted}'")
    for name, why in (
        ("decord", "PyAV decodes everything; decord is faster for some files"),
        ("triton", "run.kernels=triton is not to be had"),
        ("deepspeed", "16-bit optimiser states and ZeRO are not to be had"),
    ):
        if name not in [one for one, _ in _requirements()]:
            yield Finding(name, "note", f"has no build for this machine: {why}")


def _requirements() -> list[tuple[str, str]]:
    """Name and requirement of what distill needs here; raises nothing where it is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    here = {"sys_platform": sys.platform, "platform_machine": platform.machine()}
    needed = []
    for line in lines:
        wanted, _, marker = line.partition(";")
        tests = re.findall(r"(\w+) == [\"']([^\"']+)[\"']", marker)
        if all(here.get(key) == value for key, value in tests):  # of extras, none
            needed.append((re.match(r"[\w.-]+", wanted)[0], wanted.strip()))
    return needed


def _gpu() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        text = f"cannot be imported: {error}"
        yield Finding("torch", "broken", text, f"{PIP} --force-reinstall torch")
        return
    made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    built = f"torch {torch.__version__} for {made_for}"
    listed = _nvidia_smi()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        driver = f", driver {listed[0].rpartition(',')[2].strip()}" if listed else ""
        yield Finding("gpu", "fine", f"{', '.join(names)}{driver}; {built}")
        yield _kernels()
    elif listed:
        yield Finding(
            "gpu",
            "broken",
            f"{'; '.join(listed)}: not to be used by {built}",
            "install the torch of the driver's CUDA (https://pytorch.org/get-started), or a newer "
            "driver",
        )
    else:
        yield Finding("gpu", "note", f"none; {built}: everything runs on the CPU")
        yield Finding("kernels", "fine", "torch, as always on a CPU")


def _kernels() -> Finding:
    """What `run.kernels=auto` would take of the first GPU, by the check that a run makes."""
    import torch

    from distill.kernels.jit import triton
    from distill.kernels.self_check import self_check

    if triton is None:
        return Finding("kernels", "note", "torch's: Triton is not installed", f"{PIP} triton")
    try:
        for precision in (torch.float32, torch.bfloat16):
            wrong = self_check(torch.device("cuda"), precision)
            if wrong:
                reasons = "; ".join(f"{kernel} {reason}" for kernel, reason in wrong.items())
                return Finding("kernels", "note", f"torch's: in {precision} {reasons}")
    except RuntimeError as error:
        return Finding("kernels", "broken", str(error), "set run.kernels=torch")
    return Finding("kernels", "fine", "this project's: right in float32 and bfloat16 on the GPU")


def _nvidia_smi() -> list[str]:
    """`name, driver` of every GPU that the driver knows."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _decoders() -> Iterator[Finding]:
    """Decode a video that is written here, frame by frame known, with each decoder."""
    try:
        import av
        import numpy  # noqa: F401
    except ImportError as error:
        yield Finding("pyav", "broken", f"cannot be imported: {error}", f"{PIP} -U av")
        return
    with tempfile.TemporaryDirectory(prefix="distill-doctor-") as folder:
        path = Path(folder) / "ramp.mp4"
        try:
            write_ramp(path)
        except (OSError, ValueError, av.FFmpegError) as error:
            text = f"cannot write a video: {error}"
            yield Finding("pyav", "broken", text, f"{PIP} --force-reinstall av")
            return
        for decoder in ("pyav", "decord"):
            yield _decoder(decoder, path)


def _decoder(decoder: Literal["pyav", "decord"], path: Path) -> Finding:
    import numpy as np

    from distill.data.decode import open_video
    from distill.errors import InputError

    spare: State = "broken" if decoder == "pyav" else "note"
    package = {"pyav": "av"}.get(decoder, decoder)
    mend = f"{PIP} --force-reinstall {package}"
    wanted = [0, FRAMES // 2, FRAMES - 1]
    try:
        started = time.perf_counter()
        with open_video(path, decoder=decoder) as video:
            pixels = video.read(wanted).pixels
            backend = video.backend
        seconds = time.perf_counter() - started
    except (InputError, OSError, RuntimeError, ImportError) as error:
        reason = str(error).replace(f"{path}: ", "")
        return Finding(decoder, spare, f"does not decode: {reason}", mend)
    levels = pixels.mean(axis=(1, 2, 3))
    if np.abs(levels - [ramp_level(frame) for frame in wanted]).max() > 4:
        return Finding(decoder, spare, f"{backend} returns other frames than were asked for", mend)
    return Finding(decoder, "fine", f"{backend}: the right frames, {1000 * seconds:.0f} ms a video")


def ramp_level(frame: int) -> int:
    """The grey of a frame of `write_ramp`'s video."""
    return 40 + 10 * frame


def write_ramp(path: Path) -> None:
    """A video in which each frame's grey is its number's."""
    import av
    import numpy as np

    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(FRAMES):
            grey = np.full((SIDE, SIDE, 3), ramp_level(number), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        output.mux(stream.encode(None))


def _disk(folder: Path) -> Iterator[Finding]:
    """Write, sync and read back some megabytes in the nearest folder that is there."""
    place = folder.expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    try:
        write_mb, read_mb = disk_speed(place)
    except OSError as error:
        mend = "make room, check the permissions, or set run.folder to another place"
        yield Finding("disk", "broken", f"{place}: cannot be written ({error.strerror})", mend)
        return
    text = (
        f"{place}: writes {write_mb:,.0f} MB/s, reads {read_mb:,.0f} MB/s, {size_text(free)} free"
    )
    if free < LITTLE_SPACE:
        mend = "a cache may need more (distill plan RECIPE); set objective.cache.folder to a disk"
        yield Finding("disk", "note", text, mend)
    elif min(write_mb, read_mb) < SLOW_DISK_MB:
        yield Finding("disk", "note", text, "keep caches and videos on a local disk, or SSD")
    else:
        yield Finding("disk", "fine", text)
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        mend = "several GPUs talk through it; in a container: docker run --shm-size=8g"
        little = total < LITTLE_SHARED
        text = size_text(total)
        yield Finding("shared memory", "note" if little else "fine", text, mend if little else "")


def disk_speed(folder: Path, *, size_mb: int = DISK_MB) -> tuple[float, float]:
    """MB/s of writing with a sync at the end, and of reading what memory was told to forget."""
    block = os.urandom(2**20)  # a disk that compresses gets nothing for it
    with tempfile.NamedTemporaryFile(prefix=".distill-doctor-", dir=folder) as file:
        started = time.perf_counter()
        for _ in range(size_mb):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        while file.read(2**20):
            pass
        return size_mb / (written - started), size_mb / (time.perf_counter() - begun)


def _processes() -> Iterator[Finding]:
    """A group of one process by gloo, as torchrun makes of many."""
    try:
        import torch
        from torch import distributed
    except (ImportError, OSError):
        return  # told above

    if not distributed.is_available() or not distributed.is_gloo_available():
        text = f"torch {torch.__version__} has no gloo"
        yield Finding("torchrun", "note", text, "install a torch with torch.distributed")
        return
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        one = torch.ones(1)
        distributed.all_reduce(one)
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        mend = "give this host's name an address in /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
        yield Finding("torchrun", "note", f"gloo does not start: {text}", mend)
        return
    yield Finding("torchrun", "fine", "gloo starts; try: torchrun --nproc-per-node 2 -m distill")
