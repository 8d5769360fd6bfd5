"""Pseudo-perplexity: one mask at a time, whatever the batches; and the command."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM

from helpers.checkpoints import OWN_CODE, tiny_model, write_checkpoint
from helpers.commands import run_neobert
from helpers.runs import TEXT
from neobert.checkpoints.layouts import eurobert_config, is_eurobert, to_eurobert
from neobert.cli import models as cli_models
from neobert.data.files.documents import SkippedRows
from neobert.data.files.splits import find_splits
from neobert.errors import DataError, UserError
from neobert.inference.masked_lm import pseudo_perplexity, read_pieces
from neobert.training.runtime import Runtime


def make_pieces(lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(5, 8000, length).astype(np.uint16) for length in lengths]


@torch.no_grad()
def naive(model, tokenizer, piece):
    """Sum of log p of every token, one masked row at a time."""
    total = 0.0
    for place, token in enumerate(piece.tolist()):
        ids = torch.tensor([[tokenizer.cls_id, *piece.tolist(), tokenizer.sep_id]])
        ids[0, place + 1] = tokenizer.mask_id
        total += model(input_ids=ids).logits[0, place + 1].double().log_softmax(-1)[token].item()
    return total


def reference(model):
    """transformers' EuroBERT in float64, where it computes the same; else our model."""
    if not is_eurobert(model.config):
        return model
    special = {"bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}
    theirs = EuroBertForMaskedLM(EuroBertConfig(**eurobert_config(model.config, special)))
    theirs.load_state_dict(to_eurobert(model.state_dict()))
    return theirs.double().eval()


@pytest.mark.parametrize("variant", [{}, {**OWN_CODE}, {"decoder_bias": True}], ids=str)
def test_equals_one_mask_at_a_time(variant, tokenizer):
    """Pieces of 1 to 40 tokens, in batches that cut through them."""
    pieces = make_pieces((1, 2, 40, 5, 17, 1, 33))
    model = tiny_model(**variant)
    results = [pseudo_perplexity(model, tokenizer, pieces, size) for size in (100, 16_384)]
    expected = [naive(reference(model), tokenizer, piece) for piece in pieces]
    for result in results:
        for (value, count), wanted, piece in zip(result.pieces, expected, pieces, strict=True):
            assert count == len(piece)
            assert value == pytest.approx(wanted, rel=1e-4)
        total = math.exp(-sum(expected) / sum(map(len, pieces)))
        assert result.pseudo_perplexity == pytest.approx(total, rel=1e-4)
        assert {bound: len(tally.pieces) for bound, tally in result.buckets.items()} == {16: 4, 32: 1, 64: 2}
        assert sum(tally.num_tokens for tally in result.buckets.values()) == result.num_tokens == 99
    half = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
    half = pseudo_perplexity(model, tokenizer, pieces, autocast=half.autocast)
    assert half.log_likelihood != results[0].log_likelihood
    assert half.log_likelihood == pytest.approx(sum(expected), rel=0.05)


def test_texts_become_pieces(tokenizer, tmp_path):
    """Every token is in one piece; rows without text are counted."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"body": body}) for body in ("peace " * 25, None, "war")))
    files, skips = find_splits(str(tmp_path / "text.jsonl"), None, None, None)[0], SkippedRows()
    pieces, num_texts = read_pieces(files, tokenizer, 10, None, skips)
    assert ([len(piece) for piece in pieces], num_texts, skips.counts) == ([10, 10, 5, 1], 2, {"no text": 1})
    assert len(read_pieces(files, tokenizer, 10, 1, SkippedRows())[0]) == 3
    with pytest.raises(DataError, match="a piece of 600 tokens, but the model takes 510"):
        pseudo_perplexity(tiny_model(), tokenizer, make_pieces([600]))
    told = []
    result = pseudo_perplexity(tiny_model(), tokenizer, pieces, progress=told.append)
    assert (sum(told), "1 to 16" in str(result)) == (26, True)


def test_the_command(tmp_path):
    run = write_checkpoint(tmp_path / "run", tiny_model())
    output = tmp_path / "result.json"
    words = ["pseudo-perplexity", run, TEXT / "validation.txt", "--limit", 5, "--max-length", 40, "-o", output]
    result = run_neobert(*words)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert (found["texts"], found["buckets"][-1]["max_tokens"]) == (5, 64)
    assert f"{found['pseudo_perplexity']:,.3f}" in result.stdout
    before = output.read_bytes()
    kept = run_neobert(*words)
    assert (kept.returncode, kept.stderr.count("\n"), output.read_bytes()) == (2, 1, before)
    again = run_neobert(*words, "--force", "--bf16")
    assert again.returncode == 0, again.stderr
    assert json.loads(output.read_text())["pseudo_perplexity"] == pytest.approx(found["pseudo_perplexity"], rel=0.05)
    with pytest.raises(UserError, match="nothing at '.*absent.txt'"):
        cli_models.pseudo_perplexity(str(run), str(tmp_path / "absent.txt"))
    with pytest.raises(UserError, match="--max-length: 5000, but the model takes 512 tokens"):
        cli_models.pseudo_perplexity(str(run), str(TEXT), max_length=5000)
