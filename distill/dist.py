"""Which part of a job a process does when several do it together, and words between them.

What can be divided beforehand takes `read_part` and needs no words. For what is merged in the
end, `joined` makes the processes of a torchrun known to each other. Tasks of SLURM's `srun` are
such processes too.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from distill.errors import InputError, StateError
from distill.slurm import has_gpu_of_its_own, torchrun_variables

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Work

SequenceT = TypeVar("SequenceT", bound=Sequence)

FIRST_PAUSE_SECONDS = 2e-5
POLL_SECONDS = 0.05
PATIENCE = timedelta(days=7)  # for the slowest process; one that ends is noticed at once
GRACE_SECONDS = 10.0  # for torchrun to stop the others of one that has failed
EXIT_LOST = 1


@dataclass(frozen=True)
class Part:
    """Part `index`, from 0, of `count` that together do the whole."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.count}"

    def name(self, file: str) -> str:
        """A file's name for this part: the first one's as it is, the others with their number."""
        stem, suffix = file.split(".", 1)
        return f"{stem}-{self.index}.{suffix}" if self.index else file

    def share(self, items: SequenceT) -> tuple[SequenceT, bool]:
        """This part's run of neighbours, and False; the first item, and True, where none is left.

        Shares of all parts, one behind the other, are the items; none differ by more than one.
        """
        first, last = (len(items) * index // self.count for index in (self.index, self.index + 1))
        return (items[first:last], False) if first < last else (items[:1], True)


WHOLE = Part()


def adopt_slurm() -> None:
    """Take a step that `srun` started for what it would be under torchrun, to all that follows."""
    os.environ.update(torchrun_variables(os.environ))


def read_part(shard: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that `--shard i/n` (from 1) and torchrun's RANK and WORLD_SIZE leave a process.

    With both, every shard is divided again among the processes of its torchrun. Raises
    InputError for a shard that is none.
    """
    index, count = 0, 1
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(
                f"--shard {shard}: expected i/n, the i-th of n parts, from 1/n to n/n; as in 2/4"
            )
        index, count = int(match[1]) - 1, int(match[2])
    ranks = num_ranks(environment)
    return Part(index * ranks + _number(environment, "RANK", default=0), count * ranks)


def num_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started for this command, one without it."""
    return _number(environment, "WORLD_SIZE", default=1)


def speaker(environment: Mapping[str, str] = os.environ) -> str:
    """`rank 3: `, to begin a message with, where torchrun has started several processes."""
    is_one = environment.get("WORLD_SIZE", "1") == "1"
    return "" if is_one else f"rank {environment.get('RANK')}: "


def use_own_gpu(environment: Mapping[str, str] = os.environ) -> None:
    """Make "cuda" mean the GPU that torchrun's LOCAL_RANK leaves this process; nothing on a CPU.

    Raises InputError where there are fewer GPUs than processes.
    """
    import torch  # not at the top: a command line reads its part before it knows what it needs

    rank, count = _number(environment, "LOCAL_RANK", default=0), torch.cuda.device_count()
    if not count:
        return
    if count == 1 and has_gpu_of_its_own(environment):
        rank = 0
    if rank >= count:
        raise InputError(
            f"LOCAL_RANK={rank}: this machine has {count} GPUs; give torchrun "
            f"--nproc-per-node {count}, or srun --ntasks-per-node {count}"
        )
    torch.cuda.set_device(rank)


@contextmanager
def joined() -> Iterator[Part]:
    """Let the processes of a torchrun hear of each other in the block (on any machine).

    Gives each its part; alone a process is the whole, and nothing happens.
    """
    part = read_part(None)
    if part == WHOLE:
        yield part
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    from distill.rendezvous import attempt_store

    has_gpu = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    distributed.init_process_group(
        backend,
        store=attempt_store(store, rank=rank, count=count),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    try:
        yield part
    finally:
        distributed.destroy_process_group()


def joined_part() -> Part:
    """This process's part among those that have joined, the whole where none have."""
    if "torch" not in sys.modules:  # which takes a second to import
        return WHOLE
    from torch import distributed

    if not distributed.is_initialized():
        return WHOLE
    return Part(distributed.get_rank(), distributed.get_world_size())


def gather(data: bytes) -> list[bytes]:
    """Every process's bytes at the first one, in order of rank; nothing at the others.

    Waits for the slowest. Raises StateError if another process is gone.
    """
    import torch
    from torch import distributed

    rank, count = distributed.get_rank(), distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    _finish(distributed.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
    found = [data]
    with _named_loss():
        if rank:
            distributed.send(_as_tensor(data), dst=0)
            return []
        for source, size in enumerate(sizes[1:], 1):
            buffer = torch.empty(int(size), dtype=torch.uint8)
            distributed.recv(buffer, src=source)
            found.append(buffer.numpy().tobytes())
    return found


def broadcast(data: bytes) -> bytes:
    """The first process's bytes, at every one. Raises StateError if another process is gone."""
    import torch
    from torch import distributed

    size = torch.tensor([len(data)])
    _finish(distributed.broadcast(size, src=0, async_op=True))
    is_first = distributed.get_rank() == 0
    buffer = _as_tensor(data) if is_first else torch.empty(int(size), dtype=torch.uint8)
    _finish(distributed.broadcast(buffer, src=0, async_op=True))
    return buffer.numpy().tobytes()


def exchange(*numbers: int) -> list[tuple[int, ...]]:
    """Every joined process's whole numbers, in the order of ranks; as many from each.

    Between the hosts: a GPU's work goes on meanwhile. Raises StateError if another process is gone.
    """
    if joined_part() == WHOLE:
        return [numbers]
    import torch
    from torch import distributed

    told = torch.empty(joined_part().count, len(numbers), dtype=torch.int64)
    own = torch.tensor(numbers, dtype=torch.int64)
    _finish(distributed.all_gather_into_tensor(told.view(-1), own, async_op=True))
    return [tuple(row) for row in told.tolist()]


def everyones(numbers: Sequence[int]) -> list[int]:
    """Whole numbers of all joined processes, one's behind the other's; any number from each."""
    counts = [count for (count,) in exchange(len(numbers))]
    if len(counts) == 1:
        return list(numbers)
    padded = exchange(*numbers, *[0] * (max(counts) - len(numbers)))
    return [number for row, count in zip(padded, counts, strict=True) for number in row[:count]]


def wait_for_all() -> None:
    """Go on when every joined process has come here."""
    exchange(0)


def _as_tensor(data: bytes) -> "Tensor":
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _finish(work: "Work") -> None:
    """Wait without being deaf to signals, by which torchrun stops those whose sibling failed.

    For collectives: gloo's sends and receives tell only to a blocking wait that they are done.
    """
    pause = FIRST_PAUSE_SECONDS
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    with _named_loss():
        work.wait()


@contextmanager
def _named_loss() -> Iterator[None]:
    """A connection that breaks as a StateError."""
    try:
        yield
    except RuntimeError as error:
        _await_end()
        raise StateError(
            f"another process of this job is gone, see its own message ({error})"
        ) from None


def _await_end() -> None:
    """Give torchrun the time to end this process too, without a message and at once.

    With an exit code of its own: the one of SIGTERM otherwise stands for a job that was saved.
    """

    def leave(*_: object) -> NoReturn:
        raise SystemExit(EXIT_LOST)

    is_main = threading.current_thread() is threading.main_thread()  # others set no handlers
    before = signal.signal(signal.SIGTERM, leave) if is_main else None
    try:
        time.sleep(GRACE_SECONDS)
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _number(environment: Mapping[str, str], name: str, *, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text}: expected a number, as torchrun sets it; unset it")
    return int(text)
