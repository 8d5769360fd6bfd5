"""A tokenised corpus on disk: flat token ids in shards, memory-mapped, with the offsets of the documents.

    <folder>/
      plan.json               written first: what the shards are, fingerprints of source and tokenizer
      tokens-00000.bin        uint16 or uint32 ids of the documents of a shard, without special tokens
      offsets-00000.npy       uint64, documents of the shard + 1
      shard-00000.json        written last of a shard: counts and checksums; a shard that has it is whole
      manifest.json           written when all shards are whole: their counts and checksums; a folder that has it is whole

2 bytes a token for vocabularies up to 65,536. Every file gets its final name by a rename, and its content depends on text and
tokenizer only, so several processes may write shards of one folder without talking to each other, even the same ones.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neobert.data.tokenizer import Ids
from neobert.errors import DataError

FORMAT = 2
TOKENS, OFFSETS, SHARD = "tokens-{:05d}.bin", "offsets-{:05d}.npy", "shard-{:05d}.json"


@dataclass(frozen=True)
class ShardEntry:
    """What a shard says of itself. `skipped`: rows without usable text, by reason."""

    num_documents: int
    num_tokens: int
    sha256: dict[str, str]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a token folder says of itself."""

    format: int
    dtype: str
    source: str
    tokenizer: str
    shards: list[ShardEntry]

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        reasons = {reason for shard in self.shards for reason in shard.skipped}
        return {reason: sum(shard.skipped.get(reason, 0) for shard in self.shards) for reason in sorted(reasons)}


class TokenStore:
    """Random access to tokenised documents (a `Corpus`). Raises DataError when the folder is incomplete or damaged."""

    is_tokenized = True

    def __init__(self, folder: str | Path, in_memory: bool = False):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        verify_store(self.folder, self.manifest)
        self.fingerprint = f"{self.manifest.source}:{self.manifest.tokenizer}"
        dtype, shards = np.dtype(self.manifest.dtype), self.manifest.shards
        self.first = np.cumsum([0, *(shard.num_documents for shard in shards)])
        self.offsets = [_open_offsets(self.folder / OFFSETS.format(n)) for n in range(len(shards))]
        self.tokens = [_open_tokens(self.folder / TOKENS.format(n), dtype, in_memory) for n in range(len(shards))]

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(one.astype(np.int64)) for one in self.offsets)])

    def fetch(self, indices: np.ndarray) -> list[Ids]:
        numbers = np.searchsorted(self.first, indices, side="right") - 1
        documents: list[Ids] = [np.zeros(0)] * len(indices)
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            local = indices[places] - self.first[number]
            offsets, tokens = self.offsets[number], self.tokens[number]
            spans = zip(places.tolist(), offsets[local].tolist(), offsets[local + 1].tolist(), strict=True)
            for place, begin, end in spans:
                documents[place] = tokens[begin:end]
        return documents


def _open_tokens(path: Path, dtype: np.dtype[Any], in_memory: bool) -> np.ndarray:
    return np.fromfile(path, dtype=dtype) if in_memory else _map(path).view(dtype)


def _open_offsets(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return _map(path)[file.tell() :].view(np.uint64)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped by torch, which leaves no descriptor open where `np.memmap` keeps one."""
    import torch

    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy() if size else np.zeros(0, np.uint8)


def is_token_store(path: str | Path) -> bool:
    """Whether a folder holds a tokenised corpus, or a part of one."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("manifest.json", "plan.json"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a token folder. Raises DataError when there is none, it is not whole, or it is not ours."""
    plan = read_plan(folder)
    try:
        fields = json.loads((folder / "manifest.json").read_text())
        version = fields["format"]
        if version == FORMAT:
            return Manifest(**{**fields, "shards": [ShardEntry(**entry) for entry in fields["shards"]]})
    except FileNotFoundError:
        if plan is None:
            raise DataError(f"{folder}: no tokenised corpus here (no manifest.json)") from None
        missing = [str(n) for n in range(len(plan["shards"])) if not (folder / SHARD.format(n)).is_file()]
        raise DataError(
            f"{folder}: not whole: {len(missing)} of {len(plan['shards'])} shards are missing; run the command that makes it "
            "again, it goes on where it was"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{folder / 'manifest.json'}: not the manifest of a tokenised corpus") from None
    raise DataError(f"{folder}: format {version}; this version reads {FORMAT}. Delete the folder and tokenise again")


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What the folder is to become, or None for a folder without a plan. Raises DataError for a damaged one."""
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        return plan
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{folder / 'plan.json'}: damaged; delete the folder and tokenise again") from None


def verify_store(folder: Path, manifest: Manifest) -> None:
    """Compare sizes and checksums with the manifest. Raises DataError naming the first file that differs.

    What was verified once is remembered by size and time of change in `.verified`, so that large folders open at once.
    """
    stamp = folder / ".verified"
    try:
        known = json.loads(stamp.read_text())
    except (OSError, ValueError):
        known = {}
    seen = {}
    for name, wanted in ((name, sha) for shard in manifest.shards for name, sha in shard.sha256.items()):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing; delete the folder and tokenise again")
        status = path.stat()
        seen[name] = [status.st_size, status.st_mtime_ns, wanted]
        if known.get(name) != seen[name] and sha256(path) != wanted:
            raise DataError(f"{path}: damaged (its checksum differs); delete the folder and tokenise again")
    if known != seen:
        try:
            write_atomically(stamp, json.dumps(seen).encode())
        except OSError:
            return  # a folder that cannot be written is verified every time


def write_shard(
    folder: Path, number: int, documents: Iterable[Ids], dtype: type, skipped: dict[str, int]
) -> ShardEntry:
    """Write the documents of one shard; `skipped` is read behind the last one. Raises OSError when the disk is full."""
    offsets, names = [0], (TOKENS.format(number), OFFSETS.format(number))
    scratch = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        with open(scratch[0], "wb") as file:
            for ids in documents:
                file.write(np.ascontiguousarray(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
            file.flush()
            os.fsync(file.fileno())
        with open(scratch[1], "wb") as file:
            np.save(file, np.array(offsets, dtype=np.uint64))
            file.flush()
            os.fsync(file.fileno())
        sums = {name: sha256(path) for name, path in zip(names, scratch, strict=True)}
        for name, path in zip(names, scratch, strict=True):
            os.replace(path, folder / name)
        entry = ShardEntry(len(offsets) - 1, offsets[-1], sums, dict(skipped))
        write_json(folder / SHARD.format(number), asdict(entry))
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)
    return entry


def read_shards(folder: Path, num_shards: int) -> list[ShardEntry] | None:
    """What all shards say of themselves; None when one is missing."""
    try:
        return [ShardEntry(**json.loads((folder / SHARD.format(n)).read_text())) for n in range(num_shards)]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise DataError(f"{folder}: a shard-*.json in it is damaged; delete it and tokenise again") from None


def write_json(path: Path, value: Any) -> None:
    """Indented JSON under its final name at once."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to disk, and rename it."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
