"""AdamW and MuonClip at three learning rates each, on the same tokens: evaluation loss of a short real run.

The model of the quickstart (256 wide, 4 layers), its rows, masking, warmup and cosine, `--steps` steps of 2,048 tokens. Only
the optimizer and its rate change. No bar: what the table says is what it says (docs/training.md has a longer one).
"""

import json
import tempfile
from pathlib import Path

from _bench import QUICKSTART, TEXT, arguments, finish, neobert, run, table

OPTIMIZERS = ("adamw", "muonclip")
RATES = ("3e-4", "1e-3", "3e-3")


def train(text: str, steps: int, optimizer: str, rate: str) -> list[str]:
    """Evaluation losses at the half and at the end, and the largest attention logit seen."""
    with tempfile.TemporaryDirectory() as folder:
        held_out = [] if Path(text).is_dir() else ["dataset.validation_split=0.05"]
        often = [f"trainer.eval_steps={max(1, steps // 2)}", "trainer.logging_steps=10", "trainer.save_model=false"]
        kind = [f"optimizer.name={optimizer}", f"optimizer.lr={rate}", "optimizer.weight_decay=0.1"]
        where = [f"dataset.path={text}", f"trainer.output_dir={folder}", "trainer.save_strategy=no"]
        run(neobert("pretrain", QUICKSTART, *where, *held_out, *often, *kind, f"trainer.max_steps={steps}"))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{row['eval_loss']:.3f}" for row in rows if row["kind"] == "eval"]
    logits = [row["qk_max_logit"] for row in rows if "qk_max_logit" in row]
    return [*losses[:2], f"{max(logits):.1f}" if logits else ""]


def main() -> None:
    options = arguments(
        __doc__,
        text={"default": str(TEXT), "help": "a folder with train and validation files, or one file"},
        steps={"type": int, "help": "default 400; 20 with --quick"},
        optimizer={"nargs": "*", "default": OPTIMIZERS},
        lr={"nargs": "*", "default": RATES},
    )
    steps = options.steps or (20 if options.quick else 400)
    rows = [("optimizer", "lr", f"loss at {steps // 2}", f"at {steps}", "largest logit")]
    for optimizer in options.optimizer:
        for rate in options.lr:
            rows.append((optimizer, rate, *train(options.text, steps, optimizer, rate)))
    table(rows)
    finish()


if __name__ == "__main__":
    main()
