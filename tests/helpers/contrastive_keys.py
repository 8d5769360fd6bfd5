"""Rows of test_every_key.py for the keys of contrastive training: what a user can observe when one is not the default."""

import json
from pathlib import Path

import pytest

from helpers.glue import pretrain_tiny
from helpers.pairs import load_contrastive, made_pairs, made_scores, run_contrastive, three_sources, write_rows
from neobert.checkpoints.initial_weights import find_initial_weights
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import UserError
from neobert.ranks import Ranks
from neobert.tasks.contrastive.data import build_data
from neobert.training.metrics import read_metrics


def base_of(small):
    """(folder of the test, overrides of a run on pairs with hard negatives)."""
    root = Path(small[0].removeprefix("dataset.path=")).parent
    path = write_rows(root / "pairs.jsonl", made_pairs(30, negatives=True))
    return root, [f"dataset.path={path}", f"trainer.output_dir={root / 'out'}"]


def train_losses(*words):
    rows = read_metrics(run_contrastive(*words).folder / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def changes_losses(*words):
    """The losses of a run differ with the words."""

    def row(train, small):
        _, base = base_of(small)
        return train_losses(*base, *words) != train_losses(*base)

    return row


def data_of(*words):
    config = load_contrastive(*words).config
    return config, build_data(config, load_tokenizer("", config.tokenizer.path), Ranks())


def weights_with(word):
    """The shares of three sources, two of pairs and one of text, with and without a key."""

    def row(train, small):
        words = [*three_sources(base_of(small)[0]), "dataset.max_seq_length=64"]
        return data_of(*words)[1].train.weights != data_of(*words, word)[1].train.weights

    return row


def passes_over_short_texts(train, small):
    _, base = base_of(small)
    root = Path(small[0].removeprefix("dataset.path="))
    texts = [f"dataset.path={root / 'train.txt'}", "dataset.max_seq_length=64"]
    assert next(data_of(*base, *texts, "dataset.min_length=10")[1].train).num_targets == 8
    with pytest.raises(UserError, match="lower dataset.min_length"):
        next(data_of(*base, *texts)[1].train)
    return True


def scores_choose_positives(train, small):
    root, base = base_of(small)
    words = [*base, f"dataset.path={write_rows(root / 'scores.jsonl', made_scores())}", "dataset.max_seq_length=64"]
    return data_of(*words)[1].describe != data_of(*words, "contrastive.min_score=2.5")[1].describe


def evaluates(train, small):
    root, base = base_of(small)
    entries = [{"path": str(write_rows(root / "scores.jsonl", made_scores())), "label": "sts", "split": "train[:9]"}]
    _, data = data_of(*base, "dataset.max_seq_length=64", f"contrastive.evaluation={json.dumps(entries)}")
    return {name: len(rows) for name, rows in data.sets.items()} == {"sts": 9}


def starts(words_of):
    """The folder that a run starts from, among two checkpoints of one pretraining run."""

    def row(train, small):
        root, base = base_of(small)
        run = pretrain_tiny(root / "pre", "trainer.save_steps=1")
        extra, step = words_of(run)
        start = find_initial_weights(load_contrastive(*base, *extra, "model.max_position_embeddings=128").config)
        return start.folder.name == step and run in start.folder.parents

    return row


def needs_weights(train, small):
    with pytest.raises(UserError, match="no weights to start from"):
        run_contrastive(*base_of(small)[1], "contrastive.allow_random_weights=false")
    return True


def columns_have_roles(train, small):
    root, base = base_of(small)
    rows = [{"title": row["anchor"], "body": row["positive"]} for row in made_pairs()]
    words = [*base, f"dataset.path={write_rows(root / 'other.jsonl', rows)}", "dataset.max_seq_length=64"]
    assert "anchor = title" in data_of(*words, "dataset.columns={anchor: title, positive: body}")[1].describe[0]
    with pytest.raises(UserError, match="say what they are"):
        data_of(*words)
    return True


CONTRASTIVE_ROWS = {
    "contrastive.temperature": changes_losses("contrastive.temperature=0.2"),
    "contrastive.pooling": changes_losses("contrastive.pooling=cls"),
    "contrastive.loss_type": changes_losses("contrastive.loss_type=supcon"),
    "contrastive.hard_negative_weight": changes_losses("contrastive.hard_negative_weight=1.0"),
    "contrastive.min_score": scores_choose_positives,
    "contrastive.evaluation": evaluates,
    "contrastive.pretrained_checkpoint_dir": starts(
        lambda run: ([f"contrastive.pretrained_checkpoint_dir={run}"], "2")
    ),
    "contrastive.pretrained_model_path": starts(lambda run: ([f"contrastive.pretrained_model_path={run}"], "2")),
    "contrastive.pretrained_checkpoint": starts(
        lambda run: ([f"contrastive.pretrained_checkpoint_dir={run}", "contrastive.pretrained_checkpoint=1"], "1")
    ),
    "contrastive.allow_random_weights": needs_weights,
    "dataset.pretraining_prob": weights_with("dataset.pretraining_prob=0.6"),
    "dataset.min_length": passes_over_short_texts,
    "dataset.columns": columns_have_roles,
    "dataset.mixture_temperature": weights_with("dataset.mixture_temperature=1"),
}
