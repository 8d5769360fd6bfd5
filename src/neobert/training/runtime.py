"""Where and how a step is computed: device, precision, compilation, processes. The only file that knows engines."""

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neobert.errors import UserError


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
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    dtype, note = choose_precision(mixed_precision, device.type, torch.cpu._is_amx_tile_supported())
    return Runtime(device, dtype, note, tf32)


def choose_device(use_cpu: bool, has_cuda: bool) -> str:
    """The device type of a run."""
    return "cuda" if has_cuda and not use_cpu else "cpu"


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


def seed_everything(*parts: int) -> None:
    """Seed torch from (seed, step, microbatch, ...), so that randomness depends on where we are, not on history."""
    torch.manual_seed(random.Random(repr(parts)).getrandbits(63))


def choose_attention(requested: str, device_type: str) -> tuple[str, str]:
    """(what the model runs, why), as the summary prints it."""
    if device_type == "cpu":
        why = "flash_attn_varlen needs CUDA; " if requested == "flash_attn_varlen" else ""
        return "ragged", f"{why}on the CPU every document is attended to by itself, and padding is left out"
    if requested == "flash_attn_varlen":
        return "ragged", "flash_attn_varlen is not built yet; documents are attended to one by one"
    return "sdpa", "torch's scaled_dot_product_attention"
