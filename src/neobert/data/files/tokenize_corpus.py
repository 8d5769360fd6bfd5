"""Tokenising a corpus before training, shard by shard, into a `TokenStore`.

The corpus is cut into shards by where its files begin and by their sizes alone, so everybody who looks at the same files has
the same plan, whatever the number of threads. A thread takes a whole shard: it reads, tokenises and writes it. What a
killed run has finished is found by the next; several machines may each take every N-th shard.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neobert.data.files.documents import Files, Position, SkippedRows
from neobert.data.files.rows import is_seekable_text, kind_of, layout_of, lines, num_table_rows, open_table
from neobert.data.files.splits import find_splits, fingerprint, num_bytes
from neobert.data.files.token_store import (
    FORMAT,
    SHARD,
    Manifest,
    TokenStore,
    is_token_store,
    read_manifest,
    read_plan,
    read_shards,
    write_json,
    write_shard,
)
from neobert.data.mlm.readers import StreamReader
from neobert.data.mlm.row_source import why_empty
from neobert.data.tokenizer import Ids, TextTokenizer, tokenizing_threads, train_tokenizer
from neobert.errors import DataError

MAX_SHARDS, MIN_SHARD_BYTES = 256, 1_000_000


def open_tokenized(
    files: Files, tokenizer: TextTokenizer, folder: Path, num_proc: int, show_bar: bool, in_memory: bool, refuse: bool
) -> tuple[TokenStore, bool]:
    """The tokenised corpus at `folder`, and whether anything had to be made of it."""
    num_made, _ = tokenize_files(files, tokenizer, folder, num_proc, show_bar, refuse=refuse)
    return TokenStore(folder, in_memory), num_made > 0


def tokenize_files(
    files: Files,
    tokenizer: TextTokenizer,
    folder: Path,
    num_proc: int,
    show_bar: bool,
    share: tuple[int, int] = (1, 1),
    refuse: bool = False,
) -> tuple[int, Manifest | None]:
    """Make the missing shards of `folder`, or every N-th of them from the I-th (`share` = I, N, from 1).

    Returns how many were made, and the manifest when the folder is whole. Raises DataError when the folder is of another
    tokenizer or another text, or when the disk is full.
    """
    try:
        shards = _agree_on_plan(files, tokenizer, folder)
        mine = [n for n in range(len(shards)) if n % share[1] == share[0] - 1]
        missing = [n for n in mine if not (folder / SHARD.format(n)).is_file()]
        _make_shards(files, tokenizer, folder, shards, missing, num_proc, show_bar, refuse)
        return len(missing), _finish(folder, len(shards))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{folder}: cannot write the tokenised corpus: {reason}; run it again, it goes on") from None


def check_store(store: TokenStore, tokenizer: TextTokenizer) -> None:
    """Raises DataError when a token folder was made by another tokenizer."""
    if store.manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{store.folder}: made with another tokenizer; delete the folder to tokenise again, or use that tokenizer"
        )


def _agree_on_plan(files: Files, tokenizer: TextTokenizer, folder: Path) -> list[Position]:
    """Where the shards begin. The first process writes it down; the others find the same."""
    if not is_token_store(folder) and folder.exists() and any(folder.glob("[!.]*")):
        raise DataError(f"{folder}: holds other files; choose an empty or a new folder for the tokens")
    plan: dict[str, Any] = {
        "format": FORMAT,
        "source": fingerprint(files),
        "tokenizer": tokenizer.fingerprint,
        "dtype": str(tokenizer.dtype.__name__),
        "shards": [list(start) for start in plan_shards(files)],
    }
    if is_token_store(folder):
        found = read_plan(folder) or asdict(read_manifest(folder))
        for name, what in (("tokenizer", "made with another tokenizer"), ("source", "made from another text")):
            if found.get(name) != plan[name]:
                raise DataError(f"{folder}: {what}; delete the folder to tokenise again, or choose another")
        if found != plan:
            raise DataError(f"{folder}: begun by another version; delete the folder to tokenise again")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", plan)
    return [Position(*start) for start in plan["shards"]]


def _finish(folder: Path, num_shards: int) -> Manifest | None:
    if (folder / "manifest.json").is_file():
        return read_manifest(folder)
    entries = read_shards(folder, num_shards)
    if entries is None:
        return None
    plan = read_plan(folder)
    assert plan is not None
    manifest = Manifest(plan["format"], plan["dtype"], plan["source"], plan["tokenizer"], entries)
    write_json(folder / "manifest.json", asdict(manifest))
    return manifest


# --- the plan -----------


def plan_shards(files: Files) -> list[Position]:
    """Where shards begin: at most about 256, each of 1 MB or more, cut at lines, row groups or files."""
    size = num_bytes(files)
    target = max(MIN_SHARD_BYTES, size // MAX_SHARDS) if size else max(1, len(files.paths) // MAX_SHARDS)
    starts, filled = [files.start], 0
    for place, weight in _cuts(files, target, known_sizes=size > 0):
        if place > starts[-1] and filled >= target and (files.stop is None or place < files.stop):
            starts.append(place)
            filled = 0
        filled += weight
    return starts


def _cuts(files: Files, target: int, known_sizes: bool) -> Iterator[tuple[Position, int]]:
    """(a place where a shard may begin, bytes from there to the next)."""
    for number, path in enumerate(files.paths):
        if not known_sizes:
            yield Position(number), 1
            continue
        size = num_bytes(replace(files, paths=(path,)))
        if layout_of(path) == "table":
            places = _table_cuts(path, size, target)
        elif is_seekable_text(path):
            starts = {_line_start(path, at, size) for at in range(target, size, target)}
            places = sorted({0} | starts - {size})
        else:
            places = [0]
        for place in places:
            yield Position(number, place), size // len(places)


def _line_start(path: str, offset: int, size: int) -> int:
    """Where the first line that begins behind `offset` begins; `size` when there is none."""
    return next((begin for _, begin, _ in lines(path, offset) if begin > offset), size)


def _table_cuts(path: str, size: int, target: int) -> list[int]:
    table = open_table(path)
    if kind_of(path) == ".parquet":
        groups = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
        return [sum(groups[:n]) for n in range(max(1, len(groups)))]
    pieces = max(1, size // target)
    return [num_table_rows(table) * n // pieces for n in range(pieces)]


# --- the work -----------


def _make_shards(
    files: Files,
    tokenizer: TextTokenizer,
    folder: Path,
    shards: list[Position],
    missing: list[int],
    num_proc: int,
    show_bar: bool,
    refuse: bool,
) -> None:
    stops = [*shards[1:], files.stop]
    stop = threading.Event()
    jobs = [
        (folder, n, replace(files, start=shards[n], stop=stops[n]), SkippedRows(refuse), tokenizer, stop)
        for n in missing
    ]
    with tqdm(total=len(jobs), desc="tokenising", unit=" shards", disable=not show_bar, leave=False) as bar:
        if min(num_proc, len(jobs)) <= 1:
            for job in jobs:
                tokenize_shard(*job)
                bar.update()
            return
        pool = tokenizing_threads(num_proc)
        try:
            for future in [pool.submit(tokenize_shard, *job) for job in jobs]:
                future.result()
                bar.update()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def tokenize_shard(
    folder: Path, number: int, files: Files, skips: SkippedRows, tokenizer: TextTokenizer, stop: threading.Event
) -> None:
    """Read, tokenise and write one shard. Raises CancelledError before the next block when `stop` is set."""
    for leftover in folder.glob(f".*-{number:05d}.*.tmp"):
        leftover.unlink(missing_ok=True)  # of a process that was killed
    write_shard(folder, number, _encode(files, skips, tokenizer, stop), tokenizer.dtype, skips.counts)


def _encode(files: Files, skips: SkippedRows, tokenizer: TextTokenizer, stop: threading.Event) -> Iterator[Ids]:
    reader = StreamReader(files, skips=skips)
    while block := reader.read():
        if stop.is_set():
            raise CancelledError
        yield from tokenizer.encode(block)


def train_from_files(
    paths: list[str], text_column: str | None, show_bar: bool, **settings: Any
) -> tuple[int, SkippedRows]:
    """`train_tokenizer` on files, folders or globs. Returns the size and what was passed over. Raises DataError."""
    skips = SkippedRows()
    readers = [StreamReader(find_splits(path, text_column, None, None)[0], skips=skips) for path in paths]

    def texts() -> Iterator[str]:
        num_read = 0
        with tqdm(desc="reading", unit=" documents", disable=not show_bar, leave=False) as bar:
            for reader in readers:
                while block := reader.read():
                    yield from block
                    bar.update(len(block))
                    num_read += len(block)
        if not num_read:
            raise DataError(f"{', '.join(paths)}: no text to train a tokenizer on{why_empty(skips)}")

    return train_tokenizer(texts(), **settings), skips


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
