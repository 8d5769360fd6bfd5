"""What runs, decided from what was asked for and what the machine has: pure functions, each answer with its reason."""

from collections.abc import Collection, Mapping

import torch

from neobert.errors import ConfigError, Problem

MIN_CAPABILITY = (8, 0)  # Ampere: the oldest CUDA devices that flash attention runs on


def choose_device(use_cpu: bool, has_cuda: bool) -> str:
    """The device type of a run."""
    return "cuda" if has_cuda and not use_cpu else "cpu"


def choose_engine(
    requested: str, world_size: int, wants_deepspeed: bool, environment: Mapping[str, str]
) -> tuple[str, str]:
    """(engine of a run: "plain", "ddp", "fsdp2" or "deepspeed"; why). `environment` is what the launcher set;
    `wants_deepspeed`: it, or the configuration, asks for DeepSpeed.

    Raises ConfigError for what cannot run.
    """
    launched = {
        "fsdp2": environment.get("ACCELERATE_USE_FSDP") == "true",
        "deepspeed": wants_deepspeed,
    }
    names = {"fsdp2": "FSDP", "deepspeed": "DeepSpeed"}
    if world_size == 1:
        whats = [f"trainer.engine: {requested} is"] if requested != "auto" else []
        whats += [f"{names[engine]} was launched, which is" for engine, is_wanted in launched.items() if is_wanted]
        return "plain", f"{whats[0]} for several processes" if whats else ""
    for engine, is_wanted in launched.items():
        if is_wanted and requested not in ("auto", engine):
            name = names[engine]
            raise ConfigError(
                Problem(
                    "trainer.engine", f"{requested}, but the processes were launched for {name}; use auto or {engine}"
                )
            )
        if is_wanted and requested == "auto":
            return engine, "launched for it"
    return ("ddp" if requested == "auto" else requested), ""


def describe_arithmetic(dtype: torch.dtype | None, device_type: str, tf32: bool) -> str:
    """In words: what products are computed in."""
    if dtype is not None:
        return f"{str(dtype).removeprefix('torch.')} autocast, float32 weights"
    return "float32 with TF32 products" if tf32 and device_type == "cuda" else "float32"


def choose_precision(requested: str, device_type: str, cpu_has_amx: bool) -> tuple[torch.dtype | None, str]:
    """(autocast type or None for float32, note). bfloat16 on a CPU without AMX is emulated: 3 to 50 times slower."""
    if requested != "bf16":
        return None, ""
    if device_type == "cpu" and not cpu_has_amx:
        return None, "bf16 was asked for, but this CPU has no AMX and would emulate it many times slower"
    return torch.bfloat16, ""


def choose_attention(
    requested: str,
    device_type: str,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    dropout: float = 0.0,
    head_width: int = 64,
    packages: Collection[str] = (),
    capability: tuple[int, int] = MIN_CAPABILITY,
) -> tuple[str, str]:
    """(kernel of ragged batches: "sdpa", "flash_attn" or "torch_varlen"; why). `packages`: those of the two installed.

    A request that cannot be honoured falls back to SDPA, which computes the same, and the reason says what would help.
    """
    if device_type == "cpu":
        why = "flash_attn_varlen needs CUDA; " if requested == "flash_attn_varlen" else ""
        return "sdpa", f"{why}on the CPU every document is attended to by itself, and padding is left out"
    if requested == "sdpa":
        return "sdpa", "torch's scaled_dot_product_attention; packed documents one by one"
    no = "flash_attn_varlen falls back to sdpa: "
    if dtype is None:
        return "sdpa", f"{no}it computes in bfloat16 (set trainer.mixed_precision: bf16)"
    if capability < MIN_CAPABILITY:
        return (
            "sdpa",
            f"{no}it needs a GPU of compute capability 8.0 or newer; this one has {capability[0]}.{capability[1]}",
        )
    if head_width % 8 or head_width > 256:
        return "sdpa", f"{no}a head is {head_width} wide, and it takes multiples of 8 up to 256"
    if "flash_attn" in packages:
        return "flash_attn", "documents of any length in one call, by the flash-attn package; padding is left out"
    if dropout:
        return "sdpa", f"{no}torch's own kernel has no dropout (pip install 'neobert[flash]', or model.dropout_prob: 0)"
    if "torch_varlen" in packages:
        return "torch_varlen", "documents of any length in one call, by torch's own kernel; padding is left out"
    return "sdpa", f"{no}no kernel is installed (pip install 'neobert[flash]', or torch 2.10 or newer)"


def choose_kernels(requested: str, device_type: str, has_liger: bool) -> tuple[str, str]:
    """(kernels of norms, SwiGLU and loss: "torch" or "liger"; why). Raises ConfigError for liger that is not installed."""
    if device_type == "cpu":
        why = "liger needs CUDA; " if requested == "liger" else ""
        return "torch", f"{why}on the CPU norms, SwiGLU and the loss are single fused functions"
    if requested == "liger" and not has_liger:
        raise ConfigError(
            Problem("model.kernel_backend", "liger-kernel is not installed: pip install 'neobert[liger]', or use auto")
        )
    if requested == "torch" or not has_liger:
        hint = "; pip install 'neobert[liger]' for faster norms and loss" if requested == "auto" else ""
        return "torch", f"torch's own operators{hint}"
    return "liger", "RMSNorm, SwiGLU and the linear cross-entropy are Liger's fused kernels"


def check_compile(backend: str, known: Collection[str], device_type: str, has_compiler: bool) -> None:
    """Raises ConfigError for a compile backend that cannot run here."""
    if backend not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(Problem("trainer.torch_compile_backend", f"no backend {backend!r}; there are: {names}"))
    if backend == "inductor" and device_type == "cpu" and not has_compiler:
        raise ConfigError(
            Problem("trainer.torch_compile", "inductor needs a C++ compiler on the CPU; install g++ or set it to false")
        )
