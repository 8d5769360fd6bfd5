"""What a GLUE run is measured by: predictions on the evaluation splits, their loss, metrics and score."""

import numpy as np
import torch
from torch import nn

from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.labelled.loader import Rows, in_order
from neobert.data.labelled.tasks import GlueTask
from neobert.errors import ConfigError, Problem
from neobert.tasks.glue import metrics as glue_metrics
from neobert.tasks.glue.data import GlueData
from neobert.training.loop import Interrupt
from neobert.training.run import Context, Evaluation
from neobert.training.runtime import Runtime


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    num_labels: int,
    rows: Rows,
    layout: RowLayout,
    batch_size: int,
    runtime: Runtime,
    interrupt: Interrupt | None = None,
) -> tuple[np.ndarray, float]:
    """(logits of every row in its order, sum of the losses; 0 without labels), in all processes, which share the work. `model`
    as it is called; it is left in evaluation mode.

    Broken off, with zeros for the rest, when `interrupt` is wanted in one of them.
    """
    model.eval()
    logits, loss = torch.zeros((len(rows), num_labels)), 0.0
    for places, batch in in_order(rows, layout, runtime, batch_size):
        if interrupt is not None and runtime.all_max(interrupt.wanted)[0]:
            break
        with runtime.autocast():
            output = model(**batch.to(runtime.device).inputs())
        if len(places):
            logits[torch.from_numpy(places)] = output.logits.float().cpu()
            loss += 0.0 if output.loss_sum is None else float(output.loss_sum)
    return runtime.sum_tensor(logits).numpy(), runtime.all_sum(loss)[0]


def build_evaluation(context: Context, task: GlueTask, data: GlueData, model: nn.Module) -> Evaluation:
    """Loss, metrics and score on the evaluation splits. `model` as it is called."""
    trainer, runtime, interrupt = context.config.trainer, context.runtime, context.interrupt
    size, most = trainer.per_device_eval_batch_size, trainer.eval_max_batches
    splits = [rows.first(None if most is None else most * size) for rows in data.evaluation]

    def measure() -> dict[str, float] | None:
        values, losses = dict[str, float](), 0.0
        for rows, suffix in zip(splits, glue_metrics.SUFFIXES, strict=False):
            logits, loss = predict_logits(model, task.num_labels, rows, data.layout, size, runtime, interrupt)
            assert rows.labels is not None
            values |= {f"{k}{suffix}": v for k, v in glue_metrics.measure(task, logits, rows.labels).items()}
            losses += loss
        model.train()
        if runtime.all_max(interrupt.wanted)[0]:
            return None
        loss = losses / sum(map(len, splits))
        return {"loss": loss, "score": glue_metrics.score(task, values), **values}

    return Evaluation(measure, list_values, "score")


def list_values(values: dict[str, float]) -> str:
    """The values in a line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def check_best_metric(config: Config, task: GlueTask) -> None:
    """Raises ConfigError where `metric_for_best_model` is none of the task's, UserError where metrics' packages are missing."""
    glue_metrics.check_metrics()
    name = (config.trainer.metric_for_best_model or "score").removeprefix("eval_")
    suffixes, metrics = glue_metrics.SUFFIXES[: len(task.evaluation)], glue_metrics.metric_names(task)
    known = ["loss", "score", *(f"{metric}{suffix}" for suffix in suffixes for metric in metrics)]
    if name not in known:
        problem = f"{task.name} has no metric {name!r}; there are: {', '.join(known)}"
        raise ConfigError(Problem("trainer.metric_for_best_model", problem))
