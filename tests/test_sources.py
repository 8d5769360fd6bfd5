"""Every format gives the same documents, streamed or at random; what cannot be read is named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from neobert.data.order import CorpusReader, Pieces, Rank, StreamReader, Subset, permute
from neobert.data.sources import Position, find_splits, open_corpus, stream
from neobert.data.token_store import TokenStore, write_token_store
from neobert.errors import DataError

TEXTS = [f"document {number} " + "word " * (number % 7) for number in range(50)]


def write(folder, kind, texts=TEXTS):
    folder.mkdir(exist_ok=True)
    if kind == "txt":
        (folder / "train.txt").write_text("\n".join([*texts[:20], "", "   ", *texts[20:]]))
    elif kind == "jsonl":
        (folder / "train.jsonl").write_text(
            "".join(json.dumps({"text": t, "n": 1, "title": "x"}) + "\n" for t in texts)
        )
    elif kind == "parquet":
        pa.parquet.write_table(
            pa.table({"body": texts, "n": list(range(len(texts)))}), folder / "train.parquet", row_group_size=8
        )
    else:
        Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "saved"])
def test_formats_agree(tmp_path, kind):
    files, evaluation = find_splits(str(write(tmp_path / "data", kind)), None, None, None)
    assert evaluation is None
    rows = list(stream(files, Position()))
    assert [text.strip() for text, _ in rows] == [text.strip() for text in TEXTS]
    for place in (0, 13, 49):
        assert [text for text, _ in stream(files, rows[place][1])] == [text for text, _ in rows[place + 1 :]]
    corpus = open_corpus(files, in_memory=False, cache_dir=str(tmp_path / "cache"))
    chosen = np.array([49, 0, 20, 20])
    assert len(corpus) == 50
    assert [text.strip() for text in corpus.fetch(chosen)] == [TEXTS[i].strip() for i in chosen]
    assert corpus.fetch(chosen) == open_corpus(files, in_memory=True, cache_dir=None).fetch(chosen)


def test_splits_are_found_by_name(tmp_path):
    for name in ("train-00000.txt", "train-00001.txt", "validation.txt", "test.txt"):
        (tmp_path / name).write_text("some text\n")
    train, evaluation = find_splits(str(tmp_path), None, None, None)
    assert [p[-9:-4] for p in train.paths] == ["00000", "00001"]
    assert evaluation.paths[0].endswith("validation.txt")
    assert find_splits(str(tmp_path), None, None, "test")[1].paths[0].endswith("test.txt")
    assert len(find_splits(str(tmp_path / "*.txt"), None, None, None)[0].paths) == 2
    DatasetDict(
        {"train": Dataset.from_dict({"text": TEXTS}), "dev": Dataset.from_dict({"text": TEXTS[:3]})}
    ).save_to_disk(tmp_path / "d")
    train, evaluation = find_splits(str(tmp_path / "d"), None, None, None)
    assert len(open_corpus(evaluation, False, None)) == 3


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.txt", b"fine\nbad \xff\xfe\n", None, r"a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', None, "a.jsonl:3: column 'text' holds int"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', None, "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", None, "expected an object"),
        ("a.jsonl", b"", None, "empty file"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', None, "has several: a, b"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "c", "no column 'c'"),
        ("a.parquet", b"PAR1 not really", None, "a.parquet: cannot be read"),
        ("a.pdf", b"x", None, "no .txt, .jsonl, .parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, column, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(stream(find_splits(str(tmp_path), column, None, None)[0], Position()))


def test_missing_paths_are_named(tmp_path):
    for path, words in (
        ("", "not set"),
        (str(tmp_path / "absent"), "nothing at"),
        (str(tmp_path / "*.txt"), "nothing at"),
    ):
        with pytest.raises(DataError, match=words):
            find_splits(path, None, None, None)


def test_kinds_of_files_are_not_mixed(tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"split train mixes .jsonl and .txt"):
        find_splits(str(tmp_path), None, None, None)
    assert find_splits(str(tmp_path / "*.jsonl"), None, None, None)[0].column == "text"


def test_fingerprint_follows_content(tmp_path):
    files, _ = find_splits(str(write(tmp_path / "data", "txt")), None, None, None)
    before = files.fingerprint
    assert files.fingerprint == before
    write(tmp_path / "data", "txt", [*TEXTS[:-1], "changed"])
    assert files.fingerprint != before


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permutation(size):
    order = permute(np.arange(size), size, 7)
    assert sorted(order) == list(range(size))
    assert np.array_equal(permute(np.array([size - 1]), size, 7), order[-1:])
    if size >= 63:
        assert not np.array_equal(order, permute(np.arange(size), size, 8))


def test_permutation_of_a_billion_is_direct():
    places = np.array([0, 1, 10**9 - 1])
    assert (permute(places, 10**9, 1) < 10**9).all()


@pytest.mark.parametrize("kind", ["stream", "corpus"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_read_each_document_once(tmp_path, kind, world):
    files, _ = find_splits(str(write(tmp_path / "data", "jsonl")), None, None, None)
    corpus = open_corpus(files, True, None)
    seen = []
    for rank in range(world):
        reader = (
            StreamReader(files, Rank(rank, world)) if kind == "stream" else CorpusReader(corpus, 5, Rank(rank, world))
        )
        while block := reader.read():
            seen += block
    assert sorted(seen) == sorted(TEXTS)


def test_subsets_share_nothing(tmp_path):
    files, _ = find_splits(str(write(tmp_path / "data", "txt")), None, None, None)
    corpus = open_corpus(files, True, None)
    held_out, rest = Subset(corpus, 0.2, 0, complement=False), Subset(corpus, 0.2, 0, complement=True)
    assert len(held_out) == 10
    assert sorted([*held_out.indices, *rest.indices]) == list(range(50))


def test_token_store_and_pieces(tmp_path):
    documents = [np.arange(n, dtype=np.uint16) for n in (5, 0, 12, 7)]
    write_token_store(tmp_path / "store", documents, np.uint16, "s", "t")
    store = TokenStore(tmp_path / "store")
    assert [list(x) for x in store.fetch(np.arange(4))] == [list(x) for x in documents]
    pieces = Pieces(store, 5)
    assert [list(x) for x in pieces.fetch(np.arange(len(pieces)))] == [
        [0, 1, 2, 3, 4], [], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], [0, 1, 2, 3, 4], [5, 6]
    ]  # fmt: skip
    with open(tmp_path / "store/tokens.bin", "r+b") as file:
        file.write(b"\x09")
    with pytest.raises(DataError, match="damaged"):
        TokenStore(tmp_path / "store")
