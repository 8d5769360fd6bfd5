"""The parts of an encoder block: norms, rotary positions, attention, feed-forward.

Shapes: N tokens of the batch, D width, H heads, K = D / H head width, F feed-forward width. No biases anywhere.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Layout, Rotary, attend
from .elementwise import FusedRMSNorm, FusedSwiGLU


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        if x_ND.device.type == "cpu":
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_ND.dtype
            return FusedRMSNorm.apply(x_ND, self.weight, self.eps, dtype)
        return F.rms_norm(x_ND.float(), self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm without bias, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return super().forward(x_ND.float())


def rotary_table(positions_N: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each N x K/2, float32 (RoPE, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_width, 2, device=positions_N.device, dtype=torch.float32) / head_width
    angles = positions_N.float()[:, None] * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Self-attention within documents. `qkv` holds the three projections one below the other.

    `capture`, where it is set, gets (this module, qkv N x 3 x H x K before rotation, rotary, layout) of every forward pass.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.capture: Callable[[nn.Module, Tensor, Rotary | None, Layout], None] | None = None
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # (3D, D): rows of q, then k, then v
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_ND: Tensor, rotary: tuple[Tensor, Tensor] | None, layout: Layout) -> Tensor:
        qkv = self.qkv(x_ND).view(x_ND.shape[0], 3, self.num_heads, -1)
        if self.capture is not None:
            _show(self, qkv, rotary, layout)
        return self.out(attend(qkv, rotary, layout).flatten(1))


@torch.compiler.disable
def _show(block: Attention, qkv: Tensor, rotary: Rotary | None, layout: Layout) -> None:
    """Hand over to `capture`, outside of any compiled graph."""
    assert block.capture is not None
    block.capture(block, qkv, rotary, layout)


def swiglu_width(intermediate_size: int) -> int:
    """Two thirds of the nominal width, rounded up to a multiple of 8: 3072 -> 2048."""
    return -(-(2 * intermediate_size // 3) // 8) * 8


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202). `gate_up` holds both projections one below the other."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        inner = swiglu_width(intermediate_size)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)  # (2F, D): rows of gate, then up
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_up = self.gate_up(x_ND)
        if gate_up.device.type == "cpu":
            return self.down(FusedSwiGLU.apply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Linear(width, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_ND)))
