"""`task: pretraining`: masked-LM pretraining, from a configuration to a checkpoint and a report."""

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.config.explain import plain_json
from neobert.config.load import Loaded, dump_config
from neobert.config.reference import known_keys
from neobert.config.rules import resume_needs_a_position, value_of
from neobert.config.schema import Config
from neobert.data.batch import Batch
from neobert.data.loader import build_steps
from neobert.data.order import Rank
from neobert.data.tokenizer import fit_vocabulary, load_tokenizer, save_tokenizer, text_tokenizer
from neobert.errors import ConfigError, Problem
from neobert.inference.load import load_model_weights
from neobert.model.layouts import eurobert_config, is_eurobert, to_eurobert
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.optim.build import optimizer_state
from neobert.optim.schedule import Schedule, build_schedule, lr_scale
from neobert.tasks.encoder import build_model, prepare_model
from neobert.tasks.hooks import Evaluate, Log, Save, check_needs_evaluation, finish_evaluation, step_hooks
from neobert.tasks.optimizers import build_clip, build_pretraining_optimizer
from neobert.tasks.pretraining_data import PretrainingData, build_data
from neobert.tasks.qk_clip import QKClip
from neobert.tasks.resuming import load_training_state, with_saved_lanes
from neobert.tasks.run_folder import prepare_run_folder, write_run_files
from neobert.tasks.stopping import stop_signals
from neobert.tasks.summary import describe_run, print_end, print_summary
from neobert.training.background import Saver
from neobert.training.checkpoint import Content, has_data, verify_checkpoint
from neobert.training.loop import Interrupt, StepSettings, TrainState, train
from neobert.training.metrics import Console, MetricsFile, Stopwatch
from neobert.training.runtime import Runtime, build_runtime, held_parts, whole_weights
from neobert.training.trackers import Sinks, build_trackers, wandb_run_id


@dataclass(frozen=True)
class Finished:
    """What a run came to."""

    folder: Path
    state: TrainState
    data_fraction: float
    exit_code: int = 0
    is_main: bool = True


def run(loaded: Loaded, observe: Callable[[Batch, int], None] | None = None) -> Finished:
    """Pretrain as configured; `observe` is shown every training batch. Raises UserError for what a user can repair."""
    trainer, interrupt = loaded.config.trainer, Interrupt()
    with stop_signals(interrupt):
        runtime = build_runtime(
            use_cpu=trainer.use_cpu,
            mixed_precision=trainer.mixed_precision,
            tf32=trainer.tf32,
            engine=trainer.engine,
            use_deepspeed=loaded.config.use_deepspeed,
        )
        if runtime.is_main:
            finished = build_job(loaded, runtime, interrupt, observe).run()
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                finished = build_job(loaded, runtime, interrupt, observe).run()
        runtime.close()
    return finished


def build_job(
    loaded: Loaded, runtime: Runtime, interrupt: Interrupt, observe: Callable[[Batch, int], None] | None
) -> "Job":
    """The parts of a run, put together and, where asked for, brought to where a checkpoint was saved. Raises UserError."""
    config = loaded.config
    for warning in loaded.warnings:
        print(f"note: {warning}")
    if config.debug:
        print(dump_config(config))
    hf_tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.path)
    vocab_size, notes = build_vocabulary(config, loaded.keys_set, hf_tokenizer)
    tokenizer = text_tokenizer(hf_tokenizer)
    trainer = config.trainer
    folder, resume, told = runtime.on_main(
        lambda: prepare_run_folder(trainer.output_dir, trainer.resume_from_checkpoint, trainer.overwrite_output_dir)
    )
    saved = None
    if resume is not None:
        saved = runtime.on_main(lambda: verify_checkpoint(resume))
        if missing := list(resume_needs_a_position(config, loaded.keys_set, has_data(resume))):
            raise ConfigError(*missing)
        config = with_saved_lanes(config, resume, runtime.world_size)
    data = build_data(
        config,
        tokenizer,
        Rank(runtime.rank, runtime.world_size),
        folder,
        runtime.device.type == "cuda",
        all_max=lambda number: int(runtime.all_max(number)[0]),
        main_first=runtime.main_first,
    )
    data.train.observe = observe
    if data.evaluation is None:
        check_needs_evaluation(trainer)
    model = build_model(config, vocab_size, tokenizer.pad_id).to(runtime.device)
    lines = prepare_model(config, model, runtime)
    wrapped = runtime.distribute(model, model.model.layers)
    optimizer = build_pretraining_optimizer(config, model, runtime.dtype)
    clip, clip_line = build_clip(config, model)
    schedule = build_pretraining_schedule(config, data.num_steps)
    state = TrainState()
    if resume is not None and saved is not None:
        load_training_state(resume, saved, runtime, model, optimizer, data.train, state)
        told.append(f"resuming from {resume}: step {state.step:,}, {state.num_tokens:,} tokens seen")
    told += warmup_note(config, schedule, data.num_steps)
    facts = describe_run(config, model, runtime, data, schedule, lines | clip_line)
    runtime.on_main(lambda: write_run_files(folder, dump_config(config), facts))
    print_summary(facts, [*notes, *told], folder)
    return Job(
        config, runtime, hf_tokenizer, model, optimizer, schedule, data, folder, state, resume is not None, clip,
        wrapped, interrupt,
    )  # fmt: skip


@dataclass
class Job:
    """The parts of a run, put together; `run` trains."""

    config: Config
    runtime: Runtime
    hf_tokenizer: Any
    model: NeoBERTForMaskedLM
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    data: PretrainingData
    folder: Path
    state: TrainState
    resumed: bool
    clip: QKClip | None
    wrapped: nn.Module  # the model as it is called
    interrupt: Interrupt

    def run(self) -> Finished:
        trainer, max_steps, runtime = self.config.trainer, self.data.num_steps, self.runtime
        stopwatch = Stopwatch()
        metrics = self.build_sinks()
        console = Console(max_steps, self.state.step, runtime.is_main and not trainer.disable_tqdm)
        log = Log(trainer, self.model, metrics, console, stopwatch, max_steps, self.config.debug)
        root = self.folder / "checkpoints"
        evaluation = None
        if self.data.evaluation is not None:
            evaluation = Evaluate(
                trainer, self.wrapped, self.data.evaluation, runtime, metrics, console, stopwatch, self.interrupt
            )
        saver = Saver(root, runtime.team(), trainer.save_in_background)
        save = Save(trainer, saver, self.checkpoint_content, stopwatch, self.state.step if self.resumed else -1)
        self.interrupt.failed, self.interrupt.explain = saver.has_failed, saver.explain
        fetch = build_steps(self.data.train, trainer.gradient_accumulation_steps)
        hooks = step_hooks(trainer, log, evaluation, save, max_steps, self.state.epoch)
        try:
            self.interrupt.start()
            if self.state.is_evaluation_open and evaluation is not None:
                finish_evaluation(evaluation, save, self.state)
            train(
                self.wrapped,
                self.optimizer,
                fetch,
                runtime,
                self.step_settings(),
                self.state,
                max_steps,
                hooks,
                stopwatch,
            )
            stopped_by = int(runtime.all_max(self.interrupt.signal)[0])
            if trainer.save_model or stopped_by:
                save.run(self.state)
            saver.wait()
            if not stopped_by:
                self.load_best(root, evaluation)
        finally:
            console.close()
            metrics.close()
            self.data.train.close()
            saver.close()
        used = [*self.data.train.describe_used(), *saver.describe(stopwatch.total_seconds["save"])]
        print_end(self.state, self.data.num_steps, self.folder, stopwatch, save.last_step, used)
        code = 128 + stopped_by if stopped_by else 0
        return Finished(self.folder, self.state, stopwatch.data_fraction, code, runtime.is_main)

    def step_settings(self) -> StepSettings:
        """The numbers that a step depends on."""
        trainer = self.config.trainer
        return StepSettings(
            seed=self.config.seed,
            lr=lambda step: self.config.optimizer.lr * lr_scale(step, self.schedule),
            gradient_clipping=trainer.gradient_clipping,
            needs_grad_norm=trainer.log_grad_norm,
            after_update=self.model.normalize_matrices,
            model_inputs={"masked_only": trainer.masked_logits_only_loss, "count_correct": trainer.log_train_accuracy},
            clip=self.clip,
            interrupt=self.interrupt,
        )

    def build_sinks(self) -> Sinks:
        """metrics.jsonl and the trackers that `trainer.report_to` and `wandb.enabled` ask for."""
        config = self.config
        if not self.runtime.is_main:
            return Sinks(MetricsFile(Path(os.devnull), None), [])
        names = list(dict.fromkeys([*config.trainer.report_to, *(["wandb"] if config.wandb.enabled else [])]))
        wandb = config.wandb.model_dump(include={"entity", "name", "tags", "mode", "dir", "resume"})
        if "wandb" in names:
            Path(config.wandb.dir).mkdir(parents=True, exist_ok=True)
            keep = self.resumed and config.wandb.resume != "never"
            wandb["id"] = wandb_run_id(self.folder, keep)
        flat = {key: plain_json(value_of(config, key)) for key in known_keys() if "muon_config." not in key}
        trackers = build_trackers(names, config.wandb.project, self.folder / "trackers", flat, wandb)
        step = self.state.step if self.resumed else None
        return Sinks(MetricsFile(self.folder / "metrics.jsonl", step), trackers)

    def checkpoint_content(self, state: TrainState) -> Content:
        """Everything a checkpoint of this moment holds; copies, so that training can go on."""
        weights = whole_weights(self.model)
        parts, first_rows = held_parts(optimizer_state(self.optimizer), self.runtime.is_main)
        model_config = checkpoint_config(self.model.config, self.hf_tokenizer, self.config.model.name)
        return Content(
            step=state.step,
            weights=to_eurobert(weights) if is_eurobert(self.model.config) else weights,
            model_config=model_config,
            save_tokenizer=lambda path: save_tokenizer(self.hf_tokenizer, path),
            config_yaml=dump_config(self.config),
            optimizer=parts,
            first_rows=first_rows,
            data=self.data.train.state_dict(),
            state={
                **state.state_dict(),
                "world_size": self.runtime.world_size,
                "engine": self.runtime.engine,
                "metadata": self.config.pretraining_metadata,
            },
        )

    def load_best(self, root: Path, evaluation: Evaluate | None) -> None:
        """`load_best_model_at_end`: go back to the weights of the best evaluation, and say so."""
        best = self.state.best_step
        if not self.config.trainer.load_best_model_at_end or evaluation is None or best in (None, self.state.step):
            return
        load_model_weights(root / str(best), self.model)
        evaluation.console.line(f"loading the best checkpoint, step {best:,}")
        evaluation.improved = False
        evaluation.run(self.state, compare=False)


# --- building the parts -----------


def build_vocabulary(config: Config, keys_set: frozenset[str], hf_tokenizer: Any) -> tuple[int, list[str]]:
    """Make `len(tokenizer)` the model's vocabulary size; returns it with notes where it differs from the YAML."""
    real = len(hf_tokenizer)
    follows = config.model.vocab_size == type(config.model).model_fields["vocab_size"].default
    wanted = None if follows else config.model.vocab_size
    size = fit_vocabulary(hf_tokenizer, wanted)
    expected = config.tokenizer.vocab_size
    if expected is not None and expected not in (real, size):
        raise ConfigError(Problem("tokenizer.vocab_size", f"expected {expected}, but the tokenizer has {real} tokens"))
    notes = []
    if wanted is not None and wanted != size:
        notes.append(
            f"model.vocab_size is {size:,}, not {wanted:,}: {real:,} tokens are real, and the size is a multiple of 64"
        )
    if "model.pad_token_id" in keys_set and config.model.pad_token_id != hf_tokenizer.pad_token_id:
        notes.append(
            f"model.pad_token_id is {hf_tokenizer.pad_token_id}, not {config.model.pad_token_id}: it follows the tokenizer"
        )
    return size, notes


def build_pretraining_schedule(config: Config, num_steps: int) -> Schedule:
    """The learning-rate schedule of `num_steps`. Raises ConfigError."""
    s = config.scheduler
    try:
        return build_schedule(
            s.name,
            num_steps,
            warmup_steps=s.warmup_steps,
            warmup_percent=s.warmup_percent,
            total_steps=s.total_steps,
            decay_steps=s.decay_steps,
            decay_percent=s.decay_percent,
            final_lr_ratio=s.final_lr_ratio,
            num_cycles=s.num_cycles,
            power=s.power,
            wsd_decay_percent=s.wsd_decay_percent,
        )
    except ValueError as error:
        raise ConfigError(Problem("scheduler", str(error))) from None


def warmup_note(config: Config, schedule: Schedule, num_steps: int) -> list[str]:
    """What to say of a warmup that is longer than a run of so many epochs."""
    if config.trainer.max_steps > 0 or schedule.warmup_steps < num_steps:
        return []
    peak = config.optimizer.lr * lr_scale(num_steps - 1, schedule)
    return [
        f"the warmup of {schedule.warmup_steps:,} steps is longer than the run: the learning rate gets to {peak:.2g}, "
        f"not {config.optimizer.lr:g} (set scheduler.warmup_steps or warmup_percent)"
    ]


def checkpoint_config(model_config: NeoBERTConfig, hf_tokenizer: Any, name: str | None) -> dict[str, Any]:
    """config.json: transformers' EuroBERT where that is the same function, with our own fields under `neobert`."""
    own = {
        field: getattr(model_config, field) for field in NeoBERTConfig.__annotations__ if hasattr(model_config, field)
    }
    if name is not None:
        own["name"] = name
    if not is_eurobert(model_config):
        return {
            "model_type": "neobert",
            "architectures": ["NeoBERTForMaskedLM"],
            "dtype": "float32",
            **own,
            "neobert": own,
        }
    special = {
        "bos_token_id": hf_tokenizer.cls_token_id,
        "eos_token_id": hf_tokenizer.sep_token_id,
        "mask_token_id": hf_tokenizer.mask_token_id,
    }
    return {**eurobert_config(model_config, special), "neobert": own}
