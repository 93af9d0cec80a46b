"""A cluster on paper: which resource binds a distillation on 8, 32 and 256 GPUs.

Nothing here is measured on one. Work and bytes come from the formulas of `distill.cost`, what the
machines do from `Cluster`, whose fields are the assumptions, each with its source. A step takes as
long as its slowest resource: all of them work at the same time, and none waits for another.
"""

import math
from dataclasses import dataclass
from functools import partial

from distill.cost import count_parameters, record_bytes, student_cost, teacher_macs
from distill.models import build_model
from distill.recipe import Recipe
from distill.run.meter import PEAK_TFLOPS

# Of the peak, by the student's size: what the kernels aim at. Unproven on a GPU.
STUDENT_MFU = {"S14": 0.30, "B14": 0.40, "L14": 0.45}
RESOURCES = ("gpu", "storage", "pcie", "host", "all-reduce")


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines: nodes like NVIDIA's DGX H100 and H200.

    That system's data sheet has 8 GPUs, 112 cores, and a port of 400 Gb/s for each GPU.
    """

    gpus: int
    gpus_per_node: int = 8
    cores_per_node: int = 112
    peak_tflops: float = PEAK_TFLOPS["NVIDIA H100 80GB HBM3"][0]
    teacher_mfu: float = 0.45  # on one H100 40 to 50 % was expected of a ViT of this size
    storage_gb_per_s_per_node: float = (
        12.5  # a link of 100 Gb/s, and storage that keeps up with all
    )
    pcie_gb_per_s_per_gpu: float = 25.0  # host to device; half of what PCIe 5.0 x16 can do
    network_gb_per_s_per_gpu: float = 50.0  # 400 Gb/s, between nodes
    nvlink_gb_per_s_per_gpu: float = 450.0  # NVLink 4, one direction, within a node
    network_efficiency: float = 0.7  # of an all-reduce's bus bandwidth; a guess
    hash_gb_per_s_per_core: float = 6.0  # xxh3 over a record just read, measured on one core
    decoded_clips_per_s_per_core: float = 20.0  # sparse, of 8 frames, measured on one core

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)


@dataclass(frozen=True)
class Work:
    """What a clip asks for, and a step."""

    size: str
    step_tflop_per_clip: float
    teacher_tflop_per_clip: float
    record_bytes_per_clip: int
    gradient_bytes_per_step: int  # float32
    batch_clips: int  # of all GPUs


def work_of(recipe: Recipe) -> Work:
    """By the formulas of a recipe."""
    return Work(
        size=recipe.model.size,
        step_tflop_per_clip=student_cost(recipe).step,
        teacher_tflop_per_clip=2e-12 * teacher_macs(recipe),
        record_bytes_per_clip=sum(record_bytes(recipe).values()),
        gradient_bytes_per_step=4 * count_parameters(partial(build_model, recipe)),
        batch_clips=recipe.optim.batch_size,
    )


def all_reduce_seconds(size_bytes: float, cluster: Cluster) -> float:
    """By rings, one for each port of a node: every GPU sends 2 (n - 1) / n of the bytes.

    Within a node they go over NVLink, and leave it by all of its ports at once.
    """
    n = cluster.gpus
    gb_per_s = cluster.nvlink_gb_per_s_per_gpu
    if n > cluster.gpus_per_node:
        gb_per_s = min(gb_per_s, cluster.gpus_per_node * cluster.network_gb_per_s_per_gpu)
    return 2 * (n - 1) / n * size_bytes / (1e9 * gb_per_s * cluster.network_efficiency)


def step_seconds(work: Work, cluster: Cluster) -> dict[str, float]:
    """How long each of `RESOURCES` works on a step."""
    clips = work.batch_clips / cluster.gpus  # a GPU's
    node_clips = clips * min(cluster.gpus, cluster.gpus_per_node)
    node_gb = 1e-9 * node_clips * work.record_bytes_per_clip
    gpu_gb = 1e-9 * clips * work.record_bytes_per_clip
    sustained = cluster.peak_tflops * STUDENT_MFU[work.size]
    return {
        "gpu": clips * work.step_tflop_per_clip / sustained,
        "storage": node_gb / cluster.storage_gb_per_s_per_node,
        "pcie": gpu_gb / cluster.pcie_gb_per_s_per_gpu,
        "host": node_gb / (cluster.hash_gb_per_s_per_core * cluster.cores_per_node),
        "all-reduce": all_reduce_seconds(work.gradient_bytes_per_step, cluster),
    }


def binding(seconds: dict[str, float]) -> tuple[str, str]:
    """The resource that takes longest, and the next one."""
    first, second = sorted(seconds, key=seconds.get, reverse=True)[:2]
    return first, second


def clips_per_second(work: Work, cluster: Cluster) -> float:
    """Of the whole cluster."""
    return work.batch_clips / max(step_seconds(work, cluster).values())


def build_clips_per_second(work: Work, cluster: Cluster) -> tuple[float, str]:
    """Views that a cluster's teachers put into a cache, and what binds: gpu, host or storage."""
    rates = {
        "gpu": cluster.gpus
        * (cluster.peak_tflops * cluster.teacher_mfu / work.teacher_tflop_per_clip),
        "host": cluster.nodes * cluster.cores_per_node * cluster.decoded_clips_per_s_per_core,
        "storage": cluster.nodes
        * (1e9 * cluster.storage_gb_per_s_per_node / work.record_bytes_per_clip),
    }
    name = min(rates, key=rates.get)
    return rates[name], name


def build_hours(work: Work, cluster: Cluster, *, clips: int, views: int) -> float:
    """Of a cache of so many views of all clips."""
    return clips * views / build_clips_per_second(work, cluster)[0] / 3600


def cache_tb(work: Work, *, clips: int, views: int) -> float:
    """Terabytes of 10^12 bytes."""
    return 1e-12 * clips * views * work.record_bytes_per_clip


def epoch_hours(work: Work, cluster: Cluster, *, clips: int) -> float:
    """Of training on one view of every clip."""
    return clips / clips_per_second(work, cluster) / 3600


def online_epoch_hours(work: Work, cluster: Cluster, *, clips: int) -> float:
    """The same with the teacher in every step, were decoding free."""
    teacher = work.teacher_tflop_per_clip / (cluster.peak_tflops * cluster.teacher_mfu)
    student = work.step_tflop_per_clip / (cluster.peak_tflops * STUDENT_MFU[work.size])
    return clips * (teacher + student) / cluster.gpus / 3600


def wanted_gb_per_s(work: Work, cluster: Cluster) -> float:
    """What all GPUs together would read if nothing but themselves bound them."""
    clips_per_s = cluster.gpus * cluster.peak_tflops * STUDENT_MFU[work.size]
    return 1e-9 * clips_per_s / work.step_tflop_per_clip * work.record_bytes_per_clip


def model_page(works: dict[str, Work], *, clips: int, views: int) -> list[str]:
    """The model as lines of Markdown."""
    sizes = (8, 32, 256)
    any_work = next(iter(works.values()))
    text = [
        "| student | GPUs | clips a GPU and step | binds | then | clips/s | MFU "
        "| all-reduce, share of the step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, work in works.items():
        for gpus in sizes:
            cluster = Cluster(gpus=gpus)
            seconds = step_seconds(work, cluster)
            first, second = binding(seconds)
            longest = seconds[first]
            rate = clips_per_second(work, cluster)
            mfu = rate * work.step_tflop_per_clip / (gpus * cluster.peak_tflops)
            text.append(
                f"| {name} | {gpus} | {work.batch_clips / gpus:g} | {first} | {second}, "
                f"{seconds[second] / longest:.0%} of it | {rate:,.0f} | {mfu:.0%} | "
                f"{seconds['all-reduce'] / longest:.0%} |"
            )
    text += [
        "",
        f"For a set of {clips:,} clips, {views} views of each at 4 bits: "
        f"**{cache_tb(any_work, clips=clips, views=views):,.0f} TB**, "
        f"{cache_tb(any_work, clips=clips, views=1):.1f} TB a view, once for all three students. "
        "No node's own disks",
        "hold that, and every rank reads clips from everywhere, so that it has to lie in shared "
        "storage; what that must",
        "deliver in all is in the last column.",
        "",
        "| GPUs | building the cache, hours (binds) | student | an epoch, hours | online instead, "
        "hours | 100 epochs and the cache against online | storage must deliver, GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in sizes:
        cluster = Cluster(gpus=gpus)
        for name, work in works.items():
            build = build_hours(work, cluster, clips=clips, views=views)
            bound = build_clips_per_second(work, cluster)[1]
            epoch = epoch_hours(work, cluster, clips=clips)
            online = online_epoch_hours(work, cluster, clips=clips)
            whole = 100 * online / (100 * epoch + build)
            demand = 1e-9 * clips_per_second(work, cluster) * work.record_bytes_per_clip
            text.append(
                f"| {gpus} | {build:,.1f} ({bound}) | {name} | {epoch:.2f} | {online:.2f} | "
                f"{whole:.1f}x | {demand:,.0f} |"
            )
    text += ["", "With storage that keeps its GPUs busy a node would have to read:", ""]
    text += [
        f"- {name}: {wanted_gb_per_s(work, Cluster(gpus=8)):.1f} GB/s"
        for name, work in works.items()
    ]
    return text


def assumptions() -> list[str]:
    """What the model takes for granted, as lines of Markdown."""
    one = Cluster(gpus=8)
    mfu = ", ".join(f"{size} {share:.0%}" for size, share in STUDENT_MFU.items())
    return [
        f"- Nodes of {one.gpus_per_node} GPUs (H100 or H200, {one.peak_tflops:g} TFLOP/s dense in "
        f"bf16) and {one.cores_per_node} cores.",
        f"- MFU of a student's step, {mfu}, and of the teacher, {one.teacher_mfu:.0%}: aims, not "
        "measurements.",
        f"- Shared storage over a link of {one.storage_gb_per_s_per_node:g} GB/s a node, which "
        "delivers that to all nodes at once. A node's own single NVMe would read 7 GB/s.",
        f"- Host to device {one.pcie_gb_per_s_per_gpu:g} GB/s a GPU; hashes "
        f"{one.hash_gb_per_s_per_core:g} GB/s a core; decoding "
        f"{one.decoded_clips_per_s_per_core:g} clips/s a core.",
        f"- A ring all-reduce of float32 gradients, once a step, at {one.network_efficiency:.0%} "
        f"of {one.network_gb_per_s_per_gpu:g} GB/s a GPU between nodes (all of a node's ports at "
        f"once) and of {one.nvlink_gb_per_s_per_gpu:g} within one; on a network of its own, not "
        "the storage's.",
        "- The recipe's batch, whatever the number of GPUs. Everything overlaps: a step takes as "
        "long as its slowest resource.",
        "- Left out: AdamW and averages; launches of kernels (with few clips a GPU they may bind, "
        "not the arithmetic: `run.compile=reduce-overhead` is for that); the lower MFU of few "
        "clips; "
        "evaluation, checkpoints, stragglers.",
    ]
