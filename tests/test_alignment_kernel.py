"""The alignment kernel in Triton's interpreter and compiled for GPUs that are not there."""

import pytest
import torch
from coded import coded_targets, vectors
from interpret import interpret
from test_alignment import TOLERANCE, formula, inputs
from torch.testing import assert_close

from distill.kernels import alignment as module
from distill.kernels.alignment import alignment
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build

LAYERS, UPSTREAM = 3, 1.7
WIDTHS = (1, 13, 257)  # 257: more than one row's block holds nothing behind its last column
EACH = torch.tensor([0.25, 0.25, -0.5])  # layers' upstream gradients
RATIO = torch.tensor([1.0, -0.3, 2.5])


def gradients_of(raw, weight, bias, targets, upstream):
    """Losses, and gradients of all projections, gains and biases, in float64."""
    leaves = [
        [x.detach().double().requires_grad_() for x in group] for group in (raw, weight, bias)
    ]
    losses = formula(*leaves, targets.double())
    flat = [leaf for group in leaves for leaf in group]
    found = torch.autograd.grad(upstream * losses.sum(), flat)
    layers = len(raw)
    return losses.detach(), *(torch.stack(found[i * layers : (i + 1) * layers]) for i in range(3))


def case(width):
    raw, weight, bias, targets = inputs(LAYERS, 2, 37, width, torch.float32)
    detached = [[x.detach() for x in group] for group in (raw, weight, bias)]
    return (*detached, targets)


def coded_case():
    """Codes of 4 bits, decoded to float16 for projections in float16."""
    raw, weight, bias, _ = case(176)
    half = [x.half() for x in raw]
    return half, weight, bias, coded_targets(4, 176, clips=2, layers=LAYERS, tokens=37)


def with_fields(arguments):
    """Targets as the kernel's function takes them."""
    return *arguments[:3], module.fields(arguments[3])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    place, settings = "alignment._alignment_fwd", {"upstream": UPSTREAM, "programs": 4 * LAYERS}
    calls = {f"{width}": (place, with_fields(case(width)), settings) for width in WIDTHS}
    raw, weight, bias, targets = case(13)
    strided = torch.empty(2, LAYERS, 40, 13).transpose(0, 1)[:, :, :37].copy_(targets)
    calls["strided"] = (place, (raw, weight, bias, [strided]), settings)
    with_grad = [[x.clone().requires_grad_() for x in group] for group in (raw, weight, bias)]
    calls["losses"] = ("alignment.alignment", case(13), {})
    calls["one program"] = (place, with_fields(case(13)), {**settings, "programs": 1})
    parts = (place, with_fields(coded_case()), settings)
    calls["coded"] = ("applied.clip_by_clip", parts, {})
    for expected in (1.0, 0.25):
        call = ("alignment.alignment", (*with_grad, targets), {"upstream": expected})
        calls[f"applied {expected}"] = ("applied.gradients", (*call, [EACH]), {})
    calls["twice"] = ("applied.second_backward", call, {})
    scaled = torch.randn(3, 2, 37, 13, generator=torch.Generator().manual_seed(0))
    calls["scaled"] = ("applied.scaled", (scaled, RATIO), {})
    return interpret(calls, tmp_path_factory.mktemp("interpreter")) | {"unscaled": scaled}


@pytest.mark.parametrize("width", WIDTHS)
def test_losses_and_gradients_are_the_formulas(interpreted, width):
    expected = gradients_of(*case(width), UPSTREAM)
    for found, want in zip(interpreted[str(width)], expected, strict=True):
        assert_close(found.double(), want, **TOLERANCE[torch.float32])


def test_coded_targets_are_aligned_with_in_parts(interpreted):
    raw, weight, bias, targets = coded_case()
    exact = vectors(targets).transpose(0, 1)
    expected = gradients_of(raw, weight, bias, exact, UPSTREAM)
    # Against the largest gradient: small ones are rounded to float16's smallest numbers.
    for found, want in zip(interpreted["coded"], expected, strict=True):
        assert_close(found.double(), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())


def test_strides_and_the_number_of_programs_change_no_more_than_rounding(interpreted):
    assert_close(interpreted["strided"], interpreted["13"], rtol=0, atol=0)
    for found, want in zip(interpreted["one program"], interpreted["13"], strict=True):
        assert_close(found, want, **TOLERANCE[torch.float32])


def test_without_gradients_there_are_losses_alone(interpreted):
    assert_close(interpreted["losses"], interpreted["13"][0], **TOLERANCE[torch.float32])


def test_gradients_are_scaled_layer_by_layer(interpreted):
    expected = interpreted["unscaled"] * RATIO[:, None, None, None]
    assert_close(interpreted["scaled"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("expected", [1.0, 0.25])
def test_the_function_scales_by_its_upstream_gradient(interpreted, expected):
    (losses,), found = interpreted[f"applied {expected}"]
    want = gradients_of(*case(13), 1.0)
    assert_close(losses.double(), want[0], **TOLERANCE[torch.float32])
    for index, group in enumerate(want[1:]):
        for layer in range(LAYERS):
            one = found[index * LAYERS + layer].double()
            assert_close(one, EACH[layer] * group[layer], **TOLERANCE[torch.float32])


def test_gradients_are_handed_out_once(interpreted):
    assert "handed out once" in interpreted["twice"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_takes_coded_targets(dtype):
    raw, weight, bias, _ = inputs(2, 2, 5, 96, dtype)
    targets = coded_targets(3, 96)
    found = alignment(raw, weight, bias, targets)
    expected = formula(raw, weight, bias, vectors(targets).transpose(0, 1))
    assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_layers_of_two_dtypes_are_refused():
    raw, weight, bias, targets = inputs(2, 2, 5, 8)
    with pytest.raises(ValueError, match="layer 1: expected torch.float64 as layer 0, got torch"):
        alignment([raw[0], raw[1].half()], weight, bias, targets)


BUILDS = [
    (capability, *kind)
    for capability in CAPABILITIES
    for kind in ((1408, "bf16", "bf16"), (3200, "fp16", "fp16"))
]
BUILDS += [(90, 1408, "bf16", "fp16"), (90, 1408, "fp32", "fp32")]


@pytest.mark.parametrize(("capability", "width", "dtype", "target"), BUILDS)
def test_the_kernel_compiles_for_gpus(capability, width, dtype, target, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = 1 << (width - 1).bit_length()
    strides = ("layer_stride", "clip_stride", "row_stride", "gradient_stride")
    made = build(
        module._alignment_fwd_kernel,
        capability,
        types={
            "raw": (f"*{dtype}",) * 6,
            "gains": ("*fp32",) * 6,
            "biases": ("*fp32",) * 6,
            "targets": f"*{target}",
            "gradients": f"*{dtype}",
            **dict.fromkeys(("gain_parts", "bias_parts", "cosines"), "*fp32"),
            **dict.fromkeys(("num_rows", "rows_per_clip", "width"), "i32"),
            **dict.fromkeys(strides, "i64"),
            "factor": "fp32",
        },
        constants={
            "EPS": module.EPS,
            "TINY": module.TINY,
            "LAYERS": 6,
            "GRADIENT": True,
            "ROWS": module.TILE // block,
            "BLOCK": block,
            "STAGES": module.NUM_STAGES,
        },
        warps=module.num_warps(block),
        max_registers=module.MAX_REGISTERS,
        multiples_of_16=("width", *strides),
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.shared_bytes <= SHARED_LIMIT[capability] // module.PROGRAMS
    assert "st.global.v4.b32" in made.ptx, "gradients are written 16 bytes at a time"
    assert "cp.async.cg.shared.global" in made.ptx, "the next rows are loaded meanwhile"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_scaling_compiles_for_gpus(capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = build(
        module._alignment_bwd_kernel,
        capability,
        types={"gradients": "*bf16", "ratio": "*fp32", "size": "i32"},
        constants={"BLOCK": module.SCALE_BLOCK},
        warps=4,
        multiples_of_16=("size",),
    )
    assert (made.stack_bytes, made.local_bytes, made.shared_bytes) == (0, 0, 0)
    assert "st.global.v4.b32" in made.ptx
