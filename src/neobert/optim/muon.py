"""Muon for matrices, AdamW for the rest, in one optimizer.

Per step, a Muon matrix W with gradient G: momentum M <- beta M + (1 - beta) G; its orthogonalised form O; then
W <- (1 - lr * decay) W - lr * 0.4 sqrt(max(rows, columns)) O. The scale gives an update the size of a typical AdamW
update (root mean square 0.4), so AdamW's learning rates carry over (the idea is Moonlight's, arXiv 2502.16982).
Sources: Keller Jordan's Muon; Kimi K2, arXiv 2507.20534 (no Nesterov momentum; `nesterov` is Keller Jordan's).

A fused matrix (q, k and v one below the other; gate and up) is treated as the `parts` it is made of: its update is what
separate matrices would get. All matrices of one shape, whichever parameter they are from, go through `orthogonalize_` in one
call. Parameters may be DTensors; see ownership.py.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from neobert.errors import UserError
from neobert.optim.orthogonalize import orthogonalize_, quintics
from neobert.optim.ownership import Placement, distribute, local, placement

SCALE = 0.4
Group = dict[str, Any]


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Groups whose `algorithm` is `muon` take matrices; those with `adamw` take anything.

    Keys of a group: lr, weight_decay, param_names; for muon: momentum, nesterov, parts (per parameter: how many matrices
    lie in it, one below the other); for adamw: betas, eps. `dtype` is the arithmetic of the products: bfloat16 where
    the hardware multiplies it, else float32. `process_group`: the ranks that hold copies of plain tensors; None: all.
    Raises ValueError for groups and settings that cannot work.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        method: str = "polar_express",
        num_steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
        detect_anomalies: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        quintics(method, num_steps)
        self.method, self.num_steps, self.dtype = method, num_steps, dtype
        self.detect_anomalies, self.process_group = detect_anomalies, process_group
        defaults = {
            "lr": lr,
            "weight_decay": 0.0,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(list(groups), defaults)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._check(group)

    def _check(self, group: Group) -> None:
        for name, parameter, parts in zip(group["param_names"], group["params"], group["parts"], strict=True):
            if parameter.ndim != 2:
                raise ValueError(f"muon takes matrices, and {name} has shape {tuple(parameter.shape)}")
            if parameter.shape[0] % parts:
                raise ValueError(f"{name} has {parameter.shape[0]} rows, which are not {parts} equal matrices")
            try:
                placement(parameter, self.process_group)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient. With `detect_anomalies`, raises UserError before the first write
        when a gradient is not finite, on every rank.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.detect_anomalies:
            self._check_finite()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
            else:
                self._adamw_step(group)
        return loss

    def _check_finite(self) -> None:
        named = [
            (name, parameter.grad)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        if not named:
            return
        bad = torch.stack([(~local(grad).isfinite()).any() for _, grad in named]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.process_group)
        names = [name for (name, _), is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"the gradient of {', '.join(names[:3])}{more} is not finite; the weights were not touched. Resume from the "
                "last checkpoint with a lower optimizer.lr, a longer warmup or trainer.gradient_clipping"
            )

    # --- muon -----------

    def _muon_step(self, group: Group) -> None:
        by_place: dict[Placement, list[tuple[Tensor, int]]] = {}
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is not None:
                by_place.setdefault(placement(parameter, self.process_group), []).append((parameter, parts))
        for where, members in by_place.items():
            directions = [self._direction(parameter, group) for parameter, _ in members]
            split = [parts for _, parts in members]
            rows = [parameter.shape[0] for parameter, _ in members]
            if where.group is not None:
                directions = [x.to(self.dtype) for x in directions]
            updates = distribute(where, directions, rows, partial(self._solve, split))
            for (parameter, parts), update in zip(members, updates, strict=True):
                scale = SCALE * math.sqrt(max(parameter.shape[0] // parts, parameter.shape[1]))
                weight = local(parameter)
                if group["weight_decay"]:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)

    def _direction(self, parameter: Tensor, group: Group) -> Tensor:
        """Momentum of this rank's part of a matrix, brought up to date; with Nesterov, looked ahead."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum, grad = local(state["momentum_buffer"]), local(parameter.grad)  # type: ignore[arg-type]
        momentum.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _solve(self, parts: list[int], numbers: list[int], matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalise whole matrices in stacks of one shape; results in `self.dtype`, shaped as `matrices`.

        The parts of a fused matrix are neighbours in their stack, so going in is one copy and coming out a view.
        """
        stacks: dict[tuple[int, int], list[int]] = {}
        for place, (number, matrix) in enumerate(zip(numbers, matrices, strict=True)):
            shape = (matrix.shape[0] // parts[number], matrix.shape[1])
            stacks.setdefault(shape, []).append(place)
        solved = list(matrices)
        for shape, places in stacks.items():
            sizes = [parts[numbers[place]] for place in places]
            stack_BRC = torch.empty(sum(sizes), *shape, dtype=self.dtype, device=matrices[places[0]].device)
            pieces = [piece.flatten(0, 1) for piece in stack_BRC.split(sizes)]
            for place, piece in zip(places, pieces, strict=True):
                piece.copy_(matrices[place])
                solved[place] = piece
            orthogonalize_(stack_BRC, self.method, self.num_steps)
        return solved

    # --- adamw -----------

    def _adamw_step(self, group: Group) -> None:
        """torch's own fused kernel; elementwise, so each rank updates what it holds."""
        members = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in members:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=local(parameter).device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        if members:
            adamw(
                [local(p) for p in members],
                [local(p.grad) for p in members],
                [local(self.state[p]["exp_avg"]) for p in members],
                [local(self.state[p]["exp_avg_sq"]) for p in members],
                [],
                [self.state[p]["step"] for p in members],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
