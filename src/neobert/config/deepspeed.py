"""What a run asks of DeepSpeed: a stage of ZeRO and options of its own, from its JSON, a file of Accelerate, or a launcher.
What that JSON says of our own keys (`OURS`) is not used, and a message says so; what we have not built (offloading) is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from neobert.config.schema import Config
from neobert.config.yaml_file import read_yaml
from neobert.errors import ConfigError, Problem

KEY, ACCELERATE = "trainer.deepspeed_config_file", "accelerate_config_file"
DEFAULT_STAGE = 2
LAUNCHER = {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"}  # what the `deepspeed` command sets
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
TAKEN = {
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "comms_logger", "zero_allow_untested_optimizer",
}  # fmt: skip
OURS = {
    "train_batch_size": "trainer.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps", "optimizer": "optimizer", "scheduler": "scheduler",
    "gradient_clipping": "trainer.gradient_clipping", "bf16": "trainer.mixed_precision", "fp16": "trainer.mixed_precision",
    "steps_per_print": "trainer.logging_steps",
}  # fmt: skip
OFFLOAD = ("offload_optimizer", "offload_param", "zenflow")
AUTO = "auto"  # as Hugging Face writes it: take the trainer's value


class Zero(NamedTuple):
    """DeepSpeed's configuration, without what is ours: `options["zero_optimization"]["stage"]` is 0 to 3."""

    options: dict[str, Any]
    notes: list[str]

    @property
    def stage(self) -> int:
        """0: DDP; from 1 on optimizer states, from 2 on gradients too, with 3 weights too, are split over processes."""
        return int(self.options["zero_optimization"]["stage"])


def read_zero(config: Config, environment: Mapping[str, str]) -> Zero | None:
    """What DeepSpeed is to do in this run; None where it is not asked for. Raises ConfigError."""
    values = {} if config.accelerate_config_file is None else read_yaml(config.accelerate_config_file).values
    section = {} if values.get("deepspeed_config") is None else values["deepspeed_config"]
    if not isinstance(section, dict):
        raise ConfigError(Problem(ACCELERATE, f"deepspeed_config must be a mapping, got {section!r}"))
    is_launched = environment.get("ACCELERATE_USE_DEEPSPEED") == "true" or STAGE in environment
    is_launched = is_launched or environment.keys() >= LAUNCHER or config.trainer.engine == "deepspeed"
    is_asked = is_launched or values.get("distributed_type") == "DEEPSPEED" or bool(section)
    if not (config.use_deepspeed and is_asked):
        return None
    for name in ("offload_optimizer_device", "offload_param_device"):
        if str(section.get(name, "none")) != "none":
            raise ConfigError(Problem(ACCELERATE, f"{name}: offloading is not part of this version"))
    named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or section.get("deepspeed_config_file")
    if file := config.trainer.deepspeed_config_file or named:
        return _read_file(str(file))
    stage = str(environment.get(STAGE, section.get("zero_stage", DEFAULT_STAGE)))
    return Zero({"zero_optimization": _with_stage({}, stage, ACCELERATE)}, [])


def _read_file(path: str) -> Zero:
    """DeepSpeed's own JSON. Raises ConfigError for what is not one, and for options that are not supported."""
    import json

    def refuse(problem: str) -> NoReturn:
        raise ConfigError(Problem(KEY, f"{path}: {problem}")) from None

    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        refuse(str(error.strerror))
    except ValueError as error:
        refuse(f"not JSON: {error}")
    if not isinstance(values, dict):
        refuse("must be a mapping")
    if unknown := sorted(values.keys() - TAKEN - OURS.keys()):
        refuse(f"{unknown[0]}: not supported; there are: {', '.join(sorted(TAKEN))}")
    zero = values.get("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        refuse(f"zero_optimization must be a mapping, got {zero!r}")
    if offloaded := [name for name in OFFLOAD if _says_something(zero.get(name))]:
        refuse(f"{offloaded[0]}: offloading is not part of this version")
    notes = [f"{path}: {name} is not used; {OURS[name]} is" for name in OURS if _says_something(values.get(name))]
    kept = {name: value for name, value in zero.items() if value != AUTO and name not in OFFLOAD}
    taken = {name: value for name, value in values.items() if name in TAKEN and value != AUTO}
    return Zero({**taken, "zero_optimization": _with_stage(kept, str(kept.get("stage", 0)), f"{KEY}: {path}")}, notes)


def _says_something(value: Any) -> bool:
    """Whether a setting is more than absent, left open, or off."""
    if isinstance(value, dict):
        return value.get("enabled", True) not in (AUTO, False) and value.get("device", "") != "none"
    return value not in (None, AUTO)


def _with_stage(zero: dict[str, Any], stage: str, where: str) -> dict[str, Any]:
    if stage not in ("0", "1", "2", "3"):
        raise ConfigError(Problem(where, f"the stage of ZeRO is 0, 1, 2 or 3, got {stage!r}"))
    return {**zero, "stage": int(stage)}
