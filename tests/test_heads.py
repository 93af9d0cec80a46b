import math

import pytest
import torch
import torch.nn.functional as F
from fill import fill

from distill.students.heads import AttentionPool, Decoder


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_pool(pool, h):
    """The attention pool written from its formula in float64, head by head."""
    p = {name: value.double() for name, value in pool.state_dict().items()}
    h = h.double()
    q = layer_norm(h.mean(1, keepdim=True), p["norm1_q.weight"], p["norm1_q.bias"])
    k = layer_norm(h, p["norm1_k.weight"], p["norm1_k.bias"])
    v = layer_norm(h, p["norm1_v.weight"], p["norm1_v.bias"])
    q = q @ p["cross_attn.q.weight"].T + p["cross_attn.q_bias"]
    k = k @ p["cross_attn.k.weight"].T + p["cross_attn.k_bias"]
    v = v @ p["cross_attn.v.weight"].T + p["cross_attn.v_bias"]
    d = h.shape[-1] // 16
    out, attention = [], 0
    for i in range(16):
        one = slice(i * d, (i + 1) * d)
        weights = (q[..., one] @ k[..., one].transpose(1, 2) / math.sqrt(d)).softmax(-1)
        out.append(weights @ v[..., one])
        attention = attention + weights[:, 0] / 16
    return torch.cat(out, -1)[:, 0] @ p["cross_attn.proj.weight"].T + p[
        "cross_attn.proj.bias"
    ], attention


def test_pool_follows_the_formula_with_gradients():
    pool = fill(AttentionPool(96, 48))
    h = torch.randn(2, 14, 96, requires_grad=True)
    upstream = torch.randn(2, 48)
    pooled, attention = pool(h)
    expected, expected_attention = reference_pool(pool, h)
    torch.testing.assert_close(pooled, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention, expected_attention.float(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(pooled, h, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, h, upstream.double())
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-6)


def test_pool_attention_sums_to_one_over_all_tokens():
    _, attention = fill(AttentionPool(96, 48))(torch.randn(3, 9, 96))
    assert attention.shape == (3, 9)
    torch.testing.assert_close(attention.sum(1), torch.ones(3))


def test_every_layer_norm_of_the_pool_and_decoders_has_eps_1e_5():
    pool, decoder = AttentionPool(96, 48), Decoder(96, 96, kind="linear")
    x = torch.tensor([1e-3, -1e-3]).repeat(48)  # its variance is a tenth of eps
    expected = x / math.sqrt(1e-6 + 1e-5)
    for norm in (pool.norm1_q, pool.norm1_k, pool.norm1_v, decoder.norm):
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_decoder_projects_normalises_and_has_unit_length(kind):
    decoder = fill(Decoder(96, 176, kind=kind))
    x = torch.randn(2, 5, 96)
    if kind == "mlp":
        first, _, last = decoder.head
        hidden = first(x)
        raw = last(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    else:
        raw = decoder.head(x)
    expected = layer_norm(raw, decoder.norm.weight, decoder.norm.bias)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(decoder(x), expected, rtol=1e-5, atol=1e-6)


def test_decoder_gives_float32_from_bf16_parameters():
    decoder = fill(Decoder(96, 176, kind="mlp")).bfloat16()
    found = decoder(torch.randn(4, 96).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))


def test_decoder_of_a_constant_token_stays_finite():
    decoder = Decoder(96, 176, kind="linear")
    decoder.head.weight.data.zero_()
    decoder.head.bias.data.zero_()
    found = decoder(torch.ones(1, 96))
    assert torch.equal(found, torch.zeros(1, 176))
    assert F.cosine_similarity(found, found).item() == 0
