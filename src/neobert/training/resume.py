"""Continue a run from a checkpoint: on any number of processes and any engine that can hold what was saved."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.checkpoints.format import load_data, load_optimizer, load_rank_optimizer
from neobert.config.schema import Config
from neobert.data.mlm.state import join_positions
from neobert.errors import CheckpointError
from neobert.optim.build import load_optimizer_state
from neobert.optim.sharding import from_rows, local_rows
from neobert.training.length import saved_step_size
from neobert.training.loop import TrainState
from neobert.training.run import Batches, Storage
from neobert.training.run_folder import OpenRun, enter_run
from neobert.training.runtime import Runtime, load_partition


def with_saved_shards(config: Config, folder: Path, world_size: int) -> Config:
    """Where `dataset.num_shards` is not set, the data stays dealt to the shards that it was dealt to."""
    shards = load_data(folder)[0].get("fingerprint", {}).get("lanes")
    if config.dataset.num_shards is not None or shards in (None, world_size):
        return config
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"num_shards": shards})})


def continue_run(
    opened: OpenRun,
    runtime: Runtime,
    storage: Storage,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    model: nn.Module,
) -> TrainState:
    """Where the run is: at its beginning, or exactly where its checkpoint was saved. `model` as it is called.

    What is in the way in the output folder is moved aside: the run begins. Raises CheckpointError and ConfigError.
    """
    state, folder, saved = TrainState(), opened.checkpoint, opened.saved
    if folder is None:
        opened.told.extend(runtime.on_main(lambda: enter_run(opened)))
        return state
    check_engine(folder, saved, runtime)
    with runtime.open_weights(model):
        storage.load(folder)
    try:
        if runtime.zero_stage:
            load_partition(optimizer, load_rank_optimizer(folder, runtime.rank))
        else:
            load_by_name(folder, optimizer)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; was another optimizer used?") from None
    ranks = [runtime.rank] if saved["world_size"] == runtime.world_size else list(range(saved["world_size"]))
    positions = [load_data(folder, rank) for rank in ranks]
    batches.load_state_dict(*(positions[0] if len(positions) == 1 else join_positions(positions)))
    before = saved_step_size(folder, saved).rows_per_step
    state.load_state_dict({"num_rows": saved["step"] * before, **saved})
    opened.told.extend(runtime.on_main(lambda: enter_run(opened)))
    opened.told.append(f"resuming from {folder}: step {state.step:,}, {state.num_tokens:,} tokens seen")
    return state


def check_engine(folder: Path, saved: dict[str, Any], runtime: Runtime) -> None:
    """ZeRO 1 to 3 cut the optimizer's state at places that depend on the stage and the number of processes: it fits no other.

    Raises CheckpointError.
    """
    cut = {"saved": (saved.get("zero_stage", 0), saved["world_size"]), "now": (runtime.zero_stage, runtime.world_size)}
    if cut["saved"] != cut["now"] and (cut["saved"][0] or cut["now"][0]):
        words = {
            when: f"ZeRO {stage} on {count} processes" if stage else f"whole matrices on {count}"
            for when, (stage, count) in cut.items()
        }
        raise CheckpointError(
            f"{folder}: the optimizer's state was saved for {words['saved']}, and this run has {words['now']}: ZeRO's pieces "
            "cannot be put together in another way. Resume as it was saved (DDP, FSDP2 and ZeRO 0 can be changed)"
        )


def load_by_name(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, of each parameter the rows that this process holds. Raises ValueError."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }

    def rows_of(path: str) -> slice | None:
        parameter = parameters.get(path.rpartition("/")[0])
        return None if parameter is None else local_rows(parameter)

    parts = load_optimizer(folder, rows_of)
    placed = {
        path: from_rows(rows, parameters[name]) if (name := path.rpartition("/")[0]) in parameters else rows
        for path, rows in parts.items()
    }
    load_optimizer_state(optimizer, placed)
