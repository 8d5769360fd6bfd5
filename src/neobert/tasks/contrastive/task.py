"""`task: contrastive`: from an encoder to sentence embeddings, by pairs, labels, scores and plain text."""

from functools import partial
from typing import Any

from neobert.checkpoints.initial_weights import InitialWeights, architecture_keys, check_length
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.inference.embed import EmbeddingModel
from neobert.tasks.contrastive.data import ContrastiveData, build_data, longest_text
from neobert.tasks.contrastive.evaluation import build_evaluation, find_sets, mean_metrics
from neobert.tasks.contrastive.model import build_model, build_storage
from neobert.tasks.encoder import begin_fine_tuning, blocks_of, prepare_model, with_keys
from neobert.training.run import Context, Finished, Parts, run_task


def run(loaded: Loaded) -> Finished:
    """Train as configured. Raises UserError (and its kinds) for what a user can repair."""
    return run_task(loaded, build)


def build(context: Context) -> Parts:
    """The parts of a contrastive run. Raises UserError."""
    runtime = context.runtime
    begun = begin_fine_tuning(context.config, fill_in)
    config, hf_tokenizer, trainer = begun.config, begun.hf_tokenizer, begun.config.trainer
    check_length(config, begun.start, "dataset.max_seq_length", longest_text(config))
    data = runtime.main_first(lambda: build_data(config, hf_tokenizer, runtime))
    sets = find_sets(config, data)
    model, weights = build_model(config, begun.start, begun.vocab_size, hf_tokenizer.pad_token_id)
    model.to(runtime.device)
    kernels = prepare_model(config, model, runtime)
    evaluated = [f"{name}: {len(rows):,} {rows.roles.kind}" for name, rows in sets.items()]
    return Parts(
        config,
        model,
        data.train,
        build_storage(config, model, hf_tokenizer),
        count_left=partial(data.train.steps_left, trainer.num_train_epochs, trainer.gradient_accumulation_steps),
        blocks=blocks_of(model),
        evaluation=partial(build_evaluation, config, hf_tokenizer, sets, context) if sets else None,
        after_update=model.normalize_matrices,
        facts=describe(config, model, data, runtime.world_size, weights),
        describe_length=lambda steps: f"{steps:,} steps; {data.train.batches_per_epoch:,} batches an epoch",
        more_facts=kernels | {"evaluated on": evaluated or "nothing"},
        messages=[*begun.messages, *data.messages, *advice(config, data)],
        log_metrics=lambda: mean_metrics(runtime, model.contrastive.observe()),
        end_messages=data.train.describe_used,
        next_command='neobert similarity {checkpoint} "one text" "another text"',
    )


def fill_in(config: Config, start: InitialWeights) -> Config:
    """The configuration with what follows from the weights, as it is saved: it loads to the same run."""
    found, shortest = architecture_keys(config, start), dict[str, int]()
    if not config.is_set("dataset.max_seq_length") and start.hub is None:
        longest = found.get("max_position_embeddings", config.model.max_position_embeddings)
        shortest = {"max_seq_length": min(config.dataset.max_seq_length, longest)}
    return with_keys(config, model=found, dataset=shortest)


def describe(
    config: Config, model: EmbeddingModel, data: ContrastiveData, world_size: int, weights: str
) -> dict[str, Any]:
    """The lines of the summary about task, data and step."""
    trainer, asked = config.trainer, config.contrastive
    rows, windows = trainer.per_device_train_batch_size * world_size, trainer.gradient_accumulation_steps
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
    }


def advice(config: Config, data: ContrastiveData) -> list[str]:
    """What is likely not meant."""
    if data.has_text and not config.model.dropout_prob and not config.model.from_hub:
        return [
            "plain text makes pairs by dropout, and model.dropout_prob is 0: both passes are the same; 0.1 is usual"
        ]
    return []
