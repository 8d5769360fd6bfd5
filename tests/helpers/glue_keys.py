"""Rows of test_every_key.py for the keys of GLUE: what a user can observe when one is not the default."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.glue import RANDOM, load_glue, pretrain_tiny, run_glue, write_local
from neobert.checkpoints.initial_weights import find_initial_weights
from neobert.data import labelled as classification
from neobert.errors import UserError
from neobert.model.hf_encoder import HFEncoderForSequenceClassification


def base_of(small, name="rte"):
    """Overrides of a run on made data, below the folder of the test."""
    root = Path(small[0].removeprefix("dataset.path=")).parent
    if not (root / "glue").exists():
        write_local(root / "glue", ["rte", "stsb", "mnli"])
    return root, [f"dataset.path={root / 'glue'}", f"glue.task_name={name}", f"trainer.output_dir={root / 'out'}"]


def train_losses(*words):
    finished, _ = run_glue(*words)
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def changes_losses(word, *more):
    """The losses of a run from random weights differ with the word."""

    def row(train, small):
        _, words = base_of(small)
        return train_losses(*words, *RANDOM, *more, word) != train_losses(*words, *RANDOM, *more)

    return row


def refused(text, *words):
    """The run stops with an error that contains `text`."""

    def row(train, small):
        _, base = base_of(small)
        with pytest.raises(UserError) as error:
            run_glue(*base, *words)
        return text in str(error.value)

    return row


def task_decides(train, small):
    results = [run_glue(*base_of(small, name)[1], *RANDOM)[1] for name in ("rte", "stsb")]
    return [sorted(result["metrics"]) for result in results] == [
        ["accuracy", "loss", "score"],
        ["loss", "pearson", "score", "spearman"],
    ]


def starts(words_of):
    """The folder that a run starts from, among two checkpoints of one pretraining run."""

    def row(train, small):
        root, words = base_of(small)
        run = pretrain_tiny(root / "pre", "trainer.save_steps=1")
        extra, step = words_of(run)
        start = find_initial_weights(load_glue(*words, *extra).config)
        return start.folder.name == step and run in start.folder.parents

    return row


def transfers(train, small):
    root, words = base_of(small, "mnli")
    mnli, _ = run_glue(*words, *RANDOM)
    _, words = base_of(small, "rte")
    out = f"trainer.output_dir={root / 'rte'}"
    from_mnli = [f"glue.pretrained_checkpoint_dir={mnli.folder}", "glue.transfer_from_task=true", "optimizer.lr=1e-12"]
    rte, result = run_glue(*words, out, *from_mnli)
    a, b = (load_file(run.folder / "checkpoints/3/model.safetensors") for run in (mnli, rte))
    return result["transferred_from"] == "mnli" and bool((a["dense.weight"] - b["dense.weight"]).abs().max() < 1e-6)


def head_spread(section):
    """How far the classifier's weights go right after a start at a tiny learning rate."""

    def row(train, small):
        _, words = base_of(small)
        found = []
        for extra in ([f"{section}.classifier_init_range=0.5"], []):
            finished, _ = run_glue(*words, *RANDOM, "optimizer.lr=1e-9", *extra)
            weights = load_file(finished.folder / "checkpoints/3/model.safetensors")
            found.append(float(weights["dense.weight"].std()))
        return found[0] > 0.4 > 0.05 > found[1]

    return row


def threads(train, small):
    """As many threads as asked for put batches together; that they change nothing is a law of test_glue.py."""
    from neobert.data.labelled import TASKS
    from neobert.data.tokenizer import load_tokenizer
    from neobert.ranks import Ranks
    from neobert.tasks.glue.data import build_data

    _, words = base_of(small)
    counts = []
    for number in (0, 3):
        config = load_glue(*words, *RANDOM, f"glue.num_workers={number}").config
        loader = build_data(config, TASKS["rte"], load_tokenizer("", config.tokenizer.path), Ranks()).train
        counts.append(loader.num_threads)
        loader.close()
    return counts == [0, 3]


def tokenized_by_threads(train, small):
    """More rows than one thread takes are tokenised by several, to the same ids."""
    from helpers.runs import TOKENIZER, tokenizing_threads
    from neobert.data.tokenizer import load_tokenizer

    split = classification.Split(([f"the congress met {n} times" for n in range(40)],), None)
    made, counts, before = [], [], classification.ROWS_PER_THREAD
    classification.ROWS_PER_THREAD = 20
    try:
        for number in (1, 2):
            tokenizer = load_tokenizer("", str(TOKENIZER))
            with tokenizing_threads() as started:
                made.append(classification.tokenize_rows(tokenizer, split, 32, True, number, "made"))
            counts.append(len(started))
    finally:
        classification.ROWS_PER_THREAD = before
    return counts[0] == 0 < counts[1] and [r.tolist() for r in made[0].ids] == [r.tolist() for r in made[1].ids]


def from_transformers(train, small):
    from helpers.glue import foreign_model
    from neobert.tasks.glue.model import load_finetuned

    root, words = base_of(small)
    words = [*words, "model.from_hub=true", f"model.name={foreign_model(root / 'bert')}"]
    finished, _ = run_glue(*words)
    model, _, _ = load_finetuned(finished.folder / "checkpoints/3")
    return isinstance(model, HFEncoderForSequenceClassification)


GLUE_ROWS = {
    "glue.task_name": task_decides,
    "glue.num_labels": refused("glue.num_labels: 3, but rte has 2", "glue.num_labels=3"),
    "glue.max_seq_length": changes_losses("glue.max_seq_length=12"),
    "glue.pretrained_model_path": starts(lambda run: ([f"glue.pretrained_model_path={run}"], "2")),
    "glue.pretrained_checkpoint_dir": starts(lambda run: ([f"glue.pretrained_checkpoint_dir={run / 'checkpoints'}"], "2")),
    "glue.pretrained_checkpoint": starts(
        lambda run: ([f"glue.pretrained_checkpoint_dir={run}", "glue.pretrained_checkpoint=1"], "1")
    ),
    "pretrained_checkpoint": starts(
        lambda run: ([f"glue.pretrained_checkpoint_dir={run}", "pretrained_checkpoint='1'"], "1")
    ),
    "glue.allow_random_weights": refused("no weights to start from", *RANDOM, "glue.allow_random_weights=false"),
    "glue.classifier_dropout": changes_losses("glue.classifier_dropout=0.5"),
    "glue.classifier_init_range": head_spread("glue"),
    "model.classifier_init_range": head_spread("model"),
    "glue.transfer_from_task": transfers,
    "glue.num_workers": threads,
    "glue.preprocessing_num_proc": tokenized_by_threads,
    "glue.pooling": changes_losses("glue.pooling=mean"),
    "glue.group_by_length": changes_losses("glue.group_by_length=true", "trainer.per_device_train_batch_size=5"),
    "model.from_hub": from_transformers,
}  # fmt: skip
