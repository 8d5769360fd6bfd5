"""The position of the data: a resumed loader gives exactly the batches that an uninterrupted one does."""

import json

import numpy as np
import pytest
import torch

from helpers.runs import TEXT
from neobert.data.batch import RowLayout
from neobert.data.files.documents import fingerprint, open_corpus
from neobert.data.files.splits import find_splits
from neobert.data.files.token_store import TokenStore, tokenize_files
from neobert.data.hashing import choose_sources
from neobert.data.mlm.pipeline import Collator, MaskedLoader, Masker, join_positions, shards_of
from neobert.data.mlm.readers import Pieces, Reader, Segmenter
from neobert.data.mlm.row_source import Packer, RowSource, Shard, ShuffleBuffer, Workers
from neobert.errors import CheckpointError, DataError
from neobert.ranks import Ranks

LENGTH = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    files, _ = find_splits(str(TEXT / "validation.txt"), None, None, None)
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize_files(files, tokenizer, folder, 1, False)
    return TokenStore(folder)


def reader(kind, store, rank, path=TEXT / "validation.txt"):
    files, _ = find_splits(str(path), None, None, None)
    if kind == "stream":
        return Reader(files, ranks=rank)
    return Reader(Pieces(store, LENGTH - 2) if kind == "tokens" else open_corpus(files, fingerprint(files)), 3, rank)


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
    rank = rank or Ranks()
    lanes = lanes or rank.world_size
    workers = Workers(tokenizer, num_workers, persistent=settings.get("persistent", True))
    masker = Masker(1, 0.15, False, tokenizer.mask_id, tokenizer.special_ids, tokenizer.num_real)

    def source(lane):
        return RowSource(
            reader(kind, store, Ranks(lane, lanes), path),
            workers,
            Segmenter(LENGTH, "split", tokenizer.cls_id, tokenizer.sep_id),
            Packer(LENGTH if packed else 0),
            ShuffleBuffer(settings["shuffle"], 3),
            num_epochs=settings["num_epochs"],
            min_rows=4 if sources == 1 == lanes else 1,
        )

    owned = range(rank.rank, lanes, rank.world_size)
    weights = [2.0, 1.0][:sources]
    return MaskedLoader(
        [Shard(n, lanes, [source(n) for _ in range(sources)], weights, settings["exhausted"], 3) for n in owned],
        workers,
        Collator(masker, RowLayout(tokenizer.pad_id, packed, LENGTH)),
        batch_size=4,
        seed=3,
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.labels, y.labels)
        assert (x.epoch, x.num_targets, x.num_tokens) == (y.epoch, y.num_targets, y.num_tokens)


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["stream", "text", "tokens"])
def test_resume_is_exact_at_any_position(kind, packed, sources, store, tokenizer):
    """20 positions in more than two epochs; every document is used once an epoch."""
    first = make_loader(kind, store, tokenizer, packed, sources=sources)
    positions = sorted(np.random.default_rng(0).integers(0, 250 * sources, 20).tolist())
    expected, states = [], {}
    for number in range(positions[-1] + 11):
        if number in positions:
            states[number] = json.dumps(first.state_dict()[0]), first.state_dict()[1]
        expected += take(first, 1)
    first.close()
    assert expected[-1].epoch >= 1
    for position, (state, arrays) in states.items():
        second = make_loader(kind, store, tokenizer, packed, sources=sources)
        second.load_state_dict(json.loads(state), arrays)
        assert_equal(take(second, 10), expected[position : position + 10])
        second.close()


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("kind", ["stream", "text"])
def test_resume_is_exact_with_processes(kind, sources, store, tokenizer):
    """Saved and resumed with two processes, and with another number of them."""
    whole = make_loader(kind, store, tokenizer, sources=sources)
    expected = take(whole, 130)
    whole.close()
    parallel = make_loader(kind, store, tokenizer, num_workers=2, sources=sources)
    assert_equal(take(parallel, 120), expected[:120])
    for workers in (2, 0):
        second = make_loader(kind, store, tokenizer, num_workers=workers, sources=sources)
        second.load_state_dict(*parallel.state_dict())
        assert_equal(take(second, 10), expected[120:])
        second.close()
    parallel.close()


@pytest.mark.parametrize("kind", ["stream", "text", "tokens"])
def test_no_document_is_read_twice_nor_lost(kind, store, tokenizer):
    """The documents before a position and those behind it are the corpus."""
    for position in (0, 7, 33):
        first, second = (make_loader(kind, store, tokenizer, num_epochs=1) for _ in range(2))
        batches = take(first, position)
        second.load_state_dict(*first.state_dict())
        batches += list(second)
        cut = second.position["shards"][0]["sources"][0]["cut"]
        assert cut["num_documents"] == len(Pieces(store, LENGTH - 2) if kind == "tokens" else store)
        assert tokens_of(batches) == tokens_of([store])
        first.close()
        second.close()


def tokens_of(batches):
    """How often each token occurs in the text of batches, or in a store."""
    if not hasattr(batches[0], "labels"):
        found = np.concatenate(batches[0].fetch(np.arange(len(batches[0]))))
        return np.bincount(found, minlength=8192).tolist()
    tokens = torch.cat([torch.where(b.labels == -100, b.input_ids, b.labels).flatten() for b in batches])
    return np.bincount(tokens[~torch.isin(tokens, torch.tensor([0, 2, 3]))], minlength=8192).tolist()


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


def test_tokenising_threads_change_nothing(store, tokenizer):
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
    assert tokens_of(list(loader)) == tokens_of([store])
    loader.close()


def test_microbatches_are_full_and_lengths_sum(store, tokenizer):
    loader = make_loader("text", store, tokenizer)
    for batch in take(loader, 50):
        assert batch.input_ids.shape == (4, LENGTH)
        assert sum(batch.document_lengths) == 4 * LENGTH
    loader.close()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["stream", "text"])
def test_ranks_read_disjoint_documents_and_count_their_batches(kind, packed, tmp_path, store, tokenizer):
    """Uneven files: the union of what three ranks read is the corpus, nothing twice, in as many batches as were counted."""
    lines = (TEXT / "validation.txt").read_text().splitlines()
    for name, part in (("a", lines[:3]), ("b", lines[3:200]), ("c", lines[200:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    settings = {"num_epochs": 1, "path": tmp_path, "packed": packed}
    ranks = [Ranks(number, 3) for number in range(3)]
    counts = [make_loader(kind, store, tokenizer, rank=rank, **settings).count_batches() for rank in ranks]
    loaders = [make_loader(kind, store, tokenizer, rank=rank, **settings) for rank in ranks]
    batches = [list(loader) for loader in loaders]
    assert [len(one) for one in batches] == counts
    assert tokens_of([batch for one in batches for batch in one]) == tokens_of([store])
    assert sum(
        loader.position["shards"][n]["sources"][0]["cut"]["num_documents"] for n, loader in enumerate(loaders)
    ) == len(lines)


def test_lanes_of_one_rank_end_together(tmp_path, store, tokenizer):
    """The one that has ended gives empty batches in its turn, as another process would; then there are only empty ones."""
    (tmp_path / "one.txt").write_text("\n".join(["the only document of this corpus"] * 9))
    settings = {"num_epochs": 1, "path": tmp_path, "packed": False}
    both = make_loader("stream", store, tokenizer, lanes=2, **settings)
    batches = list(both)
    assert [int((batch.attention_mask.sum(1) > 2).sum()) for batch in batches] == [4, 4, 1, 0]
    for number in range(2):
        alone = make_loader("stream", store, tokenizer, rank=Ranks(number, 2), **settings)
        turns = [*alone, alone.empty_batch()][:2]
        assert_equal(turns, batches[number::2])
        assert batches[3].num_targets == 0


@pytest.mark.parametrize("kind", ["stream", "tokens"])
def test_lanes_are_dealt_anew_to_another_number_of_ranks(kind, store, tokenizer):
    """4 lanes: saved by 2 ranks, continued by 1, 2 and 4; the microbatches are those of 4 ranks, row for row."""
    settings = {"lanes": 4, "packed": True}

    def turns(loaders, count):
        """The batches of `count` turns, by lane."""
        lanes = [lane.index for loader in loaders for lane in loader.shards]
        taken = [batch for loader in loaders for batch in take(loader, count * len(loader.shards))]
        per_rank = [len(loader.shards) for loader in loaders]
        out, start = {}, 0
        for width in per_rank:
            part = taken[start * count : (start + width) * count]
            out |= {lanes[start + n]: part[n::width] for n in range(width)}
            start += width
        return [batch for lane in sorted(out) for batch in out[lane]]

    def make(world):
        return [make_loader(kind, store, tokenizer, rank=Ranks(r, world), **settings) for r in range(world)]

    four = make(4)
    turns(four, 6)
    expected = turns(four, 5)
    two = make(2)
    turns(two, 6)
    saved = join_positions([loader.state_dict() for loader in two])
    for world in (1, 2, 4):
        loaders = make(world)
        for loader in loaders:
            loader.load_state_dict(*saved)
        assert_equal(turns(loaders, 5), expected)
        for loader in loaders:
            loader.close()
    with pytest.raises(CheckpointError, match="dealt to 4 shards, which 3 processes cannot share equally"):
        shards_of(Ranks(0, 3), 4)
    with pytest.raises(CheckpointError, match="dealt to 4 shards when the checkpoint was written, and 3 processes"):
        make_loader(kind, store, tokenizer, rank=Ranks(0, 3), lanes=3).load_state_dict(*saved)
    take(two[0], 1)
    (middle,) = make(1)  # in the middle of a turn: it goes on with the first lane
    middle.load_state_dict(*join_positions([loader.state_dict() for loader in two]))
    assert torch.equal(take(middle, 1)[0].input_ids, take(two[0], 2)[1].input_ids)
    for loader in (*two, *four, middle):
        loader.close()


def test_a_mixture_honours_its_weights():
    weights = [5.0, 0.01, 3.0, 1.99]
    for rows in (np.arange(100_000), np.arange(3, 800_000, 8), np.arange(10**9, 10**9 + 100_000)):
        counts = np.bincount(choose_sources(rows, weights, 7), minlength=4)
        assert np.abs(counts / len(rows) - np.array(weights) / sum(weights)).max() < 0.0005
    assert (choose_sources(np.arange(1000), [0.0, 1.0, 0.0], 7) == 1).all()
    assert not np.array_equal(choose_sources(np.arange(1000), weights, 7), choose_sources(np.arange(1000), weights, 8))


@pytest.mark.parametrize("policy", ["drop", "stop"])
def test_a_source_that_runs_dry(policy, store, tokenizer):
    """`drop` reads all of both; `stop` ends when the one that is drawn more often has been read; both resume exactly."""
    settings = {"sources": 2, "num_epochs": 1, "packed": False, "exhausted": policy}
    loader = make_loader("tokens", store, tokenizer, **settings)
    expected = list(loader)
    size = len(Pieces(store, LENGTH - 2))
    rows = sum(len(batch.input_ids) for batch in expected)
    assert rows == 2 * size if policy == "drop" else 1.49 * size < rows < 1.51 * size
    for left in (0, 1, len(expected) // 4, len(expected) // 2):
        first, second = (make_loader("tokens", store, tokenizer, **settings) for _ in range(2))
        take(first, len(expected) - left)
        second.load_state_dict(*first.state_dict())
        assert_equal(list(second), expected[len(expected) - left :])
        first.close()
        second.close()


def test_streamed_and_materialised_rows_are_the_same(store, tokenizer):
    """Unshuffled, from the same seed."""
    loaders = [make_loader(kind, store, tokenizer, shuffle=0) for kind in ("stream", "text", "tokens")]
    for loader in loaders[1:]:
        loader.shards[0].sources[0].reader.seed = None
    a, b, c = (take(loader, 150) for loader in loaders)
    assert_equal(a, b)
    assert_equal(a, c)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("num_documents", [1, 5, 40])
def test_corpora_shorter_than_everything(num_documents, tmp_path, store, tokenizer):
    """Shorter than the shuffle buffer, the look-ahead and a block: an epoch is still every document once."""
    (tmp_path / "a.txt").write_text("\n".join(f"document number {n} of a few" for n in range(num_documents)))
    loader = make_loader("stream", store, tokenizer, shuffle=1000, path=tmp_path, packed=False, lanes=2, rank=Ranks(0, 1),
                         num_epochs=3)  # fmt: skip
    if num_documents == 1:
        with pytest.raises(DataError, match="empty"):  # one lane has nothing
            list(loader)
    else:
        rows = [
            tuple(row.tolist())
            for batch in loader
            for row in torch.where(batch.labels == -100, batch.input_ids, batch.labels)
            if (row != tokenizer.pad_id).sum() > 2  # not one of a lane that has ended
        ]
        assert len(rows) == 3 * num_documents
        assert len(set(rows)) == num_documents
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
    settings = {"num_proc": 1, "show_bar": False}
    with pytest.raises(DataError, match="another tokenizer"):
        tokenize_files(
            files, replace(tokenizer, json=tokenizer.json.replace("president", "presidant")), store.folder, **settings
        )
    other, _ = find_splits(str(TEXT / "train.txt"), None, None, None)
    with pytest.raises(DataError, match="another text"):
        tokenize_files(other, tokenizer, store.folder, **settings)
