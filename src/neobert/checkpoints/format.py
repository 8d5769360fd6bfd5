"""The on-disk contract of a run's checkpoints.

    <output_dir>/checkpoints/
      latest                          text: the step that a word for the run's model means: the newest, or, at the end of a run
                                      with load_best_model_at_end, the best
      best                            text: the step of the best evaluation so far
      <step>/
        model.safetensors  config.json  tokenizer.json ...    enough for evaluation, fine-tuning, export; transformers loads it
        config.yaml                                    what produced it
        optimizer/rank00000.safetensors                resume only
        data_rank00000.json  data_rank00000.safetensors    resume only: position after the last batch used
        state.json                                     written last: counters, format version, checksums of all the rest

A checkpoint is written to `.<step>.tmp`, flushed to disk, and renamed: a folder whose name is a number is whole. Loading
verifies the checksums. JSON and safetensors only; nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from neobert.errors import CheckpointError, UserError
from neobert.files import as_json, replace_folder, sha256, sync, write_json, write_text
from neobert.ranks import Ranks

FORMAT = 1
POINTERS = ("latest", "best")
WEIGHTS, STATE = "model.safetensors", "state.json"
REPLACED = ".replaced.tmp"  # end of the hidden name of a checkpoint that another replaces
DELETED = ".old.tmp"  # and of one that goes
OPTIMIZER = "optimizer/rank{:05d}.safetensors"
DATA = "data_rank{:05d}"
FIRST_ROWS = "first_rows"  # in the header of an optimizer file: where its parts begin
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ProcessGroup(Ranks):
    """The processes that write a checkpoint together. `gather` gives all of them what each of them passed."""

    gather: Callable[[Any], list[Any]] = lambda value: [value]


ALONE = ProcessGroup()


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: of `optimizer` and `data` what is in this process, the rest in the main process only.

    `state` is plain data: step, tokens seen, and what else the loop counts. `first_rows` of optimizer state that is split.
    `save_beside` writes the tokenizer, and what else readers of the weights look for, into the folder.
    """

    step: int
    weights: Tensors
    model_config: dict[str, Any]
    save_beside: Callable[[Path], None]
    config_yaml: str
    optimizer: Tensors = field(default_factory=dict)
    data: tuple[dict[str, Any], dict[str, np.ndarray]] = field(default_factory=lambda: ({}, {}))
    state: dict[str, Any] = field(default_factory=dict)
    first_rows: dict[str, int] = field(default_factory=dict)


def save_checkpoint(
    root: Path,
    content: Content,
    group: ProcessGroup = ALONE,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Path:
    """Write `<root>/<step>` atomically and point `latest` at it; all processes of a group together. The main process calls
    `before` and `after`.

    Raises CheckpointError, in all of them, when the disk is full or a write fails; what was there before is then untouched.
    """
    final, scratch = root / str(content.step), root / f".{content.step}.tmp"
    sums = dict[str, str]()

    def prepare() -> None:
        before()
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "optimizer").mkdir(parents=True)

    def write() -> None:
        sums.update(_write_content(scratch, content, group.rank))

    def publish() -> None:
        state = {"format": FORMAT, "step": content.step, **content.state, "sha256": dict(sorted(sums.items()))}
        write_json(scratch / STATE, {**state, "checksum": checksum(state)})
        for path in (scratch / STATE, *(one for one in scratch.rglob("*") if one.is_dir()), scratch):
            sync(path)
        replace_folder(scratch, final, final.with_name(f".{final.name}{REPLACED}"))
        write_pointer(root, "latest", content.step)
        after()

    reason = _together(group, prepare if group.is_main else None) or _together(group, write)
    for part in group.gather(sums):
        sums.update(part)
    reason = reason or _together(group, publish if group.is_main else None)
    if reason:
        if group.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
        steps = list_steps(root)
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was written before"
        raise CheckpointError(f"{final}: cannot save step {content.step}: {reason}; {kept}")
    return final


def _together(group: ProcessGroup, work: Callable[[], None] | None) -> str:
    """Do a part of the work in every process; returns why it failed in the first in which it did, or nothing."""
    reason = ""
    try:
        if work is not None:
            work()
    except (OSError, SafetensorError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return next((one for one in group.gather(reason) if one), "")


def _write_content(folder: Path, content: Content, rank: int) -> dict[str, str]:
    """Write the files of a process; returns their checksums, when they are on the disk."""
    if content.optimizer or rank == 0:
        first_rows = json.dumps(content.first_rows)
        save_tensors(content.optimizer, folder / OPTIMIZER.format(rank), {FIRST_ROWS: first_rows})
    data, arrays = content.data
    save_arrays(arrays, folder / f"{DATA.format(rank)}.safetensors")
    write_json(folder / f"{DATA.format(rank)}.json", data)
    if rank == 0:
        save_tensors(content.weights, folder / WEIGHTS)
        write_json(folder / "config.json", content.model_config)
        write_text(folder / "config.yaml", content.config_yaml)
        content.save_beside(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = [str(path.relative_to(folder)) for path in files]  # others write theirs meanwhile
    own = [name for name in names if (f"rank{rank:05d}." in name if is_of_a_rank(name) else rank == 0)]
    for name in own:
        sync(folder / name)
    return {name: sha256(folder / name) for name in own}


def is_of_a_rank(name: str) -> bool:
    """Whether a file is one that every process writes its own of, and that only resuming needs."""
    return name.startswith(("optimizer/", "data_rank"))


def save_tensors(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; without other `metadata` as transformers reads it."""
    metadata = metadata or {"format": "pt"}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)


def list_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit() and (path / STATE).is_file())


def read_pointer(path: Path) -> str | None:
    """The step that a pointer holds; None where there is none, or something else than a step."""
    text = path.read_bytes().decode("ascii", "replace").strip() if path.is_file() else ""
    return text if text.isdigit() else None


def write_pointer(root: Path, name: str, step: int) -> None:
    """Point `latest` or `best` at a step."""
    write_text(root / name, f"{step}\n")


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after comparing all checksums. Raises CheckpointError naming the first damaged file."""
    try:
        text = (folder / STATE).read_text()
        state = json.loads(text)
        if text != as_json(state) or state.pop("checksum") != checksum(state):
            raise ValueError
        version, sums = state["format"], state["sha256"]
    except (ValueError, KeyError, AttributeError, OSError):
        raise CheckpointError(f"{folder / STATE}: missing or damaged{_alternative(folder)}") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {version}; this version reads format {FORMAT}")
    _check_names(folder, state["step"], sums)
    for name, wanted in sums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing{_alternative(folder)}")
        if sha256(path) != wanted:
            raise CheckpointError(f"{path}: damaged (its checksum differs){_alternative(folder)}")
    return state


def _check_names(folder: Path, step: int, sums: dict[str, str]) -> None:
    """Every file is one of this folder, none is missing from the list, and the folder has the name of its step."""
    for name in sums:
        if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / STATE}: names {name!r}, which is not a file of the checkpoint")
    for name in (WEIGHTS, "config.json"):
        if name not in sums:
            raise CheckpointError(f"{folder / STATE}: has no checksum of {name}{_alternative(folder)}")
    is_stripped = f"{DATA.format(0)}.json" not in sums  # and may have been killed before the rest was gone
    for path in [*folder.glob("optimizer/*"), *folder.glob("data_rank*")]:
        if str(path.relative_to(folder)) not in sums and not is_stripped:
            raise CheckpointError(f"{path}: not a file of this checkpoint{_alternative(folder)}")
    if folder.name.isdigit() and int(folder.name) != step:
        raise CheckpointError(f"{folder / STATE}: damaged (it is that of step {step}){_alternative(folder)}")


def _alternative(folder: Path) -> str:
    if not folder.name.isdigit():
        return ""
    earlier = [step for step in list_steps(folder.parent) if step < int(folder.name)]
    return f"; the checkpoint before it is step {earlier[-1]}" if earlier else "; there is no earlier checkpoint"


def load_weights(folder: Path) -> Tensors:
    """The model's tensors. Verify first."""
    return load_file(folder / WEIGHTS)


def load_optimizer(folder: Path, rows_of: Callable[[str], slice | None] = lambda path: None) -> Tensors:
    """The optimizer's tensors; `rows_of(<parameter>/<state>)` says which rows of one are wanted, None: all."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted((folder / "optimizer").glob("rank*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            first_rows = json.loads((tensors.metadata() or {}).get(FIRST_ROWS, "{}"))
            for path in tensors.keys():  # noqa: SIM118 - not a dict
                first, part = first_rows.get(path, 0), tensors.get_slice(path)
                wanted = rows_of(path) if part.get_shape() else None
                if wanted is None:
                    local = tensors.get_tensor(path)
                else:
                    stop = None if wanted.stop is None else max(0, wanted.stop - first)
                    local = part[max(0, wanted.start - first) : stop]
                parts.setdefault(path, []).append((first, local))
    whole = {path: [part for _, part in sorted(some, key=lambda one: one[0])] for path, some in parts.items()}
    return {path: torch.cat(some) if some[0].ndim and len(some) > 1 else some[0] for path, some in whole.items()}


def load_rank_optimizer(folder: Path, rank: int) -> Tensors:
    """The optimizer's tensors that one process wrote."""
    return load_file(folder / OPTIMIZER.format(rank))


def has_data(folder: Path) -> bool:
    """Whether a checkpoint holds a position of the data. Verify first."""
    return f"{DATA.format(0)}.json" in json.loads((folder / STATE).read_text())["sha256"]


def load_data(folder: Path, rank: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The data position of one of the processes that wrote it: JSON and arrays."""
    name = DATA.format(rank)
    return json.loads((folder / f"{name}.json").read_text()), load_arrays(folder / f"{name}.safetensors")


def checksum(state: dict[str, Any]) -> str:
    """Of state.json itself, which holds the checksums of the other files."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# --- which checkpoints stay, and what is left of them -----------


def prune(root: Path, keep: int | None, protected: set[int], keep_newest: bool = True) -> list[int]:
    """Delete the oldest checkpoints beyond `keep`, never a protected one; nor the newest, unless `keep_newest` is off.

    Returns the steps deleted.
    """
    if keep is None:
        return []
    steps = list_steps(root)
    spare = max(0, len(steps) - keep)
    doomed = [step for step in (steps[:-1] if keep_newest else steps) if step not in protected][:spare]
    for step in doomed:  # under another name, so that a half-deleted one never looks whole
        hidden = root / f".{step}{DELETED}"
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(root / str(step), hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return doomed


def strip_checkpoint(folder: Path) -> None:
    """Leave out what only resuming needs; what is left verifies as before. Does nothing the second time."""
    state = json.loads((folder / STATE).read_text())
    spare = [name for name in state["sha256"] if is_of_a_rank(name)]
    if spare:
        state["sha256"] = {name: value for name, value in state["sha256"].items() if name not in spare}
        del state["checksum"]
        write_json(folder / STATE, {**state, "checksum": checksum(state)})
    shutil.rmtree(folder / "optimizer", ignore_errors=True)
    for path in folder.glob("data_rank*"):
        path.unlink()


def clean_leftovers(root: Path) -> None:
    """Remove what a crash in the middle of a save left behind; a checkpoint that was about to be replaced comes back."""
    for old in root.glob(f".*{REPLACED}"):
        final = root / old.name.removesuffix(REPLACED)[1:]
        if not final.exists():
            os.replace(old, final)
    for path in root.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
