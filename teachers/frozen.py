"""What every teacher is: a frozen model that turns a clip into features to align with."""

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.students.warmstart import LoadReport

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TIMED_CALLS = 5  # of each, after one that is not counted

logger = logging.getLogger(__name__)


class TeacherFeatures(NamedTuple):
    """middle [K,B,1+N,E] and pooled [B,P] of unit length; attention [B,N] over patch tokens.

    A teacher without a class token has middle [K,B,N,E]; one without an attention pool has
    neither pooled nor attention, unless it pools in another way.
    """

    middle: Tensor
    pooled: Tensor | None
    attention: Tensor | None


def fit_clip(clip: Tensor, *, frames: int, image_size: int) -> Tensor:
    """A clip [B,3,T,H,W] with a teacher's frames and image size, in the same dtype.

    Of more frames every second, third, ... is taken, beginning with the first, so that time step
    t of an 8-frame teacher shows what begins time step t of a 16-frame one with tubelets of two.
    uint8 pixels are resized (bicubic, antialiased; InternVideo2's engine_for_pretraining.py
    resizes bicubically too) and rounded; floating point ones were normalised by someone who knew
    the size, and pass. Raises ValueError for frames that do not divide.
    """
    if clip.shape[2] % frames:
        raise ValueError(
            f"a clip of {clip.shape[2]} frames is no multiple of the teacher's {frames}"
        )
    clip = clip[:, :, :: clip.shape[2] // frames]  # [B,3,frames,H,W]
    size = (image_size, image_size)
    if clip.dtype != torch.uint8 or tuple(clip.shape[3:]) == size:
        return clip
    pixels = rearrange(clip, "b c t h w -> (b t) c h w").float()
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "(b t) c h w -> b c t h w", b=clip.shape[0])


class Teacher(nn.Module):
    """A frozen model, in eval mode whatever it is told, whose children say how they see a clip.

    `frames` and `image_size` are what it takes, `mean` and `std` what it normalises uint8 pixels
    with, `tubelet` the frames in a token and `grid` the tokens (t,h,w) of a clip. Its hidden
    states are `embed_dim` wide, those after the blocks `return_layers` of its `depth`, and begin
    with a class token's row if it `has_cls`. Its pooled vector is `pooled_width` wide (None
    without one), and it may pay patches an `attention` that says where to look.
    """

    frames: int
    image_size: int
    tubelet: int
    grid: tuple[int, int, int]
    depth: int
    return_layers: tuple[int, ...]
    embed_dim: int
    pooled_width: int | None
    has_cls: bool
    has_attention: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    load_report: LoadReport | None = None
    attention_order: tuple[SDPBackend, ...] = ()  # PyTorch's own choice where there is none

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    def freeze(self) -> None:
        """To be called when all parameters are there: none trains."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher in train mode would give other targets at every call."""
        return super().train(False)

    def hidden(self, clip: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Raw K hidden states [B,1+N,E], pooled [B,P] and attention [B,N] (float32).

        The clip [B,3,T,H,W] is uint8 of any size, whose frames are a multiple of the teacher's
        (`fit_clip`), or normalised floating point of the teacher's size. Nothing is normalised
        to unit length yet, so that a caller who wants the visible rows alone gathers them first.
        The tensors are inference tensors: gather, copy or normalise them (outside
        `inference_mode`) before autograd sees them.
        """
        order = list(self.attention_order)
        chosen = sdpa_kernel(order, set_priority=True) if order else nullcontext()
        with torch.inference_mode(), chosen:
            return self.see(fit_clip(clip, frames=self.frames, image_size=self.image_size))

    def see(self, clip: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """What `hidden` returns, of a clip [B,3,frames,image_size,image_size]."""
        raise NotImplementedError

    def forward(self, clip: Tensor) -> TeacherFeatures:
        """Features of a clip as `hidden` takes it; float32, and free to enter a loss."""
        states, pooled, attention = self.hidden(clip)
        middle = torch.stack([F.normalize(state.float(), dim=-1) for state in states])
        return TeacherFeatures(
            middle,
            None if pooled is None else F.normalize(pooled.float(), dim=-1),
            None if attention is None else attention.clone(),
        )

    def attention_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        """[B,heads,tokens,width] of the attention in a block."""
        raise NotImplementedError

    def tune(self, dtype: torch.dtype, *, batch_size: int) -> None:
        """Prepare for many batches under autocast to `dtype`: the same values, sooner.

        Blocks keep their linear weights in `dtype`, which autocast would otherwise make anew
        from frozen weights in every forward. On a GPU, PyTorch's attention backends are timed
        once at the teacher's shape and the fastest is taken; their results differ by rounding.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        device = next(self.parameters()).device
        if device.type == "cuda":
            shape = self.attention_shape(batch_size)
            times = time_attention(shape, dtype=dtype, device=device)
            self.attention_order = tuple(ATTENTION[name] for name in times)
            text = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items())
            logger.info("teacher attention %s: %s", list(shape), text)


def time_attention(
    shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Median seconds of each of ATTENTION on [B,heads,tokens,width], fastest first.

    Queries, keys and values lie as in a block: heads within tokens, values within packed rows.

    Backends that cannot do it there are left out, and "math", which keeps all the scores in
    memory, where any other can.
    """
    batch, heads, tokens, width = shape
    packed = torch.randn(batch, tokens, 3, heads, width, device=device, dtype=dtype)
    q, k, v = packed.unbind(2)
    q, k, v = (rearrange(z, "b m h d -> b h m d") for z in (q.clone(), k.clone(), v))
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
