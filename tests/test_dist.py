"""Which part of a job is whose."""

import pytest
import torch

from distill.dist import WHOLE, Part, read_part, use_own_gpu
from distill.errors import InputError


def test_alone_a_process_does_everything():
    assert read_part(None, {}) == WHOLE == Part(0, 1)


@pytest.mark.parametrize(("ranks", "shards"), [(1, 3), (2, 1), (2, 3)])
def test_shards_and_ranks_together_hold_every_part_once(ranks, shards):
    parts = [
        read_part(f"{shard}/{shards}", {"RANK": str(rank), "WORLD_SIZE": str(ranks)})
        for shard in range(1, shards + 1)
        for rank in range(ranks)
    ]
    count = ranks * shards
    assert sorted(parts, key=lambda part: part.index) == [Part(i, count) for i in range(count)]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_shard_is_refused(shard):
    message = f"--shard {shard}: expected i/n, the i-th of n parts, from 1/n to n/n; as in 2/4"
    with pytest.raises(InputError) as caught:
        read_part(shard, {})
    assert str(caught.value) == message


def test_a_rank_that_is_no_number_is_named():
    with pytest.raises(InputError, match="^RANK=two: expected a number, as torchrun sets it"):
        read_part(None, {"RANK": "two", "WORLD_SIZE": "4"})


def test_every_local_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    use_own_gpu({"LOCAL_RANK": "1"})
    assert taken == [1]
    with pytest.raises(InputError, match="^LOCAL_RANK=2: this machine has 2 GPUs; give torchrun"):
        use_own_gpu({"LOCAL_RANK": "2"})


@pytest.mark.parametrize("told", [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "gpu:1"}])
def test_a_task_that_sees_one_gpu_alone_takes_that(monkeypatch, told):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    use_own_gpu({"LOCAL_RANK": "3", **told})
    assert taken == [0]
    with pytest.raises(InputError, match="^LOCAL_RANK=3: this machine has 1 GPUs"):
        use_own_gpu({"LOCAL_RANK": "3"})
