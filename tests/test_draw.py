"""Keyed randomness: pinned, since a cache's masks and views are rebuilt from it."""

import math
import subprocess
import sys

import numpy as np
import torch

from distill import draw

CLIPS = torch.tensor([5, -9])


def test_draws_are_pinned():
    assert draw.key("mask", 0, 1) == -6752199422222025745
    assert draw.generator("augment", 3).integers(0, 1000, 4).tolist() == [587, 421, 438, 157]
    bits = (draw.uniform(CLIPS, "mask", 0, count=3) * 2**24).int()
    assert bits.tolist() == [[3122765, 10292319, 9893141], [7574207, 3093720, 15666783]]


def test_splitmix64_in_wrapping_int64_is_the_unsigned_one():
    def mix(x: int) -> int:  # Steele, Lea and Flood (2014), the finaliser of splitmix64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for clip in CLIPS.tolist():
        start = mix((clip ^ draw.key("mask", 0)) % 2**64)
        expected = [mix((start + i * 0x9E3779B97F4A7C15) % 2**64) >> 40 for i in (1, 2, 3)]
        row = draw.uniform(torch.tensor([clip]), "mask", 0, count=3)[0]
        assert (row * 2**24).int().tolist() == expected


def test_a_clip_s_draws_do_not_depend_on_its_neighbours():
    alone = draw.uniform(CLIPS[1:], "drop-path", 7, count=5)
    torch.testing.assert_close(
        draw.uniform(CLIPS, "drop-path", 7, count=5)[1:], alone, rtol=0, atol=0
    )


def test_keys_tell_parts_apart():
    keys = {draw.key("a", 1), draw.key("a", 11), draw.key("a1", 1), draw.key("a", 1, 1)}
    assert len(keys) == 4


def test_uniform_and_gumbel_have_their_moments():
    count = 400_000
    uniform = draw.uniform(CLIPS, "test", count=count).double()
    assert uniform.min() >= 0 and uniform.max() < 1
    np.testing.assert_allclose(uniform.mean(1), 0.5, atol=5 * math.sqrt(1 / 12 / count))
    np.testing.assert_allclose(uniform.var(1), 1 / 12, rtol=0.01)
    gumbel = draw.gumbel(CLIPS, "test", count=count).double()
    assert gumbel.isfinite().all()
    np.testing.assert_allclose(gumbel.mean(1), 0.5772157, atol=0.01)
    np.testing.assert_allclose(gumbel.var(1), math.pi**2 / 6, rtol=0.02)


def test_loader_workers_do_without_torch():
    """Importing it takes each worker seconds and half a gigabyte of address space."""
    code = "import sys, distill.data.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
