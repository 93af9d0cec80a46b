"""The quarantine's count; what workers do is in test_load.py."""

import pytest
from faults import task

from distill.data.workers import Quarantine
from distill.errors import StateError


def test_entries_of_clips_outside_the_list_do_not_count(tmp_path):
    """A folder that earlier, longer lists were built into: four of its entries are not ours."""
    path = tmp_path / "quarantine.jsonl"
    earlier = Quarantine(path, total=5, max_share=1.0)
    for number in range(5):
        earlier.add(task("bad", number).clip, "the file is empty")
    clips = [task("good", number).clip for number in range(4, 14)]
    quarantine = Quarantine(path, total=10, max_share=0.2, clips=clips)
    assert task("bad", 2).clip in quarantine, "not tried again all the same"
    quarantine.add(clips[1], "too short")
    with pytest.raises(StateError, match="^3 of 10 clips cannot be decoded, more than "):
        quarantine.add(clips[2], "too short")


def test_a_list_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "quarantine.jsonl"
    message = (
        f"{path}: cannot note a clip that cannot be decoded (File exists); make room, or check "
        "who may write there, and start again"
    )
    with pytest.raises(StateError) as caught:
        Quarantine(path, total=5, max_share=1.0).add(task("bad", 1).clip, "the file is empty")
    assert str(caught.value) == message
