"""How times, memory and errors are taken, the same way for every contender.

On a GPU calls are captured in one graph that runs through several sets of inputs, which together
are larger than its cache, and the graph is replayed between two events: neither launches nor a
cache that still holds the inputs are part of the time. What cannot be captured is timed by events
around calls that wait behind a sleep on the device, so that the host is ahead; the table says so.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

CACHES = 4  # times the cache's size, of all sets of inputs together
FEWEST_SETS, MOST_SETS = 3, 8
FEWEST_RUNS, MOST_RUNS = 10, 200
WARM_UPS = 2
SLEEP_CYCLES = 20_000_000  # ten milliseconds, for the host to run ahead
GEMM_SIZE, COPY_BYTES = 8192, 2 * 2**30
# Of one product in bf16 without sparsity and of memory, by the makers' data sheets.
DATASHEET = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.039e12),
}


class Ceilings(NamedTuple):
    """What the device reaches here: bytes read and written by a copy, FLOPs of a bf16 product."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, work: "Work") -> float:
        """No implementation is faster: arithmetic and traffic, one behind the other."""
        return 1e3 * max(work.flops / self.flops_per_second, work.size / self.bytes_per_second)


class Work(NamedTuple):
    """What has to be done: useful FLOPs, and bytes of every input once and every output once."""

    flops: float
    size: float


@dataclass
class Timing:
    """Median milliseconds of a call; `spread` is the middle half's width over the median."""

    ms: float
    spread: float
    by: str  # "graph", "events" or "clock"


@dataclass
class Row:
    """A contender's figures. `note` says why there are none, or what they hide."""

    name: str
    kind: str
    timings: dict[str, Timing] = field(default_factory=dict)  # by phase
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)  # by result
    note: str = ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def num_sets(device: torch.device, size: int) -> int:
    """How many sets of inputs of `size` bytes each outgrow the device's cache."""
    if device.type != "cuda":
        return FEWEST_SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(FEWEST_SETS, math.ceil(CACHES * cache / max(size, 1))))


def _timing(seconds: Sequence[float], by: str) -> Timing:
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / median if median else 0.0
    return Timing(1e3 * median, spread, by)


def clock(calls: Sequence[Callable[[], object]], *, seconds: float) -> Timing:
    """Of a call on the CPU; `calls` are of one contender, each on its own inputs."""
    for call in calls:
        call()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < len(calls) or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        calls[len(found) % len(calls)]()
        found.append(time.perf_counter() - start)
    return _timing(found, "clock")


def _between_events(run: Callable[[], object], *, runs: int, is_ahead: bool) -> list[float]:
    """Seconds of every run, on the device."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda.synchronize()
    if is_ahead:
        torch.cuda._sleep(SLEEP_CYCLES)
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def _num_runs(estimate: float, seconds: float) -> int:
    return max(FEWEST_RUNS, min(MOST_RUNS, int(seconds / max(estimate, 1e-6))))


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls, warmed up where capture wants it, beside the current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            _all(calls)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the side stream's blocks are of no use to the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(calls)
    return graph


def replays(calls: Sequence[Callable[[], object]], *, seconds: float) -> Timing:
    """Of a call, by replays of a graph of all of them."""
    graph = capture(calls)
    _between_events(graph.replay, runs=WARM_UPS, is_ahead=False)
    estimate = _between_events(graph.replay, runs=1, is_ahead=False)[0]
    runs = _num_runs(estimate, seconds)
    found = _between_events(graph.replay, runs=runs, is_ahead=False)
    del graph
    return _timing([second / len(calls) for second in found], "graph")


def events(calls: Sequence[Callable[[], object]], *, seconds: float, is_ahead: bool) -> Timing:
    """Of a call, by events around one pass over all of them."""

    def run() -> None:
        _all(calls)

    for _ in range(WARM_UPS):
        run()
    estimate = _between_events(run, runs=1, is_ahead=is_ahead)[0]
    found = _between_events(run, runs=_num_runs(estimate, seconds), is_ahead=is_ahead)
    return _timing([second / len(calls) for second in found], "events")


def time_calls(
    calls: Sequence[Callable[[], object]], *, device: torch.device, seconds: float
) -> Timing:
    """The best way there is: a graph, else events, and a clock on a CPU."""
    if device.type != "cuda":
        return clock(calls, seconds=seconds)
    try:
        return replays(calls, seconds=seconds)
    except Exception as error:  # noqa: BLE001 - whatever a library cannot capture is timed without
        torch.cuda.synchronize()
        found = events(calls, seconds=seconds, is_ahead=True)
        found.by = f"events ({type(error).__name__} at capture)"
        return found


def peak_bytes(call: Callable[[], object], *, device: torch.device) -> int | None:
    """Most memory at a time beyond what was there before the call, its results included."""
    if device.type != "cuda":
        return None
    free_memory(device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| over all elements, in float64; NaN stays NaN."""
    difference, length = 0.0, 0.0
    parts = (x.reshape(-1).split(2**26) for x in (found, exact))
    for one, truth in zip(*parts, strict=True):
        truth = truth.double()
        difference += float((one.double() - truth).square().sum())
        length += float(truth.square().sum())
    return math.sqrt(difference / length) if length else math.nan


def ceilings(device: torch.device, *, seconds: float = 0.5) -> Ceilings:
    """The device's, on random data: a copy through memory and a bf16 product."""
    is_gpu = device.type == "cuda"
    size = COPY_BYTES // 2 if is_gpu else 2**23
    source = torch.empty(size, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copied = time_calls([partial(target.copy_, source)], device=device, seconds=seconds)
    del source, target
    side = GEMM_SIZE if is_gpu else 512
    dtype = torch.bfloat16 if is_gpu else torch.float32
    a, b = (torch.empty(side, side, dtype=dtype, device=device).normal_() for _ in range(2))
    product = time_calls([partial(torch.mm, a, b)], device=device, seconds=seconds)
    del a, b
    free_memory(device)
    return Ceilings(2 * 2 * size / (copied.ms / 1e3), 2 * side**3 / (product.ms / 1e3))
