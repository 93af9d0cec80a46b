"""What a run logs of its speed: rates by hand, and peaks by a device's name."""

import pytest
import torch

from distill.recipe_file import load_recipe
from distill.run import meter
from distill.run.meter import Meter, model_tflop, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Gives each of the times in turn."""

    def use(*times: float) -> None:
        turns = iter(times)
        monkeypatch.setattr(meter.time, "monotonic", lambda: next(turns))

    return use


def test_rates_are_those_since_the_last_reading(clock):
    clock(100.0, 104.0, 106.0)
    recipe = load_recipe("S14", ["run.peak_tflops=2.5"])
    one = Meter(recipe, device=CPU, wait_seconds=7.0, num_ranks=4)
    for _ in range(2):
        one.count(16)
    # A step of an S/14 with its projectors: three times the forward, less the patches' gradient.
    flops = model_tflop(recipe)[0]
    assert flops == pytest.approx(3 * 0.0244, rel=0.02)
    assert one.read(8.0, steps_left=10) == pytest.approx(
        {
            "clips_per_second": 8.0,
            "data_wait": 0.25,
            "tflops": 8.0 * flops / 4,
            "mfu": 8.0 * flops / 4 / 2.5,
            "seconds_left": 20.0,
        }
    )
    one.count(4)
    rates = one.read(8.0, steps_left=9)
    assert (rates["clips_per_second"], rates["data_wait"]) == (2.0, 0.0)
    assert rates["seconds_left"] == 18.0  # three steps in six seconds


def test_a_device_without_a_known_peak_has_no_mfu(clock):
    clock(0.0, 1.0)
    one = Meter(load_recipe("S14"), device=CPU, wait_seconds=0.0)
    one.count(1)
    assert one.read(0.0).keys() == {"clips_per_second", "data_wait", "tflops", "seconds_left"}


def test_blocks_computed_twice_are_no_work_of_the_model():
    plain = model_tflop(load_recipe("L14", ["model.checkpoint_blocks=0"]))
    assert model_tflop(load_recipe("L14", ["model.checkpoint_blocks=24"])) == plain


@pytest.mark.parametrize(("cached", "passes"), [(0, 1.0), (3, 0.25), (4, 0.0)])
def test_a_teacher_counts_for_the_clips_that_it_looks_at(clock, cached, passes):
    clock(0.0, 1.0)
    recipe = load_recipe("S14", ["objective.targets=hybrid"])
    one = Meter(recipe, device=CPU, wait_seconds=0.0)
    one.count(4, read=4, cached=cached)
    rates = one.read(0.0)
    student, teacher = model_tflop(recipe)
    assert teacher == pytest.approx(5.10, rel=0.01)
    assert rates["tflops"] == pytest.approx(4 * (student + passes * teacher))
    assert rates["hit_rate"] == cached / 4


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.0),
        ("NVIDIA H200 NVL", "bf16", 835.0),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA B200", "bf16", 2250.0),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_whole_device_or_unknown(name, precision, peak):
    assert peak_tflops(name, precision) == peak


def test_the_line_behind_the_bar_says_what_is_known():
    rates = {"clips_per_second": 812.4, "data_wait": 0.012, "tflops": 59.4}
    assert meter.note(3.21, rates) == ("loss 3.2100  812.4 clips/s  59.4 TFLOP/s  data wait 1%")
    rates |= {"mfu": 0.0601, "gpu_peak_gb": 31.26, "hit_rate": 0.5}
    assert meter.note(3.21, rates) == (
        "loss 3.2100  812.4 clips/s  MFU 6%  data wait 1%  GPU 31.3 GB  cached 50%"
    )
