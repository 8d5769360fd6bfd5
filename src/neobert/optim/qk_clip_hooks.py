"""QK-clip on a model: see the logits of a forward pass, and shrink the heads that exceed the threshold after the step.

Shapes: B rows, T row length, N tokens, H query heads, G key heads, K head width, L attention blocks.

Two kinds of attention block are known: our own, whose q, k and v are one matrix, and any block that keeps projections apart
under names that `clipping_layers_mapping` gives, as transformers' models do. Maxima are taken at once, inside the forward
pass, so no activation is kept for them. A pass that recomputes activations (gradient checkpointing) runs the same code but is
not looked at, nor is evaluation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neobert.errors import ConfigError, Problem
from neobert.model.attention import Layout, Rotary
from neobert.model.layers import Attention
from neobert.model.unpadding import host_lengths
from neobert.optim.qk_clip import (
    QKClipSettings,
    clip_factors,
    group_documents,
    largest_logits,
    reduce_maxima,
    scale_rows_,
)

MAPPING_KEY = "optimizer.muon_config.clipping_layers_mapping"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class ClipReport:
    """What a clip saw and did. `maxima` and `factors` are L x H; a factor below 1 is what a head's logits shrink by."""

    maxima: Tensor
    factors: Tensor


def clip_metrics(reports: list[ClipReport]) -> dict[str, Any]:
    """What metrics.jsonl says of the clips since its last row: the largest logit, overall and of each block; how often a head
    was clipped, the smallest factor, and what every clipped head's logits shrank by in all (`<block>.<head>`).
    """
    if not reports:
        return {}
    maxima_LH = torch.stack([report.maxima for report in reports]).amax(0)
    factors = torch.stack([report.factors for report in reports])
    in_all_LH = factors.prod(0)
    return {
        "qk_max_logit": _number(maxima_LH.max()),
        "qk_clipped_heads": int((factors < 1).sum()),
        "qk_min_factor": factors.min().item(),
        "qk_block_max_logits": [_number(one) for one in maxima_LH.amax(1)],
        "qk_factors": {
            f"{block}.{head}": round(in_all_LH[block, head].item(), 6)
            for block, head in (in_all_LH < 1).nonzero().tolist()
        },
    }


def _number(value: Tensor) -> float | None:
    """As JSON has it: null where there is no number."""
    return round(value.item(), 4) if value.isfinite() else None


@dataclass(frozen=True)
class Heads:
    """The projections of one attention block, as modules (an engine may exchange their parameters), and k's first row."""

    q: nn.Module
    k: nn.Module
    k_start: int
    num_heads: int
    num_key_heads: int
    width: int  # K

    def scale_(self, q_H: Tensor, k_G: Tensor) -> None:
        """Multiply each head's rows of the matrices, and entries of the biases where there are some."""
        for weight in self.q.parameters(recurse=False):
            scale_rows_(weight, q_H.repeat_interleave(self.width))
        for weight in self.k.parameters(recurse=False):
            scale_rows_(weight, k_G.repeat_interleave(self.width), self.k_start)


@dataclass
class Documents:
    """The real documents of the batch in a forward pass."""

    kept_N: Tensor | None  # places of their tokens in B*T; None: all
    num_tokens: int
    groups_nT: list[Tensor]  # as `group_documents` makes them, for all blocks


class QKClip:
    """Watches a model's attention blocks and clips them. `prepare` comes before each forward pass, `apply` after the update.

    `pad_id` marks padding in packed rows. `group`: the ranks that share the batch; None: all there are. Raises ConfigError
    for a mapping that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: QKClipSettings,
        *,
        pad_id: int | None,
        mapping: Mapping[str, str] | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.settings, self.pad_id, self.group = settings, pad_id, group
        self._blocks: dict[nn.Module, Heads] = {}
        self._fused = [module for module in model.modules() if isinstance(module, Attention)]
        self._blocks.update((module, _fused_heads(module)) for module in self._fused)
        names = {"q_proj": "q_proj", "k_proj": "k_proj", **(mapping or {})}
        separate = _find_separate(model, names, required=bool(mapping))
        self._separate = {block: _Projections(self, block, names) for block in separate}
        self._blocks.update((block, _separate_heads(block, names)) for block in separate)
        if not self._blocks:
            raise ConfigError(
                Problem(MAPPING_KEY, "the model has no attention block that is known; name its projections")
            )
        self._numbers = {block: number for number, block in enumerate(self._blocks)}
        self._maxima_LH: Tensor | None = None
        self._is_armed = self._is_watching = False  # the next pass is to be looked at; this one is
        self._documents = Documents(None, 0, [])
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    # --- what the loop calls -----------

    def prepare(self, update: int, is_last_microbatch: bool) -> None:
        """Look at the next forward pass, where that is due for update number `update` (the first is 1)."""
        self._is_armed = self.settings.is_due(update) and (is_last_microbatch or not self.settings.last_microbatch_only)
        for block in self._fused if self._is_armed else ():
            block.capture = self._see_fused  # stays until `apply`: recomputation has to run the same code

    @torch.no_grad()
    def apply(self, update: int) -> ClipReport | None:
        """Clip after update number `update`; None where it is not due. All ranks have to call it together."""
        self._is_armed = False
        for block in self._fused:
            block.capture = None
        if not self.settings.is_due(update):
            return None
        maxima_LH = self._fresh_maxima() if self._maxima_LH is None else self._maxima_LH
        self._maxima_LH = None
        maxima_LH = reduce_maxima(maxima_LH, self.group).cpu()  # the one wait for the device
        all_factors = torch.ones_like(maxima_LH, dtype=torch.float64)
        for head, maxima_H, factors_H in zip(self._blocks.values(), maxima_LH, all_factors, strict=True):
            maxima_H = maxima_H[: head.num_heads]
            logits_H, q_H, k_G = clip_factors(
                maxima_H, self.settings.threshold, self.settings.alpha, head.num_key_heads
            )
            factors_H[: head.num_heads] = logits_H
            if bool((logits_H < 1).any()):
                head.scale_(q_H, k_G)
        return ClipReport(maxima_LH, all_factors)

    # --- what the forward pass calls -----------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_armed:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        kept_N, lengths = _real_documents(ids, kwargs, self.pad_id)
        groups_nT = group_documents(lengths, self.settings.chunk_size, ids.device)
        self._documents = Documents(kept_N, sum(lengths), groups_nT)
        self._is_watching = True

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._is_watching = self._is_armed = False

    def _see_fused(self, block: nn.Module, qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout) -> None:
        """`Attention.capture`."""
        if self._is_watching:
            if layout.padding:  # no document's
                qkv_N3HK = qkv_N3HK[: -layout.padding]
                rotary = rotary and replace(rotary, positions_N=rotary.positions_N[: -layout.padding])
            q, k, _ = qkv_N3HK.detach().unbind(1)
            self.see(block, q, k, rotary)

    @torch.no_grad()
    def see(self, block: nn.Module, q_NHK: Tensor, k_NGK: Tensor, rotary: Rotary | None) -> None:
        """Raise the maxima of a block by the logits of q and k: of all B*T tokens, or of the real ones, as our model leaves
        out the padding of padded rows on a CPU.
        """
        documents = self._documents
        with torch.autocast(q_NHK.device.type, enabled=False):
            q, k = q_NHK.float(), k_NGK.float()
            if rotary is not None:
                q, k = rotary.rotate(q), rotary.rotate(k)
            if documents.kept_N is not None and len(q) != documents.num_tokens:
                q, k = (x.index_select(0, documents.kept_N) for x in (q, k))
            maxima_H = largest_logits(q, k, documents.groups_nT, self.settings.chunk_size)
        if self._maxima_LH is None:
            self._maxima_LH = self._fresh_maxima(maxima_H.device)
        row_H = self._maxima_LH[self._numbers[block], : len(maxima_H)]
        torch.maximum(row_H, maxima_H, out=row_H)

    def _fresh_maxima(self, device: torch.device | None = None) -> Tensor:
        widest = max(head.num_heads for head in self._blocks.values())
        device = device or next(next(iter(self._blocks.values())).q.parameters()).device
        return torch.full((len(self._blocks), widest), -torch.inf, device=device)


class _Projections:
    """Hooks on a block whose projections are apart: remembers q and k of a pass until both are there."""

    def __init__(self, clip: QKClip, block: nn.Module, names: Mapping[str, str]):
        self.clip, self.block = clip, block
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.seen: dict[str, Tensor] = {}
        block.register_forward_pre_hook(torch.compiler.disable(self._enter), with_kwargs=True)
        for role in PROJECTIONS[:2]:
            block.get_submodule(names[role]).register_forward_hook(torch.compiler.disable(self._keep(role)))

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = {}
        self.rotary = kwargs.get("position_embeddings")

    def _keep(self, role: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output_BTD: Tensor) -> None:
            if not self.clip._is_watching:
                return
            self.seen[role] = output_BTD.detach()
            if len(self.seen) == 2:
                self._hand_over()

        return hook

    def _hand_over(self) -> None:
        head = self.clip._blocks[self.block]
        q_BTD, k_BTD = self.seen["q_proj"], self.seen["k_proj"]
        self.seen = {}
        rotary = None
        if self.rotary is not None:  # transformers' tables: (B or 1) x T x K, both halves alike
            half = head.width // 2
            cos, sin = (x[..., :half].expand(len(q_BTD), -1, -1).flatten(0, 1).float() for x in self.rotary)
            rotary = Rotary(cos, sin, torch.arange(len(cos), device=cos.device))
        q_NHK = q_BTD.reshape(-1, head.num_heads, head.width)
        k_NGK = k_BTD.reshape(-1, head.num_key_heads, head.width)
        self.clip.see(self.block, q_NHK, k_NGK, rotary)


# --- finding blocks and documents -----------


def _fused_heads(block: Attention) -> Heads:
    width = block.qkv.weight.shape[1]
    return Heads(block.qkv, block.qkv, width, block.num_heads, block.num_heads, width // block.num_heads)


def _find_separate(model: nn.Module, names: Mapping[str, str], required: bool) -> list[nn.Module]:
    """Blocks that hold all named projections. Raises ConfigError where a mapping was given and names none."""
    unknown = sorted(set(names) - set(PROJECTIONS))
    if unknown:
        raise ConfigError(Problem(MAPPING_KEY, f"no projection {unknown[0]!r}; keys are {', '.join(PROJECTIONS)}"))
    blocks = [block for block in model.modules() if all(_child(block, name) is not None for name in names.values())]
    if required and not blocks:
        missing = [
            f"{role}: {name}" for role, name in names.items() if not any(_child(b, name) for b in model.modules())
        ]
        wrong = ", ".join(missing) or "these together"
        raise ConfigError(Problem(MAPPING_KEY, f"no attention block of the model has modules of these names ({wrong})"))
    return blocks


def _child(block: nn.Module, name: str) -> nn.Module | None:
    child: nn.Module | None = block
    for part in name.split("."):
        child = None if child is None else child._modules.get(part)
    return child


def _separate_heads(block: nn.Module, names: Mapping[str, str]) -> Heads:
    if norms := [name for name in ("q_norm", "k_norm") if _child(block, name) is not None]:
        kind = type(block).__name__
        raise ConfigError(Problem(MAPPING_KEY, f"{kind} normalises q and k ({norms[0]}): their rows cannot be clipped"))
    q, k = (block.get_submodule(names[role]) for role in PROJECTIONS[:2])
    width = _head_width(block)
    num_heads, num_key_heads = (int(one.weight.shape[0]) // width for one in (q, k))
    if num_key_heads < 1 or num_heads % num_key_heads:
        raise ConfigError(
            Problem(MAPPING_KEY, f"{num_heads} query heads do not share {num_key_heads} key heads evenly")
        )
    return Heads(q, k, 0, num_heads, num_key_heads, width)


def _head_width(block: nn.Module) -> int:
    """K, under the names that transformers' attention blocks have for it."""
    for name in ("head_dim", "attention_head_size", "dim_head"):
        if isinstance(width := getattr(block, name, None), int):
            return width
    config = getattr(block, "config", None)
    if config is None:
        raise ConfigError(
            Problem(MAPPING_KEY, f"{type(block).__name__} does not say how wide its heads are (head_dim)")
        )
    return int(config.hidden_size // config.num_attention_heads)


def _real_documents(
    ids_BT: Tensor, inputs: Mapping[str, Any], pad_id: int | None
) -> tuple[Tensor | None, Sequence[int]]:
    """Places (None: all) and lengths of what is not padding: of an `attention_mask` B x T, or of packed `document_lengths`."""
    mask, packed = inputs.get("attention_mask"), inputs.get("document_lengths")
    if packed is not None:
        lengths = host_lengths(packed)
        if pad_id is None:
            return None, lengths
        real = [bool((document != pad_id).any()) for document in ids_BT.flatten().cpu().split(lengths)]
        if all(real):
            return None, lengths
        kept_N = torch.tensor(real).repeat_interleave(torch.tensor(lengths)).nonzero().squeeze(1)
        return kept_N.to(ids_BT.device), [n for n, is_real in zip(lengths, real, strict=True) if is_real]
    if mask is None:
        return None, [ids_BT.shape[1]] * ids_BT.shape[0]
    mask_BT = mask.bool()
    return mask_BT.flatten().nonzero().squeeze(1), [n for n in mask_BT.sum(1).tolist() if n]
