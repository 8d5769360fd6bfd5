"""Rules between keys that concern one task; the table of all rules is in `rules.py`."""

from collections.abc import Iterator

from neobert.config.reference import is_chosen, is_set, known_keys, value_of
from neobert.config.schema import Config
from neobert.errors import Problem

Found = Iterator[Problem]

# What a task has no use for. GLUE's rows are sentences of a length of their own; pairs are held in memory and drawn from one
# source each; an evaluation trains nothing, and its model says itself what it is.
PAIRS = ("dataset.columns", "dataset.mixture_temperature")
MASKS = ("datacollator.max_length", "datacollator.mlm_probability", "datacollator.mask_all",
    "trainer.masked_logits_only_loss", "trainer.enforce_full_packed_batches")  # fmt: skip
INERT = {
    "pretraining": PAIRS,
    "glue": (
        *PAIRS, *MASKS, "dataset.streaming", "dataset.max_seq_length", "dataset.text_column", "dataset.train_split",
        "dataset.eval_split", "dataset.validation_split", "dataset.pre_tokenize", "dataset.mixture", "tokenizer.max_length",
    ),
    "contrastive": (
        *MASKS, "dataset.shuffle_buffer_size", "dataset.pre_tokenize", "dataset.mixture_exhausted", "dataset.num_shards",
        "dataset.long_documents",
    ),
    "mteb": (),
}  # fmt: skip
TRAINING = ("model", "dataset", "optimizer", "scheduler", "datacollator")


def keys_act_in_their_task(config: Config) -> Found:
    """A task does not use the keys that describe the rows and masks, or the pairs, of another one."""
    for path in INERT[config.task]:
        if is_chosen(path, config):
            yield Problem(path, f"has no effect in task: {config.task}")


def mteb_trains_nothing(config: Config) -> Found:
    """The weights say what the model is, and nothing is trained: the sections of training do not act."""
    for section in TRAINING if config.task == "mteb" else ():
        keys = sorted(key for key in known_keys() if key.startswith(f"{section}."))
        if asked := [key for key in keys if is_chosen(key, config)]:
            yield Problem(asked[0], f"has no effect in task: mteb, nor has the rest of {section}")


def temperature_wins_over_weights(config: Config) -> Found:
    """`mixture_temperature` shares by size, whatever the weights of the mixture."""
    if config.dataset.mixture_temperature is not None and any(one.weight != 1 for one in config.dataset.mixture):
        yield Problem("dataset.mixture_temperature", "wins over the weights in dataset.mixture")


GLUE_LABELS = {"stsb": 1, "mnli": 3, "ax": 3}


def labels_fit_task(config: Config) -> Found:
    """A GLUE task has a fixed number of labels; 1 is regression."""
    wanted = GLUE_LABELS.get(config.glue.task_name, 2)
    if is_set("glue.num_labels", config) and config.task == "glue" and config.glue.num_labels != wanted:
        yield Problem("glue.num_labels", f"{config.glue.num_labels}, but {config.glue.task_name} has {wanted}")


def classifier_range_of_glue_wins(config: Config) -> Found:
    """`glue.classifier_init_range` wins over `model.classifier_init_range`."""
    names = ("glue.classifier_init_range", "model.classifier_init_range")
    if all(is_set(name, config) for name in names) and value_of(config, names[0]) != value_of(config, names[1]):
        yield Problem(names[0], f"wins over {names[1]}")
