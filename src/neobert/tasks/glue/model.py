"""The classifier of a GLUE run: built, given its first weights, and stored in checkpoints."""

from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.format import load_weights, verify_checkpoint
from neobert.checkpoints.initial_weights import InitialWeights, glue_task
from neobert.checkpoints.layouts import is_eurobert
from neobert.checkpoints.load import HF_ENCODER, load_model
from neobert.config.schema import Config
from neobert.data.labelled import TASKS, GlueTask
from neobert.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError
from neobert.model.hf_encoder import HFEncoderForSequenceClassification
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.tasks.encoder import checkpoint_config, model_config
from neobert.tasks.weights import hf_encoder_storage, load_hf_encoder, load_own_encoder, load_parts, own_storage
from neobert.training.run import Storage

Classifier = NeoBERTForSequenceClassification | HFEncoderForSequenceClassification
POOLING = {"cls": "bos", "mean": "mean"}  # ours -> transformers' names


def build_classifier(
    config: Config, task: GlueTask, start: InitialWeights, vocab_size: int, pad_id: int
) -> tuple[Classifier, str]:
    """(the model with its first weights, what was loaded in one line). `seed` draws the rest. Raises CheckpointError."""
    torch.manual_seed(config.seed)
    if start.hub is not None:
        return _classifier_on(config, task, start, start.hub, vocab_size)
    architecture = model_config(
        config, vocab_size, pad_id,
        num_labels=task.num_labels,
        classifier_dropout=config.glue.classifier_dropout,
        classifier_init_range=config.glue.classifier_init_range,
        classifier_pooling=POOLING[config.glue.pooling],
        **start.inherited,
    )  # fmt: skip
    model = NeoBERTForSequenceClassification(architecture)
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model, load_own_encoder(start, model, vocab_size)


def _classifier_on(
    config: Config, task: GlueTask, start: InitialWeights, name: str, vocab_size: int
) -> tuple[HFEncoderForSequenceClassification, str]:
    """As `build_classifier`, on an encoder of transformers."""
    glue = config.glue
    encoder = load_hf_encoder(config, name, vocab_size, "glue.max_seq_length", glue.max_seq_length)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # of BERT's next-sentence task; our head has a layer of its own
    model = HFEncoderForSequenceClassification(
        encoder, task.num_labels, POOLING[glue.pooling], glue.classifier_dropout, glue.classifier_init_range
    )
    if start.folder is None:
        return model, f"{name}, all of the encoder; new: dense, classifier"
    return model, load_parts(start.folder, model, model.from_checkpoint(load_weights(start.folder)), with_dense=True)


# --- checkpoints -----------


def build_storage(config: Config, model: Classifier, task: GlueTask, hf_tokenizer: Any) -> Storage:
    """How the classifier is written to checkpoints and read back; transformers reads them too (EuroBERT's classifier)."""
    if isinstance(model, NeoBERTForSequenceClassification):
        return own_storage(
            model,
            classifier_config(config, model, task, hf_tokenizer),
            lambda folder: save_tokenizer(hf_tokenizer, folder, has_token_types=False),
        )
    head = {
        "glue_task": task.name, "pooling": config.glue.pooling, "classifier_dropout": config.glue.classifier_dropout,
        "num_labels": task.num_labels,
    }  # fmt: skip
    return hf_encoder_storage(
        model,
        {**label_names(task), HF_ENCODER: head},
        lambda folder: save_tokenizer(hf_tokenizer, folder),
        model.to_checkpoint,
        model.from_checkpoint,
    )


def classifier_config(
    config: Config, model: NeoBERTForSequenceClassification, task: GlueTask, hf_tokenizer: Any
) -> dict[str, Any]:
    """config.json of a classifier."""
    fields = checkpoint_config(model.config, hf_tokenizer, config.model.name)
    own = fields["neobert"] | {"num_labels": task.num_labels, "glue_task": task.name}
    kind = "EuroBert" if is_eurobert(model.config) else "NeoBERT"
    return {
        **fields, **label_names(task), "neobert": own,
        "architectures": [f"{kind}ForSequenceClassification"],
        "classifier_pooling": model.config.classifier_pooling,
    }  # fmt: skip


def label_names(task: GlueTask) -> dict[str, Any]:
    """The fields of transformers' config.json about labels."""
    names = task.labels or ("score",)
    kind = "single_label_classification" if task.labels else "regression"
    by_id = {str(number): name for number, name in enumerate(names)}
    return {"id2label": by_id, "label2id": {name: i for i, name in enumerate(names)}, "problem_type": kind}


def load_finetuned(folder: Path) -> tuple[Classifier, Any, GlueTask]:
    """(model in evaluation mode, tokenizer, task) of a GLUE checkpoint. Raises CheckpointError."""
    verify_checkpoint(folder)
    name, model = glue_task(folder), load_model(folder)
    if name is None or not isinstance(model, Classifier):
        raise CheckpointError(f"{folder}: not a checkpoint of a GLUE task")
    return model, load_tokenizer("", str(tokenizer_folder(folder))), TASKS[name]
