"""Tensors that several processes share: which rows each of them holds, and which of them works on which matrix.

A matrix is orthogonalised whole, by one rank: its owner. Ranks that hold copies (DDP) divide the matrices among themselves and
broadcast results, so their weights stay identical to the bit; ranks that hold rows of each (FSDP2's `fully_shard`) send
their rows to the owner and get their rows of the result back. Either way a step moves every matrix about once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Compute = Callable[[list[int], list[Tensor]], list[Tensor]]  # (numbers of matrices, whole matrices) -> results
Pieces = list[tuple[Tensor, ...]]  # from each rank, flat


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wants_few_launches(tensor: Tensor) -> bool:
    """Whether a device takes one operator on many tensors faster than many operators: all but the CPU do."""
    return tensor.device.type != "cpu"


def split_rows(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows of a matrix that `Shard(0)` puts on a rank: equal runs, the last ones shorter or empty."""
    run = -(-num_rows // num_ranks)
    return slice(min(num_rows, rank * run), min(num_rows, (rank + 1) * run))


def local_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that are in this process."""
    if isinstance(tensor, DTensor) and tensor.ndim:
        mesh, dim = tensor.device_mesh, next(dim for dim, where in enumerate(tensor.placements) if where.is_shard())
        return split_rows(tensor.shape[0], mesh.get_local_rank(dim), mesh.size(dim))
    return slice(0, tensor.shape[0] if tensor.ndim else 0)


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this process has its rows in the first of the copies that there are of them (hybrid sharding)."""
    coordinates = tensor.device_mesh.get_coordinate() or []
    return all(at == 0 for at, where in zip(coordinates, tensor.placements, strict=True) if where.is_replicate())


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The rows that `local_rows(like)` names, as a tensor that is split as `like` is."""
    if not isinstance(like, DTensor) or not rows.ndim:
        return rows
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(rows.to(like.device), mesh, like.placements, run_check=False, shape=shape, stride=stride)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, split as `like` is; scalars and tensors that are split stay as they are."""
    is_whole = whole.ndim and not isinstance(whole, DTensor)
    return from_rows(whole[local_rows(like)], like) if is_whole else whole


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
        group = parameter.device_mesh.get_group(splits[0][0] if splits else 0)
        if len(splits) > 1 or any(not isinstance(where, Shard) or where.dim for _, where in splits):
            raise ValueError(f"a matrix placed as {parameter.placements}: only whole rows may be split over ranks")
        if splits:
            return Placement(group, True)
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
    group = where.group
    if group is None:
        return compute(list(range(len(matrices))), matrices)
    owner = owners([rows * x.shape[1] for rows, x in zip(num_rows, matrices, strict=True)], dist.get_world_size(group))
    owned = [[n for n, one in enumerate(owner) if one == rank] for rank in range(dist.get_world_size(group))]
    if where.is_split:
        arrived = _exchange_rows(group, owned, matrices, num_rows, compute)
    else:
        arrived = _broadcast(group, owned, matrices, compute)
    out = list(matrices)
    for numbers, pieces in zip(owned, arrived, strict=True):
        for number, piece in zip(numbers, pieces, strict=True):
            out[number] = piece.view_as(matrices[number])
    return out


def _broadcast(group: dist.ProcessGroup, owned: list[list[int]], like: list[Tensor], compute: Compute) -> Pieces:
    """Every rank's results to all ranks, one message from each."""
    arrived, messages = [], []
    for source, numbers in enumerate(owned):
        sizes = [like[n].numel() for n in numbers]
        if source == dist.get_rank(group) and numbers:  # while the messages of earlier ranks are on their way
            flat = torch.cat([x.flatten() for x in compute(numbers, [like[n] for n in numbers])])
        else:
            flat = like[0].new_empty(sum(sizes))
        if numbers:
            messages.append(dist.broadcast(flat, group=group, group_src=source, async_op=True))
        arrived.append(flat.split(sizes))
    for message in messages:
        message.wait()
    return arrived


def _exchange_rows(
    group: dist.ProcessGroup, owned: list[list[int]], parts: list[Tensor], num_rows: list[int], compute: Compute
) -> Pieces:
    """Every rank's rows of each matrix to its owner, which computes it, and the rows of the results back."""
    ranks, mine = range(len(owned)), owned[dist.get_rank(group)]
    spans = [[split_rows(num_rows[n], rank, len(owned)) for rank in ranks] for n in mine]
    counts = [
        [rows.stop - rows.start for rows in of_ranks] for of_ranks in spans
    ]  # of each of my matrices on every rank
    to_owners = [[parts[n].numel() for n in numbers] for numbers in owned]
    to_ranks = [[rows[rank] * parts[n].shape[1] for n, rows in zip(mine, counts, strict=True)] for rank in ranks]
    outgoing = torch.cat([parts[n].flatten() for numbers in owned for n in numbers])
    pieces = _all_to_all(group, outgoing, to_owners, to_ranks)
    whole = [torch.cat([one[at] for one in pieces]).view(-1, parts[n].shape[1]) for at, n in enumerate(mine)]
    results = [result.split(rows) for result, rows in zip(compute(mine, whole), counts, strict=True)]
    outgoing = torch.cat([parts[0].new_empty(0), *(rows[rank].flatten() for rank in ranks for rows in results)])
    return _all_to_all(group, outgoing, to_ranks, to_owners)


def _all_to_all(group: dist.ProcessGroup, outgoing: Tensor, sent: list[list[int]], received: list[list[int]]) -> Pieces:
    """Pieces of `sent[r]` elements to rank r, which lie in this order in `outgoing`; the pieces from each rank."""
    totals = [sum(sizes) for sizes in received]
    arrived = outgoing.new_empty(sum(totals))
    dist.all_to_all_single(arrived, outgoing, totals, [sum(sizes) for sizes in sent], group=group)
    return [flat.split(sizes) for flat, sizes in zip(arrived.split(totals), received, strict=True)]
