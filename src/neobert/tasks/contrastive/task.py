"""`task: contrastive`: from an encoder to sentence embeddings, by pairs, labels, scores and plain text."""

from functools import partial
from typing import Any

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
from neobert.errors import ConfigError, Problem, print_notes
from neobert.inference.embed import EmbeddingModel
from neobert.model.hf_encoder import HFEncoderForEmbedding
from neobert.optim.schedule import Schedule
from neobert.ranks import Ranks
from neobert.tasks.contrastive.data import ContrastiveData, build_data, longest_text
from neobert.tasks.contrastive.evaluation import build_evaluation, check_evaluators, find_sets, mean_metrics
from neobert.tasks.contrastive.model import build_model, build_storage
from neobert.tasks.encoder import build_vocabulary, prepare_model
from neobert.training.hooks import check_needs_evaluation
from neobert.training.length import Length, plan_length, step_size
from neobert.training.loop import Interrupt
from neobert.training.optimizer import build_clip, build_run_optimizer
from neobert.training.resume import continue_run
from neobert.training.run import Finished, Job, build_run_schedule, run_job
from neobert.training.run_folder import OpenRun, write_run_files
from neobert.training.runtime import Runtime
from neobert.training.summary import print_summary


def run(loaded: Loaded) -> Finished:
    """Train as configured. Raises UserError (and its kinds) for what a user can repair."""
    return run_job(loaded, lambda *parts: build_job(loaded, *parts))


def build_job(loaded: Loaded, runtime: Runtime, interrupt: Interrupt, opened: OpenRun) -> Job:
    """The parts of a run, put together and, where asked for, brought to where a checkpoint was saved. Raises UserError."""
    trainer = loaded.config.trainer
    print_notes(loaded.warnings if runtime.is_main else [])
    start = find_initial_weights(loaded.config)
    hf_tokenizer, tokenizer_keys = find_tokenizer(loaded.config, start)
    config = settle(loaded.config, start, tokenizer_keys)
    vocab_size, notes = len(hf_tokenizer), []
    if start.folder is None and start.hub is None:
        vocab_size, notes = build_vocabulary(config, hf_tokenizer)
    check_length(config, start, "dataset.max_seq_length", longest_text(config))
    if config.debug:
        print(show_config(config, loaded.origins))
    data = runtime.main_first(lambda: build_data(config, hf_tokenizer, Ranks(runtime.rank, runtime.world_size)))
    sets = find_sets(config, data)
    if sets:
        check_evaluators()
    else:
        check_needs_evaluation(trainer)
    model, weights_line = build_model(config, start, vocab_size, hf_tokenizer.pad_token_id)
    model.to(runtime.device)
    kernels = describe_kernels(config, model, runtime)
    wrapped = runtime.distribute(model, [] if isinstance(model, HFEncoderForEmbedding) else model.model.layers)
    optimizer = build_run_optimizer(config, model, runtime.dtype)
    clip, clip_line = build_clip(config, model)
    wrapped, optimizer = runtime.wrap_deepspeed(wrapped, optimizer)
    storage = build_storage(config, model, hf_tokenizer)
    folder = opened.folder
    state = continue_run(opened, runtime, storage, optimizer, data.train, wrapped)
    size, accumulation = step_size(config, runtime.world_size), trainer.gradient_accumulation_steps
    steps_left = partial(data.train.steps_left, trainer.num_train_epochs, accumulation)
    length = plan_length(config, size, state, opened.saved, steps_left)
    schedule, warnings = build_run_schedule(config, length.schedule_steps)
    facts = describe(config, model, data, runtime, weights_line, length, schedule) | kernels | clip_line
    facts["evaluated on"] = [f"{name}: {len(rows):,} {rows.roles.kind}" for name, rows in sets.items()] or "nothing"
    runtime.on_main(lambda: write_run_files(folder, dump_config(config), facts))
    print_summary(facts, [*notes, *opened.told, *warnings, *data.notes, *advice(config, data)], folder)
    return Job(
        config, runtime, model, optimizer, schedule, data.train,
        fetch=partial(data.train.next_step, accumulation),
        size=size,
        length=length,
        measure=build_evaluation(config, wrapped, hf_tokenizer, sets, runtime, interrupt),
        storage=storage, opened=opened, state=state, wrapped=wrapped,
        interrupt=interrupt, clip=clip,
        end_notes=data.train.describe_used,
        log_metrics=lambda: mean_metrics(runtime, model.contrastive.observe()),
        next_command='neobert similarity {checkpoint} "one text" "another text"',
    )  # fmt: skip


def settle(config: Config, start: InitialWeights, tokenizer_keys: dict[str, Any]) -> Config:
    """The configuration with what follows from the weights filled in, as it is saved: it loads to the same run."""
    found = architecture_keys(config, start)
    dataset, longest = config.dataset, found.get("max_position_embeddings", config.model.max_position_embeddings)
    if not config.is_set("dataset.max_seq_length") and start.hub is None:
        dataset = dataset.model_copy(update={"max_seq_length": min(dataset.max_seq_length, longest)})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=found),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer_keys),
            "dataset": dataset,
        }
    )


def describe_kernels(config: Config, model: EmbeddingModel, runtime: Runtime) -> dict[str, str]:
    """Choose what runs and say it. Raises ConfigError for what is not done with an encoder of transformers."""
    if not isinstance(model, HFEncoderForEmbedding):
        return prepare_model(config, model, runtime)
    if config.trainer.torch_compile:
        raise ConfigError(Problem("trainer.torch_compile", "is for our own encoder; leave it out with model.from_hub"))
    return {"attention": f"transformers' {model.config._attn_implementation}", "kernels": "transformers'"}


def describe(
    config: Config,
    model: EmbeddingModel,
    data: ContrastiveData,
    runtime: Runtime,
    weights: str,
    length: Length,
    schedule: Schedule,
) -> dict[str, Any]:
    """The lines of the summary."""
    trainer, asked = config.trainer, config.contrastive
    rows, windows = trainer.per_device_train_batch_size * runtime.world_size, trainer.gradient_accumulation_steps
    alone = f"; {windows} such batches a step, whose texts do not meet: more accumulation gives no more negatives"
    hard = f", hard negatives + {asked.hard_negative_weight:g}" if asked.hard_negative_weight else ""
    names = {"simcse": "InfoNCE over the texts of the batch", "supcon": "SupCon: texts of one label attract each other"}
    layout = "packed one behind the other" if config.datacollator.pack_sequences else "padded"
    num_parameters = sum(p.numel() for p in model.parameters())
    return {
        "task": f"contrastive, {names[asked.loss_type]}; temperature {asked.temperature:g}, {asked.pooling} pooling{hard}",
        "weights": weights,
        "parameters": f"{num_parameters:,}",
        "data": data.describe,
        "step": f"{rows} rows of one source, every text against those of all {rows}"
        + (alone if windows > 1 else "")
        + f"; texts of at most {longest_text(config)} tokens, {layout}",
        "run": f"{length.num_steps:,} steps; {data.train.batches_per_epoch:,} batches an epoch",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {schedule.name}, warmup {schedule.warmup_steps:,}",
        "device": runtime.describe,
        "processes": runtime.describe_engine,
    }


def advice(config: Config, data: ContrastiveData) -> list[str]:
    """What is likely not meant."""
    if data.has_text and not config.model.dropout_prob and not config.model.from_hub:
        return [
            "plain text makes pairs by dropout, and model.dropout_prob is 0: both passes are the same; 0.1 is usual"
        ]
    return []
