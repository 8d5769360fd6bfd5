"""Small made-up pairs for tests, and runs on them."""

import json

from helpers.runs import TEXT, TOKENIZER, Trained
from neobert.config.load import load_config
from neobert.tasks.contrastive import task as contrastive

CONTRASTIVE_TINY = [
    "contrastive.allow_random_weights=true",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    "model.max_position_embeddings=64",
    f"tokenizer.path={TOKENIZER}",
    "tokenizer.padding=longest",
    "dataset.num_workers=0",
    "trainer.per_device_train_batch_size=8",
    "trainer.max_steps=4",
    "trainer.logging_steps=1",
    "trainer.mixed_precision=no",
    "optimizer.lr=1e-3",
    "scheduler.warmup_steps=1",
]
WORDS = ("peace", "war", "trade", "law", "land", "money", "ships", "rivers", "schools", "health", "roads", "farms")


def made_pairs(number=40, negatives=False):
    """Pairs whose texts share a word."""
    rows = []
    for n in range(number):
        word, other = WORDS[n % 12], WORDS[(n + 5) % 12]
        row = {"anchor": f"the {n}th question about {word}", "positive": f"congress spoke {n} times of {word} and law"}
        rows.append({**row, "negative": f"nobody spoke of {other} {n} times"} if negatives else row)
    return rows


def made_labels(number=40, classes=4):
    return [{"text": f"report {n} speaks about {WORDS[n % classes]}", "label": n % classes} for n in range(number)]


def made_scores(number=40):
    return [
        {
            "sentence1": f"about {WORDS[n % 12]}",
            "sentence2": f"{n} about {WORDS[n * (n % 2) % 12]}",
            "score": (n % 6) * 1.0,
        }
        for n in range(number)
    ]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def three_sources(folder):
    """Overrides that mix pairs, pairs with hard negatives, and plain text."""
    entries = [
        {"path": str(write_rows(folder / "plain.jsonl", made_pairs(21)))},
        {"path": str(write_rows(folder / "hard.jsonl", made_pairs(34, negatives=True))), "weight": 2.0},
        {"path": str(TEXT)},
    ]
    return [f"dataset.mixture={json.dumps(entries)}", "dataset.min_length=40"]


def load_contrastive(*words):
    return load_config([], [*CONTRASTIVE_TINY, *map(str, words)], "contrastive")


def run_contrastive(*words):
    return contrastive.run(load_contrastive(*words))


def trained(capsys, *words):
    """A run in this process, with what it printed."""
    capsys.readouterr()
    finished = run_contrastive(*words)
    return Trained(finished, capsys.readouterr().out)
