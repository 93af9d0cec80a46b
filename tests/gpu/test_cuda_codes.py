"""Decoding on a CUDA device against the reference, which is the CPU's."""

import pytest
import torch
from torch.testing import assert_close

from distill.cache.codes import BITS, Codec
from distill.kernels.codes import BITS_OF, decode_codes, decode_codes_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LEVELS = {bits: count for count, bits in BITS_OF.items()}


def inputs(bits, width, shape):
    stream = torch.Generator("cuda").manual_seed(0)
    size = -(-width * bits // 8)
    return (
        torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=stream, device="cuda"),
        torch.randn(shape, generator=stream, device="cuda").half(),
        torch.randn(LEVELS[bits], generator=stream, device="cuda").sort().values,
    )


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 176, 257, 768, 1408, 3200])
@pytest.mark.parametrize("bits", LEVELS)
def test_the_kernel_is_the_reference_and_writes_every_element(poisoned, bits, width, dtype):
    arguments = inputs(bits, width, (3, 2, 67))
    found = decode_codes(*arguments, width=width, dtype=dtype)
    expected = decode_codes_reference(*(x.cpu() for x in arguments), width=width, dtype=dtype)
    assert_close(found.cpu(), expected, rtol=0, atol=0)


def test_no_rows_are_no_launch():
    codes, scales, levels = inputs(4, 20, (2, 0, 5))
    assert decode_codes(codes, scales, levels, width=20).shape == (2, 0, 5, 20)


def test_offsets_past_two_to_the_31():
    width, rows = 1408, 2**31 // 1408 + 4096
    codes, scales, levels = inputs(8, width, (1, 1, rows))
    found = decode_codes(codes, scales, levels, width=width, dtype=torch.bfloat16)
    for part in (slice(0, 64), slice(rows // 2, rows // 2 + 64), slice(rows - 64, rows)):
        expected = decode_codes_reference(
            codes[:, :, part], scales[:, :, part], levels, width=width, dtype=torch.bfloat16
        )
        assert_close(found[:, :, part], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", BITS)
def test_records_decode_to_the_rows_of_the_cpu(kind):
    stream = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, 3, 64, 1408, generator=stream), dim=-1)
    codec = Codec(kind, means=rows.mean((0, 2)))
    fields = codec.encode(rows)
    on_cpu = codec.decode(**fields)
    on_gpu = codec.decode(**{name: value.cuda() for name, value in fields.items()})
    assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-6)
