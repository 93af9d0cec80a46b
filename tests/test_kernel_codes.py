import subprocess
import sys

import numpy as np
import pytest
import torch
from interpret import interpret
from torch.testing import assert_close

from distill.kernels import codes as module
from distill.kernels.codes import BITS_OF, BLOCK_GROUPS, BLOCK_ROWS, decode_codes
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build

LEVELS = {bits: count for count, bits in BITS_OF.items()}
WIDTHS = (1, 7, 64, 257)  # one group; a part of one; whole ones; more than a block has
# bfloat16 is wrong in Triton's interpreter
CASES = [(bits, width, "float32") for bits in LEVELS for width in WIDTHS]
CASES += [(bits, WIDTHS[-1], "float16") for bits in LEVELS]


def inputs(bits, width, *, batch=2, layers=2, rows=5):
    """Any bytes at all, those behind a row's last code included."""
    stream = torch.Generator().manual_seed(1000 * bits + width)
    shape = (batch, layers, rows)
    size = -(-width * bits // 8)
    codes = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=stream)
    scales = torch.randn(shape, generator=stream).half()
    levels = torch.randn(LEVELS[bits], generator=stream).sort().values
    return codes, scales, levels


def formula(codes, scales, levels, *, width):
    """In float64, where the product of a half and a float32 number is exact, bit by bit."""
    bits = BITS_OF[len(levels)]
    string = np.unpackbits(codes.numpy(), axis=-1, bitorder="little")[..., : width * bits]
    digits = string.reshape(*codes.shape[:-1], width, bits).astype(np.int64)
    values = (digits << np.arange(bits)).sum(-1)
    return torch.from_numpy(levels.double().numpy()[values] * scales.double().numpy()[..., None])


def rounded(exact, dtype):
    """As the kernel's docstring says: to float32, and from there to the rows' dtype."""
    return exact.float().to(dtype)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Rows of every case from the kernel in Triton's interpreter."""
    calls = {
        (bits, width, dtype): (
            "codes.decode_codes",
            inputs(bits, width),
            {"width": width, "dtype": getattr(torch, dtype)},
        )
        for bits, width, dtype in CASES
    }
    nothing = (
        torch.empty(2, 0, 5, 4, dtype=torch.uint8),
        torch.empty(2, 0, 5, dtype=torch.float16),
        torch.zeros(16),
    )
    calls["none"] = ("codes.decode_codes", nothing, {"width": 8})
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [*WIDTHS, 1408])
@pytest.mark.parametrize("bits", LEVELS)
def test_the_reference_is_the_formula(bits, width, dtype):
    codes, scales, levels = inputs(bits, width)
    found = decode_codes(codes, scales, levels, width=width, dtype=getattr(torch, dtype))
    expected = rounded(formula(codes, scales, levels, width=width), getattr(torch, dtype))
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "width", "dtype"), CASES)
def test_the_kernel_is_the_formula_and_writes_every_element(interpreted, bits, width, dtype):
    found = interpreted[bits, width, dtype]
    expected = rounded(formula(*inputs(bits, width), width=width), getattr(torch, dtype))
    assert_close(found, expected, rtol=0, atol=0)


def test_no_rows_are_no_launch(interpreted):
    assert interpreted["none"].shape == (2, 0, 5, 8)


def test_leading_axes_and_strides_do_not_matter():
    codes, scales, levels = inputs(3, 20, batch=4)
    whole = decode_codes(codes, scales, levels, width=20)
    every_other = decode_codes(codes[::2], scales[::2], levels, width=20)
    assert_close(every_other, whole[::2], rtol=0, atol=0)
    assert_close(decode_codes(codes[1], scales[1], levels, width=20), whole[1], rtol=0, atol=0)


BUILDS = [(capability, "bf16") for capability in CAPABILITIES] + [(90, "fp16"), (90, "fp32")]


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize(("capability", "dtype"), BUILDS)
def test_the_kernel_compiles_for_gpus(capability, bits, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = build(
        module._decode_codes_fwd_kernel,
        capability,
        types={
            "codes": "*u8",
            "scales": "*fp16",
            "levels": "*fp32",
            "rows": f"*{dtype}",
            "num_rows": "i32",
            "width": "i32",
            "row_bytes": "i32",
        },
        constants={"BITS": bits, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_GROUPS": BLOCK_GROUPS},
        warps=module.NUM_WARPS,
        multiples_of_16=("width", "row_bytes"),  # as 1408 and its bytes are
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.registers <= 64, "of 65,536: at least 8 blocks run at once"
    assert made.shared_bytes <= SHARED_LIMIT[capability] // 8
    assert "st.global.v4.b32" in made.ptx, "rows are written 16 bytes at a time"


def test_without_triton_the_reference_is_there(tmp_path):
    script = """
import sys
sys.modules["triton"] = None
import torch
from distill.kernels import jit
from distill.kernels.codes import decode_codes
assert jit.triton is None
torch.save(decode_codes(*torch.load(sys.argv[1]), width=20), sys.argv[2])
"""
    torch.save(inputs(4, 20), tmp_path / "in")
    subprocess.run([sys.executable, "-c", script, tmp_path / "in", tmp_path / "out"], check=True)
    expected = decode_codes(*inputs(4, 20), width=20)
    assert_close(torch.load(tmp_path / "out"), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": torch.zeros(5)}, "expected float32 levels, 256, 16, 8, 4 of them, got 5 in"),
        ({"levels": torch.zeros(16).double()}, "got 16 in torch.float64"),
        (
            {"codes": torch.zeros(2, 2, 5, 11, dtype=torch.uint8)},
            r"codes uint8 \[\.\.\.,K,M,10\] for 4 bits and width 20, got torch.uint8 \[2, 2, 5, 11",
        ),
        ({"codes": torch.zeros(2, 2, 5, 10)}, "got torch.float32"),
        ({"scales": torch.zeros(2, 5).half()}, r"scales float16 \[2, 2, 5\] as the codes, got"),
        ({"scales": torch.zeros(2, 2, 5)}, "got torch.float32"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = dict(zip(("codes", "scales", "levels"), inputs(4, 20), strict=True))
    with pytest.raises(ValueError, match=message):
        decode_codes(**{**arguments, **change}, width=20)
