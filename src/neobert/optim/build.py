"""The optimizer of a run: which parameter is updated how, at what rate, and its state as plain tensors.

Without rules of the user's, weight decay applies to matrices only: not to norms, biases and scalars, and not to embeddings
(`embed` in the name), whose rows only get a gradient when their token occurs, so that decay would pull rare tokens to zero; the
decoder decays. Muon takes the matrices of numbered encoder layers (`layers.N.` or `layer.N.` in the name), AdamW all others.
Rules are ordered patterns over names, as in a shell (`*`, `?`, `[abc]`); the first that matches a name decides for it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neobert.optim.muon import Muon, MuonSettings
from neobert.optim.sharding import is_first_copy, local, local_rows, part_of

Named = Iterable[tuple[str, nn.Parameter]]
Tensors = dict[str, Tensor]
Shape = Literal["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"]

_IN_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")


@dataclass(frozen=True)
class GroupRule:
    """What is different for parameters whose name matches `pattern`; None: as without the rule."""

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    algorithm: str | None = None  # muon or adamw


@dataclass(frozen=True)
class OptimizerSettings:
    """`adamw` (decoupled decay, arXiv 1711.05101), `adam` (decay added to the gradient), or `muonclip` (Muon and AdamW)."""

    name: str
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rules: Sequence[GroupRule] = ()
    muon: MuonSettings = field(default_factory=MuonSettings)
    fused: Mapping[str, int] = field(default_factory=dict)  # endings of names -> matrices that lie one below the other


def build_optimizer(named_parameters: Named, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer, with torch's fused kernels. The learning rate of a step is to be multiplied by a group's `lr_scale`.
    Raises ValueError as `parameter_groups` and `Muon` do.
    """
    groups = parameter_groups(named_parameters, settings)
    numbers = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "muonclip":
        return Muon(groups, settings.muon, **numbers)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.name]
    return kind(groups, **numbers, fused=True)


def parameter_groups(named_parameters: Named, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups for an optimizer, in order of first appearance; frozen parameters are left out.

    Keys: params, param_names, algorithm, weight_decay, lr_scale, parts. Raises ValueError for a rule that acts on nothing, for
    Muon on what is no matrix, and when nothing is left to train.
    """
    rules, is_muon = settings.rules, settings.name == "muonclip"
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("there is no parameter to train")
    unused = list(rules)
    for name, parameter in trained:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), GroupRule("*"))
        unused = [other for other in unused if other is not rule]
        algorithm, decay, is_embedding = rule.algorithm, rule.weight_decay, "embed" in name
        if algorithm is None:
            is_encoder_matrix = parameter.ndim == 2 and not is_embedding and _IN_LAYER.search(name) is not None
            algorithm = "muon" if is_muon and is_encoder_matrix else "adamw"
        elif algorithm == "muon" and parameter.ndim != 2:
            raise ValueError(f"pattern {rule.pattern!r} gives {name} to muon, which takes matrices only")
        if decay is None:
            decay = settings.muon.weight_decay if algorithm == "muon" else settings.weight_decay
            decay = decay if parameter.ndim >= 2 and not is_embedding else 0.0
        facts = {"algorithm": algorithm, "weight_decay": decay, "lr_scale": rule.lr_scale}
        group = groups.setdefault(tuple(facts.values()), {"params": [], "param_names": [], "parts": [], **facts})
        group["params"].append(parameter)
        group["param_names"].append(name)
        group["parts"].append(next((n for ending, n in settings.fused.items() if name.endswith(ending)), 1))
    for rule in unused:
        names = [name for name, _ in trained]
        why = f"matches no parameter; names are like {', '.join(names[:3])}"
        if any(fnmatchcase(name, rule.pattern) for name in names):
            why = "acts on nothing: earlier patterns take all parameters that it matches"
        raise ValueError(f"pattern {rule.pattern!r} {why}")
    if is_muon and not any(group["algorithm"] == "muon" for group in groups.values()):
        raise ValueError(
            "muonclip found no matrix in a numbered layer (layers.N.*); engines that hand over flattened weights (ZeRO) cannot "
            "be used with it: use adamw, or ZeRO stage 0"
        )
    return list(groups.values())


def members(optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """The parameters of an optimizer by name, each with its group."""
    groups = optimizer.param_groups
    return {n: (p, group) for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """All state tensors under `<parameter name>/<state name>`; plain data that safetensors can hold (DTensors under FSDP2)."""
    found = ((name, optimizer.state.get(parameter, {})) for name, (parameter, _) in members(optimizer).items())
    return {f"{name}/{kind}": value for name, state in found for kind, value in state.items()}


def local_parts(state: Tensors, is_main: bool) -> tuple[Tensors, dict[str, int]]:
    """What this process has to save of optimizer state, copied to the CPU, and the first row of each shard. What all have is
    saved by the main one, and of copies of shards the first.
    """
    split = {path: tensor for path, tensor in state.items() if isinstance(tensor, DTensor) and is_first_copy(tensor)}
    first_rows = {path: local_rows(tensor).start for path, tensor in split.items()}
    own = {path: local(tensor).detach() for path, tensor in state.items() if is_main or path in split}
    return {path: tensor.to("cpu", copy=True) for path, tensor in own.items()}, first_rows


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restore what `optimizer_state` gave; whole tensors are split as their parameter is. Raises ValueError when a parameter
    is unknown or has another shape, or the state is another algorithm's.
    """
    known = members(optimizer)
    optimizer.state.clear()
    for path, value in tensors.items():
        name, _, kind = path.rpartition("/")
        if name not in known:
            raise ValueError(f"optimizer state of an unknown parameter {name!r}")
        parameter, algorithm = known[name][0], known[name][1].get("algorithm", "adamw")
        if (kind == "momentum_buffer") != (algorithm == "muon"):
            raise ValueError(f"optimizer state {kind!r} of {name!r}, which {algorithm} does not have")
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state of {name!r} has shape {tuple(value.shape)}, the weights {tuple(parameter.shape)}"
            )
        stays = not value.ndim and parameter.device.type == "cpu"  # a step count
        optimizer.state[parameter][kind] = part_of(value, parameter).to(value.device if stays else parameter.device)


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from 0, then a fall to `floor` at `decay_end`, then the floor. Steps count from 0."""

    name: Shape
    warmup_steps: int
    decay_end: int
    floor: float = 0.0  # ratio of the peak
    num_cycles: float = 0.5  # cosine
    power: float = 2.0  # polynomial
    decay_start: int = 0  # wsd: until here the rate stays at the peak


def lr_scale(step: float, schedule: Schedule) -> float:
    """Ratio of the peak learning rate for update `step` (the first is 0; fractions where a run had steps of another size)."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    if step >= schedule.decay_end:
        return schedule.floor
    if schedule.name == "inverse_sqrt":
        return max(schedule.floor, math.sqrt((schedule.warmup_steps + 1) / (step + 1)))
    start = max(schedule.warmup_steps, schedule.decay_start if schedule.name == "wsd" else 0)
    progress = max(0, step - start) / max(1, schedule.decay_end - start)
    height = 1.0 - progress  # from 1 at the peak to 0 at the floor: linear, and the last phase of wsd
    if schedule.name == "polynomial":
        height = height**schedule.power
    elif schedule.name == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * 2.0 * schedule.num_cycles * progress))
    return schedule.floor + (1.0 - schedule.floor) * height
