"""The processes of a run: started through torchrun's own launcher, told apart, and stopped by signals.

A run that is asked to stop saves a checkpoint first, where there is something to save.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from neobert.config.deepspeed import read_zero
from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.errors import ConfigError, Problem, print_notes
from neobert.ranks import LAUNCHER
from neobert.training.loop import Interrupt
from neobert.training.runtime import Runtime, build_runtime

HANDED_ON = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"
KEY = "accelerate_config_file"
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
SWITCHES = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}  # as `accelerate launch` sets them
NUMBERS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0}  # and the least that each can be
STOP_SECONDS = 20  # from telling the others to stop to killing them, when one has died
DEAF_SECONDS = 2.0  # in which a process takes notice of a signal, unless it waits outside of Python
ONE_STOP_SECONDS = 3.0  # signals within this time are one: a scheduler and a launcher both send them
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns of the end of a job with SIGUSR1


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
    file = config.accelerate_config_file
    plan, notes = (Launch(), []) if file is None else read_accelerate(config, file)
    if nproc is not None:
        plan = replace(plan, num_processes=nproc)
    return plan if plan.num_processes * plan.num_machines > 1 else None, notes


def read_accelerate(config: Config, path: str) -> tuple[Launch, list[str]]:
    """What a file of `accelerate config` asks for, and what of it is not used. Raises ConfigError."""
    values = read_yaml(path).values

    def check(is_right: bool, problem: str) -> None:
        if not is_right:
            raise ConfigError(Problem(KEY, f"{path}: {problem}"))

    kind = str(values.get("distributed_type", "NO"))
    check(kind in KINDS, f"distributed_type {kind}; it can be {', '.join(KINDS)}")
    numbers = {name: values.get(name, default) for name, default in NUMBERS.items()}
    for name, value in numbers.items():
        is_number = isinstance(value, int) and value >= NUMBERS[name]
        check(is_number, f"{name} must be a number from {NUMBERS[name]}, got {value!r}")
    total, machines = numbers["num_processes"], numbers["num_machines"]
    check(total % machines == 0, f"{total} processes are not the same number on {machines} machines")
    address, port = values.get("main_process_ip"), values.get("main_process_port")
    check(machines == 1 or bool(address and port), "several machines need main_process_ip and main_process_port")
    precision, notes = values.get("mixed_precision"), []
    if precision is not None and str(precision) != config.trainer.mixed_precision:
        notes.append(f"{path}: mixed_precision {precision} is not used; trainer.mixed_precision is")
    if kind == "NO":
        return Launch(), notes
    endpoint = f"{address}:{port}" if machines > 1 else "localhost:0"
    return Launch(total // machines, machines, numbers["machine_rank"], endpoint, kind), notes


def launch(command: list[str] | Callable[[], None], plan: Launch, use_cpu: bool) -> int:
    """Run `neobert <command>` as planned, or a function in forks of this process, and hand signals on; returns the exit code,
    and names the process that ended first. Raises ConfigError.
    """
    num_processes, gpus = plan.num_processes, 0 if use_cpu else torch.cuda.device_count()
    if gpus and num_processes > gpus:
        why = f"{num_processes} processes, but {gpus} GPUs; or set trainer.use_cpu: true"
        raise ConfigError(Problem("--nproc", why))
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
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:  # it could not speak for itself
            name, count = signal.Signals(-code).name, num_processes * plan.num_machines
            print(
                f"error: process {rank} of {count} (pid {failure.pid}) was killed by {name}; the others were ended. "
                "Continue with --trainer.resume_from_checkpoint latest",
                file=sys.stderr,
            )
        return code if code >= 0 else 128 - code
    return 0


# --- this process -----------


@contextmanager
def stop_signals(interrupt: Interrupt) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 end a run with exit code 128 + their number.

    Before the first step there is nothing to save: the process ends at once, also where it waits for others outside of Python,
    which calls no handler. Then they are noted, and the loop ends after the step in progress, with a checkpoint. A second one
    does not disturb what the first one has begun; after `ONE_STOP_SECONDS` it ends the process at once.
    """
    first, heard = 0.0, threading.Event()  # when the first one came

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        heard.set()
        if first:
            if time.monotonic() - first > ONE_STOP_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first = time.monotonic()
        if not interrupt.has_started:
            name = signal.Signals(number).name
            print(f"stopped by {name} before the first step; nothing had to be saved", flush=True)
            sys.exit(128 + number)
        interrupt.signal = number

    arrived, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_end_when_deaf, args=(arrived, heard, interrupt), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        heard.set()
        os.write(writer, b"\0")
        listener.join()  # a thread that is left when Python ends may abort the process
        os.close(writer)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_when_deaf(arrived: int, heard: threading.Event, interrupt: Interrupt) -> None:
    """The system writes the number of every signal that has a handler to `arrived`, whatever Python is doing; 0 is the end."""
    with open(arrived, "rb", buffering=0) as numbers:
        while (number := numbers.read(1)) and number[0]:
            if number[0] in SIGNALS and not heard.wait(DEAF_SECONDS) and not interrupt.has_started:
                os._exit(128 + number[0])


@contextmanager
def started(config: Config) -> Iterator[Runtime]:
    """The runtime of this process, as configuration and launcher have it; only the main one prints. Raises ConfigError."""
    zero, names = read_zero(config, os.environ), {"use_cpu", "mixed_precision", "tf32", "engine"}
    names |= {"fsdp_hybrid", "fsdp_reshard_after_forward", "ddp_bf16_gradients"}
    runtime = build_runtime(
        **config.trainer.model_dump(include=names), zero_options=None if zero is None else zero.options
    )
    print_notes(zero.notes if zero is not None and runtime.is_main else [])
    with open(os.devnull, "w") as nowhere, nullcontext() if runtime.is_main else redirect_stdout(nowhere):
        yield runtime
    runtime.close()
