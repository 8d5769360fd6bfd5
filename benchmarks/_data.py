"""Shared by the benchmarks of the data: corpora and the real set-up of a run's data."""

import os
import tempfile
from pathlib import Path
from typing import Any

from _bench import ROOT, TEXT, TOKENIZER

SHARED = ROOT.parent / "shared/data"


def corpus(name: str) -> tuple[str, str | None]:
    """(path, text column) of a corpus beside the project, or of the shipped text where that is absent."""
    path, column = {
        "prose": ("prose", None),
        "short": ("pairs/packages.jsonl", "positive"),
        "12 MB": ("prose/sotu.jsonl", "text"),
    }[name]
    return (str(SHARED / path), column) if (SHARED / path).exists() else (str(TEXT / "train.txt"), None)


def make_data(*words: str, folder: str | None = None) -> Any:
    """The data of a run, as `neobert pretrain` builds it, on two cores at most."""
    from neobert.config.load import load_config
    from neobert.data.tokenizer import load_tokenizer, text_tokenizer
    from neobert.ranks import Ranks
    from neobert.tasks.pretraining.data import build_data

    base = [f"tokenizer.path={TOKENIZER}", "model.max_position_embeddings=8192", "tokenizer.max_length=8192"]
    config = load_config([], [*base, *words]).config
    tokenizer = text_tokenizer(load_tokenizer("", str(TOKENIZER)))
    return build_data(config, tokenizer, Ranks(), Path(folder or tempfile.gettempdir()), False)


def resident_megabytes() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
