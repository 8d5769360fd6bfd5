"""QK-clip: keep the attention logits of every head below a threshold by shrinking its rows of W_q and W_k.

Shapes: N tokens, H query heads, G key heads (G divides H; head h reads key head h // (H / G)), K head width, L layers.

After a step, where S is the largest logit q.k / sqrt(K) of a head in the whole global batch and S exceeds the threshold tau,
the rows of q are multiplied by (tau/S)^alpha and those of k by (tau/S)^(1 - alpha), which brings that logit to tau
(Kimi K2, arXiv 2507.20534). Rotary positions turn q and k but keep their lengths, so this holds with them too. Where several
query heads share a key head, k shrinks by the smallest of their factors and each q by what then remains, so that every head
gets exactly its own factor.

Maxima are of float32 products, over pairs of tokens of one document only, and are reduced over all ranks here: replicas that
clipped by their own maxima would drift apart.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from neobert.optim.ownership import local

GRANULARITY = 32  # documents whose lengths round up to the same multiple of this go through one product


@dataclass(frozen=True)
class QKClipSettings:
    """When and how to clip. `interval` and `warmup_steps` count updates. Raises ValueError for what cannot be."""

    threshold: float = 50.0
    alpha: float = 0.5
    warmup_steps: int = 0
    interval: int = 10
    chunk_size: int = 1024
    last_microbatch_only: bool = True

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"clipping_threshold must be above 0, got {self.threshold}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"clipping_alpha must be between 0 and 1, got {self.alpha}")
        if self.interval < 1 or self.chunk_size < 1 or self.warmup_steps < 0:
            raise ValueError("clipping_interval and clipping_qk_chunk_size must be at least 1, clipping_warmup_steps 0")

    def is_due(self, update: int) -> bool:
        """Whether to clip after this update (the first is 1)."""
        return update > self.warmup_steps and update % self.interval == 0


def group_documents(lengths: Sequence[int], chunk_size: int, device: torch.device) -> list[Tensor]:
    """Numbers of the tokens of documents that lie one after the other, n x T for n documents of about the same length.

    Shorter documents repeat their last token, which adds no other logit. A group has about `chunk_size` tokens at most.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        if length:
            by_length.setdefault(-(-length // GRANULARITY) * GRANULARITY, []).append(number)
    groups = []
    for length, numbers in by_length.items():
        step = max(1, chunk_size // length)
        for some in (numbers[begin : begin + step] for begin in range(0, len(numbers), step)):
            first_n1, last_n1 = (torch.tensor([starts[n + shift] - shift for n in some])[:, None] for shift in (0, 1))
            groups.append((first_n1 + torch.arange(length)).minimum(last_n1).to(device))
    return groups


@torch.no_grad()
def largest_logits(q_NHK: Tensor, k_NGK: Tensor, groups_nT: Sequence[Tensor], chunk_size: int) -> Tensor:
    """Largest q.k / sqrt(K) of each head (H, float32) over pairs within documents of `group_documents`; -inf without any.

    Products are of full float32 precision on every device. At most H x `chunk_size` x (longest document) logits exist at a
    time.
    """
    num_heads, width = q_NHK.shape[1:]
    q_NHK, k_NGK = q_NHK.detach().float(), k_NGK.detach().float()
    largest_H = q_NHK.new_full((num_heads,), -torch.inf)
    with _without_tf32():
        for group_nT in groups_nT:
            q_BTK = q_NHK[group_nT].transpose(1, 2).flatten(0, 1)
            k_nGKT = k_NGK[group_nT].permute(0, 2, 3, 1)
            k_BKT = k_nGKT.repeat_interleave(num_heads // k_NGK.shape[1], dim=1).flatten(0, 1)
            for chunk_BCK in q_BTK.split(chunk_size, 1):
                largest_B = torch.bmm(chunk_BCK, k_BKT).amax((1, 2))
                torch.maximum(largest_H, largest_B.view(-1, num_heads).amax(0), out=largest_H)
    return largest_H * width**-0.5


@contextmanager
def _without_tf32() -> Iterator[None]:
    """CUDA's float32 products with all their bits, whatever `trainer.tf32` is."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def reduce_maxima(maxima_LH: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The maximum over all ranks of `group` (None: all there are), in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(maxima_LH, dist.ReduceOp.MAX, group=group)
    return maxima_LH


def clip_factors(maxima_H: Tensor, threshold: float, alpha: float, num_key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(factor of the logits: H, of q: H, of k: G), float64; 1 where the maximum is within the threshold or not finite."""
    maxima = maxima_H.double()
    is_over = (maxima > threshold) & maxima.isfinite()
    logits_H = torch.where(is_over, threshold / maxima, 1.0)
    k_G = logits_H.view(num_key_heads, -1).amin(1) ** (1 - alpha)
    return logits_H, logits_H / k_G.repeat_interleave(len(logits_H) // num_key_heads), k_G


@torch.no_grad()
def scale_rows_(weight: Tensor, factors_R: Tensor, start: int = 0) -> None:
    """Multiply the rows of a matrix (or the entries of a bias) from `start` on by a factor each; the others stay.

    Of a DTensor every rank scales the rows that it holds.
    """
    rows = torch.ones(weight.shape[0], dtype=torch.float64, device=factors_R.device)
    rows[start : start + len(factors_R)] = factors_R
    scale = rows.to(weight.device, weight.dtype).view(-1, *[1] * (weight.ndim - 1))
    if isinstance(weight, DTensor):
        scale = distribute_tensor(scale, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
    local(weight).mul_(scale)
