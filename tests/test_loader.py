"""The position of the data: a resumed loader gives exactly the batches that an uninterrupted one does."""

import json

import numpy as np
import pytest
import torch
from conftest import TEXT

from neobert.data.batch import Collator
from neobert.data.corpus import open_corpus
from neobert.data.loader import Loader, Pipeline
from neobert.data.masking import Masker
from neobert.data.mixture import Lane
from neobert.data.order import CorpusReader, Pieces, Rank, StreamReader
from neobert.data.packing import OnePerRow, Packer, Segmenter
from neobert.data.prepare import open_tokenized
from neobert.data.rows import RowSource, ShuffleBuffer, Workers
from neobert.data.sources import find_splits, fingerprint
from neobert.errors import CheckpointError, DataError

LENGTH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    files, _ = find_splits(str(TEXT / "validation.txt"), None, None, None)
    return open_tokenized(files, tokenizer, tmp_path_factory.mktemp("store") / "tokens", 1, False, False, False)[0]


def reader(kind, store, rank, path=TEXT / "validation.txt"):
    files, _ = find_splits(str(path), None, None, None)
    if kind == "stream":
        return StreamReader(files, rank)
    return CorpusReader(
        Pieces(store, LENGTH - 2) if kind == "tokens" else open_corpus(files, fingerprint(files)), 3, rank
    )


def make_loader(
    kind,
    store,
    tokenizer,
    packed=True,
    num_workers=0,
    rank=None,
    path=TEXT / "validation.txt",
    lanes=None,
    sources=1,
    **changed,
):
    """A loader of the lanes of `rank`; several `sources` are the same text, drawn 2 : 1."""
    settings = {"shuffle": 50 if kind == "stream" else 0, "num_epochs": None, "exhausted": "repeat", **changed}
    rank = rank or Rank()
    lanes = lanes or rank.world
    workers = Workers(tokenizer, num_workers, persistent=settings.get("persistent", True))
    masker = Masker(1, 0.15, False, tokenizer.mask_id, tokenizer.special_ids, tokenizer.num_real)

    def source(lane):
        return RowSource(
            reader(kind, store, Rank(lane, lanes), path),
            workers,
            Segmenter(LENGTH, "split", tokenizer.cls_id, tokenizer.sep_id),
            Packer(LENGTH) if packed else OnePerRow(),
            ShuffleBuffer(settings["shuffle"], 3),
            num_epochs=settings["num_epochs"],
            min_rows=4 if sources == 1 == lanes else 1,
        )

    owned = range(rank.index, lanes, rank.world)
    weights = [2.0, 1.0][:sources]
    return Loader(
        Pipeline(
            [Lane(n, lanes, [source(n) for _ in range(sources)], weights, settings["exhausted"], 3) for n in owned],
            workers,
            Collator(masker, tokenizer.pad_id, packed, LENGTH),
            batch_size=4,
            seed=3,
            num_batches=settings.get("num_batches"),
        )
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.labels, y.labels)
        assert (x.epoch, x.num_targets, x.num_tokens) == (y.epoch, y.num_targets, y.num_tokens)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["stream", "text", "tokens"])
def test_resume_is_exact_at_any_position(kind, packed, store, tokenizer):
    whole = make_loader(kind, store, tokenizer, packed)
    expected = take(whole, 260)  # more than two epochs
    whole.close()
    assert expected[-1].epoch >= 1
    for position in np.random.default_rng(0).integers(0, 250, 6).tolist():
        first = make_loader(kind, store, tokenizer, packed)
        take(first, position)
        state, arrays = first.state_dict()
        first.close()
        second = make_loader(kind, store, tokenizer, packed)
        second.load_state_dict(json.loads(json.dumps(state)), arrays)
        assert_equal(take(second, 10), expected[position : position + 10])
        second.close()


@pytest.mark.parametrize("kind", ["stream", "text", "tokens"])
def test_resume_is_exact_up_to_the_last_batch(kind, store, tokenizer):
    limits = {"num_epochs": 2, "shuffle": 10**6 if kind == "stream" else 0}  # the buffer empties in one go
    whole = make_loader(kind, store, tokenizer, **limits)
    expected = list(whole)
    whole.close()
    for left in (0, 1, 2, 15, len(expected) - 1):
        first, second = (make_loader(kind, store, tokenizer, **limits) for _ in range(2))
        take(first, len(expected) - left)
        second.load_state_dict(*first.state_dict())
        assert_equal(list(second), expected[len(expected) - left :])
        first.close()
        second.close()


def test_tokenising_processes_change_nothing(store, tokenizer):
    plain, parallel = (make_loader("stream", store, tokenizer, num_workers=n, persistent=False) for n in (0, 2))
    assert_equal(take(plain, 150), take(parallel, 150))
    state, arrays = parallel.state_dict()
    resumed = make_loader("stream", store, tokenizer)
    resumed.load_state_dict(state, arrays)
    assert_equal(take(resumed, 10), take(plain, 10))
    for loader in (plain, parallel, resumed):
        loader.close()


@pytest.mark.parametrize("kind", ["stream", "text", "tokens"])
def test_an_epoch_is_every_token_once(kind, store, tokenizer):
    loader = make_loader(kind, store, tokenizer, num_epochs=1)
    tokens = torch.cat([torch.where(b.labels == -100, b.input_ids, b.labels).flatten() for b in loader])
    loader.close()
    found = np.bincount(tokens[~torch.isin(tokens, torch.tensor([0, 2, 3]))], minlength=tokenizer.num_real)
    expected = np.bincount(np.concatenate(store.fetch(np.arange(len(store)))), minlength=tokenizer.num_real)
    assert np.array_equal(found, expected)


def test_microbatches_are_full_and_lengths_sum(store, tokenizer):
    loader = make_loader("text", store, tokenizer)
    for batch in take(loader, 50):
        assert batch.input_ids.shape == (4, LENGTH)
        assert batch.document_lengths.sum() == 4 * LENGTH
    loader.close()


def test_two_ranks_share_the_rows(store, tokenizer):
    loaders = [make_loader("tokens", store, tokenizer, packed=False, rank=Rank(r, 2)) for r in (0, 1)]
    a, b = (take(loader, 5) for loader in loaders)
    rows = [tuple(row.tolist()) for batch in a + b for row in batch.input_ids]
    assert len(set(rows)) == len(rows)
    for loader in loaders:
        loader.close()


def test_other_data_is_refused(store, tokenizer):
    loader = make_loader("stream", store, tokenizer)
    state, arrays = loader.state_dict()
    for other in (
        make_loader("text", store, tokenizer),
        make_loader("stream", store, tokenizer, path=TEXT / "train.txt"),
    ):
        with pytest.raises(CheckpointError, match="changed"):
            other.load_state_dict(state, arrays)


def test_a_corpus_that_is_too_small_is_an_error(tmp_path, store, tokenizer):
    (tmp_path / "small.txt").write_text("two\nlines\n")
    with pytest.raises(DataError, match="fills 2 rows, fewer than one microbatch of 4"):
        take(make_loader("stream", store, tokenizer, packed=False, path=tmp_path / "small.txt"), 1)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(DataError, match="no document has any text"):
        take(make_loader("stream", store, tokenizer, path=tmp_path / "blank.jsonl"), 1)


def test_a_token_store_fits_one_tokenizer(tmp_path, store, tokenizer):
    from dataclasses import replace

    files, _ = find_splits(str(TEXT / "validation.txt"), None, None, None)
    settings = {"num_proc": 1, "show_bar": False, "in_memory": False, "refuse": False}
    with pytest.raises(DataError, match="another tokenizer"):
        open_tokenized(
            files, replace(tokenizer, json=tokenizer.json.replace("president", "presidant")), store.folder, **settings
        )
    other, _ = find_splits(str(TEXT / "train.txt"), None, None, None)
    with pytest.raises(DataError, match="another text"):
        open_tokenized(other, tokenizer, store.folder, **settings)
