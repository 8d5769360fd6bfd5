"""Rows: every token once, none too long, and nearly full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.runs import TEXT
from neobert.data.mlm.readers import Segmenter, TruncationStats
from neobert.data.mlm.row_source import Packer


def documents(lengths):
    return [np.arange(10, 10 + n, dtype=np.uint16) for n in lengths]


def pack(lengths, row_length, policy="split"):
    segmenter, packer, cut = Segmenter(row_length, policy, 1, 2), Packer(row_length), TruncationStats()
    pieces, again = segmenter.pieces(documents(lengths), cut), TruncationStats()
    one_by_one = [piece for document in documents(lengths) for piece in segmenter.pieces([document], again)]
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in one_by_one]
    assert again == cut
    rows = [row for piece in pieces for row in packer.add(piece, 0)]
    return rows + packer.flush(), cut


@given(st.lists(st.integers(0, 200), max_size=150), st.integers(8, 80))
def test_every_token_once(lengths, row_length):
    rows, cut = pack(lengths, row_length)
    assert all(3 <= row.num_tokens <= row_length for row in rows)
    pieces = [piece for row in rows for piece in row.pieces]
    assert all(piece[0] == 1 and piece[-1] == 2 for piece in pieces)
    tokens = sorted(token for piece in pieces for token in piece[1:-1])
    assert tokens == sorted(token for document in documents(lengths) for token in document)
    assert cut.num_cut == 0


@pytest.mark.parametrize(("policy", "kept"), [("truncate", [6, 6, 3]), ("drop", [6, 3])])
def test_policies_for_long_documents(policy, kept):
    rows, cut = pack([6, 20, 3], 8, policy)
    assert sorted(len(p) - 2 for row in rows for p in row.pieces) == sorted(kept)
    assert cut.num_cut == 29 - sum(kept)
    assert cut.num_documents == 3


def test_shipped_text_fills_rows(tokenizer):
    """The bar: at 512 tokens at least 99 % are real."""
    lines = (TEXT / "train.txt").read_text().splitlines()
    segmenter, packer, cut = Segmenter(512, "split", tokenizer.cls_id, tokenizer.sep_id), Packer(512), TruncationStats()
    rows = [
        row for ids in tokenizer.encode(lines) for piece in segmenter.pieces([ids], cut) for row in packer.add(piece, 0)
    ]
    assert sum(row.num_tokens for row in rows) / (512 * len(rows)) >= 0.99


def test_open_rows_are_its_state():
    a, b = Packer(64), Packer(64)
    pieces = documents(np.random.default_rng(0).integers(3, 60, 200))
    for piece in pieces[:100]:
        a.add(piece, 0)
    b.load_state_dict(a.state_dict())
    for piece in pieces[100:]:
        assert [[len(p) for p in row.pieces] for row in a.add(piece, 1)] == [
            [len(p) for p in row.pieces] for row in b.add(piece, 1)
        ]
