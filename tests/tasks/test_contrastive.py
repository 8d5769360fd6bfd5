"""Contrastive runs: any pairs, one source a batch, resumed = uninterrupted, evaluation, and what bad input is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import run_neobert
from helpers.glue import foreign_model, pretrain_tiny
from helpers.pairs import (
    CONTRASTIVE_TINY,
    WORDS,
    load_contrastive,
    made_labels,
    made_pairs,
    made_scores,
    run_contrastive,
    three_sources,
    trained,
    write_rows,
)
from helpers.runs import TEXT
from neobert.checkpoints.initial_weights import InitialWeights
from neobert.config.schema import Config
from neobert.data.pairs.table import PAIR_SETS, find_roles
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import DataError, UserError
from neobert.ranks import Ranks
from neobert.tasks.contrastive.data import build_data
from neobert.tasks.contrastive.task import fill_in


def data_of(*words, rank=0, world=1):
    """The data of a run that is not started."""
    loaded = load_contrastive(*words)
    config = fill_in(loaded.config, InitialWeights())
    return build_data(config, load_tokenizer("", config.tokenizer.path), Ranks(rank, world))


def texts_of(batch):
    """The texts of a batch as tuples of token ids."""
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


# --- the data -----------


def test_every_row_once_an_epoch_and_batches_of_one_source(tmp_path):
    words = three_sources(tmp_path)
    data = data_of(*words, "trainer.per_device_train_batch_size=7", "dataset.pretraining_prob=0.25")
    batches = [next(data.train) for _ in range(400)]
    plain = [b for b in batches if len(b.input_ids) == 14 and texts_of(b)[:7] != texts_of(b)[7:]]
    hard = [b for b in batches if len(b.input_ids) == 21]
    text = [b for b in batches if len(b.input_ids) == 14 and texts_of(b)[:7] == texts_of(b)[7:]]
    shares = [len(part) / 400 for part in (plain, hard, text)]
    assert np.allclose(shares, [0.25, 0.5, 0.25], atol=0.02)
    first = [one for b in plain[:3] for one in texts_of(b)[:7]]
    assert len(set(first)) == 21
    assert first != [one for b in plain[3:6] for one in texts_of(b)[:7]]  # another order in the next epoch


def test_two_ranks_have_the_batches_of_one(tmp_path):
    words = three_sources(tmp_path)
    one = data_of(*words, "trainer.per_device_train_batch_size=8")
    two = [data_of(*words, "trainer.per_device_train_batch_size=4", rank=rank, world=2) for rank in (0, 1)]
    for _ in range(12):
        whole, halves = next(one.train), [next(data.train) for data in two]
        texts = texts_of(whole)
        pairs = [(texts_of(half)[:4], texts_of(half)[4:8]) for half in halves]
        assert texts[:8] == [t for anchors, _ in pairs for t in anchors]
        assert texts[8:16] == [t for _, positives in pairs for t in positives]
        for half in halves:
            for name in ("row_keys_G", "anchor_keys_G", "negative_keys", "negative_rows"):
                assert torch.equal(half.keys[name], whole.keys[name])
            assert sum(half.keys["num_negatives"]) == sum(whole.keys["num_negatives"])


def test_a_labelled_text_goes_with_another_one_of_its_class(tmp_path):
    path = write_rows(tmp_path / "labels.jsonl", [*made_labels(30), {"text": "alone", "label": 9}])
    data = data_of(f"dataset.path={path}", "contrastive.loss_type=supcon")
    assert any("1 texts are alone" in message for message in data.messages)
    tokenizer = load_tokenizer("", CONTRASTIVE_TINY[6].partition("=")[2])
    for _ in range(10):
        batch = next(data.train)
        words = [{w for w in tokenizer.decode(ids).split() if w in WORDS} for ids in texts_of(batch)]
        assert words[:8] == words[8:]
        assert all(a != b for a, b in zip(texts_of(batch)[:8], texts_of(batch)[8:], strict=True))
        assert len(set(batch.keys["row_keys_G"].tolist())) <= 4
        assert batch.num_targets == 16


def test_pairs_with_a_high_score_are_positives(tmp_path):
    path = write_rows(tmp_path / "scores.csv", [])
    rows = made_scores(24)
    path.write_text("sentence1,sentence2,score\n" + "".join(f"{','.join(map(str, row.values()))}\n" for row in rows))
    messages = data_of(f"dataset.path={path}").messages
    assert any("8 of 24 pairs have a score of at least 4 " in message for message in messages)
    assert any("12 of 24" in message for message in data_of(f"dataset.path={path}", "contrastive.min_score=3").messages)


FORMATS = {
    "lists": '["the question about peace", "an answer of peace"]\n["on war", "of war", "no"]\n',
    "query_pos_neg": '{"query": "peace?", "pos": ["peace", "law"], "neg": ["war"]}\n{"query": "q", "pos": ["p"], "neg": []}\n',
    "columns": '{"title": "about peace", "body": "peace"}\n{"title": "on war", "body": "war"}\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_kinds_of_rows(name, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(FORMATS[name])
    words = ["dataset.columns={anchor: title, positive: body}"] if name == "columns" else []
    data = data_of(f"dataset.path={path}", *words, "trainer.per_device_train_batch_size=2")
    rows = {"lists": 2, "query_pos_neg": 3, "columns": 2}[name]
    assert f"{rows} pairs" in data.describe[0]
    assert ("1 hard negatives" in data.describe[0]) == (name == "lists")
    assert ("2 hard negatives" in data.describe[0]) == (name == "query_pos_neg")


def test_public_sets_have_the_roles_of_rows():
    for one in PAIR_SETS.values():
        roles = find_roles(list(one.columns.values()), one.columns, one.repository)
        assert roles.kind in ("pairs", "scores")


def test_temperature_shares_by_size(tmp_path):
    entries = [{"path": str(write_rows(tmp_path / f"{n}.jsonl", made_pairs(n)))} for n in (40, 10)]
    mixture = f"dataset.mixture={json.dumps(entries)}"
    assert data_of(mixture).train.weights == [0.5, 0.5]
    assert np.allclose(data_of(mixture, "dataset.mixture_temperature=1").train.weights, [0.8, 0.2])
    assert np.allclose(data_of(mixture, "dataset.mixture_temperature=2").train.weights, [2 / 3, 1 / 3])


# --- runs -----------


def test_resumed_equals_uninterrupted_with_three_sources(tmp_path, capsys):
    words = [
        *three_sources(tmp_path), "model.dropout_prob=0.1", "trainer.max_steps=10", "trainer.save_steps=4",
        "trainer.gradient_accumulation_steps=2", "dataset.num_workers=1", "dataset.pretraining_prob=0.4",
    ]  # fmt: skip
    whole = trained(capsys, *words, f"trainer.output_dir={tmp_path / 'whole'}")
    shutil.copytree(tmp_path / "whole/checkpoints/4", tmp_path / "half/checkpoints/4")
    again = [*words, f"trainer.output_dir={tmp_path / 'half'}", "trainer.resume_from_checkpoint=latest"]
    half = trained(capsys, *again)
    assert half.losses == whole.losses[4:]
    assert [row["uniformity"] for row in half.train] == [row["uniformity"] for row in whole.train[4:]]
    names = [tmp_path / f"{name}/checkpoints/10/model.safetensors" for name in ("whole", "half")]
    first, second = map(load_file, names)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="weights was"):
        run_contrastive(*again, "dataset.pretraining_prob=0.2", "trainer.max_steps=12")


@pytest.mark.parametrize("loss_type", ["simcse", "supcon"])
def test_it_learns(loss_type, tmp_path, capsys):
    path = write_rows(tmp_path / "pairs.jsonl", made_pairs(48) if loss_type == "simcse" else made_labels(48))
    words = [
        f"dataset.path={path}", f"contrastive.loss_type={loss_type}", "trainer.max_steps=60", "optimizer.lr=3e-3",
        f"trainer.output_dir={tmp_path / 'out'}", "trainer.log_train_accuracy=true",
        f"optimizer.name={'muonclip' if loss_type == 'supcon' else 'adamw'}", "datacollator.pack_sequences=true",
    ]  # fmt: skip
    run = trained(capsys, *words)
    assert np.mean(run.losses[-5:]) < 0.75 * run.losses[0]
    assert run.train[-1]["accuracy"] >= run.train[0]["accuracy"] > 0
    assert "alignment" in run.train[-1]


def test_starts_from_a_run_evaluates_and_embeds(tmp_path, capsys):
    """Scores and pairs held out; the checkpoint is one of transformers', and `embed` gives the vectors of its encoder."""
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    source = pretrain_tiny(tmp_path / "pretrained", "model.hidden_size=64")
    write_rows(tmp_path / "pairs/train.jsonl", made_pairs())
    write_rows(tmp_path / "pairs/validation.jsonl", made_pairs(12))
    evaluation = [{"path": str(write_rows(tmp_path / "scores.jsonl", made_scores())), "label": "sts"}]
    words = [w for w in CONTRASTIVE_TINY if not w.startswith(("model.", "tokenizer.path", "contrastive."))]
    words += [
        f"contrastive.pretrained_checkpoint_dir={source}", f"dataset.path={tmp_path / 'pairs'}",
        f"contrastive.evaluation={json.dumps(evaluation)}", f"trainer.output_dir={tmp_path / 'out'}", "trainer.eval_steps=2",
    ]  # fmt: skip
    from neobert.config.load import load_config
    from neobert.inference.embed import embed_file, load_embedder
    from neobert.tasks.contrastive import task as contrastive

    finished = contrastive.run(load_config([], words, "contrastive"))
    assert set(finished.values) == {"pairs_mrr@10", "pairs_ndcg@10", "sts_spearman", "score"}
    assert all(-1 <= value <= 1 for value in finished.values.values())
    embedder = load_embedder(str(finished.folder))
    texts = [row["anchor"] for row in made_pairs(9)] + ["peace " * 100]
    vectors = embedder.encode(texts, normalize=False)
    theirs = SentenceTransformer(str(finished.folder / "checkpoints/4"), device="cpu")
    assert np.allclose(theirs.encode(texts), embedder.encode(texts), atol=1e-5)
    assert theirs.max_seq_length == embedder.max_length
    assert np.allclose(vectors, transformers_vectors(finished.folder / "checkpoints/4", texts, 128), atol=1e-5)
    path = write_rows(tmp_path / "texts.jsonl", [{"id": n, "body": text} for n, text in enumerate(texts)])
    for name in ("a.npy", "a.parquet"):
        assert embed_file(embedder, str(path), tmp_path / name, "body", normalize=False) == (10, 64)
    assert np.array_equal(np.load(tmp_path / "a.npy"), vectors)
    with pytest.raises(DataError, match="not a kind of file"):
        embed_file(embedder, str(path), tmp_path / "a.txt", "body")
    said = run_neobert("similarity", finished.folder, texts[0], texts[0], "something else")
    assert said.stdout.startswith(" 1.0000  the 0th question"), said.stderr


def test_the_best_is_what_a_run_ends_with(tmp_path, capsys):
    """Its folder means the best checkpoint, every row of the log the step that it names."""
    pytest.importorskip("sentence_transformers")
    from neobert.checkpoints.locate import find_checkpoint
    from neobert.inference.embed import load_embedder

    write_rows(tmp_path / "pairs/train.jsonl", made_pairs())
    write_rows(tmp_path / "pairs/validation.jsonl", made_pairs(12))
    run = trained(
        capsys, f"dataset.path={tmp_path / 'pairs'}", f"trainer.output_dir={tmp_path / 'out'}", "optimizer.lr=0.3",
        "trainer.load_best_model_at_end=true", "trainer.eval_steps=1", "trainer.max_steps=6",
    )  # fmt: skip
    assert [row["step"] for row in run.eval] == [1, 2, 3, 4, 5, 6]
    best = max(run.eval, key=lambda row: row["eval_score"])["step"]
    assert find_checkpoint(str(run.folder)).name == str(best) != "6"
    texts = [row["anchor"] for row in made_pairs(3)]
    vectors = [load_embedder(str(one)).encode(texts) for one in (run.folder, run.folder / f"checkpoints/{best}")]
    assert np.array_equal(*vectors)


def transformers_vectors(folder, texts, max_length):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


def test_starts_from_an_encoder_of_transformers(tmp_path):
    """Its checkpoints are read by AutoModel, embedded, resumed, and started from."""
    source = foreign_model(tmp_path / "bert")
    words = [w for w in CONTRASTIVE_TINY if not w.startswith(("model.", "tokenizer.path", "contrastive."))]
    path = write_rows(tmp_path / "pairs.jsonl", made_pairs(30, negatives=True))
    words += [f"dataset.path={path}", "model.from_hub=true", "dataset.max_seq_length=32", "trainer.save_steps=2"]
    from neobert.config.load import load_config
    from neobert.inference.embed import load_embedder
    from neobert.tasks.contrastive import task as contrastive

    def run(name, model, *more):
        given = [*words, f"model.name={model}", f"trainer.output_dir={tmp_path / name}", *more]
        return contrastive.run(load_config([], given, "contrastive")).folder / "checkpoints"

    first = run("first", source)
    texts = [row["positive"] for row in made_pairs(7)]
    vectors = load_embedder(str(first)).encode(texts, normalize=False)
    assert np.allclose(vectors, transformers_vectors(first / "4", texts, 32), atol=1e-5)
    shutil.copytree(first / "2", tmp_path / "again/checkpoints/2")
    again = run("again", source, "trainer.resume_from_checkpoint=latest")
    for name, tensor in load_file(first / "4/model.safetensors").items():
        assert torch.equal(tensor, load_file(again / "4/model.safetensors")[name])
    assert run("next", first / "4").is_dir()
    with pytest.raises(UserError, match="max_seq_length: 512 is longer than the 64 tokens that"):
        run("long", source, "dataset.max_seq_length=512")


# --- bad input -----------


def row(**columns):
    return json.dumps(columns) + "\n"


PAIR = row(anchor="about peace", positive="peace") + row(anchor="on war", positive="war")
BAD = {
    "missing columns": (row(title="a", body="b", more="c"), [], "has the columns title, body, more"),
    "a role that is not there": (PAIR, ["dataset.columns={anchor: anchor, positive: body}"], "no column 'body'"),
    "half a pair": (PAIR, ["dataset.columns={anchor: anchor}"], "anchor do not make a row"),
    "no such role": (PAIR, ["dataset.columns={question: anchor}"], "no role 'question'"),
    "only empty positives": (row(anchor="a", positive="") * 3, [], "3 without positive, first"),
    "an empty positive": (PAIR + row(anchor="a", positive=" "), ["dataset.bad_rows=refuse"], "jsonl:3: without positive"),
    "one class": (
        row(text="a", label=1) + row(text="b", label=1), ["contrastive.loss_type=supcon"], "one class only, '1'"
    ),
    "classes of one": (row(text="a", label=1) + row(text="b", label=2), [], "no two classes of two texts"),
    "one row": (PAIR, ["trainer.per_device_train_batch_size=1"], "1 row has no other to be told from"),
    "identical pairs": (row(anchor="a", positive="a") * 9, [], "no two different texts"),
    "identical texts": (row(text="just the same") * 9, ["dataset.min_length=0"], "are all the same"),
    "short texts": (row(text="short") + row(text="too"), [], "lower dataset.min_length"),
    "a score for a label": (row(text="a", label=0.5) * 2, [], "a score where a label is expected"),
    "no number": (row(text1="a", text2="b", score="high"), [], "is 'high', and a score is a number"),
    "high scores only": (row(text1="a", text2="b", score=1), ["contrastive.min_score=3"], "no score of at least 3"),
    "no list of texts": ("3\n", [], "expected an object with columns, or a list of texts"),
    "long texts": (
        row(anchor="peace " * 90, positive="war") + PAIR, ["tokenizer.truncation=false"], "at most 64 are allowed"
    ),
    "no weights": (PAIR, ["contrastive.allow_random_weights=false"], "contrastive.pretrained_checkpoint_dir: no weights"),
    "nothing to evaluate": (PAIR, ["trainer.save_strategy=best"], "needs evaluation data"),
    "no split": (PAIR, ["dataset.train_split=dev"], "no split 'dev'"),
    "not there": (PAIR, ["dataset.mixture=[{path: nowhere.jsonl}]"], "dataset.mixture.0.path: nothing at 'nowhere.jsonl'"),
    "not in the cache": (PAIR, ["dataset.mixture=[{name: gooaq}]"], "sentence-transformers/gooaq"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path):
    text, words, expected = BAD[name]
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        run_contrastive(f"dataset.path={tmp_path / 'bad.jsonl'}", f"trainer.output_dir={tmp_path / 'out'}", *words)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_rows_are_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIR + row(anchor="a") + row(anchor=3, positive="b"))
    messages = data_of(f"dataset.path={path}").messages
    assert any("2 rows passed over" in message and "pairs.jsonl:3" in message for message in messages)


def test_the_command_tells_what_is_wrong(tmp_path):
    assert isinstance(load_contrastive().config, Config)
    said = run_neobert("embed", TEXT, tmp_path / "none.txt", "-o", tmp_path / "a.npy")
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1
