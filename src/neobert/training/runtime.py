"""Where and how a step is computed: device, precision, compilation, processes. The only file that knows engines."""

import ctypes
import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from neobert.errors import UserError
from neobert.training.checkpoint import ALONE, Team, Tensors
from neobert.training.choices import check_compile, choose_device, choose_engine, choose_precision, describe_arithmetic

NAMES = {"ddp": "DDP (every process holds the whole model)", "fsdp2": "FSDP2 (every process holds a part of the model)"}
PATIENCE = timedelta(days=2)  # of processes that wait while the main one tokenises, or for a slow disk
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """One process of a run. `dtype` None: float32 throughout; else autocast to it, weights stay float32.

    `engine`: `plain` (one process), `ddp` (every process holds the whole model), or `fsdp2` (torch's `fully_shard`: weights,
    gradients and optimizer state are split by rows over the processes).
    """

    device: torch.device
    dtype: torch.dtype | None
    note: str = ""  # why the arithmetic is not what was asked for
    tf32: bool = False  # whether float32 products on CUDA may use TF32
    rank: int = 0
    world_size: int = 1
    engine: str = "plain"
    why: str = ""  # why this engine
    patient: dist.ProcessGroup | None = None  # all processes, for long waits
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, and writes the files of which there is one."""
        return self.rank == 0

    @property
    def describe(self) -> str:
        """Device and arithmetic in words, for the summary."""
        kind = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
        return f"{kind}{threads}, {describe_arithmetic(self.dtype, self.device.type, self.tf32)}" + (
            f" ({self.note})" if self.note else ""
        )

    @property
    def describe_engine(self) -> str:
        """Processes and engine in words, for the summary."""
        count = "one" if self.world_size == 1 else f"{self.world_size}, {NAMES[self.engine]}"
        return f"{count}; {self.why}" if self.why else count

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    # --- the model -----------

    def distribute(self, model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """The model as it is to be called. FSDP2 replaces parameters by shards, so the optimizer is built afterwards."""
        if self.engine == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.engine == "fsdp2":
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model, FSDPModule)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model

    @contextmanager
    def sync_gradients(self, model: nn.Module, on: bool) -> Iterator[None]:
        """Gradients are reduced over processes at the end of a backward pass inside `sync_gradients(model, on=True)`."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(on)
        if isinstance(model, DistributedDataParallel) and not on:
            with model.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Norm of the whole gradient; scales it down to `max_norm` where that is given."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # --- the other processes -----------

    def all_sum(self, *values: float) -> list[float]:
        """Sums over all processes, in float64 (exact for counts)."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_max(self, *values: float) -> list[float]:
        """The largest over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], how: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the main process, in all of them. A UserError is raised in all of them."""
        if self.world_size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = function()
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told, 0, group=self.patient)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def main_first(self, function: Callable[[], Result]) -> Result:
        """`function` in the main process, then in the others, which find what it left on the disk."""
        found: list[Result] = []
        self.on_main(lambda: found.append(function()))
        return found[0] if self.is_main else function()

    def team(self) -> Team:
        """The processes of this run as those that write a checkpoint together, with a connection of their own."""
        if self.world_size == 1:
            return ALONE
        group = dist.new_group(backend="gloo", timeout=PATIENCE)

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * self.world_size
            dist.all_gather_object(values, value, group=group)
            return values

        return Team(self.rank, self.world_size, gather)

    def close(self) -> None:
        """Leave the other processes in order, if `build_runtime` connected them."""
        if self.owns_group:
            dist.destroy_process_group()


def build_runtime(
    *, use_cpu: bool, mixed_precision: str, tf32: bool, engine: str = "auto", use_deepspeed: bool = True
) -> Runtime:
    """The runtime of this process, from what the machine has and what started it. Raises ConfigError."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in PLACE.items())
    engine, why = choose_engine(engine, world_size, use_deepspeed, os.environ)
    kind = choose_device(use_cpu, torch.cuda.is_available())
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        keep_memory()
    else:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    dtype, note = choose_precision(mixed_precision, kind, torch.cpu._is_amx_tile_supported())
    patient, owns_group = None, world_size > 1 and not dist.is_initialized()
    if owns_group:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if world_size > 1:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Runtime(device, dtype, note, tf32, rank, world_size, engine, why, patient, owns_group)


PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # as torchrun sets them


# --- tensors that are split over processes -----------


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all together, whole tensors or shards; every process has to ask.

    Norms of rows, which nobody splits, are summed in float64, so that the result does not depend on who holds which rows.
    """
    whole: list[Tensor] = []
    split: list[Tensor] = []
    for tensor in tensors:
        is_split = isinstance(tensor, DTensor)
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        rows = torch.linalg.vector_norm(held, dim=-1) if held.ndim > 1 else held
        (split if is_split else whole).append(rows.double().square().sum())
    total = torch.stack(split).sum() if split else torch.zeros((), dtype=torch.float64, device=whole[0].device)
    if split:
        dist.all_reduce(total)
    return (total + sum(whole)).sqrt().float()


def whole_weights(model: nn.Module) -> Tensors:
    """All tensors of a model, whole, copied to the CPU; empty in all processes but the main one. All have to ask."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


def load_whole(model: nn.Module, weights: Tensors) -> None:
    """Load whole tensors; each process takes its part."""
    own = model.state_dict()
    model.load_state_dict({name: _part_of(weights[name], tensor) for name, tensor in own.items()})


def _part_of(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def held_parts(state: Tensors, is_main: bool) -> tuple[Tensors, dict[str, int]]:
    """What this process has to save of optimizer state, copied to the CPU, and the first row of each part: its shards; of
    state that all processes have, everything in the main one.
    """
    parts, first_rows = {}, {}
    for path, tensor in state.items():
        if isinstance(tensor, DTensor):
            first_rows[path] = held_rows(tensor).start
            parts[path] = tensor.to_local().detach().to("cpu", copy=True)
        elif is_main:
            parts[path] = tensor.detach().to("cpu", copy=True)
    return parts, first_rows


def held_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that are in this process: equal runs, the last ones shorter or empty."""
    num_rows = tensor.shape[0] if tensor.ndim else 0
    if not isinstance(tensor, DTensor):
        return slice(0, num_rows)
    mesh = tensor.device_mesh
    run, rank = -(-num_rows // mesh.size()), mesh.get_local_rank()
    return slice(min(num_rows, rank * run), min(num_rows, (rank + 1) * run))


def as_part_of(rows: Tensor, parameter: Tensor) -> Tensor:
    """Rows that `held_rows(parameter)` names, as a tensor that is split as `parameter` is."""
    if not isinstance(parameter, DTensor) or not rows.ndim:
        return rows
    local = rows.to(parameter.device)
    mesh, where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, where, run_check=False, shape=parameter.shape, stride=parameter.stride())


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "failed to recv, got 0 bytes")
    return any(sign in str(error) for sign in signs)


# --- this process -----------


def seed_everything(*parts: int) -> None:
    """Seed torch from (seed, step, microbatch, ...), so that randomness depends on where we are, not on history."""
    torch.manual_seed(random.Random(repr(parts)).getrandbits(63))


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back, so that a step reuses the pages of the step before.

    Large tensors are otherwise mapped and zeroed by the kernel again and again: 10 to 15 % of a training step on a CPU.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
            for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
                library.mallopt(option, value)


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def find_kernels() -> tuple[set[str], bool]:
    """(attention kernels that are installed, whether liger-kernel is)."""
    modules = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}
    return {name for name, module in modules.items() if _installed(module)}, _installed("liger_kernel")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compile_blocks(blocks: Iterable[nn.Module], runtime: Runtime, backend: str, dynamic: bool | None) -> None:
    """torch.compile what lies before and after the attention of every block; the blocks share the compiled code.

    Attention itself depends on the lengths of documents, which change with every batch, and stays as it is. Raises
    ConfigError for a backend that is unknown or cannot run here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    check_compile(backend, torch._dynamo.list_backends(None), runtime.device.type, compiler is not None)
    for block in blocks:
        for name in ("project", "finish"):
            method = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic, fullgraph=True)
            setattr(block, name, method)
