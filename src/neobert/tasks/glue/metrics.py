"""GLUE's metrics, from scikit-learn and scipy, and the score they make up."""

from importlib import import_module
from typing import Any

import numpy as np

from neobert.data.labelled import GlueTask
from neobert.errors import check_installed

SUFFIXES = ("", "_mm")  # after the names of metrics, by evaluation split: MNLI's are matched and mismatched
METRICS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: (module, function, arguments)
    "accuracy": ("sklearn.metrics", "accuracy_score", {}),
    "f1": ("sklearn.metrics", "f1_score", {"zero_division": 0.0}),
    "matthews": ("sklearn.metrics", "matthews_corrcoef", {}),
    "pearson": ("scipy.stats", "pearsonr", {}),
    "spearman": ("scipy.stats", "spearmanr", {}),
}


def check_metrics() -> None:
    """Raises UserError where the packages are missing, before anything is trained."""
    check_installed("GLUE's metrics need {}", "glue", "sklearn", "scipy")


def metric_names(task: GlueTask) -> list[str]:
    """The metrics of a task on one split: those of its score, and the accuracy of every classification."""
    return list(dict.fromkeys([*task.metrics, *(["accuracy"] if task.labels else [])]))


def predictions(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class ids of n x num_labels logits, or the values of a regression."""
    return logits.argmax(-1) if task.labels else logits[:, 0]


def measure(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of the task on one split."""
    predicted = predictions(task, logits)
    return {name: _compute(name, labels, predicted) for name in metric_names(task)}


def _compute(name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    """A correlation is 0 where it is not defined: a model that says the same of every example has learnt nothing."""
    module, function, arguments = METRICS[name]
    is_correlation = module == "scipy.stats"
    if is_correlation and (len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0):
        return 0.0
    found = getattr(import_module(module), function)(labels, predicted, **arguments)
    return float(found[0] if is_correlation else found)


def score(task: GlueTask, values: dict[str, float]) -> float:
    """GLUE's score of a task: the mean of its metrics over its evaluation splits."""
    suffixes = SUFFIXES[: len(task.evaluation)]
    return float(np.mean([values[f"{metric}{suffix}"] for suffix in suffixes for metric in task.metrics]))
