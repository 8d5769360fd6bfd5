"""Shared by the sections of gpu.py: sizes, batches and bare steps of ours and of the peers, measures and reports."""

import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import TOKENIZER

from neobert.training.choices import find_kernels

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # operations per second, dense bf16; of the SXM cards
IGNORED, FIRST_ID, MASKED = -100, 5, 0.2


@dataclass(frozen=True)
class Size:
    """A shape of model; `rows` are the batch sizes to try, largest first. Bars hold on H100 and H200."""

    layers: int
    width: int
    inner: int  # F of SwiGLU
    vocabulary: int
    rows: tuple[int, ...] = (64, 32, 16)
    want_rate: float | None = None  # tokens per second
    want_mfu: float | None = None

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    @property
    def words(self) -> list[str]:
        """The shape as overrides of a configuration."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        values = (self.layers, self.width, self.heads, self.inner * 3 // 2)
        return [f"model.{name}={value}" for name, value in zip(names, values, strict=True)]

    def flops(self, batch: "Documents") -> float:
        """Of a training step, by the formula of the page."""
        matrices = self.layers * (4 * self.width**2 + 3 * self.width * self.inner)
        products = 6 * (matrices * len(batch.ids_N) + self.width * self.vocabulary * batch.num_targets)
        return products + 12 * self.layers * self.width * sum(length**2 for length in batch.lengths)


@dataclass(frozen=True)
class Documents:
    """A batch in host memory: ids and labels of all tokens, the lengths of the documents, and the rows they fill."""

    ids_N: torch.Tensor
    labels_N: torch.Tensor
    lengths: tuple[int, ...]
    rows: int

    @staticmethod
    def made(size: Size, rows: int, length: int, seed: int) -> "Documents":
        """Rows filled with documents of about a fifth of their length, cut at their end."""
        generator = torch.Generator().manual_seed(seed)
        lengths: list[int] = []
        for _ in range(rows):
            left = length
            while left:
                drawn = int(torch.randint(length // 50, 2 * length // 5, (), generator=generator))
                lengths.append(min(left, drawn))
                left -= lengths[-1]
        ids = torch.randint(FIRST_ID, size.vocabulary, (rows * length,), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < MASKED, ids, IGNORED)
        return Documents(ids, labels, tuple(lengths), rows)

    @property
    def num_targets(self) -> int:
        return int((self.labels_N != IGNORED).sum())

    def ours(self, device: torch.device) -> dict[str, Any]:
        """As our loader hands it over."""
        from neobert.data.batch import Batch
        from neobert.model.unpadding import unpad

        ids, labels = (x.view(self.rows, -1) for x in (self.ids_N, self.labels_N))
        return Batch(**unpad(ids, document_lengths=self.lengths, labels=labels)).to(device).inputs()

    def unpadded(self, device: torch.device) -> dict[str, Any]:
        """As flash attention in transformers takes it."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0).to(device, torch.int32)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        tensors = {"input_ids": self.ids_N, "labels": self.labels_N, "position_ids": positions}
        spans = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        longest = {"max_length_q": max(self.lengths), "max_length_k": max(self.lengths)}
        return {name: tensor[None].to(device) for name, tensor in tensors.items()} | spans | longest

    def padded(self, device: torch.device) -> dict[str, Any]:
        """Documents as rows, padded to the longest."""
        fills = {"input_ids": (self.ids_N, 0), "labels": (self.labels_N, IGNORED)}
        fills["attention_mask"] = (torch.ones_like(self.ids_N), 0)
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        padded = {name: pad(list(x.split(self.lengths)), padding_value=fill) for name, (x, fill) in fills.items()}
        return {name: tensor.to(device) for name, tensor in padded.items()}


class Bench:
    """What a section gets: the device, sizes that suit it, figures of earlier sections, and ways to measure and report."""

    def __init__(self, kind: str, tiny: bool, known: dict[str, float], folder: Path, name: str):
        self.kind, self.tiny, self.known, self.folder = kind, tiny, known, folder
        self.device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        card = torch.cuda.get_device_name(0) if kind == "cuda" else ""
        self.peak = None if "PCIe" in card or "NVL" in card else next((PEAKS[n] for n in PEAKS if n in card), None)
        self.has_flash = kind == "cuda" and find_kernels().get("flash_attn") == ""
        self.peer_attention = "flash_attention_2" if self.has_flash else "sdpa"
        self.length = 128 if tiny else 1024
        self._lines = folder / f"{name}.jsonl"

    # --- reports -----------

    def report(self, **line: Any) -> None:
        with open(self._lines, "a") as file:
            file.write(json.dumps(line) + "\n")

    def row(
        self, what: str, seconds: float | None = None, rate: str = "", mfu: float | None = None, note: str = ""
    ) -> None:
        """A row of the page."""
        ms, share = "" if seconds is None else f"{seconds * 1e3:,.1f}", "" if mfu is None else f"{mfu:.1%}"
        self.report(row=[what, ms, rate, share, note])

    def bar(self, name: str, figure: float, want: float, at_most: bool = False) -> None:
        self.report(bar=[f"gpu_{name}", figure, want, at_most])

    def compare(self, name: str, unit: str, peer_name: str, count: int, ours: float, peer: float) -> None:
        """Two rows and the bar, from the seconds that `count` units take."""
        self.row(f"{name}, NeoBERT", ours, f"{count / ours:,.0f} {unit}")
        self.row(f"{name}, {peer_name}", peer, f"{count / peer:,.0f} {unit}", note=f"ours is {peer / ours:.2f}x")
        self.bar(name.replace("-", "_"), peer / ours, 1.5)

    # --- what is measured -----------

    def batches(self, size: Size, rows: int, count: int = 4) -> list[Documents]:
        return [Documents.made(size, rows, self.length, seed) for seed in range(count)]

    def config(self, task: str, size: Size, *words: object, compiled: bool = False) -> Any:
        """The configuration of a run on this device, as loaded."""
        from neobert.config.load import load_config

        length = [] if task == "glue" else [f"dataset.max_seq_length={self.length}"]
        base = [*size.words, f"model.max_position_embeddings={self.length}", f"tokenizer.path={TOKENIZER}", *length]
        base += ["trainer.mixed_precision=bf16", f"trainer.use_cpu={str(self.kind == 'cpu').lower()}"]
        base += ["trainer.save_strategy=no", "trainer.eval_steps=100000", "trainer.eval_max_batches=1"]
        base += [f"trainer.logging_steps={1 if self.tiny else 5}", "trainer.gradient_clipping=1.0"]
        compiler = f"trainer.torch_compile_backend={self.compiler}"
        base += ["trainer.torch_compile=true", compiler] if compiled else []
        return load_config([], [*base, *map(str, words)], task)

    @property
    def compiler(self) -> str:
        return "aot_eager" if self.tiny else "inductor"

    def wait(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds that it takes."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def seconds(self, step: Callable[[], object]) -> float:
        """Of a step: the median of three runs of some, after some that warm up and compile."""

        def run(count: int) -> None:
            for _ in range(count):
                step()

        run(4)
        count = 1 if self.tiny else 4
        return statistics.median(self.clock(lambda: run(count)) / count for _ in range(3))

    def free(self) -> None:
        """Give back the memory of models that are gone."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def largest(self, what: str, rows: tuple[int, ...], measure: Callable[[int], float]) -> tuple[int, float] | None:
        """(the first of the batch sizes that fits, seconds of its step); None, with a row of the page, where none works."""
        problem = ""
        for number in rows:
            try:
                return number, measure(number)
            except torch.OutOfMemoryError:
                problem = f"{number} rows do not fit"
            except (RuntimeError, TypeError, ValueError) as error:  # a recipe that does not work here; others may
                traceback.print_exc()
                problem = f"does not run: {first_line(error)}"
                break
            finally:
                torch._dynamo.reset()
                self.free()
        self.row(what, note=problem)
        return None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200].replace('|', '/')}"


# --- steps -----------


def build_ours(bench: Bench, size: Size, *words: str, compiled: bool = False) -> tuple[Any, Any, Any]:
    """(model, runtime, configuration) as a pretraining run makes them."""
    from neobert.tasks.encoder import build_model, prepare_model
    from neobert.training.runtime import build_runtime

    config = bench.config("pretraining", size, *words, compiled=compiled).config
    runtime = build_runtime(use_cpu=bench.kind == "cpu", mixed_precision="bf16")
    with bench.device:  # where drawing weights takes no time
        model = build_model(config, size.vocabulary, 0)
    prepare_model(config, model, runtime)
    return model, runtime, config


def seconds_of_ours(bench: Bench, size: Size, compiled: bool, rows: int) -> float:
    """Of a bare training step."""
    model, runtime, _ = build_ours(bench, size, compiled=compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    source = itertools.cycle([batch.ours(bench.device) for batch in bench.batches(size, rows)])

    def step() -> None:
        inputs = next(source)
        with runtime.autocast():
            loss = model(**inputs, masked_only=True).loss_sum / len(inputs["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return bench.seconds(step)


def peer_config(bench: Bench, kind: str, size: Size) -> Any:
    """The peer with the same width, depth, heads and feed-forward width; everything else as it comes."""
    from transformers import EuroBertConfig, ModernBertConfig

    shape = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers, "pad_token_id": 0,
        "num_attention_heads": size.heads, "intermediate_size": size.inner, "max_position_embeddings": bench.length,
        "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    if kind == "EuroBERT":
        return EuroBertConfig(**shape, mask_token_id=4)
    return ModernBertConfig(**shape, cls_token_id=2, sep_token_id=3, sparse_prediction=True)


def seconds_of_peer(bench: Bench, kind: str, size: Size, compiled: bool, rows: int) -> float:
    """Of a bare training step of a peer."""
    from transformers import AutoModelForMaskedLM

    config = peer_config(bench, kind, size)
    with bench.device:
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=bench.peer_attention)
    for layer in model.model.layers if compiled else ():
        layer.compile(backend=bench.compiler)
    batches = bench.batches(size, rows)
    inputs = [(one.unpadded if bench.has_flash else one.padded)(bench.device) for one in batches]
    return bench.seconds(plain_step(bench, model, itertools.cycle(inputs)))


def plain_step(
    bench: Bench, model: Any, source: Iterator[dict[str, Any]], max_norm: float | None = None
) -> Callable[[], None]:
    """A training step of transformers' models as a plain loop makes it."""
    model.to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(bench.kind, dtype=torch.bfloat16, enabled=bench.kind == "cuda"):
            loss = model(**next(source)).loss
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step
