"""The cluster on paper against figures worked out by hand."""

import pytest

from benchmarks.cluster_model import (
    RESOURCES,
    Cluster,
    Work,
    all_reduce_seconds,
    assumptions,
    binding,
    build_clips_per_second,
    build_hours,
    cache_tb,
    clips_per_second,
    epoch_hours,
    model_page,
    online_epoch_hours,
    step_seconds,
    wanted_gb_per_s,
    work_of,
)
from distill.recipe_file import load_recipe

# Round numbers: 2 MB and 0.1 TFLOP a clip, 5 with the teacher; 100 MB of gradients.
ROUND = Work("S14", 0.1, 5.0, 2_000_000, 100_000_000, 3200)
HALF = {"peak_tflops": 1000.0, "network_efficiency": 0.5}


def test_a_step_takes_as_long_as_each_resource_works_on_its_share():
    seconds = step_seconds(ROUND, Cluster(gpus=16, **HALF))
    assert tuple(seconds) == RESOURCES
    assert seconds == pytest.approx(
        {
            "gpu": 200 * 0.1 / 300,  # 200 clips a GPU at 30 % of 1000 TFLOP/s
            "storage": 8 * 200 * 2e6 / 12.5e9,
            "pcie": 200 * 2e6 / 25e9,
            "host": 8 * 200 * 2e6 / (112 * 6e9),
            "all-reduce": 2 * 15 / 16 * 1e8 / (0.5 * 400e9),  # eight ports of 50 GB/s
        }
    )
    assert binding(seconds) == ("storage", "gpu")
    assert clips_per_second(ROUND, Cluster(gpus=16, **HALF)) == pytest.approx(2 * 6250)


def test_within_a_node_gradients_go_over_nvlink():
    assert all_reduce_seconds(1e9, Cluster(gpus=8, **HALF)) == pytest.approx(1.75 / 225)
    assert all_reduce_seconds(1e9, Cluster(gpus=1)) == 0


def test_with_enough_storage_the_gpu_binds():
    cluster = Cluster(gpus=8, storage_gb_per_s_per_node=100.0, **HALF)
    seconds = step_seconds(ROUND, cluster)
    assert binding(seconds)[0] == "gpu"
    assert clips_per_second(ROUND, cluster) == pytest.approx(8 * 3000)
    assert wanted_gb_per_s(ROUND, cluster) == pytest.approx(8 * 3000 * 2e-3)


@pytest.mark.parametrize(
    ("changes", "rate", "bound"),
    [
        ({}, 8 * 90, "gpu"),  # 450 TFLOP/s over 5 TFLOP
        ({"cores_per_node": 32}, 640, "host"),
        ({"storage_gb_per_s_per_node": 1.0}, 500, "storage"),
    ],
)
def test_what_binds_a_build(changes, rate, bound):
    cluster = Cluster(gpus=8, **HALF, **changes)
    assert build_clips_per_second(ROUND, cluster) == (pytest.approx(rate), bound)
    assert build_hours(ROUND, cluster, clips=36_000, views=2) == pytest.approx(20 / rate)


def test_hours_and_bytes_of_a_set():
    cluster = Cluster(gpus=8, **HALF)
    assert cache_tb(ROUND, clips=10_000_000, views=8) == pytest.approx(160)
    assert epoch_hours(ROUND, cluster, clips=22_500_000) == pytest.approx(1)  # 6250 clips/s
    by_hand = 36_000 * (5 / 450 + 0.1 / 300) / 8 / 3600
    assert online_epoch_hours(ROUND, cluster, clips=36_000) == pytest.approx(by_hand)


def test_the_work_is_that_of_the_recipes():
    work = work_of(load_recipe("S14"))
    assert work.step_tflop_per_clip == pytest.approx(0.073, rel=0.01)
    assert work.teacher_tflop_per_clip == pytest.approx(5.101, rel=0.001)
    assert work.gradient_bytes_per_step == pytest.approx(4 * 29.2e6, rel=0.01)
    assert 1.7e6 < work.record_bytes_per_clip < 2.1e6
    assert work.batch_clips == 4096


def test_the_page_says_what_binds_and_for_whom():
    page = "\n".join(model_page({"S14": ROUND}, clips=10_000_000, views=8))
    assert "| S14 | 8 | 400 | storage | gpu, 26% of it | 6,250 | 8% | 0% |" in page
    assert "**160 TB**" in page
    assert "Shared storage over a link of 12.5 GB/s a node" in "\n".join(assumptions())
