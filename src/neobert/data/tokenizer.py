"""Tokenizers: load one, train one, fit its size to the model, and turn batches of text into token ids."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neobert.data.files.documents import SkippedRows, texts_of
from neobert.data.files.splits import find_splits
from neobert.errors import DataError, first_line
from neobert.files import as_json

SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
INERT = "[inert"  # as "[inert7]": fills the vocabulary up to the model's size; never input, target or prediction
LONGEST_PART = 1_000_000  # characters encoded at once

Ids = np.ndarray  # token ids of one document, uint16 or uint32, without special tokens


@dataclass
class TextTokenizer:
    """What the data pipeline needs of a tokenizer; several threads may encode with it at once.

    `json` is the serialised fast tokenizer. `special_ids` are never masked; `num_real` counts the ids below the inert ones.
    """

    json: str
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: frozenset[int]
    num_real: int

    @property
    def dtype(self) -> type:
        """The smallest unsigned type that holds every id."""
        return np.uint16 if self.num_real <= 2**16 else np.uint32

    @cached_property
    def fingerprint(self) -> str:
        """Names the mapping from text to ids; two tokenizers with equal fingerprints give equal ids.

        Inert tokens, which fit the vocabulary to a model, and settings of truncation and padding make no difference.
        """
        settings = json.loads(self.json)
        added = [token for token in settings.get("added_tokens", []) if not token["content"].startswith(INERT)]
        settings |= {"added_tokens": added, "truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    def encode(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text, without special tokens; special tokens written in the text are not interpreted.

        Very long texts are encoded in parts, cut in front of white space, which bounds the memory this takes.
        """
        if any(len(text) > LONGEST_PART for text in texts):
            return [np.concatenate(self.encode(list(_parts(text)))) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]


def _parts(text: str) -> Iterator[str]:
    begin = 0
    while (limit := begin + LONGEST_PART) < len(text):
        space = max(text.rfind(white, begin + 1, limit) for white in " \n")
        end = space if space > begin else limit
        yield text[begin:end]
        begin = end
    yield text[begin:]


def tokenizing_threads(count: int) -> ThreadPoolExecutor:
    """Threads that tokenise at the same time: the tokenizer is compiled code that runs without Python's lock.

    Each works alone on what it is given. The library would otherwise use all cores for every call, whatever `count` is.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return ThreadPoolExecutor(count, "tokenise")


def load_tokenizer(name: str, path: str | None) -> Any:
    """The Hugging Face tokenizer of a folder (`path`) or the hub (`name`). Raises DataError with what to do."""
    from transformers import AutoTokenizer

    key, source = ("tokenizer.path", path) if path else ("tokenizer.name", name)
    if path and not Path(path).is_dir():
        raise DataError(f"{key}: no folder at {path!r}; train one with `neobert tokenizer train FILES -o {path}`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key}: {source!r} cannot be loaded: {first_line(error)}") from None
    missing = [name for name in SPECIAL_TOKENS if name != "unk_token" and getattr(tokenizer, f"{name}_id") is None]
    if missing:
        hint = "masked-LM training needs them. `neobert tokenizer train` makes a tokenizer that has them"
        raise DataError(f"tokenizer {source!r} has no {', '.join(missing)}; {hint}")
    return tokenizer


def fit_vocabulary(tokenizer: Any, wanted: int | None, multiple: int = 64) -> int:
    """Add inert tokens until `len(tokenizer)` is the model's vocabulary size, and return that size: the larger of `wanted`
    and the tokenizer's own, rounded up to `multiple`, as matrix products run faster on round shapes.
    """
    size = -(-max(len(tokenizer), wanted or 0) // multiple) * multiple
    tokenizer.add_tokens([f"{INERT}{number}]" for number in range(size - len(tokenizer))], special_tokens=True)
    assert len(tokenizer) == size
    return size


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special tokens that a model's config.json names."""
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return {**ids, "mask_token_id": tokenizer.mask_token_id}


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """The pipeline's view of a Hugging Face tokenizer."""
    inert = {i for token, i in tokenizer.get_added_vocab().items() if token.startswith(INERT)}
    ids = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    special = frozenset(tokenizer.all_special_ids) | inert
    return TextTokenizer(tokenizer.backend_tokenizer.to_str(), *ids, special, len(tokenizer) - len(inert))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_from_files(paths: list[str], column: str | None, show_bar: bool, **settings: Any) -> tuple[int, SkippedRows]:
    """`train_tokenizer` on files, folders or globs. Returns the size and what was passed over. Raises DataError."""
    skips = SkippedRows()
    splits = [find_splits(path, column, None, None)[0] for path in paths]
    texts = (text for files in splits for text in texts_of(files, skips))
    shown = iter(tqdm(texts, desc="reading", unit=" documents", disable=not show_bar, leave=False))
    first = next(shown, None)
    if first is None:
        raise DataError(f"{', '.join(paths)}: no text to train a tokenizer on{skips.describe(form=' ({})')}")
    return train_tokenizer(chain([first], shown), **settings), skips


def train_tokenizer(
    texts: Iterable[str], output: str | Path, vocab_size: int, lowercase: bool, max_length: int, kind: str = "wordpiece"
) -> int:
    """Train a `wordpiece` or byte-level `bpe` tokenizer and save it as a Hugging Face folder. Returns its size."""
    fast = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}[kind](texts, vocab_size, lowercase, max_length)
    save_tokenizer(fast, output)
    return len(fast)


def _train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool, max_length: int) -> Any:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trainer = BertWordPieceTokenizer(lowercase=lowercase)
    special = list(SPECIAL_TOKENS.values())
    trainer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    vocabulary = dict(sorted(trainer.get_vocab().items(), key=lambda item: item[1]))
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase, model_max_length=max_length, **SPECIAL_TOKENS)


def _train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool, max_length: int) -> Any:
    """Byte-level: every text can be written with it, so [UNK] never occurs."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **SPECIAL_TOKENS)


def tokenizer_folder(folder: Path) -> Path:
    """Where a model's folder has its tokenizer: beside the weights, or, in older checkpoints, in a folder of its own."""
    inner = folder / "tokenizer"
    return inner if inner.is_dir() else folder


def save_tokenizer(tokenizer: Any, folder: str | Path, has_token_types: bool = True) -> None:
    """Write the tokenizer so that any fast-tokenizer loader reads it, on any version of transformers. Without
    `has_token_types` it makes only what a model of ours takes. Raises OSError.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers has no class of its own for a file that cannot be written
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(folder)) from None
    path, private = Path(folder) / "tokenizer_config.json", ("name_or_path", "is_local", "local_files_only")
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name not in private}
    if not has_token_types:
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(as_json(settings))
