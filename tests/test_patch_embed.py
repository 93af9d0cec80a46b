"""Patch embedding of uint8 patches against its formula, written out in float64."""

import pytest
import torch
from interpret import interpret
from torch.testing import assert_close

from distill.kernels import patch_embed as module
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build
from distill.kernels.patch_embed import patch_embed
from distill.students.vit import IMAGENET_MEAN, IMAGENET_STD

STATISTICS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
TOLERANCE = {
    torch.float64: {"rtol": 1e-5, "atol": 1e-6},  # patches are normalised in float32
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
SHAPES = ((1, 12, 1), (37, 588, 17), (130, 78, 70))  # rows, values of a patch, width


def inputs(rows, inner, width):
    stream = torch.Generator().manual_seed(rows)
    patches = torch.randint(0, 256, (rows, inner), dtype=torch.uint8, generator=stream)
    weight = torch.randn(width, inner, generator=stream, dtype=torch.float64) / inner**0.5
    bias = torch.randn(width, generator=stream, dtype=torch.float64)
    upstream = torch.randn(rows, width, generator=stream, dtype=torch.float64)
    return patches, weight, bias, upstream


def formula(patches, weight, bias, upstream):
    """Embeddings, and the gradients of weight and bias, value by value of a patch."""
    inner = patches.shape[1]
    normal = torch.empty(patches.shape, dtype=torch.float64)
    for value in range(inner):
        channel = value * 3 // inner
        scaled = patches[:, value].double() / 255 - IMAGENET_MEAN[channel]
        normal[:, value] = scaled / IMAGENET_STD[channel]
    out = (normal[:, None] * weight).sum(-1) + bias
    return out, (upstream[:, :, None] * normal[:, None]).sum(0), upstream.sum(0)


def folded(patches, weight, bias, upstream, dtype):
    """What the kernels are given, and what their results are made of."""
    centres, offset, scale = module._statistics(
        IMAGENET_MEAN, IMAGENET_STD, patches.shape[1], patches.device
    )
    scaled = weight * scale.double()
    # Powers of two change no rounding: the weights would be among half precision's smallest.
    return patches, (64 * scaled).to(dtype), (64 * (bias + scaled @ offset.double())), centres


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    calls = {}
    for index, shape in enumerate(SHAPES):
        patches, weight, bias, upstream = inputs(*shape)
        rows, scaled, shift, centres = folded(patches, weight, bias, upstream, torch.float32)
        calls[f"fwd {index}"] = (
            "patch_embed._patch_embed_fwd",
            (rows, scaled, shift.float(), centres),
            {},
        )
        calls[f"bwd {index}"] = (
            "patch_embed._patch_embed_bwd",
            (rows, upstream.float(), centres),
            {},
        )
    patches, *others = inputs(*SHAPES[1])
    weight, bias, upstream = (x.float() for x in others)
    arguments = (patches, weight.requires_grad_(), bias.requires_grad_(), upstream)
    calls["applied"] = ("applied.embedding", arguments, STATISTICS)
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula(shape, dtype):
    patches, weight, bias, upstream = inputs(*shape)
    leaves = [x.to(dtype).requires_grad_() for x in (weight, bias)]
    found = patch_embed(patches, *leaves, **STATISTICS)
    gradients = torch.autograd.grad((found * upstream.to(dtype)).sum(), leaves)
    for one, want in zip((found, *gradients), formula(*inputs(*shape)), strict=True):
        assert_close(one.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_the_kernels_are_the_formula_and_write_every_element(interpreted, index):
    out, dweight, dbias = formula(*inputs(*SHAPES[index]))
    assert_close(interpreted[f"fwd {index}"].double() / 64, out, **TOLERANCE[torch.float32])
    _, offset, scale = module._statistics(
        IMAGENET_MEAN, IMAGENET_STD, SHAPES[index][1], dbias.device
    )
    found = interpreted[f"bwd {index}"].double()
    found = (found + torch.outer(dbias, offset.double())) * scale.double()
    assert_close(found, dweight, rtol=1e-4, atol=1e-5)


def test_the_function_gives_embeddings_and_gradients(interpreted):
    (out,), gradients = interpreted["applied"]
    for found, want in zip((out, *gradients), formula(*inputs(*SHAPES[1])), strict=True):
        assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


def test_centred_patches_are_whole_numbers_that_bfloat16_holds():
    centres, offset, scale = module._statistics(
        IMAGENET_MEAN, IMAGENET_STD, 588, torch.device("cpu")
    )
    values = torch.arange(256)[:, None] - centres
    assert_close(values.bfloat16().float(), values, rtol=0, atol=0)
    normal = (values.double() + offset) * scale
    channel = torch.arange(588) // 196
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in STATISTICS.values())
    expected = (torch.arange(256)[:, None] / 255 - mean[channel]) / std[channel]
    assert_close(normal, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_for_gpus(capability, name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {
        "fwd": {"weight": "*bf16", "bias": "*fp32", "centres": "*fp32", "out": "*bf16"},
        "bwd": {"upstream": "*bf16", "centres": "*fp32", "parts": "*fp32"},
    }[name]
    sizes = ("num_rows", "rows_per_split") if name == "bwd" else ("num_rows",)
    made = build(
        getattr(module, f"_patch_embed_{name}_kernel"),
        capability,
        types={
            "patches": "*u8",
            **pointers,
            **dict.fromkeys((*sizes, "columns"), "i32"),
        },
        constants={
            "inner": 588,
            "BLOCK": module.BLOCK,
        },
        warps=module.NUM_WARPS,
        stages=module.NUM_STAGES,
        multiples_of_16=("columns",),
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.registers <= 168, "of 65,536: three blocks of 128 threads run at once"
    assert made.shared_bytes <= SHARED_LIMIT[capability] // 2
    assert any(kind in made.ptx for kind in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


@pytest.mark.parametrize(
    ("patches", "got"),
    [
        (torch.zeros(2, 11, dtype=torch.uint8), r"torch.uint8 \[2, 11\]"),
        (torch.zeros(2, 12), r"torch.float32 \[2, 12\]"),
    ],
)
def test_wrong_patches_are_refused(patches, got):
    with pytest.raises(ValueError, match=rf"patches uint8 \[...,12\] of 3 channels, got {got}"):
        patch_embed(patches, torch.zeros(4, 12), torch.zeros(4), **STATISTICS)
