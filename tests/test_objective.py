from pathlib import Path

import numpy as np
import pytest
import torch
from fill import clip, fill, visible_mask
from torch.testing import assert_close

from distill import draw
from distill import objective as objective_module
from distill.cache.codes import Codec
from distill.objective import (
    ClassifyObjective,
    DistillObjective,
    draw_fc_keep,
    draw_head_keep,
    draw_keep,
)
from distill.recipe import Classify, Distill
from distill.students import create_classifier, create_student
from distill.students.student import ProjectorSet
from distill.students.vit import ViTSize, patchify, take_rows, visible_tokens

GOLDEN = Path(__file__).parent / "golden"
TINY = ViTSize(96, 4, 3, pooled_width=48)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TEACHER = {"size": "1B", "random": True}


def student(**settings):
    return create_student(
        TINY,
        frames=4,
        image_size=56,
        num_layers=3,
        **{"teacher_width": 176, "teacher_pooled": 48, "activation": "gelu", **settings},
    )


def section(**settings):
    return Distill(kind="distill", teacher=TEACHER, **settings)


def golden_batch():
    golden = np.load(GOLDEN / "tiny_distill.npz")
    mask = visible_mask(2, 64, 13)
    tokens = visible_tokens(mask)
    rows = ~mask
    middle = torch.from_numpy(golden["teacher_middle"])[:, rows].reshape(3, 2, 14, 176)
    return golden, {
        "clip_id": torch.tensor([1, 2]),
        "epoch": 0,
        "patches": take_rows(patchify(clip(2, 4, 56)), tokens),
        "tokens": tokens,
        "middle": middle,
        "pooled": torch.from_numpy(golden["teacher_final"]),
    }


def random_batch(count):
    stream = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    return {
        "clip_id": torch.tensor([draw.key("clip", index) for index in range(count)]),
        "epoch": 3,
        "patches": torch.randint(0, 256, (count, 13, 588), dtype=torch.uint8, generator=stream),
        "tokens": torch.rand(count, 64, generator=stream).argsort(1)[:, :13].sort(1).values,
        "middle": unit(torch.randn(3, count, 14, 176, generator=stream), dim=-1),
        "pooled": unit(torch.randn(count, 48, generator=stream), dim=-1),
    }


def test_losses_and_gradients_are_the_reference_implementations():
    model = fill(student())
    golden, batch = golden_batch()
    losses = DistillObjective(model, section(), seed=0)(batch)
    assert_close(losses["middle"].double(), torch.tensor(golden["loss_middle"]), **TOLERANCE)
    assert_close(losses["pooled"].double(), torch.tensor(golden["loss_final"]), **TOLERANCE)
    assert_close(losses["loss"].detach(), losses["middle"] + losses["pooled"])
    losses["loss"].backward()
    for name, parameter in {
        "grad_qkv0": model.blocks[0].attn.qkv.weight,
        "grad_qnorm3": model.blocks[3].attn.q_norm.weight,
        "grad_patch": model.patch_embed.proj.weight,
        "grad_decoder0": model.clip_decoder[0].head[0].weight,
        "grad_ls": model.blocks[2].ls2.gamma,
    }.items():
        assert_close(parameter.grad, torch.from_numpy(golden[name]), msg=name, **TOLERANCE)


def test_layers_are_named_by_ascending_depth_and_average_to_middle():
    model = fill(student())
    _, batch = golden_batch()
    losses = DistillObjective(model, section(), seed=0)(batch)
    layers = [losses[f"layer_{index:02d}"] for index in range(3)]
    assert set(losses) == {"loss", "middle", "pooled", "layer_00", "layer_01", "layer_02"}
    assert_close(torch.stack(layers).mean(), losses["middle"])
    middle, _ = model(patches=batch["patches"], tokens=batch["tokens"])
    for index, layer in enumerate(layers):
        expected = 2 - 2 * (middle[index] * batch["middle"][index]).sum(-1).mean()
        assert_close(layer, expected.detach(), **TOLERANCE)


def test_codes_are_aligned_with_as_what_they_stand_for():
    batch = random_batch(3)
    middle = batch["middle"].transpose(0, 1)  # [B,K,M,E]
    codec = Codec("3bit", means=middle.mean((0, 2)))
    fields = codec.encode(middle)
    objective = DistillObjective(student(), section(), seed=0)
    expected = objective({**batch, "middle": codec.decode(**fields).transpose(0, 1)})
    found = objective({**batch, "middle": codec.targets(**fields)})
    assert_close(found, expected, **TOLERANCE)
    exact = objective(batch)["middle"].item()
    assert abs(found["middle"].item() - exact) > 1e-4  # codes of so few bits are not the rows


OTHERS = {
    "mae": ProjectorSet(112, 2, "mlp"),
    "video": ProjectorSet(80, 1, "linear", has_cls=True),
}


def several(**settings):
    """A student of three teachers, the recipe's section and a batch."""
    model = student(others=OTHERS, **settings)
    found = section(
        others={
            "mae": {"kind": "videomae", "size": "1B", "random": True, "weight": 0.25},
            "video": {"size": "1B", "random": True, "weight": 2.0},
        },
        loss_weights=(0.5, 3.0),
    )
    stream = torch.Generator().manual_seed(1)
    unit, batch = torch.nn.functional.normalize, random_batch(3)
    batch["middle.mae"] = unit(torch.randn(2, 3, 13, 112, generator=stream), dim=-1)
    batch["middle.video"] = unit(torch.randn(1, 3, 14, 80, generator=stream), dim=-1)
    return model, found, batch


def test_every_teachers_loss_is_the_formula_with_its_weight():
    """In float64: 2 - 2 cos, averaged over layers, clips and tokens, and added up."""
    model, found, batch = several()
    model = model.double()
    losses = DistillObjective(model, found, seed=0)(batch)
    middle, pooled, others = model(patches=batch["patches"], tokens=batch["tokens"])
    rows = {"middle": (middle, "middle"), **{n: (others[n], f"middle.{n}") for n in OTHERS}}
    expected = {}
    for name, (have, field) in rows.items():
        layers = (2 - 2 * (have * batch[field].double()).sum(-1)).mean(dim=(1, 2))
        expected[name] = layers.mean()
        prefix = "" if name == "middle" else f"{name}_"
        expected |= {f"{prefix}layer_{index:02d}": one for index, one in enumerate(layers)}
    expected["pooled"] = (2 - 2 * (pooled * batch["pooled"]).sum(-1)).mean()
    parts = (0.5, "middle"), (3.0, "pooled"), (0.25, "mae"), (2.0, "video")
    expected["loss"] = sum(weight * expected[name] for weight, name in parts)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(losses[name].double(), value.double(), rtol=1e-6, atol=1e-7, msg=name)
        assert losses[name].requires_grad == (name == "loss")
    upstream = torch.autograd.grad(losses["loss"], list(model.parameters()))
    by_hand = torch.autograd.grad(expected["loss"], list(model.parameters()))
    assert_close(upstream, by_hand, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_kernels_are_told_the_gradient_that_each_layers_loss_gets(monkeypatch):
    """By which they spare a pass: any other one costs time, and nothing else."""
    told, losses, original = [], [], objective_module.linear_alignment

    def noted(*arguments, upstream):
        layers = original(*arguments, upstream=upstream)
        layers.retain_grad()
        told.append(upstream)
        losses.append(layers)
        return layers

    monkeypatch.setattr(objective_module, "linear_alignment", noted)
    model, found, batch = several()
    DistillObjective(model, found, seed=0)(batch)["loss"].backward()
    assert told == [0.5 / 3, 0.25 / 2, 2.0 / 1]
    for upstream, layers in zip(told, losses, strict=True):
        assert_close(layers.grad, torch.full_like(layers, upstream))


def test_pretrainings_losses_are_those_of_the_reference_implementation():
    """Golden outputs of the student, which the loss of any targets follows from."""
    golden = np.load(GOLDEN / "tiny_pretrain.npz")
    others = {"mae": ProjectorSet(112, 2, "mlp")}
    model = fill(student(teacher_width=80, decoder="linear", others=others))
    tokens = visible_tokens(visible_mask(2, 64, 13))
    stream, unit = torch.Generator().manual_seed(0), torch.nn.functional.normalize
    shapes = {"middle": (3, 2, 14, 80), "pooled": (2, 48), "middle.mae": (2, 2, 13, 112)}
    targets = {
        name: unit(torch.randn(shape, generator=stream), dim=-1) for name, shape in shapes.items()
    }
    batch = {
        "clip_id": torch.tensor([1, 2]),
        "epoch": 0,
        "patches": take_rows(patchify(clip(2, 4, 56)), tokens),
        "tokens": tokens,
        **targets,
    }
    mae = {"kind": "videomae", "size": "1B", "random": True}
    losses = DistillObjective(model, section(others={"mae": mae}), seed=0)(batch)
    for name, key, field in (
        ("middle", "student_clip", "middle"),
        ("pooled", "student_final", "pooled"),
        ("mae", "student_mae", "middle.mae"),
    ):
        have = torch.from_numpy(golden[key])
        expected = 2 - 2 * (have * targets[field]).sum(-1).mean()
        assert_close(losses[name], expected, **TOLERANCE)
    assert_close(
        losses["loss"].detach(), losses["middle"] + losses["pooled"] + losses["mae"], **TOLERANCE
    )


def test_targets_without_a_class_row_are_learned_by_the_patches_rows():
    batch = random_batch(2)
    bare = {**batch, "middle": batch["middle"][:, :, 1:]}
    del bare["pooled"]
    model = student(teacher_pooled=0)
    losses = DistillObjective(model, section(), seed=0)(bare)
    middle, _ = model(patches=batch["patches"], tokens=batch["tokens"])
    expected = 2 - 2 * (middle[:, :, 1:] * bare["middle"]).sum(-1).mean()
    assert_close(losses["loss"], expected, **TOLERANCE)
    assert losses["pooled"] == 0


def test_loss_weights_scale_the_two_parts():
    model = fill(student())
    _, batch = golden_batch()
    plain = DistillObjective(model, section(), seed=0)(batch)
    losses = DistillObjective(model, section(loss_weights=(0.5, 3.0)), seed=0)(batch)
    assert_close(losses["loss"].detach(), 0.5 * plain["middle"] + 3 * plain["pooled"])
    only_middle = DistillObjective(model, section(loss_weights=(1.0, 0.0)), seed=0)(batch)
    assert only_middle["pooled"].item() == 0.0
    assert_close(only_middle["loss"].detach(), plain["middle"])


def test_a_student_without_pooled_projector_has_no_pooled_loss():
    model = student(activation="gelu_tanh")
    model.final_clip_decoder = torch.nn.Identity()
    losses = DistillObjective(model, section(), seed=0)(random_batch(2))
    assert losses["pooled"].item() == 0.0
    assert_close(losses["loss"], losses["middle"], check_device=False)


def test_drop_path_depends_on_seed_epoch_and_clip_but_not_on_the_batch():
    model = student(drop_path=0.5)
    fill(model)
    model.train()
    objective = DistillObjective(model, section(), seed=5)
    batch = random_batch(6)

    def losses_alone(batch):
        rows = []
        for row in range(6):
            one = {
                name: value[:, row : row + 1] if name == "middle" else value[row : row + 1]
                for name, value in batch.items()
                if name != "epoch"
            }
            rows.append(objective({**one, "epoch": batch["epoch"]})["loss"].detach())
        return torch.stack(rows)

    alone = losses_alone(batch)
    together = objective(batch)["loss"].detach()
    assert_close(alone.mean(), together, **TOLERANCE)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {
        name: value[:, order] if name == "middle" else value[order]
        for name, value in batch.items()
        if name != "epoch"
    }
    assert_close(losses_alone({**shuffled, "epoch": 3}), alone[order], rtol=0, atol=0)

    other_epoch = losses_alone({**batch, "epoch": 4})
    objective.seed = 6
    other_seed = losses_alone(batch)
    assert float((other_epoch - alone).abs().max()) > 1e-3
    assert float((other_seed - alone).abs().max()) > 1e-3


def test_drop_path_drops_at_its_rate_and_only_in_training():
    model = student(drop_path=0.3)
    clip_ids = torch.tensor([draw.key("clip", index) for index in range(20_000)])
    keep = draw_keep(model, clip_ids, seed=0, epoch=0)
    assert keep.shape == (8, 20_000)
    rates = torch.tensor([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert_close((keep == 0).float().mean(dim=1), rates, rtol=0, atol=0.015)
    assert_close(keep.mean(dim=1), torch.ones(8), rtol=0, atol=0.03)
    branches = (keep[6] == 0) == (keep[7] == 0)
    assert_close(branches.float().mean().item(), 0.58, rtol=0, atol=0.015)  # independent
    model.eval()
    assert draw_keep(model, clip_ids, seed=0, epoch=0) is None


def classifier(**settings):
    return create_classifier(TINY, num_classes=7, frames=4, image_size=56, **settings)


def classify_batch():
    stream = torch.Generator().manual_seed(1)
    return {
        "clip_id": torch.tensor([5, 6, 7]),
        "epoch": 0,
        "pixels": torch.randint(0, 256, (3, 3, 4, 56, 56), dtype=torch.uint8, generator=stream),
        "label": torch.tensor([0, 6, 2]),
    }


def test_cross_entropy_is_smoothed_as_the_formula():
    model, batch = fill(classifier()), classify_batch()
    objective = ClassifyObjective(
        model, Classify(kind="classify", num_classes=7, label_smoothing=0.1), seed=0
    )
    losses = objective(batch)
    logits = model(batch["pixels"]).detach().double()
    aims = torch.full((3, 7), 0.1 / 7, dtype=torch.float64)
    aims[[0, 1, 2], batch["label"]] += 0.9
    expected = -(aims * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert_close(losses["loss"].detach().double(), expected, rtol=1e-5, atol=1e-6)
    hits = [row.argmax() == aim for row, aim in zip(logits, batch["label"], strict=True)]
    assert_close(losses["top1"].item(), 100 * sum(map(int, hits)) / 3)
    losses["loss"].backward()
    found = model.head.bias.grad.double()
    assert_close(found, (logits.softmax(1) - aims).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("trainable", "prefixes"),
    [
        ("all", {"cls_token", "pos_embed", "patch_embed", "blocks"} | {"clip_projector"}),
        ("pool", {"clip_projector"}),
        ("head", set()),
    ],
)
def test_only_what_the_recipe_trains_gets_gradients(trainable, prefixes):
    model = classifier()
    objective = ClassifyObjective(
        model, Classify(kind="classify", num_classes=7, trainable=trainable), seed=0
    )
    objective(classify_batch())["loss"].backward()
    trained = {
        name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None
    }
    assert trained == prefixes | {"fc_norm", "head"}


def test_published_probe_trains_as_many_parameters_as_upstream():
    with torch.device("meta"):
        model = create_classifier("1B", num_classes=400)
    ClassifyObjective(model, Classify(kind="classify", num_classes=400, trainable="pool"), seed=0)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == 7_042_176 + 309_136


def test_classifiers_drop_path_is_drawn_from_the_clips():
    model = fill(classifier(drop_path=0.5))
    model.train()
    objective = ClassifyObjective(model, Classify(kind="classify", num_classes=7), seed=0)
    batch = classify_batch()
    first = objective(batch)["loss"].item()
    torch.manual_seed(123)
    assert objective(batch)["loss"].item() == first
    assert abs(objective({**batch, "epoch": 1})["loss"].item() - first) > 1e-4


def repeated_losses(model, batch, **settings):
    """The loss of each view of a batch by itself."""
    objective = ClassifyObjective(model, Classify(kind="classify", num_classes=7), **settings)
    names = [name for name in batch if name != "epoch"]
    return torch.stack(
        [
            objective({**{name: batch[name][row : row + 1] for name in names}, "epoch": 3})["loss"]
            for row in range(len(batch["label"]))
        ]
    ).detach()


@pytest.mark.parametrize("rates", [{"drop_path": 0.5}, {"head_drop_path": 0.5}])
def test_views_of_one_clip_are_dropped_from_apart(rates):
    model = fill(classifier(**rates))
    model.train()
    one = {name: value for name, value in classify_batch().items() if name != "epoch"}
    same = {name: value[:1].repeat_interleave(12, dim=0) for name, value in one.items()}
    first = repeated_losses(model, same, seed=0)
    assert_close(first, first[:1].expand(12), rtol=0, atol=0)
    zeros = torch.zeros(12, dtype=torch.int64)
    assert_close(repeated_losses(model, {**same, "repeat": zeros}, seed=0), first, rtol=0, atol=0)
    apart = repeated_losses(model, {**same, "repeat": torch.arange(12)}, seed=0)
    assert apart[0] == first[0]
    assert len(set(apart.tolist())) > 1
    assert_close(
        repeated_losses(model, {**same, "repeat": torch.arange(12)}, seed=0), apart, rtol=0, atol=0
    )
    other = repeated_losses(model, {**same, "repeat": torch.arange(12)}, seed=1)
    assert not torch.equal(other, apart)


def test_the_pooled_vector_is_dropped_at_its_rate_and_only_in_training():
    model = classifier(head_drop_path=0.3)
    clip_ids = torch.tensor([draw.key("clip", index) for index in range(20_000)])
    keep = draw_head_keep(model, clip_ids, seed=0, epoch=0)
    assert_close((keep == 0).float().mean().item(), 0.3, rtol=0, atol=0.015)
    assert_close(keep.max().item(), 1 / 0.7)
    blocks = draw.uniform(clip_ids, "drop-path", 0, 0, count=1)[:, 0] < 0.3
    assert_close(((keep == 0) & blocks).float().mean().item(), 0.09, rtol=0, atol=0.01)
    model.eval()
    assert draw_head_keep(model, clip_ids, seed=0, epoch=0) is None


def test_probes_drop_the_pooled_vector_too():
    model = fill(classifier(head_drop_path=0.99))
    model.train()
    section = Classify(kind="classify", num_classes=7, trainable="pool")
    batch = classify_batch()
    ClassifyObjective(model, section, seed=0)(batch)["loss"].backward()
    assert not model.clip_projector.cross_attn.proj.weight.grad.any()
    assert model.head.bias.grad.abs().max() > 0


def test_soft_targets_are_smoothed_and_scored_by_their_largest():
    model, batch = fill(classifier()), classify_batch()
    target = torch.zeros(3, 7)
    target[0, 1], target[0, 2] = 0.3, 0.7
    target[1, 4], target[2, 0] = 1.0, 1.0
    section = Classify(kind="classify", num_classes=7, label_smoothing=0.1)
    losses = ClassifyObjective(model, section, seed=0)({**batch, "target": target})
    log_shares = model(batch["pixels"]).detach().double().log_softmax(1)
    aims = 0.9 * target.double() + 0.1 / 7
    expected = -(aims * log_shares).sum(1).mean()
    assert_close(losses["loss"].detach().double(), expected, rtol=1e-5, atol=1e-6)
    hits = (log_shares.argmax(1) == torch.tensor([2, 4, 0])).float().mean()
    assert_close(losses["top1"], 100 * hits)


def test_dropout_before_the_head_depends_on_clip_and_epoch_alone():
    model = create_classifier(TINY, num_classes=3, frames=2, image_size=28, fc_drop=0.25).train()
    ids = torch.arange(500, 900)
    keep = draw_fc_keep(model, ids, seed=1, epoch=2)
    torch.manual_seed(9)
    assert_close(draw_fc_keep(model, ids[:7], seed=1, epoch=2), keep[:7], rtol=0, atol=0)
    assert keep.shape == (400, model.head.in_features)
    assert_close(keep.unique(), torch.tensor([0.0, 4 / 3]))
    assert float((keep == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float((draw_fc_keep(model, ids, seed=1, epoch=3) == keep).float().mean()) < 0.7
    assert draw_fc_keep(model.eval(), ids, seed=1, epoch=2) is None
