"""One training step in a bare loop: packed rows through our model, against EuroBertForMaskedLM and ModernBertForMaskedLM.

The same documents (the shipped text, cut at 512 tokens), the same size and vocabulary (30,592), bf16 autocast where the
CPU has AMX or on CUDA, 15 % of the tokens masked, fused AdamW. Ours come packed in rows of 512 tokens; the peers' are
padded to the longest of the batch, as their recipes do, at the batch size that suits them best. Real tokens per second:
padding does not count.

The second figure is the share of a limit: the floating-point operations of our step per second, against a bare loop of
the same matrix products (forward and both backward ones, of these very shapes) in the same run. It is that of the better of our
two rows, as it comes and with `trainer.torch_compile: true`; the first figure is always the plain one's. Every row is a
process of its own, one after the other.
"""

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from _bench import TEXT, TOKENIZER, arguments, bar, finish, run, table
from transformers import (
    AutoTokenizer,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from neobert.data.batch import Batch, RowLayout
from neobert.data.mlm.pipeline import Collator, Masker
from neobert.data.mlm.row_source import Packer, Row
from neobert.model.layers import swiglu_width
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.training.choices import compile_blocks, keep_memory

VOCABULARY, LENGTH, MASKED = 30_592, 512, 0.15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = DEVICE.type == "cuda" or torch.cpu._is_amx_tile_supported()
MASK_ID = 4


@dataclass(frozen=True)
class Size:
    """A shape of model, the rows of our batch, and the bars."""

    name: str
    width: int
    layers: int
    heads: int
    rows: int
    peer_rows: tuple[int, ...]
    want_ratio: float
    want_share: float

    @property
    def inner(self) -> int:
        return swiglu_width(4 * self.width)


SIZES = (
    Size("256x6", 256, 6, 4, 16, (4, 8, 16), 2.0, 0.35),
    Size("768x12", 768, 12, 12, 16, (4, 8), 1.6, 0.55),
)


def read_documents() -> list[list[int]]:
    """Token ids of the shipped text in a fixed random order, special tokens included, at most 512 each."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lines = (TEXT / "train.txt").read_text().splitlines()
    random.Random(0).shuffle(lines)
    return [tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"] for line in lines[:6000]]


def batches(documents: list[list[int]], rows: int, packed: bool) -> Iterator[Batch]:
    """Endless batches as our loader makes them: 512-token rows filled by best fit, or documents padded to the longest."""
    masker = Masker(0, MASKED, False, MASK_ID, frozenset(range(5)), 8192)
    collate = Collator(masker, RowLayout(0, packed, LENGTH if packed else None))
    maker = Packer(LENGTH if packed else 0)
    ready: list[Row] = []
    for epoch in itertools.count():
        for document in documents:
            ready += maker.add(np.array(document, dtype=np.int32), epoch)
            if len(ready) >= rows:
                yield collate([replace(row, index=index) for index, row in enumerate(ready[:rows])], epoch)
                del ready[:rows]


def build_ours(size: Size) -> torch.nn.Module:
    return NeoBERTForMaskedLM(
        NeoBERTConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
        )
    )


def build_peer(kind: str, size: Size) -> torch.nn.Module:
    """The peers with the same width, depth, heads and feed-forward width; everything else as they come."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
    }
    if kind == "EuroBERT":
        return EuroBertForMaskedLM(EuroBertConfig(**shape, bos_token_id=2, eos_token_id=3, mask_token_id=4))
    ids = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    return ModernBertForMaskedLM(ModernBertConfig(**shape, **ids, sparse_prediction=True))


def stepper(model: torch.nn.Module, source: Iterator[Batch]) -> Callable[[], float]:
    """A function that trains one step and returns its real tokens per second."""
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ours = isinstance(model, NeoBERTForMaskedLM)

    def step() -> float:
        batch = next(source).to(DEVICE)
        inputs = {name: value for name, value in batch.inputs().items() if ours or name != "document_lengths"}
        inputs |= {"masked_only": True} if ours else {}
        start = clock()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=BF16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch.num_tokens / (clock() - start)

    return step


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def products(size: Size, batch: Batch) -> list[tuple[int, int, int, int]]:
    """(n, k, m, times): the products of a forward pass, N x k times k x m, outside attention."""
    N, D, F = batch.input_ids.numel(), size.width, size.inner
    layer = [(N, D, 3 * D), (N, D, D), (N, D, 2 * F), (N, F, D)]
    return [(*shape, size.layers) for shape in layer] + [(batch.num_targets, D, VOCABULARY, 1)]


def step_flops(size: Size, batch: Batch) -> float:
    """Of forward and backward: three times the forward's products, attention included, at two operations each."""
    linear = sum(2 * n * k * m * times for n, k, m, times in products(size, batch))
    attention = sum(4 * length**2 * size.width for length in batch.document_lengths) * size.layers
    return 3.0 * (linear + attention)


def gemm_rate(size: Size, batch: Batch) -> float:
    """Operations per second of the bare products, forward and both backward ones."""
    dtype = torch.bfloat16 if BF16 else torch.float32
    flops = seconds = 0.0
    for n, k, m, times in products(size, batch):
        x, w, y = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((n, k), (m, k), (n, m)))
        start = clock()
        torch.mm(x, w.t()), torch.mm(y, w), torch.mm(y.t(), x)
        seconds += (clock() - start) * times
        flops += 6 * n * k * m * times
    return flops / seconds


def contender(name: str, size: Size, documents: list[list[int]]) -> tuple[torch.nn.Module, Iterator[Batch]]:
    """The model and the batches of a row of the table."""
    kind, _, rows = name.partition(" ")
    if kind in ("ours", "compiled"):
        keep_memory()
        model = build_ours(size)
        if kind == "compiled":
            compile_blocks(model.model, DEVICE.type, "inductor", None)
        return model, batches(documents, size.rows, packed=True)
    return build_peer(kind, size), batches(documents, int(rows), packed=False)


def child(name: str, size: Size, num_steps: int) -> None:
    """In a process of its own: prints the median rate, the operations per token, and the bare products' rate per second."""
    torch.manual_seed(0)
    model, source = contender(name, size, read_documents())
    batch, step = next(source), stepper(model, source)
    for _ in range(3):
        step()
    ours = name in ("ours", "compiled")
    pairs = [(step(), gemm_rate(size, batch) if ours else 0.0) for _ in range(num_steps)]
    rate, limit = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(json.dumps([rate, step_flops(size, batch) / batch.num_tokens if ours else 0.0, limit]))


def measure(size: Size, num_steps: int) -> None:
    peers = [f"{kind} {rows}" for kind in ("EuroBERT", "ModernBERT") for rows in size.peer_rows]
    found = {}
    for name in ("ours", "compiled", *peers):
        words = [sys.executable, __file__, "--child", name, "--size", size.name, "--steps", num_steps]
        found[name] = json.loads(run(words).splitlines()[-1])
    rates, flops, limits = ({name: values[column] for name, values in found.items()} for column in range(3))
    flops_per_token = flops["ours"]
    shares = {name: rates[name] * flops_per_token / limits[name] for name in ("ours", "compiled")}
    print(f"{size.name}: {size.rows} rows of {LENGTH} tokens a step, {'bf16 autocast' if BF16 else 'float32'}")
    print(f"bare products: {limits['ours'] / 1e9:,.0f} GFLOP/s")
    lines = [
        (name, f"{rate:,.0f}", f"{rate * flops_per_token / 1e9:,.0f}", f"{rates['ours'] / rate:.2f}x",
         f"{shares[name]:.1%}" if name in shares else "")
        for name, rate in rates.items()
    ]  # fmt: skip
    table([("", "real tokens/s", "GFLOP/s", "ours is", "of bare products"), *lines])
    bar(f"model_step_{size.name}", rates["ours"] / max(rates[name] for name in peers), size.want_ratio)
    bar(f"model_step_{size.name}_share", max(shares.values()), size.want_share)


def main() -> None:
    sizes = {size.name: size for size in SIZES}
    options = arguments(
        __doc__,
        size={"choices": list(sizes), "help": "only this one"},
        child={"help": "one row of the table"},
        steps={"type": int, "default": 5},
    )
    if options.child:
        child(options.child, sizes[options.size], options.steps)
        return
    for size in SIZES:
        if options.size == size.name or (options.size is None and (size is SIZES[0] or not options.quick)):
            measure(size, num_steps=3 if options.quick else 5)
    finish()


if __name__ == "__main__":
    main()
