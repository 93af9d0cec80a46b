import pytest
import torch
from formulas import attention_formula, relative_error
from interpret import interpret
from torch.testing import assert_close

from distill.kernels import attention as module
from distill.kernels.attention import CONFIGS, TILES, attention, pack, pack_evenly
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build

CPU = torch.device("cpu")
NAMES = ("out", "qkv", "q_gain", "k_gain")  # the output, then the gradients
LENGTHS = {  # one key less and one more than a tile; a tile and a bit; nothing at all
    "ragged": [1, 17, 0, 67],
    "tile": [64, 63, 65],
    "long": [1030],
    "nothing": [0, 0],
}
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
]
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
    cumulative = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    half = getattr(torch, dtype)
    return {
        "qkv": qkv.to(half),
        "q_gain": gains[0].clone(),
        "k_gain": gains[1].clone(),
        "cumulative": cumulative,
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


def eager(tensors, heads):
    packing = pack(tensors["cumulative"], device=CPU)
    return with_gradients(lambda *leaves: attention(*leaves, packing, heads=heads), tensors)


def name_of(case):
    return "-".join(map(str, case)).replace(" ", "_")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Outputs and gradients of every case from the kernels in Triton's interpreter."""
    cases = {}
    for sequences, heads, d in CASES:
        for dtype in ("float32", "float16"):  # bfloat16 is wrong in Triton's interpreter
            tensors = inputs(LENGTHS[sequences], heads, d, dtype=dtype)
            cases[name_of((sequences, heads, d, dtype))] = (tensors, {"heads": heads})
    cases["long"] = (inputs(LENGTHS["long"], 1, 64), {"heads": 1})
    for kind in EXTREME:
        cases[name_of([kind])] = (inputs(LENGTHS["ragged"], 2, 64, kind=kind), {"heads": 2})
    return interpret(tmp_path_factory.mktemp("interpreter"), "attention", cases)


@pytest.mark.parametrize("lengths", [[1, 17, 0, 67], [9, 9, 9], [5], [0, 0], []])
@pytest.mark.parametrize(("heads", "d"), [(2, 64), (3, 88), (1, 128), (3, 16)])
def test_the_reference_is_the_formula_with_gradients(lengths, heads, d):
    tensors = inputs(lengths, heads, d)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected = exact(tensors, lengths or [0], heads)
    assert_close(eager(wide, heads), expected, rtol=1e-9, atol=1e-10)
    assert_close(
        eager(tensors, heads),
        {name: tensor.float() for name, tensor in expected.items()},
        **TOLERANCE["float32"],
    )


@pytest.mark.parametrize(("sequences", "heads", "d"), CASES)
def test_the_kernels_are_the_formula_and_write_every_element(interpreted, sequences, heads, d):
    lengths = LENGTHS[sequences]
    expected = exact(inputs(lengths, heads, d), lengths, heads)
    case = name_of((sequences, heads, d, "float32"))
    found = {name: interpreted[f"{case}.{name}"] for name in NAMES}
    expected = {name: tensor.float() for name, tensor in expected.items()}
    assert_close(found, expected, **TOLERANCE["float32"])


def test_sequences_of_large_tiles_are_the_formula(interpreted):
    expected = exact(inputs(LENGTHS["long"], 1, 64), LENGTHS["long"], 1)
    found = {name: interpreted[f"long.{name}"] for name in NAMES}
    expected = {name: tensor.float() for name, tensor in expected.items()}
    assert_close(found, expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "nothing"])
def test_half_precision_loses_no_more_than_pytorch_does(interpreted, case):
    sequences, heads, d = case
    lengths = LENGTHS[sequences]
    tensors = inputs(lengths, heads, d, dtype="float16")
    expected, of_pytorch = exact(tensors, lengths, heads), eager(tensors, heads)
    for name in NAMES:
        found = interpreted[f"{name_of((*case, 'float16'))}.{name}"]
        assert found.dtype == of_pytorch[name].dtype
        error = relative_error(found, expected[name])
        allowed = 1.5 * relative_error(of_pytorch[name], expected[name])
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_scores_stay_finite_and_right(interpreted, kind):
    lengths = LENGTHS["ragged"]
    expected = exact(inputs(lengths, 2, 64, kind=kind), lengths, 2)
    for name in NAMES:
        found = interpreted[f"{name_of([kind])}.{name}"]
        assert_close(found, expected[name].float(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("size", TILES)
def test_tiles_cover_every_token_of_its_sequence_once(size):
    lengths = [1, 0, 2 * size, size + 1, 0, 3]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tiles = pack(ends, device=CPU).tiles[TILES.index(size)]
    assert tiles.dtype == torch.int32
    covered = [
        (sequence, token)
        for first, begin, end in tiles.tolist()
        for sequence in [ends.tolist().index(begin, ends.tolist().index(end) - 1)]
        for token in range(first, min(first + size, end))
    ]
    expected = [
        (sequence, token)
        for sequence in range(len(lengths))
        for token in range(int(ends[sequence]), int(ends[sequence + 1]))
    ]
    assert covered == expected


def test_an_even_packing_is_made_once_and_fits_training_after_inference():
    with torch.inference_mode():
        packing = pack_evenly(3, 100, device=CPU)
    assert pack_evenly(3, 100, device=CPU) is packing
    assert (packing.ends, packing.lengths) == ((0, 100, 200, 300), (100, 100, 100))
    assert (packing.num_tokens, packing.longest) == (300, 100)
    assert not any(tiles.is_inference() for tiles in packing.tiles)


def test_sequences_do_not_see_each_other():
    tensors = inputs([5, 8], 2, 16)
    expected = eager(tensors, 2)["out"][:5]
    tensors["qkv"][5:] = 100.0
    assert_close(eager(tensors, 2)["out"][:5], expected, rtol=0, atol=0)


TYPES = {
    "qkv": "*{}",
    "q_gain": "*fp32",
    "k_gain": "*fp32",
    "rstd": "*fp32",
    "tiles": "*i32",
    "out": "*{}",
    "d_out": "*{}",
    "lse": "*fp32",
    "delta": "*fp32",
    "sums": "*fp32",
    "d_qkv": "*{}",
    "d_gain": "*fp32",
    "num_tokens": "i32",
    "width": "i32",
    "heads": "i32",
    "span": "i32",
    "scale": "fp32",
    "eps": "fp32",
}
KERNELS = {
    "fwd": module._attention_fwd_kernel,
    "dq": module._attention_bwd_dq_kernel,
    "dkv": module._attention_bwd_dkv_kernel,
}
DOTS = {"fwd": 2, "dq": 3, "dkv": 4}


def compiled(kernel, capability, constants, **options):
    types = {name: TYPES[name].format("bf16") for name in kernel.arg_names if name not in constants}
    return build(
        kernel, capability, types=types, constants=constants, multiples_of_16=("width",), **options
    )


@pytest.mark.parametrize("row", CONFIGS, ids=lambda row: "-".join(map(str, row)))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_for_gpus(capability, row, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, block, _ = row
    config = CONFIGS[row]
    constants = {
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
        module._rstd_kernel,
        capability,
        {"ROWS": module.RSTD_VALUES // 512, "BLOCK": 512},
        warps=module.RSTD_WARPS,
        is_fused=True,
    )
    norm = compiled(
        module._attention_bwd_norm_kernel,
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


def packing_of(lengths):
    return pack(torch.tensor([0, *lengths]).cumsum(0).int(), device=CPU)


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
        pack_evenly(100_000, 30_000, device=CPU)
