"""InternVL frame by frame, and VideoMAE on tubelets: the teachers of stage-1 pretraining."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from fill import TOLERANCE, clip, fill, golden, golden_sections, keys_of
from torch.testing import assert_close

from distill.students import ViTSize
from distill.students.warmstart import WeightsError
from distill.teachers import create_teacher, fit_clip
from distill.teachers.videomae import sine_table

INTERNVL = ViTSize(96, 4, 3, 4, 48)
VIDEOMAE = ViTSize(96, 3, 3, 48 / 11)


def make_internvl(**changes):
    settings = {"frames": 4, "image_size": 56, "num_layers": 3, "activation": "gelu"}
    settings = {"random": True, **settings, **changes}
    return create_teacher(INTERNVL, family="internvl", **settings)


def make_videomae(**changes):
    settings = {"random": True, "num_layers": 2, **changes}
    return create_teacher(VIDEOMAE, family="videomae", **settings)


def test_internvls_features_equal_the_reference():
    expected = golden("tiny_pretrain")
    teacher = fill(make_internvl(), positions=True)
    features = teacher(clip(2, 4, 56))
    assert_close(features.middle, expected["internvl_middle"], **TOLERANCE)
    assert_close(features.pooled, expected["internvl_final"], **TOLERANCE)
    attention = rearrange(features.attention, "b (t n) -> (b t) n", t=4)
    assert_close(attention, expected["internvl_attention"], **TOLERANCE)
    assert teacher.return_layers == tuple(sorted(expected["internvl_index"].tolist()))


def test_videomaes_features_equal_the_reference():
    expected = golden("tiny_pretrain")
    teacher = fill(make_videomae())
    features = teacher(clip(1, 16, 224, seed=3))
    assert features.middle.shape == (2, 1, 2048, 96)
    assert_close(features.middle[:, :, ::37], expected["videomae_middle"], **TOLERANCE)
    assert features.pooled is None and features.attention is None
    assert teacher.return_layers == tuple(sorted(expected["videomae_index"].tolist()))


def test_state_dicts_are_the_references():
    keys = golden_sections("tiny_pretrain")
    assert keys_of(make_internvl()) == keys["internvl"]
    assert keys_of(make_videomae()) == keys["videomae"]


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "layers", "grid"),
    [
        ("internvl_6b", 5_936_000_768, 642, (42, 43, 44, 45, 46, 47), (8, 16, 16)),
        ("videomae_g", 1_011_610_752, 524, (36, 37, 38, 39), (8, 16, 16)),
    ],
)
def test_published_teachers_have_the_published_size(name, parameters, tensors, layers, grid):
    with torch.device("meta"):
        teacher = create_teacher(name, random=True)
    state = teacher.state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == (parameters, tensors)
    assert (teacher.return_layers, teacher.grid) == (layers, grid)


def test_internvl_sees_each_frame_on_its_own():
    teacher = fill(make_internvl(), positions=True)
    x = clip(1, 4, 56)
    features = teacher.hidden(x)
    image_teacher = fill(make_internvl(frames=1), positions=True)
    frames = [image_teacher.hidden(x[:, :, t : t + 1]) for t in range(4)]
    for layer, state in enumerate(features[0]):
        cls = torch.stack([states[layer][:, 0] for states, _, _ in frames]).mean(0)
        patches = torch.cat([states[layer][:, 1:] for states, _, _ in frames], dim=1)
        assert_close(state, torch.cat([cls[:, None], patches], dim=1), **TOLERANCE)
    assert_close(features[1], torch.stack([pooled for _, pooled, _ in frames]).mean(0), **TOLERANCE)
    assert_close(features[2], torch.cat([weights for _, _, weights in frames], 1), **TOLERANCE)


def plain_videomae(teacher, x):
    """VideoMAE by its formulas, a head at a time, with every axis named."""
    p = dict(teacher.named_parameters())
    kernel, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    h = F.conv3d(x, kernel, bias, stride=kernel.shape[2:])
    h = rearrange(h, "b e t h w -> b (t h w) e")
    position = torch.arange(h.shape[1])[:, None].double()
    channel = torch.arange(h.shape[2])
    angle = position / 10000 ** (2 * (channel // 2).double() / h.shape[2])
    h = h + torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
    width = h.shape[2] // teacher.size.heads

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)

    states = []
    for i in range(teacher.depth):
        x = norm(h, f"blocks.{i}.norm1")
        q, k, v = F.linear(x, p[f"blocks.{i}.attn.qkv.weight"]).chunk(3, dim=-1)
        q, v = q + p[f"blocks.{i}.attn.q_bias"], v + p[f"blocks.{i}.attn.v_bias"]
        heads = []
        for head in range(teacher.size.heads):
            own = slice(head * width, (head + 1) * width)
            scores = torch.einsum("bnd,bmd->bnm", q[..., own], k[..., own]) / width**0.5
            heads.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), v[..., own]))
        x = torch.cat(heads, dim=-1)
        h = h + F.linear(x, p[f"blocks.{i}.attn.proj.weight"], p[f"blocks.{i}.attn.proj.bias"])
        x = norm(h, f"blocks.{i}.norm2")
        x = F.gelu(F.linear(x, p[f"blocks.{i}.mlp.fc1.weight"], p[f"blocks.{i}.mlp.fc1.bias"]))
        h = h + F.linear(x, p[f"blocks.{i}.mlp.fc2.weight"], p[f"blocks.{i}.mlp.fc2.bias"])
        states.append(norm(h, "norm") if i == teacher.depth - 1 else h)
    return [states[i] for i in teacher.return_layers]


def test_videomae_attends_across_tokens_and_not_across_heads():
    teacher = fill(make_videomae(num_layers=3))
    x = clip(1, 16, 224, seed=5)
    expected = plain_videomae(teacher, x)
    assert len(expected) == 3
    for state, plain in zip(teacher.hidden(x)[0], expected, strict=True):
        assert_close(state, plain, **TOLERANCE)


def test_videomaes_positions_alternate_sines_and_cosines_of_the_flat_index():
    table = sine_table(2048, 1408)
    assert table.shape == (1, 2048, 1408)
    expected = torch.tensor([7.0]).sin(), torch.tensor([7.0]).cos()
    assert_close(table[0, 7, :2], torch.cat(expected))
    angle = 2000 / 10000 ** (702 / 1408)
    expected = torch.tensor([angle]).sin(), torch.tensor([angle]).cos()
    assert_close(table[0, 2000, 702:704], torch.cat(expected), rtol=0, atol=1e-6)


def test_videomaes_positions_are_resized_to_other_clips():
    small = make_videomae(image_size=112, frames=8)
    assert small.grid == (4, 8, 8)
    table = rearrange(sine_table(2048, 96), "1 (t s) e -> s e t", t=8)
    table = F.interpolate(table, size=4, mode="linear")
    table = rearrange(table, "(h w) e t -> t e h w", h=16)
    table = F.interpolate(table, size=(8, 8), mode="bicubic")
    expected = rearrange(table, "t e h w -> 1 (t h w) e")
    assert_close(small.positions, expected)


def test_a_teachers_file_loads_with_a_report(tmp_path):
    """InternVL's file holds a whole vision-language model, whose tables are of another size."""
    source = fill(make_internvl(image_size=28), positions=True)
    state = source.state_dict()
    kernel = "patch_embed.proj.weight"
    state[kernel] = state[kernel][:, :, 0]  # of images
    others = {"text_projection": torch.zeros(3), "layers.0.weight": torch.zeros(2)}
    torch.save({"module": {**state, **others}}, tmp_path / "internvl.pth")
    teacher = make_internvl(checkpoint=tmp_path / "internvl.pth", random=False)
    report = teacher.load_report
    assert report.unused == tuple(others)
    assert report.details == {
        kernel: "image -> tubelet 1",
        "pos_embed": "1x2x2 -> 1x4x4 patches",
    }
    assert len(report.taken) + len(report.details) == len(state)
    table = rearrange(state["pos_embed"][:, 1:], "1 (h w) e -> 1 e h w", h=2)
    table = F.interpolate(table, size=(4, 4), mode="bicubic")
    assert_close(teacher.pos_embed[:, 1:], rearrange(table, "1 e h w -> 1 (h w) e"))
    assert torch.equal(teacher.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_a_teachers_file_without_all_of_it_is_refused(tmp_path):
    state = make_internvl().state_dict()
    del state["blocks.3.ls2.gamma"]
    torch.save({"module": {**state, "text_projection": torch.zeros(3)}}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"blocks\.\* \(1\) of the model would stay at init"):
        make_internvl(checkpoint=tmp_path / "part.pth", random=False)


def save_videomae(teacher, path, **others):
    state = {f"encoder.{name}": value for name, value in teacher.state_dict().items()}
    torch.save({"model": {**state, **others}}, path)


def test_videomaes_encoder_is_taken_from_its_file(tmp_path):
    source = fill(make_videomae(frames=4, image_size=28))
    decoder = {"decoder.norm.weight": torch.zeros(3), "mask_token": torch.zeros(1, 1, 3)}
    save_videomae(source, tmp_path / "mae.pth", **decoder)
    settings = {"frames": 4, "image_size": 28, "random": False}
    teacher = make_videomae(checkpoint=tmp_path / "mae.pth", **settings)
    assert teacher.load_report.unused == tuple(decoder)
    assert len(teacher.load_report.taken) == len(source.state_dict())
    x = clip(1, 4, 28)
    assert torch.equal(teacher(x).middle, source(x).middle)  # its buffers are not in the file


def test_videomaes_kernel_is_averaged_for_tubelets_of_one_frame(tmp_path):
    source = fill(make_videomae(frames=4, image_size=28))
    save_videomae(source, tmp_path / "mae.pth")
    settings = {"frames": 4, "image_size": 28, "tubelet": 1, "random": False}
    teacher = make_videomae(checkpoint=tmp_path / "mae.pth", **settings)
    kernel = "patch_embed.proj.weight"
    assert teacher.load_report.details == {kernel: "tubelet 2 -> 1"}
    halves = source.patch_embed.proj.weight
    assert_close(teacher.patch_embed.proj.weight[:, :, 0], (halves[:, :, 0] + halves[:, :, 1]) / 2)
    assert teacher(clip(1, 4, 28)).middle.shape == (2, 1, 16, 96)


def test_videomaes_file_is_taken_strictly(tmp_path):
    source = make_videomae(frames=4, image_size=28)
    save_videomae(source, tmp_path / "mae.pth", **{"encoder.cls_token": torch.zeros(1, 1, 96)})
    settings = {"frames": 4, "image_size": 28, "random": False}
    with pytest.raises(WeightsError, match="cls_token of the file would go unused"):
        make_videomae(checkpoint=tmp_path / "mae.pth", **settings)
    with pytest.raises(WeightsError, match="tensors have another shape than the model's"):
        make_videomae(checkpoint=tmp_path / "mae.pth", **settings, tubelet=4)


def test_pretraining_teachers_are_frozen_and_stay_in_eval_mode():
    for teacher in (make_internvl(), make_videomae(frames=4, image_size=28)):
        teacher.train()
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        states, _, _ = teacher.hidden(clip(1, 4, teacher.image_size))
        assert all(state.is_inference() for state in states)


def test_teachers_say_what_they_are():
    internvl, videomae = make_internvl(), make_videomae()
    assert (internvl.grid, internvl.num_patches, internvl.tubelet) == ((4, 4, 4), 64, 1)
    assert (internvl.embed_dim, internvl.pooled_width, internvl.has_cls) == (96, 48, True)
    assert (videomae.grid, videomae.num_patches, videomae.tubelet) == ((8, 16, 16), 2048, 2)
    assert (videomae.embed_dim, videomae.pooled_width, videomae.has_cls) == (96, None, False)
    assert internvl.attention_shape(2) == (2 * 4, 3, 17, 32)
    assert videomae.attention_shape(2) == (2, 3, 2048, 32)


def test_settings_that_a_family_does_not_have_are_refused():
    with pytest.raises(ValueError, match="teacher videomae_g: videomae has no activation, positio"):
        create_teacher("videomae_g", random=True, activation="gelu", positions="joint")
    with pytest.raises(ValueError, match="teacher internvl_6b: internvl has no tubelet"):
        create_teacher("internvl_6b", random=True, tubelet=2)


# Clips


def test_a_clip_of_twice_the_frames_shows_every_second_one():
    x = clip(2, 8, 28)
    assert torch.equal(fit_clip(x, frames=4, image_size=28), x[:, :, [0, 2, 4, 6]])
    assert torch.equal(fit_clip(x, frames=8, image_size=28), x)
    with pytest.raises(ValueError, match="a clip of 8 frames is no multiple of the teacher's 16"):
        fit_clip(x, frames=16, image_size=28)


def test_uint8_pixels_are_resized_to_the_teachers_size():
    pixels = torch.randint(0, 256, (2, 3, 2, 56, 56), dtype=torch.uint8)
    found = fit_clip(pixels, frames=2, image_size=28)
    assert (found.dtype, found.shape) == (torch.uint8, (2, 3, 2, 28, 28))
    one = F.interpolate(
        pixels[1, :, 1][None].float(), size=(28, 28), mode="bicubic", antialias=True
    )
    assert_close(found[1, :, 1].float(), one[0].clamp(0, 255), rtol=0, atol=0.5)


@pytest.mark.parametrize("make", [make_internvl, make_videomae])
def test_teachers_normalise_with_statistics_of_their_own(make):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    teacher = fill(make(frames=4, image_size=28, mean=mean, std=std))
    pixels = torch.randint(0, 256, (1, 3, 4, 56, 56), dtype=torch.uint8)
    small = fit_clip(pixels, frames=4, image_size=28) / 255
    axes = (3, 1, 1, 1)
    normalised = (small - torch.tensor(mean).view(axes)) / torch.tensor(std).view(axes)
    assert_close(teacher(pixels).middle, teacher(normalised).middle, **TOLERANCE)


def test_linear_weights_that_are_cast_once_give_the_same_bits():
    teacher = fill(make_videomae(frames=4, image_size=28))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, _, _ = teacher.hidden(clip(2, 4, 28))
        teacher.tune(torch.bfloat16, batch_size=2)
        again, _, _ = teacher.hidden(clip(2, 4, 28))
    assert teacher.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(states, again, strict=True))
