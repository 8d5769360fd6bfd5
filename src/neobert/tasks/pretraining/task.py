"""`task: pretraining`: masked-LM pretraining, from a configuration to a checkpoint and a report."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from neobert.checkpoints.initial_weights import start_pretraining
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.data.batch import Batch
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import DataError
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.tasks.encoder import blocks_of, build_model, build_storage, prepare_model
from neobert.tasks.pretraining.data import PretrainingData, build_data
from neobert.training.loop import evaluate
from neobert.training.metrics import perplexity
from neobert.training.resume import keep_saved_size
from neobert.training.run import Context, Evaluation, Finished, Parts, run_task


def run(loaded: Loaded, observe: Callable[[Batch, int], None] | None = None) -> Finished:
    """Pretrain as configured; `observe` is shown every training batch. Raises UserError for what a user can repair."""
    return run_task(loaded, partial(build, observe=observe))


def build(context: Context, observe: Callable[[Batch, int], None] | None = None) -> Parts:
    """The parts of a pretraining run. Raises UserError."""
    runtime, opened = context.runtime, context.opened
    start = start_pretraining(context.config, opened.checkpoint)
    hf_tokenizer, tokenizer = start.hf_tokenizer, text_tokenizer(start.hf_tokenizer)
    config, size = keep_saved_size(start.config, opened, runtime.world_size)
    context.print_configuration(config)
    trainer, on_cuda = config.trainer, runtime.device.type == "cuda"
    data = runtime.main_first(lambda: build_data(config, tokenizer, runtime, opened.folder, on_cuda))
    data.train.observe = observe
    context.check_evaluation(data.evaluation is not None)
    model = build_model(config, len(hf_tokenizer), tokenizer.pad_id, start.weights.model)
    kernels = prepare_model(config, model, runtime)
    name = config.model.name if start.weights.model is None else Path(str(config.model.name)).name
    loss = "logits at masked positions only" if trainer.masked_logits_only_loss else "logits at all positions"

    def count_left() -> int:
        print(f"counting the steps of {trainer.num_train_epochs} epochs, by a pass over the data", flush=True)
        return -(-int(runtime.all_max(data.count_left())[0]) // trainer.gradient_accumulation_steps)

    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * runtime.world_size
    uniform = f"{math.log(model.config.vocab_size):.3f}, the loss of a uniform guess"
    epochs = f"{trainer.num_train_epochs} epochs are " if trainer.max_steps < 0 else ""
    return Parts(
        config,
        model,
        data.train,
        build_storage(model, name, hf_tokenizer),
        count_left=count_left,
        size=size, blocks=blocks_of(model),
        evaluation=None if data.evaluation is None else partial(build_evaluation, context, data.evaluation),
        model_inputs={"masked_only": trainer.masked_logits_only_loss, "count_correct": trainer.log_train_accuracy},
        after_update=model.normalize_matrices, empty_batch=data.train.empty_batch,
        ends_with_data=trainer.max_steps < 0, set_num_rows=data.train.set_num_rows,
        facts=describe(config, model, data, rows),
        describe_length=lambda steps: f"{epochs}{steps:,} steps, {steps * rows * data.row_length:,} tokens",
        more_facts=kernels | {"loss": loss, "ln(vocabulary)": uniform},
        messages=start.messages, end_messages=data.train.describe_used,
        next_command='neobert fill-mask {checkpoint} "The capital of France is [MASK]."',
    )  # fmt: skip


def describe(config: Config, model: NeoBERTForMaskedLM, data: PretrainingData, rows: int) -> dict[str, Any]:
    """The lines of the summary about model, data and step; `rows` are those of a step."""
    m, micro, masks = model.config, config.trainer.gradient_accumulation_steps, config.datacollator
    num_parameters = sum(p.numel() for p in model.parameters())
    in_vocabulary = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    norm = "nGPT" if m.ngpt else "RMSNorm" if m.rms_norm else "LayerNorm"
    kinds = f"{'RoPE' if m.rope else 'learned positions'}, {norm}, {m.hidden_act}"
    shape = f"{m.num_hidden_layers} layers x {m.hidden_size} wide x {m.num_attention_heads} heads"
    last, parts = masks.mlm_probability_final, f" in {micro} microbatches" if micro > 1 else ""
    rates = f"{masks.mlm_probability:.0%}" + ("" if last is None else f", linearly to {last:.0%} at the end,")
    return {
        "model": f"{shape}, {kinds}",
        "parameters": f"{num_parameters:,} ({num_parameters - in_vocabulary:,} without embeddings and decoder)",
        "vocabulary": f"{m.vocab_size:,} tokens, {config.tokenizer.path or config.tokenizer.name}",
        "data": data.describe,
        "masking": f"{rates} of the tokens, {'all [MASK]' if masks.mask_all else '80/10/10'}",
        "step": f"{rows} rows x {data.row_length} = {rows * data.row_length:,} tokens{parts}",
    }


def build_evaluation(context: Context, batches: Callable[[], Iterator[Batch]], model: nn.Module) -> Evaluation:
    """Loss, perplexity and accuracy on the evaluation data."""

    def measure() -> dict[str, float] | None:
        values = evaluate(model, batches(), context.runtime, context.config.trainer.eval_max_batches, context.interrupt)
        if values is None:
            return None
        if not values:
            raise DataError("dataset.eval_split: the evaluation data has no text")
        return {**values, "perplexity": perplexity(values["loss"])}

    def headline(values: dict[str, float]) -> str:
        return f"loss {values['loss']:.4f}  perplexity {values['perplexity']:,.1f}  accuracy {values['accuracy']:.1%}"

    return Evaluation(measure, headline, "loss")
