"""Batches on their way to a GPU while it works on the ones before."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# What the loop looks at itself: to fetch it back it would have to wait for the GPU.
HOST_FIELDS = ("clip_id", "is_cached")


def overlapped(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """The batches with their tensors on a GPU, copied beside its work; on a CPU as they are.

    Neither the host nor the work of the batch before waits for a copy. There are two places on
    the GPU for all batches, which take turns: what is given is valid until the next but one.
    """
    if device.type != "cuda":
        yield from batches
        return
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    places: tuple[dict[str, Tensor], ...] = ({}, {})
    done: list[torch.cuda.Event | None] = [None, None]  # with the last batch in this place
    for number, batch in enumerate(batches):
        turn = number % 2
        with torch.cuda.stream(copies):
            if done[turn] is not None:
                copies.wait_event(done[turn])
            moved = {
                name: _copy(name, value, places[turn], device=device, work=work)
                for name, value in batch.items()
                if isinstance(value, Tensor) and name not in HOST_FIELDS
            }
        work.wait_stream(copies)
        yield {**batch, **moved}
        done[turn] = work.record_event()


def _copy(
    name: str,
    value: Tensor,
    place: dict[str, Tensor],
    *,
    device: torch.device,
    work: torch.cuda.Stream,
) -> Tensor:
    kept = place.get(name)
    if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
        kept = place[name] = torch.empty_like(value, device=device)
        kept.record_stream(work)
    if value.device.type == "cpu":
        value = value.pin_memory()  # nothing to do where it is; other memory makes the host wait
    return kept.copy_(value, non_blocking=True)
