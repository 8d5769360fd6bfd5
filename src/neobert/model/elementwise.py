"""RMSNorm and SwiGLU as single autograd functions, for the CPU.

Composed of torch's operators, each makes a dozen passes over memory and keeps as many copies for the backward pass. Here
each keeps its input and one number a row, and works in place. Same mathematics as the composed form, to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight of N x D, computed in float32, returned in `dtype`."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore
        x = x_ND.float()
        squares_N1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale_N1 = squares_N1.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (x * scale_N1).mul_(weight_D.float()).to(dtype)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # type: ignore
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        grad = grad_ND.float()
        unit_ND = x_ND * scale_N1
        product_ND = unit_ND * grad
        grad_weight_D = product_ND.sum(0)
        weight = weight_D.float()
        mean_N1 = (product_ND @ weight).div_(-x_ND.shape[-1])[:, None]
        grad_x = torch.mul(grad, weight, out=product_ND).addcmul_(unit_ND, mean_N1).mul_(scale_N1)
        return grad_x.to(x_ND.dtype), grad_weight_D.to(weight_D.dtype), None, None


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) * up, of N x 2F that holds gate and up side by side."""

    @staticmethod
    def forward(ctx, gate_up_N2F: Tensor) -> Tensor:  # type: ignore
        ctx.save_for_backward(gate_up_N2F)
        gate, up = gate_up_N2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad_NF: Tensor):  # type: ignore
        (gate_up_N2F,) = ctx.saved_tensors
        gate, up = gate_up_N2F.chunk(2, dim=-1)
        out = torch.empty_like(gate_up_N2F)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad_NF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_NF * up, gate, grad_input=grad_gate)
        return out
