"""RMSNorm, SwiGLU and the cross-entropy as autograd functions, and what layers ask before they choose a kernel.

Shapes: N tokens, D width, F feed-forward width, M targets, V vocabulary.
On the CPU torch's operators make a dozen passes over memory for a norm or SwiGLU, and keep as many copies for the backward
pass. These keep their input and little more, and work on blocks of rows that stay in the cache. While torch.compile traces,
layers use the composed form. All forms compute the same mathematics, to rounding.
"""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a token that is not predicted
LOGIT_BUDGET = 2**25  # logits that exist at a time: 64 MiB in bfloat16
CACHED = 2**18  # elements of a block of rows: 1 MiB in float32
CACHED_LOGITS = 2**19  # logits of a block on the CPU: 2 MiB in float32


# Optional packages are imported by name: transformers, which runs these files out of an exported folder, takes every
# import statement in them for a requirement.
@cache
def liger(module: str, name: str) -> Any:
    """A class or function of liger-kernel."""
    return getattr(import_module(f"liger_kernel.transformers.{module}"), name)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` would be computed in: autocast's type where it is on."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x.device.type) else x.dtype


def round_up(rows: int) -> int:
    """The next of 16 sizes per power of two: few sizes, at most 1/16 more."""
    granularity = max(1, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // granularity) * granularity


def round_up_tokens(rows: int, device_type: str, dtype: torch.dtype) -> int:
    """How many rows a product of `rows` rows had better have: one of few sizes (`round_up`), except on the CPU in float32.

    On the CPU, oneDNN compiles every product in bfloat16 for its shape, which takes longer than a small product itself (1 to
    16 ms), and keeps what it compiled: with another number of tokens in every batch that was half of the time and gigabytes
    of memory. On a GPU, buffers of sizes that come again are found in the allocator's cache, and kernels are chosen once.
    """
    return rows if device_type == "cpu" and dtype != torch.bfloat16 else round_up(rows)


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


def full_cross_entropy(logits_NV: Tensor, labels_N: Tensor, count: bool = False) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, from logits at every position (-100: no target)."""
    loss_sum = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")
    return loss_sum, (logits_NV.argmax(-1) == labels_N).sum() if count else labels_N.new_zeros(())


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_M: Tensor, count: bool = False
) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies in float32, number of targets that were the likeliest token: 0 unless `count`)."""
    return FusedLinearCrossEntropy.apply(hidden_MD, weight_VD, bias_V, labels_M, compute_dtype(hidden_MD), count)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """With V = 30,000 the logits are the largest tensor of a step by far, and autograd keeps several copies of them. Here the
    forward pass computes their gradient where they are, multiplies it into those of hidden states and weight at once, and
    forgets it: at most `LOGIT_BUDGET` logits exist at a time. The backward pass multiplies the gradients by one number.
    """

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, bias_V, labels_M, dtype: torch.dtype, count: bool):  # type: ignore
        M, V = len(hidden_MD), len(weight_VD)
        num_parts = max(1, -(-M * V // LOGIT_BUDGET))
        size = max(1, round_up_tokens(-(-M // num_parts), hidden_MD.device.type, dtype))
        hidden, weight = hidden_MD.to(dtype), weight_VD.to(dtype)
        if missing := -M % size:  # every part has `size` rows
            hidden = F.pad(hidden, (0, 0, 0, missing))
        bias = None if bias_V is None else bias_V.to(dtype)
        loss_sum, num_correct = hidden_MD.new_zeros((), dtype=torch.float32), labels_M.new_zeros(())
        wants_grad = any(ctx.needs_input_grad[:3])
        grad_hidden, grad_weight = torch.empty_like(hidden if wants_grad else hidden[:0]), None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, M, size):
            part, real = slice(start, start + size), min(size, M - start)
            logits = F.linear(hidden[part], weight, bias)
            labels = labels_M[start : start + real]
            loss_sum += _softmax_loss_(logits[:real], labels, num_correct if count else None, wants_grad)
            if wants_grad:
                logits[real:] = 0
                torch.mm(logits, weight, out=grad_hidden[part])
                product = logits.t() @ hidden[part]  # several are added in float32, a single one stays as it is
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=torch.float32)
        if wants_grad:
            grad_weight = torch.zeros_like(weight_VD) if grad_weight is None else grad_weight
            ctx.save_for_backward(grad_hidden[:M], grad_weight, grad_bias)
        ctx.dtypes = hidden_MD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_bias = None if grad_bias is None else grad_bias * grad
        grad_hidden, grad_weight = (grad_hidden * grad).to(hidden_dtype), grad_weight.to(weight_dtype).mul_(grad)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _softmax_loss_(logits_MV: Tensor, labels_M: Tensor, num_correct: Tensor | None, wants_grad: bool) -> Tensor:
    """Sum of the cross-entropies; with `wants_grad` the logits become their gradient in place."""
    rows = max(1, CACHED_LOGITS // logits_MV.shape[1]) if logits_MV.device.type == "cpu" else len(logits_MV)
    loss_sum = torch.zeros((), device=logits_MV.device)
    for logits, labels in zip(logits_MV.split(rows), labels_M[:, None].split(rows), strict=True):
        log_weights = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        of_labels = log_weights.gather(1, labels)
        loss_sum -= of_labels.sum()
        if num_correct is not None:
            num_correct += (log_weights.argmax(-1, keepdim=True) == labels).sum()
        if wants_grad:
            log_weights.exp_().scatter_add_(1, labels, torch.full_like(of_labels, -1.0))
            logits.copy_(log_weights)
    return loss_sum
