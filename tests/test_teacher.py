import pytest
import torch
from fill import TOLERANCE, clip, fill, golden, golden_keys, keys_of

from distill.students import SIZES, ViTSize, create_classifier
from distill.students.warmstart import WeightsError
from distill.teachers import create_teacher, frozen, return_layers

TINY = ViTSize(176, 5, 2, 48 / 11, 48)
SETTINGS = {"frames": 4, "image_size": 56, "num_layers": 3, "interval": 1.34, "activation": "gelu"}


def make_teacher(**changes):
    return fill(create_teacher(TINY, **{**SETTINGS, **changes}, random=True))


def test_features_equal_the_reference():
    expected = golden("tiny_distill")
    features = make_teacher()(clip(2, 4, 56))
    torch.testing.assert_close(features.middle, expected["teacher_middle"], **TOLERANCE)
    torch.testing.assert_close(features.pooled, expected["teacher_final"], **TOLERANCE)
    torch.testing.assert_close(features.attention, expected["teacher_attention"], **TOLERANCE)
    assert make_teacher().return_layers == tuple(sorted(expected["teacher_index"].tolist()))


def test_state_dict_is_the_references():
    assert keys_of(make_teacher()) == golden_keys("tiny_teacher")


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ((40, 6, 3.34), (23, 26, 29, 33, 36, 39)),  # int(i * 3.34), not i * int(3.34) or round
        ((12, 6, 1), (6, 7, 8, 9, 10, 11)),
        ((24, 6, 1), (18, 19, 20, 21, 22, 23)),
        ((5, 3, 1.34), (2, 3, 4)),
        ((48, 1, 3.34), (47,)),
    ],
)
def test_return_layers_truncate_the_product(arguments, layers):
    assert return_layers(*arguments) == layers


@pytest.mark.parametrize("arguments", [(12, 6, 3.34), (40, 3, 0.5), (40, 0, 1)])
def test_layers_that_leave_the_model_or_repeat_are_refused(arguments):
    with pytest.raises(ValueError, match="do not fit into"):
        return_layers(*arguments)


def test_teacher_is_frozen_and_stays_in_eval_mode():
    teacher = make_teacher()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.drop_path_rates == (0.0,) * 5
    first, second = teacher(clip(1, 4, 56)), teacher(clip(1, 4, 56))
    assert torch.equal(first.middle, second.middle)


def test_features_may_enter_a_loss():
    features = make_teacher()(clip(1, 4, 56))
    student = torch.randn(3, 1, 65, 176, requires_grad=True)
    (2 - 2 * (student * features.middle).sum(-1)).mean().backward()
    torch.testing.assert_close(student.grad, features.middle * (-2 / (3 * 65)))


def test_blocks_run_in_inference_mode():
    teacher = make_teacher()
    states, pooled, attention = teacher.hidden(clip(1, 4, 56))
    assert all(tensor.is_inference() for tensor in (*states, pooled, attention))
    features = teacher(clip(1, 4, 56))
    assert not any(tensor.is_inference() for tensor in features)


def test_hidden_states_are_the_features_before_normalising():
    teacher = make_teacher()
    x = clip(2, 4, 56)
    states, pooled, attention = teacher.hidden(x)
    features = teacher(x)
    for state, middle in zip(states, features.middle, strict=True):
        torch.testing.assert_close(state / state.norm(dim=-1, keepdim=True), middle)
        assert state.norm(dim=-1).min() > 1.5
    torch.testing.assert_close(pooled / pooled.norm(dim=-1, keepdim=True), features.pooled)
    assert torch.equal(attention, features.attention)


def test_attention_leaves_out_the_class_token():
    attention = make_teacher()(clip(2, 4, 56)).attention
    assert attention.shape == (2, 64)
    assert attention.dtype == torch.float32
    assert (attention.sum(1) < 1).all()
    assert (attention.sum(1) > 0.9).all()


def test_features_are_float32_under_autocast():
    teacher = make_teacher()
    exact = teacher(clip(1, 4, 56))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = teacher(clip(1, 4, 56))
    assert [tensor.dtype for tensor in features] == [torch.float32] * 3
    torch.testing.assert_close(features.middle, exact.middle, rtol=0, atol=0.02)
    assert not torch.equal(features.middle, exact.middle)


def test_uint8_clip_is_normalised_inside():
    teacher = make_teacher()
    pixels = torch.randint(0, 256, (1, 3, 4, 56, 56), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    expected = teacher((pixels / 255 - mean) / std).middle
    torch.testing.assert_close(teacher(pixels).middle, expected, **TOLERANCE)


def test_weights_come_from_the_checkpoint_with_a_report(tmp_path):
    source = make_teacher()
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    teacher = create_teacher(TINY, checkpoint=tmp_path / "teacher.pth", **SETTINGS)
    x = clip(1, 4, 56)
    assert torch.equal(teacher(x).middle, source(x).middle)
    assert len(teacher.load_report.taken) == len(source.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_a_classifier_can_teach(tmp_path):
    source = fill(create_classifier(TINY, num_classes=7, frames=4, image_size=56))
    torch.save({"model": source.state_dict()}, tmp_path / "classifier.pth")
    teacher = create_teacher(TINY, checkpoint=tmp_path / "classifier.pth", **SETTINGS)
    assert teacher.load_report.unused == (
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    )
    assert torch.equal(teacher.pos_embed, source.pos_embed)


def test_teachers_take_tubelets_and_separable_tables(tmp_path):
    settings = {**SETTINGS, "tubelet": 2, "positions": "separable"}
    source = fill(create_teacher(TINY, **settings, random=True), positions=True)
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    teacher = create_teacher(TINY, checkpoint=tmp_path / "teacher.pth", **settings)
    features = teacher(clip(1, 4, 56))
    assert features.middle.shape == (3, 1, 1 + 2 * 16, 176)
    assert torch.equal(features.middle, source(clip(1, 4, 56)).middle)


def test_a_teacher_never_keeps_a_weight_at_init(tmp_path):
    state = make_teacher().state_dict()
    del state["clip_projector.cross_attn.proj.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"clip_projector\.\* \(1\) of the model would stay"):
        create_teacher(TINY, checkpoint=tmp_path / "part.pth", **SETTINGS)


def test_a_random_teacher_must_be_asked_for():
    with pytest.raises(WeightsError, match="teacher 1B: no checkpoint; give its weights, or ask"):
        create_teacher("1B")


def test_a_random_teacher_takes_no_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="a random teacher takes no checkpoint"):
        create_teacher("1B", checkpoint=tmp_path / "1B.pth", random=True)


@pytest.mark.parametrize(("name", "size"), [("internvideo2_1B", "1B"), ("internvideo2_6B", "6B")])
def test_published_teachers_are_known_by_name(name, size):
    with torch.device("meta"):
        teacher = create_teacher(name, random=True)
    assert teacher.size == SIZES[size]
    assert teacher.frames == 8


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown teacher 'internvideo2_2B'; choose one of intern"):
        create_teacher("internvideo2_2B", random=True)
    with pytest.raises(ValueError, match="unknown teacher '2B'; choose one of internvideo2_1B"):
        create_teacher("2B", random=True)


def test_linear_weights_that_are_cast_once_give_the_same_bits():
    teacher = make_teacher()
    video = clip(2, teacher.frames, teacher.image_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, pooled, attention = teacher.hidden(video)
        teacher.tune(torch.bfloat16, batch_size=2)
        again = teacher.hidden(video)
    assert teacher.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert teacher.blocks[0].norm1.weight.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(states, again[0], strict=True))
    assert torch.equal(pooled, again[1]) and torch.equal(attention, again[2])


def test_timed_attention_names_backends_that_work_fastest_first(monkeypatch):
    """On a CPU there are two, of which one is the last resort and here goes by another name."""
    seconds = iter([3.0, 2.0, 1.0])

    def measured(call):
        call()
        return next(seconds)

    monkeypatch.setattr(frozen, "_median_seconds", measured)
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    plain = frozen.ATTENTION["math"]
    monkeypatch.setattr(frozen, "ATTENTION", {**frozen.ATTENTION, "plain": plain})
    times = frozen.time_attention((1, 2, 65, 88), **settings)
    assert list(times.items()) == [("plain", 2.0), ("flash", 3.0)]
    monkeypatch.setattr(frozen, "ATTENTION", {"math": plain})
    assert frozen.time_attention((1, 2, 65, 88), **settings) == {"math": 1.0}


@pytest.mark.parametrize("name", ["math", "flash"])
def test_features_are_the_references_with_every_attention(name):
    teacher = fill(make_teacher())
    stock = teacher(clip(2, teacher.frames, teacher.image_size))
    teacher.attention_order = [frozen.ATTENTION[name], frozen.ATTENTION["math"]]
    chosen = teacher(clip(2, teacher.frames, teacher.image_size))
    torch.testing.assert_close(chosen.middle, stock.middle, **TOLERANCE)
    torch.testing.assert_close(chosen.attention, stock.attention, **TOLERANCE)


def test_the_chosen_attention_is_the_one_that_runs():
    teacher = make_teacher()
    teacher.attention_order = [frozen.ATTENTION["cudnn"]]  # which a CPU does not have
    with pytest.raises(RuntimeError, match="No viable backend for scaled_dot_product_attention"):
        teacher(clip(1, teacher.frames, teacher.image_size))
