"""How fast a run is and how much of its device it uses: what a run logs beside its losses."""

import time

import torch

from distill import recipe as schema
from distill.cost import student_cost, teacher_macs

# Names of the values that tell of the machine and not of the model: a rerun logs others.
RATES = (
    "clips_per_second",
    "data_wait",
    "tflops",
    "mfu",
    "gpu_peak_gb",
    "seconds_left",
)

# Dense peaks in TFLOP/s in half precision (bf16 as fp16) and in float32 without TF32, by the start
# of a CUDA device's name; the longest start that fits counts. NVIDIA's data sheets of the V100,
# A100, L4, L40S, H100, H200, Blackwell HGX and DGX, and the Ada and Ampere GPU architecture white
# papers (GeForce: tensor cores with float32 accumulation). Where a sheet gives half precision with
# sparsity it is halved. The V100 has no bf16.
PEAK_TFLOPS = {
    "Tesla V100-SXM2": (125.0, 15.7),
    "Tesla V100-PCIE": (112.0, 14.0),
    "NVIDIA A100": (312.0, 19.5),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA H100 80GB HBM3": (989.0, 67.0),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA GH200": (989.0, 67.0),
    "NVIDIA H200": (989.0, 67.0),
    "NVIDIA H200 NVL": (835.0, 60.0),
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA GB200": (2500.0, 80.0),
}
NO_BF16 = ("Tesla V100",)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """What a device of this name can do in `precision`; None where the table does not know it.

    Neither of a slice of a GPU (MIG), which has the whole one's name and a part of its units.
    """
    if "MIG" in device_name.split() or (precision == "bf16" and device_name.startswith(NO_BF16)):
        return None
    # A name goes on after a blank or a dash only: an L40 is no L4.
    starts = [
        start
        for start in PEAK_TFLOPS
        if device_name == start or device_name.startswith((f"{start} ", f"{start}-"))
    ]
    if not starts:
        return None
    half, single = PEAK_TFLOPS[max(starts, key=len)]
    return single if precision == "fp32" else half


def model_tflop(recipe: schema.Recipe) -> tuple[float, float]:
    """TFLOP per clip of a training step, and of its teachers where they look at it too.

    Of the model: blocks that are computed again for their backward count once.
    """
    model = recipe.model.model_copy(update={"checkpoint_blocks": 0})
    step = student_cost(recipe.model_copy(update={"model": model})).step
    section = recipe.objective
    if not isinstance(section, schema.Distill) or section.targets == "cached":
        return step, 0.0
    return step, 2e-12 * sum(teacher_macs(recipe, name) for name in section.teachers)


class Meter:
    """Counts between two readings; `wait_seconds` is what the loader has waited in all.

    `num_ranks` processes share the clips that are counted. What it gives of FLOPs and of memory
    is that of one of them.
    """

    def __init__(
        self,
        recipe: schema.Recipe,
        *,
        device: torch.device,
        wait_seconds: float,
        num_ranks: int = 1,
    ) -> None:
        self.device, self.num_ranks = device, num_ranks
        self.step_tflop, self.teacher_tflop = model_tflop(recipe)
        self.peak_tflops = recipe.run.peak_tflops
        if self.peak_tflops is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self.peak_tflops = peak_tflops(name, recipe.optim.precision)
        self._steps, self._first = 0, time.monotonic()
        self._reset(wait_seconds, now=self._first)

    def count(self, clips: int, *, read: int = 0, cached: int = 0) -> None:
        """One step on so many clips of all processes.

        Of those that this process `read` where a cache may have gaps, it had `cached`.
        """
        self._steps += 1
        self._clips += clips
        self._read += read
        self._cached += cached

    def read(self, wait_seconds: float, *, steps_left: int = 0) -> dict[str, float]:
        """The rates since the last reading, by names of `RATES`, and `hit_rate` where there is one.

        `tflops` are those that the model needs, a second; `mfu` is their share of the device's
        peak, where that is known; `data_wait` is a share of the time. Does not wait for the device.
        """
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        rate = self._clips / elapsed
        hit_rate = self._cached / self._read if self._read else None
        tflop = self.step_tflop + (1 - (hit_rate or 0.0)) * self.teacher_tflop
        rates = {
            "clips_per_second": rate,
            "data_wait": (wait_seconds - self._waited) / elapsed,
            "tflops": rate * tflop / self.num_ranks,
        }
        if self.peak_tflops is not None:
            rates["mfu"] = rates["tflops"] / self.peak_tflops
        if self.device.type == "cuda":
            rates["gpu_peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self._steps:
            rates["seconds_left"] = steps_left * (now - self._first) / self._steps
        if hit_rate is not None:
            rates["hit_rate"] = hit_rate
        self._reset(wait_seconds, now=now)
        return rates

    def _reset(self, wait_seconds: float, *, now: float) -> None:
        self._clips = self._read = self._cached = 0
        self._waited, self._time = wait_seconds, now
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def note(loss: float, rates: dict[str, float]) -> str:
    """A step's loss and rates as the line behind a progress bar."""
    parts = [f"loss {loss:.4f}", f"{rates['clips_per_second']:.1f} clips/s"]
    if "mfu" in rates:
        parts.append(f"MFU {rates['mfu']:.0%}")
    else:
        parts.append(f"{rates['tflops']:.3g} TFLOP/s")
    parts.append(f"data wait {rates['data_wait']:.0%}")
    if "gpu_peak_gb" in rates:
        parts.append(f"GPU {rates['gpu_peak_gb']:.1f} GB")
    if "hit_rate" in rates:
        parts.append(f"cached {rates['hit_rate']:.0%}")
    return "  ".join(parts)
