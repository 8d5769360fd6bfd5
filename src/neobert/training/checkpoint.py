"""The on-disk contract of a run's checkpoints.

    <output_dir>/checkpoints/
      latest                          text: the newest complete step
      best                            text: the step of the best evaluation so far
      <step>/
        model.safetensors  config.json  tokenizer/     enough for evaluation, fine-tuning, export; transformers loads it
        config.yaml                                    what produced it
        optimizer/rank00000.safetensors                resume only
        data_rank00000.json  data_rank00000.safetensors    resume only: position behind the last batch used
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
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from neobert.errors import CheckpointError

FORMAT = 1
WEIGHTS, STATE = "model.safetensors", "state.json"
OPTIMIZER = "optimizer/rank{:05d}.safetensors"
DATA = "data_rank{:05d}"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds. `state` is plain data: step, tokens seen, and what else the loop counts."""

    step: int
    weights: Tensors
    model_config: dict[str, Any]
    save_tokenizer: Callable[[Path], None]
    config_yaml: str
    optimizer: Tensors
    data: tuple[dict[str, Any], dict[str, np.ndarray]]
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(root: Path, content: Content) -> Path:
    """Write `<root>/<step>` atomically and point `latest` at it.

    Raises CheckpointError when the disk is full or a write fails; what was there before is then untouched.
    """
    final, scratch = root / str(content.step), root / f".{content.step}.tmp"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_content(scratch, content)
        if final.exists():
            _remove(final)
        os.replace(scratch, final)
        _sync(root)
        write_pointer(root / "latest", str(content.step))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        steps = list_steps(root)
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was written before"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{final}: cannot save step {content.step}: {reason}; {kept}") from None
    return final


def _write_content(folder: Path, content: Content) -> None:
    (folder / "optimizer").mkdir()
    save_file(_contiguous(content.weights), folder / WEIGHTS, metadata={"format": "pt"})
    save_file(_contiguous(content.optimizer), folder / OPTIMIZER.format(0))
    data, arrays = content.data
    save_arrays(arrays, folder / f"{DATA.format(0)}.safetensors")
    write_json(folder / f"{DATA.format(0)}.json", data)
    write_json(folder / "config.json", content.model_config)
    (folder / "config.yaml").write_text(content.config_yaml)
    content.save_tokenizer(folder / "tokenizer")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
    state = {"format": FORMAT, "step": content.step, **content.state, "sha256": sums}
    write_json(folder / STATE, {**state, "checksum": _checksum(state)})
    _sync(folder / STATE)
    _sync(folder)


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def list_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit() and (path / STATE).is_file())


def write_pointer(path: Path, text: str) -> None:
    """Replace a small text file atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync(path.parent)


def read_pointer(path: Path) -> str | None:
    """What `write_pointer` wrote, or None."""
    return path.read_text().strip() if path.is_file() else None


def find_checkpoint(selector: str, root: Path | None = None) -> Path:
    """The folder that `selector` names: `latest`, `best`, a step below `root`; or a path to a step, to `checkpoints/`, or
    to a run's output folder. Raises CheckpointError saying what is there instead.
    """
    if root is not None and (selector in ("latest", "best") or selector.isdigit()):
        steps = list_steps(root)
        name = selector if selector.isdigit() else read_pointer(root / selector)
        if selector == "latest" and (name is None or not (root / name / STATE).is_file()):
            name = str(steps[-1]) if steps else None
        if name is None or not (root / name / STATE).is_file():
            there = f"there are: {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"{root}: no checkpoint {selector!r}; {there}")
        return root / name
    path = Path(selector)
    for candidate in (path / "checkpoints", path):
        if list_steps(candidate):
            return find_checkpoint("latest", candidate)
    if not (path / STATE).is_file():
        what = "not a checkpoint (it has no state.json)" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}; expected a run's output folder or <output_dir>/checkpoints/<step>")
    return path


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after comparing all checksums. Raises CheckpointError naming the first damaged file."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state.pop("checksum") != _checksum(state):
            raise ValueError
        version, sums = state["format"], state["sha256"]
    except (ValueError, KeyError, AttributeError, OSError):
        raise CheckpointError(f"{folder / STATE}: missing or damaged{_alternative(folder)}") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {version}; this version reads format {FORMAT}")
    for name, wanted in sums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing{_alternative(folder)}")
        if _sha256(path) != wanted:
            raise CheckpointError(f"{path}: damaged (its checksum differs){_alternative(folder)}")
    return state


def _alternative(folder: Path) -> str:
    if not folder.name.isdigit():
        return ""
    earlier = [step for step in list_steps(folder.parent) if step < int(folder.name)]
    return f"; the checkpoint before it is step {earlier[-1]}" if earlier else "; there is no earlier checkpoint"


def load_weights(folder: Path) -> Tensors:
    """The model's tensors. Verify first."""
    return load_file(folder / WEIGHTS)


def load_optimizer(folder: Path) -> Tensors:
    """The optimizer's tensors."""
    return load_file(folder / OPTIMIZER.format(0))


def has_data(folder: Path) -> bool:
    """Whether a checkpoint holds a position of the data."""
    return (folder / f"{DATA.format(0)}.json").is_file()


def load_data(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The data position: JSON and arrays."""
    name = DATA.format(0)
    return json.loads((folder / f"{name}.json").read_text()), load_arrays(folder / f"{name}.safetensors")


def prune(root: Path, keep: int | None, protected: set[int], keep_newest: bool = True) -> list[int]:
    """Delete the oldest checkpoints beyond `keep`, never a protected one; nor the newest, unless `keep_newest` is off.

    Returns the steps deleted.
    """
    if keep is None:
        return []
    steps = list_steps(root)
    spare = max(0, len(steps) - keep)
    doomed = [step for step in (steps[:-1] if keep_newest else steps) if step not in protected][:spare]
    for step in doomed:
        _remove(root / str(step))
    return doomed


def strip_checkpoint(folder: Path) -> None:
    """Leave out what only resuming needs; what is left verifies as before. Does nothing the second time."""
    state = json.loads((folder / STATE).read_text())
    spare = [name for name in state["sha256"] if name.startswith(("optimizer/", "data_rank"))]
    if spare:
        state["sha256"] = {name: value for name, value in state["sha256"].items() if name not in spare}
        del state["checksum"]
        write_pointer(folder / STATE, json.dumps({**state, "checksum": _checksum(state)}, indent=2))
    shutil.rmtree(folder / "optimizer", ignore_errors=True)
    for path in folder.glob("data_rank*"):
        path.unlink()


def _remove(folder: Path) -> None:
    """Delete a checkpoint under another name, so that a half-deleted one never looks whole."""
    hidden = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean_leftovers(root: Path) -> None:
    """Remove what a crash in the middle of a save left behind."""
    for path in root.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(state: dict[str, Any]) -> str:
    """Of state.json itself, which holds the checksums of the other files."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
