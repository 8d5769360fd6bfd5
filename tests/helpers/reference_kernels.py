"""Attention kernels of CUDA as plain products, registered for the CPU under torch's own operators.

With them the code that runs on CUDA runs here, from `attend_varlen` to the gradients; only the kernels are others.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import varlen

EFFICIENT = Library("aten", "IMPL")


def spans(cu_seqlens: Tensor) -> list[slice]:
    """The documents that have tokens."""
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]


def forward(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out_NHK = torch.empty_like(q_NHK)
    logsumexp_HN = torch.zeros(q_NHK.shape[1], len(q_NHK))
    for span in spans(cu_seqlens):
        q, k, v = (x[span].transpose(0, 1).float() for x in (q_NHK, k_NHK, v_NHK))
        scores = q @ k.mT * scale
        out_NHK[span] = (scores.softmax(-1) @ v).transpose(0, 1).to(out_NHK.dtype)
        logsumexp_HN[:, span] = scores.logsumexp(-1)
    return out_NHK, logsumexp_HN


def backward(
    grad_NHK: Tensor, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q_NHK), torch.empty_like(k_NHK), torch.empty_like(v_NHK)
    for span in spans(cu_seqlens):
        q, k, v, grad = (x[span].transpose(0, 1).float() for x in (q_NHK, k_NHK, v_NHK, grad_NHK))
        weights = (q @ k.mT * scale).softmax(-1)
        grad_weights = grad @ v.mT
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        for whole, one in zip(grads, (grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad), strict=True):
            whole[span] = one.transpose(0, 1).to(whole.dtype)
    return grads


@cache
def register() -> None:
    """Give torch's operators for variable lengths a kernel for the CPU, which has none."""

    @varlen._varlen_attn.register_kernel("cpu")
    def _(q, k, v, cu_seqlens, cu_k, max_q, max_k, is_causal=False, scale=None, *_):  # type: ignore
        return *forward(q, k, v, cu_seqlens, scale), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(grad, q, k, v, out, logsumexp, cu_seqlens, cu_k, max_q, max_k, is_causal, rng, scale=None, *_):  # type: ignore
        return backward(grad, q, k, v, cu_seqlens, scale)

    def efficient(q, k, v, bias, cu_seqlens, cu_k, max_q, max_k, dropout, mask, *_, scale=None, **__):  # type: ignore
        assert bias is None
        assert not dropout, "the reference has none"
        out, logsumexp = forward(q[0], k[0], v[0], cu_seqlens, scale)
        nothing = torch.zeros((), dtype=torch.int64)
        return out[None], logsumexp, nothing, nothing.clone(), max_q, max_k

    def efficient_backward(grad, q, k, v, bias, out, cu_seqlens, cu_k, *_, scale=None, **__):  # type: ignore
        grads = backward(grad[0], q[0], k[0], v[0], cu_seqlens, scale)
        return (*(one[None] for one in grads), torch.empty(0))

    EFFICIENT.impl("_efficient_attention_forward", efficient, "CPU")
    EFFICIENT.impl("_efficient_attention_backward", efficient_backward, "CPU")
