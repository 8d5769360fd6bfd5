"""Rules between keys, and `RULES`, the table of them. A key at its default breaks no rule, whoever wrote it down.

A short rule is a row: the message it gives for each of its keys that was chosen, and the condition. A longer one is a function
that yields what it finds. ERROR stops the run; WARNING, PRECEDENCE and IMPORTANT are printed once.
"""

import os
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from neobert.config.deepspeed import read_zero
from neobert.config.schema import Config, known_keys
from neobert.errors import Problem

Found = Iterator[Problem]
GLUE_LABELS = {"stsb": 1, "mnli": 3, "ax": 3}  # the other tasks have 2


class Rule(NamedTuple):
    """A rule about `keys`. `check` is a function, whose docstring describes the rule; or the message about those of the keys
    that were chosen, with the configuration as `{c}`, where `when` holds; `text` describes it, and `others` take part.
    """

    kind: Literal["ERROR", "WARNING", "PRECEDENCE", "IMPORTANT"]
    keys: tuple[str, ...]
    check: Callable[[Config], Found] | str
    when: Callable[[Config], object] = lambda c: True
    text: str = ""
    others: tuple[str, ...] = ()

    @property
    def all_keys(self) -> tuple[str, ...]:
        """The keys that the rule reports, and those that take part."""
        return self.keys + self.others

    @property
    def description(self) -> str:
        """The sentence in the reference page and in `neobert config explain`."""
        return self.text or " ".join((self.check.__doc__ or "").split())

    def find(self, config: Config) -> Found:
        """The problems that a configuration has with this rule."""
        if not isinstance(self.check, str):
            yield from self.check(config)
        elif (chosen := [key for key in self.keys if config.is_chosen(key)]) and self.when(config):
            yield from (Problem(key, self.check.format(c=config)) for key in chosen)


def check_rules(config: Config, wrong: set[str]) -> tuple[list[Problem], list[str]]:
    """(broken rules, messages of the others). Rules about keys that are `wrong` by themselves are left out."""
    errors: list[Problem] = []
    messages: list[str] = []
    for rule in RULES:
        if not wrong.intersection(rule.all_keys):
            if rule.kind == "ERROR":
                errors += rule.find(config)
            else:
                messages += map(str, rule.find(config))
    return errors, messages


def heads_divide_width(config: Config) -> Found:
    """Heads share the width evenly, and RoPE turns pairs of dimensions, so the width of a head is even."""
    width, heads = config.model.hidden_size, config.model.num_attention_heads
    if width % heads:
        best = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        message = f"{width} is not divisible by num_attention_heads {heads}; {best} heads would fit"
        yield Problem("model.hidden_size", message)
    elif config.model.rope and (head := width // heads) % 2:
        yield Problem("model.num_attention_heads", f"RoPE needs an even head width; {width} / {heads} = {head}")


def rows_fit_model(config: Config) -> Found:
    """No row is longer than the positions of the model (GLUE and contrastive: those of the weights, once they are found)."""
    longest = config.model.max_position_embeddings
    lengths = {config.dataset.max_seq_length: "dataset.max_seq_length"}
    lengths.setdefault(config.row_length, "datacollator.max_length")
    for length, path in lengths.items():
        if length > longest and config.task not in ("glue", "contrastive"):
            message = f"{length} is longer than model.max_position_embeddings {longest}; raise that or lower this"
            yield Problem(path, message)


def mixture_has_sources(config: Config) -> Found:
    """Every source of a mixture names a path or a dataset; one that repeats has no end, so `max_steps` ends the run."""
    mixture, key, exhausted = config.dataset.mixture, "dataset.mixture_exhausted", config.dataset.mixture_exhausted
    for number, source in enumerate(mixture):
        if not source.path and not source.name:
            yield Problem("dataset.mixture", f"entry {number} has neither path nor name")
    if mixture and config.trainer.max_steps < 0 and exhausted == "repeat" and config.task != "contrastive":
        yield Problem(key, "repeat has no end; set trainer.max_steps, or mixture_exhausted to drop or stop")
    if not mixture and exhausted != "repeat":
        yield Problem(key, "has no effect without dataset.mixture")


def names_are_names(config: Config) -> Found:
    """Trackers make folders of these names."""
    for key in ("wandb.project", "wandb.name", "wandb.entity"):
        name = config.value_of(key)
        if isinstance(name, str) and (set(name) & set("/\\\0\n") or name in (".", "..")):
            yield Problem(key, f"{name!r} is not a name: no slashes, no line breaks, not . or ..")


def algorithms_need_muonclip(config: Config) -> Found:
    """Only MuonClip has two algorithms to choose from."""
    name = config.optimizer.name
    chosen = [group.pattern for group in config.optimizer.param_groups if group.algorithm is not None]
    if chosen and name != "muonclip":
        yield Problem("optimizer.param_groups", f"algorithm of {chosen[0]!r} has no effect with optimizer.name: {name}")


def labels_fit_task(config: Config) -> Found:
    """A GLUE task has a fixed number of labels; 1 is regression."""
    name, labels = config.glue.task_name, config.glue.num_labels
    wanted = GLUE_LABELS.get(name, 2)
    if config.task == "glue" and config.is_set("glue.num_labels") and labels != wanted:
        yield Problem("glue.num_labels", f"{labels}, but {name} has {wanted}")


def from_hub_needs_a_name(config: Config) -> Found:
    """`model.from_hub` continues from the model that `model.name` names."""
    if config.model.from_hub and config.task == "pretraining" and not config.model.name:
        yield Problem("model.name", "not set; model.from_hub continues from the model that it names")


def resume_needs_a_position(config: Config, has_position: bool = True) -> Found:
    """A run resumes at the position of its data, streamed or not; a checkpoint that holds none is refused."""
    if config.trainer.resume_from_checkpoint is not None and not has_position:  # known once the checkpoint is found
        mode = "true" if config.dataset.streaming else "false"
        message = (
            f"the checkpoint holds no position of the data, so the run (dataset.streaming: {mode}) could not continue where "
            "it was; start a new run, or choose a checkpoint of this version"
        )
        yield Problem("trainer.resume_from_checkpoint", message)


def zero_stage(config: Config) -> int:
    """The stage of ZeRO that this process runs in; 0 also without DeepSpeed."""
    return zero.stage if (zero := read_zero(config, os.environ)) else 0


def muonclip_needs_whole_matrices(config: Config) -> Found:
    """DeepSpeed's ZeRO hands the optimizer flattened pieces of matrices from stage 1 on; Muon needs them whole."""
    if config.optimizer.name == "muonclip" and (stage := zero_stage(config)):
        yield Problem("optimizer.name", f"muonclip cannot run under ZeRO stage {stage}; use stage 0, FSDP2, or adamw")


def zero_updates_copies(config: Config) -> Found:
    """ZeRO updates flattened copies of the weights from stage 1 on: nGPT cannot renormalise matrices. Stage 3 fetches weights
    module by module, which compiled blocks cannot do.
    """
    stage = zero_stage(config)
    if config.model.ngpt and stage:
        message = f"renormalises matrices, which ZeRO stage {stage} has in pieces; use stage 0, or FSDP2"
        yield Problem("model.ngpt", message)
    if config.trainer.torch_compile and stage == 3:
        message = "not under ZeRO stage 3, which fetches weights by module; use stage 2 or FSDP2"
        yield Problem("trainer.torch_compile", message)


def graphs_need_one_shape(config: Config) -> Found:
    """CUDA graphs, which two modes of inductor record, replay one shape: that of packed rows in full microbatches."""
    trainer, key = config.trainer, "trainer.torch_compile_mode"
    mode, backend = trainer.torch_compile_mode if trainer.torch_compile else None, trainer.torch_compile_backend
    has_one_shape = config.datacollator.pack_sequences and trainer.enforce_full_packed_batches
    if mode is not None and backend != "inductor":
        yield Problem(key, f"is for torch_compile_backend: inductor, not {backend}")
    if mode in ("reduce-overhead", "max-autotune") and not (has_one_shape and config.task == "pretraining"):
        why = "records CUDA graphs, which need batches of one shape: full packed rows of pretraining"
        yield Problem(key, f"{mode} {why}; or use default, max-autotune-no-cudagraphs")


def packed_sdpa_is_slower(config: Config) -> Found:
    """Packed rows with SDPA work; on CUDA the variable-length kernel is faster."""
    is_asked = config.is_set("model.attn_backend") and config.model.attn_backend == "sdpa"
    if is_asked and config.datacollator.pack_sequences:
        yield Problem("model.attn_backend", "sdpa works for packed rows; on CUDA flash_attn_varlen is faster")


def warmup_fits_run(config: Config) -> Found:
    """A warmup that is longer than the run never gets to the peak of the learning rate."""
    warmup, steps = config.scheduler.warmup_steps, config.scheduler.total_steps or config.trainer.max_steps
    if config.scheduler.warmup_percent is None and 0 < steps <= warmup:
        message = (
            f"is not shorter than the schedule of {steps:,} steps: the rate does not get to {config.optimizer.lr:g}"
        )
        yield Problem("scheduler.warmup_steps", f"{warmup:,} {message}")


def keys_act_in_their_task(config: Config) -> Found:
    """A key acts in the tasks that its description names, or in all of them."""
    acting: set[str] = set()
    inert: dict[str, list[str]] = {}
    for key, info in known_keys().items():
        section = key.partition(".")[0]
        if config.task in info.tasks:
            acting.add(section)
        elif config.is_chosen(key):
            inert.setdefault(section, []).append(key)
    message = f"has no effect in task: {config.task}"
    for section, keys in inert.items():
        if section in acting or section in keys:
            yield from (Problem(key, message) for key in keys)
        else:
            yield Problem(min(keys), f"{message}, nor has the rest of {section}")


def classifier_range_of_glue_wins(config: Config) -> Found:
    """`glue.classifier_init_range` wins over `model.classifier_init_range`."""
    names = ("glue.classifier_init_range", "model.classifier_init_range")
    if all(map(config.is_set, names)) and config.glue.classifier_init_range != config.model.classifier_init_range:
        yield Problem(names[0], f"wins over {names[1]}")


def eval_split_wins(config: Config) -> Found:
    """`eval_split` names the text that is evaluated; `validation_split` then holds nothing out."""
    dataset = config.dataset
    named = [split for split in (dataset.eval_split, *(entry.eval_split for entry in dataset.mixture)) if split]
    if named and dataset.validation_split is not None and not dataset.streaming:
        yield Problem("dataset.eval_split", f"{named[0]} wins over dataset.validation_split: nothing is held out")


# fmt: off
ZERO_KEYS = ("use_deepspeed", "accelerate_config_file", "trainer.engine", "trainer.deepspeed_config_file")
NO_EFFECT_WITH = "has no effect with optimizer.name: {c.optimizer.name}"
RULES = (
    Rule("ERROR", ("model.hidden_size", "model.num_attention_heads", "model.rope"), heads_divide_width),
    Rule("ERROR", ("trainer.mixed_precision",), "fp16 overflows in pretraining and is not supported; use bf16 or no",
        lambda c: c.trainer.mixed_precision == "fp16" and c.task in ("pretraining", "contrastive"),
        "float16 needs loss scaling, which a loss that is divided by the targets of the whole step does not have.", ("task",)),
    Rule("ERROR", ("dataset.max_seq_length", "datacollator.max_length", "model.max_position_embeddings"), rows_fit_model),
    Rule("ERROR", ("dataset.pre_tokenize",), "needs dataset.streaming: false", lambda c: c.dataset.streaming,
        "A stream is tokenised as it flows by; only a corpus of known size is tokenised beforehand.", ("dataset.streaming",)),
    Rule("ERROR", ("dataset.mixture", "dataset.mixture_exhausted", "trainer.max_steps"), mixture_has_sources),
    Rule("ERROR", ("wandb.project", "wandb.name", "wandb.entity"), names_are_names),
    Rule("ERROR", ("scheduler.decay_percent",),
        "{c.scheduler.decay_percent} is not after warmup_percent {c.scheduler.warmup_percent}",
        lambda c: (c.scheduler.warmup_percent or 0) >= (c.scheduler.decay_percent or 101),
        "A decay that is asked for ends after the warmup.", ("scheduler.warmup_percent",)),
    Rule("ERROR", ("optimizer.param_groups", "optimizer.name"), algorithms_need_muonclip),
    Rule("ERROR", ("trainer.load_best_model_at_end",), "needs checkpoints; set save_strategy to steps, epoch or best",
        lambda c: c.trainer.save_strategy == "no",
        "The best checkpoint can only be loaded at the end when checkpoints are saved.", ("trainer.save_strategy",)),
    Rule("ERROR", ("glue.num_labels", "glue.task_name"), labels_fit_task),
    Rule("ERROR", ("model.from_hub", "model.name"), from_hub_needs_a_name),
    Rule("ERROR", ("trainer.resume_from_checkpoint", "dataset.streaming"), resume_needs_a_position),
    Rule("ERROR", ("optimizer.name", *ZERO_KEYS), muonclip_needs_whole_matrices),
    Rule("ERROR", ("model.ngpt", "trainer.torch_compile", *ZERO_KEYS), zero_updates_copies),
    Rule("ERROR", ("trainer.torch_compile_mode", "datacollator.pack_sequences"), graphs_need_one_shape),
    Rule("ERROR", ("trainer.engine",), "deepspeed, but use_deepspeed is false; set one of them to the other's",
        lambda c: c.trainer.engine == "deepspeed" and not c.use_deepspeed,
        "`use_deepspeed: false` switches DeepSpeed off.", ("use_deepspeed",)),
    Rule("WARNING", ("datacollator.max_length",),
        "has no effect without pack_sequences: true; unpacked: dataset.max_seq_length",
        lambda c: not c.datacollator.pack_sequences, "It describes packed rows.", ("datacollator.pack_sequences",)),
    Rule("WARNING", ("datacollator.pad_to_multiple_of",), "has no effect on packed rows, which have one length",
        lambda c: c.datacollator.pack_sequences, "It describes unpacked rows.", ("datacollator.pack_sequences",)),
    Rule("WARNING", ("dataset.pre_tokenize_output",), "has no effect without dataset.pre_tokenize: true",
        lambda c: not c.dataset.pre_tokenize, "`pre_tokenize_output` says where `pre_tokenize` writes.",
        ("dataset.pre_tokenize",)),
    Rule("WARNING", ("optimizer.muon_config",), NO_EFFECT_WITH, lambda c: c.optimizer.name != "muonclip",
        "Settings of an optimizer that is not used have no effect.", ("optimizer.name",)),
    Rule("WARNING", ("wandb.log_interval",), "has no effect; trainer.logging_steps says how often is logged",
        text="`trainer.logging_steps` says how often is logged, whatever `wandb.log_interval` says.",
        others=("trainer.logging_steps",)),
    Rule("WARNING", ("trainer.deepspeed_config_file",), "has no effect without DeepSpeed; set trainer.engine: deepspeed",
        lambda c: read_zero(c, os.environ) is None, "`deepspeed_config_file` acts in runs that use DeepSpeed.",
        ("trainer.engine", "use_deepspeed")),
    Rule("WARNING", ("dataset.validation_split",),
        "skipped: a stream cannot be split at random (set streaming: false)", lambda c: c.dataset.streaming,
        "A stream cannot be split at random: the validation split is skipped.", ("dataset.streaming",)),
    Rule("WARNING", ("datacollator.pack_sequences", "model.attn_backend"), packed_sdpa_is_slower),
    Rule("WARNING", ("tokenizer.max_length",),
        "{c.tokenizer.max_length} is longer than a row: pieces have {c.row_length} tokens",
        lambda c: c.tokenizer.max_length > c.row_length, "A piece of a document is at most as long as the row it goes into.",
        ("dataset.max_seq_length", "datacollator.max_length")),
    Rule("WARNING", ("scheduler.power",), "has no effect with scheduler.name: {c.scheduler.name}",
        lambda c: c.scheduler.name != "polynomial", "`power` is for `polynomial`.", ("scheduler.name",)),
    Rule("WARNING", ("scheduler.wsd_decay_percent",), "has no effect with scheduler.name: {c.scheduler.name}",
        lambda c: c.scheduler.name != "wsd", "`wsd_decay_percent` is for `wsd`.", ("scheduler.name",)),
    Rule("WARNING", ("scheduler.warmup_steps", "scheduler.total_steps", "trainer.max_steps"), warmup_fits_run),
    Rule("WARNING", ("trainer.gradient_checkpointing_interval",), "has no effect without trainer.gradient_checkpointing: true",
        lambda c: not c.trainer.gradient_checkpointing, "It says how many blocks `gradient_checkpointing` recomputes.",
        ("trainer.gradient_checkpointing",)),
    Rule("WARNING", ("trainer.fsdp_reshard_after_forward", "trainer.fsdp_hybrid"),
        "has no effect with trainer.engine: {c.trainer.engine}", lambda c: c.trainer.engine in ("ddp", "deepspeed"),
        "They say how FSDP2 splits.", ("trainer.engine",)),
    Rule("WARNING", ("trainer.ddp_bf16_gradients",), "has no effect with trainer.engine: {c.trainer.engine}",
        lambda c: c.trainer.engine in ("fsdp2", "deepspeed"), "It says how DDP sums gradients.", ("trainer.engine",)),
    Rule("WARNING", ("trainer.torch_compile_backend", "trainer.torch_compile_dynamic", "trainer.torch_compile_mode"),
        "has no effect without trainer.torch_compile: true", lambda c: not c.trainer.torch_compile,
        "They say how to compile, `torch_compile` whether.", ("trainer.torch_compile",)),
    Rule("PRECEDENCE", ("model.rms_norm", "model.norm_eps", "optimizer.weight_decay"),
        "has no effect with model.ngpt, which keeps vectors and matrices at length 1", lambda c: c.model.ngpt,
        "nGPT keeps vectors and matrices at length 1: norms, init ranges and weight decay have nothing to act on.",
        ("model.ngpt",)),
    Rule("WARNING", ("task",), keys_act_in_their_task),
    Rule("PRECEDENCE", ("dataset.mixture_temperature",), "wins over the weights in dataset.mixture",
        lambda c: any(source.weight != 1 for source in c.dataset.mixture),
        "`mixture_temperature` shares by size, whatever the weights of the mixture.", ("dataset.mixture",)),
    Rule("PRECEDENCE", ("glue.classifier_init_range", "model.classifier_init_range"), classifier_range_of_glue_wins),
    Rule("PRECEDENCE", ("scheduler.warmup_percent",), "wins over warmup_steps",
        lambda c: c.is_chosen("scheduler.warmup_steps"),
        "`warmup_percent` wins over `warmup_steps`.", ("scheduler.warmup_steps",)),
    Rule("PRECEDENCE", ("scheduler.decay_percent",), "wins over decay_steps",
        lambda c: c.is_chosen("scheduler.decay_steps"),
        "`decay_percent` wins over `decay_steps`.", ("scheduler.decay_steps",)),
    Rule("PRECEDENCE", ("dataset.path",), "{c.dataset.path!r} wins over dataset.name {c.dataset.name!r}",
        lambda c: c.is_chosen("dataset.name"),
        "An existing local `path` is read; the hub's `name` is the fallback.", ("dataset.name",)),
    Rule("PRECEDENCE", ("dataset.eval_split", "dataset.validation_split", "dataset.mixture"), eval_split_wins),
    Rule("PRECEDENCE", ("dataset.mixture",), "wins over dataset.path and dataset.name",
        lambda c: c.dataset.path or c.is_chosen("dataset.name"),
        "The sources of `mixture` are read instead of `path` and `name`.", ("dataset.path", "dataset.name")),
    Rule("WARNING", ("dataset.trust_remote_code",), "no effect: the datasets library no longer runs code of a dataset",
        text="`datasets` 4 and later run no code of datasets."),
    Rule("IMPORTANT", ("tokenizer.vocab_size",), "{c.tokenizer.vocab_size:,} has no effect: it follows the tokenizer",
        text="It follows the tokenizer."),
    Rule("IMPORTANT", ("model.vocab_size",), "{c.model.vocab_size:,} is a lower bound: the size follows the tokenizer",
        text="Inert tokens pad the tokenizer until its length is the model's vocabulary size, a multiple of 64."),
    Rule("IMPORTANT", ("model.pad_token_id",), "{c.model.pad_token_id} is replaced by the tokenizer's padding id",
        text="The padding id is the tokenizer's, whatever is written here."),
)
