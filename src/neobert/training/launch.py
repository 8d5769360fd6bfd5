"""Start the processes of a run, through torchrun's own launcher, and say how they ended."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.errors import ConfigError, Problem
from neobert.ranks import LAUNCHER

HANDED_ON = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"
KEY = "accelerate_config_file"
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
SWITCHES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}  # as `accelerate launch` sets them
NUMBERS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0}  # and the least that each can be
STOP_SECONDS = 20  # from telling the others to stop to killing them, when one has died


@dataclass(frozen=True)
class Launch:
    """Which processes to start: `num_processes` on this machine, number `machine` of `num_machines` that meet at `endpoint`."""

    num_processes: int = 1
    num_machines: int = 1
    machine: int = 0
    endpoint: str = "localhost:0"
    kind: str = ""  # of Accelerate's `distributed_type`


def plan_launch(config: Config, nproc: int | None) -> tuple[Launch | None, list[str]]:
    """(what to start, or None where this process is the run or a part of it; what to tell). Raises ConfigError."""
    if "WORLD_SIZE" in os.environ:
        if nproc is not None:
            raise ConfigError(Problem("--nproc", "this is already one of several processes (WORLD_SIZE is set)"))
        return None, []
    plan, notes = Launch(), list[str]()
    if config.accelerate_config_file is not None:
        plan, notes = read_accelerate(config, config.accelerate_config_file)
    if nproc is not None:
        plan = replace(plan, num_processes=nproc)
    return plan if plan.num_processes * plan.num_machines > 1 else None, notes


def read_accelerate(config: Config, path: str) -> tuple[Launch, list[str]]:
    """What a file of `accelerate config` asks for, and what of it is not used. Raises ConfigError."""
    values = read_yaml(path).values
    kind = str(values.get("distributed_type", "NO"))
    if kind not in KINDS:
        raise ConfigError(Problem(KEY, f"{path}: distributed_type {kind}; it can be {', '.join(KINDS)}"))
    numbers = {name: values.get(name, default) for name, default in NUMBERS.items()}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < NUMBERS[name]:
            raise ConfigError(Problem(KEY, f"{path}: {name} must be a number from {NUMBERS[name]}, got {value!r}"))
    total, machines = numbers["num_processes"], numbers["num_machines"]
    if total % machines:
        raise ConfigError(Problem(KEY, f"{path}: {total} processes are not the same number on {machines} machines"))
    if machines > 1 and not (values.get("main_process_ip") and values.get("main_process_port")):
        raise ConfigError(Problem(KEY, f"{path}: several machines need main_process_ip and main_process_port"))
    endpoint = f"{values['main_process_ip']}:{values['main_process_port']}" if machines > 1 else "localhost:0"
    notes = []
    precision = values.get("mixed_precision")
    if precision is not None and str(precision) != config.trainer.mixed_precision:
        notes.append(f"{path}: mixed_precision {precision} is not used; trainer.mixed_precision is")
    if kind == "NO":
        return Launch(), notes
    return Launch(total // machines, machines, numbers["machine_rank"], endpoint, kind), notes


def launch(command: list[str] | Callable[[], None], plan: Launch, use_cpu: bool) -> int:
    """Run `neobert <command>` as planned, or a function in forks of this process; returns the exit code. Signals are handed
    on. Raises ConfigError.
    """
    num_processes = plan.num_processes
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and num_processes > gpus:
        raise ConfigError(
            Problem("--nproc", f"{num_processes} processes, but {gpus} GPUs; or set trainer.use_cpu: true")
        )
    if not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    if plan.kind in SWITCHES:
        os.environ[SWITCHES[plan.kind]] = "true"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(STOP_SECONDS)
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # we say it in a line
    several = plan.num_machines > 1
    config = LaunchConfig(
        min_nodes=plan.num_machines,
        max_nodes=plan.num_machines,
        nproc_per_node=num_processes,
        run_id="neobert" if several else str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint=plan.endpoint,
        rdzv_configs={"is_host": plan.machine == 0} if several else {},
        logs_specs=DefaultLogsSpecs(os.devnull),  # by default a folder of temporary files, which stays
        start_method="fork",  # of a function
        monitor_interval=0.1,
        max_restarts=0,
        signals_to_handle=HANDED_ON,
    )
    try:
        if callable(command):
            elastic_launch(config, command)()
        else:
            elastic_launch(config, sys.executable)("-m", "neobert", *command)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        return _explain(error, num_processes * plan.num_machines)
    return 0


def _explain(error: ChildFailedError, num_processes: int) -> int:
    """Name the process that ended first, where it could not speak for itself; returns its exit code."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code >= 0:
        return code
    print(
        f"error: process {rank} of {num_processes} (pid {failure.pid}) was killed by {signal.Signals(-code).name}; the others "
        "were ended. Continue with --trainer.resume_from_checkpoint latest",
        file=sys.stderr,
    )
    return 128 - code
