"""What a user checks before a long run: what training will see, and whether a resumed run is exact.

`neobert data` shows figures of the corpus, a histogram of lengths, and decoded rows with masks. `neobert verify-resume` trains
three times in a temporary folder: to the end; with a checkpoint half-way, killed (SIGKILL) two steps after it; resumed.
Every microbatch leaves checksums of its tokens and labels, which are compared.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from neobert.checkpoints.initial_weights import load_named_tokenizer
from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.data.batch import IGNORED, Batch
from neobert.data.files.documents import Files, num_bytes
from neobert.data.mlm.readers import TruncationStats
from neobert.data.tokenizer import TextTokenizer, text_tokenizer
from neobert.errors import UserError
from neobert.ranks import Ranks
from neobert.tasks.pretraining.data import CorpusSource, build_data, build_reader, build_segmenter, open_sources
from neobert.training.metrics import read_metrics

BAR_WIDTH, SHOWN_TOKENS, FILL_BATCHES = 50, 120, 50
BATCHES = "batches.jsonl"  # checksums of what a run of verify-resume was trained on
QUIET = (  # overrides that make its runs short and quiet, and leave alone what they read
    "trainer.save_strategy=steps", "trainer.eval_steps=1000000", "trainer.eval_strategy=steps", "trainer.eval_max_batches=1",
    "trainer.early_stopping=0", "trainer.load_best_model_at_end=false", "trainer.metric_for_best_model=null",
    "trainer.report_to=[]", "wandb.enabled=false", "trainer.disable_tqdm=true", "trainer.save_total_limit=null",
    "trainer.overwrite_output_dir=true",
    "trainer.save_in_background=false",  # or the kill might come before the checkpoint is whole
)  # fmt: skip


def describe_data(config: Config, num_rows: int, num_documents: int) -> Iterator[str]:
    """Lines about the data of a run. Raises UserError."""
    hf_tokenizer = load_named_tokenizer(config)
    tokenizer = text_tokenizer(hf_tokenizer)
    folder = Path(config.trainer.output_dir)
    for number, source in enumerate(open_sources(config, tokenizer, folder)):
        yield from ["", source.describe] if number else [source.describe]
        yield from _describe_documents(config, tokenizer, source, num_documents)
    alone = config.model_copy(update={"dataset": config.dataset.model_copy(update={"num_workers": 0})})
    data = build_data(alone, tokenizer, Ranks(), folder, False)
    yield ""
    yield from data.describe[-2:]
    with closing(data.train) as loader:
        if config.trainer.max_steps < 0 and config.datacollator.mlm_probability_final is not None:
            loader.set_num_rows(data.count_left() * loader.batch_size)
        batches = [batch for batch, _ in zip(loader, range(FILL_BATCHES), strict=False)]
        shares = [batch.num_tokens / batch.input_ids.numel() for batch in batches]
        targets = sum(batch.num_targets for batch in batches) / max(1, sum(batch.num_tokens for batch in batches))
        fill = f"{np.mean(shares):.2%} of the positions hold tokens, {targets:.1%} of those are predicted"
        yield f"fill: {fill} (first {len(batches)} batches)"
    rows = (row for batch in batches for row in _rows(batch))
    for number, (ids, labels, lengths) in zip(range(num_rows), rows, strict=False):
        yield ""
        yield f"row {number}: {len(lengths)} document{'s' if len(lengths) != 1 else ''}, {len(ids)} tokens"
        shown = _decode(ids[:SHOWN_TOKENS], labels[:SHOWN_TOKENS], lengths, hf_tokenizer)
        yield shown + (" …" if len(ids) > SHOWN_TOKENS else "")
    if num_rows:
        yield "\n| stands between documents, {a>b} is a token to predict and what the model sees in its place"


def _describe_documents(
    config: Config, tokenizer: TextTokenizer, source: CorpusSource, num_documents: int
) -> Iterator[str]:
    """Figures of the first documents in reading order (a random sample, where that is shuffled)."""
    reader, segmenter = build_reader(config, source.train, Ranks()), build_segmenter(config, tokenizer)
    found, cut, bytes_read, is_all = list[int](), TruncationStats(), 0, False
    while len(found) < num_documents and not is_all:
        block = reader.read()
        is_all = not block
        if block and isinstance(block[0], str):
            bytes_read += sum(len(text.encode()) for text in block)
            block = tokenizer.encode(block)
        found += map(len, block)
        segmenter.pieces(block, cut)
    lengths = np.array(found or [0])
    total, what = int(lengths.sum()), "pieces" if source.is_tokenized else "documents"
    if is_all:
        yield f"tokens per epoch: {total:,}"
    elif isinstance(source.train, Files):
        size = num_bytes(source.train)
        guess = f"about {total * size / max(1, bytes_read):,.0f}, by size" if size else "unknown"
        yield f"tokens per epoch: {guess}"
    else:
        yield f"tokens per epoch: about {total * len(source.train) / len(found):,.0f}"
    figures = f"mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, longest {lengths.max():,}"
    yield f"tokens per {what[:-1]}: {figures} ({len(found):,} {what} looked at{', all of them' if is_all else ''})"
    yield f"longer than a row of {segmenter.max_length}: {cut.num_long:,}; cut: {cut.share:.1%} of the tokens"
    if skipped := reader.skips.describe(cut.num_empty):
        yield skipped
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))  # by powers of two
    for power in range(int(np.flatnonzero(bins)[0]), len(bins)):
        bar = "#" * round(BAR_WIDTH * bins[power] / bins.max())
        yield f"  <= {2**power:>9,} tokens {bins[power]:>9,}  {bar}".rstrip()


def _rows(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """(ids, labels, lengths of the documents) of every row, without padding."""
    assert batch.labels is not None
    rest = list(batch.document_lengths or ())
    for number, (ids, labels) in enumerate(zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True)):
        lengths: list[int] = []
        while batch.document_lengths is not None and sum(lengths) < len(ids):
            lengths.append(rest.pop(0))
        if batch.attention_mask is not None:
            lengths = [int(batch.attention_mask[number].sum())]
        yield ids[: sum(lengths)], labels[: sum(lengths)], lengths


def _decode(ids: np.ndarray, labels: np.ndarray, lengths: list[int], hf_tokenizer: Any) -> str:
    """Text of a row: runs of tokens that are not predicted, and those that are, one by one."""

    def decode(tokens: np.ndarray) -> str:
        return str(hf_tokenizer.decode(tokens.tolist())).strip()

    shown: list[str] = []
    for begin, end in pairwise(np.cumsum([0, *lengths]).tolist()):
        shown += ["|"] if 0 < begin < len(ids) else []
        for is_target, run in groupby(range(begin, min(end, len(ids))), lambda index: labels[index] != IGNORED):
            if not is_target:
                shown.append(decode(ids[list(run)]))
                continue
            for seen, label in ((ids[index : index + 1], labels[index : index + 1]) for index in run):
                shown.append(f"{{{decode(label)}>{'=' if seen == label else decode(seen)}}}")
    return " ".join(shown)


# --- verify-resume -----------


def verify(files: list[str], overrides: list[str], num_steps: int) -> bool:
    """Whether the resumed run equals the uninterrupted one; prints what was compared. Raises UserError."""
    config = load_config(files, overrides, "pretraining").config
    half, micro = num_steps // 2, config.trainer.gradient_accumulation_steps
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as name:
        folder = Path(name)
        overrides = [*overrides, *QUIET, f"trainer.max_steps={num_steps}", f"trainer.save_steps={half}"]
        if config.dataset.pre_tokenize and not config.dataset.pre_tokenize_output:
            overrides.append(f"dataset.pre_tokenize_output={folder / 'tokenized'}")
        print(f"uninterrupted: {num_steps} steps", flush=True)
        _train(files, overrides, folder / "whole", None, resume=False)
        print(f"killed in step {half + 2}, two steps after the checkpoint of step {half}", flush=True)
        _train(files, overrides, folder / "broken", (half + 1) * micro + 1, resume=False)
        killed = _batches(folder / "broken")
        print("resumed\n", flush=True)
        _train(files, overrides, folder / "broken", None, resume=True)
        return _compare(folder, killed, num_steps, half, micro)


def _train(files: list[str], overrides: list[str], folder: Path, kill_at: int | None, resume: bool) -> None:
    folder.mkdir(exist_ok=True)
    more = [f"trainer.output_dir={folder / 'out'}", f"trainer.resume_from_checkpoint={'latest' if resume else 'null'}"]
    job = json.dumps([files, [*overrides, *more], str(folder), kill_at])
    command = [sys.executable, "-m", __spec__.name, job]
    with open(folder / "log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code == 2 and (folder / "error").is_file():
        raise UserError((folder / "error").read_text())
    if code != (0 if kill_at is None else -signal.SIGKILL):
        last = (folder / "log").read_text().splitlines()[-15:]
        raise UserError("\n".join([f"the run ended with exit code {code}; its last lines:", *last]))


def _run_child(files: list[str], overrides: list[str], folder: str, kill_at: int | None) -> None:
    """Train, writing checksums of every batch to a file; end the process at once when batch `kill_at` comes."""
    from neobert.tasks.pretraining import task as pretraining

    def record(batch: Any, number: int) -> None:
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        ids, labels = (zlib.crc32(x.numpy().tobytes()) for x in (batch.input_ids, batch.labels))
        with open(Path(folder) / BATCHES, "a") as file:
            file.write(json.dumps({"number": number, "ids": ids, "labels": labels}) + "\n")

    try:
        pretraining.run(load_config(files, overrides), record)
    except UserError as error:
        (Path(folder) / "error").write_text(str(error))
        sys.exit(2)


def _batches(folder: Path) -> list[dict[str, int]]:
    path = folder / BATCHES
    return read_metrics(path) if path.is_file() else []


def _compare(folder: Path, killed: list[dict[str, int]], num_steps: int, half: int, micro: int) -> bool:
    """Print one line per step, and whether all of them are equal."""
    resumed = _batches(folder / "broken")[len(killed) :]
    whole, before, after = (
        {one["number"]: one for one in part} for part in (_batches(folder / "whole"), killed, resumed)
    )
    metrics = [read_metrics(folder / name / "out/metrics.jsonl") for name in ("whole", "broken")]
    losses = [{row["step"]: row["loss"] for row in rows if row["kind"] == "train"} for rows in metrics]
    all_equal = list(after) == list(range(half * micro + 1, num_steps * micro + 1))
    print("step           tokens     masks      loss       resumed")
    for step in range(1, num_steps + 1):
        part, numbers = before if step <= half else after, range((step - 1) * micro + 1, step * micro + 1)
        a, b = (found.get(step) for found in losses)
        equal = [all(n in part and part[n][name] == whole[n][name] for n in numbers) for name in ("ids", "labels")]
        equal.append(a == b)
        tokens, masks, loss = ("equal" if is_equal else "DIFFERENT" for is_equal in equal)
        logged = [f"{'-' if value is None else format(value, '.6f'):<9}" for value in (a, b)]
        mark = "" if step <= half else "  resumed"
        print("  ".join([f"{step:>4}{mark:<9}", f"{tokens:<9}", f"{masks:<9}", *logged, loss]))
        all_equal = all_equal and all(equal)
    print(f"\n{'resume is exact: every token, mask and loss is equal' if all_equal else 'resume is NOT exact'}")
    return all_equal


if __name__ == "__main__":
    _run_child(*json.loads(sys.argv[1]))
