"""One reader of rows: whatever a file looks like, pretraining, pairs, GLUE, MTEB and `embed` read the same, lose nothing
without counting it, and name what they refuse.
"""

import contextlib
import gzip
import json
import os
import random
import resource
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from helpers.commands import run_neobert
from helpers.corpora import files_at
from helpers.runs import TINY
from neobert.config.load import load_config
from neobert.data.files import token_store as prepare
from neobert.data.files.documents import Files, SkippedRows, fingerprint, open_corpus, stream
from neobert.data.files.splits import find_splits
from neobert.data.files.token_store import TokenStore, tokenize_files
from neobert.data.labelled import TASKS, Source, read_split
from neobert.data.mlm.readers import Reader
from neobert.data.pairs.table import read_examples, roles_of
from neobert.errors import DataError
from neobert.inference.embed import read_rows
from neobert.tasks.contrastive.data import find_places
from neobert.tasks.pretraining import task as pretraining
from neobert.tasks.pretraining.data import find_files, open_sources

TEXTS = ["first, of all", "a \u2028 separator", "  spaces\u00a0", 'with "quotes"', "déjà vu", "the last"]
LINES = [json.dumps({"sentence": text, "label": n % 2}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
RECORDS = ['"' + text.replace('"', '""') + f'",{n % 2}' for n, text in enumerate(TEXTS)]
TABLE = pa.table({"sentence": TEXTS, "label": [n % 2 for n in range(6)]})


def arrow(table, opened=pa.ipc.new_stream):
    with pa.BufferOutputStream() as sink:
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()


def parquet(table):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def joined(lines, end="\n", last="\n"):
    return (end.join(lines) + last).encode()


BOM = b"\xef\xbb\xbf"
SAME = {
    "train.jsonl": joined(LINES),
    "train.JSONL": joined(LINES, last=""),
    "train.ndjson": BOM + joined(LINES, "\r\n", "\r\n\r\n"),
    "train.jsonl.GZ": gzip.compress(joined(LINES, "\n\n", "\n \n")),
    "train.jsonl.zst": zstd(joined(LINES)),
    "train.json": BOM + ("[" + ",\n".join(LINES) + "]").encode(),
    "train.csv": BOM + joined(["sentence,label", *RECORDS], "\r\n", "\r\n\r\n"),
    "train.CSV": joined(["sentence,label", *RECORDS], "\n\n", ""),
    "train.tsv": BOM + joined(["sentence\tlabel", *(f"{text}\t{n % 2}" for n, text in enumerate(TEXTS))]),
    "train.PARQUET": parquet(TABLE),
    "train.parquet": parquet(TABLE.set_column(0, "sentence", TABLE["sentence"].dictionary_encode())),
    "train.arrow": arrow(TABLE),
    "train.ARROW": arrow(TABLE, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", SAME)
def test_every_reader_sees_the_same_rows(name, tmp_path):
    path = tmp_path / "cola" / name
    path.parent.mkdir()
    path.write_bytes(SAME[name])
    files = files_at(path, "sentence")
    assert Reader(files).read() == TEXTS
    corpus = open_corpus(files, fingerprint(files), cache_dir=str(tmp_path / "cache"))
    assert Reader(corpus, None).read() == TEXTS
    assert [text for text, _ in read_rows(str(path), "sentence")] == TEXTS
    roles = roles_of([str(path)], {}, "")
    assert [
        row.anchor for row in read_examples({"": [str(path)]}, ("", None, None), roles, "", SkippedRows(True)).rows
    ] == TEXTS
    split = read_split(Source(str(tmp_path)), TASKS["cola"], "train")
    assert (split.texts[0], split.labels.tolist()) == (TEXTS, [0, 1] * 3)


def test_local_mteb_tasks_are_read_likewise(tmp_path):
    pytest.importorskip("mteb")
    from neobert.tasks.mteb.library import read_rows as read_task_rows

    (tmp_path / "test.jsonl").write_bytes(BOM + joined(LINES, "\r\n", "\n\n"))
    assert [row["sentence"] for row in read_task_rows(tmp_path / "test.jsonl", ("sentence",))] == TEXTS
    (tmp_path / "test.jsonl").write_bytes(joined(LINES[:2]) + b'{"sentence": "\xff"}\n')
    with pytest.raises(DataError, match=r"test.jsonl:3: not UTF-8"):
        read_task_rows(tmp_path / "test.jsonl", ("sentence",))


# --- what cannot be used is counted, or named -----------

GOOD = [f"line {n} of the file" for n in range(3000)]
JSON = [json.dumps({"text": text}) for text in GOOD]


def damaged(kind):
    """A file with damage after many good rows, and how many of those there are at least."""
    noise = random.Random(0)
    if kind == "jsonl":  # no JSON at all, another type, and a last line that was cut
        return joined([*JSON[:40], "no json", "7", *JSON[40:]], last="") + b'\n{"text": "to', 3000
    raw = joined([json.dumps({"text": f"{t} {noise.randbytes(9).hex()}"}) if kind == "jsonl.gz" else t for t in GOOD])
    if kind == "txt.zst":
        rows = joined([noise.randbytes(30).hex() for _ in range(9000)])
        return zstd(rows)[:-9], 6000
    whole = bytearray(gzip.compress(raw))
    if kind == "jsonl.gz":
        whole[-5000:-4900] = bytes(100)  # read as other text, until the checksum differs
    return (bytes(whole[:-9]) if kind == "txt.gz" else bytes(whole)), 1000


@pytest.mark.parametrize("kind", ["jsonl", "txt.gz", "jsonl.gz", "txt.zst"])
def test_damage_is_passed_over_and_counted(kind, tmp_path):
    """Also when a run is resumed in the middle of it; `refuse` names the line."""
    content, least = damaged(kind)
    (tmp_path / f"a.{kind}").write_bytes(content)
    behind = b'{"text": "the file behind it"}\n' if kind.startswith("jsonl") else b"the file behind it\n"
    (tmp_path / f"b.{kind}").write_bytes({"gz": gzip.compress, "zst": zstd}.get(kind.partition(".")[2], bytes)(behind))
    files = files_at(tmp_path)
    reader, texts, states = Reader(files), [], []
    while block := reader.read():
        texts += block
        states.append((len(texts), json.loads(json.dumps(reader.state_dict()))))
    assert len(texts) > least
    assert texts[-1] == "the file behind it"
    bad_lines = {"not JSON": 2, "expected an object with columns, or a list of texts": 1}
    rest = {"the rest of a compressed file that is damaged or cut short": 1}
    counts = reader.skips.counts if kind != "jsonl.gz" else {n: c for n, c in reader.skips.counts.items() if n in rest}
    assert counts == (bad_lines if kind == "jsonl" else rest)
    assert all("a." in where for where in reader.skips.first.values())
    for count, state in states[-3:]:
        again = Reader(files)
        again.load_state_dict(state)
        assert [text for block in iter(again.read, []) for text in block] == texts[count:]
        assert again.skips.counts == reader.skips.counts
    corpus = Reader(open_corpus(files, fingerprint(files), cache_dir=str(tmp_path / "cache")), None)
    assert [text for block in iter(corpus.read, []) for text in block] == texts
    assert corpus.skips.counts == reader.skips.counts
    with pytest.raises(DataError, match=rf"a.{kind}:\d+: (not JSON|the rest of a compressed file)"):
        list(iter(Reader(files, skips=SkippedRows(True)).read, []))


def test_pairs_pass_over_what_is_no_json(tmp_path):
    path = str(tmp_path / "pairs.jsonl")
    rows = [json.dumps({"anchor": f"a {n}", "positive": f"b {n}"}) for n in range(5)]
    (tmp_path / "pairs.jsonl").write_bytes(joined([*rows, "[[", '["c", "d"]']) + b'{"anchor": "\xff"}\n{"anch')
    skips = SkippedRows()
    found = read_examples({"": [path]}, ("", None, None), roles_of([path], {}, ""), "", skips).rows
    assert [row.anchor for row in found] == [*(f"a {n}" for n in range(5)), "c"]
    assert skips.counts == {"not JSON": 2, "not UTF-8": 1}


def test_vectors_have_all_rows_or_there_are_none(tmp_path):
    for content, where in ((b"fine\nbad \xff\n", "a.txt:2"), (b"fine\n\nbad \xff\n", "a.txt:3")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError, match=f"{where}: not UTF-8"):
            list(read_rows(str(tmp_path / "a.txt"), None))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "\\udc00"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: text is not UTF-8"):
        list(read_rows(str(tmp_path / "a.jsonl"), None))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz"])
def test_utf16_is_refused_by_name(name, encoding, tmp_path):
    rows = {"txt": ["some text"] * 5, "csv": ["text", "one", "two"], "json": ['[{"text": "x"}]'], "jsonl": JSON[:3]}
    raw = "\n".join(rows[name.split(".")[1]]).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for read in (
        lambda: Reader(files_at(tmp_path, "text")).read(),
        lambda: Reader(open_corpus(Files((str(tmp_path / name),), "text"), "", True), None).read(),
        lambda: list(read_rows(str(tmp_path / name), None)),
    ):
        with pytest.raises(DataError, match=rf"{name}: looks like UTF-16") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_what_stands_among_files_and_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / ".hidden.txt").write_text("not of the corpus\n")
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt/round").symlink_to(tmp_path)
    assert Reader(files_at(tmp_path)).read() == ["fine"]
    for path, words in ((tmp_path / "*.txt", r"x.txt: is a folder"), (tmp_path / "x.txt/none", "nothing at")):
        with pytest.raises(DataError, match=words):
            files_at(path)
    Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "x.txt")
    assert Reader(files_at(tmp_path / "x.txt")).read() == ["saved"]
    with pytest.raises(DataError, match=r"has folders of save_to_disk in it; name one, as .*x.txt"):
        files_at(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.txt").write_text("linked\n")
    assert Reader(files_at(tmp_path / "books")).read() == ["linked"]
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b.txt: is a link to nothing"):
        files_at(tmp_path / "?.txt")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt", "txt.gz"])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_empty_file_among_others_is_passed_over(kind, streaming, tmp_path):
    """An empty shard, first or in the middle; nothing but empty files is an error."""
    rows = {"jsonl": '{"text": "x y"}\n', "json": '[{"text": "x y"}]', "csv": "text,n\nx y,1\n", "tsv": "text\nx y\n"}
    for number in range(4):
        content = rows.get(kind, "x y\n").encode() if number % 2 else b""
        if kind == "parquet":
            content = parquet(pa.table({"text": pa.array(["x y"] * (number % 2), pa.string())}))
        if kind == "txt.gz" and content:
            content = gzip.compress(content)
        (tmp_path / f"{number}.{kind}").write_bytes(content)
    files = files_at(tmp_path, "text")
    reader = Reader(files) if streaming else Reader(open_corpus(files, "e" + kind, cache_dir=str(tmp_path)), 1)
    assert reader.read() == ["x y"] * 2
    if kind == "parquet":
        assert len(open_corpus(files_at(tmp_path / "0.parquet"), "")) == 0
    elif not kind.startswith("txt"):
        with pytest.raises(DataError, match="empty file"):
            files_at(tmp_path / f"[02].{kind}", "text")


def test_files_that_change_while_they_are_read(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(f"line {n} of {number}\n" for n in range(2000)))
    corpus, reader = open_corpus(files_at(tmp_path), ""), Reader(files_at(tmp_path))
    assert reader.read()[0] == "line 0 of 0"
    (tmp_path / "0.txt").write_text("line 0 of 0\n")
    again = Reader(reader.text)
    again.load_state_dict(reader.state_dict())
    for one in (reader, again):
        with pytest.raises(DataError, match=r"0.txt: became shorter while it was read"):
            list(iter(one.read, []))
    os.replace(tmp_path / "2.txt", tmp_path / "1.txt")
    assert corpus.fetch(np.array([0])) == ["line 0 of 0"]
    with pytest.raises(DataError, match=r"0.txt: became shorter while it was read"):
        corpus.fetch(np.array([1999]))
    with pytest.raises(DataError, match=r"1.txt: was replaced while it was read"):
        corpus.fetch(np.array([2000]))


# --- many files -----------


@contextlib.contextmanager
def open_files(limit):
    """At most so many more than are open already."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("kind", ["txt", "parquet", "tokens"])
def test_more_files_than_may_be_open(kind, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "MIN_SHARD_BYTES", 1)
    (tmp_path / "text").mkdir()
    texts = [f"text number {number}" for number in range(400)]
    for number, text in enumerate(texts):
        content = parquet(pa.table({"text": [text]})) if kind == "parquet" else text.encode()
        (tmp_path / f"text/{number:03d}.{kind if kind == 'parquet' else 'txt'}").write_bytes(content)
    files = files_at(tmp_path / "text")
    if kind == "tokens":
        _, manifest = tokenize_files(files, tokenizer, tmp_path / "tokens", 1, False)
        assert len(manifest.shards) > 100
    order = np.random.default_rng(0).permutation(400)
    with open_files(90 if kind == "tokens" else 300):
        corpus = (
            TokenStore(tmp_path / "tokens") if kind == "tokens" else open_corpus(files, "", cache_dir=str(tmp_path))
        )
        found = [one for _ in range(2) for one in corpus.fetch(order)]
    wanted = [texts[number] for number in order] * 2
    if kind == "tokens":
        found, wanted = [ids.tolist() for ids in found], [ids.tolist() for ids in tokenizer.encode(wanted)]
    assert found == wanted


def test_a_command_raises_the_limit_of_open_files():
    script = "import resource\nfrom neobert.cli.main import main\ntry: main()\n"
    script += "except SystemExit: print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = ["bash", "-c", f"ulimit -Sn 256; exec {sys.executable} -c '{script}' --help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert said.splitlines()[-1] == str((most, most))


# --- files behind URLs -----------


class Unreliable(MemoryFileSystem):
    """Files in memory, behind a connection that breaks off `failures` times, in the middle of a read too."""

    protocol = "unreliable"
    store, pseudo_dirs = {}, [""]
    failures = 0

    def _open(self, path, mode="rb", **_):
        if mode == "rb" and Unreliable.failures % 2:
            self.fail()
        if mode == "rb" and path not in self.store:
            raise FileNotFoundError(path)
        return _Unreliable(self, path, self.store[path].getvalue()) if mode == "rb" else super()._open(path, mode)

    @staticmethod
    def fail():
        Unreliable.failures -= 1
        raise ConnectionResetError("connection reset by peer")


class _Unreliable(MemoryFile):
    def read(self, size=-1):
        if Unreliable.failures and self.tell() > 0:
            Unreliable.fail()
        return super().read(min(size, 70_000) if size > 0 else size)

    def close(self):
        pass


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_connection_that_breaks_off_loses_nothing(name, monkeypatch, capsys):
    from neobert.data.files import opening

    texts = [os.urandom(40).hex() for _ in range(6000)]
    raw = joined([json.dumps({"text": text}) for text in texts] if "jsonl" in name else texts)
    content = {"gz": gzip.compress, "zst": zstd, "parquet": lambda _: parquet(pa.table({"text": texts}))}
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(opening, "FIRST_WAIT_SECONDS", 0)
    Unreliable.failures = 0
    with fsspec.open(f"unreliable://{name}", "wb") as file:
        file.write(content.get(name.rpartition(".")[2], bytes)(raw))
    files = Files((f"unreliable://{name}",), None if "txt" in name else "text")

    def read():
        return [text for block in iter(Reader(files).read, []) for text in block]

    Unreliable.failures = 3
    assert read() == texts
    assert Unreliable.failures == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 3
    assert all(f"unreliable://{name}: connection reset by peer; reading on from byte" in note for note in notes)
    Unreliable.failures = 1000
    with pytest.raises(DataError, match=rf"{name}: cannot be read: connection reset by peer \(6 attempts\)"):
        read()
    assert 1000 - Unreliable.failures < 40
    Unreliable.failures = 0
    with pytest.raises(DataError, match=r"absent.txt: cannot be read"):
        list(stream(Files(("unreliable://absent.txt",), None), files.start))
    assert "absent" not in capsys.readouterr().err  # one attempt


# --- which text is trained on -----------


def dataset_of(*words):
    return load_config([], ["task=pretraining", *words]).config.dataset


@pytest.mark.parametrize("path", ["", "/", "/*/*.txt", "/**", "/*/*/*.txt"])
def test_validation_text_is_never_trained_on(path, tmp_path):
    root = tmp_path / "test" / "corpus"  # names above the path say nothing
    places = {
        "train/a.txt": "train", "validation/a.txt": "validation", "books/val/b.txt": "val", "books/test-2/c.txt": "test",
        "train/validation.txt": "validation", "validation/train-0.txt": "train", "dev.set/d.txt": "dev",
        "training/e.txt": "train", "books/validated/f.txt": "train", "contest/g.txt": "train",
    }  # fmt: skip
    for name, split in places.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{split} text of {name}\n")
    train, evaluation = find_splits(f"{root}{path}", None, None, None)
    trained, evaluated = Reader(train).read(), Reader(evaluation).read()
    assert {text.split()[0] for text in trained} == {"train"}
    assert {text.split()[0] for text in evaluated} <= {"validation", "val"}
    if path != "/*/*/*.txt" and path != "/*/*.txt":
        assert (len(trained), len(evaluated)) == (5, 2)


def test_an_explicit_evaluation_split_wins(tmp_path, tokenizer):
    for split in ("train", "test", "validation"):
        (tmp_path / f"{split}.txt").write_text("".join(f"{split} text {n}\n" for n in range(40)))
    words = [f"dataset.path={tmp_path}", "dataset.streaming=false", "dataset.validation_split=0.25"]

    def texts(*more):
        loaded = load_config([], ["task=pretraining", *words, *more])
        source = open_sources(loaded.config, tokenizer, tmp_path / "out")[0]
        both = (Reader(one, None).read() for one in (source.train, source.evaluation))
        return *both, [note for note in loaded.warnings if "validation_split" in note]

    trained, evaluated, notes = texts("dataset.eval_split=test")
    assert (len(trained), {text.split()[0] for text in evaluated}, len(evaluated)) == (40, {"test"}, 40)
    assert len(notes) == 1
    trained, evaluated, notes = texts()
    assert (len(trained), len(evaluated), notes) == (30, 10, [])
    mixture = json.dumps([{"path": str(tmp_path), "eval_split": "test"}])
    trained, evaluated, notes = texts(f"dataset.mixture={mixture}")
    assert (len(trained), evaluated[0], len(notes)) == (40, "test text 0", 1)


def test_an_entry_of_a_mixture_changes_what_it_sets(tmp_path, tokenizer):
    for name in "abc":
        rows = [{"text": f"wrong {n}", "body": f"body {n}", "title": f"title {n}"} for n in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}
    entries = [
        {"path": path["a"]},
        {"path": path["b"], "text_column": "title"},
        {"path": path["c"], "train_split": "train[:3]"},
    ]
    words = [f"dataset.mixture={json.dumps(entries)}", "dataset.text_column=body", "dataset.train_split=train[5:]"]
    config = load_config([], ["task=pretraining", "trainer.max_steps=1", "dataset.streaming=false", *words]).config
    sources = open_sources(config, tokenizer, tmp_path / "out")
    assert [Reader(source.train, None).read() for source in sources] == [
        [f"body {n}" for n in range(5, 10)], [f"title {n}" for n in range(5, 10)], [f"body {n}" for n in range(3)]
    ]  # fmt: skip
    words[0] = "dataset.mixture=" + json.dumps([*entries, {"path": path["a"], "columns": {"text": "title"}}])
    columns = "dataset.columns={anchor: title, positive: body}"
    config = load_config([], ["task=contrastive", columns, *words]).config
    found = [
        (place.dataset.columns, place.dataset.text_column, place.dataset.train_split) for place in find_places(config)
    ]
    section = {"anchor": "title", "positive": "body"}
    assert found == [
        (section, "body", "train[5:]"), ({}, "title", "train[5:]"), (section, "body", "train[:3]"),
        ({"text": "title"}, "body", "train[5:]"),
    ]  # fmt: skip


def test_any_glob_is_a_path(tmp_path):
    for name in "ab":
        (tmp_path / f"part-{name}.txt").write_text(f"mine {name}\n")
    for pattern in ("part-?.txt", "part-[ab].txt", "part-*.txt"):
        files, _ = find_files(dataset_of(f"dataset.path={tmp_path}/{pattern}", "dataset.name=me/tiny"))
        assert Reader(files).read() == ["mine a", "mine b"]


def test_tokens_have_the_splits_they_have(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text\n")
    tokenize_files(files_at(tmp_path / "a.txt"), tokenizer, tmp_path / "tokens/train", 1, False)
    words = ["task=pretraining", f"dataset.path={tmp_path / 'tokens'}", "dataset.streaming=false"]
    assert len(open_sources(load_config([], words).config, tokenizer, tmp_path)[0].train) == 1
    with pytest.raises(DataError, match=r"dataset.eval_split: 'test', but of a folder of tokens it is 'validation'"):
        open_sources(load_config([], [*words, "dataset.eval_split=test"]).config, tokenizer, tmp_path)


def test_pseudo_perplexity_reads_the_slice(tmp_path, tokenizer):
    from neobert.inference.masked_lm import read_pieces

    (tmp_path / "a.txt").write_text("".join(f"word {n}\n" for n in range(20)))
    for split, count in (("train[:3]", 3), ("train[15:]", 5), ("train", 20)):
        assert read_pieces(files_at(tmp_path, None, split), tokenizer, 60, None, SkippedRows())[1] == count


# --- what the commands say -----------


def test_why_there_is_no_text_is_said(tmp_path):
    """A file in Latin-1, and more readers than documents: one line, with counts and the first such row."""
    (tmp_path / "latin.txt").write_text("déjà\nété\n", encoding="latin-1")
    (tmp_path / "two.txt").write_text("one document\nand another\n")
    cases = (
        ("latin.txt", "dataset.pre_tokenize=false", "2 rows passed over: 2 not UTF-8, first at"),
        ("latin.txt", "dataset.pre_tokenize=true", "no document in it (2 rows passed over: 2 not UTF-8)"),
        ("two.txt", "dataset.num_shards=3", "reader 3 of 3 of the corpus is empty: documents are dealt"),
    )
    for name, word, expected in cases:
        words = [*TINY, f"trainer.output_dir={tmp_path / 'out'}", f"dataset.path={tmp_path / name}", word]
        with pytest.raises(DataError) as caught:
            pretraining.run(load_config([], ["task=pretraining", *words]))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    result = run_neobert("tokenizer", "train", tmp_path / "latin.txt", "-o", tmp_path / "tokenizer")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "2 rows passed over: 2 not UTF-8, first at" in result.stderr
    assert not (tmp_path / "tokenizer").exists()
