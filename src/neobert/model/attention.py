"""Attention within documents, behind one function: `attend(q, k, v, layout)`.

Shapes: B rows, T row length, N tokens of the whole batch (B*T, or fewer without padding), H heads, K head width.
Hidden states travel as N x D; only this file knows where a document begins. A `Layout` says so, in one of two ways:

- ragged: `lengths` of the documents, one behind the other. Packed rows are this, and so are padded batches on the CPU,
  whose padding is left out before the first layer and put back behind the last.
- padded: rows of one length with a mask of the real tokens, for CUDA's SDPA, which wants static shapes.

On the CPU the ragged path takes one SDPA call per document over `torch.split` pieces. Slicing instead would make autograd
allocate a full-size zero gradient per document (5x slower), a block mask computes what it then throws away (30x).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where documents lie in a flat batch. Exactly one of `lengths` and `mask_BT` is set."""

    lengths: tuple[int, ...] | None = None  # tokens of each document; their sum is N
    mask_BT: Tensor | None = None  # true where a token is real
    dropout: float = 0.0  # of attention weights; 0 outside training


def attend(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout) -> Tensor:
    """Softmax attention of every token to its own document. Returns N x H x K."""
    if layout.lengths is None:
        return _attend_padded(q_NHK, k_NHK, v_NHK, layout)
    return _attend_ragged(q_NHK, k_NHK, v_NHK, layout)


def _attend_padded(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout) -> Tensor:
    assert layout.mask_BT is not None
    B, T = layout.mask_BT.shape
    q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NHK, v_NHK))
    mask = layout.mask_BT[:, None, None, :]
    out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=layout.dropout)
    return out_BHTK.transpose(1, 2).reshape(q_NHK.shape)


def _attend_ragged(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout) -> Tensor:
    lengths = list(layout.lengths or ())
    pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_NHK, k_NHK, v_NHK)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=layout.dropout)[0].transpose(0, 1)
        for q, k, v in pieces
    ]
    return torch.cat(outs)
