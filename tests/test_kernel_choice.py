"""Which operations run on a GPU: this project's kernels where they are right, or torch's."""

import importlib.util
import logging

import pytest
import torch
from interpret import interpret
from pydantic import ValidationError
from torch.testing import assert_close

from distill import kernel_choice, train
from distill.cache import build
from distill.cache.codes import Codec
from distill.errors import InputError, StateError
from distill.evaluation import evaluate
from distill.kernel_choice import using_kernels
from distill.kernels import (
    alignment,
    attention,
    coded_targets,
    codes,
    jit,
    linear_alignment,
    patch_embed,
    rmsnorm,
    self_check,
)
from distill.kernels.coded_targets import CodedTargets
from distill.objective import align_layers
from distill.recipe import Recipe, Run
from distill.students import create_student
from distill.students.vit import VideoViT, ViTSize
from distill.targets import CachedTargets

WIDTH = 176
HALF = torch.bfloat16


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, and is computed with on the CPU."""

    is_cuda = property(lambda self: True)


class KernelTaken(Exception):
    """Raised where a kernel would be launched."""


class Kernel:
    """In place of an autograd function, or of the function that launches a kernel."""

    def __call__(self, *arguments, **settings):
        raise KernelTaken

    apply = __call__


@pytest.fixture(autouse=True)
def chosen():
    """What other tests see stays as it was."""
    yield
    jit.choose(None)


def draw(*shape, dtype=torch.float32):
    stream = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=stream).to(dtype)


def coded():
    codec = Codec("4bit", means=draw(2, WIDTH))
    return codec, codec.encode(draw(3, 2, 5, WIDTH))


def codes_case(gpu):
    _, fields = coded()
    return codes.decode_codes(
        gpu(fields["codes"]), gpu(fields["scales"]), gpu(draw(16)), width=WIDTH
    )


def alignment_case(gpu):
    raw = [gpu(draw(3, 5, WIDTH)).requires_grad_() for _ in range(2)]
    vectors = [gpu(draw(WIDTH)) for _ in range(2)]
    return alignment.alignment(raw, vectors, vectors, gpu(draw(2, 3, 5, WIDTH)))


def losses_alone_case(gpu):
    with torch.no_grad():
        return alignment_case(gpu)


def coded_targets_case(gpu):
    codec, fields = coded()
    targets = codec.targets(fields["codes"], fields["scales"])
    return coded_targets.decode_targets(CodedTargets(*map(gpu, targets)), HALF)


def linear_alignment_case(gpu):
    states = [gpu(draw(3, 5, 24)).requires_grad_() for _ in range(2)]
    weights, vectors = [draw(WIDTH, 24)] * 2, [draw(WIDTH)] * 2
    targets = gpu(draw(2, 3, 5, WIDTH))
    return linear_alignment.linear_alignment(states, weights, vectors, vectors, vectors, targets)


def linear_losses_alone_case(gpu):
    with torch.no_grad():
        return linear_alignment_case(gpu)


def patch_embed_case(gpu):
    patches = gpu(torch.arange(24, dtype=torch.uint8).view(2, 12))
    weight, bias = draw(4, 12, dtype=HALF), draw(4, dtype=HALF)
    return patch_embed.patch_embed(patches, weight, bias, mean=(0.5,) * 3, std=(0.2,) * 3)


def attention_case(gpu):
    packing = attention.pack_evenly(2, 5)
    return attention.attention(gpu(draw(10, 96, dtype=HALF)), draw(32), draw(32), packing, heads=2)


def rmsnorm_case(gpu):
    return rmsnorm.rmsnorm(gpu(draw(2, 5, 32)), gpu(draw(32)))[1]


def stock_attention_case(gpu):
    packing, gains = attention.pack_evenly(2, 5), (draw(32), draw(32))
    return attention.stock_attention(gpu(draw(10, 96, dtype=HALF)), *gains, packing, heads=2)


CASES = {
    "codes": (codes, "_decode_codes_fwd", codes_case),
    "alignment": (alignment, "_Alignment", alignment_case),
    "losses alone": (alignment, "_alignment_fwd", losses_alone_case),
    "coded targets": (coded_targets, "_decode_targets_fwd", coded_targets_case),
    "linear alignment": (linear_alignment, "_LinearAlignment", linear_alignment_case),
    "linear losses alone": (alignment, "_alignment_fwd", linear_losses_alone_case),
    "patch embedding": (patch_embed, "_PatchEmbed", patch_embed_case),
    "attention": (attention, "_Attention", attention_case),
    "norm": (rmsnorm, "_RMSNorm", rmsnorm_case),
    "norms before torch's attention": (rmsnorm, "_RMSNorm", stock_attention_case),
}


def on_gpu(tensor):
    return tensor.as_subclass(OnGPU)


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """An operation whose kernel raises `KernelTaken`."""
    module, name, call = CASES[request.param]
    monkeypatch.setattr(module, name, Kernel())
    return call


def test_on_a_gpu_torch_is_taken_unless_kernels_are_chosen(case):
    expected = case(lambda tensor: tensor)
    assert_close(case(on_gpu).as_subclass(torch.Tensor), expected, rtol=0, atol=0)
    jit.choose("triton")
    with pytest.raises(KernelTaken):
        case(on_gpu)
    jit.choose("torch")
    assert_close(case(on_gpu).as_subclass(torch.Tensor), expected, rtol=0, atol=0)


def test_on_a_cpu_kernels_are_never_taken(case):
    expected = case(lambda tensor: tensor)
    jit.choose("triton")
    assert_close(case(lambda tensor: tensor), expected, rtol=0, atol=0)


def test_a_process_takes_torch_and_a_recipe_what_is_proven():
    spec = importlib.util.spec_from_file_location("fresh_jit", jit.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert [fresh._chosen, Run().kernels] == [None, "auto"]
    assert fresh.uses_triton(on_gpu(torch.ones(1))) is False


def test_codes_are_handed_to_the_loss_only_where_its_kernels_decode_them():
    codec, fields = coded()
    batch = {
        "clip_id": torch.arange(3),
        "epoch": 0,
        "tokens": torch.arange(4).expand(3, 4),
        "patches": torch.zeros(3, 4, 588, dtype=torch.uint8),
        "codes": on_gpu(fields["codes"]),
        "scales": on_gpu(fields["scales"]),
        "pooled": torch.ones(3, 8),
        "attention": torch.ones(3, 8),
    }
    expected = codec.decode(fields["codes"], fields["scales"]).transpose(0, 1)
    middle = CachedTargets(codec)(batch)["middle"]
    assert_close(middle.as_subclass(torch.Tensor), expected, rtol=0, atol=0)
    jit.choose("triton")
    assert isinstance(CachedTargets(codec)(batch)["middle"], CodedTargets)


def test_a_model_on_a_gpu_takes_no_kernel_unless_they_are_chosen(monkeypatch):
    torch.manual_seed(0)
    model = VideoViT(ViTSize(32, 2, 2, layer_scale=1.0), frames=2, image_size=28)
    patches = torch.randint(0, 256, (2, 8, 588), dtype=torch.uint8)
    expected = model.encode(patches)[0]
    assert_close(
        model.encode(on_gpu(patches))[0].as_subclass(torch.Tensor), expected, rtol=0, atol=0
    )
    for module, name in ((attention, "_Attention"), (rmsnorm, "_RMSNorm")):
        monkeypatch.setattr(module, name, Kernel())
    jit.choose("triton")
    with pytest.raises(KernelTaken):
        model.encode(on_gpu(patches))


@pytest.mark.parametrize("decoder", ["mlp", "linear"])
def test_a_students_last_linears_are_part_of_the_loss(decoder, monkeypatch):
    student = create_student(
        ViTSize(48, 2, 3, pooled_width=32),
        frames=2,
        image_size=28,
        teacher_width=WIDTH,
        teacher_pooled=16,
        num_layers=2,
        decoder=decoder,
    )
    states, targets = [draw(3, 5, 48) for _ in range(2)], draw(2, 3, 5, WIDTH)
    heads = student.clip_decoder
    projected = [decode.head(x) for decode, x in zip(heads, states, strict=True)]
    norms = [list(x) for x in zip(*(decode.norm.parameters() for decode in heads), strict=True)]
    expected = alignment.alignment(projected, *norms, targets)
    found = align_layers(heads, states, targets, upstream=0.5)
    assert_close(found, expected, rtol=0, atol=0)
    leaves = list(heads.parameters())
    gradients = [torch.autograd.grad(x.sum(), leaves) for x in (found, expected)]
    assert_close(*gradients, rtol=0, atol=0)

    monkeypatch.setattr(linear_alignment, "_LinearAlignment", Kernel())
    jit.choose("triton")
    with pytest.raises(KernelTaken):
        align_layers(heads, [on_gpu(x) for x in states], targets, upstream=0.5)


def recipe(kernels, objective):
    return Recipe.model_validate(
        {
            "run": {"kernels": kernels},
            "data": {"train": {"list": "clips.csv"}},
            "model": {"size": "S14"},
            "objective": objective,
            "optim": {"lr": 1e-3, "batch_size": 4, "epochs": 1},
        }
    )


DISTILL = {
    "kind": "distill",
    "teacher": {"size": "S14", "random": True, "layers": 2, "interval": 1.0},
    "cache": {"folder": "cache"},
}
CLASSIFY = {"kind": "classify", "num_classes": 3}
STARTS = {  # what of a module runs with the recipe's kernels, and what comes to it
    "training": (
        train,
        DISTILL,
        "open_cache",
        lambda one: train.train_unfinished([(one, None)] * 2),
    ),
    "a build of a cache": (build, DISTILL, "cached_teachers", build.build_cache),
    "evaluation": (evaluate, CLASSIFY, "evaluate", lambda one: evaluate.evaluate_recipe(one, "w")),
}


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
@pytest.mark.parametrize("start", STARTS)
def test_a_run_takes_the_recipes_kernels_and_leaves_none_behind(
    start, kernels, monkeypatch, tmp_path
):
    module, objective, name, call = STARTS[start]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.csv").write_text("a.mp4,0\n")
    monkeypatch.setattr(build, "check_videos", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "build_classifier", lambda recipe: torch.nn.Linear(1, 1))
    monkeypatch.setattr(evaluate, "load_weights", lambda *arguments, **settings: None)
    chosen = []

    def stop(*arguments, **settings):
        chosen.append(jit._chosen)
        raise KernelTaken

    monkeypatch.setattr(module, name, stop)
    other = {"torch": "triton", "triton": "torch", "auto": None}[kernels]
    jit.choose(other)
    with pytest.raises(KernelTaken):
        call(recipe(kernels, objective))
    taken = "torch" if kernels == "auto" else kernels  # which a CPU takes without a check
    assert (chosen, jit._chosen) == ([taken], other)


def test_a_recipe_takes_no_other_kernels():
    with pytest.raises(ValidationError, match="Input should be 'auto', 'torch' or 'triton'"):
        recipe("cuda", CLASSIFY)
    with pytest.raises(ValueError, match="kernels must be one of torch, triton, got 'cuda'"):
        jit.choose("cuda")


GPU = torch.device("cuda")


@pytest.fixture
def check(monkeypatch):
    """In place of the check on a GPU: what it finds wrong by dtype, and the dtypes it ran in."""
    wrong, seen = {}, []

    def found(device, dtype):
        seen.append(dtype)
        if isinstance(wrong.get(dtype), Exception):
            raise wrong[dtype]
        return wrong.get(dtype, {})

    monkeypatch.setattr(jit, "triton", object())
    monkeypatch.setattr(kernel_choice, "self_check", found)
    kernel_choice._proven.cache_clear()
    yield wrong, seen
    kernel_choice._proven.cache_clear()


def chosen_by(*recipes, device=GPU):
    with using_kernels(recipes, device):
        return jit.chosen()


def in_precision(precision, *, kernels="auto", teacher="bf16"):
    section = {**DISTILL["teacher"], "precision": teacher}
    one = recipe(kernels, {**DISTILL, "teacher": section})
    return one.model_copy(update={"optim": one.optim.model_copy(update={"precision": precision})})


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_log_says_once_on_a_gpu_which_kernels_run(kernels, check, caplog):
    jit.choose(None)
    one = recipe(kernels, CLASSIFY)
    with caplog.at_level(logging.INFO, logger="distill.kernel_choice"):
        with using_kernels([one], torch.device("cpu")):
            assert caplog.messages == []
        with using_kernels([one], GPU):
            with using_kernels([one], GPU):  # a run within a run
                pass
            assert jit._chosen == kernels
        assert caplog.messages == [f"kernels on cuda: {kernels}"]
        assert chosen_by(one) == kernels  # the next one
    assert caplog.messages == [f"kernels on cuda: {kernels}"] * 2
    assert jit._chosen is None and check[1] == []


def test_kernels_that_pass_their_check_are_the_default_on_a_gpu(check, caplog):
    one = in_precision("fp16")
    with caplog.at_level(logging.INFO, logger="distill.kernel_choice"):
        assert chosen_by(one, device=torch.device("cpu")) == "torch"
        assert (caplog.messages, check[1]) == ([], [])
        with using_kernels([one, in_precision("fp32")], GPU):
            assert chosen_by(in_precision("bf16")) == "triton"  # a run within a run
    (message,) = caplog.messages
    assert message.startswith("kernels on cuda: triton (right in bf16, fp16, fp32 by a check of ")
    assert check[1] == [torch.bfloat16, torch.float16, torch.float32]
    assert chosen_by(one, in_precision("fp32")) == "triton"
    assert len(check[1]) == 3, "once in a process"


def test_kernels_that_fail_their_check_are_named_and_torchs_are_taken(check, caplog):
    check[0][torch.float16] = {"rmsnorm": "is off by 2.0e-01", "attention": "TypeError: no"}
    one = in_precision("fp16")
    with caplog.at_level(logging.INFO, logger="distill.kernel_choice"):
        assert [chosen_by(one), chosen_by(one)] == ["torch"] * 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "kernels on cuda: torch's operations are taken, since this project's fail their check: "
        "rmsnorm is off by 2.0e-01; attention TypeError: no; run.kernels=torch takes them without "
        "a check"
    ]
    assert len(check[1]) == 2, "bf16 of the teacher and fp16, once"


def test_all_processes_take_torch_where_the_check_fails_in_one(check, caplog, monkeypatch):
    monkeypatch.setattr(kernel_choice, "exchange", lambda count: [(count,), (2,)])
    assert chosen_by(in_precision("bf16")) == "torch"
    assert "fail their check: in the process of rank 1, which says why; run" in caplog.text


def test_without_triton_the_default_is_torch_and_its_name_is_refused(check, monkeypatch, caplog):
    monkeypatch.setattr(jit, "triton", None)
    assert chosen_by(in_precision("bf16")) == "torch"
    assert "triton is not installed" in caplog.text and check[1] == []
    one = recipe("triton", CLASSIFY)
    with pytest.raises(InputError, match="Triton is not installed; .* run.kernels=torch"):
        chosen_by(one)
    with using_kernels([one], torch.device("cpu")):
        assert jit.uses_triton(torch.ones(1)) is False


def test_a_kernel_that_takes_the_device_down_ends_the_run_with_what_to_do(check):
    check[0][torch.bfloat16] = RuntimeError("down; run again with run.kernels=torch")
    with pytest.raises(StateError, match="run again with run.kernels=torch"):
        chosen_by(in_precision("bf16"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What the check says in Triton's interpreter: of kernels as they are, and of broken ones."""
    broken = {"attention.LOG2E": 1.0, "rmsnorm._rmsnorm_fwd_kernel": None}
    calls = {
        "half": ("applied.self_checked", ("float16", (), {}), {}),
        "single": ("applied.self_checked", ("float32", ("linear_alignment",), {}), {}),
        "broken": ("applied.self_checked", ("float16", ("attention", "rmsnorm"), broken), {}),
    }
    return interpret(calls, tmp_path_factory.mktemp("interpreter"))


def test_the_check_passes_kernels_that_are_right(checked):
    assert (checked["half"], checked["single"]) == ({}, {})


def test_the_check_names_kernels_that_are_wrong_or_do_not_launch(checked):
    assert set(checked["broken"]) == {"attention", "rmsnorm"}
    assert checked["broken"]["attention"].startswith("is off by 1.")
    assert checked["broken"]["rmsnorm"].startswith("TypeError: 'NoneType' object is not")


def test_the_check_leaves_the_choice_and_the_generators_alone():
    jit.choose("torch")
    before = torch.get_rng_state()
    device = torch.device("cpu")
    assert self_check.self_check(device, torch.float32) == {}  # references against themselves
    assert (jit.chosen(), torch.equal(torch.get_rng_state(), before)) == ("torch", True)
    kernels = {case.kernel for case in self_check.cases(device, torch.bfloat16)}
    modules = (alignment, attention, coded_targets, codes, linear_alignment, patch_embed, rmsnorm)
    assert kernels == {module.__name__.rsplit(".", 1)[1] for module in modules}
