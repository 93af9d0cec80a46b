import pytest
import torch
from torch.testing import assert_close

from distill.cache.codes import decode, encode


def rows(count=4096, width=176):
    """Unit rows with a shared mean and outlier channels, as a teacher's features have."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, count, width, generator=stream)
    x[..., 5] *= 12
    x += torch.randn(width, generator=stream)
    return torch.nn.functional.normalize(x, dim=-1)


def decoded(kind, middle):
    fields = encode(kind, middle)
    return decode(fields["codes"], fields.get("scales"))


def test_fields_have_the_layout_of_a_record():
    half, small = encode("fp16", rows(7)), encode("int8", rows(7))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in half.items()} == {
        "codes": (torch.float16, (3, 7, 176))
    }
    assert {name: (value.dtype, tuple(value.shape)) for name, value in small.items()} == {
        "codes": (torch.int8, (3, 7, 176)),
        "scales": (torch.float32, (3, 7)),
    }
    assert int(small["codes"].abs().amax(-1).min()) == 127, "every row uses the whole range"


def test_half_precision_is_the_nearest_half():
    middle = rows()
    assert_close(decoded("fp16", middle), middle.half(), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "error"), [("fp16", 1e-7), ("int8", 2e-4)])
def test_decoded_rows_point_where_the_rows_did(kind, error):
    middle = rows()
    found = decoded(kind, middle).double()
    cosine = torch.cosine_similarity(found, middle.double(), dim=-1)
    assert 0 <= float((1 - cosine).mean()) < error


def test_int8_is_unbiased_along_every_row():
    middle = rows().double()
    found = decoded("int8", middle.float()).double()
    along = (found * middle).sum(-1) / middle.square().sum(-1)
    assert_close(along, torch.ones_like(along), rtol=0, atol=1e-6)
    # What plain rounding does to the same rows: a spread of lengths some hundred times as wide.
    step = middle.abs().amax(-1, keepdim=True) / 127
    plain = ((middle / step).round() * step * middle).sum(-1)
    assert float((plain - 1).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_row_of_zeros_stays_zero(kind):
    assert_close(decoded(kind, torch.zeros(1, 2, 8)).float(), torch.zeros(1, 2, 8))


def test_codes_bytes_are_pinned():
    """Whoever changes these numbers raises the codes revision of distill/cache/identity.py."""
    row = torch.tensor([[[0.5, -0.25, 0.125, 0.8]]])
    fields = encode("int8", row)
    assert fields["codes"].tolist() == [[[79, -40, 20, 127]]]
    assert_close(fields["scales"].item(), 0.968125 / 153.6, rtol=1e-6, atol=0)
    assert encode("fp16", row)["codes"].view(torch.int16).tolist() == [
        [[14336, -19456, 12288, 14950]]
    ]


def test_unknown_codes_are_refused():
    with pytest.raises(ValueError, match="unknown codes 'int3'; choose fp16 or int8"):
        encode("int3", rows(1))
