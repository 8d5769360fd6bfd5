"""What a task brings to a run, and what it gets: the interface between `tasks/` and the recipe in `run.py`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neobert.checkpoints.format import Tensors
from neobert.config.explain import show_config
from neobert.config.load import Loaded
from neobert.config.schema import Config
from neobert.data.batch import Batch, Loader
from neobert.errors import ConfigError, OutOfMemory, Problem
from neobert.training.loop import Interrupt, TrainState
from neobert.training.memory import out_of_memory
from neobert.training.run_folder import OpenRun
from neobert.training.runtime import Runtime


@dataclass(frozen=True)
class Storage:
    """How a task's model goes into a checkpoint, as whole tensors that training does not write to and config.json, and comes
    back. `save_beside` writes the tokenizer and what else belongs to the model into the folder.
    """

    content: Callable[[], tuple[Tensors, dict[str, Any]]]
    load: Callable[[Path], None]
    save_beside: Callable[[Path], None]


@dataclass(frozen=True)
class StepSize:
    """Rows of a step: of one microbatch in one process, and of all; `accumulation` is what the configuration says."""

    rows_per_device: int
    accumulation: int
    num_processes: int
    rows_per_step: int


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: `run` gives its values (None: it was broken off), `headline` is a line of them, `default` the name of the
    one that decides which is best.
    """

    run: Callable[[], dict[str, float] | None]
    headline: Callable[[dict[str, float]], str]
    default: str


@dataclass(frozen=True)
class Context:
    """What a task builds its parts with: the configuration as it was loaded, this process, and the folder of the run."""

    loaded: Loaded
    runtime: Runtime
    interrupt: Interrupt
    opened: OpenRun

    @property
    def config(self) -> Config:
        return self.loaded.config

    def print_configuration(self, config: Config) -> None:
        """With `debug: true`, all keys of `config`, as the task has filled it in, and where each was set."""
        if config.debug:
            print(show_config(config, self.loaded.origins))

    def check_evaluation(self, has_data: bool) -> None:
        """Raises ConfigError for keys that act on evaluations, in a run that has no evaluation data."""
        trainer = self.config.trainer
        asked = {
            "trainer.save_strategy": trainer.save_strategy == "best",
            "trainer.early_stopping": trainer.early_stopping > 0,
            "trainer.load_best_model_at_end": trainer.load_best_model_at_end,
            "trainer.metric_for_best_model": trainer.metric_for_best_model is not None,
        }
        what = "a split named validation or test, or dataset.validation_split with streaming: false"
        problems = [Problem(dotted, f"needs evaluation data: {what}") for dotted, is_asked in asked.items() if is_asked]
        if problems and not has_data:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Finished:
    """What a run came to: the weights of `step`, which `values` belong to, if there was an evaluation."""

    folder: Path
    state: TrainState
    step: int
    exit_code: int = 0
    values: dict[str, float] = field(default_factory=dict)
    is_main: bool = True


@dataclass(frozen=True)
class Parts:
    """What a task brings to a run.

    `config` has what the task filled in, and is saved. `model(**batch.inputs(), **model_inputs)` gives `loss_sum` and
    `num_correct`. `evaluation` is built for the model as it is called. Functions that return numbers for the log, or evaluate,
    are called by all processes.
    """

    config: Config
    model: Any  # an nn.Module with a `config`
    batches: Loader
    storage: Storage
    count_left: Callable[[], int] = lambda: 0  # steps from where the data stands to its end, for max_steps: -1
    num_steps: int | None = None  # of the run, where the task decides it
    size: StepSize | None = None  # where it is not what the configuration asks for
    blocks: Iterable[nn.Module] = ()  # that FSDP2 splits one by one
    evaluation: Callable[[nn.Module], Evaluation] | None = None
    model_inputs: dict[str, Any] = field(default_factory=dict)
    after_update: Callable[[], None] = lambda: None
    empty_batch: Callable[[], Batch] | None = None  # where the data of processes ends at different steps
    ends_with_data: bool = False  # whatever the number of steps
    set_num_rows: Callable[[int], None] = lambda num_rows: None  # gets the rows of the whole run before it begins
    facts: dict[str, Any] = field(default_factory=dict)  # lines of the summary, before those of all runs
    describe_length: Callable[[int], str] = "{:,} steps".format
    more_facts: dict[str, Any] = field(default_factory=dict)  # and after them
    messages: list[str] = field(default_factory=list)
    log_metrics: Callable[[], dict[str, Tensor]] = dict  # what the task adds to the rows of the log; NaN: nothing
    end_messages: Callable[[], list[str]] = list
    on_finish: Callable[[Finished], None] | None = None  # in the main process, after the end, with values
    next_command: str = ""

    def shortage(self, error: BaseException, number: int, runtime: Runtime) -> OutOfMemory | None:
        """What to tell where step `number` ended in `error` for want of memory; None for another error."""
        return out_of_memory(error, number, self.config, self.model, runtime)
