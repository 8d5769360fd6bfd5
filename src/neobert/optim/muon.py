"""Muon for matrices, AdamW for the rest, in one optimizer.

Per step, a Muon matrix W with gradient G: momentum M <- beta M + (1 - beta) G; its orthogonalised form O; then
W <- (1 - lr * decay) W - lr * 0.4 sqrt(max(rows, columns)) O. The scale gives an update the size of a typical AdamW
update (root mean square 0.4), so AdamW's learning rates carry over (the idea is Moonlight's, arXiv 2502.16982).
Sources: Keller Jordan's Muon; Kimi K2, arXiv 2507.20534 (no Nesterov momentum; `nesterov` is Keller Jordan's).

A fused matrix (q, k and v one below the other; gate and up) is treated as the `parts` it is made of: its update is what
separate matrices would get. All matrices of one shape, whichever parameter they are from, go through `orthogonalize_` in one
call. Parameters may be DTensors; see sharding.py. Shapes: B matrices of R rows and C columns, n the smaller of R and C.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from neobert.errors import UserError
from neobert.optim.sharding import Placement, distribute, local, placement, wants_few_launches

Group = dict[str, Any]
Quintic = tuple[float, float, float]  # a x + b x^3 + c x^5

SCALE = 0.4
CPU_ELEMENTS = 6 * 2**20  # of a run of matrices on a CPU: 12 MiB in bfloat16
EPS = 1e-7
SAFETY = 1.01  # keeps singular values below the interval's end despite rounding
_NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)  # steepest at 0; ends between 0.68 and 1.21, never at 1
_POLAR_EXPRESS: tuple[Quintic, ...] = (  # each the best for the interval that the step before leaves; arXiv 2505.16932
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_CONVERGENT: Quintic = (1.875, -1.25, 0.375)  # repeated from the eighth step on: singular values go to 1


@dataclass(frozen=True)
class MuonSettings:
    """The numbers of Muon. `dtype` is the arithmetic of its products: bfloat16 where hardware multiplies it, else float32."""

    momentum: float = 0.95
    weight_decay: float = 0.0
    nesterov: bool = False
    method: str = "polar_express"
    num_steps: int = 5
    dtype: torch.dtype = torch.bfloat16
    detect_anomalies: bool = False


class Muon(torch.optim.Optimizer):
    """Groups whose `algorithm` is `muon` take matrices; those with `adamw` take anything.

    Keys of a group: lr, weight_decay, param_names, parts (per parameter: how many matrices lie in it, one below the other);
    for adamw: betas, eps. `defaults` are those of all groups. Raises ValueError for groups and settings that cannot work.
    A step asks the device for nothing, and takes as many launches for many layers as for few.
    """

    found_inf: Tensor | None = (
        None  # a scalar on the device; while it is 1, a step changes nothing (as torch's fused AdamW)
    )

    def __init__(self, groups: Iterable[Group], settings: MuonSettings | None = None, **defaults: Any):
        self.settings = settings or MuonSettings()
        quintics(self.settings.method, self.settings.num_steps)
        super().__init__(list(groups), {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, **defaults})
        for group in self.param_groups:
            for name, parameter, parts in zip(group["param_names"], group["params"], group["parts"], strict=True):
                if group["algorithm"] == "muon":
                    _check_matrix(name, parameter, parts)

    @torch.no_grad()
    def step(self) -> None:
        """Update what has a gradient. With `detect_anomalies`, raises UserError on every rank, first, if one is not finite."""
        if self.settings.detect_anomalies:
            self._check_finite()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
            else:
                self._adamw_step(group)

    def _check_finite(self) -> None:
        named = [(name, parameter.grad) for group in self.param_groups for name, parameter, _ in _members(group)]
        if not named:
            return
        bad = torch.stack([(~local(grad).isfinite()).any() for _, grad in named]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        names = [name for (name, _), is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"the gradient of {', '.join(names[:3])}{more} is not finite; the weights were not touched. Resume from the "
                "last checkpoint with a lower optimizer.lr, a longer warmup or trainer.gradient_clipping"
            )

    def _muon_step(self, group: Group) -> None:
        by_placement: dict[Placement, list[tuple[Tensor, int]]] = {}
        for _, parameter, parts in _members(group):
            by_placement.setdefault(placement(parameter), []).append((parameter, parts))
        for where, members in by_placement.items():
            directions = self._directions([parameter for parameter, _ in members])
            if where.group is not None and directions[0].dtype != self.settings.dtype:
                _, directions = _copies(directions, self.settings.dtype)
            solve = partial(self._solve, [parts for _, parts in members])
            updates = distribute(where, directions, [parameter.shape[0] for parameter, _ in members], solve)
            alike: dict[float, list[tuple[Tensor, Tensor]]] = {}
            for (parameter, parts), update in zip(members, updates, strict=True):
                scale = SCALE * math.sqrt(max(parameter.shape[0] // parts, parameter.shape[1]))
                alike.setdefault(group["lr"] * scale, []).append((local(parameter), update))
            for size, pairs in alike.items():
                self._add(group["lr"] * group["weight_decay"], size, *map(list, zip(*pairs, strict=True)))

    def _directions(self, members: list[Tensor]) -> list[Tensor]:
        """Momenta of this rank's parts of matrices, brought up to date; with Nesterov, looked ahead."""
        beta, grads = self.settings.momentum, [local(p.grad) for p in members if p.grad is not None]
        for parameter in members:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [local(self.state[p]["momentum_buffer"]) for p in members]
        if self.found_inf is not None:  # towards themselves: they stay as they are
            flat, grads = _copies(grads, grads[0].dtype)
            torch.where(self.found_inf.bool(), _copies(momenta, flat.dtype)[0], flat, out=flat)
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        return list(torch._foreach_lerp(grads, momenta, beta)) if self.settings.nesterov else momenta

    def _add(self, decay: float, size: float, weights: list[Tensor], updates: list[Tensor]) -> None:
        """W <- (1 - decay) W - size update, of many matrices."""
        keep: float | Tensor = 1 - decay
        if self.found_inf is not None or wants_few_launches(weights[0]):  # one launch needs the weights' dtype
            flat, updates = _copies(updates, weights[0].dtype)
        if self.found_inf is not None:  # the weights times 1, minus 0
            keep = flat.new_full((), keep).masked_fill_(self.found_inf.bool(), 1)
            flat.masked_fill_(self.found_inf.bool(), 0)
        if decay:
            torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, updates, alpha=-size)

    def _solve(self, parts: list[int], numbers: list[int], matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalise whole matrices in stacks of one shape; results in the settings' dtype, shaped as `matrices`. The
        parts of a fused matrix are neighbours in their stack, so going in is one copy and coming out a view.
        """
        stacks: dict[tuple[int, int], list[int]] = {}
        for index, (number, matrix) in enumerate(zip(numbers, matrices, strict=True)):
            shape = (matrix.shape[0] // parts[number], matrix.shape[1])
            stacks.setdefault(shape, []).append(index)
        solved, settings = list(matrices), self.settings
        for shape, members in stacks.items():
            sizes = [parts[numbers[index]] for index in members]
            stack_BRC = torch.empty(sum(sizes), *shape, dtype=settings.dtype, device=matrices[members[0]].device)
            pieces = [piece.flatten(0, 1) for piece in stack_BRC.split(sizes)]
            torch._foreach_copy_(pieces, [matrices[index] for index in members])
            orthogonalize_(stack_BRC, settings.method, settings.num_steps)
            for index, piece in zip(members, pieces, strict=True):
                solved[index] = piece
        return solved

    def _adamw_step(self, group: Group) -> None:
        """torch's own fused kernel; elementwise, so each rank updates what it holds."""
        members = [parameter for _, parameter, _ in _members(group)]
        if not members:
            return
        for parameter in members:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), device=local(parameter).device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        weights, gradients = [local(p) for p in members], [local(p.grad) for p in members]
        moments = [[local(self.state[p][kind]) for p in members] for kind in ("exp_avg", "exp_avg_sq")]
        steps, (beta1, beta2) = [self.state[p]["step"] for p in members], group["betas"]
        numbers = {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in ("lr", "weight_decay", "eps")}}
        numbers |= {"fused": True, "amsgrad": False, "maximize": False, "found_inf": self.found_inf}
        adamw(weights, gradients, *moments, [], steps, **numbers)


def _members(group: Group) -> Iterator[tuple[str, Any, int]]:
    """(name, parameter, parts) of the parameters of a group that have a gradient."""
    for name, parameter, parts in zip(group["param_names"], group["params"], group["parts"], strict=True):
        if parameter.grad is not None:
            yield name, parameter, parts


def _copies(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Copies in a dtype, by one launch: the buffer in which they lie one after the other, and each."""
    flat = tensors[0].new_empty(sum(x.numel() for x in tensors), dtype=dtype)
    copies = [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return flat, copies


def _check_matrix(name: str, parameter: Tensor, parts: int) -> None:
    """Raises ValueError for a parameter that Muon cannot update."""
    if parameter.ndim != 2:
        raise ValueError(f"muon takes matrices, and {name} has shape {tuple(parameter.shape)}")
    if parameter.shape[0] % parts:
        raise ValueError(f"{name} has {parameter.shape[0]} rows, which are not {parts} equal matrices")
    try:
        placement(parameter)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def quintics(method: str, num_steps: int) -> list[Quintic]:
    """The polynomial of each step. Raises ValueError for an unknown method or fewer than one step."""
    if method not in ("polar_express", "newton_schulz"):
        raise ValueError(f"no orthogonalization {method!r}; there are: polar_express, newton_schulz")
    if num_steps < 1:
        raise ValueError(f"ns_steps must be at least 1, got {num_steps}")
    if method == "newton_schulz":
        return [_NEWTON_SCHULZ] * num_steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _POLAR_EXPRESS]
    return [*safe, *[_CONVERGENT] * num_steps][:num_steps]


@torch.no_grad()
def orthogonalize_(x_BRC: Tensor, method: str = "polar_express", num_steps: int = 5) -> Tensor:
    """Replace each matrix of a stack by its orthogonalised form, in its own dtype; zero stays zero. Returns the stack.

    That is the nearest matrix with orthonormal rows or columns: U S V' goes to U p(S) V' with an odd polynomial p that pushes
    singular values towards 1. A step multiplies small ones by at most 8.3, then about 4, so the number of steps bounds the
    condition number that can be evened out: an odd polynomial of degree 5^k that stays below 1.3 has a slope of at most
    1.3 * 5^k at 0. Five steps cannot lift 1e-4 of the largest beyond 0.41, whatever the coefficients (docs/training.md). What
    is smaller is lost in bfloat16 anyway, whose products round at 4e-3.

    On a CPU a long stack is worked off in runs that stay in the cache, all steps for one run before the next: with AMX twice
    as fast as one matrix at a time, and as the whole stack at once.
    """
    steps = quintics(method, num_steps)
    margin = SAFETY if method == "polar_express" else 1.0
    B, R, C = x_BRC.shape
    run, n, is_tall = B, min(R, C), R > C
    if x_BRC.device.type == "cpu":  # as many as `CPU_ELEMENTS` holds, the same number for every thread
        threads = torch.get_num_threads()
        run = min(B, max(1, CPU_ELEMENTS // max(1, R * C * threads)) * threads)
    work = (x_BRC.new_empty(run, R, C), x_BRC.new_empty(run, n, n), x_BRC.new_empty(run, n, n))
    for part in x_BRC.split(run):
        part.div_(torch.linalg.vector_norm(part, dim=(1, 2), keepdim=True).mul_(margin).add_(EPS))
        source, (target, gram_Bnn, poly_Bnn) = part, (one[: len(part)] for one in work)
        for a, b, c in steps:  # x <- a x + (b G + c G G) x with G = x x'; from the right, with x' x, where x is tall
            torch.bmm(*((source.mT, source) if is_tall else (source, source.mT)), out=gram_Bnn)
            torch.baddbmm(gram_Bnn, gram_Bnn, gram_Bnn, beta=b, alpha=c, out=poly_Bnn)
            torch.baddbmm(source, *((source, poly_Bnn) if is_tall else (poly_Bnn, source)), beta=a, out=target)
            source, target = target, source
        if source is not part:
            part.copy_(source)
    return x_BRC
