"""What stands on the backbone: the attention pool, the projectors to a teacher, the probes."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

POOL_HEADS = 16  # upstream's, for every width


class CrossAttention(nn.Module):
    """Attention whose linears carry their biases as separate parameters (upstream's keys)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, out_width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [B,Q,P] and the weights [B,heads,Q,M] in float32."""
        q = F.linear(q, self.q.weight, self.q_bias.to(self.q.weight.dtype))
        k = F.linear(k, self.k.weight, self.k_bias.to(self.k.weight.dtype))
        v = F.linear(v, self.v.weight, self.v_bias.to(self.v.weight.dtype))
        q, k, v = (rearrange(z, "b m (h d) -> b h m d", h=POOL_HEADS) for z in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = scores.float().softmax(dim=-1)
        out = rearrange(weights.to(v.dtype) @ v, "b h q d -> b q (h d)")
        return self.proj(out), weights


class AttentionPool(nn.Module):
    """The mean token asks all tokens, the class token among them: [B,M,D] -> [B,P]."""

    def __init__(self, width: int, pooled_width: int) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(width, eps=1e-5)
        self.norm1_k = nn.LayerNorm(width, eps=1e-5)
        self.norm1_v = nn.LayerNorm(width, eps=1e-5)
        self.cross_attn = CrossAttention(width, pooled_width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pooled vector [B,P] and its attention over tokens [B,M], head mean."""
        query = self.norm1_q(h.mean(dim=1, keepdim=True))
        pooled, weights = self.cross_attn(query, self.norm1_k(h), self.norm1_v(h))
        return pooled[:, 0], weights.mean(dim=1)[:, 0]


class Decoder(nn.Module):
    """Projector to a teacher's width: `head` gives the raw projection, `norm` finishes it."""

    def __init__(self, width: int, out_width: int, *, kind: str) -> None:
        super().__init__()
        if kind == "mlp":
            self.head = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_width)
            )
        else:
            self.head = nn.Linear(width, out_width)
        self.norm = nn.LayerNorm(out_width, eps=1e-5)

    @property
    def last(self) -> nn.Linear:
        """The linear of `head` that is as wide as the teacher."""
        return self.head if isinstance(self.head, nn.Linear) else self.head[-1]

    def before_last(self, x: Tensor) -> Tensor:
        """What `last` takes, [...,D] -> [...,D]: `last(before_last(x))` is `head(x)`."""
        return x if isinstance(self.head, nn.Linear) else self.head[:-1](x)

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,E], of unit length on the last axis (float32 statistics)."""
        return F.normalize(self.norm(self.head(x)).float(), dim=-1)
