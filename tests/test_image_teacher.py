"""Any timm model as a teacher, frame by frame."""

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from fill import TOLERANCE, clip, fill
from safetensors.torch import save_file
from torch.testing import assert_close

from distill.students.timm_backbone import resize_features
from distill.students.warmstart import WeightsError
from distill.teachers import create_teacher

PIXELS = torch.randint(
    0, 256, (2, 3, 2, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def make_teacher(name="test_vit", **changes):
    settings = {"frames": 2, "image_size": 64, "random": True, **changes}
    return create_teacher(f"timm/{name}", **settings)


@pytest.mark.parametrize(("name", "layers"), [("test_vit", 3), ("test_convnext", 1)])
def test_features_are_what_timm_shows_of_each_frame(name, layers):
    teacher = fill(make_teacher(name, num_layers=layers))
    x = clip(2, 2, 64)
    states, pooled, attention = teacher.hidden(x)
    with torch.inference_mode():
        for b in range(2):
            vectors = []
            for t in range(2):
                last, maps = teacher.trunk.forward_intermediates(x[b : b + 1, :, t], indices=layers)
                vectors.append(teacher.trunk.forward_head(last, pre_logits=True)[0])
                tokens = slice(t * maps[0][0, 0].numel(), (t + 1) * maps[0][0, 0].numel())
                for state, features in zip(states, maps, strict=True):
                    rows = rearrange(features, "1 c h w -> (h w) c")
                    assert_close(state[b, tokens], rows, **TOLERANCE)
            assert_close(pooled[b], (vectors[0] + vectors[1]) / 2, **TOLERANCE)
    assert attention is None


def test_features_are_of_unit_length_and_on_the_grid_asked_for():
    teacher = fill(make_teacher(num_layers=2, side=5), positions=True)
    assert (teacher.grid, teacher.num_patches, teacher.tubelet) == ((2, 5, 5), 50, 1)
    assert (teacher.embed_dim, teacher.pooled_width, teacher.has_cls) == (64, 64, False)
    features = teacher(PIXELS)
    assert features.middle.shape == (2, 2, 50, 64)
    assert_close(features.middle.norm(dim=-1), torch.ones(2, 2, 50))
    assert_close(features.pooled.norm(dim=-1), torch.ones(2))
    own = fill(make_teacher(num_layers=2), positions=True).hidden(PIXELS)[0][1]
    maps = rearrange(own, "b (t h w) c -> (b t) c h w", t=2, h=4)
    maps = F.interpolate(maps, size=(5, 5), mode="bilinear")
    expected = rearrange(maps, "(b t) c h w -> b (t h w) c", t=2)
    assert_close(teacher.hidden(PIXELS)[0][1], expected, **TOLERANCE)


def test_features_that_shrink_are_means_over_an_area():
    features = torch.zeros(1, 1, 1, 16, 16)
    features[..., 5, 7] = 1.0  # seen by the one token whose area it lies in, and its neighbours
    small = resize_features(features, grid=(1, 4, 4))
    assert_close(small.sum(), torch.tensor(1 / 16), rtol=0.05, atol=0)
    assert small.argmax() == 1 * 4 + 1


def test_features_in_time_are_linear():
    features = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    found = resize_features(features, grid=(4, 1, 1)).flatten()
    assert_close(found, torch.tensor([0, 0.25, 0.75, 1]))


def test_input_is_as_timm_has_it_unless_asked_otherwise():
    teacher = fill(make_teacher(image_size=None))
    config = teacher.trunk.pretrained_cfg
    assert (teacher.image_size, teacher.grid) == (160, (2, 10, 10))
    assert (teacher.mean, teacher.std) == (config["mean"], config["std"])
    own = fill(make_teacher(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    axes = (3, 1, 1, 1)
    mean, std = (torch.tensor(x).view(axes) for x in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    expected = own.hidden((PIXELS / 255 - mean) / std)[0]
    assert_close(own.hidden(PIXELS)[0], expected, **TOLERANCE)


def test_teacher_is_frozen_batch_norms_and_all():
    teacher = make_teacher("test_resnet")
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher(PIXELS)
    assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_timms_own_file_loads_and_is_resized_by_timm(tmp_path):
    source = fill(timm.create_model("test_vit", pretrained=False), positions=True)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    teacher = make_teacher(checkpoint=tmp_path / "model.safetensors", random=False)
    report = teacher.load_report
    assert sorted(report.unused) == ["head.bias", "head.weight"]
    assert len(report.taken) == len(source.state_dict()) - 2
    assert not report.left_at_init
    source.set_input_size((64, 64))
    assert torch.equal(teacher.trunk.pos_embed, source.pos_embed)
    x = clip(1, 2, 64)
    with torch.inference_mode():
        _, maps = source.eval().forward_intermediates(x[:, :, 1], indices=1)
    found = teacher.hidden(x)[0][0][:, 16:]
    assert_close(found, rearrange(maps[0], "b c h w -> b (h w) c"), **TOLERANCE)


def test_another_models_or_damaged_file_is_refused(tmp_path):
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match="of the model would stay at init; .* would go unused"):
        make_teacher("test_convnext", checkpoint=tmp_path / "vit.safetensors", random=False)
    del state["blocks.2.norm1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.\* \(1\) of the model would stay at init"):
        make_teacher(checkpoint=tmp_path / "part.safetensors", random=False)


def test_unknown_models_are_refused_with_a_hint():
    message = "timm has no model 'convnext_tinny'; did you mean convnext_tiny"
    with pytest.raises(ValueError, match=message):
        make_teacher("convnext_tinny")
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:someone/model'"):
        make_teacher("hf-hub:someone/model")


def test_stages_of_different_widths_cannot_teach_together():
    with pytest.raises(ValueError, match="last layers are 48, 64 wide, .*; take one layer"):
        make_teacher("test_convnext", num_layers=2)
    with pytest.raises(ValueError, match="9 layers at interval 1.0 do not fit into 6 blocks"):
        make_teacher(num_layers=9)


def test_a_model_of_one_image_size_is_refused_at_another():
    with pytest.raises(ValueError, match="timm's convit_tiny takes 224 px, got 64"):
        make_teacher("convit_tiny")
    with pytest.raises(ValueError, match="timm has no activation"):
        make_teacher(activation="gelu")
