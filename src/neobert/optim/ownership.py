"""Which rank works on which matrix, when several processes train one model.

A matrix is orthogonalised whole, by one rank: its owner. Ranks that hold copies (DDP) divide the matrices among themselves and
broadcast results, so their weights stay identical to the bit; ranks that hold rows of each (FSDP2's `fully_shard`) send
their rows to the owner and get their rows of the result back. Either way a step moves every matrix about once, and no rank
computes what another one does.

`distribute` takes and returns what this rank holds; one process is the case without any communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Compute = Callable[[list[int], list[Tensor]], list[Tensor]]  # (numbers of matrices, whole matrices) -> results


@dataclass(frozen=True)
class Placement:
    """Where a matrix lies: whole in this process, whole on every rank of `group`, or split by rows over them."""

    group: dist.ProcessGroup | None
    is_split: bool


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def placement(parameter: Tensor, group: dist.ProcessGroup | None) -> Placement:
    """Where `parameter` lies. `group`: the ranks that hold copies of plain tensors; None: all there are.

    Raises ValueError for matrices that are split along columns or more than once.
    """
    if isinstance(parameter, DTensor):
        splits = [(dim, where) for dim, where in enumerate(parameter.placements) if not where.is_replicate()]
        if not splits:
            return _shared(parameter.device_mesh.get_group(0))
        if len(splits) > 1 or not isinstance(splits[0][1], Shard) or splits[0][1].dim != 0:
            raise ValueError(f"a matrix placed as {parameter.placements}: only whole rows may be split over ranks")
        return Placement(parameter.device_mesh.get_group(splits[0][0]), True)
    if not (dist.is_available() and dist.is_initialized()):
        return Placement(None, False)
    return _shared(dist.group.WORLD if group is None else group)


def _shared(group: dist.ProcessGroup | None) -> Placement:
    return Placement(group if dist.get_world_size(group) > 1 else None, False)


def owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The owner of each matrix: the largest first, each to the rank with the least to do. The same on every rank."""
    load, chosen = [0] * num_ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        chosen[number] = min(range(num_ranks), key=lambda rank: load[rank])
        load[chosen[number]] += sizes[number]
    return chosen


def distribute(where: Placement, matrices: list[Tensor], num_rows: list[int], compute: Compute) -> list[Tensor]:
    """`compute` every matrix at its owner; returns this rank's part of each result.

    `matrices` are what this rank holds of each, all of one dtype; `num_rows` are the rows of the whole ones.
    """
    everything = list(range(len(matrices)))
    if where.group is None:
        return compute(everything, matrices)
    rank, num_ranks = dist.get_rank(where.group), dist.get_world_size(where.group)
    owner = owners([rows * x.shape[1] for rows, x in zip(num_rows, matrices, strict=True)], num_ranks)
    mine = [number for number in everything if owner[number] == rank]
    if not where.is_split:
        return _broadcast(where.group, owner, matrices, compute(mine, [matrices[number] for number in mine]))
    counts = [[len(range(rows)[split_rows(rows, one, num_ranks)]) for one in range(num_ranks)] for rows in num_rows]
    whole = _gather(where.group, owner, matrices, counts)
    results = compute(mine, whole)
    return _scatter(where.group, owner, matrices, counts, results)


def split_rows(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows of a matrix that `Shard(0)` puts on a rank: equal runs, the last ones shorter or empty."""
    run = -(-num_rows // num_ranks)
    return slice(min(num_rows, rank * run), min(num_rows, (rank + 1) * run))


def _broadcast(group: dist.ProcessGroup, owner: list[int], like: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """Every rank's results to all ranks, one message from each."""
    rank, given, out = dist.get_rank(group), iter(results), list(like)
    for source in range(dist.get_world_size(group)):
        numbers = [number for number, one in enumerate(owner) if one == source]
        sizes = [like[number].numel() for number in numbers]
        if source == rank:
            flat = torch.cat([next(given).flatten() for _ in numbers]) if numbers else like[0].new_empty(0)
        else:
            flat = like[0].new_empty(sum(sizes))
        if numbers:
            dist.broadcast(flat, group=group, group_src=source)
        for number, piece in zip(numbers, flat.split(sizes), strict=True):
            out[number] = piece.view_as(like[number])
    return out


def _gather(group: dist.ProcessGroup, owner: list[int], parts: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
    """Rows of every matrix to its owner; returns the matrices that this rank owns."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    order = sorted(range(len(parts)), key=lambda number: owner[number])
    mine = [number for number in order if owner[number] == rank]
    sent = [sum(parts[n].numel() for n in order if owner[n] == one) for one in range(num_ranks)]
    got = [[counts[n][one] * parts[n].shape[1] for n in mine] for one in range(num_ranks)]
    flat = _exchange(group, torch.cat([parts[n].flatten() for n in order]), sent, [sum(sizes) for sizes in got])
    pieces = [piece for one, sizes in zip(flat, got, strict=True) for piece in one.split(sizes)]
    return [
        torch.cat(pieces[place :: len(mine)]).view(sum(counts[n]), parts[n].shape[1]) for place, n in enumerate(mine)
    ]


def _scatter(
    group: dist.ProcessGroup, owner: list[int], like: list[Tensor], counts: list[list[int]], results: list[Tensor]
) -> list[Tensor]:
    """The inverse of `_gather`."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    order = sorted(range(len(like)), key=lambda number: owner[number])
    mine = [number for number in order if owner[number] == rank]
    split = [result.split(counts[n]) for n, result in zip(mine, results, strict=True)]
    outgoing = [[pieces[one].flatten() for pieces in split] for one in range(num_ranks)]
    sent = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
    got = [[like[n].numel() for n in order if owner[n] == one] for one in range(num_ranks)]
    flat = torch.cat([like[0].new_empty(0), *(piece for pieces in outgoing for piece in pieces)])
    arrived = _exchange(group, flat, sent, [sum(sizes) for sizes in got])
    out = list(like)
    pieces = [piece for one, sizes in zip(arrived, got, strict=True) for piece in one.split(sizes)]
    for number, piece in zip(order, pieces, strict=True):
        out[number] = piece.view_as(like[number])
    return out


def _exchange(group: dist.ProcessGroup, flat: Tensor, sent: list[int], got: list[int]) -> tuple[Tensor, ...]:
    """`sent[r]` elements of `flat` to rank r; returns the `got[r]` elements from each rank r."""
    arrived = flat.new_empty(sum(got))
    dist.all_to_all_single(arrived, flat, got, sent, group=group)
    return arrived.split(got)
