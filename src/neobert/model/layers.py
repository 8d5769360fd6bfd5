"""The parts of an encoder block: norms, attention, feed-forward, and nGPT's scales.

Shapes: N tokens of the batch, D width, H heads, K = D / H head width, F feed-forward width. No biases anywhere.
nGPT (arXiv 2410.01131) has no norms: hidden states and the rows or columns of every matrix along D have length 1, and learned
scales do what norms and magnitudes did. `kernel_backend` is "torch", or "liger" (on CUDA).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .attention import Layout, Rotary, Tables, attend, rotate
from .kernels import FusedRMSNorm, FusedSwiGLU, compute_dtype, liger


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (arXiv 1910.07467), computed in float32 and returned in the dtype of the products that follow."""

    kernel_backend = "torch"

    def forward(self, x_ND: Tensor) -> Tensor:
        if self.kernel_backend == "liger":
            return liger("functional", "liger_rms_norm")(x_ND, self.weight, self.eps, in_place=False)
        dtype = compute_dtype(x_ND)
        if x_ND.device.type == "cpu" and not torch.compiler.is_compiling():
            return FusedRMSNorm.apply(x_ND, self.weight, self.eps, dtype)
        return F.rms_norm(x_ND.float(), self.normalized_shape, self.weight.float(), self.eps).to(dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm without bias, computed in float32 and returned in the dtype of the products that follow."""

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = F.layer_norm(x_ND.float(), self.normalized_shape, self.weight.float(), None, self.eps)
        return normed.to(compute_dtype(x_ND))


def build_norm(config: PreTrainedConfig) -> nn.Module:
    """The norm of the variant; nGPT has none."""
    if config.ngpt:
        return nn.Identity()
    width, eps = config.hidden_size, config.norm_eps
    return RMSNorm(width, eps) if config.rms_norm else LayerNorm(width, eps, bias=False)


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, computed in float32."""
    return F.normalize(x.float(), dim=-1)


class LearnedScale(nn.Module):
    """A learned vector that is `initial` at the start and stored as `stored` (nGPT, section 2.5). An optimizer that moves
    every parameter by about the learning rate moves the value by `initial / stored` times that.
    """

    def __init__(self, width: int, initial: float, stored: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), stored))
        self.initial, self.stored = initial, stored

    def forward(self) -> Tensor:
        return self.weight * (self.initial / self.stored)


class Attention(nn.Module):
    """Self-attention within documents. `qkv` holds the three projections one below the other.

    With `base_scale` (nGPT) queries and keys are unit vectors times a learned scale, and the softmax is scaled by sqrt(K).
    """

    def __init__(self, width: int, num_heads: int, base_scale: float | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # (3D, D): rows of q, then k, then v
        self.out = nn.Linear(width, width, bias=False)
        self.qk_scale = None if base_scale is None else LearnedScale(width, 1.0, base_scale)

    def project(self, x_ND: Tensor, tables_N1K: Tables | None = None) -> Tensor:
        """N x D -> N x 3 x H x K; q and k are rotated by `tables_N1K` where they are given."""
        qkv_N3HK = self.qkv(x_ND).unflatten(-1, (3, self.num_heads, -1))
        if tables_N1K is None and self.qk_scale is None:
            return qkv_N3HK
        q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
        if tables_N1K is not None:
            q_NHK, k_NHK = rotate(q_NHK, *tables_N1K), rotate(k_NHK, *tables_N1K)
        if self.qk_scale is not None:
            scale_HK = self.qk_scale().view(self.num_heads, -1)
            q_NHK, k_NHK = unit(q_NHK) * scale_HK, unit(k_NHK) * scale_HK
        return torch.stack([x.to(v_NHK.dtype) for x in (q_NHK, k_NHK, v_NHK)], 1)

    def forward(self, qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout) -> Tensor:
        """What `project` gave -> N x D, before the output projection. `rotary` is for what has not been rotated."""
        K = qkv_N3HK.shape[-1]
        return attend(qkv_N3HK, rotary, layout, K**-0.5 if self.qk_scale is None else K**0.5).flatten(1)

    def rotates_early(self, layout: Layout) -> bool:
        """Whether `project` rotates: where vectors are normalised afterwards, and where what it does is compiled or
        launched as a few large kernels. Else rotation is part of attention itself.
        """
        return self.qk_scale is not None or layout.cu_seqlens is not None


def swiglu_width(intermediate_size: int) -> int:
    """Two thirds of the nominal width, rounded up to a multiple of 8: 3072 -> 2048."""
    return -(-(2 * intermediate_size // 3) // 8) * 8


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202). `gate_up` holds both projections one below the other."""

    kernel_backend = "torch"

    def __init__(self, width: int, intermediate_size: int, ngpt: bool = False):
        super().__init__()
        inner = swiglu_width(intermediate_size)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)  # (2F, D): rows of gate, then up
        self.down = nn.Linear(inner, width, bias=False)
        self.gate_scale = LearnedScale(inner, width**0.5, 1.0) if ngpt else None
        self.up_scale = LearnedScale(inner, 1.0, 1.0) if ngpt else None

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_up = self.gate_up(x_ND)
        if self.gate_scale is not None and self.up_scale is not None:
            gate_up = gate_up * torch.cat((self.gate_scale(), self.up_scale())).to(gate_up.dtype)
        if gate_up.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.down(FusedSwiGLU.apply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        if self.kernel_backend == "liger":
            return self.down(liger("functional", "liger_swiglu")(gate, up))
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """down(gelu(up(x))), with the full nominal width."""

    def __init__(self, width: int, intermediate_size: int, ngpt: bool = False):
        super().__init__()
        self.up = nn.Linear(width, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, width, bias=False)
        self.up_scale = LearnedScale(intermediate_size, width**0.5, 1.0) if ngpt else None

    def forward(self, x_ND: Tensor) -> Tensor:
        up = self.up(x_ND)
        if self.up_scale is not None:
            up = up * self.up_scale().to(up.dtype)
        return self.down(F.gelu(up))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). Everything but attention itself is in `project` and `finish`:
    what torch.compile compiles, free of document lengths.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.attention_norm, self.ffn_norm = build_norm(config), build_norm(config)
        base_scale = config.base_scale if config.ngpt else None
        self.attention = Attention(config.hidden_size, config.num_attention_heads, base_scale)
        feed_forward = SwiGLU if config.hidden_act == "swiglu" else GELU
        self.ffn = feed_forward(config.hidden_size, config.intermediate_size, config.ngpt)
        self.dropout = nn.Dropout(config.dropout_prob)

    def project(self, x_ND: Tensor, tables_N1K: Tables | None = None) -> Tensor:
        return self.attention.project(self.attention_norm(x_ND), tables_N1K)

    def finish(self, x_ND: Tensor, attended_ND: Tensor) -> Tensor:
        x_ND = x_ND + self.dropout(self.attention.out(attended_ND))
        return x_ND + self.dropout(self.ffn(self.ffn_norm(x_ND)))

    def forward(self, x_ND: Tensor, rotary: Rotary | None, layout: Layout, rows_M: Tensor | None = None) -> Tensor:
        """N x D, or M x D of the tokens `rows_M` alone, which see all others as ever."""
        tables_N1K = None
        if rotary is not None and self.attention.rotates_early(layout):
            tables_N1K, rotary = rotary.tables_of(compute_dtype(x_ND)), None
        attended_ND = self.attention(self.project(x_ND, tables_N1K), rotary, layout)
        if rows_M is not None:
            x_ND, attended_ND = x_ND.index_select(0, rows_M), attended_ND.index_select(0, rows_M)
        return self.finish(x_ND, attended_ND)


class NormalizedBlock(Block):
    """nGPT's block: h <- unit(h + alpha * (unit(part(h)) - h)) for attention, then for the feed-forward part."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.attention_alpha = LearnedScale(config.hidden_size, 0.05, config.base_scale)
        self.ffn_alpha = LearnedScale(config.hidden_size, 0.05, config.base_scale)

    def finish(self, x_ND: Tensor, attended_ND: Tensor) -> Tensor:
        x_ND = self._step(x_ND, self.attention.out(attended_ND), self.attention_alpha)
        return self._step(x_ND, self.ffn(x_ND), self.ffn_alpha)

    def _step(self, x_ND: Tensor, part_ND: Tensor, alpha: LearnedScale) -> Tensor:
        return unit(x_ND + alpha().abs() * (unit(self.dropout(part_ND)) - x_ND)).to(x_ND.dtype)
