"""Tokenising a corpus before training: every document once, in order, into a `TokenStore`."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neobert.data.order import StreamReader
from neobert.data.sources import Files
from neobert.data.token_store import TokenStore, is_token_store, write_token_store
from neobert.data.tokenizer import Ids, TextTokenizer
from neobert.data.workers import encode_in_worker, start_workers, wait_for_worker
from neobert.errors import DataError


def tokenize_files(
    files: Files, tokenizer: TextTokenizer, folder: Path, num_proc: int, show_bar: bool, in_memory: bool = False
) -> tuple[TokenStore, bool]:
    """The tokenised corpus at `folder`, and whether it had to be made. One that fits is used as it is.

    Raises DataError when `folder` holds the tokens of another tokenizer or another text.
    """
    if is_token_store(folder):
        store = TokenStore(folder, in_memory)
        check_store(store, tokenizer, files.fingerprint)
        return store, False
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"dataset.pre_tokenize_output: {folder} holds other files; choose an empty or a new folder")
    write_token_store(
        folder,
        _encode_all(files, tokenizer, num_proc, show_bar),
        tokenizer.dtype,
        files.fingerprint,
        tokenizer.fingerprint,
    )
    return TokenStore(folder, in_memory), True


def check_store(store: TokenStore, tokenizer: TextTokenizer, source: str | None = None) -> None:
    """Raises DataError when a token folder was made by another tokenizer, or from another text than `source`."""
    if store.manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{store.folder}: made with another tokenizer; delete the folder to tokenise again, or use that tokenizer"
        )
    if source is not None and store.manifest.source != source:
        raise DataError(f"{store.folder}: made from another text; delete the folder to tokenise again")


def _encode_all(files: Files, tokenizer: TextTokenizer, num_proc: int, show_bar: bool) -> Iterator[Ids]:
    reader = StreamReader(files)
    pool = start_workers(num_proc, tokenizer) if num_proc > 1 else None
    pending: deque[Any] = deque()
    try:
        with tqdm(desc="tokenising", unit=" documents", disable=not show_bar, leave=False) as bar:
            while (block := reader.read()) or pending:
                if block:
                    pending.append(pool.submit(encode_in_worker, block) if pool else tokenizer.encode(block))
                if not block or len(pending) > 2 * num_proc or pool is None:
                    done = pending.popleft()
                    encoded = wait_for_worker(done) if pool else done
                    bar.update(len(encoded))
                    yield from encoded
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
