"""Models on an encoder of transformers' making as a folder of that architecture alone.

Our head is pooling, a hidden layer with GELU, and a linear layer. An architecture's own class computes it exactly where it has
such a head under other names; those are listed here, and anything else is refused, since it would load as another classifier.
"""

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from neobert.checkpoints.format import Tensors
from neobert.checkpoints.load import HF_ENCODER
from neobert.errors import UserError
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification


@dataclass(frozen=True)
class Head:
    """Where an architecture keeps our head: names of its two layers, the poolings it has, and what config.json has to say."""

    dense: str
    classifier: str
    poolings: tuple[str, ...]
    fields: dict[str, Any]


HEADS = {
    "electra": Head("classifier.dense", "classifier.out_proj", ("bos",), {}),
    "deberta-v2": Head("pooler.dense", "classifier", ("bos",), {"pooler_hidden_act": "gelu"}),
    "eurobert": Head("dense", "classifier", ("bos", "mean"), {}),
}


def hf_encoder_config(
    model: HFEncoderForSequenceClassification | HFEncoderForEmbedding, fields: dict[str, Any]
) -> dict[str, Any]:
    """config.json of the architecture's own class, from that of a checkpoint. Raises UserError where it has not our head."""
    kept = {name: value for name, value in fields.items() if name not in (HF_ENCODER, "auto_map", "_name_or_path")}
    if isinstance(model, HFEncoderForEmbedding):
        return {**kept, "architectures": [type(model.model).__name__]}
    kind, names = fields["model_type"], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    head, pooling = HEADS.get(kind), {"bos": "cls"}.get(model.pooling, model.pooling)
    if head is None or model.pooling not in head.poolings:
        raise UserError(
            f"a classifier on {kind} with pooling {pooling} cannot be exported: ours has a hidden layer with GELU behind it, "
            f"{names.get(kind, 'transformers')} another head, so it would load as another model; these can: {', '.join(HEADS)}"
        )
    more = {"classifier_pooling": model.pooling} if len(head.poolings) > 1 else {}
    return {**kept, **head.fields, **more, "architectures": [names[kind]]}


def hf_encoder_tensors(model: HFEncoderForSequenceClassification | HFEncoderForEmbedding, kind: str) -> Tensors:
    """The weights under the names of the architecture's own class."""
    if isinstance(model, HFEncoderForEmbedding):
        return model.model.state_dict()
    head, found = HEADS[kind], {}
    for name, tensor in model.to_checkpoint(model.state_dict()).items():
        layer, _, rest = name.partition(".")
        new = {"dense": head.dense, "classifier": head.classifier}.get(layer, layer)
        found[f"{new}.{rest}"] = tensor
    return found
