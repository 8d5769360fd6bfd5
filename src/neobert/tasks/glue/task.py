"""`task: glue`: fine-tuning on one GLUE task, from a configuration to a score with its protocol in result.json."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from neobert.checkpoints.initial_weights import InitialWeights, architecture_keys, check_length, start_fine_tuning
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.data.labelled import REPOSITORY, TASKS, GlueTask
from neobert.errors import ConfigError, Problem
from neobert.files import write_json
from neobert.tasks.encoder import blocks_of, hf_encoder_dropout, prepare_model
from neobert.tasks.glue.data import GlueData, build_data, build_evaluation, check_best_metric, list_values
from neobert.tasks.glue.model import build_classifier, build_storage
from neobert.training.choices import PRECISION_NAMES
from neobert.training.resume import step_size
from neobert.training.run import Context, Finished, Parts, run_task
from neobert.training.run_folder import RESULT
from neobert.training.runtime import Runtime


def run(loaded: Loaded) -> Finished:
    """Fine-tune as configured and write result.json. Raises UserError (and its kinds) for what a user can repair."""
    return run_task(loaded, build)


def build(context: Context) -> Parts:
    """The parts of a GLUE run. Raises UserError."""
    task, runtime = TASKS[context.config.glue.task_name], context.runtime
    if not task.trains:
        problem = f"{task.name} is predicted by a model of mnli, not trained on: neobert glue CONFIG --predict, of an mnli run"
        raise ConfigError(Problem("glue.task_name", problem))
    check_best_metric(context.config, task)
    start = start_fine_tuning(context.config, lambda config, weights: fill_in(config, task, weights))
    config, hf_tokenizer = start.config, start.hf_tokenizer
    context.print_configuration(config)
    check_length(config, start.weights, "glue.max_seq_length", config.glue.max_seq_length)
    data = runtime.main_first(lambda: build_data(config, task, hf_tokenizer, runtime))
    model, weights = build_classifier(config, task, start.weights, len(hf_tokenizer), hf_tokenizer.pad_token_id)
    kernels = prepare_model(config, model, runtime)
    known = {
        "weights": weights,
        "transferred_from": start.weights.task,
        "pretraining_metadata": (start.weights.state or {}).get("metadata", {}),
        "protocol": protocol(config, start.weights, runtime),
    }
    return Parts(
        config,
        model,
        data.train,
        build_storage(config, model, task, hf_tokenizer),
        num_steps=data.num_steps,
        blocks=blocks_of(model),
        evaluation=partial(build_evaluation, context, task, data),
        after_update=model.normalize_matrices,
        facts=describe(config, task, data, runtime, weights),
        describe_length=lambda steps: f"{steps:,} steps; {data.train.batches_per_epoch:,} batches an epoch",
        more_facts=kernels | {"result of": known["protocol"]["selection"]},
        messages=[*start.messages, *data.messages],
        on_finish=partial(write_result, config, task, known),
        next_command=f"neobert glue {context.opened.folder / 'config.yaml'} --predict",
    )


# --- what the configuration comes to -----------


def fill_in(config: Config, task: GlueTask, start: InitialWeights) -> Config:
    """The configuration with what follows from task and weights, as it is saved: it loads to the same run."""
    from_model = config.is_set("model.classifier_init_range") and not config.is_set("glue.classifier_init_range")
    init_range = {"classifier_init_range": (config.model if from_model else config.glue).classifier_init_range}
    name = config.dataset.name if config.is_set("dataset.name") else REPOSITORY
    return config.with_keys(
        glue=init_range,
        model=init_range | architecture_keys(config, start),
        dataset={} if config.dataset.path else {"name": name},
    )


def protocol(config: Config, start: InitialWeights, runtime: Runtime) -> dict[str, Any]:
    """What a score depends on, besides task, seed and machine: two runs with equal protocols may be compared."""
    trainer, glue = config.trainer, config.glue
    how = f"every {trainer.eval_steps} steps" if trainer.eval_strategy == "steps" else "every epoch"
    best = f"the step with the best {trainer.metric_for_best_model or 'score'} on the evaluation split"
    return {
        "weights": start.describe,
        "weights_identity": start.identity,
        "data": config.dataset.path or config.dataset.name,
        "max_seq_length": glue.max_seq_length,
        "batch_size": step_size(vars(config.trainer), runtime.world_size).rows_per_step,
        "epochs": trainer.num_train_epochs,
        "max_steps": trainer.max_steps,
        "optimizer": config.optimizer.model_dump(),
        "scheduler": config.scheduler.model_dump(),
        "gradient_clipping": trainer.gradient_clipping,
        "precision": PRECISION_NAMES[runtime.dtype],
        "pooling": glue.pooling,
        "classifier_dropout": glue.classifier_dropout,
        "classifier_init_range": glue.classifier_init_range,
        "dropout": config.model.dropout_prob if start.hub is None else hf_encoder_dropout(start.hub),
        "group_by_length": glue.group_by_length,
        "early_stopping": trainer.early_stopping,
        "selection": f"{best}, of an evaluation {how}" if trainer.load_best_model_at_end else "the last step",
        "eval_max_batches": trainer.eval_max_batches,
    }


def describe(config: Config, task: GlueTask, data: GlueData, runtime: Runtime, weights: str) -> dict[str, Any]:
    """The lines of the summary about task, data and step."""
    glue, rows, num_rows = (
        config.glue,
        data.train.rows,
        step_size(vars(config.trainer), runtime.world_size).rows_per_step,
    )
    ahead = f"ahead by {data.train.num_threads} threads" if data.train.num_threads else "in the training process"
    splits = zip(task.evaluation, data.evaluation, strict=True)
    layout = "padded to that" if config.tokenizer.padding == "max_length" else "padded to the longest"
    layout += ", grouped by length" if glue.group_by_length else ""
    layout = "packed one after the other" if config.datacollator.pack_sequences else layout
    return {
        "task": f"GLUE {task.title}: {', '.join(task.columns)}; "
        f"{f'{task.num_labels} labels' if task.labels else 'regression'}; score: {' and '.join(task.metrics)}",
        "data": [
            f"{len(rows):,} rows, {rows.num_tokens:,} tokens, from {config.dataset.path or config.dataset.name}; "
            f"batches prepared {ahead}",
            f"evaluated on {' and '.join(f'{len(split):,} rows of {name}' for name, split in splits)}",
        ],
        "weights": weights,
        "head": f"{glue.pooling} pooling, hidden layer, classifier; dropout {glue.classifier_dropout:g}",
        "step": f"{num_rows} rows of at most {glue.max_seq_length} tokens, {layout}",
    }


# --- the result -----------


def write_result(config: Config, task: GlueTask, known: dict[str, Any], finished: Finished) -> None:
    """result.json of a run that came to its end, with what was `known` at its start, and a line on the console."""
    path, values = finished.folder / RESULT, finished.values
    result = {
        "task": task.name,
        "seed": config.seed,
        "score": values["score"],
        "metrics": values,
        "step": finished.step,
        "steps_trained": finished.state.step,
        "stopped": finished.state.stop_reason,
        **known,
    }
    write_json(path, result)
    print(f"result      {task.title}: {list_values(values)}\n            {path}")


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run, or None when it has not come to its end."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None
