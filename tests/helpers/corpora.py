"""Small corpora in every format, as files and as the reader sees them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from neobert.data.files.splits import find_splits

TEXTS = [f"document {number} " + "word " * (number % 7) + "é" * (number % 3) for number in range(50)]


def content_of(kind, texts):
    if kind == "txt":
        return "\n".join([*texts[:20], "", "   ", *texts[20:]])
    if kind in ("jsonl", "ndjson", "json lines"):
        return "".join(json.dumps({"text": t, "n": 1, "title": "x"}) + "\n" for t in texts)
    if kind == "json":
        return json.dumps({"version": 1, "data": [{"text": t} for t in texts]}, indent=1)
    assert kind == "csv"
    rows = [["n", "text"], *([n, f"{t}\nsecond, line"] for n, t in enumerate(texts))]
    out = [",".join(str(x) if "\n" not in str(x) else f'"{x}"' for x in row) for row in rows]
    return "\n".join(out) + "\n"


def write(folder, kind, texts=TEXTS):
    folder.mkdir(exist_ok=True)
    base, _, compression = kind.partition(".")
    name = f"train.{base.split()[0]}" + (f".{compression}" if compression else "")
    if kind == "parquet":
        table = pa.table({"body": texts, "n": list(range(len(texts)))})
        pa.parquet.write_table(table, folder / name, row_group_size=8)
    elif kind == "saved":
        Dataset.from_dict({"text": texts}).save_to_disk(folder)
    elif compression == "zst":
        with pa.CompressedOutputStream(str(folder / name), "zstd") as file:
            file.write(content_of(base, texts).encode())
    else:
        (gzip.open if compression else open)(folder / name, "wb").write(content_of(base, texts).encode())
    return folder


def files_at(path, column=None, train=None):
    return find_splits(str(path), column, train, None)[0]
