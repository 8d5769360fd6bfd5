"""`task: pretraining`: masked-LM pretraining, from a configuration to a checkpoint and a report."""

from collections.abc import Callable
from typing import Any

from torch import nn

from neobert.config.explain import show_config
from neobert.config.load import Loaded, dump_config
from neobert.config.schema import Config
from neobert.data.batch import Batch
from neobert.data.loader import build_steps
from neobert.data.order import Rank
from neobert.data.tokenizer import text_tokenizer
from neobert.errors import DataError, print_notes
from neobert.inference.load import load_model_weights
from neobert.model.layouts import is_eurobert, to_eurobert
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.tasks.encoder import checkpoint_config, prepare_model
from neobert.tasks.hooks import Measure, check_needs_evaluation
from neobert.tasks.job import Finished, Job, Storage, build_run_schedule, run_job
from neobert.tasks.optimizers import build_clip, build_run_optimizer
from neobert.tasks.pretraining_data import PretrainingData, build_data
from neobert.tasks.pretraining_start import begin
from neobert.tasks.resuming import continue_run, open_run, with_saved_lanes
from neobert.tasks.run_folder import write_run_files
from neobert.tasks.summary import describe_run, print_summary
from neobert.training.checkpoint import Tensors
from neobert.training.loop import Interrupt, evaluate
from neobert.training.metrics import perplexity
from neobert.training.runtime import Runtime, whole_weights


def run(loaded: Loaded, observe: Callable[[Batch, int], None] | None = None) -> Finished:
    """Pretrain as configured; `observe` is shown every training batch. Raises UserError for what a user can repair."""
    return run_job(loaded.config, lambda runtime, interrupt: build_job(loaded, runtime, interrupt, observe))


def build_job(
    loaded: Loaded, runtime: Runtime, interrupt: Interrupt, observe: Callable[[Batch, int], None] | None
) -> Job:
    """The parts of a run, put together and, where asked for, brought to where a checkpoint was saved. Raises UserError."""
    config, trainer = loaded.config, loaded.config.trainer
    print_notes(loaded.warnings if runtime.is_main else [])
    if config.debug:
        print(show_config(config, loaded.origins))
    start = begin(config)
    config, hf_tokenizer = start.config, start.hf_tokenizer
    tokenizer = text_tokenizer(hf_tokenizer)
    opened = open_run(config, runtime)
    folder = opened.folder
    if opened.checkpoint is not None:
        config = with_saved_lanes(config, opened.checkpoint, runtime.world_size)
    data = build_run_data(config, tokenizer, runtime, folder)
    data.train.observe = observe
    if data.evaluation is None:
        check_needs_evaluation(trainer)
    model = start.build_model(tokenizer.pad_id).to(runtime.device)
    lines = prepare_model(config, model, runtime)
    wrapped = runtime.distribute(model, model.model.layers)
    optimizer = build_run_optimizer(config, model, runtime.dtype)
    clip, clip_line = build_clip(config, model)
    schedule, warnings = build_run_schedule(config, data.num_steps)
    facts = describe_run(config, model, runtime, data, schedule, lines | clip_line)
    wrapped, optimizer = runtime.hand_over(wrapped, optimizer)
    storage = Storage(
        content=lambda: checkpoint_model(model, hf_tokenizer, start.name),
        load=lambda path: load_model_weights(path, model),
    )
    state = continue_run(opened, runtime, storage, optimizer, data.train, wrapped)
    runtime.on_main(lambda: write_run_files(folder, dump_config(config), facts))
    print_summary(facts, [*start.notes, *opened.told, *warnings], folder)
    return Job(
        config, runtime, hf_tokenizer, model, optimizer, schedule, data.train,
        fetch=build_steps(data.train, trainer.gradient_accumulation_steps),
        num_steps=data.num_steps,
        measure=build_measure(config, wrapped, data, runtime, interrupt),
        storage=storage,
        folder=folder,
        state=state,
        resumed=opened.checkpoint is not None,
        wrapped=wrapped,
        interrupt=interrupt,
        clip=clip,
        model_inputs={"masked_only": trainer.masked_logits_only_loss, "count_correct": trainer.log_train_accuracy},
        end_notes=data.train.describe_used,
        next_command='neobert fill-mask {checkpoint} "The capital of France is [MASK]."',
    )  # fmt: skip


def build_run_data(config: Config, tokenizer: Any, runtime: Runtime, folder: Any) -> PretrainingData:
    """The batches of this process."""
    return build_data(
        config,
        tokenizer,
        Rank(runtime.rank, runtime.world_size),
        folder,
        runtime.device.type == "cuda",
        all_max=lambda number: int(runtime.all_max(number)[0]),
        main_first=runtime.main_first,
    )


def build_measure(
    config: Config, model: nn.Module, data: PretrainingData, runtime: Runtime, interrupt: Interrupt
) -> Measure | None:
    """Loss, perplexity and accuracy on the evaluation data, where there is any."""
    batches = data.evaluation
    if batches is None:
        return None

    def measure() -> dict[str, float] | None:
        values = evaluate(model, batches(), runtime, config.trainer.eval_max_batches, interrupt)
        if values is None:
            return None
        if not values:
            raise DataError("dataset.eval_split: the evaluation data has no text")
        return {**values, "perplexity": perplexity(values["loss"])}

    def headline(values: dict[str, float]) -> str:
        return f"loss {values['loss']:.4f}  perplexity {values['perplexity']:,.1f}  accuracy {values['accuracy']:.1%}"

    return Measure(measure, headline, "loss")


def checkpoint_model(model: NeoBERTForMaskedLM, hf_tokenizer: Any, name: str | None) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config.json of a checkpoint."""
    weights = whole_weights(model)
    model_config = checkpoint_config(model.config, hf_tokenizer, name)
    return to_eurobert(weights) if is_eurobert(model.config) else weights, model_config
