"""The texts of a file as vectors in a .npy or .parquet file, in their order."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from neobert.data.files.rows import text_in, usable_records
from neobert.data.files.splits import find_column, local_splits
from neobert.data.tokenizer import Ids
from neobert.errors import DataError
from neobert.files import whole_file
from neobert.inference.embed import Embedder, Progress

TEXTS_AT_ONCE = 16_384  # sorted by length among themselves

Row = tuple[str, Any]  # a text and its id, None where there is none
Blocks = Iterable[tuple[list[Row], np.ndarray]]


def read_rows(path: str, column: str | None) -> Iterator[Row]:
    """The texts of a file's records, each with what stands in its column `id` (or `_id`).

    Raises DataError naming the record that has no text: vectors keep the order of records.
    """
    try:
        files = [file for split in local_splits(path).values() for file in split]
        columns = [find_column(file, column) or "text" for file in files]
    except DataError as error:
        message = str(error).replace("dataset.text_column", "--column").replace("dataset.path: ", "")
        raise DataError(message) from None
    for file, wanted in zip(files, columns, strict=True):
        for record, begin in usable_records(file):
            yield text_in(record, wanted, file, begin), record.get("id", record.get("_id"))


def check_new_file(path: Path, force: bool) -> None:
    """Raises DataError where a result may not be written: its folder is missing, or it is there already."""
    if not path.parent.is_dir():
        raise DataError(f"{path}: no folder {path.parent}")
    if path.exists() and not force:
        raise DataError(f"{path}: is there already; choose another file, or --force")


def embed_file(
    embedder: Embedder,
    path: str,
    output: Path,
    column: str | None = None,
    normalize: bool | None = None,
    progress: Progress = lambda n: None,
    prompt: str | None = None,
    force: bool = False,
) -> tuple[int, int]:
    """Write the vectors of a file's texts to .npy or .parquet, whole or not at all; returns (texts, width).

    Raises DataError for a file that cannot be read, an output of another kind, or one that is there, unless with `force`.
    """
    writers = {".npy": write_npy, ".parquet": write_parquet}
    if output.suffix not in writers:
        raise DataError(f"{output}: not a kind of file that can be written; these can: {', '.join(writers)}")
    check_new_file(output, force)
    rows = read_rows(path, column)

    def tokenize_block() -> tuple[list[Row], list[Ids]]:
        block = list(islice(rows, TEXTS_AT_ONCE))
        return block, embedder.tokenize([text for text, _ in block], prompt)

    def embed_blocks() -> Blocks:
        """Rows with their vectors, in order; the next block is tokenised while one is computed."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(tokenize_block)
            while (found := ahead.result())[0]:
                ahead = pool.submit(tokenize_block)
                yield found[0], embedder.encode_ids(found[1], normalize, progress)

    with whole_file(output) as scratch:
        count = writers[output.suffix](scratch, embed_blocks(), embedder.width)
        if not count:
            raise DataError(f"{path}: no text in it")
    return count, embedder.width


def write_npy(path: Path, blocks: Blocks, width: int) -> int:
    """float32, texts x width; the header is written again when the number of rows is known."""
    count, header = 0, {"descr": "<f4", "fortran_order": False}
    with open(path, "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (2**62, width)})
        begin = file.tell()
        for _, vectors in blocks:
            file.write(vectors.astype("<f4").tobytes())
            count += len(vectors)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, width)})
        assert file.tell() == begin, "numpy pads headers so that the shape can grow in place"
    return count


def write_parquet(path: Path, blocks: Blocks, width: int) -> int:
    """The columns `id`, where the first rows have one, of their type; `text`; and `embedding`, lists of `width` float32.

    Raises DataError for an id of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, count, kind = None, 0, None
    for rows, vectors in blocks:
        try:
            ids = pa.array([identity for _, identity in rows], kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"the column id does not hold values of one type: {error}") from None
        texts = pa.array([text for text, _ in rows], pa.string())
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
        table = pa.table({"id": ids, "text": texts, "embedding": lists})
        if writer is None:
            kind = ids.type
            has_ids = not pa.types.is_null(kind)
            writer = pq.ParquetWriter(path, table.schema if has_ids else table.schema.remove(0))
        writer.write_table(table.select(writer.schema.names))
        count += len(rows)
    if writer:
        writer.close()
    return count
