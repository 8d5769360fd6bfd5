"""QK-clip: keep the attention logits of every head below a threshold by shrinking its rows of W_q and W_k.

Shapes: B rows, T row length, N tokens, H query heads, G key heads (G divides H; head h reads key head h // (H / G)), K head
width, L attention blocks.

Where S, the largest logit q.k / sqrt(K) of a head in the whole global batch, exceeds the threshold tau after a step, the rows
of q are multiplied by (tau/S)^alpha and those of k by (tau/S)^(1 - alpha), which brings that logit to tau (Kimi K2, arXiv
2507.20534), also with rotary positions, which keep lengths. Where query heads share a key head, k shrinks by the smallest of
their factors and each q by what then remains.

Maxima are taken inside the forward pass and reduced over all ranks: replicas that clipped by their own would drift apart. A
pass that recomputes activations (gradient checkpointing) is not looked at, nor is evaluation.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neobert.errors import ConfigError, Problem
from neobert.model.attention import GRANULARITY, Layout, Rotary
from neobert.model.layers import Attention
from neobert.model.unpadding import Documents, host_lengths
from neobert.optim.sharding import local, local_rows

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
RealTokens = tuple[Tensor | None, list[Tensor]]  # positions in B*T of what is no padding (None: all), their groups


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


@dataclass(frozen=True)
class ClipReport:
    """What a clip saw and did, L x H on the device; a factor below 1 is what a head's logits shrink by."""

    maxima: Tensor
    factors: Tensor


def stack_reports(reports: list[ClipReport]) -> Tensor:
    """C reports as one tensor, C x 2 x L x H in float64, on their device: what `clip_metrics` takes once it is read."""
    found = [torch.stack((report.maxima.double(), report.factors)) for report in reports]
    return torch.stack(found) if found else torch.empty(0)


def clip_metrics(reports_C2LH: Tensor) -> dict[str, Any]:
    """What metrics.jsonl reports of the clips since its last line: the largest logit, overall and of each block; how often a
    head was clipped, the smallest factor, and what every clipped head's logits shrank by in all (`<block>.<head>`).
    """
    maxima_CLH, factors_CLH = reports_C2LH.unbind(1)
    maxima_LH, in_all_LH = maxima_CLH.amax(0), factors_CLH.prod(0)
    clipped = (in_all_LH < 1).nonzero().tolist()
    maxima = [maxima_LH.max().item(), *maxima_LH.amax(1).tolist()]
    in_json = [round(value, 4) if math.isfinite(value) else None for value in maxima]
    return {
        "qk_max_logit": in_json[0],
        "qk_clipped_heads": int((factors_CLH < 1).sum()),
        "qk_min_factor": factors_CLH.min().item(),
        "qk_block_max_logits": in_json[1:],
        "qk_factors": {f"{block}.{head}": round(in_all_LH[block, head].item(), 6) for block, head in clipped},
    }


def group_documents(lengths: Sequence[int], chunk_size: int, device: torch.device) -> list[Tensor]:
    """Numbers of the tokens of documents that lie one after the other, n x T for n documents of about the same length.
    Shorter documents repeat their last token, which adds no other logit. A group has about `chunk_size` tokens at most.
    """
    lengths_n = np.array(lengths, dtype=np.int64)
    starts_n, padded_n = lengths_n.cumsum() - lengths_n, -(-lengths_n // GRANULARITY) * GRANULARITY
    buckets = [np.empty((0, 1), dtype=np.int64)]
    for length in np.unique(padded_n[padded_n > 0]):
        chosen = padded_n == length
        buckets.append(starts_n[chosen, None] + np.minimum(np.arange(length), lengths_n[chosen, None] - 1))
    tokens = torch.from_numpy(np.concatenate([bucket.ravel() for bucket in buckets]))
    tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
    parts = zip(tokens.split([bucket.size for bucket in buckets]), buckets, strict=True)
    runs = (part.view(bucket.shape).split(max(1, chunk_size // bucket.shape[1])) for part, bucket in parts if len(part))
    return list(itertools.chain.from_iterable(runs))


@torch.no_grad()
def largest_logits(q_NHK: Tensor, k_NGK: Tensor, groups_nT: Sequence[Tensor], chunk_size: int) -> Tensor:
    """Largest q.k / sqrt(K) of each head (H, float32) over pairs within documents of `group_documents`; -inf without any.
    Products have full float32 precision. At most H x `chunk_size` x (longest document) logits exist at a time.
    """
    num_heads, width = q_NHK.shape[1:]
    q_NHK, k_NGK = q_NHK.detach().float(), k_NGK.detach().float()
    largest_H = q_NHK.new_full((num_heads,), -torch.inf)
    cuda = torch.backends.cuda.matmul
    tf32, cuda.allow_tf32 = cuda.allow_tf32, False  # whatever `trainer.tf32` is
    try:
        for group_nT in groups_nT:
            q_BTK = q_NHK[group_nT].transpose(1, 2).flatten(0, 1)
            k_nGKT = k_NGK[group_nT].permute(0, 2, 3, 1)
            k_BKT = k_nGKT.repeat_interleave(num_heads // k_NGK.shape[1], dim=1).flatten(0, 1)
            for chunk_BCK in q_BTK.split(chunk_size, 1):
                largest_B = torch.bmm(chunk_BCK, k_BKT).amax((1, 2))
                torch.maximum(largest_H, largest_B.view(-1, num_heads).amax(0), out=largest_H)
    finally:
        cuda.allow_tf32 = tf32
    return largest_H * width**-0.5


def clip_factors(maxima_LH: Tensor, threshold: float, alpha: float, num_key_heads: int) -> tuple[Tensor, ...]:
    """(factor of the logits: L x H, of q: L x H, of k: L x G), float64; 1 where a maximum is in bounds or not finite."""
    maxima = maxima_LH.double()
    is_over = (maxima > threshold) & maxima.isfinite()
    logits_LH = torch.where(is_over, threshold / maxima, 1.0)
    k_LG = logits_LH.unflatten(-1, (num_key_heads, -1)).amin(-1) ** (1 - alpha)
    return logits_LH, logits_LH / k_LG.repeat_interleave(maxima.shape[-1] // num_key_heads, -1), k_LG


@dataclass
class Heads:
    """The projections of one attention block, as modules (an engine may exchange their parameters), and k's first row;
    `maxima_H` are the largest logits of the passes that were looked at since the last clip.
    """

    q: nn.Module
    k: nn.Module
    k_start: int
    num_heads: int
    num_key_heads: int
    width: int  # K
    maxima_H: Tensor | None = None

    @staticmethod
    def fused(block: Attention) -> "Heads":
        """The heads of our own attention."""
        width = block.qkv.weight.shape[1]
        return Heads(block.qkv, block.qkv, width, block.num_heads, block.num_heads, width // block.num_heads)

    @staticmethod
    def separate(block: nn.Module, names: Mapping[str, str]) -> "Heads":
        """The heads of a block with modules of these names. Raises ConfigError where they cannot be clipped."""
        kind, parts = type(block).__name__, dict(block.named_modules())
        for norm in ("q_norm", "k_norm"):
            if norm in parts:
                raise _bad_mapping(f"{kind} normalises q and k ({norm}): their rows cannot be clipped")
        widths = [getattr(block, name, None) for name in ("head_dim", "attention_head_size", "dim_head")]
        width = next((width for width in widths if isinstance(width, int)), None)
        if width is None:
            if (config := getattr(block, "config", None)) is None:
                raise _bad_mapping(f"{kind} does not say how wide its heads are (head_dim)")
            width = int(config.hidden_size // config.num_attention_heads)
        q, k = parts[names["q_proj"]], parts[names["k_proj"]]
        num_heads, num_key_heads = (int(one.weight.shape[0]) // width for one in (q, k))
        if num_key_heads < 1 or num_heads % num_key_heads:
            raise _bad_mapping(f"{num_heads} query heads do not share {num_key_heads} key heads evenly")
        return Heads(q, k, 0, num_heads, num_key_heads, width)

    @torch.no_grad()
    def scale_(self, q_H: Tensor, k_G: Tensor) -> None:
        """Multiply each head's rows of the matrices, and entries of the biases; every rank scales those it holds."""
        for projection, start, factors in ((self.q, 0, q_H), (self.k, self.k_start, k_G)):
            for weight in projection.parameters(recurse=False):
                held, stop = local_rows(weight), start + len(factors) * self.width
                first = max(held.start, start)
                last = max(first, min(held.stop, stop))
                scale = factors.repeat_interleave(self.width)[first - start : last - start]
                rows = local(weight)[first - held.start : last - held.start]
                rows.mul_(scale.to(rows.device, rows.dtype).view(-1, *[1] * (rows.ndim - 1)))


def find_separate(model: nn.Module, names: Mapping[str, str], required: bool) -> list[nn.Module]:
    """Blocks that hold all named projections. Raises ConfigError for a name of none, where names are `required`."""
    if unknown := sorted(set(names) - set(PROJECTIONS)):
        raise _bad_mapping(f"no projection {unknown[0]!r}; keys are {', '.join(PROJECTIONS)}")
    parts = {block: {name for name, _ in block.named_modules() if name} for block in model.modules()}
    blocks = [block for block, inner in parts.items() if inner.issuperset(names.values())]
    if required and not blocks:
        known = set().union(*parts.values())
        wrong = ", ".join(f"{role}: {name}" for role, name in names.items() if name not in known) or "these together"
        raise _bad_mapping(f"no attention block of the model has modules of these names ({wrong})")
    return blocks


def _bad_mapping(message: str) -> ConfigError:
    return ConfigError(Problem("optimizer.muon_config.clipping_layers_mapping", message))


def _real_documents(ids_BT: Tensor, inputs: dict[str, Any], pad_id: int | None) -> tuple[Tensor | None, Sequence[int]]:
    """Positions (None: all) and lengths of what is not padding, by an `attention_mask` or packed `document_lengths`."""
    mask, packed = inputs.get("attention_mask"), inputs.get("document_lengths")
    if isinstance(packed, Documents):  # laid out by the host: padding belongs to none
        return None, packed.lengths
    if packed is not None:
        lengths = host_lengths(packed)
        if pad_id is None:
            return None, lengths
        real = [bool((document != pad_id).any()) for document in ids_BT.flatten().cpu().split(lengths)]
        if all(real):
            return None, lengths
        kept_N = torch.tensor(real).repeat_interleave(torch.tensor(lengths)).nonzero().squeeze(1)
        return kept_N.to(ids_BT.device), list(itertools.compress(lengths, real))
    if mask is None:
        return None, [ids_BT.shape[1]] * ids_BT.shape[0]
    mask_BT = mask.bool()
    return mask_BT.flatten().nonzero().squeeze(1), [n for n in mask_BT.sum(1).tolist() if n]


class QKClip:
    """Watches a model's attention blocks and clips them. `prepare` comes before each forward pass, `apply` after the update.
    `pad_id` marks padding in packed rows; `mapping` names separate projections. Raises ConfigError where it does not fit.
    """

    def __init__(
        self, model: nn.Module, settings: QKClipSettings, pad_id: int | None, mapping: Mapping[str, str] | None = None
    ):
        self.settings, self.pad_id = settings, pad_id
        self._blocks: list[Heads] = []
        for block in model.modules():
            if isinstance(block, Attention):
                self._blocks.append(Heads.fused(block))
                block.register_forward_pre_hook(partial(self._see_fused, self._blocks[-1]))
        names = {"q_proj": "q_proj", "k_proj": "k_proj", **(mapping or {})}
        for block in find_separate(model, names, required=bool(mapping)):
            self._blocks.append(Heads.separate(block, names))
            self._watch_projections(block, self._blocks[-1])
        if not self._blocks:
            raise _bad_mapping("the model has no attention block that is known; name its projections")
        self._is_armed = False  # the next forward pass is to be looked at
        self._documents: RealTokens | None = None  # of this forward pass, where it is looked at
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def prepare(self, update: int, is_last_microbatch: bool) -> None:
        """Look at the next forward pass, where that is due for update number `update` (the first is 1)."""
        self._is_armed = self.settings.is_due(update) and (is_last_microbatch or not self.settings.last_microbatch_only)

    @torch.no_grad()
    def apply(self, update: int, found_inf: Tensor | None = None) -> ClipReport | None:
        """Clip after update number `update`, by 1 where `found_inf` is 1; None where it is not due. All ranks call it."""
        self._is_armed = False
        if not self.settings.is_due(update):
            return None
        blocks = self._blocks
        device = next(blocks[0].q.parameters()).device
        maxima_LH = torch.full((len(blocks), max(heads.num_heads for heads in blocks)), -torch.inf, device=device)
        for heads, row_H in zip(blocks, maxima_LH, strict=True):
            if heads.maxima_H is not None:
                row_H[: heads.num_heads] = heads.maxima_H
            heads.maxima_H = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(maxima_LH, dist.ReduceOp.MAX)
        if found_inf is not None:
            maxima_LH.masked_fill_(found_inf.bool(), -torch.inf)
        factors_LH = torch.ones_like(maxima_LH, dtype=torch.float64)
        for H, G in {(heads.num_heads, heads.num_key_heads) for heads in blocks}:
            found = clip_factors(maxima_LH[:, :H], self.settings.threshold, self.settings.alpha, G)
            for heads, row_H, logits_H, q_H, k_G in zip(blocks, factors_LH, *found, strict=True):
                if (heads.num_heads, heads.num_key_heads) == (H, G):
                    row_H[:H] = logits_H
                    heads.scale_(q_H, k_G)
        return ClipReport(maxima_LH, factors_LH)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_armed:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            kept_N, lengths = _real_documents(ids, kwargs, self.pad_id)
            self._documents = kept_N, group_documents(lengths, self.settings.chunk_size, ids.device)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._documents, self._is_armed = None, False

    def _see_fused(self, heads: Heads, block: nn.Module, args: tuple[Tensor, Rotary | None, Layout]) -> None:
        """What `Attention.forward` is called with."""
        if self._documents is not None:
            qkv_N3HK, rotary, layout = args
            if layout.padding:  # these tokens belong to no document
                qkv_N3HK = qkv_N3HK[: -layout.padding]
                rotary = rotary and replace(rotary, positions_N=rotary.positions_N[: -layout.padding])
            q, k, _ = qkv_N3HK.detach().unbind(1)
            self.see(heads, q, k, rotary)

    def _watch_projections(self, block: nn.Module, heads: Heads) -> None:
        """Hooks on a block whose projections are apart: q and k of a pass are kept until both are there."""
        seen: dict[Any, Any] = {}

        @torch.compiler.disable
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.clear()
            seen["tables"] = kwargs.get("position_embeddings")

        @torch.compiler.disable
        def keep(projection: nn.Module, args: Any, output_BTD: Tensor) -> None:
            if self._documents is None:
                return
            seen[projection] = output_BTD.detach()
            if heads.q not in seen or heads.k not in seen:
                return
            q_BTD, k_BTD, rotary = seen.pop(heads.q), seen.pop(heads.k), None
            if (tables := seen.get("tables")) is not None:  # transformers' tables: (B or 1) x T x K, both halves alike
                half = heads.width // 2
                cos, sin = (x[..., :half].expand(len(q_BTD), -1, -1).flatten(0, 1).float() for x in tables)
                rotary = Rotary(cos, sin, torch.arange(len(cos), device=cos.device))
            q_NHK = q_BTD.reshape(-1, heads.num_heads, heads.width)
            self.see(heads, q_NHK, k_BTD.reshape(-1, heads.num_key_heads, heads.width), rotary)

        block.register_forward_pre_hook(enter, with_kwargs=True)
        heads.q.register_forward_hook(keep)
        heads.k.register_forward_hook(keep)

    @torch.no_grad()
    def see(self, heads: Heads, q_NHK: Tensor, k_NGK: Tensor, rotary: Rotary | None) -> None:
        """Raise the maxima of a block by the logits of q and k, of all B*T tokens or of those that are not padding."""
        assert self._documents is not None
        kept_N, groups_nT = self._documents
        with torch.autocast(q_NHK.device.type, enabled=False):
            q, k = q_NHK.float(), k_NGK.float()
            if rotary is not None:
                q, k = rotary.rotate(q), rotary.rotate(k)
            if kept_N is not None and len(q) != len(kept_N):
                q, k = q.index_select(0, kept_N), k.index_select(0, kept_N)
            maxima_H = largest_logits(q, k, groups_nT, self.settings.chunk_size)
        heads.maxima_H = maxima_H if heads.maxima_H is None else torch.maximum(heads.maxima_H, maxima_H)
