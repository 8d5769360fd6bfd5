"""The optimizer of a run, and its state as plain tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from neobert.optim.groups import GroupRule, Named, parameter_groups
from neobert.optim.muon import Muon


@dataclass(frozen=True)
class MuonSettings:
    """The numbers of Muon; see muon.py."""

    momentum: float = 0.95
    weight_decay: float = 0.0
    nesterov: bool = False
    method: str = "polar_express"
    num_steps: int = 5
    dtype: torch.dtype = torch.bfloat16
    detect_anomalies: bool = False


def build_optimizer(
    name: str,
    named_parameters: Named,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    rules: Sequence[GroupRule] = (),
    muon: MuonSettings | None = None,
    fused: Mapping[str, int] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """`adamw` (decoupled decay, arXiv 1711.05101) or `adam` (decay added to the gradient), with torch's fused kernels; or
    `muonclip`: Muon on the matrices of encoder layers, AdamW on the rest.

    `fused` as in `parameter_groups`, `process_group` as in `Muon`.

    Every group has a `lr_scale`, by which the learning rate of a step is to be multiplied. Raises ValueError as
    `parameter_groups` and `Muon` do.
    """
    if name == "muonclip":
        settings = muon or MuonSettings()
        groups = parameter_groups(
            named_parameters, weight_decay=weight_decay, muon_decay=settings.weight_decay, rules=rules, fused=fused
        )
        return Muon(
            groups,
            lr=lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            betas=betas,
            eps=eps,
            method=settings.method,
            num_steps=settings.num_steps,
            dtype=settings.dtype,
            detect_anomalies=settings.detect_anomalies,
            process_group=process_group,
        )
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    groups = parameter_groups(named_parameters, weight_decay=weight_decay, rules=rules)
    return kinds[name](groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All state tensors under `<parameter name>/<state name>`; plain data that safetensors can hold (DTensors under FSDP2)."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{kind}"] = value
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_state` gave; whole tensors are split as their parameter is.

    Raises ValueError when a parameter is unknown or has another shape, or the state is another algorithm's.
    """
    members = {
        name: (parameter, group.get("algorithm", "adamw"))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    optimizer.state.clear()
    for path, value in tensors.items():
        name, _, kind = path.rpartition("/")
        if name not in members:
            raise ValueError(f"optimizer state of an unknown parameter {name!r}")
        parameter, algorithm = members[name]
        if (kind == "momentum_buffer") != (algorithm == "muon"):
            raise ValueError(f"optimizer state {kind!r} of {name!r}, which {algorithm} does not have")
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state of {name!r} has shape {tuple(value.shape)}, the weights {tuple(parameter.shape)}"
            )
        optimizer.state[parameter][kind] = _place(value, parameter)


def _place(value: Tensor, parameter: Tensor) -> Tensor:
    if value.ndim and isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    on = value.device if not value.ndim and parameter.device.type == "cpu" else parameter.device
    return value.to(on)
