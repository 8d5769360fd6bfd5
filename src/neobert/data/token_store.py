"""A tokenised corpus on disk: flat token ids, memory-mapped, with the offsets of the documents.

    <folder>/
      tokens.bin      uint16 or uint32 ids of all documents, without special tokens
      offsets.npy     uint64, documents + 1
      manifest.json   written last: counts, dtype, fingerprints of source and tokenizer, checksums

2 bytes a token for vocabularies up to 65,536. A folder with its final name is whole: it is written under another name
and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from neobert.data.tokenizer import Ids
from neobert.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a token folder says of itself."""

    format: int
    dtype: str
    num_documents: int
    num_tokens: int
    source: str
    tokenizer: str
    sha256: dict[str, str]


class TokenStore:
    """Random access to tokenised documents (a `Corpus`). Raises DataError when the folder is damaged."""

    def __init__(self, folder: str | Path, in_memory: bool = False):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for name, wanted in self.manifest.sha256.items():
            if not (self.folder / name).is_file() or _sha256(self.folder / name) != wanted:
                raise DataError(f"{self.folder / name}: missing or damaged; delete the folder and tokenise again")
        self.offsets = np.load(self.folder / "offsets.npy")
        dtype = np.dtype(self.manifest.dtype)
        if not self.manifest.num_tokens:
            self.tokens = np.zeros(0, dtype)
        elif in_memory:
            self.tokens = np.fromfile(self.folder / "tokens.bin", dtype=dtype)
        else:
            self.tokens = np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r")
        self.fingerprint = f"{self.manifest.source}:{self.manifest.tokenizer}"

    def __len__(self) -> int:
        return self.manifest.num_documents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64."""
        return np.diff(self.offsets.astype(np.int64))

    def fetch(self, indices: np.ndarray) -> list[Ids]:
        begins, ends = self.offsets[indices], self.offsets[indices + 1]
        return [np.asarray(self.tokens[begin:end]) for begin, end in zip(begins, ends, strict=True)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a token folder. Raises DataError when there is none or it is not ours."""
    try:
        fields = json.loads((folder / "manifest.json").read_text())
        manifest = Manifest(**fields)
    except FileNotFoundError:
        raise DataError(f"{folder}: no tokenised corpus here (no manifest.json)") from None
    except (ValueError, TypeError):
        raise DataError(f"{folder / 'manifest.json'}: not the manifest of a tokenised corpus") from None
    if manifest.format != FORMAT:
        raise DataError(f"{folder}: format {manifest.format}; this version reads {FORMAT}. Tokenise again")
    return manifest


def is_token_store(path: str | Path) -> bool:
    """Whether a folder holds a tokenised corpus."""
    return (Path(path) / "manifest.json").is_file()


def write_token_store(
    folder: str | Path, documents: Iterable[Ids], dtype: type, source: str, tokenizer: str
) -> Manifest:
    """Write all documents, replacing what is at `folder` once the new one is whole. Raises DataError when disk is full."""
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        offsets = [0]
        with open(scratch / "tokens.bin", "wb") as file:
            for ids in documents:
                file.write(np.ascontiguousarray(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
            file.flush()
            os.fsync(file.fileno())
        np.save(scratch / "offsets.npy", np.array(offsets, dtype=np.uint64))
        sums = {name: _sha256(scratch / name) for name in ("tokens.bin", "offsets.npy")}
        manifest = Manifest(FORMAT, np.dtype(dtype).name, len(offsets) - 1, offsets[-1], source, tokenizer, sums)
        (scratch / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot write the tokenised corpus: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
