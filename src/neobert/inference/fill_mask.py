"""What a masked language model expects in place of [MASK]."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from neobert.checkpoints.load import load_pretrained
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import DataError, UserError


@dataclass(frozen=True)
class Guesses:
    """Candidates of every mask of a text, likeliest first: (token, probability)."""

    text: str
    masks: list[list[tuple[str, float]]]


@torch.no_grad()
def fill_masks(checkpoint: str | Path, texts: list[str], top: int) -> Iterator[Guesses]:
    """Guesses for each text. Raises DataError for a text without a mask, or one that is too long."""
    model, tokenizer = load_pretrained(str(checkpoint))
    facts = text_tokenizer(tokenizer)
    forbidden = [i for i in facts.special_ids if i < model.config.vocab_size]
    for text in texts:
        if tokenizer.mask_token not in text:
            raise DataError(f"{text!r}: no {tokenizer.mask_token} in it")
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > model.config.max_position_embeddings:
            raise UserError(
                f"the text has {ids.shape[1]} tokens; the model takes {model.config.max_position_embeddings}"
            )
        logits_TV = model(input_ids=ids).logits[0].float()
        logits_TV[:, forbidden] = -torch.inf
        probabilities = logits_TV[ids[0] == tokenizer.mask_token_id].softmax(-1)
        values, indices = probabilities.topk(min(top, facts.num_real), dim=-1)
        yield Guesses(
            text,
            [
                list(zip(tokenizer.convert_ids_to_tokens(i), v.tolist(), strict=True))
                for i, v in zip(indices, values, strict=True)
            ],
        )


def format_guesses(guesses: Guesses) -> str:
    """As lines for a terminal."""
    lines = [guesses.text]
    for number, candidates in enumerate(guesses.masks, 1):
        if len(guesses.masks) > 1:
            lines.append(f"  mask {number}")
        lines += [f"  {probability:6.1%}  {token}" for token, probability in candidates]
    return "\n".join(lines)
