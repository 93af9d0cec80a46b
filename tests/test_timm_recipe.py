"""Recipes with timm's models: as students, as teachers, and what they refuse."""

from pathlib import Path

import pytest
import torch
import toys
from fill import fill
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from distill.cost import counted_student, student_cost
from distill.errors import InputError
from distill.kernels.coded_targets import CodedTargets
from distill.models import build_model, build_teacher
from distill.objective import DistillObjective
from distill.optim import param_groups
from distill.recipe_file import load_recipe
from distill.toy import toy_recipe
from distill.train import train

STUDENT = ["run.toy=true", "data.train.list=videos4.csv"]
LIVE = [*STUDENT, "objective.targets=live", "objective.cache=null"]
TEACHER = [
    "objective.teacher.kind=timm",
    "objective.teacher.size=null",
    "objective.teacher.model=test_vit",
    "objective.teacher.layers=2",
    "objective.teacher.interval=1",
    "objective.teacher.image_size=64",
    "objective.teacher.weights=null",
    "objective.teacher.random=true",
]
FINETUNE = [
    "run.toy=true",
    "model.size=null",
    "model.timm=test_resnet",
    "model.drop_path=0",
    "model.head_drop_path=0",
    "optim.layer_decay=0.75",
    "data.train.list=videos4.csv",
    "data.test.list=videos2.csv",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    toys.make_data(tmp_path)
    toys.load_here(monkeypatch)
    return tmp_path


def test_timm_teaches_timm_and_the_student_is_finetuned(workplace):
    recipe = load_recipe("timm/resnet50", [*LIVE, *TEACHER, "optim.epochs=1"])
    summary = train(recipe, Path("distilled"))
    assert 0 < summary["last"]["loss"] < 8
    trunk = {k: v for k, v in load_file(summary["weights"]).items() if k.startswith("trunk.")}
    start = f"model.weights.checkpoint={summary['weights']}"
    for trainable, changes in (("head", ["optim.layer_decay=1"]), ("all", [])):
        settings = [
            *FINETUNE,
            start,
            "model.weights.head=reset",
            *changes,
            f"objective.trainable={trainable}",
        ]
        finetuned = train(load_recipe("k400/S14", settings), Path(trainable))
        assert finetuned["evaluation"]["num_clips"] == 2
        after = load_file(finetuned["weights"])
        assert after["head.weight"].shape == (400, 96)
        same = [name for name in trunk if torch.equal(after[name], trunk[name])]
        assert len(same) == (len(trunk) if trainable == "head" else 0)


def student_batch(student, *, rows: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(32)[None].repeat(2, 1)
    return {
        "clip_id": torch.tensor([1, 2]),
        "epoch": 0,
        "pixels": torch.randint(0, 256, (2, 3, 8, 28, 28), dtype=torch.uint8, generator=generator),
        "tokens": tokens,
        "middle": nn.functional.normalize(torch.randn(2, 2, rows, 80, generator=generator), dim=-1),
        "pooled": nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=-1),
    }


def test_a_class_tokens_row_is_left_out_of_the_loss():
    recipe = load_recipe("timm/resnet50", LIVE)
    student = fill(build_model(recipe)).eval()
    objective = DistillObjective(student, recipe.objective, seed=0)
    batch = student_batch(student, rows=33)
    inputs = student.decoder_inputs(batch["pixels"], tokens=batch["tokens"])
    expected = torch.stack(
        [
            (2 - 2 * (decode(state) * target[:, 1:]).sum(-1)).mean()
            for decode, state, target in zip(
                student.clip_decoder, inputs.states, batch["middle"], strict=True
            )
        ]
    )
    losses = objective(batch)
    assert_close(torch.stack([losses["layer_00"], losses["layer_01"]]), expected)
    without = objective({**batch, "middle": batch["middle"][:, :, 1:]})
    assert_close(without["middle"], losses["middle"])


def test_coded_rows_are_cut_as_plain_ones_are():
    codes = torch.arange(2 * 3 * 5 * 4, dtype=torch.uint8).view(2, 3, 5, 4)
    scales = torch.rand(2, 3, 5).half()
    nothing = torch.empty(0)
    targets = CodedTargets(codes, scales, nothing, nothing, torch.ones(8), nothing, nothing)
    part = targets.rows(slice(1, None))
    assert part.shape == (3, 2, 4, 8)
    assert torch.equal(part.codes, codes[:, :, 1:]) and part.codes.is_contiguous()
    assert torch.equal(part.scales, scales[:, :, 1:]) and part.scales.is_contiguous()


def test_layers_learn_at_the_rates_of_timms_layers():
    model = build_model(load_recipe("k400/S14", FINETUNE))
    groups = param_groups(model, load_recipe("k400/S14", FINETUNE).optim)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    ids = model.layer_ids()
    top = max(ids.values()) + 1
    assert (scale["head.weight"], scale["fc_norm.weight"]) == (1, 1)
    for name in ("trunk.conv1.0.weight", "trunk.layer1.0.conv1.weight"):
        assert scale[name] == pytest.approx(0.75 ** (top - ids[name]))
    assert ids["trunk.conv1.0.weight"] < ids["trunk.layer1.0.conv1.weight"]
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert (decays["trunk.conv1.0.weight"], decays["trunk.bn1.weight"]) == (0.05, 0)


def test_a_timm_teacher_is_on_the_students_grid():
    teacher = build_teacher(load_recipe("timm/resnet50", [*LIVE, *TEACHER]))
    assert (teacher.grid, teacher.image_size, teacher.frames) == ((8, 2, 2), 64, 8)
    pixels = torch.randint(0, 256, (1, 3, 8, 28, 28), dtype=torch.uint8)
    assert teacher(pixels).middle.shape == (2, 1, 32, 64)


def test_cost_is_counted():
    """A linear head of 96 to 400 costs as many multiply-adds, and probes train it alone."""
    recipe = load_recipe("k400/S14", [*FINETUNE, "objective.trainable=head", "optim.layer_decay=1"])
    flops, heads, _ = counted_student(recipe)
    assert heads == 2 * 96 * 400
    assert student_cost(recipe).step == pytest.approx(1e-12 * (flops + 2 * heads))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("timm/resnet50", "model.size=S14", "contradicts model.timm=resnet50; drop one of them"),
        ("timm/resnet50", "model.drop_path=0.1", "is no setting of one of timm's models; drop it"),
        ("timm/resnet50", "model.timm=resnet_50", "timm has no model 'resnet_50'; did you mean re"),
        ("timm/resnet50", "objective.cache.pixels=visible", "must be full: one of timm's models"),
        ("timm/resnet50", "objective.cache.tokens=visible", "must be all: one of timm's models se"),
        ("timm/resnet50", "model.timm=convit_tiny data.views.image_size=28", "timm's convit_tiny"),
        ("S14", "model.size=null", "missing"),
    ],
)
def test_what_contradicts_a_model_of_timms_is_refused(name, override, message):
    first, *more = override.split()
    with pytest.raises(InputError) as error:
        load_recipe(name, [first, *more])
    lines = str(error.value).splitlines()
    assert any(line.startswith(f"{first}: {message}") for line in lines), lines


def test_probes_of_a_model_of_timms_are_linear():
    probe = [*FINETUNE, "optim.layer_decay=1", "objective.trainable=pool"]
    with pytest.raises(InputError, match="objective.trainable=pool: must be all or head: one of t"):
        load_recipe("k400/S14", probe)
    probe = [*probe[:-1], "objective.trainable=head", "objective.probe=cls_avg1"]
    with pytest.raises(InputError, match="objective.probe=cls_avg1: is for video transformers alo"):
        load_recipe("k400/S14", probe)


def test_mistakes_of_a_timm_teacher_are_found_on_loading():
    wrong = [*TEACHER[:2], "objective.teacher.model=test_vitt", *TEACHER[3:]]
    with pytest.raises(InputError, match="objective.teacher.model=test_vitt: timm has no model"):
        load_recipe("timm/resnet50", wrong)
    wrong = [*TEACHER[:5], "objective.teacher.image_size=100", *TEACHER[6:]]
    with pytest.raises(
        InputError, match="timm's test_vit takes patches of 16 px, got 100 px a side, which"
    ):
        load_recipe("timm/resnet50", wrong)


def test_a_toy_of_a_timm_teacher_is_small_and_random():
    whole = load_recipe(
        "timm/resnet50",
        [
            *TEACHER[:2],
            "objective.teacher.model=vit_tiny_patch16_224",
            "objective.teacher.layers=3",
        ],
    )
    toy = toy_recipe(whole).objective.teacher
    assert (whole.objective.teacher.random, whole.objective.teacher.layers) == (False, 3)
    assert (toy.model, toy.layers, toy.random, toy.weights) == ("test_vit", 2, True, None)
