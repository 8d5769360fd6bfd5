"""Token folders: compact, whole or named as not whole, the same whoever makes them; killed at any moment they go on."""

import json
import os
import signal
import time

import numpy as np
import pytest

from helpers.commands import run_neobert, start_neobert
from helpers.corpora import files_at, write
from helpers.runs import TEXT, TINY, TOKENIZER
from neobert.data.files import token_store as prepare
from neobert.data.files.token_store import (
    Manifest,
    TokenStore,
    plan_shards,
    tokenize_files,
    verify_store,
    write_shard,
)
from neobert.data.mlm.readers import Pieces, Reader
from neobert.errors import DataError
from neobert.files import write_json


@pytest.fixture
def many_shards(monkeypatch):
    """Shards of 2 kB, so that a small corpus has many."""
    monkeypatch.setattr(prepare, "MIN_SHARD_BYTES", 2000)
    monkeypatch.setattr(prepare, "MAX_SHARDS", 16)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def documents_of(store):
    return [ids.tolist() for ids in store.fetch(np.arange(len(store)))]


LINES = [f"the congress met for the {n}th time and spoke of {'war and ' * (n % 9)}peace" for n in range(500)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"])
def test_shards_are_the_corpus_in_order(tmp_path, kind, tokenizer, many_shards):
    files = files_at(write(tmp_path / "data", kind, LINES), "text" if kind == "csv" else None)
    starts = plan_shards(files)
    if kind in ("txt", "jsonl", "parquet", "saved"):
        assert len(starts) > 4
    made, manifest = tokenize_files(files, tokenizer, tmp_path / "tokens", 1, False)
    assert made == len(starts) == len(manifest.shards)
    store, reader, texts = TokenStore(tmp_path / "tokens"), Reader(files), []
    while block := reader.read():
        texts += block
    assert documents_of(store) == [ids.tolist() for ids in tokenizer.encode(texts)]
    assert store.tokens[0].dtype == np.uint16
    assert manifest.num_documents == len(texts) == 500


def test_who_makes_the_shards_makes_no_difference(tmp_path, tokenizer, many_shards):
    """One process, two, or three jobs that know nothing of each other, in any order: the same bytes."""
    files = files_at(write(tmp_path / "data", "txt", LINES))
    tokenize_files(files, tokenizer, tmp_path / "one", 1, False)
    tokenize_files(files, tokenizer, tmp_path / "two", 2, False)
    for number in (3, 1, 2):
        _, manifest = tokenize_files(files, tokenizer, tmp_path / "three", 1, False, share=(number, 3))
        assert (manifest is None) == (number != 2)
        if manifest is None:
            with pytest.raises(DataError, match=r"not whole: \d+ of \d+ shards are missing; run the command"):
                TokenStore(tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")
    assert tokenize_files(files, tokenizer, tmp_path / "one", 1, False)[0] == 0


def test_a_slice_is_tokenised(tmp_path, tokenizer, many_shards):
    write(tmp_path / "data", "txt", LINES)
    tokenize_files(files_at(tmp_path / "data", None, "train[100:350]"), tokenizer, tmp_path / "tokens", 1, False)
    store = TokenStore(tmp_path / "tokens")
    assert documents_of(store) == [ids.tolist() for ids in tokenizer.encode(LINES[100:350])]


def test_bad_rows_are_in_the_manifest(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": null}\n{"text": "\xff"}\n')
    _, manifest = tokenize_files(files_at(tmp_path), tokenizer, tmp_path / "tokens", 1, False)
    assert (manifest.num_documents, manifest.skipped) == (1, {"no text": 1, "not UTF-8": 1})
    with pytest.raises(DataError, match="a.jsonl:2: no text"):
        tokenize_files(files_at(tmp_path / "a.jsonl"), tokenizer, tmp_path / "again", 1, False, refuse=True)


def test_pieces_of_shards(tmp_path):
    documents = [np.arange(n, dtype=np.uint16) for n in (5, 0, 12, 7)]
    shards = [write_shard(tmp_path, n, documents[2 * n : 2 * n + 2], np.uint16, {}) for n in range(2)]
    manifest = Manifest(2, "uint16", "s", "t", shards)
    write_json(tmp_path / "manifest.json", {**vars(manifest), "shards": [vars(shard) for shard in shards]})
    store = TokenStore(tmp_path)
    assert documents_of(store) == [x.tolist() for x in documents]
    pieces = Pieces(store, 5)
    assert [list(x) for x in pieces.fetch(np.arange(len(pieces)))] == [
        [0, 1, 2, 3, 4], [], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], [0, 1, 2, 3, 4], [5, 6]
    ]  # fmt: skip
    verify_store(tmp_path, manifest)
    with open(tmp_path / "tokens-00000.bin", "r+b") as file:
        file.write(b"\x09")
    with pytest.raises(DataError, match=r"tokens-00000.bin: damaged"):
        TokenStore(tmp_path)
    (tmp_path / "tokens-00001.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-0000\d.bin: (missing|damaged)"):
        TokenStore(tmp_path)


def test_folders_of_other_things_are_refused(tmp_path, tokenizer):
    files = files_at(write(tmp_path / "data", "txt", LINES))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.md").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        tokenize_files(files, tokenizer, tmp_path / "mine", 1, False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match="format 1; this version reads 2"):
        TokenStore(tmp_path / "old")


# --- the commands -----------


def tokenize_command(corpus, output, *words):
    return ["tokenize", corpus, "-t", TOKENIZER, "-o", output, *words]


def test_killed_and_started_again(tmp_path, tokenizer):
    """SIGKILL somewhere in the work; the second run makes what is missing, and the folder equals one made in one go."""
    (tmp_path / "data").mkdir()
    for number in range(8):
        (tmp_path / f"data/{number}.txt").write_text((TEXT / "train.txt").read_text())
    words = tokenize_command(tmp_path / "data", tmp_path / "out", "--num-proc", "2")
    process = start_neobert(*words, discard=True)
    while not list(tmp_path.glob("out/shard-*.json")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("out/shard-*.json")))
    assert 0 < done < 8
    again = run_neobert(*tokenize_command(tmp_path / "data", tmp_path / "out", "--num-proc", "1"))
    assert f"{8 - done} shards made" in again.stdout, again.stderr
    tokenize_files(files_at(tmp_path / "data"), tokenizer, tmp_path / "whole", 1, False)
    assert "whole: 19,664 documents" in again.stdout
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob("out/.*.tmp"))


def write_config(path, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"dataset: {{path: {path}, streaming: false}}\ntokenizer: {{path: {TOKENIZER}}}\n"
        f"trainer: {{output_dir: {tmp_path / 'run'}, per_device_train_batch_size: 2}}\n"
    )
    return tmp_path / "config.yaml"


def test_a_full_disk_for_a_tokenizer(tmp_path):
    command = ["tokenizer", "train", TEXT, "-o", tmp_path / "out", "--vocab-size", "2048"]
    result = run_neobert(*command, max_file_bytes=10 << 10)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: ")
    assert "Traceback" not in result.stderr


def test_a_full_disk_while_tokenising(tmp_path):
    result = run_neobert(*tokenize_command(TEXT, tmp_path / "out"), max_file_bytes=100 << 10)
    reason = "cannot write the tokenised corpus: File too large; run it again, it goes on"
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'out'}: {reason}\n"
    assert run_neobert(*tokenize_command(TEXT, tmp_path / "out")).returncode == 0


@pytest.mark.parametrize("share", ["0/4", "5/4", "1", "a/b", "1/"])
def test_shares_that_are_none(share, tmp_path):
    from neobert.cli.prepare import parse_share
    from neobert.errors import ConfigError

    assert parse_share("2/4") == (2, 4)
    with pytest.raises(ConfigError, match="expected I/N"):
        parse_share(share)


def test_data_shows_what_training_sees(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES) + "\n" + "long " * 900)
    words = ["dataset.long_documents=truncate", "datacollator.pack_sequences=true", "--rows", "2"]
    result = run_neobert("data", write_config(tmp_path / "a.txt", tmp_path), *words)
    assert result.returncode == 0, result.stderr
    shown = ("501 documents", "tokens per epoch: ", "cut: ", "fill: 9", "] | [CLS]", ">[MASK]}", "row 1:")
    for words in (*shown, "<=        16 tokens"):
        assert words in result.stdout, result.stdout


def test_verify_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("task: pretraining\n")
    words = [*TINY, "dataset.streaming=true", "dataset.num_workers=1", "trainer.gradient_accumulation_steps=2"]
    words.append(f"trainer.output_dir={tmp_path / 'out'}")
    result = run_neobert("verify-resume", tmp_path / "config.yaml", *words, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("resumed  equal      equal") == 3
    assert "resume is exact" in result.stdout
    assert result.stderr == ""
    assert not (tmp_path / "out").exists()


def test_verify_resume_sees_what_differs(tmp_path, capsys):
    """A batch with other tokens is told from one that is equal."""
    from neobert.tasks.pretraining import checks

    rows = [{"number": n, "ids": n, "labels": n} for n in range(1, 7)]
    for name, losses in (("whole", 6), ("broken", 6)):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out/metrics.jsonl").write_text(
            "".join(json.dumps({"kind": "train", "step": n + 1, "loss": n / 7}) + "\n" for n in range(losses))
        )
    for resumed, equal in (
        (rows[3:], True),
        ([*rows[3:5], {"number": 6, "ids": 0, "labels": 6}], False),
        (rows[2:], False),
    ):
        for name, found in (("whole", rows), ("broken", [*rows[:4], *resumed])):
            (tmp_path / name / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        assert checks._compare(tmp_path, rows[:4], 6, 3, 1) is equal
    assert "NOT exact" in capsys.readouterr().out


def test_a_byte_level_tokenizer(tmp_path):
    """BPE with the special tokens, trained on two formats at once, loads in transformers and writes any text."""
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("\n".join(LINES))
    (tmp_path / "b.jsonl").write_text('{"text": "naïve café 漢字"}\n{"text": null}\n')
    texts = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    command = ["tokenizer", "train", *texts, "-o", tmp_path / "bpe", "--kind", "bpe", "--cased"]
    result = run_neobert(*command, "--vocab-size", "400")
    assert "400 tokens" in result.stdout, result.stderr
    assert "1 row passed over: 1 no text, first at" in result.stdout
    loaded = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    ids = loaded("Congress, naïve 漢字\n")["input_ids"]
    assert loaded.convert_ids_to_tokens(ids)[0] == "[CLS]"
    assert loaded.convert_ids_to_tokens(ids)[-1] == "[SEP]"
    assert loaded.decode(ids, skip_special_tokens=True) == "Congress, naïve 漢字\n"
    assert loaded.unk_token_id not in ids
    assert loaded.mask_token_id == loaded.convert_tokens_to_ids("[MASK]")
    assert "at least 262" in run_neobert(*command, "--vocab-size", "100").stderr


def test_inert_tokens_change_no_fingerprint():
    from neobert.data.tokenizer import fit_vocabulary, load_tokenizer, text_tokenizer

    hf_tokenizer = load_tokenizer("", str(TOKENIZER))
    before = text_tokenizer(hf_tokenizer).fingerprint
    fit_vocabulary(hf_tokenizer, 9000)
    assert text_tokenizer(hf_tokenizer).fingerprint == before
