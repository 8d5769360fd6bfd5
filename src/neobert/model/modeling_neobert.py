"""NeoBERT: a pre-norm bidirectional encoder (arXiv 2502.19587), as transformers models; nGPT as a variant.

Shapes: B rows, T row length, N tokens, D width, V vocabulary, M masked tokens, n documents.

A batch is either padded rows with an `attention_mask`, or packed rows with `document_lengths` (their sum is B*T; padding
at the end of a row counts as a document of its own). Documents do not attend to each other and positions restart in each.
Losses are computed in `forward` and are sums: the caller divides by the number of targets of the whole step.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from .attention import FINE_GRANULARITY, Kernel, Layout, Rotary
from .kernels import IGNORED, compute_dtype, full_cross_entropy, is_autocast, linear_cross_entropy, round_up_tokens
from .layers import Block, LayerNorm, LearnedScale, NormalizedBlock, RMSNorm, build_norm, unit
from .unpadding import Documents, Lengths, Pooling, UnpaddedBatch, cumulative, host_lengths


class NeoBERTConfig(PreTrainedConfig):
    """Architecture of a NeoBERT; the fields are the keys of the YAML's `model` section, and what heads need."""

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
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout_prob: float = 0.0
    ngpt: bool = False
    base_scale: float = 960.0**-0.5  # how large nGPT stores its scales
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    decoder_bias: bool = False  # only in weights that were published elsewhere
    classifier_init_range: float = 0.02
    classifier_dropout: float = 0.1
    classifier_pooling: str = "bos"


@dataclass
class LossOutput(ModelOutput):
    """What heads return. `loss` is the mean over the targets, `loss_sum` the sum, both float32 scalars; `num_correct` is an
    int64 scalar, 0 for a regression. `embeddings` n x D are not normalised.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    embeddings: Tensor | None = None
    loss_sum: Tensor | None = None
    num_correct: Tensor | None = None


def classify(head: Any, pooled_nD: Tensor, labels: Tensor | None) -> LossOutput:
    """Logits n x num_labels in float32, of `head.dense`, GELU and `head.classifier` with `head.dropout` before each, as in
    transformers' EuroBERT; and their cross-entropy with class ids n, or the squared error where there is one label. Labels of
    -100, or NaN, count as none.
    """
    hidden_nD = F.gelu(head.dense(head.dropout(pooled_nD.to(head.dense.weight.dtype))))
    logits = head.classifier(head.dropout(hidden_nD)).float()
    if labels is None:
        return LossOutput(logits=logits)
    if logits.shape[1] == 1:
        known = ~labels.isnan()
        loss_sum = F.mse_loss(logits.squeeze(-1) * known, labels.nan_to_num().float(), reduction="sum")
        num_correct = labels.new_zeros((), dtype=torch.int64)
    else:
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        num_correct = (logits.argmax(-1) == labels).sum()
    loss = loss_sum / max(1, len(labels))
    return LossOutput(loss=loss, logits=logits, loss_sum=loss_sum, num_correct=num_correct)


def new_states(config: NeoBERTConfig, extra: dict[str, Any]) -> list[Tensor] | None:
    """A list for the hidden states of a forward pass, where its argument `output_hidden_states` or the configuration asks for
    them; else None. Raises ValueError for what transformers' models take and these do not, instead of ignoring it.
    """
    for name in ("output_attentions", "inputs_embeds", "position_ids"):
        if extra.get(name) is not None and extra[name] is not False:
            raise ValueError(f"NeoBERT does not take {name}")
    asked = extra.get("output_hidden_states")
    return [] if (config.output_hidden_states if asked is None else asked) else None


class NeoBERTPreTrainedModel(PreTrainedModel):
    """Initialisation shared by all heads."""

    config_class = NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys: dict[str, str] = {}

    def _init_weights(self, module: nn.Module) -> None:
        """Uniform within the two init ranges; norms start at one. Heads start normal, without bias."""
        config = self.config
        if isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -config.embedding_init_range, config.embedding_init_range)
        elif isinstance(module, nn.Linear):
            if module in (getattr(self, "dense", None), getattr(self, "classifier", None)):
                nn.init.normal_(module.weight, std=config.classifier_init_range)
            else:
                nn.init.uniform_(module.weight, -config.decoder_init_range, config.decoder_init_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LearnedScale):
            nn.init.constant_(module.weight, module.stored)

    def post_init(self) -> None:
        super().post_init()
        self.normalize_matrices()

    @torch.no_grad()
    def normalize_matrices(self) -> None:
        """nGPT, after every update: matrices get rows, or columns where they write, of length 1. Else nothing."""
        if not self.config.ngpt:
            return
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and not name.startswith(("dense.", "classifier.")):
                writes = name.endswith(("attention.out.weight", "ffn.down.weight"))
                weight.copy_(F.normalize(weight, dim=0 if writes else 1))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; new tokens get the initial logit scale where nGPT has them, and vectors of length 1."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        scale = getattr(self, "logit_scale", None)
        if scale is not None and len(scale.weight) != self.config.vocab_size:
            old = scale.weight.detach()
            kept = min(len(old), self.config.vocab_size)
            scale.weight = nn.Parameter(old.new_full((self.config.vocab_size,), scale.stored))
            scale.weight.data[:kept] = old[:kept]
        self.normalize_matrices()
        return embeddings

    def choose_kernels(self, backend: str) -> None:
        """Which kernels run norms and SwiGLU: "torch" or "liger"."""
        for module in self.modules():
            if hasattr(module, "kernel_backend"):
                module.kernel_backend = backend


class NeoBERT(NeoBERTPreTrainedModel):
    """The encoder. `attention_kernel` is what ragged batches run on CUDA."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads or (config.rope and width // heads % 2):
            even = ", even" if config.rope else ""
            raise ValueError(f"hidden_size {width} does not give {heads} heads of one{even} width")
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if not config.rope:  # learned positions count from 1; row 0 stays for padding
            self.embed_positions = nn.Embedding(config.max_position_embeddings + 1, width)
        self.dropout = nn.Dropout(config.dropout_prob)
        block = NormalizedBlock if config.ngpt else Block
        self.layers = nn.ModuleList([block(config) for _ in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.gradient_checkpointing = self.is_compiled = False
        self.checkpointing_interval = 1  # with gradient_checkpointing: one block in so many is recomputed
        self.attention_kernel: Kernel = "sdpa"
        self.post_init()

    def flatten(self, ids_BT: Tensor, mask_BT: Tensor | None = None, document_lengths: Lengths = None) -> UnpaddedBatch:
        """Lay a batch out unpadded. SDPA off the CPU keeps padding, so that shapes stay static; all else leaves it out. Raises
        ValueError when `document_lengths` do not sum to B*T, or for a document longer than `max_position_embeddings`.
        """
        dropout, kernel = self.config.dropout_prob * self.training, self.attention_kernel
        if isinstance(document_lengths, Documents):
            return UnpaddedBatch.laid_out(ids_BT, document_lengths, dropout, kernel)
        (B, T), kind, limit = ids_BT.shape, ids_BT.device.type, self.config.max_position_embeddings
        ids_N, kept_N, lengths = ids_BT.flatten(), None, (T,) * B
        is_static = document_lengths is None and mask_BT is not None and kind != "cpu" and kernel == "sdpa"
        if document_lengths is not None:
            lengths = host_lengths(document_lengths)
            if (total := sum(lengths)) != B * T or min(lengths, default=1) < 1:
                raise ValueError(f"document_lengths sum to {total}, but the batch has {B} x {T} = {B * T} tokens")
        elif mask_BT is not None and not is_static:
            mask_BT = mask_BT.bool()
            kept_N, lengths = mask_BT.flatten().nonzero().squeeze(1), tuple(mask_BT.sum(1).tolist())
            ids_N = ids_N[kept_N]
        if max(lengths, default=0) > limit:
            raise ValueError(f"a document of {max(lengths)} tokens, but max_position_embeddings is {limit}")
        if is_static:
            return UnpaddedBatch.padded(ids_BT, mask_BT, dropout)
        lengths_n = torch.tensor(lengths, dtype=torch.int64)
        starts_N = (lengths_n.cumsum(0) - lengths_n).repeat_interleave(lengths_n, output_size=len(ids_N))
        positions_N = (torch.arange(len(ids_N)) - starts_N).to(ids_BT.device)  # from 0 in every document
        padding = round_up_tokens(len(ids_N), kind, compute_dtype(ids_BT)) - len(ids_N)
        if padding:
            ids_N, positions_N = (torch.cat((x, x.new_zeros(padding))) for x in (ids_N, positions_N))
        cu_seqlens = None if kernel == "sdpa" else cumulative(lengths, padding).to(ids_BT.device, non_blocking=True)
        longest = max(lengths, default=0)
        layout = Layout(lengths, cu_seqlens, longest, dropout=dropout, kernel=kernel, padding=padding)
        return UnpaddedBatch(ids_N, positions_N, layout, ids_BT.shape, kept_N)

    def encode(
        self, unpadded: UnpaddedBatch, rows_M: Tensor | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states of an unpadded batch: N x D, or M x D of the tokens `rows_M`, which alone go through what follows the
        last block's attention. `states` gets what goes into each block, and the result, as B x T x D each.
        """
        if rows_M is not None and self.is_compiled:  # as many tokens in every batch: nothing is compiled anew
            return self.encode(unpadded).index_select(0, rows_M)
        end, chosen = -unpadded.layout.padding or None, rows_M  # of what is asked for
        if rows_M is not None:  # further copies of the first token, which are left out of the result
            end = len(rows_M)
            size = round_up_tokens(max(1, end), rows_M.device.type, compute_dtype(self.embed_tokens.weight))
            chosen = F.pad(rows_M, (0, size - end))
        config, layout, rotary = self.config, unpadded.layout, None
        x_ND = self.embed_tokens(unpadded.ids_N)
        if is_autocast(x_ND.device.type):  # FSDP2 gathers embeddings in bfloat16; what blocks add to stays float32
            x_ND = x_ND.float()
        if config.rope:
            longest = unpadded.shape[1] if layout.lengths is None else max(layout.max_seqlen, *layout.lengths, 0)
            width = config.hidden_size // config.num_attention_heads
            rotary = Rotary.of(longest, width, unpadded.positions_N, config.rope_theta)
        else:
            x_ND = x_ND + self.embed_positions(unpadded.positions_N + 1)
        x_ND = self.dropout(unit(x_ND).to(x_ND.dtype) if config.ngpt else x_ND)
        for number, block in enumerate(self.layers):
            if states is not None:
                states.append(unpadded.restore(x_ND[:end]))
            wanted = chosen if block is self.layers[-1] else None
            if self.gradient_checkpointing and self.training and number % self.checkpointing_interval == 0:
                x_ND = checkpoint(block, x_ND, rotary, layout, wanted, use_reentrant=False)
            else:
                x_ND = block(x_ND, rotary, layout, wanted)
        x_ND = self.norm(x_ND if end is None else x_ND[:end])
        if states is not None:
            states.append(unpadded.restore(x_ND))
        return x_ND

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_lengths: Lengths = None, **extra: Any
    ) -> BaseModelOutput:
        """Hidden states B x T x D; zero where `attention_mask` is. With `output_hidden_states` also what went into each
        block, B x T x D each, and last the same as `last_hidden_state`. Raises ValueError as `new_states`.
        """
        states = new_states(self.config, extra)
        unpadded = self.flatten(input_ids, attention_mask, document_lengths)
        last = unpadded.restore(self.encode(unpadded, states=states))
        return BaseModelOutput(last_hidden_state=last, hidden_states=None if states is None else tuple(states))

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths = None,
        pooling: Pooling = "mean",
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """One vector per row, or per document of packed rows: n x D in float32. `states` as in `encode`."""
        unpadded = self.flatten(input_ids, attention_mask, document_lengths)
        if not self.training:
            unpadded.layout.granularity = FINE_GRANULARITY
        return unpadded.pool(self.encode(unpadded, states=states), pooling)


class NeoBERTForMaskedLM(NeoBERTPreTrainedModel):
    """The encoder with an untied decoder; the loss of masked-LM pretraining is computed inside."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        if config.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings is true, but NeoBERT's decoder has weights of its own; set it to false"
            )
        self.model = NeoBERT(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.logit_scale = LearnedScale(config.vocab_size, 1.0, config.base_scale) if config.ngpt else None
        self.post_init()

    def decoder_weight(self) -> Tensor:
        """V x D; in nGPT with every token's logit scale multiplied in."""
        weight = self.lm_head.weight
        return weight if self.logit_scale is None else weight * self.logit_scale()[:, None]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths = None,
        labels: Tensor | None = None,
        masked_only: bool = False,
        count_correct: bool = False,
        targets: Tensor | None = None,
        **extra: Any,
    ) -> LossOutput:
        """Logits B x T x V, and with `labels` B x T (-100: no target) losses; with `targets`, the places of M tokens among
        those that are not padding, `labels` are the M of these tokens.

        `masked_only`, as training sets it, computes the same losses from the targets' logits alone and returns no logits.
        `count_correct` also counts the targets that were the likeliest token (an extra pass over the logits).
        """
        states = new_states(self.config, extra)
        unpadded = self.model.flatten(input_ids, attention_mask, document_lengths)
        if labels is not None and targets is None:
            labels_N = unpadded.select(labels)
            targets = (labels_N != IGNORED).nonzero().squeeze(1)
            labels = labels_N[targets]
            self._check_labels(labels)
        if labels is not None and targets is not None and masked_only:
            hidden_MD, decoder = self.model.encode(unpadded, targets), (self.decoder_weight(), self.lm_head.bias)
            loss_sum, num_correct = linear_cross_entropy(hidden_MD, *decoder, labels, count_correct)
            return LossOutput(loss=loss_sum / max(1, len(targets)), loss_sum=loss_sum, num_correct=num_correct)
        hidden_ND = self.model.encode(unpadded, states=states)
        logits_NV = F.linear(hidden_ND, self.decoder_weight(), self.lm_head.bias)
        hidden_states = None if states is None else tuple(states)
        output = LossOutput(logits=unpadded.restore(logits_NV), hidden_states=hidden_states)
        if labels is not None and targets is not None:
            logits_MV = logits_NV.index_select(0, targets)
            output.loss_sum, output.num_correct = full_cross_entropy(logits_MV, labels, count_correct)
            output.loss = output.loss_sum / max(1, len(targets))
        return output

    def _check_labels(self, labels_M: Tensor) -> None:
        """Raises ValueError for one beyond the vocabulary, where looking costs nothing."""
        if labels_M.device.type == "cpu" and len(labels_M):
            least, most = int(labels_M.min()), int(labels_M.max())
            if not 0 <= least <= most < self.config.vocab_size:
                raise ValueError(f"labels go up to {most}, but the vocabulary has {self.config.vocab_size} tokens")


class NeoBERTForSequenceClassification(NeoBERTPreTrainedModel):
    """Pooling, a hidden layer with GELU, and a classifier (or regression with one label): transformers' EuroBERT head."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths = None,
        labels: Tensor | None = None,
        **extra: Any,
    ) -> LossOutput:
        """Logits n x num_labels in float32. `labels` n: class ids, or numbers where there is one label."""
        states = new_states(self.config, extra)
        pooling: Pooling = "cls" if self.config.classifier_pooling == "bos" else self.config.classifier_pooling
        pooled = self.model.embed(input_ids, attention_mask, document_lengths, pooling, states)
        output = classify(self, pooled, labels)
        output.hidden_states = None if states is None else tuple(states)
        return output
