"""Parameter groups, layer-wise learning rates and the schedule, against the published figures."""

import pytest
import torch

from distill import recipe
from distill.errors import InputError
from distill.optim import layer_id, make_schedule, param_groups, set_lr
from distill.students import ViTSize, create_classifier, create_student

TINY = ViTSize(width=96, depth=3, heads=3, pooled_width=64)


def optim(**settings) -> recipe.Optim:
    return recipe.Optim(**{"lr": 1e-3, "batch_size": 256, "epochs": 10, **settings})


def test_s14_classifier_has_28_groups_with_published_factors():
    with torch.device("meta"):
        model = create_classifier("S14", num_classes=400)
    groups = param_groups(model, optim(layer_decay=0.75))
    factors = sorted({group["lr_scale"] for group in groups})
    assert len(groups) == 28
    assert factors == pytest.approx([0.75**power for power in range(13, -1, -1)])
    assert round(factors[0], 4) == 0.0238
    assert factors[-1] == 1.0
    assert sum(len(group["params"]) for group in groups) == 178


def test_s14_student_decays_67_tensors_and_spares_150():
    with torch.device("meta"):
        model = create_student("S14")
    spared, decayed = sorted(
        param_groups(model, optim(weight_decay=0.05)), key=lambda group: group["weight_decay"]
    )
    assert (len(spared["params"]), spared["weight_decay"]) == (150, 0.0)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (67, 0.05)
    assert sum(parameter.numel() for parameter in spared["params"]) == 1_664_640
    assert sum(parameter.numel() for parameter in decayed["params"]) == 27_505_152


def test_position_tables_and_tokens_do_not_decay_and_are_inputs():
    model = create_student(TINY, frames=2, image_size=56, num_layers=2, positions="separable")
    groups = param_groups(model, optim(layer_decay=0.5))
    of = {name: group for group in groups for name in group["names"]}
    for name in ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_cls", "cls_token"):
        assert (of[name]["lr_scale"], of[name]["weight_decay"]) == (0.5**4, 0.0)
    for name in ("clip_pos_embed_spatial", "clip_pos_embed_temporal", "clip_pos_embed_cls"):
        assert (of[name]["lr_scale"], of[name]["weight_decay"]) == (1.0, 0.0)


def test_layer_ids_parse_the_block_number():
    ids = {
        "patch_embed.proj.weight": 0,
        "blocks.3.attn.qkv.weight": 4,
        "blocks.30.attn.qkv.weight": 31,
        "clip_projector.norm1_q.weight": 41,
        "fc_norm.weight": 41,
        "head.bias": 41,
    }
    assert {name: layer_id(name, depth=40) for name in ids} == ids


def test_frozen_parameters_are_left_out():
    model = create_classifier(TINY, num_classes=3, frames=2, image_size=56)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    names = [name for group in param_groups(model, optim()) for name in group["names"]]
    assert sorted(names) == ["head.bias", "head.weight"]
    model.requires_grad_(False)
    with pytest.raises(InputError, match="leaves no parameter to train"):
        param_groups(model, optim())


@pytest.mark.parametrize(
    ("batch", "lr", "peak", "floor"), [(4096, 1e-3, 0.016, 1.6e-4), (2048, 1e-3, 0.008, 8e-5)]
)
def test_learning_rates_scale_with_the_batch(batch, lr, peak, floor):
    schedule = make_schedule(optim(lr=lr, batch_size=batch), steps_per_epoch=3)
    assert (schedule.peak, schedule.floor) == pytest.approx((peak, floor))
    unscaled = make_schedule(optim(lr=lr, batch_size=batch, lr_per_batch=None), steps_per_epoch=3)
    assert (unscaled.peak, unscaled.floor) == (1e-3, 1e-5)


def test_published_distillation_has_27068_steps():
    schedule = make_schedule(
        optim(batch_size=4096, epochs=101, warmup_epochs=20), steps_per_epoch=268
    )
    assert (schedule.num_steps, schedule.warmup_steps) == (27_068, 5_360)


def test_schedule_warms_up_to_the_peak_twice_and_ends_just_above_the_floor():
    schedule = make_schedule(
        optim(lr=1.0, min_lr=0.2, warmup_lr=0.1, warmup_epochs=2, epochs=6, lr_per_batch=None),
        steps_per_epoch=2,
    )
    # np.concatenate([np.linspace(.1, 1, 4), .2 + .4 * (1 + np.cos(np.pi * np.arange(8) / 8))])
    expected = [0.1, 0.4, 0.7, 1.0, 1.0, 0.96955181, 0.88284271, 0.75307337]
    expected += [0.6, 0.44692663, 0.31715729, 0.23044819]
    assert [schedule.lr_at(step) for step in range(12)] == pytest.approx(expected)


def test_fractional_warmup_and_no_warmup():
    assert make_schedule(optim(warmup_epochs=0.29), steps_per_epoch=100).warmup_steps == 29
    schedule = make_schedule(optim(lr_per_batch=None), steps_per_epoch=5)
    assert (schedule.warmup_steps, schedule.lr_at(0)) == (0, 1e-3)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match=r"optim\.warmup_epochs: 20 is more than the 10"):
        make_schedule(optim(warmup_epochs=20), steps_per_epoch=5)


def test_each_group_gets_its_share_of_the_rate():
    model = create_classifier(TINY, num_classes=3, frames=2, image_size=56)
    groups = param_groups(model, optim(layer_decay=0.5))
    set_lr(groups, 0.8)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["head.weight"] == 0.8
    assert rates["blocks.2.norm1.weight"] == pytest.approx(0.4)
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.05)
