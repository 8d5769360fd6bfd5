"""`task: pretraining`: masked-LM pretraining, from a configuration to a checkpoint and a report."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from neobert.checkpoints.format import Tensors
from neobert.checkpoints.layouts import is_eurobert, to_eurobert
from neobert.checkpoints.load import load_model_weights
from neobert.config.explain import show_config
from neobert.config.load import Loaded, dump_config
from neobert.config.schema import Config
from neobert.data.batch import Batch
from neobert.data.tokenizer import save_tokenizer, text_tokenizer
from neobert.errors import DataError, print_notes
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.ranks import Ranks
from neobert.tasks.encoder import checkpoint_config, prepare_model
from neobert.tasks.pretraining.data import PretrainingData, build_data
from neobert.tasks.pretraining.initial_weights import begin
from neobert.training.hooks import Evaluation, check_needs_evaluation
from neobert.training.length import Length, StepSize, keep_step_size, plan_length, saved_step_size, step_size
from neobert.training.loop import Interrupt, TrainState, evaluate
from neobert.training.metrics import perplexity
from neobert.training.optimizer import build_clip, build_run_optimizer
from neobert.training.resume import continue_run, with_saved_shards
from neobert.training.run import Finished, Job, Storage, build_run_schedule, run_job
from neobert.training.run_folder import OpenRun, write_run_files
from neobert.training.runtime import Runtime, whole_weights
from neobert.training.summary import describe_run, print_summary


def run(loaded: Loaded, observe: Callable[[Batch, int], None] | None = None) -> Finished:
    """Pretrain as configured; `observe` is shown every training batch. Raises UserError for what a user can repair."""
    return run_job(loaded, lambda *parts: build_job(loaded, *parts, observe))


def build_job(
    loaded: Loaded,
    runtime: Runtime,
    interrupt: Interrupt,
    opened: OpenRun,
    observe: Callable[[Batch, int], None] | None,
) -> Job:
    """The parts of a run, put together and, where asked for, brought to where a checkpoint was saved. Raises UserError."""
    config, trainer = loaded.config, loaded.config.trainer
    print_notes(loaded.warnings if runtime.is_main else [])
    if config.debug:
        print(show_config(config, loaded.origins))
    start = begin(config, opened.checkpoint)
    config, hf_tokenizer = start.config, start.hf_tokenizer
    tokenizer = text_tokenizer(hf_tokenizer)
    size = step_size(config, runtime.world_size)
    if opened.checkpoint is not None:
        config = with_saved_shards(config, opened.checkpoint, runtime.world_size)
        before = saved_step_size(opened.checkpoint, opened.saved)
        config, size, notes = keep_step_size(config, before, runtime.world_size)
        opened.told.extend(notes)
    data = build_run_data(config, tokenizer, runtime, opened.folder)
    data.train.observe = observe
    if data.evaluation is None:
        check_needs_evaluation(trainer)
    model = start.build_model(tokenizer.pad_id).to(runtime.device)
    lines = prepare_model(config, model, runtime)
    wrapped = runtime.distribute(model, model.model.layers)
    optimizer = build_run_optimizer(config, model, runtime.dtype)
    clip, clip_line = build_clip(config, model)
    wrapped, optimizer = runtime.wrap_deepspeed(wrapped, optimizer)
    storage = Storage(
        content=lambda: checkpoint_model(model, hf_tokenizer, start.name),
        load=lambda path: load_model_weights(path, model),
        save_beside=lambda path: save_tokenizer(hf_tokenizer, path, has_token_types=False),
    )
    state = continue_run(opened, runtime, storage, optimizer, data.train, wrapped)
    length = find_length(config, size, state, opened.saved, data, runtime)
    schedule, warnings = build_run_schedule(config, length.schedule_steps)
    facts = describe_run(config, model, runtime, data, length, schedule, lines | clip_line)
    runtime.on_main(lambda: write_run_files(opened.folder, dump_config(config), facts))
    print_summary(facts, [*start.notes, *opened.told, *warnings], opened.folder)
    return Job(
        config, runtime, model, optimizer, schedule, data.train,
        fetch=partial(data.train.next_step, config.trainer.gradient_accumulation_steps),
        empty_batch=data.train.pipeline.empty_batch,
        size=size,
        length=length,
        ends_with_data=trainer.max_steps < 0,
        measure=build_evaluation(config, wrapped, data, runtime, interrupt),
        storage=storage,
        opened=opened,
        state=state,
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
        Ranks(runtime.rank, runtime.world_size),
        folder,
        runtime.device.type == "cuda",
        main_first=runtime.main_first,
    )


def find_length(
    config: Config, size: StepSize, state: TrainState, saved: dict[str, Any], data: PretrainingData, runtime: Runtime
) -> Length:
    """How long the run is; also of the rates of masking, which follow the rows of all of it."""

    def count_left() -> int:
        epochs = config.trainer.num_train_epochs
        print(f"counting the steps of {epochs} epochs, by a pass over the data", flush=True)
        return -(-int(runtime.all_max(data.count_left())[0]) // config.trainer.gradient_accumulation_steps)

    length = plan_length(config, size, state, saved, count_left)
    data.train.pipeline.set_num_rows(state.num_rows + (length.num_steps - state.step) * size.rows_per_step)
    return length


def build_evaluation(
    config: Config, model: nn.Module, data: PretrainingData, runtime: Runtime, interrupt: Interrupt
) -> Evaluation | None:
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

    return Evaluation(measure, headline, "loss")


def checkpoint_model(model: NeoBERTForMaskedLM, hf_tokenizer: Any, name: str | None) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config.json of a checkpoint."""
    weights = whole_weights(model)
    model_config = checkpoint_config(model.config, hf_tokenizer, name)
    return to_eurobert(weights) if is_eurobert(model.config) else weights, model_config
