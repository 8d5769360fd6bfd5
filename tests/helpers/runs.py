"""Paths, the configuration that tests share, and ways to run the command."""

import sys
import threading
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


TEXT = ROOT / "examples/quickstart/text"


TOKENIZER = ROOT / "examples/quickstart/tokenizer"


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")  # of ours


SHARED = ROOT.parent / "shared"


TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    "model.max_position_embeddings=128",
    f"tokenizer.path={TOKENIZER}",
    "dataset.max_seq_length=64",
    "dataset.num_workers=0",
    f"dataset.path={TEXT}",
    "dataset.streaming=false",
    "trainer.per_device_train_batch_size=4",
    "trainer.max_steps=6",
    "trainer.logging_steps=1",
    "trainer.eval_max_batches=2",
    "trainer.mixed_precision=no",
    "optimizer.lr=1e-3",
    "scheduler.warmup_steps=2",
]


@contextmanager
def tokenizing_threads():
    """A list that grows by the name of each thread that is started inside to tokenise."""
    names = []

    def started(frame, event, argument):
        sys.setprofile(None)
        if threading.current_thread().name.startswith("tokenise"):
            names.append(threading.current_thread().name)

    threading.setprofile(started)
    try:
        yield names
    finally:
        threading.setprofile(None)


def hub_cache(folder):
    """A local cache of the hub, laid out as huggingface_hub does, with the dataset me/tiny in two configurations."""
    import pyarrow as pa
    import pyarrow.parquet

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = folder / "datasets--me--tiny"
    snapshot = repository / "snapshots" / revision
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    configs = []
    for language, word in (("en", "congress"), ("fr", "assemblée")):
        (snapshot / language).mkdir(parents=True)
        for split, count in (("train", 60), ("validation", 5)):
            texts = [f"the {word} met for the {n}th time to speak about peace and trade" for n in range(count)]
            pa.parquet.write_table(
                pa.table({"content": texts}), snapshot / language / f"{split}-00000-of-00001.parquet"
            )
        default = "\n  default: true" if language == "en" else ""
        files = "".join(f"\n  - split: {s}\n    path: {language}/{s}-*" for s in ("train", "validation"))
        configs.append(f"- config_name: {language}{default}\n  data_files:{files}")
    (snapshot / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n# Tiny\n")
    return folder


class Trained:
    """A run made in this process: its folder, final state, rows of metrics.jsonl, and what it printed."""

    def __init__(self, finished, printed):
        from neobert.checkpoints.format import list_steps
        from neobert.training.metrics import read_metrics

        self.folder, self.state, self.printed = finished.folder, finished.state, printed
        rows = read_metrics(self.folder / "metrics.jsonl")
        self.train = [row for row in rows if row["kind"] == "train"]
        self.eval = [row for row in rows if row["kind"] == "eval"]
        self.losses = [row["loss"] for row in self.train]
        self.steps = list_steps(self.folder / "checkpoints")
