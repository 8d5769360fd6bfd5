"""Contrastive training: ours against sentence-transformers' trainer, on the same weights, pairs, batch and steps.

The peer is the same encoder, read from our checkpoint as EuroBERT, with mean pooling, MultipleNegativesRankingLoss, fused
AdamW, the same learning rates, clipping, precision and length of texts; its loader pads every column to its longest text.
Seeds differ in the order of the pairs. The clock runs from reading the pairs to the last update, in a process of its own
for every run; imports and evaluation are left out on both sides. The runs take turns. Quality is nDCG@10 of finding the
positives of held-out pairs among all of them, by sentence-transformers' evaluator, on both sides.

Weights are those of `--weights`, a run's folder; without it a small encoder is trained for a minute first. `--data` is a
.jsonl with anchor and positive, of which the last 500 rows are held out.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import ROOT, arguments, bar, finish, run, table, weights_or_own

RATE, ROWS, LENGTH, HELD_OUT = 3e-4, 64, 128, 500
OPTIONS = {
    "weights": {"default": None}, "data": {"default": str(ROOT.parent / "shared/data/pairs/packages.jsonl")},
    "steps": {"type": int, "default": 60}, "seeds": {"type": int, "default": 3},
    "one": {"default": None, "help": "ours or peer: one run, in this process"},
}  # fmt: skip


def precision() -> str:
    """bf16 where the CPU computes it, else float32: for both."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "no"


def split(args) -> tuple[list[dict], list[dict]]:
    """(training pairs, held-out pairs)."""
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def evaluate(model, rows: list[dict]) -> float:
    """nDCG@10 of anything with sentence-transformers' `encode`."""
    from neobert.data.pairs.table import Example, Examples, Roles
    from neobert.tasks.contrastive.data import build_evaluator, evaluate_set

    roles = Roles("pairs", {"anchor": "anchor", "positive": "positive"})
    examples = Examples(roles, [Example(row["anchor"], row["positive"]) for row in rows], "held out")
    return evaluate_set(build_evaluator(examples, ROWS), model)["ndcg@10"]


def one_of_ours(args, seed: int) -> tuple[float, float]:
    """(score, seconds)."""
    from neobert.config.load import load_config
    from neobert.inference.embed import load_embedder
    from neobert.tasks.contrastive import task as contrastive
    from neobert.tasks.contrastive.data import SentenceEncoder

    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"dataset.path={args.data}", f"dataset.train_split=train[:-{HELD_OUT}]", f"dataset.max_seq_length={LENGTH}",
            f"contrastive.pretrained_checkpoint_dir={args.weights}", f"seed={seed}", f"trainer.output_dir={folder}",
            f"trainer.per_device_train_batch_size={ROWS}", f"trainer.max_steps={args.steps}", "trainer.save_strategy=no",
            "trainer.gradient_clipping=1.0", f"trainer.mixed_precision={precision()}", "trainer.disable_tqdm=true",
            f"optimizer.lr={RATE}", "scheduler.name=linear", "scheduler.warmup_percent=10", "scheduler.final_lr_ratio=0.0",
            "datacollator.pack_sequences=true",
        ]  # fmt: skip
        loaded, begin = load_config([], words, "contrastive"), time.perf_counter()
        finished = contrastive.run(loaded)
        seconds = time.perf_counter() - begin
        encoder = SentenceEncoder(load_embedder(str(finished.folder), max_length=LENGTH).encode)
        return evaluate(encoder, split(args)[1]), seconds


def one_of_the_peer(args, seed: int) -> tuple[float, float]:
    """(score, seconds)."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        train, held_out = split(args)
        model = load_peer(args.weights)
        settings = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=args.steps, learning_rate=RATE, lr_scheduler_type="linear",
            warmup_steps=0.1, weight_decay=0.01, max_grad_norm=1.0, bf16=precision() == "bf16", optim="adamw_torch_fused",
            save_strategy="no", report_to=[], seed=seed, data_seed=seed, disable_tqdm=True, use_cpu=True,
            logging_strategy="no", dataloader_num_workers=0,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model, scale=20.0)
        SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_list(train), loss=loss).train()
        seconds = time.perf_counter() - begin
        return evaluate(model, held_out), seconds


def load_peer(weights: str, length: int = LENGTH):
    """Our checkpoint as a SentenceTransformer with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from neobert.checkpoints.locate import find_checkpoint

    encoder = Transformer(str(find_checkpoint(weights)), max_seq_length=length)
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")], device="cpu")


def measure(args, system: str, seed: int) -> tuple[float, float]:
    """One run in a process of its own."""
    words = ["--one", system, "--weights", args.weights, "--data", args.data, "--steps", args.steps, "--seeds", seed]
    printed = run([sys.executable, __file__, *words], PYTHONWARNINGS="ignore")
    return tuple(json.loads(printed.splitlines()[-1]))


def main() -> None:
    args = arguments(__doc__, **OPTIONS)
    if args.one is not None:
        print(json.dumps({"ours": one_of_ours, "peer": one_of_the_peer}[args.one](args, args.seeds)))
        return
    if not Path(args.data).is_file():
        print(f"no pairs at {args.data}: name them with --data")
        return
    if args.quick:
        args.steps, args.seeds = 20, 1
    with weights_or_own(args.weights, args.quick) as args.weights:
        compare(args)
    finish()


def compare(args) -> None:
    """The table, and the bars."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for seed in range(args.seeds):
        for system, values in found.items():
            values.append(measure(args, system, seed))
            print(f"seed {seed}, {system}: nDCG@10 {values[-1][0]:.4f}, {values[-1][1]:.1f} s", flush=True)
    scores = {system: [score for score, _ in values] for system, values in found.items()}
    seconds = {system: statistics.median(s for _, s in values) for system, values in found.items()}
    names = {"ours": "ours", "peer": "sentence-transformers"}
    told = [(names[s], *(f"{score:.4f}" for score in scores[s]), f"{seconds[s]:.1f}") for s in found]
    table([("", *(f"nDCG@10, seed {n}" for n in range(args.seeds)), "seconds, median"), *told])
    if args.seeds > 1:
        larger = max(statistics.stdev(values) for values in scores.values())
        apart = statistics.fmean(scores["ours"]) - statistics.fmean(scores["peer"])
        bar("contrastive_mean_below_peer_in_sd", -apart / max(larger, 1e-9), 1.0, at_most=True)
    bar("contrastive_seconds_over_peer", seconds["peer"] / seconds["ours"], 1.4)


if __name__ == "__main__":
    main()
