"""Lists of clips: every form, every mistake with its place."""

from pathlib import Path

import pytest

from distill.data.index import Clip, clip_id, read_list
from distill.errors import InputError
from distill.recipe import ClipList


def read(folder: Path, text: str, **settings) -> list[Clip]:
    path = folder / "train.csv"
    path.write_text(text, encoding="utf-8")
    return read_list(ClipList(list=str(path), **settings))


def test_six_columns_of_the_distillation_lists(tmp_path):
    clips = read(tmp_path, "k400 a/b.mp4 10.5 2 4.5 7\nssv2 c.webm -1 -1 -1 -1\n")
    assert clips == [
        Clip(
            id=clip_id("a/b.mp4", 2.0, 4.5),
            path=str(tmp_path / "a/b.mp4"),
            name="a/b.mp4",
            label=7,
            start_seconds=2.0,
            end_seconds=4.5,
            total_seconds=10.5,
            source="k400",
            line=1,
        ),
        Clip(
            id=clip_id("c.webm"),
            path=str(tmp_path / "c.webm"),
            name="c.webm",
            source="ssv2",
            line=2,
        ),
    ]


@pytest.mark.parametrize("separator", [" ", "   ", ",", ", ", "\t", " \t"])
def test_path_and_label_with_any_separator(tmp_path, separator):
    clips = read(tmp_path, f"a.mp4{separator}3\n\nb.mp4{separator}0\n")
    assert [(clip.name, clip.label, clip.line) for clip in clips] == [
        ("a.mp4", 3, 1),
        ("b.mp4", 0, 3),
    ]


def test_trimmed_clips_and_folders_of_frames(tmp_path):
    (clip,) = read(tmp_path, "a.mp4,60,10,12.5,4\n")
    assert (clip.total_seconds, clip.start_seconds, clip.end_seconds) == (60, 10, 12.5)
    (clip,) = read(tmp_path, "frames/17 48 4\n")
    assert (clip.num_frames, clip.label, clip.source) == (48, 4, None)


def test_a_path_on_each_line(tmp_path):
    clips = read(tmp_path, 'a/b.mp4\n"my videos/c, d.webm"\nmy videos/e.mov\n')
    assert [clip.name for clip in clips] == ["a/b.mp4", "my videos/c, d.webm", "my videos/e.mov"]
    assert [clip.label for clip in clips] == [None] * 3
    mixed = "a.mp4 0\n" + "b.mp4\n"
    with pytest.raises(InputError, match="expected 2 fields"):
        read(tmp_path, mixed)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('"my video.mp4" 3', "my video.mp4"),
        ("my video.mp4,3", "my video.mp4"),
        ('"a, ""b"".mp4",3', 'a, "b".mp4'),
        ('"a ""b"".mp4" 3', 'a "b".mp4'),
        ("a,b c.mp4\t3", "a,b c.mp4"),
        ("a,b.mp4 3", "a,b.mp4"),
        ("./a//b.mp4 3", "a/b.mp4"),
        ("\ufeffa.mp4 3", "a.mp4"),
        ("видео.mp4 3\r", "видео.mp4"),
    ],
)
def test_names_that_hold_separators(tmp_path, line, name):
    (clip,) = read(tmp_path, line + "\n")
    assert (clip.name, clip.label) == (name, 3)
    assert clip.path == str(tmp_path / name)


def test_paths_are_relative_to_the_prefix(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = f"a.mp4 0\n{tmp_path}/videos/b.mp4 1\n/elsewhere/c.mp4 2\n~/d.mp4 3\n"
    clips = read(tmp_path, text, prefix=str(tmp_path / "videos"))
    assert [clip.path for clip in clips] == [
        f"{tmp_path}/videos/a.mp4",
        f"{tmp_path}/videos/b.mp4",
        "/elsewhere/c.mp4",
        "/home/someone/d.mp4",
    ]
    assert [clip.name for clip in clips] == ["a.mp4", "b.mp4", "/elsewhere/c.mp4", "~/d.mp4"]
    (clip,) = read(tmp_path, "a.mp4 0\n", prefix="~/videos")
    assert clip.path == "/home/someone/videos/a.mp4"


def test_ids_follow_name_and_times_alone(tmp_path):
    one, two = read(tmp_path, "k400 a.mp4 60 1 2 7\nk400 a.mp4 60 2 3 7\n")
    assert one.id != two.id
    (moved,) = read(tmp_path, "\n\na.mp4,50,1.0,2.0,3\n", prefix="/other")
    assert moved.id == one.id
    assert clip_id("a.mp4", 1.0, 2.0) == 8131352091582580234


def test_all_bad_lines_are_told_at_once(tmp_path):
    text = """k400 a.mp4 10 0 5 1
k400 b.mp4 ten 0 5 1
k400 my video.mp4 10 0 5 1
k400 c.mp4 10 5 5 1

k400 d.mp4 10 12 15 1
k400 e.mp4 10 0 5 cat
k400 f.mp4 10 0 5 1.5
k400 g.mp4 nan -1 -1 -2
k400 h.mp4 10 0 5 -2
k400 "i.mp4 10 0 5 1
k400 "" 10 0 5 1
k400 ./a.mp4 9 0 5 2
"""
    with pytest.raises(InputError) as raised:
        read(tmp_path, text)
    path = tmp_path / "train.csv"
    fields = "source path total_seconds start_seconds end_seconds label"
    assert str(raised.value).splitlines() == [
        f"{path}:2: total_seconds is 'ten', expected seconds or -1",
        f"{path}:3: expected 6 fields ({fields}), found 7; quote a path that holds the separator",
        f"{path}:4: start_seconds 5 is not before end_seconds 5",
        f"{path}:6: start_seconds 12 is not before total_seconds 10",
        f"{path}:7: label is 'cat', expected a whole number from -1",
        f"{path}:8: label is '1.5', expected a whole number from -1",
        f"{path}:9: total_seconds is 'nan', expected seconds or -1",
        f"{path}:10: label is '-2', expected a whole number from -1",
        f"{path}:11: quotes do not match at '\"i.mp4 10 0 5 1'",
        f"{path}:12: the path is empty",
        f"{path}:13: the same clip as in line 1: a.mp4",
    ]


def test_a_long_tail_of_bad_lines_is_counted(tmp_path):
    with pytest.raises(InputError) as raised:
        read(tmp_path, "a.mp4 1\n" + "b.mp4 x\n" * 30)
    lines = str(raised.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 10 more bad lines"


def test_a_list_of_which_nothing_fits(tmp_path):
    with pytest.raises(InputError, match=r"train.csv:1: no known form.*found 'a;b'"):
        read(tmp_path, "a;b\nc.mp4;3\n")
    with pytest.raises(InputError, match=r"train.csv:1: label is 'label', expected a whole"):
        read(tmp_path, "path,label\n")
    with pytest.raises(InputError, match="train.csv: the list is empty"):
        read(tmp_path, "\n  \n")


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none.csv: no such list file"):
        read_list(ClipList(list=str(tmp_path / "none.csv")))
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9.mp4 3\n")
    with pytest.raises(InputError, match=r"latin.csv: not a text file in UTF-8 \(byte 3\)"):
        read_list(ClipList(list=str(tmp_path / "latin.csv")))
    with pytest.raises(InputError, match="has no folders; sort the videos"):
        read_list(ClipList(list=str(tmp_path)))
    with pytest.raises(InputError, match="no list file is given"):
        read_list(ClipList(list=None))


def test_a_share_keeps_some_of_each_class_whatever_the_order(tmp_path):
    lines = [f"{label}/{i}.mp4 {label}" for label in range(3) for i in range(10)] + ["x.mp4 9"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("\n".join(reversed(lines)))
    one = read_list(ClipList(list=str(tmp_path / "a.csv"), share=0.3), seed=1)
    two = read_list(ClipList(list=str(tmp_path / "b.csv"), share=0.3), seed=1)
    other = read_list(ClipList(list=str(tmp_path / "a.csv"), share=0.3), seed=2)
    assert [clip.label for clip in one] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 9]
    assert {clip.id for clip in one} == {clip.id for clip in two}
    assert {clip.id for clip in one} != {clip.id for clip in other}
