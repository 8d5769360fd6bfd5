"""The input side alone, in one process: tokens a second that reach training.

From tokens on disk (read, pack, mask, collate) against transformers' DataCollatorForLanguageModeling over the same rows;
and from raw .jsonl, tokenised on the fly, against `tokenizers` encoding the same texts in batches, both on one core.
"""

import json
import os
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from _bench import TOKENIZER, alternate, arguments, bar, finish, table
from _data import corpus, make_data

LENGTH, BATCH_SIZE = 512, 16


def words_for(name: str) -> list[str]:
    path, column = corpus(name)
    words = [f"dataset.path={path}", f"dataset.text_column={column or 'null'}", f"dataset.max_seq_length={LENGTH}"]
    more = [
        f"trainer.per_device_train_batch_size={BATCH_SIZE}",
        "datacollator.pack_sequences=true",
        "dataset.num_workers=0",
    ]
    return [*words, *more, f"tokenizer.max_length={LENGTH}"]


def one_epoch(words: list[str], folder: str) -> float:
    """Tokens a second of the training pipeline, without the thread that runs it ahead of training."""
    loader = make_data(*words, folder=folder).train
    loader.workers.tokenizer.encode(["a word"])  # builds the backend, as a run does once
    for source in loader.shards[0].sources:
        source.num_epochs = 1
    num_tokens, start = 0, time.perf_counter()
    for batch, _ in loader.batches():
        num_tokens += batch.num_tokens
    return num_tokens / (time.perf_counter() - start)


def peer_over(words: list[str], folder: str, num_batches: int) -> float:
    """Tokens a second of the peer's collator, given the same rows as lists, as `datasets` hands them out."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15)
    loader = make_data(*words, folder=folder).train
    rows = []
    for batch, _ in loader.batches():
        ids = batch.labels.where(batch.labels != -100, batch.input_ids).tolist()
        rows.append([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids])
        if len(rows) == num_batches:
            break
    start = time.perf_counter()
    for features in rows:
        collate(features)
    return len(rows) * BATCH_SIZE * LENGTH / (time.perf_counter() - start)


def encode_in_batches() -> float:
    """Tokens a second of the bare tokenizer on the texts of the .jsonl file, by its faster batch function, on one core."""
    from tokenizers import Tokenizer

    path, column = corpus("12 MB")
    lines = Path(path).read_text().splitlines()
    texts = [json.loads(line)[column] for line in lines] if column else lines
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    num_tokens, start = 0, time.perf_counter()
    for begin in range(0, len(texts), 32):
        encoded = tokenizer.encode_batch_fast(texts[begin : begin + 32], add_special_tokens=False)
        num_tokens += sum(len(one.ids) for one in encoded)
    return num_tokens / (time.perf_counter() - start)


def columns(ours: float, peer: float, ratio: str) -> tuple[str, str, str]:
    return f"{ours:,.0f}", f"{peer:,.0f}", ratio.format(ours / peer)


def main() -> None:
    options = arguments(__doc__)
    repeats, num_batches = (1, 50) if options.quick else (3, 200)
    rows = [("data", "tokens/s", "peer", "ratio")]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prose", "short"):
            words = [*words_for(name), "dataset.streaming=false", "dataset.pre_tokenize=true", "dataset.num_proc=2"]
            home = f"{folder}/{name}"
            found = alternate(
                {
                    "ours": lambda words=words, home=home: one_epoch(words, home),
                    "peer": lambda words=words, home=home: peer_over(words, home, num_batches),
                },
                repeats,
            )
            figures[name] = found
            rows.append(
                (
                    f"tokens, {name}",
                    f"{found['ours']:,.0f}",
                    f"{found['peer']:,.0f}",
                    f"{found['ours'] / found['peer']:.1f}x",
                )
            )
        words = [*words_for("12 MB"), "dataset.streaming=true", "dataset.shuffle_buffer_size=1000"]
        text = alternate({"ours": lambda: one_epoch(words, folder), "bare": encode_in_batches}, repeats)
    rows.append(("raw .jsonl, one core", *columns(text["ours"], text["bare"], "{:.0%}")))
    table(rows)
    for name, found in figures.items():
        bar(f"data_pass_{name}_tokens_per_second", found["ours"], 2.5e6)
        bar(f"data_pass_{name}_over_peer", found["ours"] / found["peer"], 8)
    bar("on_the_fly_over_bare_tokenizer", text["ours"] / text["bare"], 0.8)
    finish()


if __name__ == "__main__":
    main()
