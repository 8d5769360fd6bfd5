"""From what a user names to the folder of a model.

| named | folder |
|---|---|
| a run's output folder, its `checkpoints/`, a step in it | a checkpoint, verified (`find_checkpoint`) |
| another folder with config.json and weights | itself: an export, or a model of another library |
| a repository of the hub | its folder in the hub's cache, after downloading it |
"""

from pathlib import Path
from typing import Any

from neobert.checkpoints.format import POINTERS, STATE, WEIGHTS, list_steps, read_pointer, verify_checkpoint
from neobert.errors import CheckpointError, first_line
from neobert.files import read_json

CONFIG, MODULES = "config.json", "modules.json"  # the latter of sentence-transformers
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
PICKLE = "pytorch_model.bin"  # which loading may run code out of
CONVERT = (  # which reads tensors alone
    "convert them once, in {0}: python -c \"import torch, safetensors.torch as s; w = torch.load('pytorch_model.bin', "
    "weights_only=True); s.save_file({{k: v.clone() for k, v in w.items()}}, 'model.safetensors', {{'format': 'pt'}})\""
)
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"]  # of files that are downloaded


def find_checkpoint(selector: str, root: Path | None = None, to_resume: bool = False) -> Path:
    """The folder that `selector` names: `latest`, `best`, a step below `root`; or a path to a step, to `checkpoints/`, or
    to a run's output folder, which means its `latest`: the model that the run came to, or `to_resume` its newest step.

    Raises CheckpointError saying what is there instead.
    """
    if root is not None and (selector in POINTERS or selector.isdigit()):
        steps = list_steps(root)
        name = selector if selector.isdigit() else read_pointer(root / selector)
        if selector == "latest" and steps and (to_resume or name is None or int(name) not in steps):
            name = str(steps[-1])
        if name is None or not (root / name / STATE).is_file():
            there = f"there are: {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"{root}: no checkpoint {selector!r}; {there}")
        return root / name
    path = Path(selector)
    for candidate in (path / "checkpoints", path):
        if list_steps(candidate):
            return find_checkpoint("latest", candidate, to_resume)
    if not (path / STATE).is_file():
        what = "not a checkpoint (it has no state.json)" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what}; expected a run's output folder or <output_dir>/checkpoints/<step>")
    return path


def find_model(path: str, in_parts: bool = False) -> Path:
    """The folder of a model of ours: a checkpoint or an export; with `in_parts` also one whose weights are in several files,
    which models of other libraries may be. Raises CheckpointError saying what is there instead.
    """
    folder = Path(path)
    if (folder / STATE).is_file() or not folder.is_dir() or holds_steps(folder):
        return find_verified(path)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if in_parts and (folder / INDEX).is_file():
        if CONFIG in missing:
            raise CheckpointError(f"{folder}: not a model: it has no {CONFIG}")
        return folder
    if missing == [WEIGHTS] and (folder / PICKLE).is_file():
        pickled = f"its weights are in {PICKLE}, and only safetensors are read"
        raise CheckpointError(f"{folder}: {pickled}; {CONVERT.format(folder)}")
    if missing:
        raise CheckpointError(
            f"{folder}: neither a checkpoint nor an exported model: it has no {STATE}, no {' and no '.join(missing)}; "
            "expected a run's output folder, <output_dir>/checkpoints/<step>, or what `neobert export` wrote"
        )
    if (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: half a checkpoint: it has no {STATE}, which is written last")
    return folder


def find_encoder(path: str) -> Path:
    """A checkpoint, or a folder that `AutoModel` or sentence-transformers may load. Raises CheckpointError."""
    folder = Path(path)
    if not (folder / STATE).is_file() and any((folder / name).is_file() for name in (CONFIG, MODULES)):
        return folder
    return find_verified(path)


def find_verified(path: str) -> Path:
    """The folder of a checkpoint, after comparing its checksums. Raises CheckpointError."""
    folder = find_checkpoint(path)
    verify_checkpoint(folder)
    return folder


def holds_steps(folder: Path) -> bool:
    """Whether a folder is that of a run, or its `checkpoints/`."""
    return bool(list_steps(folder) or list_steps(folder / "checkpoints"))


def download_model(name: str) -> Path:
    """The folder that `name` is, or that of a repository of the hub. Raises CheckpointError, also when offline."""
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return Path(name)
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = "this machine is offline (HF_HUB_OFFLINE)" if is_offline_mode() else first_line(error)
        raise CheckpointError(f"{name!r} is no folder, and it cannot be had from the hub: {why}") from None


def read_model_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises CheckpointError."""
    return read_json(folder / CONFIG, CheckpointError, "; this is no folder of a model")
