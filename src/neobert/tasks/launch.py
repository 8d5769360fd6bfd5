"""Start the processes of a run on this machine, through torchrun's own launcher, and say how they ended."""

import logging
import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from neobert.errors import ConfigError, Problem

HANDED_ON = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"
STOP_SECONDS = 20  # from telling the others to stop to killing them, when one has died


def launch(command: list[str], num_processes: int, use_cpu: bool) -> int:
    """Run `neobert <command>` in so many processes; returns the exit code. Signals are handed on. Raises ConfigError."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(Problem("--nproc", "this is already one of several processes (WORLD_SIZE is set)"))
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and num_processes > gpus:
        raise ConfigError(
            Problem("--nproc", f"{num_processes} processes, but {gpus} GPUs; or set trainer.use_cpu: true")
        )
    if not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(STOP_SECONDS)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # we say it in a line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        logs_specs=DefaultLogsSpecs(),
        monitor_interval=0.1,
        max_restarts=0,
        signals_to_handle=HANDED_ON,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "neobert", *command)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        return _explain(error, num_processes)
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
