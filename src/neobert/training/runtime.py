"""Where and how a step is computed: device, precision, compilation, processes.

The only file that knows engines; `deepspeed.py` is its part for DeepSpeed.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.attention
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import neobert.training.deepspeed as zero
from neobert.checkpoints.format import ALONE, ProcessGroup, Tensors
from neobert.errors import UserError, disk_error, first_line
from neobert.optim.sharding import local, placement, wants_few_launches
from neobert.ranks import Ranks, launched_ranks
from neobert.training.choices import (
    allocator_settings,
    choose_attention,
    choose_copies,
    choose_device,
    choose_engine,
    choose_flash_version,
    choose_precision,
    find_kernels,
    gpu_capability,
    keep_memory,
    unused_device,
)

ENGINES = {
    "ddp": "DDP (every process holds the whole model)",
    "fsdp2": "FSDP2 (every process holds a part of the model)",
    "deepspeed": "DeepSpeed ZeRO {stage} ({split} split over them)",
}
SPLIT_BY_STAGE = ("nothing is", "optimizer state is", "optimizer state and gradients are", "the whole model is")
START_PATIENCE = timedelta(minutes=10)  # of processes that connect to each other
PATIENCE = timedelta(days=2)  # of connected processes that wait while the main one tokenises, or for a slow disk
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Runtime(Ranks):
    """One process of a run, on its device. `dtype` None: float32 throughout; else autocast to it, weights stay float32.
    `engine`: `plain` (one process), `ddp` (every process holds the whole model), `fsdp2` (torch's `fully_shard`: weights,
    gradients and optimizer state are split by rows over the processes), or `deepspeed` with its options, `zero_options`.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    note: str = ""  # why the arithmetic is not what was asked for
    tf32: bool = False  # whether float32 products on CUDA may use TF32
    engine: str = "plain"
    why: str = ""  # why this engine
    cpu_group: dist.ProcessGroup | None = None  # all processes, for long waits
    owns_group: bool = False
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    reads_late: bool = False  # the host reads what a step computed when it is needed, and does not wait for every step
    num_copies: int = 1  # that FSDP2 keeps of the model, each split over as many processes
    reshard: bool = True  # whether FSDP2 frees what it gathered for a forward pass
    bf16_gradients: bool = False  # whether DDP sums them in bfloat16

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed splits (deepspeed.py); 0 for other engines."""
        return int(self.zero_options["zero_optimization"]["stage"]) if self.engine == "deepspeed" else 0

    @property
    def arithmetic(self) -> str:
        """What products are computed in, in words."""
        if self.dtype is not None:
            return f"{str(self.dtype).removeprefix('torch.')} autocast, float32 weights"
        return "float32 with TF32 products" if self.tf32 and self.device.type == "cuda" else "float32"

    @property
    def describe(self) -> str:
        """Device and arithmetic in words, for the summary."""
        is_cpu = self.device.type == "cpu"
        name = f"cpu, {torch.get_num_threads()} threads" if is_cpu else torch.cuda.get_device_name(self.device)
        note = f" ({self.note})" if self.note else ""
        return f"{name}, {self.arithmetic}{note}"

    @property
    def describe_engine(self) -> str:
        """Processes and engine in words, for the summary."""
        count, stage, why = "one", self.zero_stage, f"; {self.why}" if self.why else ""
        if self.world_size > 1:
            count = f"{self.world_size}, {ENGINES[self.engine].format(stage=stage, split=SPLIT_BY_STAGE[stage])}"
            count += f", {self.num_copies} copies" if self.num_copies > 1 else ""
            count += ", gradients summed in bfloat16" if self.bf16_gradients and self.engine == "ddp" else ""
        return f"{count}{why}"

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def set_attention(self, model: Any, requested: str, dropout: float = 0.0) -> str:
        """Give a model of ours the attention of unpadded batches that it can have here; returns why."""
        model.model.attention_kernel, why = choose_attention(
            requested, self.device.type, dtype=self.dtype, dropout=dropout,
            head_width=model.config.hidden_size // model.config.num_attention_heads,
            packages=find_kernels() if self.device.type == "cuda" else {}, capability=gpu_capability(self.device),
        )  # fmt: skip
        known: list[str] = getattr(torch.nn.attention, "list_flash_attention_impls", list)()  # torch 2.11
        is_installed, capability = find_spec("flash_attn_interface") is not None, gpu_capability(self.device)
        version = choose_flash_version(model.model.attention_kernel, capability, known, is_installed)
        if version is None:
            return why
        try:
            torch.nn.attention.activate_flash_attention_impl(version)
        except (ImportError, RuntimeError, OSError) as error:
            return f"{why}; {version} cannot be had ({first_line(error)})"
        return f"{why}, {version}"

    def distribute(self, model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """The model as it is to be called. FSDP2 replaces parameters by shards, so the optimizer is built afterwards."""
        if self.engine == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            copy = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if self.bf16_gradients:
                copy.register_comm_hook(None, compress_gradients)
            return copy
        if self.engine == "fsdp2":
            shape, names = (self.num_copies, self.world_size // self.num_copies), ("copies", "shards")
            first = 0 if self.num_copies > 1 else 1
            mesh = init_device_mesh(self.device.type, shape[first:], mesh_dim_names=names[first:])
            policy = MixedPrecisionPolicy()
            if self.dtype is not None:  # weights are gathered in what products take; gradients are summed in float32
                policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            fully_shard(
                model, mesh=mesh, mp_policy=policy, reshard_after_forward=False
            )  # the backward pass begins with it
            assert isinstance(model, FSDPModule)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model

    def wrap_deepspeed(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """The model to call and the optimizer to step: DeepSpeed's, or with other engines what `distribute` gave."""
        if self.engine != "deepspeed":
            return model, optimizer
        return zero.initialize(model, optimizer, self.zero_options, self.device.type, self.dtype)

    def open_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, weights may be written to, by all processes alike. `model` as it is called."""
        return zero.open_weights(model) if zero.is_engine(model) else nullcontext()

    @contextmanager
    def sync_gradients(self, model: nn.Module, on: bool) -> Iterator[None]:
        """Gradients are reduced over processes at the end of a backward pass inside `sync_gradients(model, on=True)`."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(on)
        if zero.is_engine(model):
            model.set_gradient_accumulation_boundary(on)  # type: ignore[operator]
        if isinstance(model, DistributedDataParallel) and not on:
            with model.no_sync():
                yield
        else:
            yield

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """`model` as it is called. What is reduced over processes is the mean."""
        if zero.is_engine(model):
            model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
        else:
            loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Norm of the whole gradient; scales it down to `max_norm` where that is given."""
        gradients, is_split = zero.gradients(model)
        norm = total_norm(gradients, is_split)
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm

    def all_sum(self, *values: float) -> list[float]:
        """Sums over all processes, in float64 (exact for counts)."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def all_max(self, *values: float) -> list[float]:
        """The largest over all processes."""
        return [max(column) for column in zip(*self.gather(*values), strict=True)]

    def gather(self, *values: float) -> list[list[float]]:
        """The values of every process, in all of them, in float64."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self.host_group)
        return torch.stack(found).tolist()  # type: ignore[no-any-return]

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        """The processes as they exchange what the host knows, which no device has to be waited for."""
        return self.cpu_group if self.device.type == "cuda" else None

    def sum_on_device(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor on the device over all processes, in its place; the host does not wait for it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
        """What each process gives, whatever it is, in all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group or self.cpu_group)
        return values

    def first_error(self, error: UserError | None) -> UserError:
        """The error of the first process that has one, in all of them. All call it when one has."""
        return next(one for one in self.gather_objects(error) if one is not None)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes, in all of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.cpu_group)
        return tensor

    def alone(self) -> "Runtime":
        """This process on its device, for work that the others have no part in."""
        return replace(self, rank=0, world_size=1, engine="plain", cpu_group=None, owns_group=False, zero_options={})

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the main process, in all of them; so is a UserError raised, or one of a full disk."""
        if self.world_size == 1:
            return function()
        sent: list[Any] = [None, None]  # the result, the error
        if self.is_main:
            try:
                sent[0] = function()
            except UserError as error:
                sent[1] = error
            except OSError as error:
                if (failed := disk_error(error)) is None:
                    raise
                sent[1] = failed
        dist.broadcast_object_list(sent, 0, group=self.cpu_group)
        if sent[1] is not None:
            raise sent[1]
        return sent[0]

    def main_first(self, function: Callable[[], Result]) -> Result:
        """`function` in the main process, then in the others, which find what it left on the disk."""
        found: list[Result] = []
        self.on_main(lambda: found.append(function()))
        return found[0] if self.is_main else function()

    def process_group(self) -> ProcessGroup:
        """The processes of this run as those that write a checkpoint together, with a connection of their own."""
        if self.world_size == 1:
            return ALONE
        group = connect("checkpoints", dist.group.WORLD)
        return ProcessGroup(self.rank, self.world_size, lambda value: self.gather_objects(value, group))

    def close(self) -> None:
        """Leave the other processes in order, if `build_runtime` connected them."""
        if self.owns_group:
            dist.destroy_process_group()


def build_runtime(
    *,
    use_cpu: bool = False,
    mixed_precision: str = "no",
    tf32: bool = False,
    engine: str = "auto",
    zero_options: Mapping[str, Any] | None = None,
    trains: bool = True,
    fsdp_hybrid: bool = False,
    fsdp_reshard_after_forward: bool = True,
    ddp_bf16_gradients: bool = False,
) -> Runtime:
    """The runtime of this process, from what the machine has and what started it. `zero_options` are DeepSpeed's, where it is
    asked for; `trains`: gradients are computed; the rest as the keys of `trainer`. Raises ConfigError.
    """
    ranks = launched_ranks()
    engine, why = choose_engine(engine, ranks.world_size, zero_options is not None, os.environ)
    if engine == "deepspeed":
        zero.check_installed()
    num_copies = choose_copies(fsdp_hybrid and engine == "fsdp2", ranks.world_size, os.environ)
    kind = choose_device(use_cpu, torch.cuda.is_available())
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        keep_memory()
    else:
        os.environ.update(allocator_settings(os.environ))  # read when CUDA starts
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    has_amx, capability = torch.cpu._is_amx_tile_supported(), gpu_capability(device)
    dtype, note = choose_precision(mixed_precision, kind, has_amx=has_amx, capability=capability, trains=trains)
    accelerators = [name for name in ("mps", "xpu") if getattr(torch, name).is_available()]
    note = "; ".join(filter(None, (note, unused_device(use_cpu, kind, accelerators))))
    owns_group = ranks.world_size > 1 and not dist.is_initialized()
    if owns_group:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    cpu_group = connect("long waits", dist.group.WORLD) if ranks.world_size > 1 else None
    return Runtime(
        ranks.rank, ranks.world_size, device=device, dtype=dtype, note=note, tf32=tf32, engine=engine, why=why,
        cpu_group=cpu_group, owns_group=owns_group, zero_options=zero_options or {}, num_copies=num_copies,
        reshard=fsdp_reshard_after_forward, bf16_gradients=ddp_bf16_gradients,
        reads_late=kind == "cuda" and engine != "deepspeed",
    )  # fmt: skip


@cache
def connect(purpose: str, world: Any) -> dist.ProcessGroup:
    """A connection of the processes of `world` over the network for one purpose. Runs that follow each other share it."""
    group = dist.new_group(backend="gloo", timeout=START_PATIENCE)
    dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
    return group


def compress_gradients(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's bf16_compress_hook, which torch refuses under its own name where NCCL is not there; gloo runs it as well."""
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor], all_split: bool = False) -> Tensor:
    """Euclidean norm of all together, whole tensors or shards (`all_split`: all are shards); every process has to ask. Norms
    of rows, which most engines do not split, are summed in float64 on the CPU: there it does not depend on how rows are split.
    """
    tensors, whole, split = list(tensors), list[Tensor](), list[Tensor]()
    for tensor in tensors:
        is_scattered = zero.is_scattered(tensor)
        part = zero.local_piece(tensor) if is_scattered else local(tensor)
        (split if all_split or is_scattered or isinstance(tensor, DTensor) else whole).append(part)
    total = torch.zeros((), dtype=torch.float64, device=(split or whole)[0].device)
    if split:
        total = torch.stack(squares(split)).sum()
        dist.all_reduce(total, group=next((placement(x).group for x in tensors if isinstance(x, DTensor)), None))
    return (total + sum(squares(whole))).sqrt().float()


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """Sums of squares in float64: of each tensor, or of all together in one launch, whose norms are float32."""
    if tensors and wants_few_launches(tensors[0]):
        return [torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).double().square().sum()]
    rows = (torch.linalg.vector_norm(x, dim=-1) if x.ndim > 1 else x for x in tensors)
    return [row.double().square().sum() for row in rows]


def whole_weights(model: nn.Module) -> Tensors:
    """All tensors of a model, whole, copied to the CPU; empty in all processes but the main one. All have to ask."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        full = zero.whole(tensor) if zero.is_scattered(tensor) else full
        if is_main:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


own_partition, load_partition = zero.own_partition, zero.load_partition  # of an optimizer that DeepSpeed has split


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv, got 0 bytes")
    return any(sign in str(error) for sign in signs)
