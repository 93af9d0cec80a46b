"""Which part of a job a process does when several do it together, with no word between them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distill.errors import InputError


@dataclass(frozen=True)
class Part:
    """Part `index`, from 0, of `count` that together do the whole."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.count}"


WHOLE = Part()


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


def use_own_gpu(environment: Mapping[str, str] = os.environ) -> None:
    """Make "cuda" mean the GPU that torchrun's LOCAL_RANK leaves this process; nothing on a CPU.

    Raises InputError where there are fewer GPUs than processes.
    """
    import torch  # not at the top: a command line reads its part before it knows what it needs

    rank, count = _number(environment, "LOCAL_RANK", default=0), torch.cuda.device_count()
    if not count:
        return
    if rank >= count:
        raise InputError(
            f"LOCAL_RANK={rank}: this machine has {count} GPUs; give torchrun "
            f"--nproc-per-node {count}"
        )
    torch.cuda.set_device(rank)


def _number(environment: Mapping[str, str], name: str, *, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text}: expected a number, as torchrun sets it; unset it")
    return int(text)
