"""Which parameter is updated how: algorithm, weight decay, learning rate.

Without rules of the user's:

- Weight decay applies to matrices only: not to norms, biases and scalars, and not to embeddings (`embed` in the name), whose
  rows only get a gradient when their token occurs, so that decay would pull rare tokens to zero. The decoder is a matrix
  like any other and decays.
- Muon takes the matrices of numbered encoder layers (`layers.N.` or `layer.N.` in the name); embeddings, decoder, heads,
  norms and scalars go to AdamW.

Rules are ordered patterns over names, as in a shell (`*`, `?`, `[abc]`); the first that matches a name decides for it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Named = Iterable[tuple[str, nn.Parameter]]

_IN_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")


@dataclass(frozen=True)
class GroupRule:
    """What is different for parameters whose name matches `pattern`; None: as without the rule."""

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    algorithm: str | None = None  # muon or adamw


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices that are not embeddings."""
    return parameter.ndim >= 2 and "embed" not in name


def is_encoder_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it: a matrix of a numbered layer that is not an embedding."""
    return parameter.ndim == 2 and "embed" not in name and _IN_LAYER.search(name) is not None


def parameter_groups(
    named_parameters: Named,
    *,
    weight_decay: float,
    muon_decay: float | None = None,
    rules: Sequence[GroupRule] = (),
    fused: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, in order of first appearance; frozen parameters are left out.

    Keys: params, param_names, algorithm, weight_decay, lr_scale, parts. `muon_decay` None: everything goes to AdamW.
    `fused`: name endings of matrices that hold several, one below the other, and how many. Raises ValueError for a rule that
    acts on nothing, for Muon on what is no matrix, and when nothing is left to train.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    used: set[int] = set()
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("there is no parameter to train")
    for name, parameter in trained:
        number, rule = _first(rules, name)
        used.add(number)
        settings = _settings(name, parameter, rule, weight_decay, muon_decay)
        group = groups.setdefault(tuple(settings.values()), {"params": [], "param_names": [], "parts": [], **settings})
        group["params"].append(parameter)
        group["param_names"].append(name)
        group["parts"].append(next((n for ending, n in (fused or {}).items() if name.endswith(ending)), 1))
    for number, rule in enumerate(rules):
        if number not in used:
            raise ValueError(_idle(rule, [name for name, _ in trained]))
    if muon_decay is not None and not any(group["algorithm"] == "muon" for group in groups.values()):
        raise ValueError(
            "muonclip found no matrix in a numbered layer (layers.N.*); engines that hand over flattened weights (ZeRO) cannot "
            "be used with it: use adamw, or ZeRO stage 0"
        )
    return list(groups.values())


def _first(rules: Sequence[GroupRule], name: str) -> tuple[int, GroupRule | None]:
    for number, rule in enumerate(rules):
        if fnmatchcase(name, rule.pattern):
            return number, rule
    return -1, None


def _settings(
    name: str, parameter: nn.Parameter, rule: GroupRule | None, weight_decay: float, muon_decay: float | None
) -> dict[str, Any]:
    algorithm = "muon" if muon_decay is not None and is_encoder_matrix(name, parameter) else "adamw"
    if rule is not None and rule.algorithm is not None:
        algorithm = rule.algorithm
        if algorithm == "muon" and parameter.ndim != 2:
            raise ValueError(f"pattern {rule.pattern!r} gives {name} to muon, which takes matrices only")
    decay = muon_decay if algorithm == "muon" and muon_decay is not None else weight_decay
    decay = decay if decays(name, parameter) else 0.0
    if rule is not None and rule.weight_decay is not None:
        decay = rule.weight_decay
    return {"algorithm": algorithm, "weight_decay": decay, "lr_scale": 1.0 if rule is None else rule.lr_scale}


def _idle(rule: GroupRule, names: list[str]) -> str:
    if any(fnmatchcase(name, rule.pattern) for name in names):
        return f"pattern {rule.pattern!r} acts on nothing: earlier patterns take all parameters that it matches"
    return f"pattern {rule.pattern!r} matches no parameter; names are like {', '.join(names[:3])}"
