"""Rules between keys that concern `task: contrastive`; the table of all rules is in `rules.py`."""

from collections.abc import Iterator

from neobert.config.reference import is_chosen
from neobert.config.schema import Config
from neobert.errors import Problem

# Pairs are held in memory, and batches are drawn from one source each: what streams, packs and masks documents has no say.
NOT_CONTRASTIVES = (
    "dataset.shuffle_buffer_size", "dataset.pre_tokenize", "dataset.mixture_exhausted", "dataset.lanes",
    "dataset.long_documents", "datacollator.max_length", "datacollator.mlm_probability", "datacollator.mask_all",
    "trainer.masked_logits_only_loss", "trainer.enforce_full_packed_batches",
)  # fmt: skip


def contrastive_has_batches_of_its_own(config: Config) -> Iterator[Problem]:
    """Pairs are held in memory and drawn by source: what describes streams, rows and masks of pretraining does not act."""
    for path in NOT_CONTRASTIVES:
        if config.task == "contrastive" and is_chosen(path, config):
            yield Problem(path, "has no effect in task: contrastive")


def contrastive_keys_need_contrastive(config: Config) -> Iterator[Problem]:
    """`dataset.columns` and `mixture_temperature` are read by `task: contrastive`."""
    for path in ("dataset.columns", "dataset.mixture_temperature"):
        if config.task != "contrastive" and is_chosen(path, config):
            yield Problem(path, f"has no effect in task: {config.task}")


def temperature_wins_over_weights(config: Config) -> Iterator[Problem]:
    """`mixture_temperature` shares by size, whatever the weights of the mixture."""
    if config.dataset.mixture_temperature is not None and any(one.weight != 1 for one in config.dataset.mixture):
        yield Problem("dataset.mixture_temperature", "wins over the weights in dataset.mixture")
