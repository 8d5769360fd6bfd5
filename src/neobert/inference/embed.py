"""Vectors of texts: sorted by length, in batches of a number of tokens, so that nothing is spent on padding.

Shapes: n texts, D width.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neobert.data.layout import RowLayout
from neobert.data.pairs import encode_texts
from neobert.data.row_files import is_utf8, place, usable_records
from neobert.data.sources import find_column, local_splits
from neobert.data.tokenizer import Ids, load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, DataError
from neobert.inference.load import EMBEDDING, FOREIGN, check_fit, load_model_config, read_weights
from neobert.model.embedding import ContrastiveSettings, ForeignForEmbedding, NeoBERTForEmbedding
from neobert.model.flat import Pooling
from neobert.training.checkpoint import STATE, find_checkpoint, verify_checkpoint

BATCH_TOKENS = 2048  # stays in the cache of a CPU core
BATCH_TOKENS_CUDA = 32_768
TEXTS_AT_ONCE = 16_384  # of a file: sorted by length among themselves

EmbeddingModel = NeoBERTForEmbedding | ForeignForEmbedding


@dataclass(frozen=True)
class Embedder:
    """A model with its tokenizer, ready to embed. `precision`: None for float32, else autocast to it."""

    model: EmbeddingModel
    hf_tokenizer: Any
    max_length: int
    batch_tokens: int = BATCH_TOKENS
    precision: torch.dtype | None = None

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(
        self, texts: list[str], normalize: bool = True, tell: Callable[[int], None] = lambda n: None
    ) -> np.ndarray:
        """One vector per text, float32, n x D, of length 1 with `normalize`; `tell` is told of every text that is done.

        Texts are cut after `max_length` tokens.
        """
        ids = encode_texts(self.hf_tokenizer, texts, self.max_length, True, "texts")
        return self.encode_ids(ids, normalize, tell)

    def encode_ids(self, ids: list[Ids], normalize: bool, tell: Callable[[int], None]) -> np.ndarray:
        """As `encode`, of token ids with special tokens."""
        device = next(self.model.parameters()).device

        def autocast() -> AbstractContextManager[None]:
            return torch.autocast(device.type, self.precision) if self.precision else nullcontext()

        pad_id = self.hf_tokenizer.pad_token_id
        vectors = embed_ids(self.model, ids, self.width, pad_id, device, self.batch_tokens, autocast, tell)
        return unit_rows(vectors) if normalize else vectors


@torch.no_grad()
def embed_ids(
    model: Any,
    ids: list[Ids],
    width: int,
    pad_id: int,
    device: torch.device,
    batch_tokens: int,
    autocast: Callable[[], AbstractContextManager[None]],
    tell: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """n x D. `model` gives `.embeddings` of a batch. Texts are packed on the CPU, and padded to the longest elsewhere."""
    vectors = np.empty((len(ids), width), dtype=np.float32)
    layout = RowLayout(pad_id, packed=device.type == "cpu", row_length=None, multiple=1)
    for chosen in batches_by_length([len(row) for row in ids], batch_tokens):
        rows = [ids[number] for number in chosen]
        mask, lengths = layout.boundaries(rows)
        inputs = {"input_ids": layout.arrange(rows, pad_id).to(device), "document_lengths": lengths}
        if mask is not None:
            inputs["attention_mask"] = mask.to(device)
        with autocast():
            vectors[chosen] = model(**inputs).embeddings.float().cpu().numpy()
        tell(len(chosen))
    return vectors


def batches_by_length(lengths: list[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Places of texts, longest first: as many as come to `batch_tokens` when padded to the longest of them, at least one."""
    order = np.argsort(-np.array(lengths), kind="stable")
    begin = 0
    while begin < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[begin]]))
        yield order[begin : begin + count]
        begin += count


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Every row with length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# --- models -----------


def load_embedder(
    source: str,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    precision: torch.dtype | None = None,
) -> Embedder:
    """From a run's folder, one of its checkpoints, or a folder of any encoder that `AutoModel` loads.

    `pooling` default: what it was trained with, else the mean. Raises CheckpointError.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file() or (folder / STATE).is_file():
        folder = find_checkpoint(source)
        verify_checkpoint(folder)
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / 'config.json'}: missing or not JSON") from None
    trained = fields.get("neobert", fields.get(FOREIGN, {})).get(EMBEDDING, {})
    settings = ContrastiveSettings(pooling=pooling or trained.get("pooling", "avg"))
    tokenizer = load_tokenizer("", str(tokenizer_folder(folder)))
    if "neobert" in fields:
        model: EmbeddingModel = _load_ours(folder, settings)
    else:
        model = _load_foreign(folder, settings, tokenizer.pad_token_id)
    longest = int(getattr(model.config, "max_position_embeddings", 512))
    length = min(max_length or trained.get("max_length", longest), longest, tokenizer.model_max_length)
    size = BATCH_TOKENS
    if torch.cuda.is_available():
        model.to("cuda")
        size = BATCH_TOKENS_CUDA
    return Embedder(model.eval(), tokenizer, length, batch_tokens or size, precision)


def _load_ours(folder: Path, settings: ContrastiveSettings) -> NeoBERTForEmbedding:
    config = load_model_config(folder)
    model = NeoBERTForEmbedding(config, settings)
    weights = {name: tensor for name, tensor in read_weights(folder, config).items() if name.startswith("model.")}
    check_fit(folder, weights, model.state_dict())
    model.load_state_dict(weights)
    return model


def _load_foreign(folder: Path, settings: ContrastiveSettings, pad_id: int) -> ForeignForEmbedding:
    from transformers import AutoModel

    try:
        encoder = AutoModel.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder}: cannot be loaded: {reason}") from None
    return ForeignForEmbedding(encoder, settings, pad_id)


# --- files -----------


def read_texts(path: str, column: str | None) -> Iterator[str]:
    """The texts of a file, one a row. Raises DataError naming the row that has none: vectors keep the order of rows."""
    try:
        files = [file for split in local_splits(path).values() for file in split]
        columns = [find_column(file, column) or "text" for file in files]
    except DataError as error:
        told = str(error).replace("dataset.text_column", "--column").replace("dataset.path: ", "")
        raise DataError(told) from None
    for file, wanted in zip(files, columns, strict=True):
        for row, begin in usable_records(file):
            text = row.get(wanted)
            if not isinstance(text, str) or not is_utf8(text):
                raise DataError(f"{place(file, begin)}: {wanted} is {text!r}, not a text")
            yield text


def embed_file(
    embedder: Embedder,
    path: str,
    output: Path,
    column: str | None = None,
    normalize: bool = True,
    tell: Callable[[int], None] = lambda n: None,
) -> tuple[int, int]:
    """Write the vectors of a file's texts to .npy or .parquet, whole or not at all; returns (texts, width).

    Raises DataError for a file that cannot be read or an output of another kind.
    """
    writers = {".npy": write_npy, ".parquet": write_parquet}
    if output.suffix not in writers:
        raise DataError(f"{output}: not a kind of file that can be written; these can: {', '.join(writers)}")
    if not output.parent.is_dir():
        raise DataError(f"{output}: no folder {output.parent}")
    texts = read_texts(path, column)
    scratch = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        count = writers[output.suffix](scratch, _vectors(embedder, texts, normalize, tell), embedder.width)
        if not count:
            raise DataError(f"{path}: no text in it")
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, output)
    finally:
        scratch.unlink(missing_ok=True)
    return count, embedder.width


def _vectors(
    embedder: Embedder, texts: Iterator[str], normalize: bool, tell: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Blocks of vectors in the order of the texts; the next block is tokenised while one is computed."""

    def tokenized() -> list[Ids]:
        block = list(islice(texts, TEXTS_AT_ONCE))
        return encode_texts(embedder.hf_tokenizer, block, embedder.max_length, True, "texts")

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(tokenized)
        while ids := ahead.result():
            ahead = pool.submit(tokenized)
            yield embedder.encode_ids(ids, normalize, tell)


def write_npy(path: Path, blocks: Iterable[np.ndarray], width: int) -> int:
    """float32, texts x width; the header is written again when the number of rows is known."""
    count = 0
    with open(path, "w+b") as file:
        _npy_header(file, 2**62, width)
        begin = file.tell()
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=np.float32).tobytes())
            count += len(block)
        file.seek(0)
        _npy_header(file, count, width)
        assert file.tell() == begin, "numpy pads headers so that the shape can grow in place"
    return count


def _npy_header(file: Any, count: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})


def write_parquet(path: Path, blocks: Iterable[np.ndarray], width: int) -> int:
    """One column, `embedding`, of lists of `width` float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, count = pa.schema([("embedding", pa.list_(pa.float32(), width))]), 0
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
            writer.write_table(pa.table([column], schema=schema))
            count += len(block)
    return count
