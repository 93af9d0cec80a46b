"""Coded targets of any bytes at all, and what they stand for, without the product's code."""

import math

import numpy as np
import torch

from distill.kernels.coded_targets import CodedTargets

FACTORS = {96: (32, 3), 176: (16, 11), 257: (1, 257), 1408: (128, 11)}


def coded_targets(bits, width, *, clips=2, layers=2, tokens=5, device="cpu"):
    """Levels of the size of 1 and vectors of about unit length, as a cache's are."""
    stream = torch.Generator().manual_seed(1000 * bits + width)
    left, right = FACTORS[width]
    mix = torch.linalg.qr(torch.randn(right, right, generator=stream, dtype=torch.float64)).Q
    mix = (mix * torch.randn(right, generator=stream).sign()) @ mix.T  # symmetric, orthogonal
    hadamard = torch.ones(1, 1)
    while len(hadamard) < left:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    size = -(-width * bits // 8)
    shape = (clips, layers, tokens)
    signs = torch.randn(width, generator=stream).sign()
    found = CodedTargets(
        codes=torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=stream),
        scales=(0.5 + torch.rand(shape, generator=stream)).half(),
        levels=torch.randn(2**bits, generator=stream).sort().values,
        means=torch.randn(layers, width, generator=stream) / math.sqrt(width),
        flips=signs / math.sqrt(left * width),
        left=hadamard,
        right=mix.float(),
    )
    return CodedTargets(*(x.to(device) for x in found))


def vectors(targets):
    """Float64 [B,K,M,E], bit by bit and with the whole matrix."""
    codes, scales, levels, means, flips, left, right = (x.cpu() for x in targets)
    bits, width = len(levels).bit_length() - 1, len(flips)
    string = np.unpackbits(codes.numpy(), axis=-1, bitorder="little")[..., : width * bits]
    digits = string.reshape(*codes.shape[:-1], width, bits).astype(np.int64)
    values = (digits << np.arange(bits)).sum(-1)
    rows = torch.from_numpy(levels.double().numpy()[values])
    turned = rows @ torch.kron(left.double(), right.double()) * flips.double()
    return means.double()[:, None] + scales.double()[..., None] * turned
