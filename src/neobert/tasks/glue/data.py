"""The data of a GLUE run, as the configuration says, and its evaluation: predictions on splits, their loss, metrics, score."""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.labelled import REPOSITORY, EpochLoader, GlueTask, Rows, Source, in_order, read_split, tokenize_rows
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import ConfigError, Problem
from neobert.ranks import Ranks
from neobert.tasks.encoder import row_layout
from neobert.training.loop import Interrupt
from neobert.training.run import Context, Evaluation
from neobert.training.runtime import Runtime

MOST_THREADS = 64
SUFFIXES = ("", "_mm")  # after the names of metrics, by evaluation split: MNLI's are matched and mismatched
METRICS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: (module, function, arguments)
    "accuracy": ("sklearn.metrics", "accuracy_score", {}),
    "f1": ("sklearn.metrics", "f1_score", {"zero_division": 0.0}),
    "matthews": ("sklearn.metrics", "matthews_corrcoef", {}),
    "pearson": ("scipy.stats", "pearsonr", {}),
    "spearman": ("scipy.stats", "spearmanr", {}),
}


@dataclass(frozen=True)
class GlueData:
    """The training batches, the splits that are evaluated, and how long the run is."""

    train: EpochLoader
    evaluation: tuple[Rows, ...]
    num_steps: int
    messages: list[str]


def build_data(config: Config, task: GlueTask, hf_tokenizer: Any, ranks: Ranks) -> GlueData:
    """Read and tokenise the splits. Raises DataError."""
    glue, trainer = config.glue, config.trainer
    tokenizer = Shared(text_tokenizer(hf_tokenizer).fingerprint, hf_tokenizer)
    train, *evaluation = (encode_split(config, task, split, tokenizer) for split in ("train", *task.evaluation))
    loader = EpochLoader(
        train, row_layout(config, hf_tokenizer.pad_token_id, glue.max_seq_length), ranks,
        trainer.per_device_train_batch_size, config.seed, glue.group_by_length, min(glue.num_workers, MOST_THREADS),
        {"task": task.name, "tokenizer": tokenizer.fingerprint, "max_seq_length": glue.max_seq_length,
         "accumulation": trainer.gradient_accumulation_steps},
    )  # fmt: skip
    steps_per_epoch = -(-loader.batches_per_epoch // trainer.gradient_accumulation_steps)
    num_steps, messages = steps_per_epoch * trainer.num_train_epochs, []
    if 0 <= trainer.max_steps < num_steps:
        num_steps = trainer.max_steps
    elif trainer.max_steps >= 0 and trainer.max_steps != type(trainer).model_fields["max_steps"].default:
        epochs = f"{trainer.num_train_epochs} epochs are {num_steps:,} steps"
        messages = [f"trainer.max_steps {trainer.max_steps:,} is not reached: {epochs}; raise num_train_epochs"]
    return GlueData(loader, tuple(evaluation), num_steps, messages)


def glue_source(config: Config) -> Source:
    """Where the configuration has the tasks."""
    dataset = config.dataset
    name = REPOSITORY if dataset.name == type(dataset).model_fields["name"].default else dataset.name
    return Source(dataset.path, name, dataset.cache_dir, dataset.force_redownload)


@dataclass(frozen=True)
class Shared:
    """A tokenizer that counts as equal to another one with the same fingerprint: what was tokenised can be used again."""

    fingerprint: str
    hf_tokenizer: Any = field(compare=False)


def encode_split(config: Config, task: GlueTask, split: str, tokenizer: Shared, with_labels: bool = True) -> Rows:
    """A split as rows; the seeds of a suite share them. Raises DataError."""
    glue = config.glue
    limits = (glue.max_seq_length, config.tokenizer.truncation, glue.preprocessing_num_proc)
    return _encode_split(glue_source(config), task, split, with_labels, tokenizer, limits)


@lru_cache(maxsize=4)
def _encode_split(
    source: Source, task: GlueTask, split: str, with_labels: bool, tokenizer: Shared, limits: tuple[int, bool, int]
) -> Rows:
    found = read_split(source, task, split, with_labels)
    return tokenize_rows(tokenizer.hf_tokenizer, found, *limits, f"{source}, {task.name}, {split}")


# --- metrics -----------


def metric_names(task: GlueTask) -> list[str]:
    """The metrics of a task on one split: those of its score, and the accuracy of every classification."""
    return list(dict.fromkeys([*task.metrics, *(["accuracy"] if task.labels else [])]))


def predictions(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class ids of n x num_labels logits, or the values of a regression."""
    return logits.argmax(-1) if task.labels else logits[:, 0]


def measure(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of the task on one split. A correlation is 0 where it is not defined: a model that says the same of every
    example has learnt nothing.
    """
    predicted, values = predictions(task, logits), dict[str, float]()
    for name in metric_names(task):
        module, function, arguments = METRICS[name]
        is_correlation = module == "scipy.stats"
        if is_correlation and (len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0):
            values[name] = 0.0
        else:
            found = getattr(import_module(module), function)(labels, predicted, **arguments)
            values[name] = float(found[0] if is_correlation else found)
    return values


def score(task: GlueTask, values: dict[str, float]) -> float:
    """GLUE's score of a task: the mean of its metrics over its evaluation splits."""
    suffixes = SUFFIXES[: len(task.evaluation)]
    return float(np.mean([values[f"{metric}{suffix}"] for suffix in suffixes for metric in task.metrics]))


def check_best_metric(config: Config, task: GlueTask) -> None:
    """Raises ConfigError where `metric_for_best_model` is none of the task's."""
    name = (config.trainer.metric_for_best_model or "score").removeprefix("eval_")
    suffixes, metrics = SUFFIXES[: len(task.evaluation)], metric_names(task)
    known = ["loss", "score", *(f"{metric}{suffix}" for suffix in suffixes for metric in metrics)]
    if name not in known:
        problem = f"{task.name} has no metric {name!r}; there are: {', '.join(known)}"
        raise ConfigError(Problem("trainer.metric_for_best_model", problem))


# --- evaluation -----------


@torch.no_grad()
def predict_logits(
    model: nn.Module, num_labels: int, rows: Rows, layout: RowLayout, batch_size: int, runtime: Runtime,
    interrupt: Interrupt | None = None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """(logits of every row in its order, sum of the losses; 0 without labels), in all processes, which share the work.
    `model` as it is called; it is left in evaluation mode. Broken off, with zeros for the rest, when `interrupt` is wanted in
    one of them.
    """
    model.eval()
    logits, loss = torch.zeros((len(rows), num_labels)), 0.0
    for indices, batch in in_order(rows, layout, runtime, batch_size):
        if interrupt is not None and runtime.all_max(interrupt.wanted)[0]:
            break
        with runtime.autocast():
            output = model(**batch.to(runtime.device).inputs())
        if len(indices):
            logits[torch.from_numpy(indices)] = output.logits.float().cpu()
            loss += 0.0 if output.loss_sum is None else float(output.loss_sum)
    return runtime.sum_tensor(logits).numpy(), runtime.all_sum(loss)[0]


def predict_split(
    config: Config, task: GlueTask, split: str, model: nn.Module, hf_tokenizer: Any, runtime: Runtime
) -> np.ndarray:
    """Predictions for every row of a split, whose labels are not read. Raises DataError."""
    tokenizer = Shared(text_tokenizer(hf_tokenizer).fingerprint, hf_tokenizer)
    rows = encode_split(config, task, split, tokenizer, with_labels=False)
    layout = row_layout(config, hf_tokenizer.pad_token_id, config.glue.max_seq_length)
    size = config.trainer.per_device_eval_batch_size
    return predictions(task, predict_logits(model, task.num_labels, rows, layout, size, runtime)[0])


def build_evaluation(context: Context, task: GlueTask, data: GlueData, model: nn.Module) -> Evaluation:
    """Loss, metrics and score on the evaluation splits. `model` as it is called."""
    trainer, runtime, interrupt = context.config.trainer, context.runtime, context.interrupt
    size, most = trainer.per_device_eval_batch_size, trainer.eval_max_batches
    splits = [rows.first(None if most is None else most * size) for rows in data.evaluation]

    def run() -> dict[str, float] | None:
        values, losses = dict[str, float](), 0.0
        for rows, suffix in zip(splits, SUFFIXES, strict=False):
            logits, loss = predict_logits(model, task.num_labels, rows, data.train.layout, size, runtime, interrupt)
            assert rows.labels is not None
            values |= {f"{name}{suffix}": value for name, value in measure(task, logits, rows.labels).items()}
            losses += loss
        model.train()
        if runtime.all_max(interrupt.wanted)[0]:
            return None
        return {"loss": losses / sum(map(len, splits)), "score": score(task, values), **values}

    return Evaluation(run, list_values, "score")


def list_values(values: dict[str, float]) -> str:
    """The values in a line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
