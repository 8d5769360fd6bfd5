"""What this machine offers a process: memory that is kept, kernels that are installed, a compiler."""

import ctypes
import importlib
import os
import shutil
import sys
from typing import Any

import torch

from neobert.errors import first_line
from neobert.training.choices import check_compile

MOST_SHAPES = 64  # versions of a block that are compiled: shapes, arithmetic, with gradients or without


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


KERNELS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "liger": ("liger_kernel.transformers.functional", "liger_rms_norm"),
}


def find_kernels() -> dict[str, str]:
    """Kernels that are installed, each with what keeps it from being imported: "" where nothing does.

    They are imported, since a package built for another torch or CUDA is installed, too, and fails only then.
    """
    return {name: problem for name, where in KERNELS.items() if (problem := _import_problem(*where)) is not None}


def _import_problem(module: str, name: str) -> str | None:
    """What keeps `name` from being imported from a module: "" where nothing does, None where it is not installed."""
    try:
        getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        return None if is_itself else first_line(error)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return first_line(error)
    return ""


def compile_blocks(encoder: Any, device_type: str, backend: str, dynamic: bool | None) -> None:
    """torch.compile what lies before and after the attention of every block; the blocks share the compiled code.

    Attention itself depends on the lengths of documents, which change with every batch, and stays as it is. Shapes beyond
    `MOST_SHAPES` run uncompiled. Raises ConfigError for a backend that is unknown or cannot run here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    check_compile(backend, torch._dynamo.list_backends(None), device_type, compiler is not None)
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    encoder.is_compiled = True
    for block in encoder.layers:
        for name in ("project", "finish"):
            method = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic)
            setattr(block, name, method)
