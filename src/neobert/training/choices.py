"""What runs: what this machine offers, and decisions from that and what was asked for.

Decisions are pure functions, and each answer comes with its reason.
"""

import ctypes
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from neobert.errors import ConfigError, Problem, first_line
from neobert.model.attention import Kernel

Capability = tuple[int, int]  # of a CUDA device
MIN_CAPABILITY = (8, 0)  # Ampere: the oldest CUDA devices that multiply bfloat16 and run flash attention
PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}  # values of trainer.mixed_precision
UNUSED = {
    "mps": "the Apple GPU (MPS) is not used: it has no float64, in which sums and norms are computed",
    "xpu": "the Intel GPU (XPU) is not used: nothing here has been tried on one",
}
MOST_SHAPES = 64  # versions of a block that are compiled: shapes, arithmetic, with gradients or without
KERNELS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "liger": ("liger_kernel.transformers.functional", "liger_rms_norm"),
}


def choose_device(use_cpu: bool, has_cuda: bool) -> str:
    """The device type of a run."""
    return "cuda" if has_cuda and not use_cpu else "cpu"


def unused_device(use_cpu: bool, device_type: str, found: Collection[str]) -> str:
    """Why a run on the CPU that did not ask for it does not use the accelerators that are `found` ("mps", "xpu")."""
    return "; ".join(UNUSED[name] for name in found if device_type == "cpu" and not use_cpu)


def choose_copies(is_hybrid: bool, world_size: int, environment: Mapping[str, str]) -> int:
    """How many copies of the model FSDP2 keeps: one, or with hybrid sharding one on each node, whose number of processes the
    launcher has put into LOCAL_WORLD_SIZE. Raises ConfigError.
    """
    size = int(environment.get("LOCAL_WORLD_SIZE", "0")) if is_hybrid else world_size
    if not size or world_size % size:
        found = f"{size} of {world_size} processes on this node" if size else "LOCAL_WORLD_SIZE is not set"
        raise ConfigError(Problem("trainer.fsdp_hybrid", f"needs as many processes on every node, but {found}"))
    return world_size // size


def choose_engine(
    requested: str, world_size: int, wants_deepspeed: bool, environment: Mapping[str, str]
) -> tuple[str, str]:
    """(engine of a run: "plain", "ddp", "fsdp2" or "deepspeed"; why). Raises ConfigError for what cannot run. `environment` is
    what the launcher set; `wants_deepspeed`: it, or the configuration, asks for DeepSpeed.
    """
    names = {"fsdp2": "FSDP", "deepspeed": "DeepSpeed"}
    launched = {"fsdp2": environment.get("ACCELERATE_USE_FSDP") == "true", "deepspeed": wants_deepspeed}
    asked = [engine for engine in names if launched[engine]]
    if world_size == 1:
        whats = [f"trainer.engine: {requested} is"] if requested != "auto" else []
        whats += [f"{names[engine]} was launched, which is" for engine in asked]
        return "plain", f"{whats[0]} for several processes" if whats else ""
    if requested == "auto":
        return (asked[0], "launched for it") if asked else ("ddp", "")
    for engine in asked:
        if engine != requested:
            why = f"{requested}, but the processes were launched for {names[engine]}; use auto or {engine}"
            raise ConfigError(Problem("trainer.engine", why))
    return requested, ""


def choose_precision(
    requested: str, device: str, *, has_amx: bool = False, capability: Capability = MIN_CAPABILITY, trains: bool = True
) -> tuple[torch.dtype | None, str]:
    """(autocast type or None for float32, note where that is not what was asked for). `capability`: of a CUDA device;
    `trains`: gradients are computed, too.

    bfloat16 on a CPU without AMX is emulated: 3 to 50 times slower. float16 overflows in gradients without loss scaling, so
    only CUDA's inference computes in it; GPUs before Ampere have it instead of bfloat16.
    """
    if requested in ("no", "fp32"):
        return None, ""
    half = torch.float16 if device == "cuda" and not trains else None
    if requested == "fp16":
        why = "training in it needs loss scaling" if trains else "only CUDA devices compute in it"
        return half, "" if half else f"fp16 was asked for, but {why}; float32 is used"
    if device == "cpu" and not has_amx:
        return None, "bf16 was asked for, but this CPU has no AMX and would emulate it many times slower"
    if device == "cuda" and capability < MIN_CAPABILITY:
        found = f"this GPU has compute capability {capability[0]}.{capability[1]}, and bfloat16 begins with 8.0"
        return half, f"bf16 was asked for, but {found}; {'float16' if half else 'float32'} is used"
    return torch.bfloat16, ""


def choose_attention(
    requested: str,
    device_type: str,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    dropout: float = 0.0,
    head_width: int = 64,
    packages: Mapping[str, str] = MappingProxyType({}),
    capability: Capability = MIN_CAPABILITY,
) -> tuple[Kernel, str]:
    """(kernel of unpadded batches; why). `packages` as `find_kernels` finds them. On CUDA all documents of a batch are one
    call, by one kernel or another: the reason says why not by the fastest, and what would help.
    """
    if device_type == "cpu":
        why = "flash_attn_varlen needs CUDA; " if requested == "flash_attn_varlen" else ""
        return "sdpa", f"{why}on the CPU every document is attended to by itself, and padding is left out"
    if device_type != "cuda":
        return "sdpa", "torch's scaled_dot_product_attention; packed documents one by one"
    found, varlen, flash = f"{capability[0]}.{capability[1]}", packages.get("torch_varlen"), packages.get("flash_attn")
    one_call = "documents of any length in one call, by {}; padding is left out"
    efficient = one_call.format("torch's memory-efficient kernel")
    obstacles: dict[str, object] = {
        "float32 (trainer.mixed_precision: bf16 is several times faster)": dtype is None,
        f"a GPU of compute capability {found}, and the others begin with 8.0": capability < MIN_CAPABILITY,
        f"a head is {head_width} wide, and the others take multiples of 8 up to 256": head_width % 8
        or head_width > 256,
    }
    if not any(obstacles.values()):
        if flash == "" and requested == "flash_attn_varlen":
            return "flash_attn", one_call.format("the flash-attn package")
        if varlen == "" and not dropout:
            return "torch_varlen", one_call.format("torch's own kernel")
    obstacles |= {
        f"flash-attn is installed and cannot be imported ({flash})": flash and requested == "flash_attn_varlen",
        "dropout of its weights (model.attn_backend: flash_attn_varlen with neobert[flash], or model.dropout_prob: 0)": dropout,
        "no other kernel can be imported (pip install 'neobert[flash]', or torch 2.10 or newer)": True,
    }
    return "torch_efficient", f"{efficient}: " + next(why for why, holds in obstacles.items() if holds)


def choose_flash_version(
    kernel: Kernel, capability: Capability, known: Collection[str], is_installed: bool
) -> str | None:
    """Which newer flash attention torch's own kernels are to call ("FA3"), or None: FlashAttention 3 on Hopper, where torch
    knows it and its package is installed.
    """
    is_hopper = (9, 0) <= capability < (10, 0)
    return "FA3" if kernel == "torch_varlen" and is_hopper and "FA3" in known and is_installed else None


def choose_kernels(
    requested: str, device_type: str, liger_problem: str | None, is_compiled: bool = False
) -> tuple[str, str]:
    """(kernels of norms and SwiGLU: "torch" or "liger"; why). `liger_problem`: what keeps Liger from being imported, ""
    where nothing does, None where it is not installed. Raises ConfigError for Liger that is asked for and cannot be had.
    """
    if device_type == "cpu":
        why = "liger needs CUDA; " if requested == "liger" else ""
        return "torch", f"{why}on the CPU norms, SwiGLU and the loss are single fused functions"
    if requested == "liger" and liger_problem != "":
        why = "is not installed: pip install 'neobert[liger]'" if liger_problem is None else f"fails: {liger_problem}"
        raise ConfigError(Problem("model.kernel_backend", f"liger-kernel {why}, or use auto"))
    if is_compiled:
        return "torch", "torch's own operators, which the compiler fuses; it cannot look into Liger's"
    if requested == "torch" or liger_problem != "":
        hint = "; pip install 'neobert[liger]' for faster norms"
        hint = f"; liger-kernel cannot be imported ({liger_problem})" if liger_problem else hint
        return "torch", f"torch's own operators{hint if requested == 'auto' else ''}"
    return "liger", "RMSNorm and SwiGLU are Liger's fused kernels; the loss is ours, which does not wait for the device"


def check_compile(backend: str, known: Collection[str], device_type: str, has_compiler: bool) -> None:
    """Raises ConfigError for a compile backend that cannot run here."""
    if backend not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(Problem("trainer.torch_compile_backend", f"no backend {backend!r}; there are: {names}"))
    if backend == "inductor" and device_type == "cpu" and not has_compiler:
        why = "inductor needs a C++ compiler on the CPU; install g++ or set it to false"
        raise ConfigError(Problem("trainer.torch_compile", why))


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back, so that a step reuses the pages of the step before. Large
    tensors are otherwise mapped and zeroed by the kernel again and again: 10 to 15 % of a training step on a CPU.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
            for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
                library.mallopt(option, value)


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What lets CUDA's allocator grow its segments, so that sizes that change leave no holes; the user's own settings win."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return {} if any(name in environment for name in names) else {names[0]: "expandable_segments:True"}


def gpu_capability(device: torch.device) -> Capability:
    """CUDA's compute capability; (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def find_kernels() -> dict[str, str]:
    """Kernels that are installed, each with what keeps it from being imported: "" where nothing does. They are imported,
    since a package built for another torch or CUDA is installed, too, and fails only then.
    """
    found = {}
    for kernel, (module, function) in KERNELS.items():
        try:
            getattr(importlib.import_module(module), function)
            found[kernel] = ""
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{module}.".startswith(f"{missing}."):  # else the package is not installed
                found[kernel] = first_line(error)
    return found


def dynamic_shapes(requested: bool | None, is_packed: bool) -> bool | None:
    """`dynamic` of torch.compile: of rows that are not packed every batch has another number of tokens, so that compiling
    for the first would be in vain.
    """
    return True if requested is None and not is_packed else requested


def _write_libraries_whole() -> None:
    """From now on what inductor's C++ compiler writes gets its name when it is whole. Inductor takes a file that is there for
    compiled, in a cache that all runs share: a compiler that was killed left an empty library, and runs failed ever after.
    """
    from torch._inductor import cpp_builder

    compile_to = cpp_builder.run_compile_cmd
    if getattr(compile_to, "is_whole", False):
        return

    def compile_whole(command: str, cwd: str) -> None:
        words = shlex.split(command)
        if "-o" not in words:
            return compile_to(command, cwd)
        at = words.index("-o") + 1
        target, words[at] = words[at], f"{words[at]}.{os.getpid()}.tmp"
        try:
            compile_to(shlex.join(words), cwd)
            os.replace(os.path.join(cwd, words[at]), os.path.join(cwd, target))
        except BaseException:
            Path(cwd, words[at]).unlink(missing_ok=True)
            raise

    compile_whole.is_whole = True  # type: ignore[attr-defined]
    cpp_builder.run_compile_cmd = compile_whole


def compile_blocks(encoder: Any, device_type: str, backend: str, dynamic: bool | None, mode: str | None = None) -> None:
    """torch.compile what lies before and after the attention of every block; the blocks share the compiled code.

    Attention itself depends on the lengths of documents, which change with every batch, and stays as it is. Shapes beyond
    `MOST_SHAPES` run uncompiled. Raises ConfigError for a backend that is unknown or cannot run here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    check_compile(backend, torch._dynamo.list_backends(None), device_type, compiler is not None)
    if backend == "inductor":
        _write_libraries_whole()
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    encoder.is_compiled = True
    for block in encoder.layers:
        for name in ("project", "finish"):
            method = torch.compile(getattr(block, name), backend=backend, dynamic=dynamic, mode=mode)
            setattr(block, name, method)
    if mode in ("reduce-overhead", "max-autotune"):  # which record CUDA graphs
        encoder.layers[0].register_forward_pre_hook(mark_batch)


def mark_batch(block: torch.nn.Module, inputs: Any) -> None:
    """An evaluation's next batch begins: what CUDA graphs gave for the one before may be overwritten."""
    if not block.training:
        torch.compiler.cudagraph_mark_step_begin()
