import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from fill import clip, fill
from safetensors.torch import save_file

from distill.students import ViTSize, create_classifier, create_student
from distill.students.warmstart import (
    WeightsError,
    file_sha256,
    k710_rows,
    load_weights,
    read_weights,
    weights_file,
)
from distill.teachers import create_teacher

TINY = ViTSize(96, 2, 3, 2, 48)
PROJECTORS = ("clip_decoder", "clip_pos_embed", "final_clip_decoder")


def make_classifier(size=TINY, *, classes=7, frames=4, image_size=28, **settings):
    return create_classifier(
        size, num_classes=classes, frames=frames, image_size=image_size, **settings
    )


def make_student(size=TINY, *, frames=4, image_size=28, **settings):
    return create_student(
        size,
        frames=frames,
        image_size=image_size,
        teacher_width=32,
        teacher_pooled=16,
        num_layers=2,
        **settings,
    )


def make_backbone(*, frames=4, image_size=28):
    return create_teacher(TINY, frames=frames, image_size=image_size, num_layers=1, random=True)


@pytest.fixture(scope="module")
def source():
    return fill(make_classifier(), positions=True)


def assert_backbone_is(model, source):
    own, given = model.state_dict(), source.state_dict()
    names = [name for name in own if name in given and not name.startswith(("head", "fc_norm"))]
    assert len(names) == 18 + 13 * 2
    for name in names:
        torch.testing.assert_close(own[name], given[name], rtol=0, atol=0, msg=name)


# Layouts


def save_deepspeed(state, folder):
    folder.mkdir()
    torch.save(
        {"module": state, "epoch": 3, "param_shapes": [torch.Size([2])], "ds_version": "0.10.1"},
        folder / "mp_rank_00_model_states.pt",
    )


def save_tagged_deepspeed(state, folder):
    folder.mkdir()
    save_deepspeed(state, folder / "checkpoint-best")
    (folder / "latest").write_text("checkpoint-best\n")


def save_own_run(state, file):
    """As upstream's runner without DeepSpeed writes it, arguments and NumPy scalars included."""
    args = argparse.Namespace(lr=1e-3, model="internvideo2_small_patch14_224", betas=(0.9, 0.98))
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.016), "step": np.int64(7)}]}
    torch.save(
        {"model": state, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}, file
    )


def prefixed(prefix):
    return lambda state, file: torch.save({prefix + k: v for k, v in state.items()}, file)


def save_folder(state, folder):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")


LAYOUTS = {
    "bare.pth": torch.save,
    "bare.bin": torch.save,
    "legacy.pth": lambda s, f: torch.save(s, f, _use_new_zipfile_serialization=False),
    "model.pth": lambda s, f: torch.save({"model": s}, f),
    "module.pt": lambda s, f: torch.save({"module": s, "epoch": 1}, f),
    "both.pth": lambda s, f: torch.save({"module": {}, "model": s}, f),
    "own_run.pth": save_own_run,
    "backbone.pth": prefixed("backbone."),
    "encoder.pth": prefixed("encoder."),
    "parallel.pth": prefixed("module."),
    "vision.pth": prefixed("vision_encoder."),
    "weights.safetensors": save_file,
    "deepspeed": save_deepspeed,
    "tagged": save_tagged_deepspeed,
    "run": save_folder,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads(name, source, tmp_path):
    LAYOUTS[name](source.state_dict(), tmp_path / name)
    model = make_classifier()
    report = load_weights(model, tmp_path / name, head="keep")
    assert_backbone_is(model, source)
    assert torch.equal(model.head.weight, source.head.weight)
    assert report.taken == tuple(source.state_dict())
    assert report.left_at_init + report.unused + report.resized + report.mapped == ()
    assert set(read_weights(tmp_path / name)) == set(source.state_dict())


def test_scalars_that_numpy_1_wrote_are_plain_data(source, tmp_path):
    content = {"model": source.state_dict(), "lr": np.float64(0.016)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    written = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(written.replace(b"numpy._core.", b"numpy.core."))
    assert set(read_weights(tmp_path / "old.pth")) == set(source.state_dict())


def test_loaded_models_give_the_same_logits(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = make_classifier()
    load_weights(model, str(tmp_path / "a.pth"), head="keep")
    x = clip(2, 4, 28)
    assert torch.equal(model(x), source(x))


def test_half_precision_weights_load_into_float32(source, tmp_path):
    state = {name: value.half() for name, value in source.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    model = make_classifier()
    load_weights(model, tmp_path / "half.pth", head="keep")
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source.head.weight.half().float())
    assert read_weights(tmp_path / "half.pth")["head.weight"].dtype == torch.float16


def test_the_vision_encoder_of_a_multi_modality_model_is_taken(tmp_path):
    """The stage-2 1B layout: image tables, linear decoders, and other towers beside it."""
    stage2 = fill(make_student(decoder="linear"), positions=True)
    state = {f"vision_encoder.{name}": value for name, value in stage2.state_dict().items()}
    image = torch.zeros(1, 5, 96)
    others = {
        "vision_encoder.img_pos_embed": image,
        "vision_encoder.clip_img_pos_embed": image,
        "text_encoder.bert.embeddings.weight": image,
        "vision_proj.weight": image,
        "text_proj.bias": image,
        "temp": torch.tensor(0.07),
        "itm_head.weight": image,
    }
    torch.save({"module": {**state, **others}}, tmp_path / "1B_pt_stage2.pth")
    teacher = make_backbone(frames=8)
    report = load_weights(teacher, tmp_path / "1B_pt_stage2.pth")
    assert report.left_at_init == ()
    assert report.resized == ("pos_embed",)
    assert len(report.taken) == len(teacher.state_dict()) - 1
    used = {*report.taken, *report.resized}
    unused = [name for name in stage2.state_dict() if name not in used]
    unused += [name.removeprefix("vision_encoder.") for name in others]
    assert sorted(report.unused) == sorted(unused)
    assert torch.equal(teacher.blocks[1].mlp.fc1.weight, stage2.blocks[1].mlp.fc1.weight)


def test_tubelets_of_one_frame_are_inflated(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = make_classifier(frames=8, tubelet=2)
    report = load_weights(model, tmp_path / "a.pth", head="keep")
    assert report.mapped == ("patch_embed.proj.weight",)
    kernel = source.patch_embed.proj.weight
    torch.testing.assert_close(
        model.patch_embed.proj.weight, torch.cat([kernel, kernel], dim=2) / 2, rtol=0, atol=0
    )
    still = clip(1, 4, 28).repeat_interleave(2, dim=2)  # each pair of frames shows the same
    torch.testing.assert_close(model(still), source(still[:, :, ::2]), rtol=1e-4, atol=1e-5)


# Position tables


def table_file(tmp_path, table, *, name="pos_embed", **extra):
    state = fill(make_backbone()).state_dict()
    state.update({name: table, **extra})
    torch.save(state, tmp_path / "table.pth")
    return tmp_path / "table.pth"


def ramp(frames, cells):
    """A table whose patches hold their frame's number, and whose class row is -1."""
    steps = torch.arange(frames).float().repeat_interleave(cells)
    return torch.cat([torch.tensor([-1.0]), steps])[None, :, None].expand(1, -1, 96).contiguous()


def test_four_to_eight_frames_interpolate_linearly(tmp_path):
    teacher = make_backbone(frames=8)
    report = load_weights(teacher, table_file(tmp_path, ramp(4, 4)))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert torch.equal(teacher.pos_embed[0, 1:, 5], expected.repeat_interleave(4))
    assert torch.equal(teacher.pos_embed[0, 0], torch.full((96,), -1.0))
    assert report.resized == ("pos_embed",)
    assert report.details == {"pos_embed": "4x2x2 -> 8x2x2 patches"}


def test_eight_to_sixteen_frames_interpolate_linearly(tmp_path):
    teacher = make_backbone(frames=16)
    load_weights(teacher, table_file(tmp_path, ramp(8, 4)))
    expected = [0.0] + [k / 2 + 0.25 for k in range(14)] + [7.0]
    assert teacher.pos_embed[0, 1::4, 0].tolist() == expected


def test_sixteen_to_eight_frames_average_neighbours(tmp_path):
    teacher = make_backbone(frames=8)
    load_weights(teacher, table_file(tmp_path, ramp(16, 4)))
    assert teacher.pos_embed[0, 1::4, 0].tolist() == [2 * k + 0.5 for k in range(8)]


def bicubic(image, side):
    """Cubic convolution with a = -0.75 and half-pixel centres, edges repeated, in float64."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    old = len(image)
    weights = np.zeros((side, old))
    for i in range(side):
        u = (i + 0.5) * old / side - 0.5
        for j in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
            weights[i, min(max(j, 0), old - 1)] += kernel(u - j)
    return weights @ image @ weights.T


def test_224_to_336_pixels_interpolate_bicubically(tmp_path):
    table = torch.randn(1, 1 + 2 * 256, 96)
    teacher = make_backbone(frames=2, image_size=336)
    report = load_weights(teacher, table_file(tmp_path, table))
    assert report.details == {"pos_embed": "2x16x16 -> 2x24x24 patches"}
    assert teacher.pos_embed.shape == (1, 1 + 2 * 576, 96)
    assert torch.equal(teacher.pos_embed[0, 0], table[0, 0])
    for frame, channel in ((0, 0), (1, 95)):
        image = table[0, 1 + 256 * frame :, channel][:256].view(16, 16).double().numpy()
        found = teacher.pos_embed[0, 1 + 576 * frame :, channel][:576].view(24, 24)
        expected = torch.from_numpy(bicubic(image, 24)).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_frames_and_size_change_together_time_first(tmp_path):
    table = torch.randn(1, 1 + 4 * 16, 96)
    model, both = make_backbone(frames=8, image_size=42), make_backbone(frames=8, image_size=56)
    load_weights(model, table_file(tmp_path, table), frames=4)
    load_weights(both, table_file(tmp_path, table), frames=4)
    for frame in range(8):
        image = both.pos_embed[0, 1 + 16 * frame :, 3][:16].view(4, 4).double().numpy()
        found = model.pos_embed[0, 1 + 9 * frame :, 3][:9].view(3, 3)
        expected = torch.from_numpy(bicubic(image, 3)).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_tables_are_interpolated_in_float32(tmp_path):
    table = torch.randn(1, 17, 96).half()
    halved, full = make_backbone(frames=8), make_backbone(frames=8)
    load_weights(halved, table_file(tmp_path, table))
    load_weights(full, table_file(tmp_path, table.float()))
    assert torch.equal(halved.pos_embed, full.pos_embed)
    assert not torch.equal(full.pos_embed, full.pos_embed.half().float())


def test_both_tables_of_a_student_are_resized(tmp_path):
    torch.save(fill(make_student()).state_dict(), tmp_path / "student.pth")
    student = make_student(frames=8)
    report = load_weights(student, tmp_path / "student.pth")
    assert report.resized == ("pos_embed", "clip_pos_embed")
    assert report.left_at_init + report.unused == ()


def test_separable_tables_are_resized_each_in_its_own_axes(tmp_path):
    source = make_classifier(positions="separable", image_size=56)
    spatial, temporal = torch.randn(1, 16, 96), torch.randn(1, 4, 96)
    source.pos_embed_spatial.data, source.pos_embed_temporal.data = spatial, temporal
    source.pos_embed_cls.data.fill_(2.0)
    torch.save(source.state_dict(), tmp_path / "separable.pth")
    model = make_classifier(positions="separable", image_size=42, frames=8)
    report = load_weights(model, tmp_path / "separable.pth", head="keep")
    assert report.resized == ("pos_embed_spatial", "pos_embed_temporal")
    expected = bicubic(spatial[0, :, 7].view(4, 4).double().numpy(), 3)
    torch.testing.assert_close(
        model.pos_embed_spatial[0, :, 7].view(3, 3).double(),
        torch.from_numpy(expected),
        rtol=1e-4,
        atol=1e-5,
    )
    found = model.pos_embed_temporal[0, :, 0]
    assert torch.equal(found[0], temporal[0, 0, 0])
    torch.testing.assert_close(found[1], 0.75 * temporal[0, 0, 0] + 0.25 * temporal[0, 1, 0])
    assert torch.equal(model.pos_embed_cls, torch.full((1, 1, 96), 2.0))


def test_metadata_tells_the_frames(tmp_path):
    state = fill(make_backbone(frames=4, image_size=56)).state_dict()
    save_file(state, tmp_path / "a.safetensors", metadata={"frames": "4"})
    teacher = make_backbone(frames=16, image_size=28)
    report = load_weights(teacher, tmp_path / "a.safetensors")
    assert report.details == {"pos_embed": "4x4x4 -> 16x2x2 patches"}
    with pytest.raises(WeightsError, match="frames: 16 given, but the file says 4"):
        load_weights(teacher, tmp_path / "a.safetensors", frames=16)


def test_given_frames_count_tubelets(tmp_path):
    state = make_classifier(frames=8, tubelet=2).state_dict()
    torch.save(state, tmp_path / "a.pth")
    model = make_classifier(frames=4, tubelet=2)
    report = load_weights(model, tmp_path / "a.pth", frames=8, head="keep")
    assert report.details == {"pos_embed": "4x2x2 -> 2x2x2 patches"}


def test_an_ambiguous_table_asks_for_the_frames(tmp_path):
    path = table_file(tmp_path, ramp(4, 16))  # 64 patches: 16 frames of 2x2, or 1 of 8x8
    teacher = make_backbone(frames=1)
    with pytest.raises(
        WeightsError, match="pos_embed has 64 patch positions: 16x2x2 or 1x8x8; set frames"
    ):
        load_weights(teacher, path)
    report = load_weights(teacher, path, frames=4)
    assert report.details == {"pos_embed": "4x4x4 -> 1x2x2 patches"}


def test_frames_that_do_not_fit_the_table_are_refused(tmp_path):
    path = table_file(tmp_path, ramp(4, 4))
    with pytest.raises(WeightsError, match="has 16 patch positions, which are not 8 square grids"):
        load_weights(make_backbone(), path, frames=8)


# Heads


@pytest.fixture(scope="module")
def k710(tmp_path_factory):
    source = fill(make_classifier(classes=710))
    path = tmp_path_factory.mktemp("k710") / "k710.pth"
    torch.save(source.state_dict(), path)
    return source, path


def test_first_rows_of_k710_are_k400(k710):
    source, path = k710
    model = make_classifier(classes=400)
    report = load_weights(model, path, head="first")
    assert torch.equal(model.head.weight, source.head.weight[:400])
    assert torch.equal(model.head.bias, source.head.bias[:400])
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    assert report.mapped == ("head.weight", "head.bias")
    assert report.details["head.weight"] == "710 -> 400 classes (first)"


@pytest.mark.parametrize(
    ("policy", "classes", "first", "last"),
    [
        ("k600", 600, [121, 562, 518, 124, 188], [334, 296, 673, 106, 135]),
        ("k700", 700, [363, 481, 594, 215, 295], [181, 280, 60, 94, 570]),
    ],
)
def test_rows_of_k710_map_to_the_classes_of_k600_and_k700(k710, policy, classes, first, last):
    source, path = k710
    model = make_classifier(classes=classes)
    report = load_weights(model, path, head=policy)
    assert torch.equal(model.head.weight[:5], source.head.weight[first])
    assert torch.equal(model.head.weight[-5:], source.head.weight[last])
    assert torch.equal(model.head.bias[-5:], source.head.bias[last])
    assert report.mapped == ("head.weight", "head.bias")


def test_k710_maps_are_the_published_ones():
    k600, k700 = k710_rows("k600"), k710_rows("k700")
    assert (len(set(k600)), min(k600), max(k600), sum(row < 400 for row in k600)) == (
        600,
        0,
        709,
        382,
    )
    assert (len(set(k700)), min(k700), max(k700), sum(row < 400 for row in k700)) == (
        700,
        0,
        707,
        392,
    )
    assert sorted(set(range(710)) - set(k600) - set(k700)) == [
        95, 111, 139, 161, 227, 293, 316, 380,
    ]  # fmt: skip


def test_reset_leaves_the_head_at_init_and_carries_fc_norm(k710):
    source, path = k710
    model = make_classifier(classes=710)
    before = model.head.weight.clone()
    report = load_weights(model, path)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.fc_norm.bias, source.fc_norm.bias)
    assert report.left_at_init == report.unused == ("head.weight", "head.bias")


@pytest.mark.parametrize(
    ("policy", "classes", "message"),
    [
        ("keep", 400, "the file has 710 classes and the model 400; set head to first, k600"),
        ("first", 800, "takes the first rows, but the file has 710 classes and the model 800"),
        ("k600", 400, "takes 710 classes to 600, but the file has 710 classes and the model 400"),
        ("k700", 600, "takes 710 classes to 700, but the file has 710 classes and the model 600"),
        ("best", 400, "head: 'best' is none of keep, first, k600, k700, reset"),
    ],
)
def test_heads_that_do_not_fit_are_refused(k710, policy, classes, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(make_classifier(classes=classes), k710[1], head=policy)


def test_a_map_of_k710_needs_710_rows(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="but the file has 7 classes and the model 600"):
        load_weights(make_classifier(classes=600), tmp_path / "a.pth", head="k600")


def test_a_kept_head_must_be_there(tmp_path):
    torch.save(make_backbone().state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="head: keep asked for, but the file has no head"):
        load_weights(make_classifier(), tmp_path / "a.pth", head="keep")


def test_a_model_without_a_head_keeps_none(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="head: keep asked for, but the model has no head"):
        load_weights(make_backbone(), tmp_path / "a.pth", head="keep")


# Accounting


def test_finetuning_starts_from_a_distilled_student(tmp_path):
    student = fill(make_student(), positions=True)
    torch.save(student.state_dict(), tmp_path / "pytorch_model.bin")
    model = make_classifier()
    report = load_weights(model, tmp_path / "pytorch_model.bin")
    assert_backbone_is(model, student)
    assert report.left_at_init == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert set(report.unused) == {k for k in student.state_dict() if k.startswith(PROJECTORS)}
    assert len(report.taken) == 18 + 13 * 2


def test_a_probe_starts_from_a_finetuned_model(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = make_classifier(probe="attentive_mlp")
    report = load_weights(model, tmp_path / "a.pth")
    assert {name.split(".")[0] for name in report.left_at_init} == {"extra_mlp", "head"}
    merged = make_classifier(probe="cls_avgN_proj", probe_norm="BN")
    report = load_weights(merged, tmp_path / "a.pth")
    assert {name.split(".")[0] for name in report.left_at_init} == {"down", "down_norm", "head"}


def test_a_report_says_everything_in_lines(tmp_path):
    student = fill(make_student(), positions=True)
    torch.save(student.state_dict(), tmp_path / "s.pth")
    report = load_weights(make_classifier(frames=8), tmp_path / "s.pth")
    assert report.lines() == [
        f"{tmp_path / 's.pth'}: 43 tensors taken as they are",
        "resized: pos_embed, 4x2x2 -> 8x2x2 patches",
        "left at init: fc_norm.* (2), head.* (2)",
        "unused: clip_pos_embed, clip_decoder.* (12), final_clip_decoder.* (6)",
    ]


def test_mapped_heads_are_in_the_lines(k710):
    lines = load_weights(make_classifier(classes=400), k710[1], head="first").lines()
    assert lines[1:] == [
        "mapped: head.weight, 710 -> 400 classes (first)",
        "mapped: head.bias, 710 -> 400 classes (first)",
    ]


def altered(source, tmp_path, *, drop=(), add=()):
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(tuple(drop) or "?")}
    state.update({name: torch.zeros(3) for name in add})
    torch.save(state, tmp_path / "altered.pth")
    return tmp_path / "altered.pth"


def test_missing_weights_are_an_error_unless_named(source, tmp_path):
    path = altered(source, tmp_path, drop=["blocks.1."])
    model = make_classifier()
    with pytest.raises(
        WeightsError,
        match=r"altered.pth: blocks\.\* \(13\) of the model would stay at init; .*allow_missing$",
    ):
        load_weights(model, path, head="keep")
    report = load_weights(model, path, head="keep", allow_missing=("blocks.1.",))
    assert len(report.left_at_init) == 13


def test_half_a_head_is_an_error(source, tmp_path):
    path = altered(source, tmp_path, drop=["fc_norm.bias"])
    with pytest.raises(WeightsError, match=r"fc_norm\.\* \(1\) of the model would stay at init"):
        load_weights(make_classifier(), path)


def test_unknown_weights_are_an_error_unless_named(source, tmp_path):
    path = altered(source, tmp_path, add=["adapter.down", "extra_token"])
    model = make_classifier()
    with pytest.raises(
        WeightsError,
        match=r"adapter\.\* \(1\), extra_token of the file would go unused; .*allow_unused$",
    ):
        load_weights(model, path, head="keep")
    report = load_weights(model, path, head="keep", allow_unused=("adapter.", "extra_token"))
    assert report.unused == ("adapter.down", "extra_token")


def test_both_kinds_of_problem_are_named_at_once(source, tmp_path):
    path = altered(source, tmp_path, drop=["cls_token"], add=["extra_token"])
    with pytest.raises(
        WeightsError,
        match="cls_token of the model .*; extra_token of the file .* allow_missing and allow_un",
    ):
        load_weights(make_classifier(), path, head="keep")


def test_a_student_does_not_lose_its_decoders_unnoticed(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    student = make_student()
    with pytest.raises(
        WeightsError,
        match=r"clip_pos_embed, clip_decoder\.\* \(12\), final_clip_decoder\.\* \(6\) of the model "
        r"would stay at init; fc_norm\.\* \(2\), head\.\* \(2\) of the file would go unused",
    ):
        load_weights(student, tmp_path / "a.pth")
    load_weights(
        student, tmp_path / "a.pth", allow_missing=PROJECTORS, allow_unused=("fc_norm.", "head.")
    )
    assert_backbone_is(student, source)


def test_a_refused_checkpoint_changes_nothing(source, tmp_path):
    path = altered(source, tmp_path, add=["extra_token"])
    model = make_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError):
        load_weights(model, path, head="keep")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_models_weights_are_refused_by_size(tmp_path):
    with torch.device("meta"):
        small = make_classifier("S14", frames=8, image_size=224).state_dict()
        base = make_classifier("B14", frames=8, image_size=224)
    state = {name: torch.zeros(1, dtype=v.dtype).expand(v.shape) for name, v in small.items()}
    torch.save(state, tmp_path / "S14.pth")
    with pytest.raises(
        WeightsError, match=r"173 of 176 tensors .*; the file is S14, the model B14$"
    ):
        load_weights(base, tmp_path / "S14.pth")


# Files that cannot be read


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True, "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(legacy, source, tmp_path):
    content = {"model": source.state_dict(), "extra": Payload(str(tmp_path / "ran"))}
    path = tmp_path / "evil.pth"
    if legacy == "pickle":
        path.write_bytes(pickle.dumps({"extra": content["extra"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="evil.pth: refused, reading it would run code .*mkdir"):
        load_weights(make_classifier(), path)
    assert not (tmp_path / "ran").exists()


def test_an_innocent_looking_class_is_refused_too(source, tmp_path):
    torch.save({"model": source.state_dict(), "size": TINY}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="refused, reading it would run code .*ViTSize"):
        load_weights(make_classifier(), tmp_path / "a.pth")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere.pth: no such file; check the path"):
        load_weights(make_classifier(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"not weights at all\n"),
        ("empty.safetensors", b""),
        ("text.safetensors", b"not weights at all, though long enough for a header\n"),
    ],
)
def test_unreadable_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: not a readable (torch|safetensors) file"):
        load_weights(make_classifier(), tmp_path / name)


def test_what_is_no_torch_file_is_told_by_its_beginning(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content, reason in (
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "begins with b'version htt"),
        (b"0a1!", "it begins with b'0a1!'"),
        (b"\x80\x02a.", "damaged or cut short"),
        (b"\x80\x02h\x05.", "damaged or cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"model.bin: not a readable torch file .*{reason}"):
            load_weights(make_classifier(), path)


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_truncated_files_are_named(name, source, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)(
        source.state_dict(), tmp_path / name
    )
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=f"{name}: not a readable"):
        load_weights(make_classifier(), tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict, found list"),
        ({}, "expected a state dict, bare or under model or module, found nothing"),
        ({"epoch": 3, "lr": 0.1}, "expected a state dict, .* found epoch, lr"),
    ],
)
def test_files_without_weights_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(make_classifier(), tmp_path / "a.pth")


def test_folders_without_one_weights_file_are_refused(source, tmp_path):
    with pytest.raises(WeightsError, match="holds none of mp_rank_00_model_states.pt, model.safe"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="holds 2 of mp_rank_00_model_states.pt, model.safe"):
        read_weights(tmp_path)


def test_zero_stage_3_shards_are_refused_with_the_tool_that_joins_them(tmp_path):
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match="ZeRO stage 3 shards; join them with DeepSpeed's zero"):
        read_weights(tmp_path)


def test_sha256_of_a_file_and_of_the_folder_that_holds_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "model.safetensors") == expected
    assert file_sha256(tmp_path) == expected


@pytest.mark.parametrize("name", [b"../other", b"..", b"/etc", b"a/b", b"", b"\xff"])
def test_a_tag_that_is_no_folders_name_is_refused(tmp_path, name):
    folder = tmp_path / "run"
    for place in (folder, tmp_path, tmp_path / "other", folder / "a" / "b"):
        place.mkdir(parents=True, exist_ok=True)
    for place in (tmp_path, tmp_path / "other", folder / "a" / "b"):
        torch.save({}, place / "pytorch_model.bin")
    (folder / "latest").write_bytes(name)
    with pytest.raises(WeightsError) as error:
        weights_file(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
