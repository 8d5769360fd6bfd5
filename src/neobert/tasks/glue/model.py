"""The classifier of a GLUE run: built, given its first weights, and stored in checkpoints."""

from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.format import load_weights, verify_checkpoint
from neobert.checkpoints.initial_weights import InitialWeights, glue_task
from neobert.checkpoints.load import load_model
from neobert.config.schema import Config
from neobert.data.labelled import TASKS, GlueTask
from neobert.data.tokenizer import load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError
from neobert.model.hf_encoder import HFEncoderForSequenceClassification
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.tasks import encoder
from neobert.training.run import Storage

Classifier = NeoBERTForSequenceClassification | HFEncoderForSequenceClassification
POOLING = {"cls": "bos", "mean": "mean"}  # ours -> transformers' names


def build_classifier(
    config: Config, task: GlueTask, weights: InitialWeights, vocab_size: int, pad_id: int
) -> tuple[Classifier, str]:
    """(the model with its first weights, what was loaded in one line). `seed` draws the rest. Raises CheckpointError."""
    torch.manual_seed(config.seed)
    glue = config.glue
    if weights.hub is None:
        architecture = encoder.model_config(
            config, vocab_size, pad_id, num_labels=task.num_labels, classifier_dropout=glue.classifier_dropout,
            classifier_init_range=glue.classifier_init_range, classifier_pooling=POOLING[glue.pooling], **weights.inherited,
        )  # fmt: skip
        own = NeoBERTForSequenceClassification(architecture)
        own.model.gradient_checkpointing = config.trainer.gradient_checkpointing
        return own, encoder.load_own_encoder(weights, own, vocab_size)
    bare = encoder.load_hf_encoder(config, weights.hub, vocab_size, "glue.max_seq_length", glue.max_seq_length)
    model = HFEncoderForSequenceClassification(
        bare, task.num_labels, POOLING[glue.pooling], glue.classifier_dropout, glue.classifier_init_range
    )
    if weights.folder is None:
        return model, f"{weights.hub}, all of the encoder; new: dense, classifier"
    tensors = model.from_checkpoint(load_weights(weights.folder))
    return model, encoder.load_parts(weights.folder, model, tensors, with_dense=True)


# --- checkpoints -----------


def build_storage(config: Config, model: Classifier, task: GlueTask, hf_tokenizer: Any) -> Storage:
    """How the classifier is written to checkpoints and read back; transformers reads them too (EuroBERT's classifier)."""
    by_id = {str(number): name for number, name in enumerate(task.labels or ("score",))}
    fields: dict[str, Any] = {
        "id2label": by_id,
        "label2id": {name: int(number) for number, name in by_id.items()},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }
    section: dict[str, Any] = {"num_labels": task.num_labels, "glue_task": task.name}
    if isinstance(model, HFEncoderForSequenceClassification):
        head = {"pooling": config.glue.pooling, "classifier_dropout": config.glue.classifier_dropout}
        section = {"glue_task": task.name, **head, "num_labels": task.num_labels}
    else:
        fields["classifier_pooling"] = model.config.classifier_pooling
    return encoder.build_storage(model, config.model.name, hf_tokenizer, section, fields)


def load_finetuned(folder: Path) -> tuple[Classifier, Any, GlueTask]:
    """(model in evaluation mode, tokenizer, task) of a GLUE checkpoint. Raises CheckpointError."""
    verify_checkpoint(folder)
    name, model = glue_task(folder), load_model(folder)
    if name is None or not isinstance(model, Classifier):
        raise CheckpointError(f"{folder}: not a checkpoint of a GLUE task")
    return model, load_tokenizer("", str(tokenizer_folder(folder))), TASKS[name]
