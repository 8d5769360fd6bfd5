"""The classifier of a GLUE run: built, given its first weights, and stored in checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.format import Tensors, load_weights, verify_checkpoint
from neobert.checkpoints.initial_weights import InitialWeights, check_encoder_length, read_config
from neobert.checkpoints.layouts import is_eurobert, to_eurobert
from neobert.checkpoints.load import HF_ENCODER, check_fit, load_model_config, load_model_weights, read_weights
from neobert.config.schema import Config
from neobert.data.labelled.tasks import TASKS, GlueTask
from neobert.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError
from neobert.model.hf_encoder import HFEncoderForSequenceClassification
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.optim.sharding import load_whole
from neobert.tasks.encoder import checkpoint_config, load_encoder, load_hf_encoder, model_config
from neobert.training.run import Storage
from neobert.training.runtime import whole_weights

Classifier = NeoBERTForSequenceClassification | HFEncoderForSequenceClassification
POOLING = {"cls": "bos", "mean": "mean"}  # ours -> transformers' names
HEAD = ("dense.", "classifier.")


def build_classifier(
    config: Config, task: GlueTask, start: InitialWeights, vocab_size: int, pad_id: int
) -> tuple[Classifier, str]:
    """(the model with its first weights, what was loaded in one line). `seed` draws the rest. Raises CheckpointError."""
    torch.manual_seed(config.seed)
    if start.hub is not None:
        encoder = load_hf_encoder(start.hub)
        check_encoder_length(encoder, start.hub, "glue.max_seq_length", config.glue.max_seq_length)
        model: Classifier = _head_on(encoder, task, config.glue.pooling, config.glue.classifier_dropout, config)
        if vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"tokenizer: {vocab_size} tokens, but {start.hub} has embeddings of {model.config.vocab_size}"
            )
        if start.folder is None:
            return model, f"{start.hub}, all of the encoder; new: dense, classifier"
        return model, load_encoder(start.folder, model, model.from_checkpoint(load_weights(start.folder)), True)
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
    if start.folder is None:
        return model, "random"
    if start.architecture is not None and start.architecture.vocab_size != vocab_size:
        raise CheckpointError(
            f"{start.folder}: embeddings of {start.architecture.vocab_size} tokens, but its tokenizer has {vocab_size}"
        )
    return model, load_encoder(start.folder, model, read_weights(start.folder, architecture), start.task is not None)


def _head_on(
    encoder: Any, task: GlueTask, pooling: str, dropout: float, config: Config
) -> HFEncoderForSequenceClassification:
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # of BERT's next-sentence task; our head has a layer of its own
    if config.trainer.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
    return HFEncoderForSequenceClassification(
        encoder, task.num_labels, POOLING[pooling], dropout, config.glue.classifier_init_range
    )


# --- checkpoints -----------


def build_storage(config: Config, model: Classifier, task: GlueTask, hf_tokenizer: Any) -> Storage:
    """How the classifier is written to checkpoints and read back; transformers reads them too (EuroBERT's classifier)."""
    if isinstance(model, HFEncoderForSequenceClassification):
        return _hf_encoder_storage(config, model, task, hf_tokenizer)

    def content() -> tuple[Tensors, dict[str, Any]]:
        weights = whole_weights(model)
        if not is_eurobert(model.config):
            return weights, classifier_config(config, model, task, hf_tokenizer)
        return to_eurobert(weights), classifier_config(config, model, task, hf_tokenizer)

    return Storage(
        content,
        load=lambda folder: load_model_weights(folder, model),
        save_beside=lambda folder: save_tokenizer(hf_tokenizer, folder, has_token_types=False),
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


def _hf_encoder_storage(
    config: Config, model: HFEncoderForSequenceClassification, task: GlueTask, hf_tokenizer: Any
) -> Storage:
    def content() -> tuple[Tensors, dict[str, Any]]:
        fields = json.loads(model.config.to_json_string(use_diff=False))
        head = {
            "glue_task": task.name, "pooling": config.glue.pooling, "classifier_dropout": config.glue.classifier_dropout,
            "num_labels": task.num_labels,
        }  # fmt: skip
        return model.to_checkpoint(whole_weights(model)), {**fields, **label_names(task), HF_ENCODER: head}

    def load(folder: Path) -> None:
        weights = model.from_checkpoint(load_weights(folder))
        check_fit(folder, weights, model.state_dict())
        load_whole(model, weights)

    return Storage(content, load, lambda folder: save_tokenizer(hf_tokenizer, folder))


def load_finetuned(folder: Path, config: Config) -> tuple[Classifier, Any, GlueTask]:
    """(model in evaluation mode, tokenizer, task) of a GLUE checkpoint. Raises CheckpointError."""
    verify_checkpoint(folder)
    found = read_config(folder)
    head = found.get("neobert", found.get(HF_ENCODER, {}))
    if "glue_task" not in head:
        raise CheckpointError(f"{folder}: not a checkpoint of a GLUE task")
    task = TASKS[head["glue_task"]]
    if HF_ENCODER in found:
        from transformers import AutoConfig, AutoModel

        encoder = AutoModel.from_config(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        model: Classifier = _head_on(encoder, task, head["pooling"], head["classifier_dropout"], config)
    else:
        model = NeoBERTForSequenceClassification(load_model_config(folder))
    tokenizer = load_tokenizer("", str(tokenizer_folder(folder)))
    build_storage(config, model, task, tokenizer).load(folder)
    return model.eval(), tokenizer, task
