"""What is exported: a model of ours in float32 with its tokenizer, and what the run that trained it left beside it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from neobert.checkpoints.format import STATE, Tensors
from neobert.checkpoints.layouts import is_eurobert
from neobert.checkpoints.load import HF_ENCODER, HFEncoderModel, Model, load_model, load_model_tokenizer
from neobert.checkpoints.locate import find_model, read_model_config
from neobert.errors import CheckpointError, UserError
from neobert.files import read_json
from neobert.inference.sentence_transformers import SentenceSettings, read_sentence_settings
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification, longest_input
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification

LONGEST = 512  # tokens of a text for a model that nothing limits


@dataclass(frozen=True)
class Source:
    """A model to export. `fields` is its config.json; `run` the output folder of the run, `state` what its checkpoint counts,
    `config` its YAML: empty where the source is no checkpoint."""

    folder: Path
    fields: dict[str, Any]
    model: Model | HFEncoderModel
    tokenizer: Any
    run: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, NeoBERTForSequenceClassification | HFEncoderForSequenceClassification)

    @property
    def is_embedder(self) -> bool:
        """An encoder alone, trained to embed."""
        return isinstance(self.model, NeoBERTForEmbedding | HFEncoderForEmbedding)

    @property
    def is_hf_encoder(self) -> bool:
        """Whether the encoder is one of transformers' making."""
        return isinstance(self.model, HFEncoderModel)

    @cached_property
    def sentence(self) -> SentenceSettings:
        """How the model was trained or exported to embed. Raises CheckpointError for what an export cannot keep."""
        found = read_sentence_settings(self.folder)
        lost = {
            "Dense modules": len(found.head),
            "default_prompt_name": found.default_prompt,
            "include_prompt: false": not found.include_prompt,
            "do_lower_case": found.lower_case,
            f"similarity_fn_name {found.similarity}": found.similarity != "cosine",
        }
        if names := [name for name, is_there in lost.items() if is_there]:
            raise CheckpointError(f"{self.folder}: its {', '.join(names)} cannot be exported; use the folder as it is")
        return found

    @property
    def positions(self) -> int:
        """The longest text that it takes, in tokens."""
        return longest_input(self.model) or min(self.tokenizer.model_max_length, LONGEST)

    @property
    def longest(self) -> int:
        """The longest text it is for, in tokens."""
        return min(self.positions, self.sentence.max_length or self.positions)

    @property
    def is_native(self) -> bool:
        """Whether a class of transformers' own computes this model: EuroBERT, or that of its encoder."""
        return self.is_hf_encoder or is_eurobert(self.model.config)


def load_source(path: str) -> Source:
    """The model at `path`: a run's folder, a checkpoint, or an export. Raises CheckpointError."""
    folder = find_model(path)
    fields = read_model_config(folder)
    model = load_model(folder)
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    if not (folder / STATE).is_file():
        return Source(folder, fields, model, tokenizer)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return Source(folder, fields, model, tokenizer, run, read_json(folder / STATE, CheckpointError), config)


# --- encoders of transformers' making -----------


@dataclass(frozen=True)
class Head:
    """Where an architecture keeps our head: names of its two layers, the poolings it has, and what config.json has to say."""

    dense: str
    classifier: str
    poolings: tuple[str, ...]
    fields: dict[str, Any]


# Our head is pooling, a hidden layer with GELU, and a linear layer. Classes of these architectures compute it exactly; anything
# else is refused, since it would load as another classifier.
HEADS = {
    "electra": Head("classifier.dense", "classifier.out_proj", ("bos",), {}),
    "deberta-v2": Head("pooler.dense", "classifier", ("bos",), {"pooler_hidden_act": "gelu"}),
    "eurobert": Head("dense", "classifier", ("bos", "mean"), {}),
}


def hf_encoder_config(source: Source) -> dict[str, Any]:
    """config.json of the architecture's own class. Raises UserError where it has not our head."""
    model, kind, names = source.model, source.fields["model_type"], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    kept = {
        name: value for name, value in source.fields.items() if name not in (HF_ENCODER, "auto_map", "_name_or_path")
    }
    if not isinstance(model, HFEncoderForSequenceClassification):
        return {**kept, "architectures": [type(model.model).__name__]}
    head, pooling = HEADS.get(kind), {"bos": "cls"}.get(model.pooling, model.pooling)
    if head is None or model.pooling not in head.poolings:
        raise UserError(
            f"a classifier on {kind} with pooling {pooling} cannot be exported: ours has a hidden layer with GELU after it, "
            f"{names.get(kind, 'transformers')} another head, so it would load as another model; these can: {', '.join(HEADS)}"
        )
    more = {"classifier_pooling": model.pooling} if len(head.poolings) > 1 else {}
    return {**kept, **head.fields, **more, "architectures": [names[kind]]}


def hf_encoder_tensors(source: Source) -> Tensors:
    """The weights under the names of the architecture's own class."""
    model = source.model
    if not isinstance(model, HFEncoderForSequenceClassification):
        return model.model.state_dict()
    head = HEADS[source.fields["model_type"]]
    renamed = {"dense": head.dense, "classifier": head.classifier}
    found = {}
    for name, tensor in model.to_checkpoint(model.state_dict()).items():
        layer, _, rest = name.partition(".")
        found[f"{renamed.get(layer, layer)}.{rest}"] = tensor
    return found
