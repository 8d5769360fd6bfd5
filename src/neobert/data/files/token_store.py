"""A tokenised corpus on disk: flat token ids in shards, memory-mapped, with the offsets of the documents; and how it is made.

    <folder>/
      plan.json               written first: what the shards are, fingerprints of source and tokenizer
      tokens-00000.bin        uint16 or uint32 ids of the documents of a shard, without special tokens
      offsets-00000.npy       uint64, documents of the shard + 1
      shard-00000.json        written last of a shard: counts and checksums; a shard that has it is whole
      manifest.json           written when all shards are whole: their counts and checksums; a folder that has it is whole

2 bytes a token for vocabularies up to 65,536. Every file gets its final name by a rename, and its content depends on text and
tokenizer only, so several processes may write shards of one folder without talking to each other, even the same ones.

The corpus is cut into shards by where its files begin and by their sizes alone, so everybody has the same plan, whatever the
number of threads. A thread reads, tokenises and writes a whole shard. What a killed run has finished is found by the next;
several machines may each take every N-th shard.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neobert.data.files.documents import Files, Position, SkippedRows, blocks_of, fingerprint, num_bytes, seek, texts_of
from neobert.data.files.opening import kind_of, open_table
from neobert.data.files.rows import is_seekable_text, layout_of, lines
from neobert.data.tokenizer import Ids, TextTokenizer, tokenizing_threads
from neobert.errors import DataError
from neobert.files import sha256, whole_file, write_json

FORMAT = 2
PLAN, MANIFEST = "plan.json", "manifest.json"
TOKENS, OFFSETS, SHARD = "tokens-{:05d}.bin", "offsets-{:05d}.npy", "shard-{:05d}.json"
MAX_SHARDS, MIN_SHARD_BYTES = 256, 1_000_000
AGAIN = "delete the folder and tokenise again"


@dataclass(frozen=True)
class ShardEntry:
    """The content of a shard. `skipped`: rows without usable text, by reason."""

    num_documents: int
    num_tokens: int
    sha256: dict[str, str]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """The content of a token folder."""

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

    @property
    def counts(self) -> str:
        """`12 documents, 345 tokens`."""
        return f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"

    def describe_skipped(self, form: str = "{}") -> str:
        """As `3 rows passed over: 3 no text`, put into `form`; empty when there are none."""
        return SkippedRows(counts=self.skipped).describe(form=form)


# --- reading -----------


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
        offsets = [_map(self.folder / OFFSETS.format(n)) for n in range(len(shards))]  # with numpy's header
        sizes = [8 * (shard.num_documents + 1) for shard in shards]
        self.offsets = [raw[-size:].view(np.uint64) for raw, size in zip(offsets, sizes, strict=True)]
        paths = [self.folder / TOKENS.format(n) for n in range(len(shards))]
        self.tokens = [np.fromfile(path, dtype=dtype) if in_memory else _map(path).view(dtype) for path in paths]

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(one.astype(np.int64)) for one in self.offsets)])

    def fetch(self, indices: np.ndarray) -> list[Ids]:
        numbers, local = seek(self.first, indices)
        documents: list[Ids] = [np.zeros(0)] * len(indices)
        for number in np.unique(numbers).tolist():
            wanted = np.flatnonzero(numbers == number)
            offsets, tokens = self.offsets[number], self.tokens[number]
            begins, ends = offsets[local[wanted]].tolist(), offsets[local[wanted] + 1].tolist()
            for index, begin, end in zip(wanted.tolist(), begins, ends, strict=True):
                documents[index] = tokens[begin:end]
        return documents

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises DataError when the folder was made by another tokenizer."""
        if self.manifest.tokenizer != tokenizer.fingerprint:
            hint = "delete the folder to tokenise again, or use that tokenizer"
            raise DataError(f"{self.folder}: made with another tokenizer; {hint}")


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped by torch, which leaves no descriptor open where `np.memmap` keeps one."""
    import torch

    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy() if size else np.zeros(0, np.uint8)


def is_token_store(path: str | Path) -> bool:
    """Whether a folder holds a tokenised corpus, or a part of one."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (MANIFEST, PLAN))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a token folder. Raises DataError when there is none, it is not whole, or it is not ours."""
    fields = _read_json(folder / MANIFEST)
    if fields is None:
        plan = _read_json(folder / PLAN)
        if plan is None:
            raise DataError(f"{folder}: no tokenised corpus here (no {MANIFEST})")
        total = len(plan["shards"])
        missing = f"{len(_missing(folder, range(total)))} of {total} shards are missing"
        raise DataError(f"{folder}: not whole: {missing}; run the command that makes it again, it goes on where it was")
    try:
        if (version := fields["format"]) != FORMAT:
            raise DataError(f"{folder}: format {version}; this version reads {FORMAT}. {AGAIN.capitalize()}")
        return Manifest(**{**fields, "shards": [ShardEntry(**entry) for entry in fields["shards"]]})
    except (TypeError, KeyError):
        raise DataError(f"{folder / MANIFEST}: not the manifest of a tokenised corpus") from None


def verify_store(folder: Path, manifest: Manifest) -> None:
    """Compare sizes and checksums with the manifest. Raises DataError naming the first file that differs.

    What was verified once is remembered by size and time of change in `.verified`, so that large folders open at once.
    """
    stamp, known, seen = folder / ".verified", {}, {}
    with suppress(OSError, ValueError):
        known = json.loads(stamp.read_text())
    for name, wanted in ((name, sha) for shard in manifest.shards for name, sha in shard.sha256.items()):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing; {AGAIN}")
        status = path.stat()
        seen[name] = [status.st_size, status.st_mtime_ns, wanted]
        if known.get(name) != seen[name] and sha256(path) != wanted:
            raise DataError(f"{path}: damaged (its checksum differs); {AGAIN}")
    if known != seen:
        with suppress(OSError):  # a folder that cannot be written is verified every time
            write_json(stamp, seen, shared=True)


def _read_json(path: Path) -> Any:
    """The content of a file, None where there is no such file. Raises DataError for a damaged one."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DataError(f"{path}: damaged; {AGAIN}") from None


# --- making -----------


def tokenize_files(
    files: Files, tokenizer: TextTokenizer, folder: Path, num_proc: int, show_bar: bool,
    share: tuple[int, int] = (1, 1), refuse: bool = False,
) -> tuple[int, Manifest | None]:  # fmt: skip
    """Make the missing shards of `folder`, or every N-th of them from the I-th (`share` = I, N, from 1).

    Returns how many were made, and the manifest when the folder is whole. Raises DataError when the folder is of another
    tokenizer or another text, or when the disk is full.
    """
    try:
        plan = _agree_on_plan(files, tokenizer, folder)
        starts = [Position(*start) for start in plan["shards"]]
        stops = [*starts[1:], files.stop]
        missing = _missing(folder, range(share[0] - 1, len(starts), share[1]))
        stop = threading.Event()

        def encode(blocks: Iterable[list[str]]) -> Iterator[Ids]:
            for block in blocks:
                if stop.is_set():  # another shard has failed
                    raise CancelledError
                yield from tokenizer.encode(block)

        def make(number: int) -> None:
            for leftover in folder.glob(f".*-{number:05d}.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a process that was killed
            part = replace(files, start=starts[number], stop=stops[number])
            skips = SkippedRows(refuse)
            write_shard(folder, number, encode(blocks_of(texts_of(part, skips))), tokenizer.dtype, skips.counts)

        num_threads = min(num_proc, len(missing))
        pool = tokenizing_threads(num_threads) if num_threads > 1 else None
        try:
            with tqdm(total=len(missing), desc="tokenising", unit=" shards", disable=not show_bar, leave=False) as bar:
                for _ in (pool.map if pool else map)(make, missing):
                    bar.update()
        finally:
            stop.set()
            if pool:
                pool.shutdown(cancel_futures=True)
        return len(missing), _finish(folder, plan)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{folder}: cannot write the tokenised corpus: {reason}; run it again, it goes on") from None


def _missing(folder: Path, numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if not (folder / SHARD.format(number)).is_file()]


def _agree_on_plan(files: Files, tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """A manifest that has where the shards begin. The first process writes it down; the others find the same."""
    if not is_token_store(folder) and folder.exists() and any(folder.glob("[!.]*")):
        raise DataError(f"{folder}: holds other files; choose an empty or a new folder for the tokens")
    made_of = {"source": fingerprint(files), "tokenizer": tokenizer.fingerprint, "dtype": tokenizer.dtype.__name__}
    plan: dict[str, Any] = {"format": FORMAT, **made_of, "shards": [list(start) for start in plan_shards(files)]}
    if is_token_store(folder):
        found = _read_json(folder / PLAN) or asdict(read_manifest(folder))
        for name, what in (("tokenizer", "made with another tokenizer"), ("source", "made from another text")):
            if found.get(name) != plan[name]:
                raise DataError(f"{folder}: {what}; delete the folder to tokenise again, or choose another")
        if found != plan:
            raise DataError(f"{folder}: begun by another version; delete the folder to tokenise again")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, plan, shared=True)
    return plan


def write_shard(
    folder: Path, number: int, documents: Iterable[Ids], dtype: type, skipped: dict[str, int]
) -> ShardEntry:
    """Write the documents of one shard; `skipped` is read after the last one. Raises OSError when the disk is full."""
    offsets, names = [0], (TOKENS.format(number), OFFSETS.format(number))
    with whole_file(folder / names[0], shared=True) as tokens, whole_file(folder / names[1], shared=True) as ends:
        with open(tokens, "wb") as file:
            for ids in documents:
                file.write(np.ascontiguousarray(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
        with open(ends, "wb") as file:
            np.save(file, np.array(offsets, dtype=np.uint64))
        sums = {name: sha256(path) for name, path in zip(names, (tokens, ends), strict=True)}
    entry = ShardEntry(len(offsets) - 1, offsets[-1], sums, dict(skipped))
    write_json(folder / SHARD.format(number), asdict(entry), shared=True)
    return entry


def _finish(folder: Path, plan: dict[str, Any]) -> Manifest | None:
    """The manifest, written by whoever finds that all shards are there; None before."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if _missing(folder, range(len(plan["shards"]))):
        return None
    try:
        entries = [ShardEntry(**_read_json(folder / SHARD.format(number))) for number in range(len(plan["shards"]))]
    except TypeError:
        raise DataError(f"{folder}: a shard-*.json in it is damaged; delete it and tokenise again") from None
    manifest = Manifest(**{**plan, "shards": entries})
    write_json(folder / MANIFEST, asdict(manifest), shared=True)
    return manifest


def plan_shards(files: Files) -> list[Position]:
    """Where shards begin: at most about 256, each of 1 MB or more, cut at lines, row groups or files."""
    size = num_bytes(files)
    target = max(MIN_SHARD_BYTES, size // MAX_SHARDS) if size else max(1, len(files.paths) // MAX_SHARDS)
    starts, filled = [files.start], 0
    for number, path in enumerate(files.paths):
        weight = num_bytes(replace(files, paths=(path,))) if size else 1  # of files of the hub sizes are not known
        offsets = _cuts(path, weight, target) if size else [0]
        for position in (Position(number, offset) for offset in offsets):
            if position > starts[-1] and filled >= target and (files.stop is None or position < files.stop):
                starts.append(position)
                filled = 0
            filled += weight // len(offsets)
    return starts


def _cuts(path: str, size: int, target: int) -> list[int]:
    """Offsets in a file of `size` bytes where a shard may begin."""
    if kind_of(path) == ".parquet":
        return open_table(path).starts[:-1] or [0]
    if layout_of(path) == "table":
        num_rows, num_pieces = open_table(path).num_rows, max(1, size // target)
        return [num_rows * n // num_pieces for n in range(num_pieces)]
    if is_seekable_text(path):
        cuts = range(target, size, target)
        return sorted({0, *(next((begin for _, begin, _ in lines(path, cut) if begin > cut), 0) for cut in cuts)})
    return [0]
