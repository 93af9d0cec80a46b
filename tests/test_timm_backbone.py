"""Any timm model as a student of a video teacher, and as a classifier of clips."""

import pytest
import timm
import torch
from einops import rearrange
from fill import TOLERANCE, clip, fill
from safetensors.torch import save_file
from tiny_video import TinyVideo
from torch import nn
from torch.testing import assert_close

from distill.students.student import ProjectorSet
from distill.students.timm_backbone import TimmBackbone, TimmClassifier, TimmStudent, load_timm
from distill.students.warmstart import WeightsError

TOKENS = torch.tensor([[0, 3, 7, 30], [1, 2, 16, 31]])


def make_student(name="test_resnet", **changes):
    settings = {
        "frames": 2,
        "image_size": 64,
        "side": 4,
        "teacher_width": 40,
        "teacher_pooled": 24,
        "num_layers": 2,
        "decoder": "mlp",
    }
    return fill(TimmStudent(name, **{**settings, **changes})).eval()


def make_classifier(name="test_resnet", **changes):
    settings = {"frames": 2, "image_size": 64, "num_classes": 7}
    return TimmClassifier(name, **{**settings, **changes})


def test_a_cnns_last_stages_are_resized_to_the_teachers_tokens():
    student = make_student()
    x = clip(2, 2, 64)
    inputs = student.decoder_inputs(x)
    assert student.widths == (192, 96)
    with torch.no_grad():
        _, maps = student.trunk.forward_intermediates(x[:, :, 1], indices=2)
    for state, features in zip(inputs.states, maps, strict=True):
        frames = nn.functional.interpolate(features, size=(4, 4), mode="bilinear", antialias=True)
        assert_close(state[:, 16:], rearrange(frames, "b c h w -> b (h w) c"), **TOLERANCE)
    pairs = zip(student.clip_decoder, inputs.states, strict=True)
    assert [tuple(decode(state).shape) for decode, state in pairs] == [(2, 32, 40)] * 2
    assert student.final_clip_decoder(inputs.pooled).shape == (2, 24)


def test_rows_of_the_tokens_alone_are_taken():
    student = make_student(num_layers=1)
    x = clip(2, 2, 64)
    everything = student.decoder_inputs(x).states[0]
    rows = student.decoder_inputs(x, tokens=TOKENS).states[0]
    assert torch.equal(rows, torch.stack([everything[b, TOKENS[b]] for b in range(2)]))


def test_further_teachers_take_layers_of_the_same_forward():
    others = {"mae": ProjectorSet(32, 3, "linear"), "dino": ProjectorSet(16, 1, "mlp")}
    student = make_student(others=others)
    inputs = student.decoder_inputs(clip(2, 2, 64))
    assert [len(inputs.states), *map(len, inputs.others.values())] == [2, 3, 1]
    assert torch.equal(inputs.others["mae"][1], inputs.states[0])
    assert torch.equal(inputs.others["dino"][0], inputs.states[1])
    for name, width in (("mae", 32), ("dino", 16)):
        decoders = student.get_submodule(f"{name}_decoder")
        out = [decode(state) for decode, state in zip(decoders, inputs.others[name], strict=True)]
        assert {tuple(rows.shape) for rows in out} == {(2, 32, width)}


def test_everything_that_is_aligned_learns():
    student = make_student("test_vit").train()
    inputs = student.decoder_inputs(clip(2, 2, 64), tokens=TOKENS)
    loss = sum(
        decode(state)[..., 0].sum()
        for decode, state in zip(student.clip_decoder, inputs.states, strict=True)
    )
    (loss + student.final_clip_decoder(inputs.pooled)[:, 0].sum()).backward()
    still = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_uint8_clips_are_normalised_as_timm_has_it():
    student = make_student("test_vit")
    pixels = torch.randint(0, 256, (1, 3, 2, 64, 64), dtype=torch.uint8)
    config = student.trunk.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1, 1) for key in ("mean", "std"))
    expected = student.decoder_inputs((pixels / 255 - mean) / std)
    found = student.decoder_inputs(pixels)
    assert_close(found.states, expected.states, **TOLERANCE)
    assert_close(found.pooled, expected.pooled, **TOLERANCE)


def test_more_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match="6 layers at interval 1.0 do not fit into 5 blocks"):
        make_student(num_layers=6)


def test_clips_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected a clip \[B,3, 2, 64, 64\], got \[1, 3, 4, 64"):
        make_student().decoder_inputs(clip(1, 4, 64))


def test_a_video_model_sees_whole_clips(monkeypatch):
    monkeypatch.setattr(timm, "is_model", lambda name: name == "tiny_video")
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: TinyVideo(**settings))
    backbone = fill(TimmBackbone("tiny_video", frames=4, side=2, num_layers=2))
    x = clip(2, 4, 32)
    states, pooled = backbone.show(x)
    assert [tuple(state.shape) for state in states] == [(2, 4 * 4, 8), (2, 4 * 4, 12)]
    features = backbone.trunk.stage(backbone.trunk.stem(x))  # [2,12,2,2,2]
    assert_close(pooled, features.mean(dim=(2, 3, 4)))
    early = 0.75 * features[:, :, 0] + 0.25 * features[:, :, 1]  # of four frames the second
    assert_close(states[1][:, 4:8], rearrange(early, "b c h w -> b (h w) c"), **TOLERANCE)


# Classifiers


def test_a_classifier_pools_frames_and_starts_near_zero():
    model = make_classifier().eval()
    x = clip(2, 2, 64)
    logits = model(x)
    assert logits.shape == (2, 7)
    assert 0 < logits.abs().max() < 0.01
    fill(model)
    with torch.no_grad():
        pooled = torch.stack([model.trunk(x[:, :, t]) for t in range(2)]).mean(0)
        expected = model.head(model.fc_norm(pooled))
        assert_close(model(x), expected, **TOLERANCE)


def test_a_frozen_trunk_stays_in_eval_mode():
    model = make_classifier().train()
    assert model.trunk.training
    model.trunk.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.trunk.modules())
    assert model.head.training


def test_layers_are_timms_and_the_head_is_above_them():
    ids = make_classifier("test_vit").layer_ids()
    assert ids["trunk.pos_embed"] == ids["trunk.patch_embed.proj.weight"] == 0
    assert [ids[f"trunk.blocks.{i}.attn.qkv.weight"] for i in range(6)] == [1, 2, 3, 4, 5, 6]
    assert "head.weight" not in ids
    assert make_classifier("test_vit").no_weight_decay() >= {"trunk.pos_embed", "trunk.cls_token"}


# Weights


def test_a_students_trunk_becomes_a_classifiers(tmp_path):
    student = make_student()
    student.trunk.bn1.running_mean.fill_(0.5)
    torch.save(student.state_dict(), tmp_path / "student.pth")
    model = make_classifier()
    report = load_timm(model, tmp_path / "student.pth")
    assert report.left_at_init == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert {name.split(".")[0] for name in report.unused} == {"clip_decoder", "final_clip_decoder"}
    assert_close(model.trunk.state_dict(), student.trunk.state_dict(), rtol=0, atol=0)


def test_a_classifier_goes_on_with_another_head(tmp_path):
    source = fill(make_classifier(num_classes=710))
    torch.save({"model": source.state_dict()}, tmp_path / "k710.pth")
    model = make_classifier(num_classes=400)
    report = load_timm(model, tmp_path / "k710.pth", head="first")
    assert report.details["head.weight"] == "710 -> 400 classes (first)"
    assert torch.equal(model.head.weight, source.head.weight[:400])
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    with pytest.raises(WeightsError, match="head: keep asked for, but the file has 710 classes"):
        load_timm(model, tmp_path / "k710.pth", head="keep")


def test_timms_own_file_starts_a_student(tmp_path):
    source = fill(timm.create_model("test_resnet", pretrained=False))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    student = make_student()
    report = load_timm(student, tmp_path / "model.safetensors")
    assert sorted(report.unused) == ["fc.bias", "fc.weight"]
    assert {name.split(".")[0] for name in report.left_at_init} == {
        "clip_decoder",
        "final_clip_decoder",
    }
    assert torch.equal(student.trunk.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_a_file_of_another_trunk_is_refused(tmp_path):
    torch.save(make_student("test_convnext").state_dict(), tmp_path / "convnext.pth")
    with pytest.raises(WeightsError, match=r"trunk\.\* \(\d+\) of the model would stay at init"):
        load_timm(make_classifier(), tmp_path / "convnext.pth")
