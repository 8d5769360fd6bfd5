"""NeoBERT: a pre-norm bidirectional encoder (arXiv 2502.19587), as transformers models.

Shapes: B rows, T row length, N tokens, D width, V vocabulary, M masked tokens.

`NeoBERTForMaskedLM` computes its loss inside `forward` from the masked positions only: the decoder is applied to M rows
instead of N, so logits cost the masking rate (15 %) of the usual memory and time, and never more than `LOGIT_BUDGET`
elements at once. It returns the *sum* of the losses; the caller divides by the number of targets of the whole step,
which makes accumulation and data parallelism exact.

A batch is either padded rows with an `attention_mask`, or packed rows with `document_lengths` (their sum is B*T; padding
at the end of a row counts as a document of its own). Documents never see each other and positions restart in each.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .attention import Layout
from .layers import GELU, Attention, LayerNorm, RMSNorm, SwiGLU, rotary_table

LOGIT_BUDGET = 2**26  # elements of the largest logit matrix: 256 MiB in float32
IGNORED = -100  # label of a token that is not predicted


class NeoBERTConfig(PreTrainedConfig):
    """Architecture of a NeoBERT; the fields are the keys of the YAML's `model` section."""

    model_type = "neobert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_act: str = "swiglu"
    rms_norm: bool = True
    rope: bool = True
    norm_eps: float = 1e-5
    dropout_prob: float = 0.0
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False


@dataclass
class MaskedLMLossOutput(MaskedLMOutput):
    """`loss` is the mean over targets; `loss_sum` their sum; both float32 scalars. `num_correct` is an int64 scalar."""

    loss_sum: Tensor | None = None
    num_correct: Tensor | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__()
        norm = RMSNorm if config.rms_norm else LayerNorm
        feed_forward = SwiGLU if config.hidden_act == "swiglu" else GELU
        self.attention_norm = norm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config.hidden_size, config.num_attention_heads)
        self.ffn_norm = norm(config.hidden_size, config.norm_eps)
        self.ffn = feed_forward(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x_ND: Tensor, rotary: tuple[Tensor, Tensor] | None, layout: Layout) -> Tensor:
        x_ND = x_ND + self.dropout(self.attention(self.attention_norm(x_ND), rotary, layout))
        return x_ND + self.dropout(self.ffn(self.ffn_norm(x_ND)))


class NeoBERTPreTrainedModel(PreTrainedModel):
    """Initialisation shared by all heads."""

    config_class = NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys: dict[str, str] = {}

    def _init_weights(self, module: nn.Module) -> None:
        """Uniform within the two init ranges; norms start at one."""
        if isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -self.config.embedding_init_range, self.config.embedding_init_range)
        elif isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -self.config.decoder_init_range, self.config.decoder_init_range)
        elif isinstance(module, RMSNorm | LayerNorm):
            nn.init.ones_(module.weight)


class NeoBERT(NeoBERTPreTrainedModel):
    """The encoder."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.rope:  # learned positions count from 1; row 0 stays for padding
            self.embed_positions = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_prob)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.norm = norm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def encode(self, ids_N: Tensor, positions_N: Tensor, layout: Layout) -> Tensor:
        """Hidden states of a flat batch: N ids -> N x D."""
        x_ND = self.embed_tokens(ids_N)
        rotary = None
        if self.config.rope:
            rotary = rotary_table(positions_N, self.config.hidden_size // self.config.num_attention_heads)
        else:
            x_ND = x_ND + self.embed_positions(positions_N + 1)
        x_ND = self.dropout(x_ND)
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x_ND = checkpoint(block, x_ND, rotary, layout, use_reentrant=False)
            else:
                x_ND = block(x_ND, rotary, layout)
        return self.norm(x_ND)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states B x T x D; zero where `attention_mask` is."""
        flat = flatten(input_ids, attention_mask, document_lengths, self.dropout.p * self.training)
        hidden_ND = self.encode(flat.ids_N, flat.positions_N, flat.layout)
        return BaseModelOutput(last_hidden_state=flat.restore(hidden_ND))


@dataclass(frozen=True)
class FlatBatch:
    """A batch as a run of N tokens. `kept_N` are the places in B*T that were kept; None when all were."""

    ids_N: Tensor
    positions_N: Tensor
    layout: Layout
    shape: torch.Size
    kept_N: Tensor | None

    def select(self, x_BT: Tensor) -> Tensor:
        """The same tokens' values of another B x T tensor, flat."""
        return x_BT.flatten() if self.kept_N is None else x_BT.flatten()[self.kept_N]

    def restore(self, x_ND: Tensor) -> Tensor:
        """N x D -> B x T x D, zeros where padding was left out."""
        if self.kept_N is not None:
            full = x_ND.new_zeros(self.shape.numel(), x_ND.shape[-1])
            x_ND = full.index_copy(0, self.kept_N, x_ND)
        return x_ND.view(*self.shape, -1)


def flatten(
    input_ids: Tensor, attention_mask: Tensor | None, document_lengths: Tensor | None, dropout: float
) -> FlatBatch:
    """Lay a batch out flat. On the CPU padding is left out; elsewhere shapes stay static and padding is masked.

    `document_lengths` are on the CPU, wherever the rest is. Raises ValueError when they do not sum to B*T.
    """
    B, T = input_ids.shape
    if document_lengths is not None:
        lengths = document_lengths.tolist()
        if sum(lengths) != B * T:
            raise ValueError(f"document_lengths sum to {sum(lengths)}, but the batch has {B} x {T} = {B * T} tokens")
        layout = Layout(lengths=tuple(lengths), dropout=dropout)
        positions_N = _restart(document_lengths, B * T).to(input_ids.device)
        return FlatBatch(input_ids.flatten(), positions_N, layout, input_ids.shape, None)
    if attention_mask is None:
        layout = Layout(lengths=(T,) * B, dropout=dropout)
        positions_N = torch.arange(T, device=input_ids.device).repeat(B)
        return FlatBatch(input_ids.flatten(), positions_N, layout, input_ids.shape, None)
    mask_BT = attention_mask.bool()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    if input_ids.device.type != "cpu":
        layout = Layout(mask_BT=mask_BT, dropout=dropout)
        return FlatBatch(input_ids.flatten(), positions_BT.flatten(), layout, input_ids.shape, None)
    kept_N = mask_BT.flatten().nonzero().squeeze(1)
    layout = Layout(lengths=tuple(n for n in mask_BT.sum(1).tolist() if n), dropout=dropout)
    return FlatBatch(input_ids.flatten()[kept_N], positions_BT.flatten()[kept_N], layout, input_ids.shape, kept_N)


def _restart(lengths: Tensor, total: int) -> Tensor:
    """Positions that count from 0 in every document: (2, 3) -> 0 1 0 1 2."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - starts.repeat_interleave(lengths, output_size=total)


class NeoBERTForMaskedLM(NeoBERTPreTrainedModel):
    """The encoder with an untied decoder; the loss of masked-LM pretraining is computed inside."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        masked_only: bool = True,
        count_correct: bool = False,
        **_: Any,
    ) -> MaskedLMLossOutput:
        """Without `labels`: logits B x T x V. With `labels` B x T (-100: no target): losses, and no logits.

        `masked_only=False` computes logits at every position first; same loss and gradients, more memory.
        `count_correct` also counts the targets that were the likeliest token (an extra pass over the logits).
        """
        flat = flatten(input_ids, attention_mask, document_lengths, self.config.dropout_prob * self.training)
        hidden_ND = self.model.encode(flat.ids_N, flat.positions_N, flat.layout)
        if labels is None:
            return MaskedLMLossOutput(logits=flat.restore(self.lm_head(hidden_ND)))
        labels_N = flat.select(labels)
        if masked_only:
            targets = (labels_N != IGNORED).nonzero().squeeze(1)
            hidden_ND, labels_N = hidden_ND.index_select(0, targets), labels_N[targets]
        loss_sum, num_correct = self._loss(hidden_ND, labels_N, count_correct)
        num_targets = (labels_N != IGNORED).sum().clamp_min(1)
        return MaskedLMLossOutput(loss=loss_sum / num_targets, loss_sum=loss_sum, num_correct=num_correct)

    def _loss(self, hidden_MD: Tensor, labels_M: Tensor, count_correct: bool) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies in float32, and how many targets were the likeliest token."""
        loss_sum = hidden_MD.new_zeros((), dtype=torch.float32) + 0.0 * hidden_MD.sum()
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden_MD.device)
        rows = max(1, LOGIT_BUDGET // self.config.vocab_size)
        for hidden, labels in zip(hidden_MD.split(rows), labels_M.split(rows), strict=True):
            logits = self.lm_head(hidden).float()
            loss_sum = loss_sum + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            if count_correct:
                num_correct += (logits.detach().argmax(-1) == labels).sum()
        return loss_sum, num_correct
