"""What pretraining here is worth: an encoder trained for about 30 CPU minutes against the same model from random weights.

A tokenizer and a masked-LM encoder (256 wide, 4 layers) are trained on `--text`; then both models are fine-tuned on four tasks
of GLUE under one protocol, with `--seeds` seeds each. Everything is kept in `--folder`: what is there is not done again, and a
run that was stopped goes on. `--weights` names an encoder that was pretrained before.
"""

import json
import resource
from pathlib import Path

from _bench import QUICKSTART, ROOT, arguments, bar, finish, neobert, run, table

SHARED = ROOT.parent / "shared/data"
OPTIONS = {
    "text": {"default": str(SHARED / "prose")}, "data": {"default": str(SHARED / "glue")},
    "folder": {"default": str(ROOT / "outputs/glue-pretrained")}, "weights": {"default": None},
    "steps": {"type": int, "default": 3200}, "seeds": {"type": int, "default": 3},
    "tasks": {"default": "cola,mrpc,stsb,rte"},
}  # fmt: skip
PRETRAINING = [
    "dataset.max_seq_length=512", "tokenizer.max_length=512", "dataset.validation_split=0.02",
    "trainer.per_device_train_batch_size=8", "trainer.mixed_precision=bf16",
    "trainer.eval_max_batches=20", "trainer.eval_steps=800", "trainer.save_steps=400",
    "optimizer.name=muonclip", "optimizer.lr=2e-3", "optimizer.betas=[0.9, 0.98]",
    "scheduler.name=linear", "scheduler.warmup_percent=5", "scheduler.final_lr_ratio=0.0",
]  # fmt: skip
FINETUNING = [
    "glue.pooling=mean", "glue.max_seq_length=128", "trainer.per_device_train_batch_size=32", "trainer.max_steps=-1",
    "trainer.num_train_epochs=3", "trainer.eval_strategy=epoch", "trainer.save_strategy=no", "trainer.mixed_precision=bf16",
    "trainer.gradient_clipping=1.0", "optimizer.lr=3e-4", "scheduler.name=linear", "scheduler.warmup_percent=10",
    "scheduler.final_lr_ratio=0.0",
]  # fmt: skip


def pretrain(args) -> str:
    """The run's folder."""
    folder = Path(args.folder)
    tokenizer, output = folder / "tokenizer", folder / "pretrained"
    texts = sorted(Path(args.text).glob("*.jsonl"))
    if not tokenizer.is_dir():
        run(neobert("tokenizer", "train", *texts, "-o", tokenizer, "--vocab-size", 16000))
    words = [f"dataset.path={args.text}", f"tokenizer.path={tokenizer}", f"trainer.output_dir={output}"]
    words += [f"trainer.max_steps={args.steps}", "trainer.resume_from_checkpoint=latest", *PRETRAINING]
    run(neobert("pretrain", QUICKSTART, *words))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"pretrained: {args.steps:,} steps, {(used.ru_utime + used.ru_stime) / 60:.0f} CPU minutes\n", flush=True)
    return str(output)


def suite(args, name: str, start: list[str]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of the score, by task."""
    output, config = Path(args.folder) / name, Path(args.folder) / "glue.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("task: glue\n")
    words = [f"dataset.path={args.data}", f"trainer.output_dir={output}", *FINETUNING, *start]
    run(neobert("glue", config, "--tasks", args.tasks, "--seeds", args.seeds, *words))
    tasks = json.loads((output / "results.json").read_text())["tasks"]
    return {task: (found["score"]["mean"], found["score"]["std"] or 0.0) for task, found in tasks.items()}


def random_start(weights: str) -> list[str]:
    """The architecture and the tokenizer of a run, without its weights."""
    checkpoint = next(path for path in sorted(Path(weights).glob("checkpoints/[0-9]*")))
    config = json.loads((checkpoint / "config.json").read_text())["neobert"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    words = [f"model.{name}={config[name]}" for name in names]
    return ["glue.allow_random_weights=true", f"tokenizer.path={checkpoint / 'tokenizer'}", *words]


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if not (Path(args.text).is_dir() and Path(args.data).is_dir()):
        print(f"no data at {args.text} and {args.data}: name it with --text and --data")
        return
    if args.quick:
        args.steps, args.tasks, args.seeds, args.folder = 20, "rte", 1, args.folder + "-quick"
    weights = args.weights or pretrain(args)
    pretrained = [f"glue.pretrained_checkpoint_dir={weights}"]
    scores = {
        "pretrained": suite(args, "glue-pretrained", pretrained),
        "random": suite(args, "glue-random", random_start(weights)),
    }
    rows, num_better = [("task", "pretrained", "random", "difference in sd")], 0
    for task in args.tasks.split(","):
        (mean, sd), (base, base_sd) = scores["pretrained"][task], scores["random"][task]
        apart = (mean - base) / (max(sd, base_sd) or float("inf"))
        num_better += apart > 1
        rows.append(
            (task, f"{100 * mean:.2f} ± {100 * sd:.2f}", f"{100 * base:.2f} ± {100 * base_sd:.2f}", f"{apart:.1f}")
        )
    table(rows)
    if not args.quick:
        bar("glue_tasks_better_by_more_than_one_sd", num_better, 3)
    finish()


if __name__ == "__main__":
    main()
