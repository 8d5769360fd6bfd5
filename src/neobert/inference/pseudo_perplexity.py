"""Pseudo-perplexity (arXiv 1910.14659): every token of a text is masked once and predicted from all the others.

PPPL = exp(-(1/N) sum over tokens of log p(token | the rest of its piece)), over all N tokens of a corpus. A text is CLS,
tokens, SEP; one that is longer than the model takes is cut into pieces. Special tokens are not counted.

A piece of n tokens costs n forward passes of n + 2 tokens, so rows of all pieces are sorted by length and computed
`batch_tokens` at a time, and the decoder, like the end of the last block, sees the masked tokens only.

Shapes: B rows, T row length, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from neobert.data.files.documents import Files, SkippedRows, read_text, stream
from neobert.data.files.rows import Unusable
from neobert.data.tokenizer import Ids, TextTokenizer
from neobert.errors import DataError
from neobert.model.loss import LOGIT_BUDGET
from neobert.model.modeling_neobert import NeoBERTForMaskedLM

BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}  # on a CPU larger batches leave the cache: 1.6 times slower at 16,384
TEXTS_AT_ONCE = 256  # tokenised together


@dataclass
class Tally:
    """Sums over pieces: of log p(token), in nats, and of tokens."""

    log_likelihood: float = 0.0
    num_tokens: int = 0
    num_pieces: int = 0

    def add(self, log_likelihood: float, num_tokens: int) -> None:
        self.log_likelihood += log_likelihood
        self.num_tokens += num_tokens
        self.num_pieces += 1

    @property
    def pseudo_perplexity(self) -> float:
        mean = -self.log_likelihood / max(1, self.num_tokens)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass
class Result:
    """`buckets`: the largest length of a bucket, in tokens -> its sums. `pieces`: log-likelihood and tokens of each piece."""

    total: Tally = field(default_factory=Tally)
    buckets: dict[int, Tally] = field(default_factory=dict)
    pieces: list[tuple[float, int]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        def plain(tally: Tally) -> dict[str, Any]:
            return {**tally.__dict__, "pseudo_perplexity": tally.pseudo_perplexity}

        buckets = [{"max_tokens": bound, **plain(tally)} for bound, tally in sorted(self.buckets.items())]
        return {**plain(self.total), "buckets": buckets}


def read_pieces(
    files: Files, tokenizer: TextTokenizer, longest: int, limit: int | None, skips: SkippedRows
) -> tuple[list[Ids], int]:
    """(token ids of pieces of at most `longest` tokens, number of texts).

    `limit` texts are read at most; rows without text are counted in `skips`. Raises DataError where there is no text at all.
    """
    pieces: list[Ids] = []
    num_texts = 0
    for block in _blocks(_texts(files, skips, limit)):
        num_texts += len(block)
        for ids in tokenizer.encode(block):
            pieces += [ids[begin : begin + longest] for begin in range(0, len(ids), longest)]
    if not pieces:
        raise DataError(f"{', '.join(files.paths[:3])}: no text in it{skips.describe(form=' ({})')}")
    return pieces, num_texts


def _texts(files: Files, skips: SkippedRows, limit: int | None) -> Iterator[str]:
    count = 0
    for row, begin, _ in stream(files, files.start, files.stop):
        text = read_text(files, row, begin)
        if isinstance(text, Unusable):
            skips.add(text)
            continue
        if limit is not None and count >= limit:
            return
        count += 1
        yield text


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == TEXTS_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def pseudo_perplexity(
    model: NeoBERTForMaskedLM,
    tokenizer: TextTokenizer,
    pieces: list[Ids],
    batch_tokens: int | None = None,
    tell: Callable[[int], object] = lambda n: None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Of all pieces, `batch_tokens` computed at a time (None: by device) inside `autocast()`; `tell` is told how many tokens
    were predicted.

    Raises DataError for a piece that is too long.
    """
    longest = model.config.max_position_embeddings - 2
    if wrong := next((len(piece) for piece in pieces if len(piece) > longest), None):
        raise DataError(f"a piece of {wrong} tokens, but the model takes {longest} and two special ones")
    batch_tokens = batch_tokens or BATCH_TOKENS[model.lm_head.weight.device.type]
    sums = np.zeros(len(pieces))
    rows = [np.array([tokenizer.cls_id, *piece.tolist(), tokenizer.sep_id]) for piece in pieces]
    most_rows = max(1, LOGIT_BUDGET // model.config.vocab_size)
    for numbers, places in _batches([len(piece) for piece in pieces], batch_tokens, most_rows):
        with autocast():
            scores = _log_likelihoods(model, tokenizer, [rows[number] for number in numbers], places)
        np.add.at(sums, numbers, scores)
        tell(len(numbers))
    result = Result()
    for piece, value in zip(pieces, sums.tolist(), strict=True):
        bound = 2 ** max(4, math.ceil(math.log2(len(piece))))
        for tally in (result.total, result.buckets.setdefault(bound, Tally())):
            tally.add(value, len(piece))
        result.pieces.append((value, len(piece)))
    return result


def _batches(lengths: list[int], batch_tokens: int, most_rows: int) -> Iterator[tuple[list[int], list[int]]]:
    """(piece, token in it that is masked) of the rows of a batch, longest pieces first."""
    numbers: list[int] = []
    places: list[int] = []
    most = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        for place in range(lengths[number]):
            if not numbers:
                most = max(1, min(most_rows, batch_tokens // (lengths[number] + 2)))
            numbers.append(number)
            places.append(place)
            if len(numbers) == most:
                yield numbers, places
                numbers, places = [], []
    if numbers:
        yield numbers, places


@torch.inference_mode()
def _log_likelihoods(
    model: NeoBERTForMaskedLM, tokenizer: TextTokenizer, rows: list[Ids], places: list[int]
) -> np.ndarray:
    """log p of a token of every row (`places` do not count CLS) given the rest of it, in nats: float64."""
    device = model.lm_head.weight.device
    lengths_B = torch.tensor([len(row) for row in rows])
    ids = np.full((len(rows), int(lengths_B.max())), tokenizer.pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    ids_BT = torch.from_numpy(ids)
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    row_B, place_B = torch.arange(len(rows)), torch.tensor(places) + 1
    true_B = ids_BT[row_B, place_B].to(device)
    is_target_BT = torch.zeros_like(mask_BT)
    is_target_BT[row_B, place_B] = True
    ids_BT[is_target_BT] = tokenizer.mask_id
    flat = model.model.flatten(ids_BT.to(device), mask_BT.to(device))
    hidden_BD = model.model.encode(flat, flat.select(is_target_BT.to(device)).nonzero().squeeze(1))
    logits_BV = F.linear(hidden_BD, model.decoder_weight(), model.lm_head.bias).float()
    true_scores_B = logits_BV.gather(1, true_B[:, None]).squeeze(1)
    return (true_scores_B - logits_BV.logsumexp(1)).double().cpu().numpy()


def format_result(result: Result, num_texts: int) -> str:
    """As a table for a terminal."""
    lines = [f"{'piece length':<14}{'pieces':>10}{'tokens':>12}{'pseudo-perplexity':>20}"]
    for bound, tally in sorted(result.buckets.items()):
        shortest = 1 if bound == 16 else bound // 2 + 1
        name = f"{shortest} to {bound}"
        lines.append(f"{name:<14}{tally.num_pieces:>10,}{tally.num_tokens:>12,}{tally.pseudo_perplexity:>20,.3f}")
    total = result.total
    lines.append(f"{'all':<14}{total.num_pieces:>10,}{total.num_tokens:>12,}{total.pseudo_perplexity:>20,.3f}")
    return "\n".join([*lines, f"{num_texts:,} texts; perplexities are of tokens of this tokenizer"])
