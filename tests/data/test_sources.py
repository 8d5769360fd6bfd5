import gzip
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from helpers.corpora import TEXTS, files_at, write
from neobert.data.files.documents import SkippedRows, fingerprint, hold_out, num_bytes, open_corpus, read_text, stream
from neobert.data.files.rows import columns_of, count_rows
from neobert.data.files.splits import find_splits, hold_out_head
from neobert.data.hashing import permute
from neobert.data.mlm.readers import Reader, RememberedReader
from neobert.errors import DataError
from neobert.ranks import Ranks

KINDS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "json", "json lines", "csv", "csv.gz",
         "parquet", "saved"]  # fmt: skip


def read_all(files, start=None):
    """(text or Unusable, position behind it) of a stream."""
    rows = stream(files, start or files.start, files.stop)
    return [(read_text(files, row, begin), behind) for row, begin, behind in rows]


def texts_of(rows):
    return [text.strip().removesuffix("\nsecond, line").strip() for text, _ in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_formats_agree(tmp_path, kind):
    files, evaluation = find_splits(str(write(tmp_path / "data", kind)), "text" if "csv" in kind else None, None, None)
    assert evaluation is None
    rows = read_all(files)
    stripped = [text.strip() for text in TEXTS]
    assert texts_of(rows) == stripped
    assert sum(map(count_rows, files.paths)) == 50
    for place in (0, 13, 49):
        assert read_all(files, rows[place][1]) == rows[place + 1 :]
    corpus = open_corpus(files, fingerprint(files), cache_dir=str(tmp_path / "cache"))
    chosen = np.array([49, 0, 20, 20])
    assert len(corpus) == 50
    assert corpus.fetch(chosen) == [rows[i][0] for i in chosen]
    assert corpus.fetch(chosen) == open_corpus(files, "", in_memory=True).fetch(chosen)


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "csv", "json", "parquet", "saved"])
@pytest.mark.parametrize(
    ("part", "first", "last"),
    [("[:10%]", 0, 5), ("[10:]", 10, 50), ("[7:13]", 7, 13), ("[-5:]", 45, 50), ("[50%:]", 25, 50), ("[:99]", 0, 50)],
)
def test_slices_are_the_same_in_both_modes(tmp_path, kind, part, first, last):
    folder = write(tmp_path / "data", kind)
    files = files_at(folder, "text" if kind == "csv" else None, f"train{part}")
    assert texts_of(read_all(files)) == [text.strip() for text in TEXTS[first:last]]
    for in_memory in (True, False):
        corpus = open_corpus(files, fingerprint(files), in_memory, str(tmp_path / "cache"))
        everything = corpus.fetch(np.arange(len(corpus)))
        assert everything == [text for text, _ in read_all(files)]
    assert fingerprint(files) != fingerprint(files_at(folder, "text" if kind == "csv" else None))


@pytest.mark.parametrize("spec", ["train[1:2:3]", "train[", "train[a:]", "train[30:20]", "train[:10%"])
def test_slices_that_are_none_are_refused(tmp_path, spec):
    with pytest.raises(DataError, match="dataset.train_split"):
        files_at(write(tmp_path / "data", "txt"), None, spec)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_held_out_head_is_not_trained_on(tmp_path, kind):
    texts = [f"document {n} " + "word " * 50 for n in range(400)]
    files = files_at(write(tmp_path / "data", kind, texts))
    train, evaluation = hold_out_head(files, num_bytes(files))
    held, rest = ([text for text, _ in read_all(one)] for one in (evaluation, train))
    assert 1 <= len(held) <= 20
    assert [text.strip() for text in held + rest] == [text.strip() for text in texts]
    one = files_at(write(tmp_path / "one", kind, texts[:1]))
    assert hold_out_head(one, num_bytes(one)) == (one, None)


def test_splits_are_found_by_name(tmp_path):
    for name in ("train-00000.txt", "train-00001.txt", "validation.txt", "test.txt"):
        (tmp_path / name).write_text("some text\n")
    train, evaluation = find_splits(str(tmp_path), None, None, None)
    assert [p[-9:-4] for p in train.paths] == ["00000", "00001"]
    assert evaluation.paths[0].endswith("validation.txt")
    assert find_splits(str(tmp_path), None, None, "test")[1].paths[0].endswith("test.txt")
    assert len(files_at(tmp_path / "*.txt").paths) == 2
    DatasetDict(
        {"train": Dataset.from_dict({"text": TEXTS}), "dev": Dataset.from_dict({"text": TEXTS[:3]})}
    ).save_to_disk(tmp_path / "d")
    train, evaluation = find_splits(str(tmp_path / "d"), None, None, None)
    assert len(open_corpus(evaluation, "")) == 3


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.txt", b"fine\nbad \xff\xfe\n", None, r"a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', None, "a.jsonl:3: not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', None, "a.jsonl:2: no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', None, "a.jsonl:2: not UTF-8"),
        ("a.csv", b"a,b\n1,x\n2,\xff\n", "b", "a.csv:3: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', None, "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", None, "expected an object"),
        ("a.jsonl", b"", None, "empty file"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', None, "has several: a, b"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "c", "no column 'c'"),
        ("a.parquet", b"PAR1 not really", None, "a.parquet: cannot be read"),
        ("a.json", b'[{"text": "x"}, {"text"', None, "a.json: not JSON"),
        (
            "a.txt.gz",
            gzip.compress(b"a text\n" * 999, mtime=0)[:-9],
            None,
            "a.txt.gz:1000: the rest of a compressed file that is damaged or cut short",
        ),
        ("a.txt.gz", b"not gzip at all", None, "a.txt.gz: cannot be read"),
        ("a.txt.zst", b"not zstandard at all", None, "a.txt.zst: cannot be read"),
        ("a.csv", b"a,b\n1,2\n", None, "has several: a, b"),
        ("a.pdf", b"x", None, "no .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, column, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(iter(Reader(files_at(tmp_path, column), skips=SkippedRows(refuse=True)).read, []))


def test_a_truncated_table_is_named(tmp_path):
    path = write(tmp_path / "data", "parquet") / "train.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train.parquet: cannot be read"):
        files_at(tmp_path / "data")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_file_without_the_column_is_named(tmp_path, kind):
    for name, column in (("train-0", "body"), ("train-1", "content")):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pa.parquet.write_table(pa.table({column: TEXTS, "n": TEXTS}), path)
        elif kind == "csv":
            path.write_text("".join(f"{a},{b}\n" for a, b in [(column, "n"), *((t, 1) for t in TEXTS)]))
        else:
            path.write_text("".join(json.dumps({column: t, "n": "1"}) + "\n" for t in TEXTS))
    with pytest.raises(DataError, match=rf"train-1.{kind}: no column 'body', which .*train-0.{kind} has; there are: "):
        files_at(tmp_path, "body")


def test_rows_without_text_are_counted(tmp_path):
    """Null, empty, a number, invalid UTF-8, a lone surrogate; streamed and at random."""
    good = [json.dumps({"text": f"fine {n}"}).encode() for n in range(5)]
    bad = [b'{"text": null}', b'{"text": " "}', b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "\\udc00"}', b"{}"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:2], *bad, *good[2:]]))
    files = files_at(tmp_path)
    readers = (
        Reader(files),
        Reader(open_corpus(files, ""), 3),
        Reader(open_corpus(files, "", True), 3),
    )
    for reader in readers:
        assert sorted(reader.read()) == [f"fine {n}" for n in range(5)]
        assert reader.read() == []
        assert reader.skips.counts == {"no text": 3, "not text": 1, "not UTF-8": 2}
        assert reader.skips.first["not text"].endswith("a.jsonl:5")
        again = replace(reader, skips=SkippedRows())
        again.load_state_dict(json.loads(json.dumps(reader.state_dict())))
        assert again.skips.counts == reader.skips.counts


def test_a_row_of_50_megabytes_is_read(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 10_000_000}) + '\n{"text": "x"}\n')
    reader = Reader(files_at(tmp_path))
    assert [len(text) for text in reader.read()] == [50_000_000]
    assert reader.read() == ["x"]
    part = "The people, of the United States. " * 40_000
    assert np.array_equal(tokenizer.encode([part])[0], np.concatenate([tokenizer.encode([part[:34]])[0]] * 40_000))


def test_evaluation_text_is_read_once(tmp_path, tokenizer):
    files = files_at(write(tmp_path / "data", "jsonl"))
    for limit in (10**6, 60):  # all is remembered, or the first block
        reader, passes = RememberedReader(files, encode=tokenizer.encode, limit=limit), []
        for _ in range(3):
            reader.again()
            tokens = []
            while block := reader.read():
                tokens += tokenizer.encode(block) if isinstance(block[0], str) else block
            reader.next_epoch()
            passes.append([list(ids) for ids in tokens])
        assert (
            passes[0] == passes[1] == passes[2] == [list(ids) for ids in tokenizer.encode([t.strip() for t in TEXTS])]
        )
        assert reader.skips.counts == {}


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
        files_at(tmp_path)
    assert files_at(tmp_path / "*.jsonl").column == "text"


def test_columns_are_listed(tmp_path):
    for kind in ("jsonl", "csv", "parquet", "json"):
        folder = write(tmp_path / kind, kind)
        path = next(str(path) for path in folder.iterdir())
        assert {"text", "body"} & set(columns_of(path))
        with pytest.raises(DataError, match=r"dataset.text_column: no column 'absent' in .* there are: "):
            files_at(folder, "absent")


def test_fingerprint_follows_content(tmp_path):
    files = files_at(write(tmp_path / "data", "txt"))
    before = fingerprint(files)
    assert fingerprint(files) == before
    for texts in ([*TEXTS[:-1], "changed"], [*TEXTS[:25], TEXTS[25].replace("word", "ward"), *TEXTS[26:]]):
        write(tmp_path / "data", "txt", texts)
        assert fingerprint(files) != before


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
    corpus = open_corpus(files, "", True)
    seen = []
    for rank in range(world):
        reader = Reader(files if kind == "stream" else corpus, 5, Ranks(rank, world))
        while block := reader.read():
            seen += block
    assert sorted(seen) == sorted(TEXTS)


def test_subsets_share_nothing(tmp_path):
    files, _ = find_splits(str(write(tmp_path / "data", "txt")), None, None, None)
    corpus = open_corpus(files, "", True)
    rest, held_out = hold_out(corpus, 0.2, 0)
    assert len(held_out) == 10
    assert sorted([*held_out.indices, *rest.indices]) == list(range(50))
