"""Rules between keys that concern `task: mteb`; the table of all rules is in `rules.py`."""

from collections.abc import Iterator

from neobert.config.reference import known_keys, value_of
from neobert.config.schema import Config
from neobert.errors import Problem

# Sections that describe training: a model that is evaluated says itself what it is.
NOT_MTEBS = ("model", "dataset", "optimizer", "scheduler", "datacollator")


def mteb_trains_nothing(config: Config, keys_set: frozenset[str]) -> Iterator[Problem]:
    """The weights say what the model is, and nothing is trained: the sections of training do not act."""
    if config.task != "mteb":
        return
    for section in NOT_MTEBS:
        keys = [key for key in sorted(keys_set) if key.startswith(f"{section}.") and key in known_keys()]
        if asked := [key for key in keys if value_of(config, key) != known_keys()[key].default]:
            yield Problem(asked[0], f"has no effect in task: mteb, nor has the rest of {section}")
