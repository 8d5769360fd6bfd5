"""The page of one GPU: what NeoBERT reaches on it, against the card's limit and against its peers; writes RESULTS_GPU.md.

Packed rows of 1,024 tokens, documents of about 210, 20 % of the tokens masked, bf16 autocast, fused AdamW; random weights and
made tokens where only speed counts. MFU counts, of a training step, 6 operations for each weight of the encoder's matrices and
token, 6 for each weight of the decoder and masked token, and 12 x layers x width x length^2 of every document for attention,
against the card's dense bf16 peak (H100 and H200 989 TFLOP/s, A100 312; none for other cards). The peers are transformers'
EuroBERT and ModernBERT of the same sizes: unpadded by flash-attn where it is installed, else padded under SDPA; the faster one
also with its layers compiled. Their best counts, and only real tokens do.

Every section is a process of its own: what fails there, or is not installed, is a line of the page and no more.

    python benchmarks/gpu.py                        about five minutes on an H100
    python benchmarks/gpu.py --device cpu --tiny    the same code on tiny models, for its test
"""

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import QUICKSTART, TEXT, TOKENIZER, alternate, arguments, bar, finish
from _gpu import Bench, Size, build_ours, first_line, peer_config, plain_step, seconds_of_ours, seconds_of_peer
from run_all import where

TINY = Size(2, 64, 96, 512, (2,))
SIZES = {
    "250M": Size(28, 768, 2048, 30_592, want_mfu=0.40),
    "149M": Size(22, 768, 1152, 50_368, want_rate=312_000),
    "395M": Size(28, 1024, 2624, 50_368, (32, 16), want_rate=142_000),
}
VOCABULARY = 8192  # of the tokenizer that ships with the text
BASE = Size(12, 768, 2048, VOCABULARY)  # of fine-tuning and embedding
PRELOADED = [
    "torch", "transformers.models.eurobert.modeling_eurobert", "transformers.models.modernbert.modeling_modernbert",
    "neobert.tasks.pretraining.task", "neobert.tasks.glue.task", "neobert.tasks.contrastive.task",
]  # fmt: skip


def sizes(bench: Bench) -> dict[str, Size]:
    return {"250M": TINY} if bench.tiny else SIZES


# --- steps -----------


def model_step(bench: Bench) -> None:
    for name, size in sizes(bench).items():
        rate, mfu = 0.0, 0.0
        for how in ("eager", "compiled"):
            what = f"model step {name}, {how}"
            found = bench.largest(what, size.rows, partial(seconds_of_ours, bench, size, how == "compiled"))
            if found is None:
                bench.report(failed=what)
                continue
            (rows, seconds), num_tokens = found, found[0] * bench.length
            share = size.flops(bench.batches(size, rows, 1)[0]) / seconds / bench.peak if bench.peak else None
            bench.row(what, seconds, f"{num_tokens / seconds:,.0f} tokens", share, f"{rows} rows")
            rate, mfu = max(rate, num_tokens / seconds), max(mfu, share or 0.0)
        bench.report(figure=[name, rate])
        if bench.peak == 989e12 and size.want_rate:
            bench.bar(f"model_step_{name}_tokens", rate, size.want_rate)
        if bench.peak == 989e12 and size.want_mfu:
            bench.bar(f"model_step_{name}_mfu", mfu, size.want_mfu)


def peers(bench: Bench) -> None:
    layout = "unpadded, flash-attn" if bench.has_flash else "padded, SDPA"
    for name, size in sizes(bench).items():
        ours, rates = bench.known.get(name, 0.0), dict[str, float]()

        def measure(kind: str, compiled: bool, name: str = name, size: Size = size, ours: float = ours) -> float:
            what = f"{kind} {name}, {layout}{', layers compiled' if compiled else ''}"
            found = bench.largest(what, (*size.rows, 8), partial(seconds_of_peer, bench, kind, size, compiled))
            if found is None:
                return 0.0
            (rows, seconds), rate = found, found[0] * bench.length / found[1]
            bench.row(what, seconds, f"{rate:,.0f} tokens", note=f"{rows} rows; ours is {ours / rate:.2f}x")
            return rate

        rates = {kind: measure(kind, False) for kind in ("EuroBERT", "ModernBERT")}
        best = max(*rates.values(), measure(max(rates, key=lambda kind: rates[kind]), True))
        if best:
            bench.bar(f"model_step_{name}_over_peers", ours / best, 1.5)


def muonclip(bench: Bench) -> None:
    """Ten updates of each in turn, of which one clips."""
    from neobert.training.optimizer import build_clip, build_run_optimizer

    size = sizes(bench)["250M"]
    batches = [batch.ours(bench.device) for batch in bench.batches(size, size.rows[-1])]
    num_targets, num_tokens = sum(len(one["labels"]) for one in batches), len(batches) * size.rows[-1] * bench.length

    def contestant(name: str) -> Callable[[], float]:
        model, runtime, config = build_ours(bench, size, f"optimizer.name={name}", compiled=True)
        optimizer, (clip, _) = build_run_optimizer(config, model, runtime.dtype), build_clip(config, model)

        def update(number: int) -> None:
            for inputs in batches:
                if clip is not None:
                    clip.prepare(number, is_last_microbatch=inputs is batches[-1])
                with runtime.autocast():
                    loss = model(**inputs, masked_only=True).loss_sum / num_targets
                loss.backward()
            runtime.clip(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if clip is not None:
                clip.apply(number)

        for number in (1, 10):
            update(number)
        updates = range(9, 11) if bench.tiny else range(1, 11)
        return lambda: bench.clock(lambda: [update(number) for number in updates]) / len(updates)

    found = alternate({name: contestant(name) for name in ("adamw", "muonclip")}, 1 if bench.tiny else 3)
    for name, seconds in found.items():
        bench.row(f"update of 250M with {name}, compiled", seconds, f"{num_tokens / seconds:,.0f} tokens")
    bench.bar("muonclip_over_adamw", found["muonclip"] / found["adamw"], 1.08, at_most=True)


# --- whole runs -----------


def train(
    bench: Bench, task: str, size: Size, *words: object, compiled: bool = False
) -> tuple[Path, Callable[[str], float]]:
    """A run of ours: its folder, and the median of a figure of metrics.jsonl after the first three lines."""
    folder = bench.folder / task
    loaded = bench.config(task, size, *words, f"trainer.output_dir={folder}", compiled=compiled)
    importlib.import_module(f"neobert.tasks.{task}.task").run(loaded)
    rows = [row for row in metrics(folder) if row["kind"] == "train"]
    bench.free()
    return folder, lambda name: statistics.median([row[name] for row in rows][3:] or [rows[-1][name]])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pretraining(bench: Bench) -> None:
    size = sizes(bench)["250M"]
    rows = size.rows[-1]
    words = [
        f"dataset.path={TEXT}", "dataset.streaming=false", "dataset.pre_tokenize=true", "datacollator.mlm_probability=0.2",
        "datacollator.pack_sequences=true", f"trainer.per_device_train_batch_size={rows}", "trainer.save_model=false",
        f"trainer.max_steps={4 if bench.tiny else 80}",
    ]  # fmt: skip
    _, median = train(bench, "pretraining", size, *words, compiled=True)
    rate, same = median("tokens_per_second"), Size(size.layers, size.width, size.inner, VOCABULARY)
    bare = rows * bench.length / seconds_of_ours(bench, same, True, rows)
    note = f"{rate / bare:.1%} of the bare step's {bare:,.0f}; {rows} rows"
    bench.row("neobert pretrain, 250M on the shipped text, compiled", rate=f"{rate:,.0f} tokens", note=note)


def paragraphs(bench: Bench) -> list[str]:
    lines = [line for line in (TEXT / "train.txt").read_text().splitlines() if len(line) > 200]
    return lines[: 48 if bench.tiny else 2400]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fine_tuning(bench: Bench) -> None:
    """A made task of pairs of sentences: ours against a plain loop over rows padded to the longest of their batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    size, count, length, data = TINY if bench.tiny else BASE, 32, bench.length // 4, bench.folder / "data"
    pairs = [(text[:300], text[-300:]) for text in paragraphs(bench)]
    rows = [{"sentence1": a, "sentence2": b, "label": n % 2, "idx": n} for n, (a, b) in enumerate(pairs)]
    write_lines(data / "mrpc/train.jsonl", rows)
    write_lines(data / "mrpc/validation.jsonl", rows[:40])
    words = [
        "glue.task_name=mrpc", f"dataset.path={data}", "glue.allow_random_weights=true", f"glue.max_seq_length={length}",
        f"trainer.per_device_train_batch_size={count}", "trainer.max_steps=-1", "trainer.num_train_epochs=1",
        "trainer.save_model=false",
    ]  # fmt: skip
    _, median = train(bench, "glue", size, *words)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = peer_config(bench, "EuroBERT", Size(size.layers, size.width, size.inner, len(tokenizer)))
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=bench.peer_attention)

    def batches() -> Iterator[dict[str, Any]]:
        for start in itertools.cycle(range(0, len(pairs) - count + 1, count)):
            part = [list(texts) for texts in zip(*pairs[start : start + count], strict=True)]
            encoded = tokenizer(*part, truncation=True, max_length=length, padding=True, return_tensors="pt")
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            inputs["labels"] = torch.arange(count) % 2
            yield {name: tensor.to(bench.device) for name, tensor in inputs.items()}

    peer = bench.seconds(plain_step(bench, model, batches(), max_norm=1.0))
    bench.compare("fine-tuning", "rows", "EuroBERT in a plain loop", count, median("step_seconds"), peer)


def contrastive(bench: Bench) -> None:
    """Pairs of halves of paragraphs; then embedding, on the weights of that run."""
    count, steps, length = (4, 4, 32) if bench.tiny else (64, 60, 256)
    texts, size = paragraphs(bench), TINY if bench.tiny else BASE
    rows = [{"anchor": text[: len(text) // 2], "positive": text[len(text) // 2 :]} for text in texts]
    write_lines(bench.folder / "pairs/train.jsonl", rows)
    words = [
        f"dataset.path={bench.folder / 'pairs'}", "dataset.streaming=false", f"dataset.max_seq_length={length}",
        "contrastive.allow_random_weights=true", f"trainer.per_device_train_batch_size={count}",
        f"trainer.max_steps={steps}", "datacollator.pack_sequences=true",
    ]  # fmt: skip
    folder, median = train(bench, "contrastive", size, *words)
    peer = seconds_of_trainer(bench, folder, rows, count, steps, length)
    bench.compare("contrastive", "pairs", "SentenceTransformerTrainer", count, median("step_seconds"), peer)
    bench.free()
    embedding(bench, folder, texts, length)


def seconds_of_trainer(bench: Bench, folder: Path, rows: list[Any], count: int, steps: int, length: int) -> float:
    """Of a step of sentence-transformers', after the first quarter of them."""
    from contrastive_vs_st import load_peer
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    model = load_peer(str(folder), length).to(bench.device)
    settings = SentenceTransformerTrainingArguments(
        str(bench.folder / "trainer"), per_device_train_batch_size=count, max_steps=steps, bf16=bench.kind == "cuda",
        max_grad_norm=1.0, optim="adamw_torch_fused", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=bench.kind == "cpu", logging_strategy="no",
    )  # fmt: skip
    loss, data = MultipleNegativesRankingLoss(model), Dataset.from_list(rows)
    SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss, callbacks=[Clock()]).train()
    first = len(times) // 4
    return (times[-1] - times[first]) / (len(times) - 1 - first)


def embedding(bench: Bench, folder: Path, texts: list[str], length: int) -> None:
    from contrastive_vs_st import load_peer

    from neobert.inference.embed import load_embedder
    from neobert.training.runtime import build_runtime

    precision, dtype = ("bf16", torch.bfloat16) if bench.kind == "cuda" else ("no", torch.float32)
    runtime = build_runtime(use_cpu=bench.kind == "cpu", mixed_precision=precision, trains=False).alone()
    ours = load_embedder(str(folder), max_length=length, runtime=runtime)
    peer = load_peer(str(folder), length).to(bench.device, dtype)
    encoders: dict[str, Callable[[], object]] = {"ours": lambda: ours.encode(texts)}
    for size in (32, 128, 512):
        encoders[f"{size} a batch"] = partial(peer.encode, texts, batch_size=size)
    for encode in encoders.values():
        encode()
    seconds = alternate({name: partial(bench.clock, one) for name, one in encoders.items()}, 1 if bench.tiny else 3)
    own = seconds.pop("ours")
    best = min(seconds, key=lambda name: seconds[name])
    bench.compare("embedding", "texts", f"SentenceTransformer, {best}", len(texts), own, seconds[best])


def quickstart(bench: Bench) -> None:
    """The shipped configuration, shortened: bf16 on the GPU and float32 on the CPU learn alike."""
    from neobert.config.load import load_config
    from neobert.tasks.pretraining import task

    steps, losses = 4 if bench.tiny else 200, []
    tiny = [*TINY.words, "trainer.eval_max_batches=2"] if bench.tiny else []
    for number, (precision, kind) in enumerate((("bf16", bench.kind), ("no", "cpu"))):
        folder = bench.folder / str(number)
        words = [f"trainer.mixed_precision={precision}", f"trainer.use_cpu={str(kind == 'cpu').lower()}", *tiny]
        words += [f"trainer.{name}={steps}" for name in ("max_steps", "eval_steps")]
        words += ["trainer.save_strategy=no", "trainer.save_model=false", f"trainer.output_dir={folder}"]
        seconds = bench.clock(lambda words=words: task.run(load_config([str(QUICKSTART)], words)))
        losses.append(next(row["eval_loss"] for row in reversed(metrics(folder)) if row["kind"] == "eval"))
        what = f"quickstart, {'bf16' if precision == 'bf16' else 'float32'} on {kind}"
        bench.row(what, note=f"held-out loss {losses[-1]:.4f} after {steps} steps, {seconds:.0f} s in all")
    bench.bar("quickstart_loss_apart", abs(losses[0] - losses[1]), 0.02, at_most=True)


# --- the page -----------

SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {  # and the seconds after which it is cut off
    "model step": (model_step, 240), "peers": (peers, 240), "MuonClip": (muonclip, 120), "pretraining": (pretraining, 120),
    "fine-tuning": (fine_tuning, 120), "contrastive and embedding": (contrastive, 120), "quickstart": (quickstart, 180),
}  # fmt: skip


def section(name: str, kind: str, tiny: bool, known: dict[str, float], folder: Path) -> None:
    """In a process of its own; what it prints goes to a log."""
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    bench = Bench(kind, tiny, known, folder, name)
    try:
        SECTIONS[name][0](bench)
    except ImportError as error:
        traceback.print_exc()
        bench.row(name, note=f"not installed: {error.name or first_line(error)}")
    except Exception as error:  # noqa: BLE001, the other sections go on
        traceback.print_exc()
        is_missing = "pip install" in str(error)
        bench.row(name, note=f"{'not installed' if is_missing else 'failed'}: {first_line(error)}")
        if not is_missing:
            bench.report(failed=name)


def lines_of(context: Any, name: str, options: Any, known: dict[str, float], folder: Path) -> list[dict[str, Any]]:
    """What a section reported until its end, or until it was cut off."""
    limit = SECTIONS[name][1] * (10 if options.tiny else 1)
    process = context.Process(target=section, args=(name, options.device, options.tiny, known, folder))
    process.start()
    process.join(limit)
    problem = f"ended with status {process.exitcode}" if process.exitcode else ""
    if process.is_alive():
        process.kill()
        process.join()
        problem = f"cut off after {limit} s"
    path = folder / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines += [{"row": [name, "", "", "", f"failed: {problem}"], "failed": name}] if problem else []
    if any("failed" in line for line in lines):
        print((folder / f"{name}.log").read_text()[-3000:], file=sys.stderr)
    return lines


def main() -> None:
    options = arguments(
        __doc__,
        device={"choices": ["cuda", "cpu"], "default": "cuda"},
        tiny={"action": "store_true", "help": "tiny models: a test of this file"},
        out={"type": Path, "default": Path(__file__).parent / "RESULTS_GPU.md"},
        only={"choices": list(SECTIONS), "help": "this section"},
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: benchmarks/gpu.py measures NeoBERT on one")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
    context = multiprocessing.get_context("forkserver")  # sections fork from a process that has not touched the GPU
    context.set_forkserver_preload(PRELOADED)
    card = torch.cuda.get_device_name(0) if options.device == "cuda" else "the CPU"
    head = "\n\n".join([f"# NeoBERT on {card}", where(), (__doc__ or "").split("\n\n")[1]])
    table = ["| what | ms a step | a second | MFU | note |", "|---|---:|---:|---:|---|"]
    bars, known, failed = io.StringIO(), dict[str, float](), False
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else SECTIONS:
            for line in lines_of(context, name, options, known, Path(folder)):
                failed |= "failed" in line
                known |= dict([line["figure"]] if "figure" in line else [])
                if "bar" in line:
                    with contextlib.redirect_stdout(bars):
                        bar(*line["bar"])
                if "row" in line:
                    table.append(f"| {' | '.join(line['row'])} |")
                    print(table[-1], flush=True)
            lines = "\n".join(table)
            options.out.write_text(f"{head}\n\n{lines}\n\n```\n{bars.getvalue()}```\n")
    print(f"{bars.getvalue()}written to {options.out}")
    if failed:
        sys.exit(1)
    if not options.tiny:
        finish()


if __name__ == "__main__":
    main()
