"""The formulas against a FLOP counter, real records and real saved tensors."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.cache.codes import Codec
from distill.cache.live import other_teachers
from distill.cache.record import record_arrays
from distill.cost import (
    activation_bytes,
    block_macs,
    forward_macs,
    num_tokens,
    pool_macs,
    record_bytes,
    record_tokens,
    student_cost,
    teacher_macs,
    teacher_parameters,
)
from distill.models import build_model, build_teacher
from distill.objective import ClassifyObjective, DistillObjective
from distill.recipe import MAIN, Recipe
from distill.students.vit import SIZES, VideoViT, ViTSize
from distill.targets import view_records
from distill.teachers import create_teacher

BATCH = 2
SIZE = {"width": 96, "depth": 3, "heads": 3, "mlp_ratio": 48 / 11, "pooled_width": 64}
TEACHER = {"width": 176, "depth": 6, "heads": 2, "pooled_width": 80}


def make_recipe(objective: dict, *, model: dict | None = None, optim: dict | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "train": {"list": None, "num_clips": 100},
                "views": {"frames": 4, "image_size": 56},
            },
            "model": {"size": SIZE, **(model or {})},
            "objective": objective,
            "optim": {"lr": 1e-3, "batch_size": 8, "epochs": 3, **(optim or {})},
        }
    )


def distill(**section) -> dict:
    teacher = {"size": TEACHER, "random": True, "layers": 2, "interval": 1.5}
    return {"kind": "distill", "teacher": teacher, "cache": {"folder": "c"}, **section}


OTHERS = {
    "mae": {
        "kind": "videomae",
        "size": {"width": 112, "depth": 4, "heads": 2},
        "random": True,
        "frames": 8,
        "layers": 3,
        "interval": 1,
    },
    "video": {"size": TEACHER, "random": True, "layers": 1, "decoder": "linear"},
}
INTERNVL = {"kind": "internvl", "size": TEACHER, "random": True, "layers": 2, "interval": 1}
PER_FRAME = {"kind": "attention-per-frame", "ratio": 0.7}


def classify(**section) -> dict:
    return {"kind": "classify", "num_classes": 7, **section}


def run_step(recipe: Recipe, *, backward: bool = True, clips: int = BATCH) -> None:
    model = build_model(recipe).train()
    patches, visible = num_tokens(recipe)
    batch = {"clip_id": torch.arange(clips), "epoch": 0}
    if recipe.objective.kind == "classify":
        objective = ClassifyObjective(model, recipe.objective, seed=0)
        batch["pixels"] = torch.zeros(clips, 3, 4, 56, 56, dtype=torch.uint8)
        batch["label"] = torch.zeros(clips, dtype=torch.long)
    else:
        objective = DistillObjective(model, recipe.objective, seed=0)
        batch["patches"] = torch.zeros(clips, visible, 588, dtype=torch.uint8)
        batch["tokens"] = torch.arange(visible).expand(clips, -1)
        batch["middle"] = torch.ones(2, clips, visible + 1, TEACHER["width"])
        batch["pooled"] = torch.ones(clips, TEACHER["pooled_width"])
        for name, teacher in recipe.objective.others.items():
            rows = visible + (name == "video")
            shape = (teacher.layers, clips, rows, teacher.size.width)
            batch[f"middle.{name}"] = torch.ones(shape)
    loss = objective(batch)["loss"]
    if backward:
        loss.backward()


def count_tflop(recipe: Recipe, *, backward: bool = True) -> float:
    # Attention as plain products: the fused kernel's backward is counted with its recomputation.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_step(recipe, backward=backward)
    return counter.get_total_flops() / BATCH / 1e12


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        (distill(), {}),
        (distill(decoder="linear"), {}),
        (distill(mask={"kind": "tube", "ratio": 0.6}), {}),
        (distill(), {"checkpoint_blocks": 2}),
        (distill(others=OTHERS, mask=PER_FRAME), {}),
        (classify(), {}),
        (classify(trainable="pool"), {}),
        (classify(trainable="head"), {}),
        (classify(), {"tubelet": 2}),
    ],
)
def test_step_formula_equals_the_counted_flops(objective, model):
    recipe = make_recipe(objective, model=model)
    cost = student_cost(recipe)
    assert cost.forward == pytest.approx(count_tflop(recipe, backward=False), rel=1e-12)
    assert cost.step == pytest.approx(count_tflop(recipe), rel=1e-12)


def test_teacher_formula_equals_the_counted_flops():
    size = ViTSize(**TEACHER)
    model = VideoViT(size, frames=4, image_size=56)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        patches, _ = model.select_patches(torch.zeros(1, 3, 4, 56, 56), None)
        model.clip_projector(model.encode(patches)[0])
    assert counter.get_total_flops() == 2 * forward_macs(size, 64)


@pytest.mark.parametrize("name", ["", "mae", "video"])
def test_every_teachers_formula_equals_the_counted_flops(name):
    recipe = make_recipe(distill(teacher=INTERNVL, others=OTHERS))
    teacher = build_teacher(recipe, name)
    clip = torch.zeros(1, 3, 8, 56, 56, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.hidden(clip)
    assert counter.get_total_flops() == 2 * teacher_macs(recipe, name)
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    assert parameters == teacher_parameters(recipe, name)


@pytest.mark.parametrize(
    ("codes", "tokens"), [("fp16", "visible"), ("4bit", "superset"), ("8bit", "all")]
)
def test_record_bytes_are_those_of_several_teachers(codes, tokens):
    cache = {"folder": "c", "codes": codes, "tokens": tokens}
    recipe = make_recipe(distill(teacher=INTERNVL, others=OTHERS, mask=PER_FRAME, cache=cache))
    teachers = {name: build_teacher(recipe, name) for name in recipe.objective.teachers}
    batch = {
        "clip_id": torch.tensor([3]),
        "view": torch.tensor([0]),
        "pixels": torch.zeros(1, 3, 8, 56, 56, dtype=torch.uint8),
    }
    records = view_records(
        teachers[MAIN],
        batch,
        mask=recipe.objective.mask,
        seed=0,
        tokens=tokens,
        others=other_teachers(recipe, teachers),
    )
    means = {
        name: None if codes == "fp16" else torch.zeros(section.layers, teachers[name].embed_dim)
        for name, section in recipe.objective.teachers.items()
    }
    others = {name: Codec(codes, means=own) for name, own in means.items() if name}
    arrays = record_arrays(records, codec=Codec(codes, means=means[MAIN], others=others))
    assert record_bytes(recipe) == {name: array.nbytes for name, array in arrays.items()}
    assert list(record_bytes(recipe)) == list(arrays), "in the order in which they lie"


def test_published_sizes_give_the_published_flops():
    teacher = 2e-12 * forward_macs(SIZES["1B"], 2048)
    assert teacher == pytest.approx(5.1014, abs=5e-5)
    assert 2e-12 * forward_macs(SIZES["6B"], 2048) == pytest.approx(26.84, abs=5e-3)
    frames_16 = [2e-12 * forward_macs(SIZES[name], 4096) for name in ("S14", "B14", "L14", "1B")]
    assert frames_16 == pytest.approx([0.488, 1.328, 4.147, 12.09], abs=5e-3)
    assert block_macs(SIZES["S14"], 411) * 2 == 2 * 411 * (
        4 * 384**2 + 2 * 384 * 1536 + 2 * 411 * 384
    )
    assert 2e-12 * pool_macs(SIZES["1B"], 2049) == pytest.approx(0.016, abs=5e-4)


@pytest.mark.parametrize(
    ("codes", "tokens", "pixels"),
    [
        ("fp16", "visible", "visible"),
        ("8bit", "visible", "full"),
        ("4bit", "superset", "visible"),
        ("3bit", "superset", "full"),
        ("2bit", "all", "visible"),
    ],
)
def test_record_bytes_are_those_of_a_record(codes, tokens, pixels):
    cache = {"folder": "c", "codes": codes, "tokens": tokens, "pixels": pixels}
    recipe = make_recipe(distill(cache=cache))
    teacher = create_teacher(
        ViTSize(**TEACHER), frames=4, image_size=56, num_layers=2, interval=1.5, random=True
    )
    batch = {
        "clip_id": torch.tensor([3]),
        "view": torch.tensor([0]),
        "pixels": torch.zeros(1, 3, 4, 56, 56, dtype=torch.uint8),
    }
    records = view_records(
        teacher, batch, mask=recipe.objective.mask, seed=0, tokens=tokens, pixels=pixels
    )
    means = None if codes == "fp16" else torch.zeros(2, TEACHER["width"])
    arrays = record_arrays(records, codec=Codec(codes, means=means))
    assert record_tokens(recipe) == {"visible": 13, "superset": 26, "all": 64}[tokens]
    assert record_bytes(recipe) == {name: array.nbytes for name, array in arrays.items()}
    assert list(record_bytes(recipe)) == list(arrays), "in the order in which they lie"


def saved_bytes(recipe: Recipe, *, clips: int) -> int:
    """Bytes that a forward keeps for its backward, weights and their copies included."""
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or addresses come again
        return tensor

    is_half = recipe.optim.precision == "bf16"
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
    ):
        run_step(recipe, backward=False, clips=clips)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", [distill(), distill(decoder="linear"), classify()])
def test_activation_bytes_are_near_those_saved_for_the_backward(objective, precision):
    wide = {"width": 192, "depth": 12, "heads": 3}
    recipe = make_recipe(objective, model={"size": wide}, optim={"precision": precision})
    measured = (saved_bytes(recipe, clips=3) - saved_bytes(recipe, clips=1)) / 2
    # The CPU's norms are not fused and keep their result as well.
    assert 0.75 * measured < activation_bytes(recipe) < 1.1 * measured


def test_frozen_backbone_keeps_no_activations():
    assert activation_bytes(make_recipe(classify(trainable="head"))) == 0


def test_recomputed_blocks_keep_their_input_alone():
    full = activation_bytes(make_recipe(classify()))
    half = activation_bytes(make_recipe(classify(), model={"checkpoint_blocks": 2}))
    kept_otherwise = 4 * (3 * 96 + 8 * 96 + 2 * int(96 * 48 / 11))
    assert full - half == 65 * 2 * kept_otherwise


def test_teacher_parameters_are_the_published_ones():
    teacher = {"size": "1B", "random": True}
    recipe = make_recipe(distill(teacher=teacher))
    views = recipe.data.views.model_copy(update={"frames": 8, "image_size": 224})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": views})})
    assert teacher_parameters(recipe) == 1_020_708_608
