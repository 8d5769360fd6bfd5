"""What a masked language model predicts: candidates for [MASK], and the pseudo-perplexity of text (arXiv 1910.14659).

PPPL = exp(-(1/N) sum over tokens of log p(token | the rest of its piece)), over all N tokens of a corpus. A text is CLS,
tokens, SEP; one that is longer than the model takes is cut into pieces. Special tokens are not counted. A piece of n tokens
costs n forward passes of n + 2 tokens, so the inputs of all pieces are sorted by length, and the decoder, like the end of the
last block, sees the masked tokens only.

Shapes: B inputs, each with one masked token, T tokens of the longest, D width, V vocabulary.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from neobert.checkpoints.load import load_pretrained
from neobert.data.files.documents import Files, SkippedRows, blocks_of, texts_of
from neobert.data.files.splits import find_hub_splits, find_splits
from neobert.data.tokenizer import Ids, TextTokenizer, text_tokenizer
from neobert.errors import DataError, UserError, print_notes
from neobert.inference.embed import Progress, batches_by_length
from neobert.model.kernels import LOGIT_BUDGET
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.training.runtime import build_runtime

BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}  # on a CPU larger batches leave the cache: 1.6 times slower at 16,384
SHORTEST_BUCKET = 16  # tokens of the pieces that the table's first line counts; those after it double


# --- fill-mask -----------


@dataclass(frozen=True)
class Guesses:
    """Candidates of every mask of a text, likeliest first: (token, probability)."""

    text: str
    masks: list[list[tuple[str, float]]]

    def __str__(self) -> str:
        lines = [self.text]
        for number, candidates in enumerate(self.masks, 1):
            lines += [f"  mask {number}"] if len(self.masks) > 1 else []
            lines += [f"  {probability:6.1%}  {token}" for token, probability in candidates]
        return "\n".join(lines)


@torch.no_grad()
def fill_masks(checkpoint: str | Path, texts: list[str], top: int) -> Iterator[Guesses]:
    """Guesses for each text. Raises DataError for a text without a mask, UserError for one that is too long."""
    model, tokenizer = load_pretrained(str(checkpoint))
    facts, longest = text_tokenizer(tokenizer), model.config.max_position_embeddings
    forbidden = [i for i in facts.special_ids if i < model.config.vocab_size]
    for text in texts:
        if tokenizer.mask_token not in text:
            raise DataError(f"{text!r}: no {tokenizer.mask_token} in it")
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > longest:
            raise UserError(f"the text has {ids.shape[1]} tokens; the model takes {longest}")
        logits_TV = model(input_ids=ids).logits[0].float()
        logits_TV[:, forbidden] = -torch.inf
        found = logits_TV[ids[0] == tokenizer.mask_token_id].softmax(-1).topk(min(top, facts.num_real), dim=-1)
        tokens = [tokenizer.convert_ids_to_tokens(indices) for indices in found.indices]
        yield Guesses(text, [list(zip(*one, strict=True)) for one in zip(tokens, found.values.tolist(), strict=True)])


# --- pseudo-perplexity -----------


@dataclass(frozen=True)
class Result:
    """`pieces` are (log-likelihood in nats, number of tokens) of each piece."""

    pieces: list[tuple[float, int]]

    @cached_property
    def log_likelihood(self) -> float:
        return sum(value for value, _ in self.pieces)

    @cached_property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def pseudo_perplexity(self) -> float:
        mean = -self.log_likelihood / max(1, self.num_tokens)
        return math.exp(mean) if mean < 700 else math.inf

    @cached_property
    def buckets(self) -> dict[int, "Result"]:
        """The pieces by length: the largest number of tokens of a bucket -> its pieces, shortest first."""
        by_bound: dict[int, list[tuple[float, int]]] = {}
        for piece in self.pieces:
            by_bound.setdefault(max(SHORTEST_BUCKET, 1 << (piece[1] - 1).bit_length()), []).append(piece)
        return {bound: Result(pieces) for bound, pieces in sorted(by_bound.items())}

    def sums(self) -> dict[str, float]:
        """What the pieces come to, as JSON has it."""
        found = {"log_likelihood": self.log_likelihood, "num_tokens": self.num_tokens, "num_pieces": len(self.pieces)}
        return {**found, "pseudo_perplexity": self.pseudo_perplexity}

    def as_json(self) -> dict[str, Any]:
        buckets = [{"max_tokens": bound, **one.sums()} for bound, one in self.buckets.items()]
        return {**self.sums(), "buckets": buckets}

    def __str__(self) -> str:
        """The table for a terminal."""
        lines = [f"{'piece length':<14}{'pieces':>10}{'tokens':>12}{'pseudo-perplexity':>20}"]
        for bound, one in [*self.buckets.items(), (0, self)]:
            shortest = 1 if bound == SHORTEST_BUCKET else bound // 2 + 1
            name = f"{shortest} to {bound}" if bound else "all"
            lines.append(f"{name:<14}{len(one.pieces):>10,}{one.num_tokens:>12,}{one.pseudo_perplexity:>20,.3f}")
        return "\n".join(lines)


def predict_corpus(
    checkpoint: str, source: str, split: str | None = None, text_column: str | None = None, max_length: int | None = None,
    limit: int | None = None, batch_tokens: int | None = None, bf16: bool = False,
) -> tuple[Result, int]:  # fmt: skip
    """(result, number of texts) of a path, a glob or a dataset of the hub, on the GPU where there is one, with a progress
    bar. `max_length` tokens of a piece count the special ones. Raises UserError.
    """
    model, hf_tokenizer = load_pretrained(checkpoint)
    runtime = build_runtime(use_cpu=False, mixed_precision="bf16" if bf16 else "no", tf32=False, trains=False)
    runtime.set_attention(model, "flash_attn_varlen")
    model.to(runtime.device)
    print_notes(filter(None, [runtime.note]))
    longest = model.config.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise UserError(f"--max-length: {max_length}, but the model takes {longest} tokens")
    if not Path(source).exists() and source.count("/") <= 1 and not Path(source).suffix and not has_magic(source):
        files, _ = find_hub_splits(source, None, False, text_column, split, None)
    else:
        files, _ = find_splits(source, text_column, split, None)
    tokenizer, skips = text_tokenizer(hf_tokenizer), SkippedRows()
    pieces, num_texts = read_pieces(files, tokenizer, (max_length or longest) - 2, limit, skips)
    total = sum(map(len, pieces))
    with tqdm(total=total, unit="token", disable=not os.isatty(2), leave=False, dynamic_ncols=True) as bar:
        result = pseudo_perplexity(model, tokenizer, pieces, batch_tokens, bar.update, runtime.autocast)
    print_notes(filter(None, [skips.describe()]))
    return result, num_texts


def read_pieces(
    files: Files, tokenizer: TextTokenizer, longest: int, limit: int | None, skips: SkippedRows
) -> tuple[list[Ids], int]:
    """(token ids of pieces of at most `longest` tokens, number of texts). `limit` texts are read at most; rows without text
    are counted in `skips`. Raises DataError where there is no text at all.
    """
    pieces: list[Ids] = []
    num_texts = 0
    for block in blocks_of(islice(texts_of(files, skips), limit)):
        num_texts += len(block)
        for ids in tokenizer.encode(block):
            pieces += [ids[begin : begin + longest] for begin in range(0, len(ids), longest)]
    if not pieces:
        raise DataError(f"{', '.join(files.paths[:3])}: no text in it{skips.describe(form=' ({})')}")
    return pieces, num_texts


def pseudo_perplexity(
    model: NeoBERTForMaskedLM, tokenizer: TextTokenizer, pieces: list[Ids], batch_tokens: int | None = None,
    progress: Progress = lambda n: None, autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:  # fmt: skip
    """The log-likelihoods of all pieces, `batch_tokens` computed at a time (None: by device) inside `autocast()`. `progress`
    gets the number of tokens of each batch. Raises DataError for a piece that is too long.
    """
    longest = model.config.max_position_embeddings - 2
    if wrong := next((len(piece) for piece in pieces if len(piece) > longest), None):
        raise DataError(f"a piece of {wrong} tokens, but the model takes {longest} and two special ones")
    batch_tokens = batch_tokens or BATCH_TOKENS[model.lm_head.weight.device.type]
    most = max(1, LOGIT_BUDGET // model.config.vocab_size)
    inputs = [torch.tensor([tokenizer.cls_id, *piece.tolist(), tokenizer.sep_id]) for piece in pieces]
    lengths = [len(piece) for piece in pieces]
    piece_of = np.repeat(np.arange(len(pieces)), lengths)  # of every masked token
    token_of = np.concatenate([np.arange(1, length + 1) for length in lengths]) if pieces else piece_of
    sums = np.zeros(len(pieces))
    for batch in batches_by_length(np.repeat(lengths, lengths) + 2, batch_tokens, most):
        with autocast():
            found = _log_likelihoods(model, tokenizer, [inputs[i] for i in piece_of[batch]], token_of[batch])
        np.add.at(sums, piece_of[batch], found)
        progress(len(batch))
    return Result(list(zip(sums.tolist(), lengths, strict=True)))


@torch.inference_mode()
def _log_likelihoods(
    model: NeoBERTForMaskedLM, tokenizer: TextTokenizer, inputs: list[torch.Tensor], masked: np.ndarray
) -> np.ndarray:
    """log p of the token at an index of every input given the rest of it, in nats: B, float64."""
    device = model.lm_head.weight.device
    ids_BT = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=tokenizer.pad_id)
    mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(ids) for ids in inputs])[:, None]
    is_target_BT = torch.zeros_like(mask_BT)
    is_target_BT[torch.arange(len(inputs)), torch.from_numpy(masked)] = True
    true_B = ids_BT[is_target_BT].to(device)
    ids_BT[is_target_BT] = tokenizer.mask_id
    flat = model.model.flatten(ids_BT.to(device), mask_BT.to(device))
    hidden_BD = model.model.encode(flat, flat.select(is_target_BT.to(device)).nonzero().squeeze(1))
    logits_BV = F.linear(hidden_BD, model.decoder_weight(), model.lm_head.bias).float()
    true_logits_B = logits_BV.gather(1, true_B[:, None]).squeeze(1)
    return (true_logits_B - logits_BV.logsumexp(1)).double().cpu().numpy()
