"""Optimizers and their parameter groups."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Named = Iterable[tuple[str, nn.Parameter]]


def weight_decay_groups(named_parameters: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms and other vectors, and all embeddings, do not.

    An embedding row only gets a gradient when its token occurs, so decay would pull rare tokens to zero. The decoder is
    a matrix like any other and decays. Each group keeps the names of its parameters under `param_names`.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        is_matrix = parameter.ndim >= 2 and "embed_" not in name
        (decayed if is_matrix else others).append((name, parameter))
    return [
        {"params": [p for _, p in group], "param_names": [n for n, _ in group], "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (others, 0.0))
        if group
    ]


def build_optimizer(
    name: str, named_parameters: Named, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """`adamw` (decoupled decay, arXiv 1711.05101) or `adam` (decay added to the gradient), with fused kernels."""
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    groups = weight_decay_groups(named_parameters, weight_decay)
    return kinds[name](groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All state tensors under `<parameter name>/<state name>`; plain data that safetensors can hold."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{kind}"] = value
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `optimizer_state` gave. Raises ValueError when a parameter is unknown or has another shape."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    optimizer.state.clear()
    for path, value in tensors.items():
        name, _, kind = path.rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimizer state of an unknown parameter {name!r}")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state of {name!r} has shape {tuple(value.shape)}, the weights {tuple(parameter.shape)}"
            )
        on = value.device if not value.ndim and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][kind] = value.to(on)
