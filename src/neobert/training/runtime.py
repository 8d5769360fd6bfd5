"""Where and how a step is computed: device, precision, compilation, processes. The only file that knows engines."""

import ctypes
import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neobert.errors import UserError
from neobert.training.choices import check_compile, choose_device, choose_precision, describe_arithmetic


@dataclass(frozen=True)
class Runtime:
    """One process of a run. `dtype` None: float32 throughout; else autocast to it, weights stay float32."""

    device: torch.device
    dtype: torch.dtype | None
    note: str = ""  # why the arithmetic is not what was asked for
    tf32: bool = False  # whether float32 products on CUDA may use TF32
    rank: int = 0
    world_size: int = 1

    @property
    def describe(self) -> str:
        """Device and arithmetic in words, for the summary."""
        kind = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
        return f"{kind}{threads}, {describe_arithmetic(self.dtype, self.device.type, self.tf32)}" + (
            f" ({self.note})" if self.note else ""
        )

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def all_sum(self, value: int) -> int:
        """The sum over all processes."""
        return value

    @contextmanager
    def sync_gradients(self, on: bool) -> Iterator[None]:
        """Gradients are reduced over processes at the end of a backward pass inside `sync_gradients(on=True)`."""
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Norm of the whole gradient; scales it down to `max_norm` where that is given."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def build_runtime(*, use_cpu: bool, mixed_precision: str, tf32: bool) -> Runtime:
    """The runtime of this process, from what the machine has. Raises UserError when started by a parallel launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("started as one of several processes (WORLD_SIZE > 1); this version trains in one process")
    device = torch.device(choose_device(use_cpu, torch.cuda.is_available()))
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    dtype, note = choose_precision(mixed_precision, device.type, torch.cpu._is_amx_tile_supported())
    return Runtime(device, dtype, note, tf32)


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
