"""RMSNorm and SwiGLU by the fastest kernel of the device, chosen by `backend`: "torch", or "liger" (CUDA).

On the CPU each is a single autograd function: composed of torch's operators, each makes a dozen passes over memory and keeps
as many copies for the backward pass. Ours keep their input and little more, and work on blocks of rows that stay in the
cache. While torch.compile traces, the composed form is used, which the compiler fuses by itself. All forms compute the
same mathematics, to rounding.
"""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED = 2**18  # elements of a block of rows: 1 MiB in float32


# Optional packages are imported by name: transformers, which runs these files out of an exported folder, takes every
# import statement in them for a requirement.
@cache
def liger(module: str, name: str) -> Any:
    """A class or function of liger-kernel."""
    return getattr(import_module(f"liger_kernel.transformers.{module}"), name)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` would be computed in: autocast's type where it is on."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else x.dtype


def round_up_tokens(rows: int, device_type: str, dtype: torch.dtype) -> int:
    """How many rows a product of `rows` rows had better have: on the CPU in bfloat16 one of 16 sizes per power of two.

    oneDNN compiles every product for its shape, which takes longer than a small product itself (1 to 16 ms), and keeps what
    it compiled: with another number of tokens in every batch that was half of the time and gigabytes of memory.
    """
    if device_type != "cpu" or dtype != torch.bfloat16:
        return rows
    granularity = max(1, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // granularity) * granularity


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, backend: str) -> Tensor:
    """x / rms(x) * weight (arXiv 1910.07467), computed in float32 and returned in the dtype of the products that follow."""
    if backend == "liger":
        return liger("functional", "liger_rms_norm")(x_ND, weight_D, eps, in_place=False)
    if x_ND.device.type == "cpu" and not torch.compiler.is_compiling():
        return FusedRMSNorm.apply(x_ND, weight_D, eps, compute_dtype(x_ND))
    return F.rms_norm(x_ND.float(), weight_D.shape, weight_D.float(), eps).to(compute_dtype(x_ND))


def swiglu(gate_up_N2F: Tensor, backend: str) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), of N x 2F that holds gate and up side by side."""
    if gate_up_N2F.device.type == "cpu" and not torch.compiler.is_compiling():
        return FusedSwiGLU.apply(gate_up_N2F)
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    if backend == "liger":
        return liger("functional", "liger_swiglu")(gate, up)
    return F.silu(gate) * up


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same runs of rows of several tensors, `CACHED` elements of the first at a time."""
    rows = max(1, CACHED // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm of N x D, computed in float32, returned in `dtype`."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore
        out_ND = torch.empty_like(x_ND, dtype=dtype)
        scale_N1 = x_ND.new_empty(*x_ND.shape[:-1], 1, dtype=torch.float32)
        weight = weight_D.float()
        for x, out, scale in _blocks(x_ND, out_ND, scale_N1):
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x * scale, weight, out=out)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return out_ND

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # type: ignore
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight, weight = torch.zeros_like(weight_D, dtype=torch.float32), weight_D.float()
        for x, grad, scale, out in _blocks(x_ND, grad_ND, scale_N1, grad_x_ND):
            grad, unit = grad.float(), x * scale
            product = unit * grad
            grad_weight += product.sum(0)
            mean = (product @ weight).div_(-x.shape[-1])[:, None]
            torch.mul(grad, weight, out=product).addcmul_(unit, mean)
            torch.mul(product, scale, out=out)
        return grad_x_ND, grad_weight.to(weight_D.dtype), None, None


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) * up, of N x 2F that holds gate and up side by side."""

    @staticmethod
    def forward(ctx, gate_up_N2F: Tensor) -> Tensor:  # type: ignore
        out_NF = gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)
        activated_NF = torch.empty_like(out_NF)
        for gate_up, activated, out in _blocks(gate_up_N2F, activated_NF, out_NF):
            gate, up = gate_up.chunk(2, dim=-1)
            torch.mul(torch.ops.aten.silu.out(gate, out=activated), up, out=out)
        ctx.save_for_backward(gate_up_N2F, activated_NF)
        return out_NF

    @staticmethod
    def backward(ctx, grad_NF: Tensor):  # type: ignore
        gate_up_N2F, activated_NF = ctx.saved_tensors
        out_N2F = torch.empty_like(gate_up_N2F)
        for gate_up, activated, grad, out in _blocks(gate_up_N2F, activated_NF, grad_NF, out_N2F):
            gate, up = gate_up.chunk(2, dim=-1)
            grad_gate, grad_up = out.chunk(2, dim=-1)
            torch.mul(activated, grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out_N2F
