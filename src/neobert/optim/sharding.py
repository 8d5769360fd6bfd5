"""Tensors that several processes share: which rows each of them holds, and which of them works on which matrix.

A matrix is orthogonalised whole, by one rank: its owner. Ranks that hold copies (DDP) divide the matrices among themselves and
broadcast results, so their weights stay identical to the bit; ranks that hold rows of each (FSDP2's `fully_shard`) send
their rows to the owner and get their rows of the result back. Either way a step moves every matrix about once, and no rank
computes what another one does.

`distribute` takes and returns what this rank holds; one process is the case without any communication.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

Compute = Callable[[list[int], list[Tensor]], list[Tensor]]  # (numbers of matrices, whole matrices) -> results


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_rows(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows of a matrix that `Shard(0)` puts on a rank: equal runs, the last ones shorter or empty."""
    run = -(-num_rows // num_ranks)
    return slice(min(num_rows, rank * run), min(num_rows, (rank + 1) * run))


def local_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that are in this process."""
    num_rows = tensor.shape[0] if tensor.ndim else 0
    if not isinstance(tensor, DTensor):
        return slice(0, num_rows)
    return split_rows(num_rows, tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, split as `like` is; scalars and tensors that are split stay as they are."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor) or not whole.ndim:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The rows that `local_rows(like)` names, as a tensor that is split as `like` is."""
    if not isinstance(like, DTensor) or not rows.ndim:
        return rows
    mesh, where = like.device_mesh, like.placements
    return DTensor.from_local(
        rows.to(like.device), mesh, where, run_check=False, shape=like.shape, stride=like.stride()
    )


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors; each process takes its part."""
    own = model.state_dict()
    model.load_state_dict({name: part_of(weights[name], tensor) for name, tensor in own.items()})


@dataclass(frozen=True)
class Placement:
    """Where a matrix lies: whole in this process, whole on every rank of `group`, or split by rows over them."""

    group: dist.ProcessGroup | None
    is_split: bool


def placement(parameter: Tensor) -> Placement:
    """Where `parameter` lies; plain tensors are copies, which all ranks hold. Raises ValueError for matrices that are split
    along columns or more than once.
    """
    group: dist.ProcessGroup | None = None
    if isinstance(parameter, DTensor):
        splits = [(dim, where) for dim, where in enumerate(parameter.placements) if not where.is_replicate()]
        if splits:
            if len(splits) > 1 or not isinstance(splits[0][1], Shard) or splits[0][1].dim != 0:
                raise ValueError(f"a matrix placed as {parameter.placements}: only whole rows may be split over ranks")
            return Placement(parameter.device_mesh.get_group(splits[0][0]), True)
        group = parameter.device_mesh.get_group(0)
    elif dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return Placement(group if group is not None and dist.get_world_size(group) > 1 else None, False)


def owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The owner of each matrix: the largest first, each to the rank with the least to do. The same on every rank."""
    load, chosen = [0] * num_ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        chosen[number] = min(range(num_ranks), key=lambda rank: load[rank])
        load[chosen[number]] += sizes[number]
    return chosen


def distribute(where: Placement, matrices: list[Tensor], num_rows: list[int], compute: Compute) -> list[Tensor]:
    """`compute` every matrix at its owner; returns this rank's part of each result. `matrices` are what this rank holds of
    each, all of one dtype; `num_rows` are the rows of the whole ones.
    """
    if where.group is None:
        return compute(list(range(len(matrices))), matrices)
    num_ranks = dist.get_world_size(where.group)
    owner = owners([rows * x.shape[1] for rows, x in zip(num_rows, matrices, strict=True)], num_ranks)
    owned = [[number for number, one in enumerate(owner) if one == rank] for rank in range(num_ranks)]
    if where.is_split:
        return _exchange_rows(where.group, owned, matrices, num_rows, compute)
    mine = owned[dist.get_rank(where.group)]
    return _broadcast(where.group, owned, matrices, compute(mine, [matrices[number] for number in mine]))


def _broadcast(
    group: dist.ProcessGroup, owned: list[list[int]], like: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    """Every rank's results to all ranks, one message from each."""
    out = list(like)
    for source, numbers in enumerate(owned):
        if not numbers:
            continue
        sizes = [like[number].numel() for number in numbers]
        if source == dist.get_rank(group):
            flat = torch.cat([result.flatten() for result in results])
        else:
            flat = like[0].new_empty(sum(sizes))
        dist.broadcast(flat, group=group, group_src=source)
        for number, piece in zip(numbers, flat.split(sizes), strict=True):
            out[number] = piece.view_as(like[number])
    return out


def _exchange_rows(
    group: dist.ProcessGroup, owned: list[list[int]], parts: list[Tensor], num_rows: list[int], compute: Compute
) -> list[Tensor]:
    """Every rank's rows of each matrix to its owner, which computes it, and the rows of the results back."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = owned[rank]
    counts = [  # rows of each of my matrices on every rank
        [len(range(num_rows[n])[split_rows(num_rows[n], one, num_ranks)]) for one in range(num_ranks)] for n in mine
    ]
    to_owners = [[parts[n].numel() for n in numbers] for numbers in owned]
    to_ranks = [
        [rows[one] * parts[n].shape[1] for n, rows in zip(mine, counts, strict=True)] for one in range(num_ranks)
    ]
    outgoing = torch.cat([parts[n].flatten() for numbers in owned for n in numbers])
    pieces = _all_to_all(group, outgoing, to_owners, to_ranks)
    whole = [torch.cat([one[at] for one in pieces]).view(-1, parts[n].shape[1]) for at, n in enumerate(mine)]
    results = [result.split(rows) for result, rows in zip(compute(mine, whole), counts, strict=True)]
    outgoing = torch.cat(
        [parts[0].new_empty(0), *(rows[one].flatten() for one in range(num_ranks) for rows in results)]
    )
    out = list(parts)
    for numbers, arrived in zip(owned, _all_to_all(group, outgoing, to_ranks, to_owners), strict=True):
        for number, piece in zip(numbers, arrived, strict=True):
            out[number] = piece.view_as(parts[number])
    return out


def _all_to_all(
    group: dist.ProcessGroup, outgoing: Tensor, sent: list[list[int]], received: list[list[int]]
) -> list[tuple[Tensor, ...]]:
    """Pieces of `sent[r]` elements to rank r, which lie in this order in `outgoing`; the pieces from each rank."""
    totals = [sum(sizes) for sizes in received]
    arrived = outgoing.new_empty(sum(totals))
    dist.all_to_all_single(arrived, outgoing, totals, [sum(sizes) for sizes in sent], group=group)
    return [flat.split(sizes) for flat, sizes in zip(arrived.split(totals), received, strict=True)]
