"""How a record keeps the teacher's middle layers: the one place that makes codes of them.

    fp16                      the values in half precision
    8bit, 4bit, 3bit, 2bit    codes of that width, and a scale per row in half precision

A coded row x of layer k is kept as the codes q of the rotated r = x - mean_k:

    q   nearest levels of a scalar quantiser for the Gaussian, of R r / |r| * sqrt(E)
    s   |r|^2 / <q, R r> * sqrt(E)
    x^  mean_k + s / sqrt(E) * R^T q

R flips signs and then mixes all channels, so that whatever the row, its entries are close to
Gaussian; the levels are those of least squared error for that (Lloyd, 1982; Max, 1960). The
scale makes <r^, r> equal |r|^2: the loss is linear in the target, hence what hurts is bias and
not noise (RaBitQ's correction; Gao and Long, 2024, arXiv:2405.12497).
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from distill import draw
from distill.kernels.coded_targets import CodedTargets
from distill.kernels.codes import GROUP, decode_codes

BITS = {"8bit": 8, "4bit": 4, "3bit": 3, "2bit": 2}
LARGEST_FACTOR = 128  # of a width's power of two; larger ones are mixed in several steps
ITERATIONS = 500  # of 256 levels the error is within 0.02 % of its limit then, of fewer there


class Codec:
    """Codes of one kind. `means` float32 [K,E] are the layers' means; half precision has none.

    `others` are the codecs of a record's other teachers, by name.
    """

    def __init__(
        self, kind: str, *, means: Tensor | None = None, others: "Mapping[str, Codec] | None" = None
    ) -> None:
        if kind != "fp16" and kind not in BITS:
            raise ValueError(f"unknown codes {kind!r}; choose fp16, {', '.join(BITS)}")
        if (means is None) != (kind == "fp16"):
            raise ValueError(f"codes {kind}: expected {'no' if means is not None else 'the'} means")
        self.kind = kind
        self.bits = BITS.get(kind)
        self.means = means
        self.others = dict(others or {})
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of_layers(self, layers: Sequence[int]) -> "Codec":
        """The codec of these layers of the teacher alone."""
        return Codec(self.kind, means=None if self.means is None else self.means[list(layers)])

    def of_teachers(self, names: Collection[str]) -> "Codec":
        """The codec of the main teacher and, of the others, of these alone."""
        others = {name: codec for name, codec in self.others.items() if name in names}
        return Codec(self.kind, means=self.means, others=others)

    @property
    def means_sha256(self) -> str | None:
        """What tells its means, those of all teachers, from others'."""
        if self.means is None:
            return None
        digest = hashlib.sha256(self.means.contiguous().numpy().tobytes())
        for name, other in sorted(self.others.items()):
            digest.update(f"{name} {other.means_sha256}".encode())
        return digest.hexdigest()

    def encode(self, middle: Tensor) -> dict[str, Tensor]:
        """Fields of a record from float32 rows [...,K,M,E]: `codes`, and `scales` [...,K,M].

        Codes are half [...,K,M,E], or uint8 [...,K,M,row_bytes(kind, E)]. A row that equals its
        layer's mean decodes to the mean.
        """
        if self.means is None:
            return {"codes": middle.half()}
        levels, means = self._on(middle.device)
        self._check_rows(middle)
        width = middle.shape[-1]
        borders = (levels[1:] + levels[:-1]) / 2
        codes, scales = [], []
        for layer, mean in enumerate(means):  # one at a time, or it would take many times the rows
            rotated = rotate(middle[..., layer, :, :] - mean)
            squared = rotated.square().sum(dim=-1)
            unit = torch.where(squared > 0, math.sqrt(width) / squared.sqrt(), 0.0)
            values = torch.bucketize(rotated * unit[..., None], borders, out_int32=True)
            along = (_look_up(levels, values) * rotated).sum(dim=-1)
            scale = torch.where(squared > 0, math.sqrt(width) * squared / along, 0.0)
            codes.append(pack(values.to(torch.uint8), bits=self.bits))
            scales.append(scale.half())
        return {"codes": torch.stack(codes, dim=-3), "scales": torch.stack(scales, dim=-2)}

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Rows [...,K,M,E] of `encode`'s fields: in half precision as kept, else in float32."""
        if self.means is None:
            return codes
        levels, means = self._on(codes.device)
        width = means.shape[-1]
        rows = decode_codes(codes, scales, levels / math.sqrt(width), width=width)
        for layer, mean in enumerate(means):  # one at a time, as in encode
            rows[..., layer, :, :] = rotate_back(rows[..., layer, :, :]) + mean
        return rows

    def targets(self, codes: Tensor, scales: Tensor) -> CodedTargets:
        """What `decode` would make of coded fields [B,K,M,...], for the loss to decode."""
        levels, means = self._on(codes.device)
        width = means.shape[-1]
        left, right = _pair(width, codes.device)
        flips = _signs(width, codes.device, torch.float32) / math.sqrt(len(left) * width)
        return CodedTargets(codes, scales, levels, means, flips, left, right)

    def _check_rows(self, middle: Tensor) -> None:
        layers, width = self.means.shape
        if middle.ndim < 3 or (middle.shape[-3], middle.shape[-1]) != (layers, width):
            raise ValueError(
                f"expected rows [...,{layers},M,{width}] as the means, got {list(middle.shape)}"
            )

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            levels = gaussian_levels(2**self.bits).float()
            self._tables[device] = levels.to(device), self.means.to(device)
        return self._tables[device]


def row_bytes(kind: str, width: int) -> int:
    """Bytes of one row's codes."""
    return 2 * width if kind == "fp16" else -(-width * BITS[kind] // 8)


@cache
def gaussian_levels(count: int) -> Tensor:
    """The `count` levels, ascending, float64, that code a standard normal with least squared error.

    Lloyd's iteration from the quantiles of the density's cube root, a normal with a deviation of
    sqrt(3) (Panter and Dite, 1951); from plain quantiles it takes far longer.
    """
    half = count // 2  # the levels are symmetric, and tails above zero are accurate
    share = (torch.arange(half, dtype=torch.float64) + 0.5 + half) / count
    levels = math.sqrt(3) * torch.special.ndtri(share)
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    for _ in range(ITERATIONS):
        borders = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        tail = torch.special.erfc(borders / math.sqrt(2)) / 2
        levels = density.diff() / tail.diff()  # the mean of each cell
    return torch.cat([-levels.flip(0), levels])


def rotate(rows: Tensor) -> Tensor:
    """R x of rows [...,E]: seeded signs, then an orthogonal mix of all channels."""
    width = rows.shape[-1]
    return _mix(rows * _signs(width, rows.device, rows.dtype), _factors(width))


def rotate_back(rows: Tensor) -> Tensor:
    """R^T x of rows [...,E]; the mix is its own inverse."""
    width = rows.shape[-1]
    return _mix(rows, _factors(width)) * _signs(width, rows.device, rows.dtype)


def _mix(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The Kronecker product of a matrix of each size, applied to rows [...,E]."""
    for size in reversed(sizes):
        parts = rearrange(rows, "... (rest size) -> ... rest size", size=size)
        parts = parts @ _matrix(size, rows.device, rows.dtype)
        rows = rearrange(parts, "... rest size -> ... (size rest)")  # in order after the last one
    return rows


def _look_up(levels: Tensor, values: Tensor) -> Tensor:
    """`levels[values]` for int32 values, in a seventh of the time on a CPU."""
    return levels.index_select(0, values.flatten()).reshape(values.shape)


@cache
def _factors(width: int) -> tuple[int, ...]:
    """A width's power of two in parts, then its odd part: 1408 = 128 x 11.

    In this order neighbouring channels, which often are large together, are spread evenly.
    """
    power = width & -width
    sizes = [width // power]
    while power > 1:
        sizes.insert(0, min(power, LARGEST_FACTOR))
        power //= sizes[0]
    return tuple(sizes)


@cache
def _pair(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mix as two symmetric factors [P,P] and [Q,Q] that matrix instructions take.

    The left one has entries of 1 and -1, which half precision holds, and is sqrt(P) times as long
    as an orthogonal one. 1408 is 128 x 11, 768 is 64 x 12.
    """
    left = width & -width
    right = odd = width // left
    while left > 1 and (right <= 8 or (left > LARGEST_FACTOR and right <= 16)):
        left, right = left // 2, right * 2
    signs = (_matrix(left, device, torch.float64) * math.sqrt(left)).round()
    power = _matrix(right // odd, device, torch.float64)
    mix = torch.kron(power, _matrix(odd, device, torch.float64))
    return signs.float(), mix.float()


@cache
def _matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Symmetric orthogonal [size,size] with entries of about one magnitude.

    Hadamard's (Sylvester's) for a power of two; else Hartley's, cos + sin of 2 pi i j / size,
    which there is for any size (Bracewell, 1983).
    """
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(matrix, step)
    else:
        index = torch.arange(size)
        angle = 2 * math.pi / size * (torch.outer(index, index) % size).double()
        matrix = angle.cos() + angle.sin()
    return (matrix / math.sqrt(size)).to(device, dtype)


@cache
def _signs(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Seeded signs [E]: no channel pattern is an entry of the mix."""
    uniform = draw.uniform(torch.zeros(1, dtype=torch.int64), "code signs", width, count=width)
    return torch.where(uniform[0] < 0.5, -1.0, 1.0).to(device, dtype)


def pack(values: Tensor, *, bits: int) -> Tensor:
    """Codes uint8 [...,E] below 2^bits as bytes [...,ceil(E*bits/8)] (see kernels/codes.py)."""
    if bits == 8:
        return values
    width = values.shape[-1]
    groups = rearrange(F.pad(values, (0, -width % GROUP)), "... (g c) -> ... g c", c=GROUP).long()
    shifts = torch.arange(GROUP, device=values.device)
    words = reduce(groups << bits * shifts, "... g c -> ... g", "sum")
    parts = (words[..., None] >> 8 * shifts[:bits]) & 255
    packed = rearrange(parts, "... g b -> ... (g b)").to(torch.uint8)
    return packed[..., : -(-width * bits // 8)]
