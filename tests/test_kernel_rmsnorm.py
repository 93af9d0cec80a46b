import pytest
import torch
from formulas import relative_error, rmsnorm_formula
from interpret import interpret
from residual import FORMS, INPUTS, LEAVES, exact, inputs, with_gradients
from torch.testing import assert_close

from distill.kernels import rmsnorm as module
from distill.kernels.gpu_build import CAPABILITIES, SHARED_LIMIT, build
from distill.kernels.rmsnorm import rmsnorm
from distill.students.vit import SIZES, Block, LayerScale, ViTSize

SHAPES = ((3, 1, 1), (2, 5, 17), (3, 67, 64), (7, 384), (2, 3, 1408), (0, 5, 64), (2, 2, 3200))
# of x, the branch and the parameters: float32, half precision, and under autocast
TYPES = {
    "float32": ("float32", "float32", "float32"),
    "half": ("float16", "float16", "float16"),
    "autocast": ("float32", "float16", "float32"),
}
WIDE = ((2, 3, 1408), (2, 2, 3200))
CASES = [(x, form, "float32") for x in SHAPES for form in FORMS if x not in WIDE or form == "all"]
CASES += [((3, 67, 64), form, types) for form in FORMS for types in ("half", "autocast")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def eager(tensors):
    def call(x, weight=None, **others):
        return rmsnorm(x, weight, **others)

    return with_gradients(call, tensors)


def call_of(shape, form, types, **changes):
    """The operation with its gradients."""
    tensors = inputs(shape, form, TYPES[types])
    leaves = {name: tensors[name].requires_grad_() for name in LEAVES if name in tensors}
    arguments = (leaves.pop("x"), leaves.pop("weight", None))
    upstream = [tensors[name] for name in ("d_h", "d_out") if name in tensors]
    settings = {**leaves, "keep": tensors.get("keep"), **changes}
    return "applied.gradients", ("rmsnorm.rmsnorm", arguments, settings, upstream), {}


PARTS = ("parts of rows", "rows")


def parts_and_rows():
    """Arguments of the norm: the middle thirds of longer rows, and the same by themselves."""
    packed = torch.randn(9, 3 * 65, generator=torch.Generator().manual_seed(0)).half()
    part, weight = packed[:, 65:130], torch.linspace(-1, 2, 65)
    return (part, weight), (part.clone(), weight)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the operation makes of every case in Triton's interpreter, gradients as `d_NAME`."""
    calls = {case: call_of(*case) for case in CASES}
    narrow = ((3, 67, 64), "all", "autocast")
    calls["narrow"] = call_of(*narrow, dtype=torch.float16)
    parts = {
        name: ("rmsnorm.rmsnorm", rows, {})
        for name, rows in zip(PARTS, parts_and_rows(), strict=True)
    }
    calls |= {name: ("applied.without_gradients", call, {}) for name, call in parts.items()}
    made = interpret(calls, tmp_path_factory.mktemp("interpreter"))
    found = {name: made.pop(name) for name in PARTS}
    for case, (outputs, gradients) in made.items():
        form = FORMS[narrow[1] if case == "narrow" else case[1]]
        names = [name for name, of in (("h", "branch"), ("out", "weight")) if of in form]
        leaves = [name for name in ("x", "weight", "branch", "gamma") if name in form]
        found[case] = dict(zip(names, outputs, strict=True))
        found[case] |= {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula_with_gradients(shape, form):
    tensors = inputs(shape, form, TYPES["float32"])
    expected = {name: tensor.float() for name, tensor in exact(tensors).items()}
    assert_close(eager(tensors), expected, **TOLERANCE)


@pytest.mark.parametrize(("shape", "form"), [case[:2] for case in CASES if case[2] == "float32"])
def test_the_kernels_are_the_formula_and_write_every_element(interpreted, shape, form):
    expected = exact(inputs(shape, form, TYPES["float32"]))
    assert_close(
        interpreted[shape, form, "float32"],
        {name: tensor.float() for name, tensor in expected.items()},
        **TOLERANCE,
    )


@pytest.mark.parametrize("types", ["half", "autocast"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_loses_no_more_than_pytorch_does(interpreted, form, types):
    shape = (3, 67, 64)
    tensors = inputs(shape, form, TYPES[types])
    expected, of_pytorch = exact(tensors), eager(tensors)
    for name in expected:
        found = interpreted[shape, form, types][name]
        assert found.dtype == of_pytorch[name].dtype
        error = relative_error(found, expected[name])
        allowed = 1.5 * relative_error(of_pytorch[name], expected[name])
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


def test_rows_may_be_parts_of_longer_ones(interpreted):
    (_, part), (_, rows) = (interpreted[name] for name in PARTS)
    assert_close(part, rows, rtol=0, atol=0)
    x, weight = parts_and_rows()[0]
    _, expected = rmsnorm_formula(x, weight, None, None, None)
    assert_close(part.double(), expected, rtol=1e-3, atol=1e-3)


def test_rows_may_be_normalised_into_a_narrower_type(interpreted):
    tensors = inputs((3, 67, 64), "all", TYPES["autocast"])
    wide = interpreted[(3, 67, 64), "all", "autocast"]["out"]
    assert interpreted["narrow"]["h"].dtype == torch.float32
    assert_close(interpreted["narrow"]["out"], wide.half(), rtol=0, atol=0)
    arguments = {name: tensors[name] for name in INPUTS}
    _, found = rmsnorm(**arguments, dtype=torch.float16)
    assert_close(found, rmsnorm(**arguments)[1].half(), rtol=0, atol=0)


def test_the_norm_sees_the_rows_that_are_kept():
    """As PyTorch's own, and so that the backward has the rows that the forward had."""
    tensors = inputs((3, 67, 64), "all", TYPES["half"])
    h, out = rmsnorm(**{name: tensors[name] for name in INPUTS})
    assert_close(rmsnorm(h, tensors["weight"]), (h, out), rtol=0, atol=0)


@pytest.mark.parametrize("types", TYPES)
def test_the_reference_is_the_block_of_students_bit_by_bit(types):
    tensors = inputs((3, 67, 64), "all", TYPES[types])
    block = Block(ViTSize(64, 2, 2), activation="gelu")
    scale, norm = LayerScale(64, init=1.0), block.norm2
    scale.gamma = torch.nn.Parameter(tensors["gamma"])
    norm.weight = torch.nn.Parameter(tensors["weight"])
    h = tensors["x"] + scale(tensors["branch"]) * tensors["keep"].to(tensors["x"])[:, None, None]
    found = rmsnorm(**{name: tensors[name] for name in INPUTS})
    assert_close(found, (h, norm(h)), rtol=0, atol=0)


POINTERS = {
    "gamma": "fp32",
    "weight": "fp32",
    "keep": "fp32",
    "rstd": "fp32",
    "d_gamma": "fp32",
    "d_weight": "fp32",
    "branch": "bf16",
    "d_branch": "bf16",
    "out": "bf16",
    "d_out": "bf16",
}


# The stream is float32 wherever this project trains.
BUILDS = [(capability, "fp32") for capability in CAPABILITIES] + [(90, "bf16")]


@pytest.mark.parametrize("size", ["S14", "6B"])
@pytest.mark.parametrize(("capability", "residual"), BUILDS)
def test_the_kernels_compile_for_gpus(capability, size, residual, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(1, SIZES[size].width)
    _, _, constants = module._launch(x, branch=x, keep=x, weight=x)
    warps = constants.pop("num_warps")
    for kernel in (module._rmsnorm_fwd_kernel, module._rmsnorm_bwd_kernel):
        types = {name: f"*{POINTERS.get(name, residual)}" for name in kernel.arg_names}
        types |= dict.fromkeys(("num_rows", "width", "x_stride", "rows_per_clip", "span"), "i32")
        types |= {"eps": "fp32"}
        types = {name: types[name] for name in kernel.arg_names if name not in constants}
        made = build(
            kernel,
            capability,
            types=types,
            constants=constants,
            warps=warps,
            is_fused=True,
            multiples_of_16=("width", "x_stride") if "x_stride" in types else ("width",),
        )
        assert (made.stack_bytes, made.local_bytes) == (0, 0), "registers are spilled"
        assert made.registers <= 128, "of 65,536: at least 16 warps run at once"
        assert made.shared_bytes <= SHARED_LIMIT[capability] // 8
        assert "ld.global.v4.b32" in made.ptx, "rows are read 16 bytes at a time"
        assert "st.global.v4.b32" in made.ptx, "rows are written 16 bytes at a time"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"expected weight \[4\] as rows, got \[5\]"),
        ({"gamma": torch.ones(5)}, r"expected gamma \[4\] as rows, got \[5\]"),
        ({"gamma": None}, "a branch needs its gains gamma"),
        ({"branch": None, "gamma": None}, "they and keep need a branch"),
        ({"branch": torch.ones(2, 4, 4)}, r"a branch \[2, 3, 4\] as x, got \[2, 4, 4\]"),
        ({"keep": torch.ones(3)}, r"expected keep \[2\] for x, got \[3\]"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"x": torch.ones(2, 3, 4), "branch": torch.ones(2, 3, 4)}
    arguments |= {"weight": torch.ones(4), "gamma": torch.ones(4), "keep": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        rmsnorm(**{**arguments, **change})


def test_nothing_to_add_and_no_norm_is_x_itself():
    x = torch.ones(2, 3)
    h, out = rmsnorm(x, None)
    assert (h is x, out) == (True, None)
