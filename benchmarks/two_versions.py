"""Does this tree do everything as fast as an earlier commit? Both in turn, in one run, on this machine.

Training is measured by the steps after the first ones (`step_seconds` of metrics.jsonl), commands as whole processes. The data
is real (the shared text, pairs and GLUE) where it lies beside the project, and the bar is 0.97 of the earlier speed.

    python benchmarks/two_versions.py --commit ac63e8d
"""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from _bench import ROOT, TEXT, TOKENIZER, arguments, bar, finish, neobert, run, table
from _data import SHARED

MODEL = [
    "model.hidden_size=256",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=4",
    "model.intermediate_size=1024",
]
SMALL = [
    *MODEL,
    f"tokenizer.path={TOKENIZER}",
    "trainer.logging_steps=1",
    "trainer.save_model=false",
    "trainer.save_strategy=no",
]
TASKS: dict[str, list[str]] = {
    "pretraining": [
        f"dataset.path={TEXT}", "dataset.streaming=false", "datacollator.pack_sequences=true",
        "datacollator.mlm_probability=0.2",
        "trainer.per_device_train_batch_size=4", "trainer.eval_steps=100000", "trainer.eval_max_batches=1",
    ],
    "glue": [
        "task=glue", "glue.task_name=mrpc", f"dataset.path={SHARED / 'glue'}", "glue.allow_random_weights=true",
        "trainer.per_device_train_batch_size=32", "trainer.eval_max_batches=1", "trainer.eval_steps=100000",
    ],
    "contrastive": [
        "task=contrastive", f"dataset.path={SHARED / 'pairs/packages.jsonl'}", "contrastive.allow_random_weights=true",
        "dataset.max_seq_length=64", "dataset.streaming=false", "datacollator.pack_sequences=true",
        "trainer.per_device_train_batch_size=64", "trainer.eval_steps=100000",
    ],
}  # fmt: skip
WARM_STEPS = 5


def main() -> None:
    options = arguments(
        __doc__,
        commit={"default": "ac63e8d", "help": "the earlier version"},
        rounds={"type": int, "default": 4, "help": "of both versions; commands take three times as many"},
    )
    rounds, steps = (1, 15) if options.quick else (options.rounds, 25)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        sources = {options.commit: unpack(options.commit, home / "earlier"), "now": ROOT / "src"}
        model = prepare(home, sources[options.commit])
        measures: dict[str, Callable[[Path], float]] = {
            **{name: (lambda source, name=name: train(name, source, home, steps)) for name in TASKS},
            "embed": lambda source: embed(source, model, home),
            "config check": lambda source: wall(
                source, "config", "check", ROOT / "configs/pretraining/quickstart.yaml"
            ),
            "--help": lambda source: wall(source, "--help"),
        }
        rows = [("", f"{options.commit}, seconds", "now, seconds", "speed")]
        ratios = {name: compare(measure, sources, rounds, name, rows) for name, measure in measures.items()}
    table(rows)
    for name, ratio in ratios.items():
        bar(f"{name.strip('-').replace(' ', '_')}_speed", ratio, 0.97)
    finish()


def compare(
    measure: Callable[[Path], float], sources: dict[str, Path], rounds: int, name: str, rows: list[tuple[str, ...]]
) -> float:
    """The speed of the second source in units of the first: the median over rounds, in which both take turns."""
    seconds: dict[str, list[float]] = {version: [] for version in sources}
    for number in range(rounds * (1 if name in TASKS else 3)):
        for version in list(sources)[:: 1 if number % 2 else -1]:
            seconds[version].append(measure(sources[version]))
    old, new = seconds.values()
    rows.append((name, f"{median(old):.4f}", f"{median(new):.4f}", f"{(ratio := median(old) / median(new)):.3f}"))
    return ratio


def unpack(commit: str, folder: Path) -> Path:
    """The source of a commit. Ends the benchmark where the history does not have it."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


def prepare(home: Path, source: Path) -> Path:
    """Texts to embed and a model, trained for a few steps by the earlier version."""
    texts = [line for line in (TEXT / "train.txt").read_text().splitlines() if line][:1500]
    (home / "texts.txt").write_text("\n".join(texts))
    train("pretraining", source, home, 5, keep=True)
    return home / "model"


def train(name: str, source: Path, home: Path, steps: int, keep: bool = False) -> float:
    """Seconds of a step, the median."""
    out = home / ("model" if keep else name)
    shutil.rmtree(out, ignore_errors=True)
    (home / "config.yaml").write_text("task: pretraining\n")
    words = [*SMALL, *TASKS[name], f"trainer.max_steps={steps}", f"trainer.output_dir={out}"]
    words += ["trainer.save_model=true"] if keep else []
    run(neobert("run", home / "config.yaml", *words), PYTHONPATH=str(source))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [row["step_seconds"] for row in rows if row["kind"] == "train"]
    return median(times[WARM_STEPS:] or times)


def embed(source: Path, model: Path, home: Path) -> float:
    """Seconds of embedding a file; earlier versions replaced an output, today's refuses to."""
    (home / "vectors.npy").unlink(missing_ok=True)
    return wall(source, "embed", model, home / "texts.txt", "-o", home / "vectors.npy")


def wall(source: Path, *words: object) -> float:
    """Seconds of a whole command."""
    start = time.perf_counter()
    run(neobert(*words), PYTHONPATH=str(source))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
