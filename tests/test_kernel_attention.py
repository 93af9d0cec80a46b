import pytest
import torch
from formulas import attention_formula, relative_error
from interpret import interpret
from torch.testing import assert_close

from distill.kernels import attention as module
from distill.kernels import attention_kernels as kernels
from distill.kernels.attention import (
    CONFIGS,
    Packing,
    attention,
    attention_reference,
    pack,
    pack_evenly,
)
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build

CPU = torch.device("cpu")
NAMES = ("out", "qkv", "q_gain", "k_gain")  # the output, then the gradients
LENGTHS = {  # one key less and one more than a tile; a tile and a bit; nothing at all
    "ragged": [1, 17, 0, 67],
    "tile": [64, 63, 65],
    "long": [150],  # as long as makes it so in the process that interprets
    "nothing": [0, 0],
    "even": [67, 67],
    "whole tiles": [64, 64],
}
EVEN = ("even", "whole tiles")  # packed by a number per clip, without cumulative lengths
CASES = [
    # sequences, heads, head width
    ("ragged", 2, 64),
    ("ragged", 3, 16),
    ("ragged", 2, 24),
    ("ragged", 2, 88),
    ("ragged", 1, 128),
    ("tile", 1, 64),
    ("tile", 1, 88),
    ("nothing", 2, 64),
    ("even", 2, 64),
    ("whole tiles", 1, 64),
]
HALF = [("ragged", 2, 64), ("ragged", 2, 88), ("ragged", 1, 128), ("even", 2, 64)]  # of CASES
TOLERANCE = {"float32": {"rtol": 1e-4, "atol": 2e-5}}
EXTREME = ("far below zero", "far above zero", "one token's head is nothing")


def inputs(lengths, heads, d, *, dtype="float32", kind=None):
    """Queries three times as long as keys, and gains of both signs."""
    width = heads * d
    stream = torch.Generator().manual_seed(1000 * heads + d)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3 * width, generator=stream)
    qkv[:, :width] *= 3
    gains = 1 + 0.5 * torch.randn(2, width, generator=stream)
    gains[:, ::7] *= -1
    if kind in EXTREME[:2]:  # scores of hundreds, where an exponential is nothing or infinite
        gains[:] = 8
        qkv[:, :width] = -1 if kind == EXTREME[0] else 1
        qkv[:, width : 2 * width] = 1 + 0.01 * torch.randn(tokens, width, generator=stream)
    if kind == EXTREME[2]:
        qkv[:, :d] = 0
        qkv[tokens // 2, width : width + d] = 0
    half = getattr(torch, dtype)
    return {
        "qkv": qkv.to(half),
        "q_gain": gains[0].clone(),
        "k_gain": gains[1].clone(),
        "d_out": torch.randn(tokens, width, generator=stream).to(half),
    }


def with_gradients(call, tensors):
    """The output of `call` and its gradients by NAMES, for the upstream gradient `d_out`."""
    leaves = [tensors[name].detach().clone().requires_grad_() for name in NAMES[1:]]
    out = call(*leaves)
    gradients = torch.autograd.grad(out, leaves, tensors["d_out"].to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def exact(tensors, lengths, heads):
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    return with_gradients(
        lambda *leaves: attention_formula(*leaves, lengths=lengths, heads=heads), wide
    )


def packing_of(lengths):
    return pack(torch.tensor([0, *lengths]).cumsum(0).int(), device=CPU)


def eager(tensors, lengths, heads):
    packing = packing_of(lengths)
    return with_gradients(lambda *leaves: attention(*leaves, packing, heads=heads), tensors)


def call_of(tensors, sequences, heads):
    """The kernels' call, with gradients: also in float32, where the operation has the reference."""
    lengths = LENGTHS[sequences]
    packing = pack_evenly(len(lengths), lengths[0]) if sequences in EVEN else packing_of(lengths)
    leaves = [tensors[name].requires_grad_() for name in NAMES[1:]]
    arguments = (*leaves, packing.cumulative, heads, packing.num_clips, packing.longest)
    settings = ("attention._Attention.apply", arguments, {}, [tensors["d_out"]])
    return "applied.gradients", settings, {}


def stock_arguments():
    tensors = inputs(LENGTHS["even"], 2, 88, dtype="float16")
    return (*(tensors[name] for name in NAMES[1:]), pack_evenly(2, 67)), {"heads": 2}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs and gradients of every case from the kernels in Triton's interpreter."""
    calls = {}
    cases = [(*case, "float32") for case in CASES]
    cases += [(*case, "float16") for case in HALF]  # bfloat16 is wrong in Triton's interpreter
    for sequences, heads, d, dtype in cases:
        tensors = inputs(LENGTHS[sequences], heads, d, dtype=dtype)
        calls[sequences, heads, d, dtype] = call_of(tensors, sequences, heads)
    long = call_of(inputs(LENGTHS["long"], 1, 64), "long", 1)
    calls["long"] = ("applied.where", ({"attention.LONG": 100}, *long), {})
    for kind in EXTREME:
        calls[kind] = call_of(inputs(LENGTHS["ragged"], 2, 64, kind=kind), "ragged", 2)
    stock = ("attention.stock_attention", *stock_arguments())
    calls["stock"] = ("applied.without_gradients", stock, {})
    made = interpret(calls, tmp_path_factory.mktemp("interpreter"))
    of_stock = made.pop("stock")
    return {
        name: dict(zip(NAMES, (*outputs, *gradients), strict=True))
        for name, (outputs, gradients) in made.items()
    } | {"stock": of_stock}


@pytest.mark.parametrize("lengths", [[1, 17, 0, 67], [9, 9, 9], [5], [0, 0], []])
@pytest.mark.parametrize(("heads", "d"), [(2, 64), (3, 88), (1, 128), (3, 16)])
def test_the_reference_is_the_formula_with_gradients(lengths, heads, d):
    tensors = inputs(lengths, heads, d)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected = exact(tensors, lengths or [0], heads)
    assert_close(eager(wide, lengths, heads), expected, rtol=1e-9, atol=1e-10)
    assert_close(
        eager(tensors, lengths, heads),
        {name: tensor.float() for name, tensor in expected.items()},
        **TOLERANCE["float32"],
    )


@pytest.mark.parametrize(("sequences", "heads", "d"), CASES)
def test_the_kernels_are_the_formula_and_write_every_element(interpreted, sequences, heads, d):
    lengths = LENGTHS[sequences]
    expected = exact(inputs(lengths, heads, d), lengths, heads)
    expected = {name: tensor.float() for name, tensor in expected.items()}
    assert_close(interpreted[sequences, heads, d, "float32"], expected, **TOLERANCE["float32"])


def test_sequences_of_large_tiles_are_the_formula(interpreted):
    expected = exact(inputs(LENGTHS["long"], 1, 64), LENGTHS["long"], 1)
    expected = {name: tensor.float() for name, tensor in expected.items()}
    assert_close(interpreted["long"], expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("case", HALF)
def test_half_precision_loses_no_more_than_pytorch_does(interpreted, case):
    sequences, heads, d = case
    lengths = LENGTHS[sequences]
    tensors = inputs(lengths, heads, d, dtype="float16")
    expected, of_pytorch = exact(tensors, lengths, heads), eager(tensors, lengths, heads)
    for name in NAMES:
        found = interpreted[(*case, "float16")][name]
        assert found.dtype == of_pytorch[name].dtype
        error = relative_error(found, expected[name])
        allowed = 1.5 * relative_error(of_pytorch[name], expected[name])
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


def test_norms_before_torchs_attention_are_the_formula(interpreted):
    arguments, settings = stock_arguments()
    *leaves, _ = arguments
    exact = attention_formula(*leaves, lengths=LENGTHS["even"], heads=2)
    allowed = 1.5 * relative_error(attention_reference(*arguments, **settings), exact)
    assert interpreted["stock"].dtype == torch.float16
    assert 0 < relative_error(interpreted["stock"], exact) <= allowed


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_scores_stay_finite_and_right(interpreted, kind):
    lengths = LENGTHS["ragged"]
    expected = exact(inputs(lengths, 2, 64, kind=kind), lengths, 2)
    for name in NAMES:
        found = interpreted[kind][name]
        assert_close(found, expected[name].float(), rtol=1e-3, atol=2e-3)


def test_lengths_are_read_unless_the_longest_is_given():
    ends = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    packing = pack(ends, device=CPU)
    assert packing[1:] == (3, 5, 8)
    assert_close(packing.cumulative, ends, rtol=0, atol=0)
    assert pack(torch.zeros(1, dtype=torch.int32), device=CPU)[1:] == (0, 0, 0)
    meta = pack(ends.to("meta"), device=torch.device("meta"), longest=6)  # there are no values
    assert meta[1:] == (3, 6, None)
    assert pack_evenly(3, 100) == Packing(None, 3, 100, 300)


def test_sequences_do_not_see_each_other():
    tensors = inputs([5, 8], 2, 16)
    expected = eager(tensors, [5, 8], 2)["out"][:5]
    tensors["qkv"][5:] = 100.0
    assert_close(eager(tensors, [5, 8], 2)["out"][:5], expected, rtol=0, atol=0)


TYPES = {
    "qkv": "*{}",
    "q_gain": "*fp32",
    "k_gain": "*fp32",
    "rstd": "*fp32",
    "cumulative": "*i32",
    "out": "*{}",
    "d_out": "*{}",
    "lse": "*fp32",
    "delta": "*fp32",
    "sums": "*fp32",
    "d_qkv": "*{}",
    "d_gain": "*fp32",
    "num_tokens": "i32",
    "longest": "i32",
    "width": "i32",
    "heads": "i32",
    "span": "i32",
    "scale": "fp32",
    "eps": "fp32",
}
KERNELS = {
    "fwd": kernels._attention_fwd_kernel,
    "dq": kernels._attention_bwd_dq_kernel,
    "dkv": kernels._attention_bwd_dkv_kernel,
}
DOTS = {"fwd": 2, "dq": 3, "dkv": 4}


def compiled(kernel, capability, constants, **options):
    types = {name: TYPES[name].format("bf16") for name in kernel.arg_names if name not in constants}
    return build(
        kernel, capability, types=types, constants=constants, multiples_of_16=("width",), **options
    )


BUILDS = [(row, capability, True) for row in CONFIGS for capability in CAPABILITIES]
BUILDS += [(row, 90, False) for row in CONFIGS if row[2] == "short"]


@pytest.mark.parametrize(("row", "capability", "is_even"), BUILDS)
def test_the_kernels_compile_for_gpus(capability, row, is_even, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, block, _ = row
    config = CONFIGS[row]
    constants = {
        "EVEN": is_even,
        "HEAD": 64 if block == 64 else 88,  # of 88, the mask is compiled too
        "BLOCK": block,
        "TILE": config.tile,
        "STEP": config.step,
        "LOG2E": module.LOG2E,
        "HIDDEN": module.HIDDEN,
    }
    made = compiled(
        KERNELS[kernel],
        capability,
        constants,
        warps=config.warps,
        stages=config.stages,
        max_registers=config.max_registers,
        is_fused=True,
    )
    assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
    assert made.registers * 32 * config.warps <= 65536
    assert made.shared_bytes <= min(SHARED_LIMIT[capability], 99 * 1024), "of smaller GPUs too"
    assert made.matrix_instructions() >= DOTS[kernel], "a product is not by matrix instructions"
    assert "cp.async" in made.ptx, "the next rows are not read ahead"
    assert not {"atom", "red"} & {word.split(".")[0] for word in made.ptx.split()}, "an order"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_passes_of_the_norms_compile_for_gpus(capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rstd = compiled(
        kernels._rstd_kernel,
        capability,
        {"ROWS": module.RSTD_VALUES // 512, "BLOCK": 512},
        warps=module.RSTD_WARPS,
        is_fused=True,
    )
    norm = compiled(
        kernels._attention_bwd_norm_kernel,
        capability,
        {"HEADS": 8, "ROWS": module.NORM_ROWS, "COLUMNS": module.NORM_COLUMNS},
        warps=module.NORM_WARPS,
        is_fused=True,
    )
    for made in (rstd, norm):
        assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
        assert made.registers <= 128, "at least four programs run at once"
        assert made.shared_bytes <= SHARED_LIMIT[capability] // 8
        assert "ld.global.v4.b32" in made.ptx, "rows are read 16 bytes at a time"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"gains \[D\] with a D that 5 heads divide, got \[32\] and \[32\]"),
        ({"k_gain": torch.ones(31)}, r"got \[32\] and \[31\]"),
        ({"qkv": torch.zeros(7, 95)}, r"expected qkv \[7,96\] as the packing .* got \[7, 95\]"),
        ({"qkv": torch.zeros(8, 96)}, r"expected qkv \[7,96\] as the packing .* got \[8, 96\]"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"qkv": torch.zeros(7, 96), "q_gain": torch.ones(32), "k_gain": torch.ones(32)}
    arguments |= {"packing": packing_of([3, 4]), "heads": 2}
    with pytest.raises(ValueError, match=message):
        attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("cumulative", "message"),
    [
        (torch.tensor([0, 5]), "int32 .B.1., got torch.int64"),
        (torch.zeros(0, dtype=torch.int32), r"got torch.int32 \[0\]"),
        (torch.tensor([1, 5], dtype=torch.int32), r"start at 0 and do not fall, got \[1, 5\]"),
        (torch.tensor([0, 5, 4], dtype=torch.int32), r"got \[0, 5, 4\]"),
    ],
)
def test_what_cannot_be_lengths_is_refused(cumulative, message):
    with pytest.raises(ValueError, match=message):
        pack(cumulative, device=CPU)


def test_more_tokens_than_an_index_holds_are_refused():
    with pytest.raises(ValueError, match="100000 clips of 30000 tokens are more than 2147483647"):
        pack_evenly(100_000, 30_000)
