"""What this machine offers a process: memory that is kept, kernels that are installed, a compiler."""

import ctypes
import importlib.util
import os
import shutil
import sys
from typing import Any

import torch

from neobert.training.choices import check_compile


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


def compile_blocks(encoder: Any, device_type: str, backend: str, dynamic: bool | None) -> None:
    """torch.compile what lies before and after the attention of every block of an encoder; the blocks share the
    compiled code.

    Attention itself depends on the lengths of documents, which change with every batch, and stays as it is. Raises
    ConfigError for a backend that is unknown or cannot run here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    check_compile(backend, torch._dynamo.list_backends(None), device_type, compiler is not None)
    encoder.is_compiled = True
    for block in encoder.layers:
        for name in ("project", "finish"):
            method = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic, fullgraph=True)
            setattr(block, name, method)
