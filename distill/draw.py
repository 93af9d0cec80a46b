"""Randomness as a pure function of names: the same keys give the same draws in any process.

Nothing here has a state, so neither the number of workers or ranks nor what was drawn before
can change a result.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """Hash names and numbers to a signed 64-bit key (BLAKE2b)."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator that depends on `parts` alone."""
    return np.random.Generator(np.random.PCG64(key(*parts) & (2**64 - 1)))


def uniform(clip_ids: "Tensor", *parts: int | str, count: int) -> "Tensor":
    """Float32 draws [B,count] in [0,1), a function of each clip's int64 id and of `parts`.

    Counter-based splitmix64 in wrapping int64 arithmetic, hence equal on every device.
    """
    import torch  # not at the top: loader workers use `generator` and do without it

    start = _mix(clip_ids.to(torch.int64) ^ key(*parts))
    counter = torch.arange(1, count + 1, device=clip_ids.device, dtype=torch.int64)
    bits = _mix(start[:, None] + counter * _GOLDEN)
    return _shift(bits, 40).float() * 2.0**-24


def view_ids(clip_ids: "Tensor", repeat: "Tensor") -> "Tensor":
    """Ids int64 [B] for the draws of view `repeat` [B] of each clip: view 0 has the clip's own."""
    return clip_ids ^ _mix(repeat.to(clip_ids.dtype))


def gumbel(clip_ids: "Tensor", *parts: int | str, count: int) -> "Tensor":
    """Standard Gumbel draws [B,count] in float32, keyed as `uniform`."""
    draws = uniform(clip_ids, *parts, count=count).clamp(min=2.0**-25)  # keeps the logs finite
    return -(-draws.log()).log()


def _shift(x: "Tensor", bits: int) -> "Tensor":
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, where int64's own is arithmetic


def _mix(x: "Tensor") -> "Tensor":
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)
