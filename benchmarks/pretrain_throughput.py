"""Pretraining throughput: `neobert pretrain`, packed, against transformers' Trainer with EuroBertForMaskedLM.

Same size (256 wide, 6 layers, 4 heads, the shipped vocabulary), same text, same precision, same optimizer kernel (fused
AdamW), gradient clipping at 1.0, masking 20 %. What counts is real tokens per second: padding does not. The peer runs
its two usual recipes, each at the batch sizes given, and its best counts:

  padded   one document a row, padded to the longest of the batch (DataCollatorForLanguageModeling): this is the bar
  chunks   documents concatenated and cut every 512 tokens: no padding, but tokens attend across documents. Shown too.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import QUICKSTART, TEXT, TOKENIZER, alternate, arguments, bar, finish, neobert, run, table

WIDTH, LAYERS, HEADS, VOCABULARY = 256, 6, 4, 8192
PEERS = {"padded": (8, 16, 32), "chunks": (4, 16)}
WARMUP_STEPS = 3


def precision() -> str:
    """bf16 where the CPU computes it, else float32: for both."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "no"


def ours(steps: int, dtype: str) -> float:
    """Real tokens per second of our own job, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"model.hidden_size={WIDTH}", f"model.num_hidden_layers={LAYERS}", f"trainer.output_dir={folder}"]
        steps_ = [f"trainer.max_steps={steps}", "trainer.logging_steps=1", "trainer.eval_steps=100000"]
        rest = ["trainer.per_device_train_batch_size=16", "trainer.save_strategy=no", "trainer.save_model=false"]
        run(
            neobert(
                "pretrain",
                QUICKSTART,
                *sizes,
                *steps_,
                *rest,
                "trainer.eval_max_batches=1",
                f"trainer.mixed_precision={dtype}",
            )
        )
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_second"] for row in rows if row["kind"] == "train"]
    return statistics.median(rates[WARMUP_STEPS:])


def peer(recipe: str, batch_size: int, steps: int, dtype: str) -> float:
    """Real tokens per second of the Trainer, in a process of its own."""
    return float(
        run(
            [sys.executable, __file__, "--peer", recipe, "--rows", batch_size, "--steps", steps, "--dtype", dtype]
        ).split()[-1]
    )


def train_peer(recipe: str, batch_size: int, steps: int, dtype: str) -> None:
    """The peer's process: prints its real tokens per second."""
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        EuroBertConfig,
        EuroBertForMaskedLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    documents = [
        tokenizer(line, truncation=recipe == "padded", max_length=512)["input_ids"]
        for line in (TEXT / "train.txt").open()
    ]
    if recipe == "chunks":
        flat = [token for document in documents for token in document]
        documents = [flat[start : start + 512] for start in range(0, len(flat) - 511, 512)]

    class Collator(DataCollatorForLanguageModeling):
        def __call__(self, features, return_tensors=None):
            num_tokens.append(sum(len(feature["input_ids"]) for feature in features))
            return super().__call__(features, return_tensors)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    num_tokens: list[int] = []
    times: list[float] = []
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 688}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}
    model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **shape, **special))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=steps, bf16=dtype == "bf16", max_grad_norm=1.0,
            optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not _has_cuda(),
        )  # fmt: skip
        data = [{"input_ids": document} for document in documents]
        collator = Collator(tokenizer, mlm_probability=0.2)
        Trainer(model, settings, data_collator=collator, train_dataset=data, callbacks=[Clock()]).train()
    counted = sum(num_tokens[WARMUP_STEPS + 1 : len(times)])
    print(counted / (times[-1] - times[WARMUP_STEPS]))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    options = arguments(
        __doc__,
        peer={"choices": list(PEERS)},
        rows={"type": int},
        steps={"type": int},
        dtype={"choices": ["bf16", "no"]},
    )
    if options.peer:
        train_peer(options.peer, options.rows, options.steps, options.dtype)
        return
    steps, repeats, dtype = (8, 1, precision()) if options.quick else (16, 3, precision())
    measures = {"ours, 16 packed rows": lambda: ours(steps, dtype)}
    for recipe, sizes in PEERS.items():
        for size in sizes[-1:] if options.quick else sizes:
            measures[f"peer, {recipe}, {size} rows"] = lambda recipe=recipe, size=size: peer(recipe, size, steps, dtype)
    rates = alternate(measures, repeats)
    our_rate = rates.pop("ours, 16 packed rows")
    rows = [(name, f"{rate:,.0f}", f"{our_rate / rate:.2f}x") for name, rate in rates.items()]
    table([("", "real tokens/s", "ours is"), ("ours, 16 packed rows", f"{our_rate:,.0f}", ""), *rows])
    for recipe in PEERS:
        best = max(rate for name, rate in rates.items() if recipe in name)
        if recipe == "padded":
            bar("pretrain_throughput", our_rate / best, 2.0)
        else:
            print(f"against its fastest recipe of chunks that mix documents: {our_rate / best:.2f}x")
    finish()


if __name__ == "__main__":
    main()
