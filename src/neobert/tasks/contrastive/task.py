"""`task: contrastive`: from an encoder to sentence embeddings, by pairs, labels, scores and plain text."""

from functools import partial
from typing import Any

import torch

from neobert.checkpoints.initial_weights import InitialWeights, architecture_keys, check_length, start_fine_tuning
from neobert.checkpoints.load import EMBEDDING
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.inference.embed import EmbeddingModel
from neobert.inference.sentence_transformers import Embedding, write_sentence_transformers
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding
from neobert.tasks import encoder
from neobert.tasks.contrastive.data import ContrastiveData, build_data, build_evaluation, longest_text
from neobert.training.run import Context, Finished, Parts, Storage, run_task


def run(loaded: Loaded) -> Finished:
    """Train as configured. Raises UserError (and its kinds) for what a user can repair."""
    return run_task(loaded, build)


def build(context: Context) -> Parts:
    """The parts of a contrastive run. Raises UserError."""
    runtime, start = context.runtime, start_fine_tuning(context.config, fill_in)
    config, hf_tokenizer, trainer = start.config, start.hf_tokenizer, start.config.trainer
    context.print_configuration(config)
    check_length(config, start.weights, "dataset.max_seq_length", longest_text(config))
    data = runtime.main_first(lambda: build_data(config, hf_tokenizer, runtime))
    context.check_evaluation(bool(data.sets))
    model, weights = build_model(config, start.weights, len(hf_tokenizer), hf_tokenizer.pad_token_id)
    kernels = encoder.prepare_model(config, model, runtime)

    def log_metrics() -> dict[str, torch.Tensor]:
        """Alignment and uniformity, the mean over all processes; NaN where none has seen a batch."""
        aligned, uniform, count = runtime.sum_on_device(model.contrastive.observe().to(runtime.device))
        return {"alignment": aligned / count, "uniformity": uniform / count}

    evaluated = [f"{name}: {len(rows):,} {rows.roles.kind}" for name, rows in data.sets.items()]
    return Parts(
        config, model, data.train, build_storage(config, model, hf_tokenizer),
        count_left=partial(data.train.steps_left, trainer.num_train_epochs, trainer.gradient_accumulation_steps),
        blocks=encoder.blocks_of(model),
        evaluation=partial(build_evaluation, config, hf_tokenizer, data.sets, context) if data.sets else None,
        after_update=model.normalize_matrices, log_metrics=log_metrics, end_messages=data.train.describe_used,
        facts=describe(config, model, data, runtime.world_size, weights),
        describe_length=lambda steps: f"{steps:,} steps; {data.train.batches_per_epoch:,} batches an epoch",
        more_facts=kernels | {"evaluated on": evaluated or "nothing"},
        messages=[*start.messages, *data.messages],
        next_command='neobert similarity {checkpoint} "one text" "another text"',
    )  # fmt: skip


def fill_in(config: Config, weights: InitialWeights) -> Config:
    """The configuration with what follows from the weights, as it is saved: it loads to the same run."""
    found, shortest = architecture_keys(config, weights), dict[str, int]()
    if not config.is_set("dataset.max_seq_length") and weights.hub is None:
        longest = found.get("max_position_embeddings", config.model.max_position_embeddings)
        shortest = {"max_seq_length": min(config.dataset.max_seq_length, longest)}
    return config.with_keys(model=found, dataset=shortest)


def describe(
    config: Config, model: EmbeddingModel, data: ContrastiveData, world_size: int, weights: str
) -> dict[str, Any]:
    """The lines of the summary about task, data and step."""
    trainer, asked = config.trainer, config.contrastive
    rows, windows = trainer.per_device_train_batch_size * world_size, trainer.gradient_accumulation_steps
    alone = f"; {windows} such batches a step, whose texts do not meet: more accumulation gives no more negatives"
    hard = f", hard negatives + {asked.hard_negative_weight:g}" if asked.hard_negative_weight else ""
    names = {"simcse": "InfoNCE over the texts of the batch", "supcon": "SupCon: texts of one label attract each other"}
    layout = "packed one after the other" if config.datacollator.pack_sequences else "padded"
    num_parameters = sum(p.numel() for p in model.parameters())
    return {
        "task": f"contrastive, {names[asked.loss_type]}; temperature {asked.temperature:g}, {asked.pooling} pooling{hard}",
        "weights": weights,
        "parameters": f"{num_parameters:,}",
        "data": data.describe,
        "step": f"{rows} rows of one source, every text against those of all {rows}{alone if windows > 1 else ''}"
        f"; texts of at most {longest_text(config)} tokens, {layout}",
    }


# --- the model -----------


def build_model(config: Config, weights: InitialWeights, vocab_size: int, pad_id: int) -> tuple[EmbeddingModel, str]:
    """(the model with its first weights, what was loaded in one line). Raises CheckpointError and ConfigError."""
    torch.manual_seed(config.seed)
    asked = config.contrastive
    settings = ContrastiveSettings(asked.loss_type, asked.temperature, asked.hard_negative_weight, asked.pooling)
    if (hub := weights.hub) is not None:
        bare = encoder.load_hf_encoder(config, hub, vocab_size, "dataset.max_seq_length", longest_text(config))
        return HFEncoderForEmbedding(bare, settings, pad_id), f"{hub}, all of the encoder"
    model = NeoBERTForEmbedding(encoder.model_config(config, vocab_size, pad_id, **weights.inherited), settings)
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model, encoder.load_own_encoder(weights, model, vocab_size)


def build_storage(config: Config, model: EmbeddingModel, hf_tokenizer: Any) -> Storage:
    """How the encoder is written to checkpoints and read back; transformers' `AutoModel` reads them too."""
    pooling, width = config.contrastive.pooling, model.config.hidden_size
    section = {EMBEDDING: {"pooling": pooling, "max_length": longest_text(config)}}
    save_more = partial(
        write_sentence_transformers, width=width, embedding=Embedding(pooling, max_length=longest_text(config))
    )
    return encoder.build_storage(model, config.model.name, hf_tokenizer, section, save_more=save_more)
