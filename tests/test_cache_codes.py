import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from distill.cache.codes import (
    Codec,
    gaussian_levels,
    pack,
    rotate,
    rotate_back,
    row_bytes,
)
from distill.data.demo import make_demo
from distill.data.index import read_list
from distill.data.load import load_view
from distill.kernels.coded_targets import decode_targets
from distill.kernels.codes import unpack
from distill.recipe import ClipList, Demo, Views
from distill.students.vit import ViTSize
from distill.teachers import create_teacher

# 1 - cos of a Gaussian direction's rotated Lloyd-Max code, as published for each width.
THEORY = {"8bit": 2.1e-5, "4bit": 4.8e-3, "3bit": 1.74e-2, "2bit": 6.06e-2}
WIDTHS = (176, 768, 1408, 3200, 257, 20, 2)


def rows(count=4096, width=176):
    """Unit rows with a shared mean and outlier channels, as a teacher's features have."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, count, width, generator=stream)
    x[..., 5] *= 12
    x[..., 40:44] *= 8
    x += torch.randn(width, generator=stream)
    return F.normalize(x, dim=-1)


def directions(count, width, *, layers=1, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(layers, count, width, generator=stream), dim=-1)


def calibrated(kind, middle):
    return Codec(kind, means=None if kind == "fp16" else middle.mean(-2))


def decoded(kind, middle):
    codec = calibrated(kind, middle)
    return codec.decode(**codec.encode(middle))


def errors(kind, middle):
    """Of each layer, over its rows: mean 1 - cos about the mean; mean and spread of the bias."""
    codec = calibrated(kind, middle)
    cosine, bias = [], []
    for part in middle.split(10_000, dim=1):
        coded = (codec.decode(**codec.encode(part)) - codec.means[:, None]).double()
        exact = (part - codec.means[:, None]).double()
        along, squared = (coded * exact).sum(-1), exact.square().sum(-1)
        cosine.append(1 - along / (squared * coded.square().sum(-1)).sqrt())
        bias.append(along / squared - 1)
    cosine, bias = torch.cat(cosine, 1), torch.cat(bias, 1)
    return cosine.mean(1), bias.mean(1), bias.std(1)


@pytest.mark.parametrize(
    ("kind", "dtype", "bytes_of_176"),
    [
        ("fp16", torch.float16, 352),
        ("8bit", torch.uint8, 176),
        ("4bit", torch.uint8, 88),
        ("3bit", torch.uint8, 66),
        ("2bit", torch.uint8, 44),
    ],
)
def test_fields_have_the_layout_of_a_record(kind, dtype, bytes_of_176):
    fields = calibrated(kind, rows(7)).encode(rows(7))
    assert fields["codes"].dtype == dtype
    assert fields["codes"].shape[:-1] == (3, 7)
    assert fields["codes"][0, 0].nbytes == row_bytes(kind, 176) == bytes_of_176
    if kind == "fp16":
        assert "scales" not in fields
    else:
        assert (fields["scales"].dtype, fields["scales"].shape) == (torch.float16, (3, 7))


def test_half_precision_is_the_nearest_half():
    assert_close(decoded("fp16", rows()), rows().half(), rtol=0, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_is_orthogonal_for_any_width(width):
    turned = rotate(torch.eye(width, dtype=torch.float64))
    assert_close(turned @ turned.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    x = directions(5, width)
    assert_close(rotate_back(rotate(x)), x, rtol=0, atol=1e-6)
    assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1408, 768, 3200, 257])
def test_rotation_spreads_every_channel_over_all(width):
    """No entry is more than sqrt(2) times an even share."""
    turned = rotate(torch.eye(width, dtype=torch.float64))
    assert float(turned.abs().max()) * width**0.5 < 1.4143


def test_a_row_of_width_one_is_kept():
    x = torch.tensor([[[0.5], [-2.0], [0.25]]])
    for kind in THEORY:
        codec = Codec(kind, means=torch.zeros(1, 1))
        assert_close(codec.decode(**codec.encode(x)), x, rtol=5e-4, atol=0)


@pytest.mark.parametrize(
    ("count", "distortion"),
    [(4, 0.117482), (8, 0.034548), (16, 0.0095010), (256, 4.1185e-5)],
)
def test_levels_are_those_of_least_squared_error(count, distortion):
    """Against Max's table (1960) to 16 levels; the last is the limit of the iteration."""
    levels = gaussian_levels(count)
    assert_close(levels, -levels.flip(0), rtol=0, atol=0)
    assert bool((levels.diff() > 0).all())
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    found = ((x - nearest).square() * density).sum() / density.sum()
    assert float(found) == pytest.approx(distortion, rel=3e-4)


@pytest.mark.parametrize("kind", THEORY)
@pytest.mark.parametrize("width", [176, 768, 1408, 3200, 257])
def test_gaussian_directions_lose_what_theory_says(kind, width):
    cosine, _, _ = errors(kind, directions(800, width))
    assert 0.8 * THEORY[kind] < float(cosine) < 1.1 * THEORY[kind]


@pytest.mark.parametrize("kind", THEORY)
@pytest.mark.parametrize("width", [176, 1408])
def test_outlier_channels_and_a_shared_mean_cost_little(kind, width):
    """Where a row's largest entry sets the step, the same rows lose ten times as much."""
    x = rows(1000, width)
    cosine, _, _ = errors(kind, x)
    assert float(cosine.max()) < 1.3 * THEORY[kind]
    centred = x - x.mean(1, keepdim=True)
    steps = 2 ** (int(kind[0]) - 1) - 1
    step = centred.abs().amax(-1, keepdim=True) / steps
    plain = (centred / step).round() * step
    assert float((1 - torch.cosine_similarity(plain, centred, dim=-1)).mean()) > 3 * THEORY[kind]


@pytest.mark.parametrize("kind", THEORY)
@pytest.mark.parametrize("channels", [slice(44, 60), slice(352, 480), slice(0, None, 11)])
def test_energy_in_some_channels_alone_costs_no_more(kind, channels):
    """Neighbours, a block of 128, and every eleventh, at 1,408 = 128 x 11."""
    x = 0.03 * directions(400, 1408)
    x[..., channels] += directions(400, x[..., channels].shape[-1], seed=1)
    assert float(errors(kind, x)[0]) < 1.1 * THEORY[kind]


@pytest.mark.parametrize("kind", THEORY)
def test_no_bias_over_a_hundred_thousand_rows(kind):
    _, bias, spread = errors(kind, rows(100_000, 48)[:1])
    assert float(bias.abs().max()) < 2e-5, "1e-3 is what is asked for"
    assert 5e-5 < float(spread.max()) < 3e-4, "half precision's own rounding"


@pytest.mark.parametrize("kind", ["2bit", "3bit"])
def test_a_nearest_code_without_the_correction_would_be_biased(kind):
    """What the scale is for: at their own lengths, codes fall short by their cosine's error."""
    x = directions(2000, 176)
    codec = Codec(kind, means=torch.zeros(1, 176))
    found = F.normalize(codec.decode(**codec.encode(x)), dim=-1)
    bias = ((found - x) * x).sum(-1).mean()
    assert float(bias) == pytest.approx(-THEORY[kind], rel=0.1)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """100,000 rows of each distilled layer of the quickstart's teacher, on views of its videos."""
    folder = tmp_path_factory.mktemp("demo")
    demo = {"kind": "moving-digits", "train_clips": 115, "val_clips": 1, "test_clips": 1}
    make_demo(Demo(folder=str(folder), **demo))
    teacher = create_teacher(
        ViTSize(128, 4, 4, pooled_width=128),
        checkpoint="recipes/quickstart_teacher.safetensors",
        image_size=42,
        num_layers=3,
        interval=1,
        positions="separable",
    )
    clips = read_list(ClipList(list=str(folder / "train.csv")))
    settings = Views(image_size=42, flip=0, decoder="pyav")
    kept = []
    for view in range(12):
        looks = [load_view(clip, view, views=settings, seed=0) for clip in clips]
        pixels = torch.stack([torch.from_numpy(look.pixels) for look in looks])
        kept.append(teacher(pixels).middle.flatten(1, 2).clone())
    return torch.cat(kept, dim=1)  # [K,R,E]


def test_real_features_have_a_shared_mean(features):
    assert features.shape == (3, 115 * 12 * 73, 128)
    energy = features.mean(1).square().sum(-1)
    assert float(energy.min()) > 0.05


@pytest.mark.parametrize("kind", THEORY)
def test_real_features_lose_what_theory_says_without_bias(features, kind):
    cosine, bias, spread = errors(kind, features)
    assert float(cosine.max()) < 1.3 * THEORY[kind]
    assert float(bias.abs().max()) < 1e-4, "1e-3 is what is asked for"
    assert float(spread.max()) < 4e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 176, 257])
def test_packing_round_trips(bits, width):
    stream = torch.Generator().manual_seed(width)
    values = torch.randint(0, 2**bits, (2, 3, width), dtype=torch.uint8, generator=stream)
    packed = pack(values, bits=bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-width * bits // 8))
    assert_close(unpack(packed, bits=bits, width=width), values.int())


def test_packed_bytes_are_pinned():
    """Whoever changes these numbers raises the codes revision of distill/cache/identity.py."""
    values = torch.arange(10, dtype=torch.uint8)
    assert pack(values % 4, bits=2).tolist() == [0b11100100, 0b11100100, 0b0100]
    assert pack(values % 8, bits=3).tolist() == [0b10001000, 0b11000110, 0b11111010, 0b001000]
    assert pack(values, bits=4).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98]
    assert pack(values, bits=8).tolist() == list(range(10))


def ramp(width):
    """Rows without ties, the same wherever they are made."""
    places = torch.arange(2 * width, dtype=torch.float64).reshape(1, 2, width)
    return ((places * 0.37).sin() + 0.1 * (places * 1.7).cos()).float()


@pytest.mark.parametrize(
    ("kind", "codes", "scales"),
    [
        (
            "8bit",
            [[98, 35, 172, 171, 181, 115], [148, 206, 147, 126, 67, 207]],
            [15940, 15752],
        ),
        ("4bit", [[22, 170, 123], [217, 121, 212]], [15917, 15708]),
        ("3bit", [[66, 219, 1], [52, 23, 3]], [15832, 15826]),
        ("2bit", [[161, 6], [110, 12]], [16469, 15636]),
    ],
)
def test_codes_bytes_are_pinned(kind, codes, scales):
    """Whoever changes these numbers raises the codes revision of distill/cache/identity.py."""
    fields = Codec(kind, means=torch.full((1, 6), 0.125)).encode(ramp(6))
    assert fields["codes"][0].tolist() == codes
    assert fields["scales"].view(torch.int16)[0].tolist() == scales


def test_the_rotation_of_the_largest_teachers_rows_is_pinned():
    """Whoever changes these numbers raises the codes revision of distill/cache/identity.py."""
    found = rotate(ramp(1408).double())[0, :, [0, 1, 700, 1407]]
    expected = [
        [-1.0104736852542806, -0.5855662902340406, -0.6705895452843155, 0.6418502706924744],
        [-1.490216307349331, -0.28659905429547206, -1.14483201833384, 0.4381187478069826],
    ]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_half_precision_bytes_are_pinned():
    row = torch.tensor([[[0.5, -0.25, 0.125, 0.8]]])
    assert Codec("fp16").encode(row)["codes"].view(torch.int16).tolist() == [
        [[14336, -19456, 12288, 14950]]
    ]


@pytest.mark.parametrize("kind", THEORY)
def test_a_row_that_is_the_mean_decodes_to_it(kind):
    means = rows(2)[:, 0]
    codec = Codec(kind, means=means)
    found = codec.decode(**codec.encode(means[:, None].expand(3, 2, 176)))
    assert_close(found, means[:, None].expand(3, 2, 176), rtol=0, atol=0)


def test_a_short_row_keeps_its_direction():
    """Rows close to the mean: the scale in half precision has room for a thousandth."""
    x = 1e-3 * directions(100, 176)
    codec = Codec("4bit", means=torch.zeros(1, 176))
    found = codec.decode(**codec.encode(x))
    assert float((found - x).norm(dim=-1).mean()) == pytest.approx(1e-3 * 0.098, rel=0.05)


@pytest.mark.parametrize("kind", THEORY)
def test_rows_do_not_depend_on_their_batch(kind):
    x = rows(64)
    codec = calibrated(kind, x)
    whole = codec.decode(**codec.encode(x))
    batch = torch.stack([x[:, :32], x[:, 32:]])  # [B,K,M,E]
    parts = codec.decode(**codec.encode(batch))
    assert parts.shape == (2, 3, 32, 176)
    assert_close(torch.cat([parts[0], parts[1]], dim=1), whole, rtol=0, atol=1e-6)


def test_layers_have_means_of_their_own():
    x = rows(500)
    x[1] = F.normalize(x[1] + 0.2, dim=-1)
    own = decoded("4bit", x)
    shared = Codec("4bit", means=x.mean((0, 1)).expand(3, 176))
    other = shared.decode(**shared.encode(x))
    assert float((own - x)[1].square().mean()) < 0.6 * float((other - x)[1].square().mean())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown codes 'int3'; choose fp16, 8bit, 4bit, 3bit, 2b"):
        Codec("int3")
    with pytest.raises(ValueError, match="codes 4bit: expected the means"):
        Codec("4bit")
    with pytest.raises(ValueError, match="codes fp16: expected no means"):
        Codec("fp16", means=torch.zeros(1, 4))
    with pytest.raises(
        ValueError, match=r"expected rows \[...,2,M,4\] as the means, got \[3, 5, 4\]"
    ):
        Codec("4bit", means=torch.zeros(2, 4)).encode(torch.zeros(3, 5, 4))


def test_means_are_told_apart_by_their_hash():
    means = torch.zeros(2, 4)
    sha256 = hashlib.sha256(bytes(32)).hexdigest()
    assert Codec("4bit", means=means).means_sha256 == sha256
    means[1, 3] = 1e-30
    assert Codec("4bit", means=means).means_sha256 != sha256
    assert Codec("fp16").means_sha256 is None


@pytest.mark.parametrize("width", [13, 96, 176, 257, 768, 1024, 1408, 3200, 4096])
def test_targets_for_the_loss_stand_for_what_is_decoded(width):
    rows = torch.randn(2, 2, 3, width, generator=torch.Generator().manual_seed(0))
    codec = Codec("4bit", means=rows.mean((0, 2)))
    fields = codec.encode(rows)
    targets = codec.targets(**fields)
    assert_close(decode_targets(targets, torch.float32), codec.decode(**fields), rtol=0, atol=2e-5)
    assert_close(targets.left.abs(), torch.ones_like(targets.left), rtol=0, atol=0)
    assert len(targets.right) <= 32 or width == 257
