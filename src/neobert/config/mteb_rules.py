"""Rules between keys that concern `task: mteb`; the table of all rules is in `rules.py`."""

from collections.abc import Iterator

from neobert.config.reference import is_chosen, known_keys
from neobert.config.schema import Config
from neobert.errors import Problem

# Sections that describe training: a model that is evaluated says itself what it is.
NOT_MTEBS = ("model", "dataset", "optimizer", "scheduler", "datacollator")


def mteb_trains_nothing(config: Config) -> Iterator[Problem]:
    """The weights say what the model is, and nothing is trained: the sections of training do not act."""
    if config.task != "mteb":
        return
    for section in NOT_MTEBS:
        keys = sorted(key for key in known_keys() if key.startswith(f"{section}."))
        if asked := [key for key in keys if is_chosen(key, config)]:
            yield Problem(asked[0], f"has no effect in task: mteb, nor has the rest of {section}")
