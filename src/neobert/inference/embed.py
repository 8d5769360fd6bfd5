"""Vectors of texts: sorted by length, in batches of a number of tokens, so that nothing is spent on padding.

Shapes: n texts, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers

from neobert.checkpoints.load import load_hf_encoder, load_into, load_model_config, read_weights
from neobert.checkpoints.locate import find_encoder, read_model_config
from neobert.data.batch import RowLayout
from neobert.data.pairs.table import encode_texts
from neobert.data.tokenizer import Ids, load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError
from neobert.inference.sentence_transformers import SentenceSettings, read_sentence_settings
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, longest_input
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.model.unpadding import Pooling
from neobert.training.choices import choose_attention, find_kernels, gpu_capability
from neobert.training.runtime import Runtime, build_runtime

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # 2,048 stay in the cache of a CPU core

Progress = Callable[[int], object]  # called with a number of texts that are done
EmbeddingModel = NeoBERTForEmbedding | HFEncoderForEmbedding


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
        self,
        texts: list[str],
        normalize: bool | None = None,
        progress: Progress = lambda n: None,
        prompt: str | None = None,
    ) -> np.ndarray:
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
        weights = read_weights(found.encoder, config).items()
        load_into(model, found.encoder, {name: tensor for name, tensor in weights if name.startswith("model.")})
    else:
        model = HFEncoderForEmbedding(load_hf_encoder(str(found.encoder)), settings, tokenizer.pad_token_id)
    longest = longest_input(model)
    if max_length is not None and longest is not None and max_length > longest:
        raise CheckpointError(f"{folder}: texts of {max_length} tokens were asked for, but the model takes {longest}")
    length = max_length or found.max_length or tokenizer.model_max_length
    runtime = runtime or build_runtime(use_cpu=False, mixed_precision="no", tf32=False, trains=False).alone()
    place_model(model, runtime)
    return Embedder(model, tokenizer, min(length, longest or length), found, runtime, batch_tokens)


def place_model(model: torch.nn.Module, runtime: Runtime) -> None:
    """Bring a model to the device of `runtime`, to compute and not to train; ours with attention that needs no padding."""
    if isinstance(model, NeoBERTForMaskedLM | NeoBERTForEmbedding):
        head_width = model.config.hidden_size // model.config.num_attention_heads
        model.model.attention_kernel, _ = choose_attention(
            "flash_attn_varlen", runtime.device.type, dtype=runtime.dtype, head_width=head_width,
            packages=find_kernels(), capability=gpu_capability(runtime.device),
        )  # fmt: skip
    model.to(runtime.device).eval()
