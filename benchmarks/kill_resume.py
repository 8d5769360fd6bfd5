"""Bitwise resume: a run is killed with SIGKILL at random steps, resumed each time, and compared with a run that was not.

For each kind of data (tokens, raw text) and of rows (packed, padded), and for a stream: five kills in one run, at steps drawn
uniformly over its length, whatever it is doing there. The final weights must be equal to the bit.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _bench import ROOT, TEXT, TOKENIZER, arguments, bar, finish, neobert, run, table

VARIANTS = {
    "pre-tokenised, packed": [
        "datacollator.pack_sequences=true",
        "dataset.streaming=false",
        "dataset.pre_tokenize=true",
    ],
    "pre-tokenised, padded": ["dataset.streaming=false", "dataset.pre_tokenize=true"],
    "raw text, packed": ["datacollator.pack_sequences=true", "dataset.streaming=false"],
    "raw text, padded": ["dataset.streaming=false"],
    "stream, packed": ["datacollator.pack_sequences=true", "dataset.num_workers=2", "dataset.shuffle_buffer_size=500"],
}
BASE = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=128",
    "model.dropout_prob=0.1", "model.max_position_embeddings=128", "dataset.max_seq_length=128", "dataset.num_workers=0",
    f"dataset.path={TEXT}", f"tokenizer.path={TOKENIZER}", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1",
    "trainer.eval_steps=70", "trainer.eval_max_batches=4", "trainer.save_steps=10", "scheduler.warmup_steps=5",
]  # fmt: skip


def command(folder: Path, steps: int, words: list[str]) -> list[object]:
    config = folder / "config.yaml"
    config.write_text("task: pretraining\n")
    return neobert("run", config, *BASE, *words, f"trainer.max_steps={steps}", f"trainer.output_dir={folder / 'out'}")


def killed_run(folder: Path, steps: int, words: list[str], kills: int) -> list[int]:
    """Train with `kills` interruptions, each as soon as a random step was logged; returns those steps."""
    targets = sorted(random.sample(range(1, steps), kills))
    resumed = [str(word) for word in (*command(folder, steps, words), "trainer.resume_from_checkpoint=latest")]
    for target in targets:
        process = subprocess.Popen(resumed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while last_step(folder / "out/metrics.jsonl") < target:
            if process.poll() is not None:
                sys.exit(f"the run ended before step {target}")
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.wait()
    run(resumed)
    return targets


def last_step(path: Path) -> int:
    """The newest step in metrics.jsonl."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}")), 0)


def main() -> None:
    options = arguments(__doc__, kills={"type": int, "default": 5})
    os.environ["HF_HUB_OFFLINE"] = "1"
    variants = dict(list(VARIANTS.items())[:1]) if options.quick else VARIANTS
    steps, rows, equal = 300, [("", "killed at steps", "weights")], 0
    for name, words in variants.items():
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
            run(command(Path(whole), steps, words))
            targets = killed_run(Path(broken), steps, words, options.kills)
            files = [Path(folder) / f"out/checkpoints/{steps}/model.safetensors" for folder in (whole, broken)]
            same = files[0].read_bytes() == files[1].read_bytes()
            equal += same
            rows.append((name, ", ".join(map(str, targets)), "equal to the bit" if same else "DIFFERENT"))
    table(rows)
    bar("kill_resume", equal / len(variants), 1.0)
    finish()


if __name__ == "__main__":
    main()
