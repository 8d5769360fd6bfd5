"""Datasets of the Hugging Face hub, as files: found by `datasets`' own rules, read by us, with a position.

Online a stream reads the files from the hub as it comes to them (`hf://` URLs that name a revision), and everything else
downloads them once; offline both read what the local cache of the hub holds.
"""

import os
from pathlib import Path
from typing import Any

from neobert.data.files.documents import Files
from neobert.data.files.rows import kind_of
from neobert.data.files.splits import choose_splits
from neobert.errors import DataError, first_line

# Short names: repository and text column.
KNOWN = {"refinedweb": ("tiiuae/falcon-refinedweb", "content")}


def find_hub_splits(
    name: str,
    config: str | None,
    streaming: bool,
    text_column: str | None,
    train_split: str | None,
    eval_split: str | None,
    cache_dir: str | None = None,
    force_download: bool = False,
) -> tuple[Files, Files | None]:
    """(training files, evaluation files or None) of a dataset. Raises DataError with what to do, also when offline."""
    repository, known_column = KNOWN.get(name, (name, None))
    splits = _hub_splits(repository, config, streaming, cache_dir, force_download)
    column = text_column or known_column
    return choose_splits(splits, f"dataset {repository}", column, train_split, eval_split)


def hub_files(name: str, config: str | None, cache_dir: str | None, force_download: bool) -> dict[str, list[str]]:
    """The files of every split of a configuration, downloaded if need be. Raises DataError, also when offline."""
    return _hub_splits(name, config, False, cache_dir, force_download)


def _hub_splits(
    repository: str, config: str | None, streaming: bool, cache_dir: str | None, force_download: bool
) -> dict[str, list[str]]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        source = repository
        if offline or not streaming:
            source = snapshot_download(
                repository,
                repo_type="dataset",
                cache_dir=cache_dir,
                local_files_only=offline,
                force_download=force_download and not offline,
            )
        builder = load_dataset_builder(source, name=config, cache_dir=cache_dir)
    except HFValidationError as error:
        raise DataError(f"dataset.name: {repository!r} is no name of a dataset: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        why = (
            "this machine is offline (HF_HUB_OFFLINE)"
            if offline
            else f"the hub cannot be reached ({first_line(error)})"
        )
        raise DataError(
            f"dataset.name: {repository!r} is not in the local cache of the hub, and {why}; "
            "set dataset.path to files of your own, or run once with network"
        ) from None
    except (DatasetNotFoundError, HfHubHTTPError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"dataset.name: {repository!r} cannot be loaded: {first_line(error)}") from None
    return _files_of(builder, repository)


def _files_of(builder: Any, repository: str) -> dict[str, list[str]]:
    found = builder.config.data_files or {}
    splits = {str(split): [str(_real(path)) for path in paths] for split, paths in found.items()}
    splits = {split: [path for path in paths if kind_of(path)] for split, paths in splits.items()}
    splits = {split: paths for split, paths in splits.items() if paths}
    if not splits:
        raise DataError(f"dataset.name: {repository!r} has no file of a kind that can be read")
    return splits


def _real(path: Any) -> Any:
    """Files of the cache are links to blobs without a suffix; keep the name."""
    return path if "://" in str(path) else Path(path).absolute()
