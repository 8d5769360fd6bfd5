"""DeepSpeed's ZeRO, called directly: the part of `runtime.py` that imports deepspeed, and no other module does.

Gradients are reduced, states split and weights gathered by DeepSpeed. The loss is divided by us, the norm of the gradient is
taken and clipped by us before the update (DeepSpeed would write a NaN of float32), and the optimizer is our own, which from
stage 1 on is handed flat partitions of its groups. Weights stay float32. DeepSpeed's own checkpoints are pickles; ours hold
the state of each process's partitions as plain tensors, which fit the stage and the number of processes that wrote them.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.checkpoints.format import Tensors
from neobert.errors import ConfigError, Problem


def check_installed() -> None:
    """Raises ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        how = "pip install setuptools wheel ninja, then pip install --no-build-isolation 'neobert[deepspeed]'"
        why = f"DeepSpeed is not installed: {how}; or use trainer.engine: ddp or fsdp2"
        raise ConfigError(Problem("use_deepspeed", why))


def initialize(
    model: nn.Module, optimizer: Optimizer, options: Mapping[str, Any], device: str, dtype: torch.dtype | None
) -> tuple[nn.Module, Any]:
    """(the engine, which is called as the model is; the optimizer that steps it)."""
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed

    # an operator for inference, which would be compiled at the first run
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False,
        dist_init_required=False,
    )  # fmt: skip
    config = {
        **options,
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with these two
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    if dtype is not None:
        precision = {"enabled": True, "dtype": str(dtype).removeprefix("torch."), "lower_precision_safe_modules": []}
        config["torch_autocast"] = precision  # the list: gradients of no module are sent in less than float32
    engine, stepper, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    assert engine.dp_world_size == torch.distributed.get_world_size()  # DeepSpeed falls back to one silently
    assert is_split(stepper) == (options["zero_optimization"]["stage"] > 0)
    return engine, stepper


def is_engine(model: nn.Module) -> bool:
    """Whether `initialize` returned this model."""
    return type(model).__name__ == "DeepSpeedEngine"


def gradients(model: Any) -> tuple[list[Tensor], bool]:
    """(what this process has of the gradient after the last microbatch; whether it is split, and others have the rest)."""
    if is_engine(model) and is_split(model.optimizer):
        return [tensor for group in model.optimizer.averaged_gradients.values() for tensor in group], True
    return [p.grad for p in model.parameters() if p.grad is not None], False


def is_split(optimizer: Any) -> bool:
    """Whether an optimizer works on partitions: ZeRO 1 to 3."""
    return hasattr(optimizer, "averaged_gradients")


def _partitions(optimizer: Any) -> list[Tensor]:
    """The flat tensors that the optimizer updates in this process, in float32."""
    of_stage_3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return list(optimizer.single_partition_of_fp32_groups if of_stage_3 is None else of_stage_3)


def own_partition(optimizer: Any) -> Tensors | None:
    """The state of this process's partitions, as `<number>/<state>`, copied to the CPU; None where it is not split."""
    if not is_split(optimizer):
        return None
    return {
        f"{number}/{kind}": value.detach().to("cpu", copy=True)
        for number, partition in enumerate(_partitions(optimizer))
        for kind, value in optimizer.optimizer.state.get(partition, {}).items()
    }


def load_partition(optimizer: Any, tensors: Tensors) -> None:
    """Restore what `own_partition` gave. Raises ValueError where it does not fit."""
    partitions, state = _partitions(optimizer), optimizer.optimizer.state
    state.clear()
    for path, value in tensors.items():
        number, _, kind = path.partition("/")
        if not number.isdigit() or int(number) >= len(partitions):
            raise ValueError(f"state of a partition {number}, and there are {len(partitions)}")
        partition = partitions[int(number)]
        if value.ndim and value.shape != partition.shape:
            sizes = f"{value.numel()} numbers, the partition {partition.numel()}"
            raise ValueError(f"state of partition {number} has {sizes}")
        state[partition][kind] = value.to(partition.device) if value.ndim else value


def is_scattered(tensor: Tensor) -> bool:
    """Whether a parameter lies in pieces, under ZeRO 3."""
    return hasattr(tensor, "ds_tensor")


def local_piece(parameter: Any) -> Tensor:
    """The elements of a scattered parameter that are in this process, without padding; one dimension."""
    piece, rank = parameter.ds_tensor, torch.distributed.get_rank()
    count = min(piece.numel(), max(0, parameter.ds_numel - rank * piece.numel()))
    return piece.detach().flatten()[:count]


def whole(parameter: Any) -> Tensor:
    """A copy of a scattered parameter; every process has to ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@contextmanager
def open_weights(engine: Any) -> Iterator[None]:
    """Inside, all weights are whole in every process and may be written to, by all alike."""
    import deepspeed

    scattered = [parameter for parameter in engine.parameters() if is_scattered(parameter)]
    with deepspeed.zero.GatheredParameters(scattered, modifier_rank=0, enabled=bool(scattered)):
        yield
    if is_split(engine.optimizer):
        engine.optimizer.refresh_fp32_params()
