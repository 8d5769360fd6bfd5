"""The sections of the YAML that describe what the model reads: tokenizer, dataset, datacollator."""

from typing import Literal

from neobert.config.field import Section, key


class TokenizerConfig(Section):
    """`tokenizer`: how text becomes token ids."""

    name: str = key(
        "bert-base-uncased",
        "Tokenizer on the Hugging Face hub; used when `tokenizer.path` is not set.",
        "token ids; the tokenizer saved in every checkpoint",
        min_length=1,
    )
    path: str | None = key(
        None,
        "Folder of a saved tokenizer; wins over `tokenizer.name`.",
        "token ids; the tokenizer saved in checkpoints",
    )
    max_length: int = key(
        512, "Longest piece of a document, in tokens, special tokens included.", "length of rows", ge=8
    )
    padding: Literal["max_length", "longest"] = key(
        "max_length",
        "Rows without packing are padded to `max_length`, or to the longest row of their batch (`longest`).",
        "shape of unpacked batches",
    )
    truncation: bool = key(
        True,
        "Without packing, cut a longer document after its first `max_length` tokens; `false` splits it into several rows.",
        "number of rows; share of tokens cut",
    )
    vocab_size: int | None = key(
        None,
        "Size of the vocabulary; follows the tokenizer, and is saved as it is in use.",
        "config.yaml of a run",
        ge=8,
    )


class MixtureSource(Section):
    """One entry of `dataset.mixture`."""

    path: str = key("", "As `dataset.path`.", "the source of text")
    name: str = key("", "As `dataset.name`.", "the source of text")
    config: str | None = key(None, "As `dataset.config`.", "the source of text")
    text_column: str | None = key(None, "As `dataset.text_column`.", "the text that is read")
    train_split: str | None = key(None, "As `dataset.train_split`.", "the text that is read")
    eval_split: str | None = key(None, "As `dataset.eval_split`.", "the text that is evaluated")
    weight: float = key(1.0, "Share of the rows, relative to the other weights.", "order of the data", gt=0)
    columns: dict[str, str] = key(None, "As `dataset.columns`.", "the text that is read", factory=dict)

    def laid_over(self, dataset: "DatasetConfig") -> "DatasetConfig":
        """The section with the path or name of this entry, and with what else is set in it."""
        given = self.model_dump(exclude={"weight"}, exclude_unset=True)
        columns: dict[str, object] = {"columns": {}} if given.get("text_column") else {}
        return dataset.model_copy(update={"path": "", "name": "", **columns, **given})


class DatasetConfig(Section):
    """`dataset`: where text comes from and how it is read."""

    name: str = key(
        "refinedweb",
        "Dataset on the Hugging Face hub; used when `dataset.path` is empty, or names nothing and this one is set.",
        "the source of text",
    )
    config: str | None = key(None, "Configuration (variant) of the hub dataset.", "the source of text")
    path: str = key(
        "",
        "A file, a folder or a glob of .txt, .jsonl, .json, .csv, .tsv (also as .gz, .zst), .parquet or .arrow, a folder "
        "written by `save_to_disk`, or a folder of tokens; wins over `name` when it exists.",
        "the source of text",
    )
    streaming: bool = key(
        True,
        "Read documents in file order through a shuffle buffer; `false` opens the corpus for random access and "
        "shuffles all of it anew in every epoch.",
        "order of the data",
    )
    max_seq_length: int = key(512, "Length of a training row, in tokens.", "shape of batches", ge=8)
    text_column: str | None = key(
        None, "Column that holds the text; needed when there is more than one candidate.", "the text that is read"
    )
    train_split: str | None = key(
        None,
        "Split to train on, or a slice of one, as `train[:1%]` or `train[1000:]` (default: `train`, or the only one).",
        "the text that is read",
    )
    eval_split: str | None = key(
        None,
        "Split to evaluate on, or a slice of one (default: validation, valid, dev, eval or test, whichever exists first; "
        "when none does, a stream holds out its first 1 %, at most 1,000 documents).",
        "the text that is evaluated",
    )
    validation_split: float | None = key(
        None,
        "Share of the documents held out for evaluation, drawn by `seed`; needs `streaming: false`; `eval_split` wins.",
        "which documents are trained on and which evaluated",
        gt=0,
        lt=1,
    )
    num_workers: int = key(
        16,
        "Threads that tokenise ahead of training (never more than the machine has cores; 0: none, it is done on reading).",
        "threads; time spent waiting for data",
        ge=0,
        le=1024,
    )
    pin_memory: bool = key(
        False,
        "Page-locked host memory for batches, on CUDA: copies to the GPU overlap with work.",
        "batch memory",
    )
    persistent_workers: bool = key(
        True, "Keep the tokenising threads from one epoch to the next; `false` starts new ones.", "threads"
    )
    prefetch_factor: int | None = key(
        None,
        "Blocks of documents in flight per tokenising thread (default: 2).",
        "memory; time waiting for data",
        ge=1,
        le=1024,
    )
    num_proc: int = key(4, "Threads for `pre_tokenize`.", "threads while preparing", ge=1, le=1024)
    shuffle_buffer_size: int = key(
        10000,
        "Pieces of documents in the shuffle buffer of a streamed corpus; 0 or 1 keeps file order, also with "
        "`streaming: false`.",
        "order of the data",
        ge=0,
    )
    pre_tokenize: bool = key(
        False,
        "Tokenise the whole corpus once before training and memory-map the result; needs `streaming: false`.",
        "a token folder on disk; start-up time",
    )
    pre_tokenize_output: str | None = key(
        None, "Folder of the tokenised corpus (default: `<trainer.output_dir>/tokenized`).", "where the tokens are"
    )
    cache_dir: str | None = key(None, "Folder for what the `datasets` library caches.", "where cached files are")
    trust_remote_code: bool = key(
        False,
        "Let a hub dataset run its own loading code; `datasets` no longer does that, and a note says so.",
        "a note",
    )
    load_all_from_disk: bool = key(False, "Hold the whole corpus in memory instead of memory-mapping it.", "memory")
    force_redownload: bool = key(
        False, "Make what is cached anew: downloads, and the token folder of `pre_tokenize`.", "cached files"
    )
    pretraining_prob: float = key(
        0.3,
        "Contrastive: share of the batches that are drawn from sources of plain text, where there are such sources beside "
        "pairs (SimCSE: two dropout passes of one text).",
        "source of batches",
        ge=0,
        le=1,
    )
    min_length: int = key(
        512, "Contrastive: texts of plain-text sources with fewer characters are passed over.", "documents used", ge=0
    )
    columns: dict[str, str] = key(
        None,
        "Contrastive: what columns are, as {anchor: title, positive: body, negative: other}, {text: ..., label: ...}, "
        "{text1: ..., text2: ..., score: ...} or {text: ...}; usual names need no telling. Beyond the reference.",
        "the text that is read",
        factory=dict,
    )
    mixture_temperature: float | None = key(
        None,
        "Contrastive: sources of a mixture get shares in proportion to rows ** (1 / this) instead of their weights: 1 by "
        "size, large ones equal. Beyond the reference.",
        "source of batches",
        gt=0,
    )
    long_documents: Literal["split", "truncate", "drop"] | None = key(
        None,
        "What happens to a document longer than a row: split into pieces, cut after the first, or left out "
        "(default: split when packing; otherwise as `tokenizer.truncation` says). Beyond the reference.",
        "number of rows; share of tokens cut",
    )
    bad_rows: Literal["skip", "refuse"] = key(
        "skip",
        "Rows that are no JSON, or whose text is missing, empty, not text or not UTF-8, and the rest of a compressed file "
        "that is damaged: pass over and count them, or stop at the first. Beyond the reference.",
        "an error, or a count in the summary",
    )
    mixture: list[MixtureSource] = key(
        None,
        "Several sources with weights, instead of `path` and `name`: a list of {path or name, config, text_column, "
        "train_split, eval_split, columns, weight}; what an entry does not set is the section's. Which source a row comes from "
        "depends on its index only. Beyond the reference.",
        "the source of text",
        factory=list,
    )
    mixture_exhausted: Literal["repeat", "drop", "stop"] = key(
        "repeat",
        "When a source of the mixture has been read: begin it again, go on with the others, or end the run. Beyond the "
        "reference.",
        "the source of text; length of the run",
    )
    num_shards: int | None = key(
        None,
        "Equal parts that the corpus is dealt to, document by document; a resumed run may use any number of processes "
        "that divides it (default: the number of processes). Beyond the reference.",
        "order of the data",
        ge=1,
        le=4096,
    )


class DataCollatorConfig(Section):
    """`datacollator`: rows and their masks."""

    mlm_probability: float = key(0.15, "Share of tokens selected for prediction.", "masks", gt=0, lt=1)
    mlm_probability_final: float | None = key(
        None,
        "The share at the end of the run, reached linearly from `mlm_probability` (default: constant). Evaluations keep "
        "`mlm_probability`. Beyond the reference.",
        "masks",
        gt=0,
        lt=1,
    )
    mask_all: bool = key(
        False, "Replace every selected token by [MASK]; `false`: 80 % [MASK], 10 % random, 10 % unchanged.", "masks"
    )
    pack_sequences: bool = key(
        False, "Fill each row with several documents that never see each other.", "rows; share of padding"
    )
    max_length: int | None = key(None, "Length of a packed row (default: `dataset.max_seq_length`).", "rows", ge=8)
    pad_to_multiple_of: int | None = key(
        None,
        "Without packing, round the padded length up to a multiple of this.",
        "shape of unpacked batches",
        ge=1,
        le=4096,
    )
