"""Decoding: the right frames of odd videos (their number is burnt in), or one clear error."""

import dataclasses
import re
import sys

import av
import numpy as np
import pytest
import videos
from PIL import Image

from distill.data import decode, packets
from distill.data.decode import open_video
from distill.errors import InputError

CLOSED = {"g": "12", "bf": "3"}

# name: (how it is written, decoder that "auto" is to take)
GOOD = {
    "h264.mp4": (dict(num_frames=60, options=CLOSED), "decord"),
    "h264.mkv": (dict(num_frames=60, options=CLOSED), "decord"),
    "open-gop.mp4": (dict(num_frames=60, options=videos.OPEN_GOP), "pyav"),
    "open-gop.mkv": (dict(num_frames=60, options=videos.OPEN_GOP), "pyav"),
    "open-gop.ts": (dict(num_frames=60, options=videos.OPEN_GOP), "pyav"),
    "refresh.mp4": (dict(num_frames=60, options=videos.INTRA_REFRESH), "pyav"),
    "hevc.mp4": (
        dict(num_frames=60, codec="libx265", options=videos.HEVC_OPEN_GOP),
        "pyav",
    ),
    "mpeg4.mp4": (dict(num_frames=60, codec="mpeg4", options={"g": "12", "bf": "2"}), "pyav"),
    "h264.avi": (dict(num_frames=60, options=CLOSED), "pyav"),
    "vp9.webm": (dict(num_frames=30, codec="libvpx-vp9", options={"g": "12"}), "decord"),
    "av1.mp4": (dict(num_frames=10, codec="libsvtav1"), "pyav"),
    "fragments.mp4": (
        dict(num_frames=60, options=CLOSED, container={"movflags": "frag_keyframe+empty_moov"}),
        "decord",
    ),
    "vfr.mp4": (dict(num_frames=60, options=CLOSED, ticks=videos.UNEVEN), "decord"),
    "shifted.mp4": (dict(num_frames=60, options=CLOSED, ticks=videos.SHIFTED), "decord"),
    "shifted.mkv": (dict(num_frames=60, options=CLOSED, ticks=videos.SHIFTED), "decord"),
    "odd-444.mp4": (dict(num_frames=20, width=101, height=75, pix_fmt="yuv444p"), "decord"),
    "odd.mp4": (dict(num_frames=20, width=98, height=70), "decord"),
    "one.mp4": (dict(num_frames=1), "decord"),
    "three.mp4": (dict(num_frames=3), "decord"),
}
BY_DECORD = [name for name, (_, decoder) in GOOD.items() if decoder == "decord"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, (settings, _) in GOOD.items():
        videos.write(folder / name, **settings)
    return folder


def read(path, indices=None, *, decoder="auto"):
    with open_video(path, decoder=decoder) as video:
        return video.read(range(video.num_frames) if indices is None else indices)


def numbers(frames) -> list[int]:
    return [videos.number_of(frame) for frame in frames.pixels]


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", GOOD)
def test_right_frames_in_any_order(folder, name, decoder):
    settings, expected = GOOD[name]
    with open_video(folder / name, decoder=decoder) as video:
        assert video.num_frames == settings["num_frames"]
        for seed in range(6):
            indices = np.random.default_rng(seed).integers(video.num_frames, size=8)
            assert numbers(video.read(indices)) == indices.tolist()
        assert numbers(video.read(range(video.num_frames))) == list(range(video.num_frames))
        assert video.backend.split()[0] == (expected if decoder == "auto" else "pyav")


@pytest.mark.parametrize(
    "name", [name for name, (_, decoder) in GOOD.items() if decoder == "decord"]
)
def test_both_decoders_agree_bit_for_bit(folder, name):
    ours, theirs = read(folder / name, decoder="pyav"), read(folder / name, decoder="decord")
    assert np.array_equal(ours.pixels, theirs.pixels)
    assert np.array_equal(ours.pts_seconds, theirs.pts_seconds)


@pytest.mark.parametrize("name", [name for name in GOOD if name not in BY_DECORD])
def test_decord_is_refused_where_it_is_wrong(folder, name):
    with (
        pytest.raises(InputError, match=rf"{name}: not for decord: .* to auto or pyav$"),
        open_video(folder / name, decoder="decord"),
    ):
        pass


@pytest.mark.parametrize("name", ["open-gop.mp4", "refresh.mp4", "hevc.mp4", "h264.avi"])
def test_decord_is_wrong_there_indeed(folder, name):
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(folder / name), num_threads=1)
    indices = list(range(10, 60, 7))
    frames = reader.get_batch(indices).asnumpy()
    assert [videos.number_of(frame) for frame in frames] != indices


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize(
    ("name", "ticks"),
    [
        ("vfr.mp4", videos.UNEVEN),
        ("shifted.mp4", videos.SHIFTED),
        ("shifted.mkv", videos.SHIFTED),
        ("hevc.mp4", [40 * i for i in range(60)]),
    ],
)
def test_times_are_the_containers(folder, name, ticks, decoder):
    frames = read(folder / name, decoder=decoder)
    assert frames.pts_seconds.dtype == np.float64
    np.testing.assert_allclose(frames.pts_seconds, np.array(ticks) / 1000, atol=1e-6)


def test_frames_per_second_are_those_shown(folder):
    with open_video(folder / "vfr.mp4") as video:
        assert video.fps == pytest.approx(59 * 1000 / videos.UNEVEN[-1])
    with open_video(folder / "shifted.mp4") as video:
        assert video.fps == pytest.approx(25)
    with open_video(folder / "one.mp4") as video:
        assert video.fps == pytest.approx(25)


def test_odd_sizes_stay_as_they_are(folder):
    assert read(folder / "odd-444.mp4", [0]).pixels.shape == (1, 75, 101, 3)
    assert read(folder / "odd.mp4", [0, 1]).pixels.shape == (2, 70, 98, 3)


def test_frames_outside_are_refused(folder):
    with open_video(folder / "three.mp4") as video:
        with pytest.raises(IndexError, match="three.mp4: frame 3 of 3"):
            video.read([0, 3])
        with pytest.raises(IndexError, match="three.mp4: frame -1 of 3"):
            video.read([-1])


# counter-clockwise quarter turns as numpy has them, and what a mirrored camera writes
TURNS = {
    "90": (dict(matrix=(0, -1, 1, 0)), lambda frame: np.rot90(frame)),
    "180": (dict(matrix=(-1, 0, 0, -1)), lambda frame: np.rot90(frame, 2)),
    "270": (dict(matrix=(0, 1, -1, 0)), lambda frame: np.rot90(frame, 3)),
    "mirrored": (dict(matrix=(-1, 0, 0, 1)), lambda frame: frame[:, ::-1]),
    "flipped": (dict(matrix=(1, 0, 0, -1)), lambda frame: frame[::-1]),
    "transposed": (dict(matrix=(0, 1, 1, 0)), lambda frame: frame.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_turned_videos_are_upright(tmp_path, turn):
    settings, expected = TURNS[turn]
    path = videos.write(tmp_path / "turned.mp4", num_frames=5, **settings)
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for frame, number in zip(read(path, [1, 4]).pixels, (1, 4), strict=True):
        assert videos.number_of(stored[number]) == number
        assert np.array_equal(frame, expected(stored[number]))


@pytest.mark.parametrize("turn", TURNS)
def test_decord_never_decodes_turned_videos(tmp_path, turn):
    path = videos.write(tmp_path / "turned.mp4", num_frames=5, **TURNS[turn][0])
    with open_video(path) as video:
        video.read([0])
        assert video.backend == f"pyav {av.__version__}"
    with (
        pytest.raises(InputError, match="not for decord: the video is turned by its display"),
        open_video(path, decoder="decord"),
    ):
        pass


def test_the_players_idea_of_a_quarter_turn(tmp_path):
    """decord turns by FFmpeg's reading of the matrix; ours is the same where both can."""
    import decord

    for turn in ("90", "180", "270"):
        path = videos.write(tmp_path / f"{turn}.mp4", num_frames=3, **TURNS[turn][0])
        theirs = decord.VideoReader(str(path)).get_batch([2]).asnumpy()
        assert np.array_equal(read(path, [2]).pixels, theirs)


def test_a_turn_by_other_angles_is_refused(tmp_path):
    path = videos.write(tmp_path / "a.mp4", num_frames=2, matrix=(0.8, -0.6, 0.6, 0.8))
    with pytest.raises(InputError, match="a.mp4: turned by other than quarter turns"):
        read(path)


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    path = videos.write(
        tmp_path / "a.mp4",
        num_frames=60,
        options=CLOSED,
        ticks=[40 * i - 200 for i in range(60)],
        container={"avoid_negative_ts": "disabled"},
    )
    with open_video(path) as video:
        assert (video.num_frames, video.backend) == (55, f"pyav {av.__version__}")
        frames = video.read([0, 20, 54])
    assert numbers(frames) == [5, 25, 59]
    np.testing.assert_allclose(frames.pts_seconds, [0.0, 0.8, 2.16], atol=1e-6)


def test_names_that_look_like_addresses(tmp_path, monkeypatch):
    videos.write(tmp_path / "http:a b.mp4", num_frames=3)
    monkeypatch.chdir(tmp_path)
    for decoder in ("decord", "pyav"):
        assert numbers(read("http:a b.mp4", decoder=decoder)) == [0, 1, 2]


def test_tags_that_are_not_utf8(tmp_path):
    settings = dict(num_frames=3, title="A title that is replaced")
    path = videos.write(tmp_path / "a.mkv", **settings)
    data = path.read_bytes()
    assert b"A title" in data
    path.write_bytes(data.replace(b"A title", b"A\xff\xfeitle"))
    assert numbers(read(path)) == [0, 1, 2]


def cut(path, share: float):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_a_file_cut_off_in_the_middle_says_so(tmp_path):
    fast = dict(num_frames=60, options=CLOSED, container={"movflags": "faststart"})
    path = cut(videos.write(tmp_path / "fast.mp4", **fast), 0.6)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*cut off"):
        read(path)
    videos.write(path, **fast)
    with av.open(str(path)) as container:
        end = [packet.pos for packet in container.demux(video=0)][33]
    path.write_bytes(path.read_bytes()[:end])  # between two frames
    with pytest.raises(InputError, match="fast.mp4: cut off: 33 of 60 frames are there$"):
        read(path)
    for share, message in (
        (0.3, "not a video, or a damaged one"),
        (0.6, "there is no video in it"),
    ):
        path = cut(videos.write(tmp_path / "slow.mp4", num_frames=60), share)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: {message}"):
            read(path)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_streamable_files_cut_off_keep_their_first_frames(tmp_path, name):
    path = cut(videos.write(tmp_path / name, num_frames=60, options=videos.OPEN_GOP), 0.6)
    try:
        frames = read(path)
    except InputError as error:
        assert re.search(rf"{name}: (damaged or cut off|frame \d+ )", str(error))
    else:
        assert 10 < len(frames.pixels) < 60
        assert numbers(frames) == list(range(len(frames.pixels)))


@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav"])
def test_files_that_are_no_videos(tmp_path, decoder):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("a label\n" * 1000)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    expected = {
        "empty.mp4": "the file is empty",
        "text.mp4": "not a video, or a damaged one: Invalid data found when processing input",
        "noise.mp4": "not a video, or a damaged one: Invalid data found when processing input",
        "missing.mp4": "no such video",
    }
    for name, message in expected.items():
        with pytest.raises(InputError) as raised:
            read(tmp_path / name, decoder=decoder)
        assert str(raised.value) == f"{tmp_path / name}: {message}"


def test_a_file_with_sound_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(InputError, match="a.mp4: there is no video in it: only sound"):
        read(tmp_path / "a.mp4")


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_holes_in_a_file_never_give_other_frames(tmp_path, decoder):
    path = videos.write(tmp_path / "a.mp4", num_frames=60, options=CLOSED)
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 800  # behind the encoder's own message
    for hole in range(start, start + 1400, 100):
        path.write_bytes(whole[:hole] + bytes(100) + whole[hole + 100 :])
        with pytest.raises(InputError, match=r"a.mp4: (frame \d+ is damaged|not a video, or a)"):
            read(path, decoder=decoder)


def test_pyav_takes_over_where_decord_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with open_video(folder / "h264.mp4") as video:
        assert numbers(video.read([3, 50])) == [3, 50]
        assert video.backend == f"pyav {av.__version__}"
    with (
        pytest.raises(InputError, match="h264.mp4: not for decord: decord is not installed"),
        open_video(folder / "h264.mp4", decoder="decord"),
    ):
        pass


class _Broken:
    """Stands for decord; fails, or returns what the file does not hold."""

    class DECORDError(Exception):
        pass

    class logging:
        QUIET = 0

        @staticmethod
        def set_level(level):
            pass

    def __init__(self, fault: str):
        self.fault = fault

    def cpu(self, number):
        return number

    def VideoReader(self, path, ctx, num_threads):
        if self.fault == "opening":
            raise self.DECORDError("cannot open\nwith a stack trace")
        return self

    def __len__(self):
        return 61 if self.fault == "count" else 60

    def get_frame_timestamp(self, indices):
        late = 0.04 if self.fault == "times" else 0
        return np.array([[i * 0.04 + (late if i else 0), 0] for i in indices])

    def get_batch(self, indices):
        if self.fault == "reading":
            raise self.DECORDError("cannot read")
        return self

    def asnumpy(self):
        return np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("opening", "cannot open"),
        ("reading", "cannot read"),
        ("count", "it finds 61 frames, the file has 60"),
        ("times", "its frame times differ from the container's"),
        ("size", "its frames are 8x8"),
    ],
)
def test_pyav_takes_over_where_decord_fails(folder, monkeypatch, fault, message):
    monkeypatch.setitem(sys.modules, "decord", _Broken(fault))
    with open_video(folder / "h264.mp4") as video:
        assert numbers(video.read([3, 50])) == [3, 50]
        assert video.backend == f"pyav {av.__version__}"
    with (
        open_video(folder / "h264.mp4", decoder="decord") as video,
        pytest.raises(InputError) as raised,
    ):
        video.read([3, 50])
    assert str(raised.value) == f"{folder / 'h264.mp4'}: decord cannot read it: {message}"


def test_folders_of_frames_are_read_by_number(tmp_path):
    for number in range(1, 12):
        Image.fromarray(videos.burn(number)).save(tmp_path / f"img_{number}.png")
    (tmp_path / "notes.txt").touch()
    with open_video(tmp_path) as video:
        assert (video.num_frames, video.backend.split()[0]) == (11, "pillow")
        frames = video.read([10, 0, 1, 1])
    assert numbers(frames) == [11, 1, 2, 2]
    assert np.isnan(frames.pts_seconds).all()


def test_folders_of_frames_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match="the folder holds no images"):
        read(tmp_path)
    Image.fromarray(videos.burn(0)).save(tmp_path / "00001.png")
    Image.fromarray(videos.burn(1, width=98)).save(tmp_path / "00002.png")
    with pytest.raises(InputError, match=r"00002.png: 98x64 where frame 0 is 96x64"):
        read(tmp_path)
    (tmp_path / "00002.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"00002.png: cannot read the frame: cannot identify"):
        read(tmp_path)


def test_frames_are_found_where_a_seek_goes_too_far(folder):
    path = str(folder / "hevc.mp4")
    index = decode._scan(path)
    assert max(index.starts) > 30
    astray = dataclasses.replace(index, seek_ticks=[10**9] * 60)
    frames = decode._read_pyav(path, astray, [2, 30, 59])
    assert numbers(frames) == [2, 30, 59]


def stored(pts: int, kind: str) -> packets.Packet:
    """I: closed start, R: start of an open GOP, r: key that is no start, P: none, H: hidden."""
    return packets.Packet(
        pts=pts,
        dts=None,
        is_key=kind in "IRr",
        is_start=kind in "IR",
        is_closed=kind == "I",
        is_hidden=kind == "H",
        is_whole=True,
    )


def test_where_decoding_begins_for_each_frame():
    open_gop = [stored(*p) for p in ((0, "I"), (2, "P"), (1, "P"), (6, "R"), (4, "P"), (8, "P"))]
    pts_ticks, starts = packets.starts(open_gop)
    assert pts_ticks.tolist() == [0, 1, 2, 4, 6, 8]
    assert starts.tolist() == [0, 0, 0, 0, 3, 3]  # 4 is stored behind 6 but needs what precedes
    refresh = [stored(*p) for p in ((0, "I"), (1, "P"), (2, "r"), (3, "P"), (4, "I"))]
    assert packets.starts(refresh)[1].tolist() == [0, 0, 0, 0, 4]
    hidden = [stored(*p) for p in ((-2, "H"), (-1, "H"), (0, "P"))]
    assert [part.tolist() for part in packets.starts(hidden)] == [[0], [0]]


def test_which_gops_are_closed():
    closed = ((0, "I"), (2, "P"), (1, "P"), (3, "I"), (4, "P"))
    assert packets.has_only_closed_gops([stored(*packet) for packet in closed])
    for wrong in (
        ((0, "I"), (3, "I"), (2, "P")),  # shown before the key frame it follows
        ((0, "I"), (1, "R")),
        ((0, "I"), (1, "r")),
        ((0, "P"), (1, "I")),
    ):
        assert not packets.has_only_closed_gops([stored(*packet) for packet in wrong])


def test_where_h264_can_be_entered():
    idr, slice_, refresh = b"\x65\x88", b"\x61\x88", b"\x06\x06\x01\x20\x80"
    at_once, other_sei = b"\x06\x06\x01\xc0\x80", b"\x06\x05\x02\xff\xff\x80"
    avcc = b"\x01\x64\x00\x0a\xff"

    def prefixed(*units, size=4):
        return b"".join(len(unit).to_bytes(size, "big") + unit for unit in units)

    def streamed(*units):
        return b"".join(b"\x00\x00\x00\x01" + unit for unit in units)

    for join, extradata in ((prefixed, avcc), (streamed, None), (streamed, b"\x00\x00\x01\x67")):
        assert packets.h264_entry(join(other_sei, idr), extradata) == "idr"
        assert packets.h264_entry(join(other_sei, at_once, slice_), extradata) == "recovery"
        assert packets.h264_entry(join(refresh, slice_), extradata) is None
        assert packets.h264_entry(join(slice_), extradata) is None
    both = b"\x06\x05\x02\xff\xff\x06\x01\xc0\x80"
    assert packets.h264_entry(prefixed(both, slice_, size=2), b"\x01\x64\x00\x0a\xfd") == "recovery"
    assert packets.h264_entry(b"", avcc) is None


def test_damage_that_shows_without_decoding():
    avcc, unit = b"\x01\x64\x00\x0a\xff", b"\x61\x88\x00\x00\x03\x01\x80"
    stored = len(unit).to_bytes(4, "big") + unit
    assert packets.h264_is_whole(stored + stored, avcc)
    assert packets.h264_is_whole(b"\x00\x00\x01" + unit + b"\x00\x00\x00\x01" + unit, None)
    assert not packets.h264_is_whole(stored + stored[:-1], avcc)
    assert not packets.h264_is_whole(stored + bytes(8), avcc)
    assert not packets.h264_is_whole(stored.replace(b"\x03", b"\x00"), avcc)
    assert not packets.h264_is_whole(stored.replace(b"\x61", b"\xe1"), avcc)
    assert not packets.h264_is_whole(stored.replace(b"\x61", b"\x78"), avcc)
    assert not packets.h264_is_whole(b"", avcc)
