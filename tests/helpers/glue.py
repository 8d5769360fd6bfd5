"""Small made-up GLUE data for tests: in the hub's layout and cache, or as local files; and tiny models to start from."""

import json

import pyarrow as pa
import pyarrow.parquet

from helpers.runs import TEXT, TINY, TOKENIZER
from neobert.config.load import load_config
from neobert.data.labelled import TASKS
from neobert.tasks.glue import task as glue
from neobert.tasks.pretraining import task as pretraining

SIZES = {"train": 24, "validation": 10, "test": 6}

GLUE_TINY = [
    "trainer.per_device_train_batch_size=8",
    "trainer.max_steps=-1",
    "trainer.num_train_epochs=1",
    "trainer.logging_steps=1",
    "trainer.mixed_precision=no",
    "glue.max_seq_length=32",
    "glue.num_workers=0",
    "optimizer.lr=1e-3",
    "scheduler.warmup_steps=1",
]
RANDOM = [
    "glue.allow_random_weights=true", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.intermediate_size=48", "model.max_position_embeddings=128", f"tokenizer.path={TOKENIZER}",
]  # fmt: skip


def made_rows(task, number, with_labels=True):
    """Rows that can be told apart by their words."""
    rows = []
    for n in range(number):
        label = n % task.num_labels if task.labels else (n % 6) * 1.0
        word = ("peace", "war", "trade")[int(label) % 3]
        texts = {column: f"the congress met {n} times to speak about {word}" for column in task.columns}
        rows.append({**texts, "label": label if with_labels else -1, "idx": n})
    return rows


def splits_of(task):
    """Split -> made rows, as the hub has them: tests without labels."""
    names = [*(["train"] if task.trains else []), *task.evaluation, *(split for split, _ in task.tests)]
    return {name: made_rows(task, SIZES[name.split("_")[0]], not name.startswith("test")) for name in names}


def write_local(root, names=TASKS, kind="jsonl"):
    """`<root>/<task>/<split>.jsonl`, or parquet files named as the hub names them."""
    for name in names:
        (root / name).mkdir(parents=True)
        for split, rows in splits_of(TASKS[name]).items():
            if kind == "parquet":
                path = root / name / f"{split}-00000-of-00001.parquet"
                pa.parquet.write_table(pa.Table.from_pylist(rows), path)
            else:
                (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_hub_cache(root):
    """A cache of the hub that holds `nyu-mll/glue`, laid out as huggingface_hub does."""
    repository = root / "datasets--nyu-mll--glue"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(snapshot.name)
    write_local(snapshot, kind="parquet")
    configs = ""
    for name, task in TASKS.items():
        files = "".join(f"\n  - split: {split}\n    path: {name}/{split}-*" for split in splits_of(task))
        configs += f"\n- config_name: {name}\n  data_files:{files}"
    (snapshot / "README.md").write_text(f"---\nconfigs:{configs}\n---\n# GLUE\n")
    return root


def load_glue(*words):
    return load_config([], [*GLUE_TINY, *map(str, words)], "glue")


def run_glue(*words):
    """Fine-tune in this process; returns (what the run came to, result.json)."""
    finished = glue.run(load_glue(*words))
    return finished, glue.read_result(finished.folder)


def pretrain_tiny(folder, *words):
    """Two steps of pretraining: a checkpoint to start from."""
    words = [*TINY, f"dataset.path={TEXT}", "trainer.max_steps=2", f"trainer.output_dir={folder}", *words]
    return pretraining.run(load_config([], words, "pretraining")).folder


def foreign_model(folder):
    """A tiny BERT with our shipped tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=8192, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder
