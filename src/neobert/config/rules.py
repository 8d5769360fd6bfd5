"""Rules between keys: one small function each. ERROR stops the run; WARNING and PRECEDENCE are said once.

A rule takes the configuration and the set of keys that were set, and yields what it found.
"""

from collections.abc import Callable, Iterator

from neobert.config.reference import known_keys
from neobert.config.schema import Config
from neobert.errors import Problem

Found = Iterator[Problem]


def heads_divide_width(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: every head has the same whole width, and RoPE turns pairs of dimensions."""
    width, heads = config.model.hidden_size, config.model.num_attention_heads
    if width % heads:
        near = [n for n in range(1, width + 1) if width % n == 0]
        best = min(near, key=lambda n: abs(n - heads))
        yield Problem(
            "model.hidden_size", f"{width} is not divisible by num_attention_heads {heads}; {best} heads would fit"
        )
    elif config.model.rope and (width // heads) % 2:
        yield Problem(
            "model.num_attention_heads", f"RoPE needs an even head width, but {width} / {heads} = {width // heads}"
        )


def precision_is_supported(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: float16 needs loss scaling, which the sum-then-divide loss does not have."""
    if config.trainer.mixed_precision == "fp16":
        yield Problem("trainer.mixed_precision", "fp16 overflows in pretraining and is not supported; use bf16 or no")


def rows_fit_model(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: no row may be longer than the model's positions."""
    longest = config.model.max_position_embeddings
    for path, length in (
        ("dataset.max_seq_length", config.dataset.max_seq_length),
        ("datacollator.max_length", config.datacollator.max_length),
    ):
        if length is not None and length > longest:
            yield Problem(
                path, f"{length} is longer than model.max_position_embeddings {longest}; raise that or lower this"
            )


def packing_keys_need_packing(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: `datacollator.max_length` describes packed rows only, `pad_to_multiple_of` unpacked ones only."""
    collator = config.datacollator
    if collator.max_length is not None and not collator.pack_sequences:
        yield Problem(
            "datacollator.max_length", "applies to packed rows; set pack_sequences: true, or use dataset.max_seq_length"
        )
    if collator.pad_to_multiple_of is not None and collator.pack_sequences:
        yield Problem("datacollator.pad_to_multiple_of", "applies to unpacked rows; packed rows have one fixed length")


def pre_tokenize_needs_random_access(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: a stream is tokenised as it flows by."""
    dataset = config.dataset
    if dataset.pre_tokenize and dataset.streaming:
        yield Problem("dataset.pre_tokenize", "needs dataset.streaming: false")
    if dataset.pre_tokenize_output and not dataset.pre_tokenize:
        yield Problem("dataset.pre_tokenize_output", "has no effect without dataset.pre_tokenize: true")


def schedule_is_ordered(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: the decay ends after the warmup."""
    s = config.scheduler
    if s.warmup_percent is not None and s.decay_percent is not None and s.decay_percent <= s.warmup_percent:
        yield Problem("scheduler.decay_percent", f"{s.decay_percent} is not after warmup_percent {s.warmup_percent}")


def muon_config_needs_muonclip(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: settings of an optimizer that is not used."""
    if config.optimizer.muon_config is not None and config.optimizer.name != "muonclip":
        yield Problem("optimizer.muon_config", f"has no effect with optimizer.name: {config.optimizer.name}")


def best_needs_evaluation(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: the best checkpoint can only be loaded when checkpoints are saved."""
    if config.trainer.load_best_model_at_end and config.trainer.save_strategy == "no":
        yield Problem(
            "trainer.load_best_model_at_end", "needs checkpoints; set trainer.save_strategy to steps, epoch or best"
        )


# What a later version will do. A value other than the default is refused, so that no key is silently without effect.
NOT_YET: dict[str, str] = {
    "model.ngpt": "nGPT",
    "model.from_hub": "starting from hub weights",
    "wandb.enabled": "experiment tracking",
    "trainer.report_to": "experiment tracking",
    "accelerate_config_file": "launching several processes",
    "dataset.config": "datasets on the hub",
    "dataset.trust_remote_code": "datasets on the hub",
    "trainer.torch_compile": "torch.compile",
}
NOT_YET_VALUES: dict[str, str] = {"optimizer.name": "muonclip", "model.kernel_backend": "liger"}


def is_built(config: Config, keys_set: frozenset[str]) -> Found:
    """ERROR: this version does not have it yet."""
    if config.task != "pretraining":
        yield Problem("task", f"{config.task!r} is not part of this version; it runs task: pretraining")
    values = {dotted: _value(config, dotted) for dotted in (*NOT_YET, *NOT_YET_VALUES)}
    for dotted, what in NOT_YET.items():
        if values[dotted] != known_keys()[dotted].default:
            yield Problem(dotted, f"{what} is not part of this version; leave it at {known_keys()[dotted].default!r}")
    for dotted, value in NOT_YET_VALUES.items():
        if values[dotted] == value:
            yield Problem(dotted, f"{value!r} is not part of this version")
    if not config.dataset.path:
        yield Problem(
            "dataset.path", "not set; this version reads local files (.txt, .jsonl, .parquet or a saved dataset)"
        )


def streaming_has_no_validation_split(config: Config, keys_set: frozenset[str]) -> Iterator[str]:
    """WARNING / SKIP: a stream cannot be split at random."""
    if config.dataset.validation_split and config.dataset.streaming:
        yield "dataset.validation_split is skipped: a streamed dataset cannot be split at random (set streaming: false)"


def packed_sdpa_is_slower(config: Config, keys_set: frozenset[str]) -> Iterator[str]:
    """WARNING: on CUDA, packed rows are faster with the variable-length kernel."""
    if config.datacollator.pack_sequences and config.model.attn_backend == "sdpa" and "model.attn_backend" in keys_set:
        yield "datacollator.pack_sequences with model.attn_backend: sdpa works, but on CUDA flash_attn_varlen is faster"


def percent_wins(config: Config, keys_set: frozenset[str]) -> Iterator[str]:
    """PRECEDENCE: a percentage wins over an absolute number of steps."""
    for what in ("warmup", "decay"):
        percent, steps = f"scheduler.{what}_percent", f"scheduler.{what}_steps"
        if {percent, steps} <= keys_set and _value(config, percent) is not None:
            yield f"{percent} wins over {steps}"


def path_wins_over_name(config: Config, keys_set: frozenset[str]) -> Iterator[str]:
    """PRECEDENCE: a local path wins over a hub name."""
    if config.dataset.path and "dataset.name" in keys_set:
        yield f"dataset.path {config.dataset.path!r} wins over dataset.name"


ERRORS: list[Callable[[Config, frozenset[str]], Found]] = [
    heads_divide_width,
    precision_is_supported,
    rows_fit_model,
    packing_keys_need_packing,
    pre_tokenize_needs_random_access,
    schedule_is_ordered,
    muon_config_needs_muonclip,
    best_needs_evaluation,
    is_built,
]
NOTES = [streaming_has_no_validation_split, packed_sdpa_is_slower, percent_wins, path_wins_over_name]


def check_rules(config: Config, keys_set: frozenset[str]) -> tuple[list[Problem], list[str]]:
    """All broken rules, and all that the user should know."""
    problems = [problem for rule in ERRORS for problem in rule(config, keys_set)]
    return problems, [note for rule in NOTES for note in rule(config, keys_set)]


def _value(config: Config, dotted: str) -> object:
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
