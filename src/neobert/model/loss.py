"""Cross-entropy of a linear decoder, without keeping its logits.

Shapes: M targets, D width, V vocabulary. With V = 30,000 the logits are the largest tensor of a training step by far, and
autograd keeps several copies of them. `linear_cross_entropy` computes the gradient of the logits where they are and in
blocks that stay in the cache, multiplies it into the gradients of hidden states and weight at once, and forgets it: at most
`LOGIT_BUDGET` logits exist at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import compute_dtype, liger, round_up_tokens

IGNORED = -100  # label of a token that is not predicted
LOGIT_BUDGET = 2**25  # logits that exist at a time: 64 MiB in bfloat16
CACHED = 2**19  # logits of a block on the CPU: 2 MiB in float32


def full_cross_entropy(logits_NV: Tensor, labels_N: Tensor, count: bool = False) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, from logits at every position (-100: no target)."""
    loss_sum = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")
    return loss_sum, (logits_NV.argmax(-1) == labels_N).sum() if count else labels_N.new_zeros(())


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_M: Tensor, backend: str, count: bool = False
) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies in float32, number of targets that were the likeliest token: 0 unless `count`)."""
    if backend == "liger" and not count and len(labels_M):  # it divides by the number of targets
        loss_class = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
        dtype = compute_dtype(hidden_MD)
        bias = None if bias_V is None else bias_V.to(dtype)
        fused_loss = loss_class(reduction="sum", accum_dtype=torch.float32)
        loss_sum = fused_loss(weight_VD.to(dtype), hidden_MD.to(dtype), labels_M, bias).float()
        return loss_sum, labels_M.new_zeros(())
    return FusedLinearCrossEntropy.apply(hidden_MD, weight_VD, bias_V, labels_M, compute_dtype(hidden_MD), count)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward pass; the backward pass multiplies them by one number."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, bias_V, labels_M, dtype: torch.dtype, count: bool):  # type: ignore
        M, V = len(hidden_MD), len(weight_VD)
        num_parts = max(1, -(-M * V // LOGIT_BUDGET))
        size = max(1, round_up_tokens(-(-M // num_parts), hidden_MD.device.type, dtype))
        hidden, weight = _with_rows(hidden_MD.to(dtype), -(-M // size) * size), weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        loss_sum = hidden_MD.new_zeros((), dtype=torch.float32)
        num_correct = labels_M.new_zeros(())
        wants_grad = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden if wants_grad else hidden[:0])
        grad_weight = grad_bias = None
        for start in range(0, M, size):
            part, real = slice(start, start + size), min(size, M - start)
            logits = F.linear(hidden[part], weight, bias)
            labels = labels_M[start : start + real]
            loss_sum += _softmax_loss_(logits[:real], labels, num_correct if count else None, wants_grad)
            if wants_grad:
                logits[real:] = 0
                torch.mm(logits, weight, out=grad_hidden[part])
                grad_weight = _accumulate(grad_weight, logits.t() @ hidden[part])
                grad_bias = None if bias is None else _accumulate(grad_bias, logits.sum(0, dtype=torch.float32))
        if wants_grad:
            grad_weight = torch.zeros_like(weight_VD) if grad_weight is None else grad_weight
            grad_bias = torch.zeros_like(bias_V) if grad_bias is None and bias is not None else grad_bias
            ctx.save_for_backward(grad_hidden[:M], grad_weight, grad_bias)
        ctx.dtypes = hidden_MD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_bias = None if grad_bias is None else grad_bias * grad
        return (
            (grad_hidden * grad).to(hidden_dtype),
            grad_weight.to(weight_dtype).mul_(grad),
            grad_bias,
            None,
            None,
            None,
        )


def _with_rows(x_MD: Tensor, rows: int) -> Tensor:
    """With rows of zeros appended, `rows` in all."""
    return x_MD if len(x_MD) == rows else F.pad(x_MD, (0, 0, 0, rows - len(x_MD)))


def _accumulate(total: Tensor | None, one: Tensor) -> Tensor:
    """Sums over several parts are kept in float32; a single part stays as it is."""
    return one if total is None else total.float().add_(one)


def _softmax_loss_(logits_MV: Tensor, labels_M: Tensor, num_correct: Tensor | None, wants_grad: bool) -> Tensor:
    """Sum of the cross-entropies; with `wants_grad` the logits become their gradient in place."""
    rows = max(1, CACHED // logits_MV.shape[1]) if logits_MV.device.type == "cpu" else len(logits_MV)
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
