"""GLUE's metrics, from scikit-learn and scipy, and the score they make up."""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np

from neobert.data.labelled.tasks import GlueTask
from neobert.errors import UserError

Metric = Callable[[np.ndarray, np.ndarray], float]


def check_metrics() -> None:
    """Raises UserError where the packages are missing, before anything is trained."""
    for module in ("sklearn", "scipy"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"GLUE's metrics need {module}: pip install 'neobert[glue]'")


def predictions(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class ids of n x num_labels logits, or the values of a regression."""
    return logits.argmax(-1) if task.labels else logits[:, 0]


def measure(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of the task on one split; a classification also gets its accuracy."""
    predicted = predictions(task, logits)
    names = dict.fromkeys([*task.metrics, *(["accuracy"] if task.labels else [])])
    return {name: float(METRICS[name](labels, predicted)) for name in names}


def score(task: GlueTask, values: dict[str, float]) -> float:
    """GLUE's score of a task: the mean of its metrics (MNLI: of matched and mismatched accuracy)."""
    names = [f"{metric}{suffix}" for suffix in suffixes(task) for metric in task.metrics]
    return float(np.mean([values[name] for name in names]))


def suffixes(task: GlueTask) -> list[str]:
    """Behind the names of the metrics of every evaluation split."""
    return ["", "_mm"][: len(task.evaluation)]


def _accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    return _sklearn().accuracy_score(labels, predicted)


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return _sklearn().f1_score(labels, predicted, zero_division=0.0)


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    return _sklearn().matthews_corrcoef(labels, predicted)


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predicted)


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predicted)


def _correlation(function: Callable[..., tuple[float, float]], labels: np.ndarray, predicted: np.ndarray) -> float:
    """0 where it is not defined: a model that says the same of every row has learnt nothing."""
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return function(labels, predicted)[0]


def _sklearn() -> ModuleType:
    from sklearn import metrics

    return metrics


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman,
}  # fmt: skip
