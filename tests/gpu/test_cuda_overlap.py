"""Batches copied beside the work on the ones before arrive whole, in their order."""

import pytest
import torch

from distill.engines.overlap import overlapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
SIZES = [8] * 20 + [3] + [8] * 3  # a partial batch in between


def batches(*, is_pinned: bool):
    for number, size in enumerate(SIZES):
        codes = torch.full((size, 1 << 20), number, dtype=torch.uint8)
        yield {
            "clip_id": torch.arange(size),
            "codes": codes.pin_memory() if is_pinned else codes,
            "epoch": 3,
        }


@pytest.mark.parametrize("is_pinned", [True, False])
def test_no_batch_is_written_over_while_it_is_in_use(is_pinned):
    slow = torch.randn(4096, 4096, device=CUDA)
    seen = []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for batch in overlapped(batches(is_pinned=is_pinned), CUDA):
        assert batch["clip_id"].device.type == "cpu"
        assert (batch["codes"].device, batch["epoch"]) == (CUDA, 3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):  # the host is far ahead of it
                slow = (slow @ slow).clamp_(-1, 1)
            seen.append(torch.stack([batch["codes"].min(), batch["codes"].max()]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(seen).tolist() == [[number, number] for number in range(len(SIZES))]
    held = torch.cuda.max_memory_allocated() - before
    assert held < 4 * (8 << 20) + 2 * slow.nbytes  # two places, not a batch a step
