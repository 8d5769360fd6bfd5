"""`task: glue`: fine-tuning on one GLUE task, from a configuration to a score with its protocol in result.json."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neobert.checkpoints.format import write_json
from neobert.checkpoints.initial_weights import (
    InitialWeights,
    architecture_keys,
    check_length,
    find_initial_weights,
    find_tokenizer,
)
from neobert.config.explain import show_config
from neobert.config.load import Loaded, dump_config
from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.labelled.loader import Rows, in_order
from neobert.data.labelled.tasks import REPOSITORY, TASKS, GlueTask
from neobert.errors import ConfigError, Problem, print_notes
from neobert.model.hf_encoder import HFEncoderForSequenceClassification
from neobert.ranks import Ranks
from neobert.tasks.encoder import build_vocabulary, hf_encoder_dropout, prepare_model
from neobert.tasks.glue import metrics as glue_metrics
from neobert.tasks.glue.data import MOST_THREADS, GlueData, build_data
from neobert.tasks.glue.model import Classifier, build_classifier, build_storage
from neobert.training.choices import precision_name
from neobert.training.hooks import Evaluation
from neobert.training.length import Length, step_size
from neobert.training.loop import Interrupt
from neobert.training.optimizer import build_clip, build_run_optimizer
from neobert.training.resume import continue_run
from neobert.training.run import Finished, Job, build_run_schedule, run_job
from neobert.training.run_folder import OpenRun, write_run_files
from neobert.training.runtime import Runtime
from neobert.training.summary import print_summary

RESULT = "result.json"


def run(loaded: Loaded) -> Finished:
    """Fine-tune as configured and write result.json. Raises UserError (and its kinds) for what a user can repair."""
    return run_job(loaded, lambda *parts: build_job(loaded, *parts))


def build_job(loaded: Loaded, runtime: Runtime, interrupt: Interrupt, opened: OpenRun) -> Job:
    """The parts of a run, put together and, where asked for, brought to where a checkpoint was saved. Raises UserError."""
    task = TASKS[loaded.config.glue.task_name]
    if not task.trains:
        problem = f"{task.name} is predicted by a model of mnli, not trained on: neobert glue CONFIG --predict, of an mnli run"
        raise ConfigError(Problem("glue.task_name", problem))
    glue_metrics.check_metrics()
    trainer = loaded.config.trainer
    print_notes(loaded.warnings if runtime.is_main else [])
    start = find_initial_weights(loaded.config)
    hf_tokenizer, tokenizer_keys = find_tokenizer(loaded.config, start)
    config = settle(loaded.config, task, start, tokenizer_keys)
    vocab_size, notes = len(hf_tokenizer), []
    if start.folder is None and start.hub is None:
        vocab_size, notes = build_vocabulary(config, hf_tokenizer)
    check_length(config, start, "glue.max_seq_length", config.glue.max_seq_length)
    if config.debug:
        print(show_config(config, loaded.origins))
    data = runtime.main_first(lambda: build_data(config, task, hf_tokenizer, Ranks(runtime.rank, runtime.world_size)))
    model, weights_line = build_classifier(config, task, start, vocab_size, hf_tokenizer.pad_token_id)
    model.to(runtime.device)
    kernels = describe_kernels(config, model, runtime)
    is_hf_encoder = isinstance(model, HFEncoderForSequenceClassification)
    wrapped = runtime.distribute(model, [] if is_hf_encoder else model.model.layers)
    optimizer = build_run_optimizer(config, model, runtime.dtype)
    clip, clip_line = build_clip(config, model)
    schedule, warnings = build_run_schedule(config, data.num_steps)
    facts = describe(config, task, data, runtime, weights_line, schedule.warmup_steps) | kernels | clip_line
    wrapped, optimizer = runtime.wrap_deepspeed(wrapped, optimizer)
    storage = build_storage(config, model, task, hf_tokenizer)
    folder = opened.folder
    state = continue_run(opened, runtime, storage, optimizer, data.train, wrapped)
    runtime.on_main(lambda: (folder / RESULT).unlink(missing_ok=True))
    runtime.on_main(lambda: write_run_files(folder, dump_config(config), facts))
    print_summary(facts, [*notes, *opened.told, *warnings, *data.notes], folder)
    measure = build_evaluation(config, task, wrapped, data, runtime, interrupt)

    def on_finish(finished: Finished) -> Finished:
        values = finished.values or measure.run()
        if values is None:
            return replace(finished, exit_code=128 + int(runtime.all_max(interrupt.signal)[0]))
        runtime.on_main(
            lambda: write_result(config, task, start, runtime, finished, measure.headline(values), values, weights_line)
        )
        return finished

    return Job(
        config, runtime, model, optimizer, schedule, data.train,
        fetch=partial(data.train.next_step, trainer.gradient_accumulation_steps),
        size=step_size(config, runtime.world_size), length=Length(data.num_steps), measure=measure,
        storage=storage, opened=opened, state=state,
        wrapped=wrapped, interrupt=interrupt, clip=clip, on_finish=on_finish,
        next_command=f"neobert glue {folder / 'config.yaml'} --predict",
    )  # fmt: skip


# --- what the configuration comes to -----------


def settle(config: Config, task: GlueTask, start: InitialWeights, tokenizer_keys: dict[str, Any]) -> Config:
    """The configuration with what follows from task and weights filled in, as it is saved: it loads to the same run."""
    glue, model = config.glue, config.model
    from_model = config.is_set("model.classifier_init_range") and not config.is_set("glue.classifier_init_range")
    init_range = model.classifier_init_range if from_model else glue.classifier_init_range
    changed = {"classifier_init_range": init_range, **architecture_keys(config, start)}
    name = config.dataset.name if config.is_set("dataset.name") else REPOSITORY
    return config.model_copy(
        update={
            "glue": glue.model_copy(update={"classifier_init_range": init_range}),
            "model": model.model_copy(update=changed),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer_keys),
            "dataset": config.dataset.model_copy(update={} if config.dataset.path else {"name": name}),
        }
    )


def protocol(config: Config, start: InitialWeights, runtime: Runtime) -> dict[str, Any]:
    """What a score depends on, besides task, seed and machine: two runs with equal protocols may be compared."""
    trainer, glue, optimizer, scheduler = config.trainer, config.glue, config.optimizer, config.scheduler
    return {
        "weights": start.describe,
        "weights_identity": start.identity,
        "data": config.dataset.path or config.dataset.name,
        "max_seq_length": glue.max_seq_length,
        "batch_size": trainer.per_device_train_batch_size * runtime.world_size * trainer.gradient_accumulation_steps,
        "epochs": trainer.num_train_epochs,
        "max_steps": trainer.max_steps,
        "optimizer": optimizer.model_dump(),
        "scheduler": scheduler.model_dump(),
        "gradient_clipping": trainer.gradient_clipping,
        "precision": precision_name(runtime.dtype),
        "pooling": glue.pooling,
        "classifier_dropout": glue.classifier_dropout,
        "classifier_init_range": glue.classifier_init_range,
        "dropout": config.model.dropout_prob if start.hub is None else hf_encoder_dropout(start.hub),
        "group_by_length": glue.group_by_length,
        "early_stopping": trainer.early_stopping,
        "selection": _selection(config),
        "eval_max_batches": trainer.eval_max_batches,
    }


def _selection(config: Config) -> str:
    if not config.trainer.load_best_model_at_end:
        return "the last step"
    how = f"every {config.trainer.eval_steps} steps" if config.trainer.eval_strategy == "steps" else "every epoch"
    metric = config.trainer.metric_for_best_model or "score"
    return f"the step with the best {metric} on the evaluation split, of an evaluation {how}"


def describe(
    config: Config, task: GlueTask, data: GlueData, runtime: Runtime, weights: str, warmup_steps: int
) -> dict[str, Any]:
    """The lines of the summary."""
    trainer, rows = config.trainer, data.train.rows
    size = trainer.per_device_train_batch_size * runtime.world_size * trainer.gradient_accumulation_steps
    threads = min(config.glue.num_workers, MOST_THREADS)
    ahead = f"batches prepared ahead by {threads} threads" if threads else "batches prepared in the training process"
    splits = zip(task.evaluation, data.evaluation, strict=True)
    evaluated = " and ".join(f"{len(split):,} rows of {name}" for name, split in splits)
    kinds = f"{task.num_labels} labels" if task.labels else "regression"
    return {
        "task": f"GLUE {task.title}: {', '.join(task.columns)}; {kinds}; score: {' and '.join(task.metrics)}",
        "data": [
            f"{len(rows):,} rows, {rows.num_tokens:,} tokens, from {config.dataset.path or config.dataset.name}; {ahead}",
            f"evaluated on {evaluated}",
        ],
        "weights": weights,
        "head": f"{config.glue.pooling} pooling, hidden layer, classifier; dropout {config.glue.classifier_dropout:g}",
        "step": f"{size} rows of at most {config.glue.max_seq_length} tokens, {_layout(config)}",
        "run": f"{data.num_steps:,} steps; {data.train.batches_per_epoch:,} batches an epoch",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {config.scheduler.name}, warmup {warmup_steps:,}",
        "result of": _selection(config),
        "device": runtime.describe,
        "processes": runtime.describe_engine,
    }  # fmt: skip


def _layout(config: Config) -> str:
    if config.datacollator.pack_sequences:
        return "packed one behind the other"
    grouped = ", grouped by length" if config.glue.group_by_length else ""
    return ("padded to that" if config.tokenizer.padding == "max_length" else "padded to the longest") + grouped


def describe_kernels(config: Config, model: Classifier, runtime: Runtime) -> dict[str, str]:
    """Choose what runs and say it. Raises ConfigError for what is not done with an encoder of transformers."""
    if not isinstance(model, HFEncoderForSequenceClassification):
        return prepare_model(config, model, runtime)
    for dotted, is_asked in (
        ("trainer.torch_compile", config.trainer.torch_compile),
        ("datacollator.pack_sequences", config.datacollator.pack_sequences),
    ):
        if is_asked:
            raise ConfigError(Problem(dotted, "is for our own encoder; leave it out with model.from_hub"))
    return {"attention": f"transformers' {model.config._attn_implementation}", "kernels": "transformers'"}


# --- evaluation -----------


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
    for places, batch in in_order(rows, layout, Ranks(runtime.rank, runtime.world_size), batch_size):
        if interrupt is not None and runtime.all_max(interrupt.wanted)[0]:
            break
        with runtime.autocast():
            output = model(**batch.to(runtime.device).inputs())
        if len(places):
            logits[torch.from_numpy(places)] = output.logits.float().cpu()
            loss += 0.0 if output.loss_sum is None else float(output.loss_sum)
    return runtime.sum_tensor(logits).numpy(), runtime.all_sum(loss)[0]


def build_evaluation(
    config: Config, task: GlueTask, model: nn.Module, data: GlueData, runtime: Runtime, interrupt: Interrupt
) -> Evaluation:
    """Loss, metrics and score on the evaluation splits. `model` as it is called."""
    trainer = config.trainer
    size, most = trainer.per_device_eval_batch_size, trainer.eval_max_batches
    splits = [rows.first(None if most is None else most * size) for rows in data.evaluation]

    def measure() -> dict[str, float] | None:
        values, losses = {}, 0.0
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

    def headline(values: dict[str, float]) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in values.items())

    check_best_metric(config, task)
    return Evaluation(measure, headline, "score")


def check_best_metric(config: Config, task: GlueTask) -> None:
    """Raises ConfigError where `metric_for_best_model` is none of the task's."""
    name = (config.trainer.metric_for_best_model or "score").removeprefix("eval_")
    suffixes, metrics = glue_metrics.SUFFIXES[: len(task.evaluation)], glue_metrics.metric_names(task)
    known = ["loss", "score", *(f"{metric}{suffix}" for suffix in suffixes for metric in metrics)]
    if name not in known:
        problem = f"{task.name} has no metric {name!r}; there are: {', '.join(known)}"
        raise ConfigError(Problem("trainer.metric_for_best_model", problem))


# --- the result -----------


def write_result(
    config: Config,
    task: GlueTask,
    start: InitialWeights,
    runtime: Runtime,
    finished: Finished,
    headline: str,
    values: dict[str, float],
    weights_line: str,
) -> None:
    """result.json of a run that came to its end, and a line on the console."""
    state = finished.state
    result = {
        "task": task.name,
        "seed": config.seed,
        "score": values["score"],
        "metrics": values,
        "step": finished.step,
        "steps_trained": state.step,
        "stopped": state.stop_reason,
        "weights": weights_line,
        "transferred_from": start.task,
        "pretraining_metadata": (start.state or {}).get("metadata", {}),
        "protocol": protocol(config, start, runtime),
    }
    write_json(finished.folder / RESULT, result)
    print(f"result      {task.title}: {headline}\n            {finished.folder / RESULT}")


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run, or None when it has not come to its end."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None
