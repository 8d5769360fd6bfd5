"""GLUE fine-tuning: ours against transformers' Trainer, on the same weights and hyper-parameters: scores and wall-clock.

The peer is the same model, read from our checkpoint as EuroBertForSequenceClassification (mean pooling, no head dropout), with
rows padded to the longest of their batch, fused AdamW, the same learning rates, epochs, clipping and precision. A seed's first
weights of the head and order of the rows are the same on both sides. The clock runs from reading the rows to the final
evaluation, in a process of its own for every run; imports and checkpoints are left out on both sides. The runs take turns.

Weights are those of `--weights`, a run's folder; without it a small encoder is trained for a minute first. The data is a folder
with <task>/train.jsonl and validation.jsonl (`--data`).
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import ROOT, arguments, bar, finish, run, table, weights_or_own

RATE, ROWS, LENGTH = 3e-4, 32, 128
OPTIONS = {
    "weights": {"default": None}, "data": {"default": str(ROOT.parent / "shared/data/glue")},
    "tasks": {"default": "mrpc,stsb,rte"}, "seeds": {"type": int, "default": 3}, "epochs": {"type": int, "default": 2},
    "one": {"default": None, "help": "ours or peer: one run, in this process"},
}  # fmt: skip


def precision() -> str:
    """bf16 where the CPU computes it, else float32: for both."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "no"


def configuration(args, task: str, seed: int, folder: str):
    """Our configuration of a run."""
    from neobert.config.load import load_config

    words = [
        f"dataset.path={args.data}", f"glue.task_name={task}", f"glue.pretrained_checkpoint_dir={args.weights}",
        "glue.pooling=mean", "glue.classifier_dropout=0", f"glue.max_seq_length={LENGTH}", f"seed={seed}",
        f"trainer.output_dir={folder}", f"trainer.per_device_train_batch_size={ROWS}", "trainer.max_steps=-1",
        f"trainer.num_train_epochs={args.epochs}", "trainer.save_strategy=no", "trainer.save_model=false",
        "trainer.gradient_clipping=1.0", f"trainer.mixed_precision={precision()}", f"optimizer.lr={RATE}",
        "scheduler.name=linear", "scheduler.warmup_percent=10", "scheduler.final_lr_ratio=0.0",
    ]  # fmt: skip
    return load_config([], words, "glue")


def one_of_ours(args, task: str, seed: int) -> tuple[float, float]:
    """(score, seconds)."""
    from neobert.tasks.glue import task as glue

    with tempfile.TemporaryDirectory() as folder:
        loaded, begin = configuration(args, task, seed, folder), time.perf_counter()
        finished = glue.run(loaded)
        seconds = time.perf_counter() - begin
        return glue.read_result(finished.folder)["score"], seconds


def first_head_and_order(args, name: str, seed: int, hf_tokenizer):
    """The head that our run of this seed begins with, and the rows of each epoch in its order."""
    import numpy as np

    from neobert.checkpoints.initial_weights import find_initial_weights
    from neobert.data.labelled import TASKS
    from neobert.ranks import Ranks
    from neobert.tasks.glue.data import build_data
    from neobert.tasks.glue.model import build_classifier
    from neobert.tasks.glue.task import fill_in

    loaded, task = configuration(args, name, seed, "unused"), TASKS[name]
    start = find_initial_weights(loaded.config)
    config = fill_in(loaded.config, task, start)
    model, _ = build_classifier(config, task, start, len(hf_tokenizer), hf_tokenizer.pad_token_id)
    loader = build_data(config, task, hf_tokenizer, Ranks()).train
    loader.close()
    return model, [np.concatenate(loader.order(epoch)).tolist() for epoch in range(args.epochs)]


def one_of_the_peer(args, name: str, seed: int) -> tuple[float, float]:
    """(score, seconds)."""
    import numpy as np
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from neobert.checkpoints.locate import find_checkpoint
    from neobert.data.labelled import TASKS, Source, read_split
    from neobert.tasks.glue import data as glue_data

    task, checkpoint = TASKS[name], find_checkpoint(args.weights)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first, orders = first_head_and_order(args, name, seed, tokenizer)
    remaining = iter(orders)

    class InOurOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            class Sampler(torch.utils.data.Sampler):
                def __iter__(self):
                    return iter(next(remaining))

                def __len__(self):
                    return len(orders[0])

            return Sampler()

    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def rows(split: str) -> list[dict]:
        found = read_split(Source(args.data), task, split)
        encoded = tokenizer(*found.texts, truncation="longest_first", max_length=LENGTH)["input_ids"]
        kind = int if task.labels else float
        return [{"input_ids": ids, "labels": kind(y)} for ids, y in zip(encoded, found.labels, strict=True)]

    train, validation = rows("train"), rows("validation")
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=task.num_labels, classifier_pooling="mean"
    )
    for layer in ("dense", "classifier"):
        getattr(model, layer).load_state_dict(getattr(first, layer).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, per_device_eval_batch_size=ROWS, num_train_epochs=args.epochs,
            learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.01, max_grad_norm=1.0,
            bf16=precision() == "bf16", optim="adamw_torch_fused", save_strategy="no", report_to=[], seed=seed,
            disable_tqdm=True, use_cpu=True, logging_strategy="no", dataloader_num_workers=0,
        )  # fmt: skip
        trainer = InOurOrder(
            model, settings, train_dataset=train, eval_dataset=validation,
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        logits = trainer.predict(validation).predictions
    labels = np.array([row["labels"] for row in validation], dtype=float)
    score = glue_data.score(task, glue_data.measure(task, np.asarray(logits).reshape(len(labels), -1), labels))
    return score, time.perf_counter() - begin


def measure(args, system: str, task: str, seed: int) -> tuple[float, float]:
    """One run in a process of its own."""
    words = ["--one", system, "--tasks", task, "--weights", args.weights, "--data", args.data, "--epochs", args.epochs]
    printed = run([sys.executable, __file__, *words, "--seeds", seed], PYTHONWARNINGS="ignore")
    return tuple(json.loads(printed.splitlines()[-1]))


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if args.one is not None:
        function = {"ours": one_of_ours, "peer": one_of_the_peer}[args.one]
        print(json.dumps(function(args, args.tasks, args.seeds)))
        return
    if not Path(args.data).is_dir():
        print(f"no data at {args.data}: name it with --data")
        return
    if args.quick:
        args.tasks, args.seeds, args.epochs = "rte", 1, 1
    with weights_or_own(args.weights, args.quick) as args.weights:
        compare(args)
    finish()


def compare(args) -> None:
    """The table, and the bars."""
    lines, ratios = [("task", "ours", "Trainer", "ours s", "Trainer s", "ratio")], []
    apart = {}
    for task in args.tasks.split(","):
        found = {"ours": [], "peer": []}
        for seed in range(args.seeds):
            for system, values in found.items():
                values.append(measure(args, system, task, seed))
        scores = {system: [score for score, _ in values] for system, values in found.items()}
        seconds = {system: statistics.median(s for _, s in values) for system, values in found.items()}
        ratios.append(seconds["peer"] / seconds["ours"])
        told = {system: f"{100 * statistics.fmean(v):.2f} ± {100 * spread(v):.2f}" for system, v in scores.items()}
        lines.append(
            (task, told["ours"], told["peer"], f"{seconds['ours']:.1f}", f"{seconds['peer']:.1f}", f"{ratios[-1]:.2f}")
        )
        larger = max(map(spread, scores.values()))
        difference = abs(statistics.fmean(scores["ours"]) - statistics.fmean(scores["peer"]))
        apart[task] = difference / larger if larger else 0.0
    table(lines)
    if args.seeds > 1:
        for task, value in apart.items():
            bar(f"glue_{task}_means_apart_in_sd", value, 1.0, at_most=True)
    bar("glue_seconds_over_trainer", statistics.geometric_mean(ratios), 1.3)


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
