import io
import json
import math

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from test_cache_identity import recipe
from torch.testing import assert_close
from typer.testing import CliRunner

from distill.cache import inspect as cache_inspect
from distill.cache.calibrate import with_codec, write_codec
from distill.cache.codes import Codec
from distill.cache.identity import cache_identity
from distill.cache.inspect import (
    coding_noise,
    inspect_cache,
    layer_statistics,
    open_any,
    report_lines,
    sample_rows,
    visible_tokens,
)
from distill.cache.record import record_arrays
from distill.cache.shards import Field, ShardWriter
from distill.cache.sheet import contact_sheet, draw_frames, write_sheet
from distill.cache.store import open_folder
from distill.cli import app
from distill.data.index import read_list
from distill.errors import InputError, StateError
from distill.mask import Redraw, draw_kept
from distill.recipe import Mask
from distill.run.pictures import MISSING, MISSING_DOT

GRID = (2, 2, 2)
LAYERS, WIDTH, CLIPS, VIEWS = 2, 48, 5, 2


def make_cache(tmp_path, *, folder="cache", tokens="visible", codes="4bit", pixels="visible"):
    """A recipe and a cache of made-up rows for its clips: two frames of 2 x 2 patches each."""
    (tmp_path / "train.csv").write_text("".join(f"v/{i}.mp4,0\n" for i in range(CLIPS)))
    url = folder if "://" in folder else str(tmp_path / folder)
    ours = recipe(
        data__train__list=str(tmp_path / "train.csv"),
        data__views__frames=GRID[0],
        data__views__image_size=14 * GRID[1],
        objective__mask__ratio=0.5,
        objective__cache={
            "folder": url,
            "views": VIEWS,
            "codes": codes,
            "tokens": tokens,
            "pixels": pixels,
        },
    )
    where, identity = open_folder(url), cache_identity(ours)
    codec = Codec("fp16") if codes == "fp16" else write_codec(where, identity, make_means())
    clips = read_list(ours.data.train)
    records = [make_records(clips, view, ours) for view in range(VIEWS)]
    arrays = [record_arrays(record, codec=codec) for record in records]
    fields = [Field(name, str(a.dtype), a.shape[1:]) for name, a in arrays[0].items()]
    settings = {"fields": fields, "identity": with_codec(identity, codec)}
    with ShardWriter(where, shard_bytes=1, shard_seconds=99.0, **settings) as writer:
        for view, record in enumerate(arrays):  # a shard each
            for place, clip in enumerate(clips):
                values = {name: array[place] for name, array in record.items()}
                writer.add(clip.id, view, values, make_info(clip, view))
            writer.commit_if_full()
    return ours, clips, records


def make_means():
    means = torch.zeros(LAYERS, WIDTH)
    means[:, 7] = 0.6
    return means


def make_records(clips, view, ours):
    """What a teacher might say: rows that are 0.6 of channel 7 and 0.8 of everything else."""
    stream = torch.Generator().manual_seed(view)
    count = len(clips)
    attention = torch.rand(count, math.prod(GRID), generator=stream)
    kept, next_arrival = draw_kept(
        ours.objective.mask,
        ours.objective.cache.tokens,
        clip_ids=torch.tensor([clip.id for clip in clips]),
        view=view,
        seed=0,
        grid=GRID,
        attention=attention,
    )
    record = {"tokens": kept}
    if ours.objective.cache.tokens != "visible":
        record["next_arrival"] = next_arrival
    side = 14 * GRID[1]
    shape = (count, kept.shape[1], 588)
    name = "patches"
    if ours.objective.cache.pixels == "full":
        name, shape = "pixels", (count, 3, GRID[0], side, side)
    record[name] = torch.randint(0, 256, shape, generator=stream, dtype=torch.uint8)
    rest = torch.randn(LAYERS, count, 1 + kept.shape[1], WIDTH, generator=stream)
    rest[..., 7] = 0
    record["middle"] = make_means()[:, None, None] + 0.8 * F.normalize(rest, dim=-1)
    record["pooled"] = F.normalize(torch.randn(count, 16, generator=stream), dim=-1)
    record["attention"] = attention
    return record


def make_info(clip, view):
    return {
        "name": clip.name,
        "view": view,
        "seed": 0,
        "frames": [3, 9],
        "pts_seconds": None,
        "crop": [0, 0, 28, 28],
        "resize": None,
        "flip": view == 1,
        "decoder": ("pyav 17", "decord 0.6")[view],
    }


def test_it_counts_what_is_there(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    entry = {"id": 5, "name": "v/9.mp4", "path": "v/9.mp4", "line": 1, "reason": "empty"}
    (tmp_path / "cache" / "quarantine-1.jsonl").write_text(json.dumps(entry) + "\n")
    report = inspect_cache(ours.objective.cache.folder)
    assert report.identity == cache_identity(ours)
    assert (report.num_clips, report.num_records, report.num_shards) == (CLIPS, CLIPS * VIEWS, 2)
    assert report.records_by_view == {0: CLIPS, 1: CLIPS}
    assert (report.quarantined, report.sampled) == (1, CLIPS * VIEWS)
    assert report.decoders == {"decord 0.6": CLIPS, "pyav 17": CLIPS}
    shards = [path.stat().st_size for path in (tmp_path / "cache").glob("shard-*")]
    assert report.size_bytes == sum(shards)
    assert report.clip_bytes == sum(shards) / CLIPS


def test_bytes_of_a_record_are_those_of_its_fields(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    sizes = open_any(ours.objective.cache.folder).cache.index.sizes
    found = inspect_cache(ours.objective.cache.folder).field_bytes
    rows = LAYERS * 5  # the class token and four patches
    view = found.pop("view")
    assert found == {
        "tokens": 2 * 4,
        "patches": 588 * 4,
        "codes": rows * WIDTH // 2,
        "scales": 2 * rows,
        "pooled": 2 * 16,
        "attention": 4 * 8,
    }
    assert view == round(sizes.mean() - sum(found.values())) > 100


@pytest.mark.parametrize(
    ("kind", "distortion"),
    [("8bit", 4.2e-5), ("4bit", 9.50e-3), ("3bit", 0.03455), ("2bit", 0.1175)],
)
def test_noise_of_codes_follows_from_their_distortion(kind, distortion):
    """Max (1960) for 4, 8 and 16 levels; Panter and Dite's limit for 256."""
    relative = 0.05 if kind == "8bit" else 2e-3
    assert coding_noise(kind) == pytest.approx(distortion / (1 - distortion), rel=relative)
    assert coding_noise("fp16") == 0


@pytest.mark.parametrize("kind", ["2bit", "4bit"])
def test_statistics_are_those_of_the_rows_before_they_were_coded(kind):
    """At 2 bits the residuals of decoded rows are 6 % too long, which is taken off."""
    stream = torch.Generator().manual_seed(0)
    width, count = 256, 4000
    length = torch.linspace(0.4, 0.8, count)
    mean = torch.zeros(1, width)
    mean[0, 7] = 0.6
    rest = torch.randn(count, width, generator=stream)
    rest[:, 7] = 0
    rest[:, 9] *= 4  # a channel with 16 times the energy of the others
    rows = mean + length[torch.randperm(count, generator=stream), None] * F.normalize(rest, dim=-1)
    codec = Codec(kind, means=mean)
    fields = codec.encode(rows[None])
    (found,) = layer_statistics(codec.decode(**fields), [fields["scales"].float()], kind=kind)
    energy = 0.36 + length.square().mean().item()
    assert found.mean_norm == pytest.approx(0.6, rel=0.02)
    assert found.mean_share == pytest.approx(0.36 / energy, rel=0.02)
    assert found.residual == pytest.approx((0.42, 0.6, 0.78), rel=0.02)
    assert found.spread == pytest.approx(length.std().item() / 0.6, rel=0.05)
    assert found.channel == 7
    assert found.channel_share == pytest.approx(0.36 / energy, rel=0.02)
    scales = fields["scales"].float()
    expected = [value.item() for value in (scales.min(), scales.median(), scales.max())]
    assert list(found.scale) == expected


def test_statistics_of_a_cache_come_from_its_layers(tmp_path):
    ours, _, _ = make_cache(tmp_path, codes="8bit")
    for layer in inspect_cache(ours.objective.cache.folder).layers:
        assert layer.channel == 7
        assert layer.residual == pytest.approx((0.8, 0.8, 0.8), abs=0.05)
        assert layer.mean_norm == pytest.approx(0.6, abs=0.03)
    assert len(inspect_cache(ours.objective.cache.folder).layers) == LAYERS


def test_half_precision_has_no_scales(tmp_path):
    ours, _, _ = make_cache(tmp_path, codes="fp16")
    assert [layer.scale for layer in inspect_cache(ours.objective.cache.folder).layers] == [
        None
    ] * 2


def test_visible_tokens_are_counted_by_frame_and_place(tmp_path):
    ours, _, records = make_cache(tmp_path)
    report = inspect_cache(ours.objective.cache.folder)
    tokens = torch.cat([record["tokens"] for record in records]).flatten()
    counts = torch.bincount(tokens, minlength=8).reshape(2, 4) / (CLIPS * VIEWS)
    assert report.visible_by_frame == pytest.approx(counts.mean(dim=1).tolist())
    assert np.ravel(report.visible_by_place) == pytest.approx(counts.mean(dim=0).tolist())


@pytest.mark.parametrize("tokens", ["visible", "superset", "all"])
def test_half_of_the_patches_are_visible_whatever_is_kept(tmp_path, tokens):
    ours, _, _ = make_cache(tmp_path, tokens=tokens)
    report = inspect_cache(ours.objective.cache.folder)
    assert sum(report.visible_by_frame) == pytest.approx(1.0)
    assert np.mean(report.visible_by_place) == pytest.approx(0.5)


@pytest.mark.parametrize("tokens", ["superset", "all"])
def test_of_more_tokens_a_student_sees_a_redraw(tmp_path, tokens):
    ours, _, _ = make_cache(tmp_path, tokens=tokens)
    opened = open_any(ours.objective.cache.folder)
    redraw = Redraw(Mask(kind="attention", ratio=0.5), GRID, 0)
    for row in (0, 7):
        arrays, _ = opened.cache.read(row)
        kept = torch.from_numpy(arrays["tokens"]).long()
        places = redraw.places(
            clip_ids=torch.from_numpy(opened.cache.index.clip_ids[[row]].astype(np.int64)),
            epoch=int(opened.cache.index.views[row]),
            tokens=kept[None],
            next_arrival=torch.from_numpy(arrays["next_arrival"])[None],
            attention=torch.from_numpy(arrays["attention"])[None],
        )
        assert_close(torch.from_numpy(visible_tokens(opened, arrays, row=row)), kept[places[0]])
        assert len(places[0]) == 4


def test_the_sample_is_drawn_by_its_seed_and_never_twice():
    rows = sample_rows(1000, 64, seed=0)
    assert len(np.unique(rows)) == 64
    assert (rows == np.sort(rows)).all()
    assert (rows == sample_rows(1000, 64, seed=0)).all()
    assert (rows != sample_rows(1000, 64, seed=1)).any()
    assert sample_rows(5, 64, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_the_report_fits_a_terminal_of_80_columns(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    console = Console(file=io.StringIO(), width=80)
    for part in report_lines(inspect_cache(ours.objective.cache.folder)):
        console.print(part)
    text = console.file.getvalue()
    assert "…" not in text, "nothing is cut off"
    assert "10 (2 views, 5 records each)" in text
    assert "objective.mask.ratio" in text
    assert text.count(" frame ") == GRID[0]
    (layer,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["1"]]
    assert layer[-2] == "7"


def test_patches_are_drawn_where_they_were(tmp_path):
    ours, _, records = make_cache(tmp_path)
    opened = open_any(ours.objective.cache.folder)
    arrays, _ = opened.cache.read(0)
    seen = visible_tokens(opened, arrays, row=0)
    drawn = draw_frames(opened, arrays, seen)
    assert drawn.shape == (2, 28, 28, 3)
    for patch in range(8):
        frame, down, across = np.unravel_index(patch, GRID)
        box = drawn[frame, 14 * down : 14 * down + 14, 14 * across : 14 * across + 14]
        if patch in seen:
            (place,) = np.flatnonzero(arrays["tokens"] == patch)
            expected = arrays["patches"][place].reshape(3, 14, 14).transpose(1, 2, 0)
            np.testing.assert_array_equal(box, expected)
        else:
            assert box[0, 0].tolist() == list(MISSING)
            assert box[7, 7].tolist() == list(MISSING_DOT)


@pytest.mark.parametrize(
    ("tokens", "pixels"), [("superset", "visible"), ("all", "full"), ("visible", "full")]
)
def test_what_is_kept_and_masked_is_pale(tmp_path, tokens, pixels):
    ours, _, _ = make_cache(tmp_path, tokens=tokens, pixels=pixels)
    opened = open_any(ours.objective.cache.folder)
    arrays, _ = opened.cache.read(3)
    seen = visible_tokens(opened, arrays, row=3)
    drawn = draw_frames(opened, arrays, seen)
    if pixels == "full":
        frames = arrays["pixels"].transpose(1, 2, 3, 0)
    else:  # all eight are kept
        frames = draw_frames(opened, arrays, arrays["tokens"].astype(np.int64))
    for patch in range(8):
        frame, down, across = np.unravel_index(patch, GRID)
        box = np.s_[frame, 14 * down : 14 * down + 14, 14 * across : 14 * across + 14]
        if patch in seen:
            np.testing.assert_array_equal(drawn[box], frames[box])
        else:
            assert drawn[box].min() >= 0.7 * 248 - 1
            assert 0.1 < drawn[box].std() / frames[box].std() < 0.35


def test_a_sheet_has_a_row_of_frames_for_each_record(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    path = tmp_path / "sheet.png"
    write_sheet(ours.objective.cache.folder, str(path))
    with Image.open(path) as image:
        width, height = image.size
        # A frame of 28 pixels is shown six times as large, and six records are drawn.
        assert width == 2 * 16 + 2 * 168 + 4
        assert height == 16 + 26 + 6 * (26 + 168 + 16)
        pixels = np.asarray(image)
    opened = open_any(ours.objective.cache.folder)
    row = int(sample_rows(10, 6, seed=0)[0])
    arrays, _ = opened.cache.read(row)
    frame = draw_frames(opened, arrays, visible_tokens(opened, arrays, row=row))[0]
    shown = pixels[16 + 26 + 26 :, 16:][:168:6, :168:6]
    np.testing.assert_array_equal(shown, frame)


def test_few_records_make_a_short_sheet(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    sheet = contact_sheet(open_any(ours.objective.cache.folder), count=1)
    assert sheet.height == 16 + 26 + (26 + 168 + 16)


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    folder = ours.objective.cache.folder
    with pytest.raises(InputError, match=r"^s.jpg: a contact sheet is a PNG; give it a name that"):
        write_sheet(folder, "s.jpg")
    path = tmp_path / "none" / "s.png"
    with pytest.raises(InputError, match=r"/s.png: cannot be written .No such file or directory."):
        write_sheet(folder, str(path))


def test_a_folder_without_a_cache_is_one_line(tmp_path):
    message = f"cache {tmp_path}: no shards there; give the folder of a recipe's objective.cache"
    with pytest.raises(StateError, match=message):
        inspect_cache(tmp_path)


def test_codes_without_their_means_are_one_line(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    (tmp_path / "cache" / "means.safetensors").unlink()
    with pytest.raises(StateError, match="means.safetensors is not there, without which its code"):
        inspect_cache(ours.objective.cache.folder)


def test_a_remote_cache_is_looked_into_as_well(tmp_path):
    url = f"memory://inspect-{tmp_path.name}"
    make_cache(tmp_path, folder=url)
    here = make_cache(tmp_path)[0].objective.cache.folder
    found, expected = inspect_cache(url), inspect_cache(here)
    assert found.folder == url
    assert (found.layers, found.num_records) == (expected.layers, expected.num_records)
    fsspec.filesystem("memory").rm(f"/inspect-{tmp_path.name}", recursive=True)


def test_the_command_prints_json(tmp_path):
    ours, _, _ = make_cache(tmp_path)
    sheet = tmp_path / "s.png"
    result = CliRunner().invoke(
        app, ["cache", "inspect", ours.objective.cache.folder, "--json", "--sheet", str(sheet)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["identity"]["objective.mask.ratio"] == 0.5
    assert found["layers"][1]["channel"] == 7
    assert found["clip_bytes"] == found["size_bytes"] / CLIPS
    assert sheet.exists()


def test_the_command_prints_tables(tmp_path, monkeypatch):
    ours, _, _ = make_cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["cache", "inspect", "cache", "--sheet", "s.png"])
    assert result.exit_code == 0, result.output
    assert "cache cache" in result.output
    assert "s.png: clips with their masks" in result.output
    assert CliRunner().invoke(app, ["cache", "inspect", "none"]).exit_code == 2


def test_only_the_sample_is_read(tmp_path, monkeypatch):
    ours, _, _ = make_cache(tmp_path)
    read = []
    whole = cache_inspect.Cache.read

    def note(self, row):
        read.append(row)
        return whole(self, row)

    monkeypatch.setattr(cache_inspect.Cache, "read", note)
    report = inspect_cache(ours.objective.cache.folder, sampled=3)
    assert report.sampled == len(read) == 3
