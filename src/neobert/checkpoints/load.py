"""A trained model and its tokenizer, from a checkpoint or from a folder that `neobert export` wrote."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from neobert.checkpoints.format import STATE, WEIGHTS, Tensors, load_weights
from neobert.checkpoints.layouts import from_eurobert, is_eurobert, to_eurobert
from neobert.checkpoints.locate import CONFIG, find_model, read_model_config
from neobert.data.tokenizer import load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, first_line
from neobert.files import read_json
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification, longest_input
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from neobert.optim.sharding import part_of

EMBEDDING = "embedding"  # of our section in config.json: pooling and longest text that a model was trained with
HF_ENCODER = "neobert_head"  # section of config.json: our head on an encoder of transformers' making
LONGEST = 512  # tokens of a text for a model that nothing limits

Model = NeoBERTForMaskedLM | NeoBERTForSequenceClassification | NeoBERTForEmbedding
HFEncoderModel = HFEncoderForSequenceClassification | HFEncoderForEmbedding
Layout = Literal["checkpoint", "export", "eurobert", "published"]


@dataclass(frozen=True)
class Source:
    """A model of ours in float32 and evaluation mode with its tokenizer, and the folder that both came from.

    `fields` is config.json as its checkpoint has it. Where the folder had another `layout`, `notes` are messages: what is not
    as it was; `has_new_decoder`: the model there had none.
    """

    folder: Path
    fields: dict[str, Any]
    model: Model | HFEncoderModel
    tokenizer: Any
    layout: Layout
    notes: list[str] = field(default_factory=list)
    has_new_decoder: bool = False

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, NeoBERTForSequenceClassification | HFEncoderForSequenceClassification)

    @property
    def is_embedder(self) -> bool:
        """An encoder alone, trained to embed."""
        return isinstance(self.model, NeoBERTForEmbedding | HFEncoderForEmbedding)

    @property
    def has_head(self) -> bool:
        """Whether a decoder or a classifier was trained."""
        return not (self.is_embedder or self.has_new_decoder)

    @property
    def is_hf_encoder(self) -> bool:
        """Whether the encoder is one of transformers' making."""
        return isinstance(self.model, HFEncoderModel)

    @property
    def is_native(self) -> bool:
        """Whether a class of transformers' own computes this model: EuroBERT, or that of its encoder."""
        return self.is_hf_encoder or is_eurobert(self.model.config)

    @property
    def positions(self) -> int:
        """The longest text that it takes, in tokens."""
        return longest_input(self.model) or min(self.tokenizer.model_max_length, LONGEST)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the checkpoint counts; nothing where the folder is none. Raises CheckpointError."""
        path = self.folder / STATE
        return read_json(path, CheckpointError) if path.is_file() else {}


def load_source(path: str) -> Source:
    """The model at `path`: a run's folder, a checkpoint, or an export. Raises CheckpointError."""
    folder = find_model(path)
    model, tokenizer = load_model(folder), load_tokenizer("", str(tokenizer_folder(folder)))
    check_tokenizer(folder, tokenizer, model.config.vocab_size)
    layout: Layout = "checkpoint" if (folder / STATE).is_file() else "export"
    return Source(folder, read_model_config(folder), model, tokenizer, layout)


def load_pretrained(checkpoint: str) -> tuple[NeoBERTForMaskedLM, Any]:
    """(model in evaluation mode, tokenizer). `checkpoint` is a run's folder, one step, or an export. Raises CheckpointError."""
    source = load_source(checkpoint)
    if not isinstance(source.model, NeoBERTForMaskedLM):
        need = "predicting tokens needs; name a pretrained masked language model"
        raise CheckpointError(f"{source.folder}: has no decoder, which {need}")
    return source.model, source.tokenizer


def load_model(folder: Path) -> Model | HFEncoderModel:
    """The model in a folder of ours, whatever its head, in float32 and evaluation mode. Raises CheckpointError."""
    fields = read_model_config(folder)
    head = fields.get(HF_ENCODER)
    model = _build_model(folder, fields) if head is None else _build_hf_model(folder, head)
    load_model_weights(folder, model)
    return model.float().eval()


def _build_model(folder: Path, fields: dict[str, Any]) -> Model:
    """The model that a config.json of ours describes, with any weights."""
    name = next(iter(fields.get("architectures") or []), "")
    try:
        config = load_model_config(folder)
        if name.endswith("ForSequenceClassification"):
            return NeoBERTForSequenceClassification(config)
        if name.endswith(("Model", "ForEmbedding")) or name == "NeoBERT":
            trained = fields.get("neobert", {}).get(EMBEDDING, {})
            return NeoBERTForEmbedding(config, ContrastiveSettings(pooling=trained.get("pooling", "avg")))
        return NeoBERTForMaskedLM(config)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: describes no model: {first_line(error)}") from None


def _build_hf_model(folder: Path, head: dict[str, Any]) -> HFEncoderModel:
    """The model of a checkpoint whose encoder is one of transformers' making. `head` is our section of its config.json."""
    encoder = load_hf_encoder(str(folder))
    if "glue_task" not in head:
        settings = ContrastiveSettings(pooling=head[EMBEDDING]["pooling"])
        return HFEncoderForEmbedding(encoder, settings, encoder.config.pad_token_id or 0)
    pooling = "bos" if head["pooling"] == "cls" else head["pooling"]
    return HFEncoderForSequenceClassification(encoder, head["num_labels"], pooling, 0.0, 0.02)


def load_hf_encoder(name: str) -> Any:
    """Any encoder of `AutoModel`, in float32. Raises CheckpointError when it cannot be loaded, or not whole."""
    from transformers import AutoModel

    how = {"output_loading_info": True, "dtype": torch.float32, "trust_remote_code": False}
    try:
        encoder, found = AutoModel.from_pretrained(name, **how)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{name!r} cannot be loaded: {first_line(error)}") from None
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{name!r} is an encoder with a decoder; an encoder alone is needed")
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)
    if missing or found["mismatched_keys"]:
        listed = [*missing, *map(str, found["mismatched_keys"])]
        raise CheckpointError(f"{name!r}: {len(listed)} tensors were not loaded: {', '.join(listed[:3])}")
    return encoder


def check_tokenizer(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raises CheckpointError when a tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        sizes = f"it has {len(tokenizer):,} tokens, the model's embeddings {vocab_size:,}"
        raise CheckpointError(f"{folder}: the tokenizer does not fit: {sizes}")


# --- weights -----------


def to_checkpoint(model: Model | HFEncoderModel, weights: Tensors) -> Tensors:
    """A model's tensors under the names that they have in checkpoints: EuroBERT's where it is one."""
    if isinstance(model, HFEncoderModel):
        return model.to_checkpoint(weights)
    return to_eurobert(weights) if is_eurobert(model.config) else weights


def load_model_weights(folder: Path, model: Model | HFEncoderModel) -> None:
    """Load a checkpoint's weights. Raises CheckpointError listing the first that do not fit."""
    if isinstance(model, HFEncoderModel):
        weights = model.from_checkpoint(load_weights(folder))
    else:
        weights = read_weights(folder, model.config)
    own = model.state_dict()
    check_fit(folder, weights, own)
    model.load_state_dict({name: part_of(weights[name], tensor) for name, tensor in own.items()})


def read_weights(folder: Path, architecture: NeoBERTConfig) -> Tensors:
    """A checkpoint's tensors under our names. Raises CheckpointError when a part of one is missing."""
    try:
        weights = load_weights(folder)
        return from_eurobert(weights) if is_eurobert(architecture) else weights
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {error.args[0]} is missing") from None


def check_fit(folder: Path, weights: Tensors, own: Tensors) -> None:
    """Raises CheckpointError listing the first tensors that keep `weights` from being loaded into `own`."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(wrong[:3])}{more}")


def load_model_config(folder: Path) -> NeoBERTConfig:
    """The architecture in a checkpoint's config.json. Raises CheckpointError."""
    fields = read_model_config(folder).get("neobert")
    if fields is None:
        raise CheckpointError(f"{folder / CONFIG}: no `neobert` section; this is not one of our models")
    known = {*NeoBERTConfig.__annotations__, "num_labels"}
    return NeoBERTConfig(**{name: value for name, value in fields.items() if name in known})
