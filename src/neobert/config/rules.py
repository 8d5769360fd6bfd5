"""Rules between keys: one small function each, and `RULES`, the table of them.

A rule looks at the configuration and yields what it finds; a key at its default says nothing, whoever wrote it down. Its
docstring is its description in the reference page and in `neobert config explain`. ERROR stops the run; WARNING, PRECEDENCE and
IMPORTANT are said once.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from neobert.config.deepspeed import read_zero, zero_stage
from neobert.config.reference import is_chosen, is_set, value_of
from neobert.config.schema import Config
from neobert.config.task_rules import (
    INERT,
    classifier_range_of_glue_wins,
    keys_act_in_their_task,
    labels_fit_task,
    mteb_trains_nothing,
    temperature_wins_over_weights,
)
from neobert.errors import Problem

Found = Iterator[Problem]


def heads_divide_width(config: Config) -> Found:
    """Heads share the width evenly, and RoPE turns pairs of dimensions, so the width of a head is even."""
    width, heads = config.model.hidden_size, config.model.num_attention_heads
    if width % heads:
        best = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        yield Problem(
            "model.hidden_size", f"{width} is not divisible by num_attention_heads {heads}; {best} heads would fit"
        )
    elif config.model.rope and (width // heads) % 2:
        yield Problem(
            "model.num_attention_heads", f"RoPE needs an even head width; {width} / {heads} = {width // heads}"
        )


def precision_is_supported(config: Config) -> Found:
    """float16 needs loss scaling, which a loss that is divided by the targets of the whole step does not have."""
    if config.trainer.mixed_precision == "fp16" and config.task in ("pretraining", "contrastive"):
        yield Problem("trainer.mixed_precision", "fp16 overflows in pretraining and is not supported; use bf16 or no")


def rows_fit_model(config: Config) -> Found:
    """No row is longer than the positions of the model (GLUE and contrastive: those of the weights, once they are found)."""
    longest = config.model.max_position_embeddings
    if config.task in ("glue", "contrastive"):
        return
    lengths = {config.dataset.max_seq_length: "dataset.max_seq_length"}
    lengths.setdefault(config.row_length, "datacollator.max_length")
    for length, path in lengths.items():
        if length > longest:
            yield Problem(
                path, f"{length} is longer than model.max_position_embeddings {longest}; raise that or lower this"
            )


def packing_keys_need_packing(config: Config) -> Found:
    """`datacollator.max_length` describes packed rows, `pad_to_multiple_of` unpacked ones."""
    collator = config.datacollator
    if collator.max_length is not None and not collator.pack_sequences:
        yield Problem(
            "datacollator.max_length", "has no effect without pack_sequences: true; unpacked: dataset.max_seq_length"
        )
    if collator.pad_to_multiple_of is not None and collator.pack_sequences:
        yield Problem("datacollator.pad_to_multiple_of", "has no effect on packed rows, which have one length")


def pieces_fit_rows(config: Config) -> Found:
    """A piece of a document is at most as long as the row it goes into."""
    row = config.row_length
    if is_chosen("tokenizer.max_length", config) and config.tokenizer.max_length > row:
        yield Problem(
            "tokenizer.max_length", f"{config.tokenizer.max_length} is longer than a row: pieces have {row} tokens"
        )


def pre_tokenize_needs_random_access(config: Config) -> Found:
    """A stream is tokenised as it flows by; only a corpus of known size is tokenised beforehand."""
    if config.dataset.pre_tokenize and config.dataset.streaming:
        yield Problem("dataset.pre_tokenize", "needs dataset.streaming: false")


def output_needs_pre_tokenize(config: Config) -> Found:
    """`pre_tokenize_output` says where `pre_tokenize` writes."""
    if config.dataset.pre_tokenize_output and not config.dataset.pre_tokenize:
        yield Problem("dataset.pre_tokenize_output", "has no effect without dataset.pre_tokenize: true")


def mixture_has_sources(config: Config) -> Found:
    """Every source of a mixture names a path or a dataset; one that repeats has no end, so `max_steps` ends the run."""
    for number, source in enumerate(config.dataset.mixture):
        if not source.path and not source.name:
            yield Problem("dataset.mixture", f"entry {number} has neither path nor name")
    repeats = config.dataset.mixture_exhausted == "repeat" and config.task != "contrastive"
    if config.dataset.mixture and config.trainer.max_steps < 0 and repeats:
        yield Problem(
            "dataset.mixture_exhausted",
            "repeat has no end; set trainer.max_steps, or mixture_exhausted to drop or stop",
        )
    if not config.dataset.mixture and config.dataset.mixture_exhausted != "repeat":
        yield Problem("dataset.mixture_exhausted", "has no effect without dataset.mixture")


def eval_split_wins(config: Config) -> Found:
    """`eval_split` names the text that is evaluated; `validation_split` then holds nothing out."""
    dataset = config.dataset
    named = [split for split in (dataset.eval_split, *(entry.eval_split for entry in dataset.mixture)) if split]
    if named and dataset.validation_split is not None and not dataset.streaming:
        yield Problem("dataset.eval_split", f"{named[0]} wins over dataset.validation_split: nothing is held out")


def mixture_wins_over_path(config: Config) -> Found:
    """The sources of `mixture` are read instead of `path` and `name`."""
    if config.dataset.mixture and (config.dataset.path or is_chosen("dataset.name", config)):
        yield Problem("dataset.mixture", "wins over dataset.path and dataset.name")


def no_dataset_code(config: Config) -> Found:
    """`datasets` 4 and later run no code of datasets."""
    if config.dataset.trust_remote_code:
        yield Problem("dataset.trust_remote_code", "no effect: the datasets library no longer runs code of a dataset")


def log_interval_has_no_say(config: Config) -> Found:
    """`trainer.logging_steps` says how often is logged, whatever `wandb.log_interval` says."""
    if is_chosen("wandb.log_interval", config):
        yield Problem("wandb.log_interval", "has no effect; trainer.logging_steps says how often is logged")


def names_are_names(config: Config) -> Found:
    """Trackers make folders of these names."""
    for path in ("wandb.project", "wandb.name", "wandb.entity"):
        name = value_of(config, path)
        if isinstance(name, str) and (set(name) & set("/\\\0\n") or name in (".", "..")):
            yield Problem(path, f"{name!r} is not a name: no slashes, no line breaks, not . or ..")


def decay_follows_warmup(config: Config) -> Found:
    """A decay that is asked for ends after the warmup."""
    s = config.scheduler
    if s.warmup_percent is not None and s.decay_percent is not None and s.decay_percent <= s.warmup_percent:
        yield Problem("scheduler.decay_percent", f"{s.decay_percent} is not after warmup_percent {s.warmup_percent}")


def warmup_fits_run(config: Config) -> Found:
    """A warmup that is longer than the run never gets to the peak of the learning rate."""
    steps = config.scheduler.total_steps or config.trainer.max_steps
    if config.scheduler.warmup_percent is None and 0 < steps <= config.scheduler.warmup_steps:
        yield Problem(
            "scheduler.warmup_steps",
            f"{config.scheduler.warmup_steps:,} is not shorter than the schedule of {steps:,} steps: the rate does not get to "
            f"{config.optimizer.lr:g}",
        )


def muon_config_needs_muonclip(config: Config) -> Found:
    """Settings of an optimizer that is not used have no effect."""
    if is_chosen("optimizer.muon_config", config) and config.optimizer.name != "muonclip":
        yield Problem("optimizer.muon_config", f"has no effect with optimizer.name: {config.optimizer.name}")


def algorithms_need_muonclip(config: Config) -> Found:
    """Only MuonClip has two algorithms to choose from."""
    optimizer = config.optimizer
    chosen = [group.pattern for group in optimizer.param_groups if group.algorithm is not None]
    if chosen and optimizer.name != "muonclip":
        yield Problem(
            "optimizer.param_groups", f"algorithm of {chosen[0]!r} has no effect with optimizer.name: {optimizer.name}"
        )


def schedule_keys_fit_shape(config: Config) -> Found:
    """`power` is for `polynomial`, `wsd_decay_percent` for `wsd`."""
    for name, shape in (("power", "polynomial"), ("wsd_decay_percent", "wsd")):
        if is_chosen(f"scheduler.{name}", config) and config.scheduler.name != shape:
            yield Problem(f"scheduler.{name}", f"has no effect with scheduler.name: {config.scheduler.name}")


def best_needs_checkpoints(config: Config) -> Found:
    """The best checkpoint can only be loaded at the end when checkpoints are saved."""
    if config.trainer.load_best_model_at_end and config.trainer.save_strategy == "no":
        yield Problem("trainer.load_best_model_at_end", "needs checkpoints; set save_strategy to steps, epoch or best")


def from_hub_needs_a_name(config: Config) -> Found:
    """`model.from_hub` continues from the model that `model.name` names."""
    if config.model.from_hub and config.task == "pretraining" and not config.model.name:
        yield Problem("model.name", "not set; model.from_hub continues from the model that it names")


def resume_needs_a_position(config: Config, has_position: bool = True) -> Found:
    """A run resumes at the position of its data, streamed or not; a checkpoint that holds none is refused."""
    if config.trainer.resume_from_checkpoint is not None and not has_position:
        mode = "true" if config.dataset.streaming else "false"
        yield Problem(
            "trainer.resume_from_checkpoint",
            f"the checkpoint holds no position of the data, so the run (dataset.streaming: {mode}) could not continue where "
            "it was; start a new run, or choose a checkpoint of this version",
        )


def muonclip_needs_whole_matrices(config: Config) -> Found:
    """DeepSpeed's ZeRO hands the optimizer flattened pieces of matrices from stage 1 on; Muon needs them whole."""
    if config.optimizer.name == "muonclip" and (stage := zero_stage(config, os.environ)):
        yield Problem("optimizer.name", f"muonclip cannot run under ZeRO stage {stage}; use stage 0, FSDP2, or adamw")


def zero_updates_copies(config: Config) -> Found:
    """ZeRO updates flattened copies of the weights from stage 1 on: nGPT cannot renormalise matrices. Stage 3 fetches weights
    module by module, which compiled blocks cannot do.
    """
    stage = zero_stage(config, os.environ)
    if config.model.ngpt and stage:
        yield Problem(
            "model.ngpt", f"renormalises matrices, which ZeRO stage {stage} has in pieces; use stage 0, or FSDP2"
        )
    if config.trainer.torch_compile and stage == 3:
        yield Problem(
            "trainer.torch_compile", "not under ZeRO stage 3, which fetches weights by module; use stage 2 or FSDP2"
        )


def deepspeed_needs_its_switch(config: Config) -> Found:
    """`use_deepspeed: false` switches DeepSpeed off."""
    if config.trainer.engine == "deepspeed" and not config.use_deepspeed:
        yield Problem("trainer.engine", "deepspeed, but use_deepspeed is false; set one of them to the other's")


def zero_file_needs_deepspeed(config: Config) -> Found:
    """`deepspeed_config_file` acts in runs that use DeepSpeed."""
    if config.trainer.deepspeed_config_file is not None and read_zero(config, os.environ) is None:
        yield Problem("trainer.deepspeed_config_file", "has no effect without DeepSpeed; set trainer.engine: deepspeed")


def streaming_has_no_validation_split(config: Config) -> Found:
    """A stream cannot be split at random: the validation split is skipped."""
    if config.dataset.validation_split and config.dataset.streaming:
        yield Problem("dataset.validation_split", "skipped: a stream cannot be split at random (set streaming: false)")


def packed_sdpa_is_slower(config: Config) -> Found:
    """Packed rows with SDPA work; on CUDA the variable-length kernel is faster."""
    if (
        config.datacollator.pack_sequences
        and config.model.attn_backend == "sdpa"
        and is_set("model.attn_backend", config)
    ):
        yield Problem("model.attn_backend", "sdpa works for packed rows; on CUDA flash_attn_varlen is faster")


def ngpt_has_no_norms(config: Config) -> Found:
    """nGPT keeps vectors and matrices at length 1: norms, init ranges and weight decay have nothing to act on."""
    for path in ("model.rms_norm", "model.norm_eps", "optimizer.weight_decay"):
        if config.model.ngpt and is_chosen(path, config):
            yield Problem(path, "has no effect with model.ngpt, which keeps vectors and matrices at length 1")


def compile_keys_need_compile(config: Config) -> Found:
    """`torch_compile_backend` and `torch_compile_dynamic` say how to compile, `torch_compile` whether."""
    for path in ("trainer.torch_compile_backend", "trainer.torch_compile_dynamic"):
        if is_chosen(path, config) and not config.trainer.torch_compile:
            yield Problem(path, "has no effect without trainer.torch_compile: true")


def warmup_percent_wins(config: Config) -> Found:
    """`warmup_percent` wins over `warmup_steps`."""
    if config.scheduler.warmup_percent is not None and is_chosen("scheduler.warmup_steps", config):
        yield Problem("scheduler.warmup_percent", "wins over warmup_steps")


def decay_percent_wins(config: Config) -> Found:
    """`decay_percent` wins over `decay_steps`."""
    if config.scheduler.decay_percent is not None and config.scheduler.decay_steps is not None:
        yield Problem("scheduler.decay_percent", "wins over decay_steps")


def path_wins_over_name(config: Config) -> Found:
    """An existing local `path` is read; the hub's `name` is the fallback."""
    if config.dataset.path and is_chosen("dataset.name", config):
        yield Problem("dataset.path", f"{config.dataset.path!r} wins over dataset.name {config.dataset.name!r}")


def vocabulary_follows_tokenizer(config: Config) -> Found:
    """Inert tokens pad the tokenizer until its length is the model's vocabulary size, a multiple of 64."""
    if is_chosen("tokenizer.vocab_size", config):
        yield Problem(
            "tokenizer.vocab_size", f"{config.tokenizer.vocab_size:,} has no effect: it follows the tokenizer"
        )
    if is_chosen("model.vocab_size", config):
        yield Problem(
            "model.vocab_size", f"{config.model.vocab_size:,} is a lower bound: the size follows the tokenizer"
        )


def pad_id_follows_tokenizer(config: Config) -> Found:
    """The padding id is the tokenizer's, whatever is written here."""
    if is_chosen("model.pad_token_id", config):
        yield Problem("model.pad_token_id", f"{config.model.pad_token_id} is replaced by the tokenizer's padding id")


@dataclass(frozen=True)
class Rule:
    """A rule with its type and the keys it is about."""

    kind: Literal["ERROR", "WARNING", "PRECEDENCE", "IMPORTANT"]
    check: Callable[..., Found]
    keys: tuple[str, ...]

    @property
    def description(self) -> str:
        return " ".join((self.check.__doc__ or "").split())


ZERO_KEYS = ("use_deepspeed", "accelerate_config_file", "trainer.engine", "trainer.deepspeed_config_file")
RULES = (
    Rule("ERROR", heads_divide_width, ("model.hidden_size", "model.num_attention_heads", "model.rope")),
    Rule("ERROR", precision_is_supported, ("trainer.mixed_precision", "task")),
    Rule("ERROR", rows_fit_model,
         ("dataset.max_seq_length", "datacollator.max_length", "model.max_position_embeddings")),
    Rule("ERROR", pre_tokenize_needs_random_access, ("dataset.pre_tokenize", "dataset.streaming")),
    Rule("ERROR", mixture_has_sources,
         ("dataset.mixture", "dataset.mixture_exhausted", "trainer.max_steps")),
    Rule("ERROR", names_are_names, ("wandb.project", "wandb.name", "wandb.entity")),
    Rule("ERROR", decay_follows_warmup, ("scheduler.decay_percent", "scheduler.warmup_percent")),
    Rule("ERROR", algorithms_need_muonclip, ("optimizer.param_groups", "optimizer.name")),
    Rule("ERROR", best_needs_checkpoints, ("trainer.load_best_model_at_end", "trainer.save_strategy")),
    Rule("ERROR", labels_fit_task, ("glue.num_labels", "glue.task_name")),
    Rule("ERROR", from_hub_needs_a_name, ("model.from_hub", "model.name")),
    Rule("ERROR", resume_needs_a_position, ("trainer.resume_from_checkpoint", "dataset.streaming")),
    Rule("ERROR", muonclip_needs_whole_matrices, ("optimizer.name", *ZERO_KEYS)),
    Rule("ERROR", zero_updates_copies, ("model.ngpt", "trainer.torch_compile", *ZERO_KEYS)),
    Rule("ERROR", deepspeed_needs_its_switch, ("trainer.engine", "use_deepspeed")),
    Rule("WARNING", packing_keys_need_packing,
         ("datacollator.max_length", "datacollator.pad_to_multiple_of", "datacollator.pack_sequences")),
    Rule("WARNING", output_needs_pre_tokenize, ("dataset.pre_tokenize", "dataset.pre_tokenize_output")),
    Rule("WARNING", muon_config_needs_muonclip, ("optimizer.muon_config", "optimizer.name")),
    Rule("WARNING", log_interval_has_no_say, ("wandb.log_interval", "trainer.logging_steps")),
    Rule("WARNING", zero_file_needs_deepspeed, ("trainer.deepspeed_config_file", "trainer.engine", "use_deepspeed")),
    Rule("WARNING", streaming_has_no_validation_split, ("dataset.validation_split", "dataset.streaming")),
    Rule("WARNING", packed_sdpa_is_slower, ("datacollator.pack_sequences", "model.attn_backend")),
    Rule("WARNING", pieces_fit_rows, ("tokenizer.max_length", "dataset.max_seq_length", "datacollator.max_length")),
    Rule("WARNING", schedule_keys_fit_shape, ("scheduler.power", "scheduler.wsd_decay_percent", "scheduler.name")),
    Rule("WARNING", warmup_fits_run, ("scheduler.warmup_steps", "scheduler.total_steps", "trainer.max_steps")),
    Rule("WARNING", compile_keys_need_compile,
         ("trainer.torch_compile", "trainer.torch_compile_backend", "trainer.torch_compile_dynamic")),
    Rule("PRECEDENCE", ngpt_has_no_norms,
         ("model.ngpt", "model.rms_norm", "model.norm_eps", "optimizer.weight_decay")),
    Rule("WARNING", keys_act_in_their_task, ("task", *dict.fromkeys(key for keys in INERT.values() for key in keys))),
    Rule("WARNING", mteb_trains_nothing, ("task",)),
    Rule("PRECEDENCE", temperature_wins_over_weights, ("dataset.mixture_temperature", "dataset.mixture")),
    Rule("PRECEDENCE", classifier_range_of_glue_wins, ("glue.classifier_init_range", "model.classifier_init_range")),
    Rule("PRECEDENCE", warmup_percent_wins, ("scheduler.warmup_percent", "scheduler.warmup_steps")),
    Rule("PRECEDENCE", decay_percent_wins, ("scheduler.decay_percent", "scheduler.decay_steps")),
    Rule("PRECEDENCE", path_wins_over_name, ("dataset.path", "dataset.name")),
    Rule("PRECEDENCE", eval_split_wins, ("dataset.eval_split", "dataset.validation_split", "dataset.mixture")),
    Rule("PRECEDENCE", mixture_wins_over_path, ("dataset.mixture", "dataset.path", "dataset.name")),
    Rule("WARNING", no_dataset_code, ("dataset.trust_remote_code",)),
    Rule("IMPORTANT", vocabulary_follows_tokenizer, ("model.vocab_size", "tokenizer.vocab_size")),
    Rule("IMPORTANT", pad_id_follows_tokenizer, ("model.pad_token_id",)),
)  # fmt: skip


def check_rules(config: Config, wrong: set[str]) -> tuple[list[Problem], list[str]]:
    """(broken rules, what else the user should know). Rules about keys that are `wrong` by themselves are left out."""
    errors: list[Problem] = []
    notes: list[str] = []
    for rule in RULES:
        if not wrong.intersection(rule.keys):
            found = list(rule.check(config))
            errors += found if rule.kind == "ERROR" else []
            notes += [] if rule.kind == "ERROR" else map(str, found)
    return errors, notes
