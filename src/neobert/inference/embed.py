"""Vectors of texts: sorted by length, in batches of a number of tokens, so that nothing is spent on padding; and the texts of
a file as vectors in a .npy or .parquet file, in their order.

Shapes: n texts, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers

from neobert.checkpoints.load import check_fit, load_hf_encoder, load_model_config, read_weights
from neobert.checkpoints.locate import find_encoder, read_model_config
from neobert.data.batch import RowLayout
from neobert.data.files.rows import text_in, usable_records
from neobert.data.files.splits import find_column, local_splits
from neobert.data.pairs.table import encode_texts
from neobert.data.tokenizer import Ids, load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, DataError
from neobert.files import whole_file
from neobert.inference.sentence_transformers import SentenceSettings, read_sentence_settings
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, longest_input
from neobert.model.unpadding import Pooling
from neobert.training.runtime import Runtime, build_runtime

TEXTS_AT_ONCE = 16_384  # of a file, sorted by length among themselves
BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # 2,048 stay in the cache of a CPU core

Progress = Callable[[int], object]  # called with a number of texts that are done
EmbeddingModel = NeoBERTForEmbedding | HFEncoderForEmbedding
Row = tuple[str, Any]  # a text and its id, None where there is none
Blocks = Iterable[tuple[list[Row], np.ndarray]]


@dataclass(frozen=True)
class Embedder:
    """A model with its tokenizer, ready to embed as `settings` say. `batch_tokens` None: by device."""

    model: EmbeddingModel
    hf_tokenizer: Any
    max_length: int
    settings: SentenceSettings
    runtime: Runtime = Runtime(device=torch.device("cpu"))  # noqa: RUF009 - frozen
    batch_tokens: int | None = None

    @property
    def width(self) -> int:
        """D of the vectors, after what follows pooling."""
        return int(self.settings.head(torch.zeros(1, self.model.config.hidden_size)).shape[1])

    def encode(
        self, texts: list[str], normalize: bool | None = None, progress: Progress = lambda n: None,
        prompt: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """One vector per text, float32, n x D; `progress` gets the number of texts of each batch.

        With `normalize` they have length 1; None: as the folder says, else they have. `prompt` is put in front of every text;
        None: the folder's default prompt. Texts are cut after `max_length` tokens. Raises CheckpointError for a prompt where
        the folder wants it left out of what is pooled.
        """
        return self.encode_ids(self.tokenize(texts, prompt), normalize, progress)

    def tokenize(self, texts: list[str], prompt: str | None = None) -> list[Ids]:
        """Token ids of every text, with its prompt and special tokens."""
        prompt = self.settings.default_prompt if prompt is None else prompt
        if prompt and not self.settings.include_prompt:
            asked = "include_prompt: false, pooling without the prompt"
            raise CheckpointError(f"{self.settings.encoder}: {asked}, is not computed here")
        return encode_texts(self.hf_tokenizer, [prompt + text for text in texts], self.max_length, True, "texts")

    @torch.no_grad()
    def encode_ids(self, ids: list[Ids], normalize: bool | None, progress: Progress) -> np.ndarray:
        """The same as `encode` for what `tokenize` gave."""
        pad_id = self.hf_tokenizer.pad_token_id
        pooled = embed_ids(self.model, ids, pad_id, self.runtime, self.batch_tokens, progress)
        vectors = self.settings.head(torch.from_numpy(pooled)).numpy()
        wanted = self.settings.normalize is not False if normalize is None else normalize
        return unit_rows(vectors) if wanted else vectors


@torch.no_grad()
def embed_ids(
    model: Any, ids: list[Ids], pad_id: int, runtime: Runtime, batch_tokens: int | None = None,
    progress: Progress = lambda n: None,
) -> np.ndarray:  # fmt: skip
    """n x D. `model`, wrapped or not, gives `.embeddings` of a batch. Texts are packed; padded where SDPA runs on a GPU.

    The processes of `runtime` take batches in turn, and all get all vectors. Each computes as many batches as the others, as
    engines that split the model need every process in a forward pass.
    """
    inner, kind = getattr(model, "module", model), runtime.device.type
    pads = kind != "cpu" and isinstance(inner, NeoBERTForEmbedding) and inner.model.attention_kernel == "sdpa"
    layout = RowLayout(pad_id, packed=not pads)
    batches = list(batches_by_length([len(row) for row in ids], batch_tokens or BATCH_TOKENS[kind]))
    vectors = np.zeros((len(ids), inner.config.hidden_size), dtype=np.float32)
    for first in range(0, len(batches), runtime.world_size):
        number = first + runtime.rank
        chosen = batches[min(number, len(batches) - 1)]
        batch = layout.batch([ids[i] for i in chosen]).to(runtime.device)
        with runtime.autocast():
            found = model(**batch.inputs()).embeddings.float().cpu().numpy()
        if number < len(batches):
            vectors[chosen] = found
            progress(len(chosen))
    return runtime.sum_tensor(torch.from_numpy(vectors)).numpy()


def batches_by_length(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, most_rows: int | None = None
) -> Iterator[np.ndarray]:
    """Indices of texts, longest first: as many as come to `batch_tokens` when padded to the longest of them, at least one and
    at most `most_rows`.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    while len(order):
        count = max(1, batch_tokens // max(1, lengths[order[0]]))
        chosen, order = np.split(order, [min(count, most_rows or count)])
        yield chosen


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Every row with length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# --- models -----------


def load_embedder(
    source: str, pooling: Pooling | None = None, max_length: int | None = None, batch_tokens: int | None = None,
    runtime: Runtime | None = None,
) -> Embedder:  # fmt: skip
    """From a run's folder, one of its checkpoints, or a folder of any encoder that `AutoModel` loads.

    `pooling` and `max_length` default: as the folder says, else the mean and what the tokenizer is for; `runtime`: float32,
    on the GPU where there is one. Raises CheckpointError.
    """
    folder = find_encoder(source)
    found = read_sentence_settings(folder)
    tokenizer = load_tokenizer("", str(tokenizer_folder(found.encoder)))
    if found.lower_case:  # as sentence-transformers lowers texts first
        backend = tokenizer.backend_tokenizer
        rest = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    settings = ContrastiveSettings(pooling=pooling or found.pooling or "avg")
    if "neobert" in read_model_config(found.encoder):
        config = load_model_config(found.encoder)
        model: EmbeddingModel = NeoBERTForEmbedding(config, settings)
        tensors = read_weights(found.encoder, config).items()
        weights = {name: tensor for name, tensor in tensors if name.startswith("model.")}
        check_fit(found.encoder, weights, model.state_dict())
        model.load_state_dict(weights)
    else:
        model = HFEncoderForEmbedding(load_hf_encoder(str(found.encoder)), settings, tokenizer.pad_token_id)
    longest = longest_input(model)
    if max_length is not None and longest is not None and max_length > longest:
        raise CheckpointError(f"{folder}: texts of {max_length} tokens were asked for, but the model takes {longest}")
    length = max_length or found.max_length or tokenizer.model_max_length
    runtime = runtime or build_runtime(use_cpu=False, mixed_precision="no", tf32=False, trains=False).alone()
    if isinstance(model, NeoBERTForEmbedding):
        runtime.set_attention(model, "flash_attn_varlen")
    model.to(runtime.device).eval()
    return Embedder(model, tokenizer, min(length, longest or length), found, runtime, batch_tokens)


# --- files -----------


def read_rows(path: str, column: str | None) -> Iterator[Row]:
    """The texts of a file's records, each with what stands in its column `id` (or `_id`). Raises DataError naming the record
    that has no text: vectors keep the order of records.
    """
    try:
        files = [file for split in local_splits(path).values() for file in split]
        columns = [find_column(file, column) or "text" for file in files]
    except DataError as error:
        message = str(error).replace("dataset.text_column", "--column").replace("dataset.path: ", "")
        raise DataError(message) from None
    for file, wanted in zip(files, columns, strict=True):
        for record, begin in usable_records(file):
            yield text_in(record, wanted, file, begin), record.get("id", record.get("_id"))


def check_new_file(path: Path, force: bool) -> None:
    """Raises DataError where a result may not be written: its folder is missing, or it is there already."""
    if not path.parent.is_dir():
        raise DataError(f"{path}: no folder {path.parent}")
    if path.exists() and not force:
        raise DataError(f"{path}: is there already; choose another file, or --force")


def embed_file(
    embedder: Embedder, path: str, output: Path, column: str | None = None, normalize: bool | None = None,
    progress: Progress = lambda n: None, prompt: str | None = None, force: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Write the vectors of a file's texts to .npy or .parquet, whole or not at all; returns (texts, width). Raises DataError
    for a file that cannot be read, an output of another kind, or one that is there, unless with `force`.
    """
    writers = {".npy": write_npy, ".parquet": write_parquet}
    if output.suffix not in writers:
        raise DataError(f"{output}: not a kind of file that can be written; these can: {', '.join(writers)}")
    check_new_file(output, force)
    rows = read_rows(path, column)

    def tokenize_block() -> tuple[list[Row], list[Ids]]:
        block = list(islice(rows, TEXTS_AT_ONCE))
        return block, embedder.tokenize([text for text, _ in block], prompt)

    def embed_blocks() -> Blocks:
        """Rows with their vectors, in order; the next block is tokenised while one is computed."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(tokenize_block)
            while (found := ahead.result())[0]:
                ahead = pool.submit(tokenize_block)
                yield found[0], embedder.encode_ids(found[1], normalize, progress)

    with whole_file(output) as scratch:
        count = writers[output.suffix](scratch, embed_blocks(), embedder.width)
        if not count:
            raise DataError(f"{path}: no text in it")
    return count, embedder.width


def write_npy(path: Path, blocks: Blocks, width: int) -> int:
    """float32, texts x width; the header is written again when the number of rows is known."""
    count, header = 0, {"descr": "<f4", "fortran_order": False}
    with open(path, "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (2**62, width)})
        begin = file.tell()
        for _, vectors in blocks:
            file.write(vectors.astype("<f4").tobytes())
            count += len(vectors)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, width)})
        assert file.tell() == begin, "numpy pads headers so that the shape can grow in place"
    return count


def write_parquet(path: Path, blocks: Blocks, width: int) -> int:
    """The columns `id`, where the first rows have one, of their type; `text`; and `embedding`, lists of `width` float32.
    Raises DataError for an id of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, count, kind = None, 0, None
    for rows, vectors in blocks:
        try:
            ids = pa.array([identity for _, identity in rows], kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"the column id does not hold values of one type: {error}") from None
        texts = pa.array([text for text, _ in rows], pa.string())
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
        table = pa.table({"id": ids, "text": texts, "embedding": lists})
        if writer is None:
            kind = ids.type
            has_ids = not pa.types.is_null(kind)
            writer = pq.ParquetWriter(path, table.schema if has_ids else table.schema.remove(0))
        writer.write_table(table.select(writer.schema.names))
        count += len(rows)
    if writer:
        writer.close()
    return count
