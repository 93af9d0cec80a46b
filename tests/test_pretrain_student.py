"""Students of several teachers, stage-1 pretraining's first of all."""

import pytest
import torch
from fill import TOLERANCE, clip, fill, golden, golden_sections, keys_of, visible_mask
from torch.testing import assert_close

from distill.optim import is_decayed
from distill.students import ViTSize, create_classifier, create_student
from distill.students.student import ProjectorSet
from distill.students.vit import patchify, sincos_table, take_rows, visible_tokens
from distill.students.warmstart import WeightsError, load_weights
from distill.teachers import create_teacher

TINY = ViTSize(96, 4, 3, 4, 48)
MAE = ProjectorSet(112, 2, "mlp")


def make_student(**changes):
    settings = {
        "frames": 4,
        "image_size": 56,
        "teacher_width": 80,
        "teacher_pooled": 48,
        "num_layers": 3,
        "decoder": "linear",
        "activation": "gelu",
        "others": {"mae": MAE},
    }
    return fill(create_student(TINY, **{**settings, **changes}))


def test_outputs_equal_the_reference():
    expected = golden("tiny_pretrain")
    middle, pooled, others = make_student()(clip(2, 4, 56), visible_mask(2, 64, 13))
    assert_close(middle, expected["student_clip"], **TOLERANCE)
    assert_close(pooled, expected["student_final"], **TOLERANCE)
    assert_close(others["mae"], expected["student_mae"], **TOLERANCE)


def test_state_dict_is_the_references():
    assert keys_of(make_student()) == golden_sections("tiny_pretrain")["student"]


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [("1B", 1_070_042_752, 592), ("6B", 6_075_947_392, 696)],
)
def test_pretraining_students_have_the_published_size(size, parameters, tensors):
    with torch.device("meta"):
        student = create_student(
            size,
            teacher_width=3200,
            decoder="linear",
            others={"mae": ProjectorSet(1408, 4, "mlp")},
        )
    state = student.state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == (parameters, tensors)


@pytest.mark.parametrize("positions", ["joint", "separable"])
def test_a_records_patches_give_what_the_clip_and_mask_give(positions):
    student = make_student(positions=positions)
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    tokens = visible_tokens(mask)
    record = {"patches": take_rows(patchify(x), tokens), "tokens": tokens}
    from_clip, from_record = student(x, mask), student(**record)
    assert torch.equal(from_record[0], from_clip[0])
    assert torch.equal(from_record[2]["mae"], from_clip[2]["mae"])


def test_each_set_gets_its_last_blocks_plus_positions_of_its_own():
    """A set may reach deeper than the first teacher's, and have a class token."""
    others = {"mae": MAE, "dino": ProjectorSet(32, 4, "linear", has_cls=True)}
    student = make_student(num_layers=1, others=others)
    for name in ("clip", "mae", "dino"):
        table = student.get_parameter(f"{name}_pos_embed")
        table.data = torch.randn(table.shape)
    x, mask = clip(2, 4, 56), visible_mask(2, 64, 13)
    tokens = visible_tokens(mask)
    _, blocks = student.encode(take_rows(patchify(x), tokens), tokens, collect=range(4))
    inputs = student.decoder_inputs(x, mask)

    def rows(table, kept):
        return torch.stack([table[0, kept[b]] for b in range(2)])

    expected = [blocks[3] + rows(student.clip_pos_embed, ~mask)]
    assert_close(inputs.states, expected)
    expected = [block + rows(student.dino_pos_embed, ~mask) for block in blocks]
    assert_close(inputs.others["dino"], expected)
    expected = [block[:, 1:] + rows(student.mae_pos_embed, ~mask[:, 1:]) for block in blocks[2:]]
    assert_close(inputs.others["mae"], expected)


def test_positions_of_a_set_without_a_class_token_begin_with_the_first_patch():
    student = make_student()
    assert torch.equal(student.mae_pos_embed.data, sincos_table(96, (4, 4, 4))[:, 1:])
    assert not is_decayed("mae_pos_embed", student.mae_pos_embed)
    assert not is_decayed("dino_pos_embed_spatial", student.mae_pos_embed)
    assert is_decayed("mae_decoder.0.head.0.weight", student.mae_decoder[0].head[0].weight)


def test_every_parameter_of_every_set_learns():
    student = make_student()
    middle, pooled, others = student(clip(2, 4, 56), visible_mask(2, 64, 13))
    (middle[..., 0].sum() + pooled[:, 0].sum() + others["mae"][..., 0].sum()).backward()
    still = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("name", ["clip", "img", "final_clip", "MAE", ""])
def test_names_that_are_taken_or_would_not_load_are_refused(name):
    with pytest.raises(ValueError, match="a further teacher's name must be lower-case letters and"):
        make_student(others={name: MAE})


def test_wrong_settings_of_a_set_are_refused():
    with pytest.raises(ValueError, match="num_layers must be 1 to 4, got 5"):
        make_student(others={"mae": ProjectorSet(112, 5, "mlp")})
    with pytest.raises(ValueError, match="decoder must be 'mlp' or 'linear', got 'conv'"):
        make_student(others={"mae": ProjectorSet(112, 2, "conv")})


# Loading


@pytest.fixture
def pretrained(tmp_path):
    """As stage-1 pretraining leaves it, with a further teacher of a name of its own."""
    student = make_student(others={"mae": MAE, "dino": ProjectorSet(32, 1, "linear")})
    torch.save({"module": student.state_dict()}, tmp_path / "pretrained.pt")
    return student, tmp_path / "pretrained.pt"


def test_a_pretrained_student_becomes_a_teacher_or_a_classifier(pretrained):
    student, file = pretrained
    settings = {"frames": 4, "image_size": 56}
    teacher = create_teacher(TINY, checkpoint=file, num_layers=2, interval=1, **settings)
    classifier = create_classifier(TINY, num_classes=7, **settings)
    for report in (teacher.load_report, load_weights(classifier, file)):
        assert {name.split(".")[0] for name in report.unused} == {
            *("clip_pos_embed", "mae_pos_embed", "dino_pos_embed"),
            *("clip_decoder", "final_clip_decoder", "mae_decoder", "dino_decoder"),
        }
    assert torch.equal(classifier.blocks[3].mlp.fc2.weight, student.blocks[3].mlp.fc2.weight)


def test_a_students_own_teachers_must_all_be_in_the_file(pretrained):
    _, file = pretrained
    with pytest.raises(WeightsError, match=r"dino_pos_embed, dino_decoder\.\* \(4\) of the file"):
        load_weights(make_student(), file)


def test_tables_without_a_class_row_are_resized(tmp_path):
    small = make_student(image_size=28)
    small.mae_pos_embed.data = torch.randn(1, 4 * 4, 96)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    student = make_student()
    report = load_weights(student, tmp_path / "small.pt", frames=4)
    assert report.details["mae_pos_embed"] == "4x2x2 -> 4x4x4 patches"
    frames = small.mae_pos_embed.data.unflatten(1, (4, 2, 2))[0].movedim(-1, 1)
    expected = torch.nn.functional.interpolate(frames, size=(4, 4), mode="bicubic")
    assert_close(student.mae_pos_embed.data[0], expected.movedim(1, -1).flatten(0, 2))
