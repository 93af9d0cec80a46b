"""Vectors of coded targets against their formula, written out in float64."""

import pytest
import torch
from coded import FACTORS, coded_targets, vectors
from interpret import interpret
from torch.testing import assert_close

from distill.kernels import coded_targets as module
from distill.kernels.coded_targets import decode_targets
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build

BITS = (8, 4, 3, 2)
TOLERANCE = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-7},  # codes' rows are a float32 product
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 5e-4},
}
CASES = [(bits, width) for bits in BITS for width in (96, 176)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = {
        f"{bits}-{width}": (
            "coded_targets._decode_targets_fwd",
            (list(coded_targets(bits, width, tokens=13)),),
            {"dtype": torch.float16, "programs": 2},
        )
        for bits, width in CASES
    }
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", FACTORS)
@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_formula(bits, width, dtype):
    targets = coded_targets(bits, width)
    found = decode_targets(targets, dtype)
    assert found.dtype == dtype
    assert_close(found.double(), vectors(targets), **TOLERANCE[dtype])


def test_autocast_changes_nothing():
    targets = coded_targets(4, 257)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decode_targets(targets, torch.float32)
    assert_close(found, decode_targets(targets, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "width"), CASES)
def test_the_kernel_is_the_formula_and_writes_every_element(interpreted, bits, width):
    expected = vectors(coded_targets(bits, width, tokens=13))
    assert_close(interpreted[f"{bits}-{width}"].double(), expected, **TOLERANCE[torch.float16])


def test_clips_and_layers_are_taken_out():
    targets = coded_targets(4, 96, clips=3, layers=3)
    whole = decode_targets(targets, torch.float32)
    assert targets.shape == (3, 3, 5, 96)
    part = targets.clips(slice(1, 3)).layer(2)
    assert_close(decode_targets(part, torch.float32), whole[1:3, 2:3], rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "width"), [(8, 1408), (4, 1408), (3, 1408), (2, 176)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_compiles_for_gpus(capability, bits, width, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    left, right = FACTORS[width]
    made = build(
        module._decode_targets_fwd_kernel,
        capability,
        types={
            "codes": "*u8",
            "scales": "*fp16",
            **dict.fromkeys(("levels", "means", "flips", "left", "right"), "*fp32"),
            "rows": "*fp16",
            **dict.fromkeys(("num_rows", "rows_per_clip", "num_layers"), "i32"),
        },
        constants={
            "BITS": bits,
            "ROWS": module.TILE // (left * 16),
            "LEFT": left,
            "RIGHT": right,
            "PADDED": 16,
        },
        warps=module.NUM_WARPS,
        stages=1,
        max_registers=module.MAX_REGISTERS,
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.shared_bytes <= SHARED_LIMIT[capability] // 2, "two blocks run at once"
    assert any(name in made.ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": torch.eye(4)}, "factors of width 96, got 32 and 4"),
        ({"means": torch.zeros(3, 96)}, r"means \[2, 96\], got \[3, 96\]"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode_targets(coded_targets(4, 96)._replace(**change), torch.float32)
