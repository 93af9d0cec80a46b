"""InternVideo2's vision encoder as a frozen teacher: the students' transformer on all tokens."""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.students.vit import Activation, Positions, VideoViT, ViTSize, resolve_size
from distill.students.warmstart import LoadReport, WeightsError, load_weights

TEACHERS = {"internvideo2_1B": "1B", "internvideo2_6B": "6B"}
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TIMED_CALLS = 5  # of each, after one that is not counted

logger = logging.getLogger(__name__)


class TeacherFeatures(NamedTuple):
    """middle [K,B,1+N,E] and pooled [B,P] of unit length; attention [B,N] over patch tokens."""

    middle: Tensor
    pooled: Tensor
    attention: Tensor


def return_layers(depth: int, num_layers: int, interval: float) -> tuple[int, ...]:
    """Block indices whose outputs are distilled, ascending: depth - int(i * interval) - 1.

    The truncation acts on the product, as upstream's does (single_modality/models/
    internvideo2_teacher.py), so the gaps of 40 blocks at 3.34 are not all equal. Raises
    ValueError when the layers leave the model or repeat.
    """
    layers = sorted(depth - int(i * interval) - 1 for i in range(num_layers))
    if not layers or layers[0] < 0 or len(set(layers)) != num_layers:
        raise ValueError(
            f"{num_layers} layers at interval {interval} do not fit into {depth} blocks"
        )
    return tuple(layers)


class Teacher(VideoViT):
    """A frozen backbone without drop path that stays in eval mode whatever it is told."""

    def __init__(
        self,
        size: ViTSize,
        *,
        frames: int,
        image_size: int,
        num_layers: int,
        interval: float,
        activation: Activation = "gelu_tanh",
        tubelet: int = 1,
        positions: Positions = "joint",
    ) -> None:
        super().__init__(
            size,
            frames=frames,
            image_size=image_size,
            activation=activation,
            tubelet=tubelet,
            positions=positions,
        )
        self.return_layers = return_layers(size.depth, num_layers, interval)
        self.load_report: LoadReport | None = None
        self.attention_order: list[SDPBackend] = []  # PyTorch's own choice where there is none
        for block in self.blocks:
            block.attn.is_fused = False  # has no backward to win; `tune` times what there is
        self.init_weights()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher in train mode would give other targets at every call."""
        return super().train(False)

    def hidden(self, clip: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Raw K hidden states [B,1+N,E], pooled [B,P] and attention [B,N] (float32).

        Nothing is normalised yet, so that a caller who wants the visible rows alone gathers
        them first. The tensors are inference tensors: gather, copy or normalise them (outside
        `inference_mode`) before autograd sees them.
        """
        order = self.attention_order
        chosen = sdpa_kernel(order, set_priority=True) if order else nullcontext()
        with torch.inference_mode(), chosen:
            patches, _ = self.select_patches(clip, None)
            h, states = self.encode(patches, collect=self.return_layers)
            pooled, attention = self.clip_projector(h)
        return states, pooled, attention[:, 1:]

    def tune(self, dtype: torch.dtype, *, batch_size: int) -> None:
        """Prepare for many batches under autocast to `dtype`: the same values, sooner.

        Blocks keep their linear weights in `dtype`, which autocast would otherwise make anew
        from frozen weights in every forward. On a GPU, PyTorch's attention backends are timed
        once at the teacher's shape and the fastest is taken; their results differ by rounding.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        if self.cls_token.device.type == "cuda":
            heads = self.size.heads
            shape = (batch_size, heads, 1 + self.num_patches, self.size.width // heads)
            times = time_attention(shape, dtype=dtype, device=self.cls_token.device)
            self.attention_order = [ATTENTION[name] for name in times]
            text = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items())
            logger.info("teacher attention %s: %s", list(shape), text)

    def forward(self, clip: Tensor) -> TeacherFeatures:
        """Features of a clip [B,3,T,H,W]; float32, and free to enter a loss."""
        states, pooled, attention = self.hidden(clip)
        middle = torch.stack([F.normalize(state.float(), dim=-1) for state in states])
        return TeacherFeatures(middle, F.normalize(pooled.float(), dim=-1), attention.clone())


def time_attention(
    shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Median seconds of each of ATTENTION on [B,heads,tokens,width], fastest first.

    Backends that cannot do it there are left out, and "math", which keeps all the scores in
    memory, where any other can.
    """
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype)
    times = {}
    for name, backend in ATTENTION.items():
        if name == "math" and times:
            continue
        try:
            with torch.inference_mode(), sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say why a backend cannot
                times[name] = _median_seconds(lambda: F.scaled_dot_product_attention(q, k, v))
        except RuntimeError:  # no such kernel, or no memory for it
            continue
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _median_seconds(call: Callable[[], Tensor]) -> float:
    call()
    seconds = []
    for _ in range(TIMED_CALLS):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def create_teacher(
    name_or_size: str | ViTSize,
    *,
    checkpoint: str | Path | None = None,
    frames: int = 8,
    image_size: int = 224,
    num_layers: int = 6,
    interval: float = 3.34,
    activation: Activation = "gelu_tanh",
    tubelet: int = 1,
    positions: Positions = "joint",
    random: bool = False,
    checkpoint_frames: int | None = None,
    allow_unused: tuple[str, ...] = (),
) -> Teacher:
    """Build a frozen teacher; `name_or_size` is a row of TEACHERS or of SIZES, or a ViTSize.

    Weights come from `checkpoint` (`load_weights`, whose report stays in `load_report`); every
    one must be there. Raises WeightsError without a checkpoint unless `random` asks for random
    weights, and ValueError for settings that do not fit.
    """
    if isinstance(name_or_size, str) and name_or_size.startswith("internvideo2"):
        if name_or_size not in TEACHERS:
            raise ValueError(
                f"unknown teacher {name_or_size!r}; choose one of {', '.join(TEACHERS)}"
            )
        size = resolve_size(TEACHERS[name_or_size])
    else:
        size = resolve_size(name_or_size)
    if checkpoint is None and not random:
        raise WeightsError(
            f"teacher {name_or_size}: no checkpoint; give its weights, or ask for a random "
            "teacher by name (random: true) if this is a measurement"
        )
    if checkpoint is not None and random:
        raise WeightsError(f"{checkpoint}: a random teacher takes no checkpoint; drop one of them")

    # Drawing a billion weights takes longer than reading them.
    with nullcontext() if random else torch.device("meta"):
        teacher = Teacher(
            size,
            frames=frames,
            image_size=image_size,
            num_layers=num_layers,
            interval=interval,
            activation=activation,
            tubelet=tubelet,
            positions=positions,
        )
    if checkpoint is not None:
        teacher.to_empty(device="cpu")
        teacher.load_report = load_weights(
            teacher, checkpoint, frames=checkpoint_frames, allow_unused=allow_unused
        )
    return teacher
