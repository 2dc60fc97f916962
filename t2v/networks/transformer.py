"""Attention and feed-forward of the denoiser's transformers."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.networks import fused

# Maximum number of sequences in one attention call. CUDA's kernels take 65,535; in attention along the frames every
# pixel of every row is a sequence.
MAX_SEQUENCES = 2**15

# Maximum number of values between the two layers of a feed-forward that a CPU computes together. malloc maps new memory
# for every tensor of 32 MB or more, and smaller tensors are still in a cache when they are read.
MAX_HIDDEN_VALUES_CPU = 2**22


class TransformerBlock(nn.Module):
    """The parameters of one pre-norm transformer block. The denoiser's transformers define the computation."""

    def __init__(self, c: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, heads, c)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, heads, context_dim)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, c: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context_dim, c, bias=False)
        self.to_v = nn.Linear(context_dim, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def to_itself(self, x: Tensor) -> Tensor:
        """Self-attention within each sequence: (n, l, c) -> same."""
        q, k, v = (project(x) for project in (self.to_q, self.to_k, self.to_v))
        y = fused.short_attention(q, k, v, self.heads)
        return self.to_out[0](self.attend(*map(self.split, (q, k, v))) if y is None else y)

    def to_text(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross-attention of each pixel of each frame: x (b, F, h, w, c), or (1, ...) for all b rows of k and v."""
        q = self.to_q(x.flatten(1, 3)).expand(k.shape[0], -1, -1)
        return self.to_out[0](self.attend(self.split(q), k, v)).view(-1, *x.shape[1:])

    def split(self, y: Tensor) -> Tensor:
        """(n, l, c) -> (n, heads, l, head_dim)."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(n, heads, l, d), (n, heads, s, d), (n, heads, s, d) -> (n, l, heads * d)."""
        parts = zip(q.split(MAX_SEQUENCES), k.split(MAX_SEQUENCES), v.split(MAX_SEQUENCES))
        heads = [F.scaled_dot_product_attention(*part) for part in parts]
        return (heads[0] if len(heads) == 1 else torch.cat(heads)).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """GEGLU, four times as wide between its two layers (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(c, 8 * c)}), "2": nn.Linear(4 * c, c)})

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> same."""
        proj, out = self.net["0"]["proj"], cast(nn.Linear, self.net["2"])
        # Two products, because contiguous tensors are read faster than the halves of one product.
        (value_weight, gate_weight), (value_bias, gate_bias) = proj.weight.chunk(2), proj.bias.chunk(2)
        out_weight = out.weight

        if fused.runs("GEGLU", x):
            return out(fused.geglu(*proj(x).chunk(2, dim=-1)))  # the kernel reads halves equally fast

        def compute(tokens: Tensor) -> Tensor:
            gate = F.gelu(F.linear(tokens, gate_weight, gate_bias))
            return F.linear(F.linear(tokens, value_weight, value_bias) * gate, out_weight, out.bias)

        if x.device.type != "cpu":
            return compute(x)
        parts = [compute(tokens) for tokens in x.flatten(0, -2).split(max(1, MAX_HIDDEN_VALUES_CPU // out.in_features))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
