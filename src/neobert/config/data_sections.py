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
        "Expected vocabulary size; a tokenizer of another size stops the run. The size in use is printed and saved.",
        "an error when the tokenizer differs",
        ge=8,
    )


class DatasetConfig(Section):
    """`dataset`: where text comes from and how it is read."""

    name: str = key(
        "refinedweb", "Dataset on the Hugging Face hub; used when `dataset.path` is empty.", "the source of text"
    )
    config: str | None = key(None, "Configuration (variant) of the hub dataset.", "the source of text")
    path: str = key(
        "",
        "A file, a folder or a glob of .txt, .jsonl or .parquet, or a folder written by `save_to_disk`; wins over `name`.",
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
        None, "Split to train on (default: `train`, or the only one).", "the text that is read"
    )
    eval_split: str | None = key(
        None,
        "Split to evaluate on (default: validation, valid, dev, eval or test, whichever exists first).",
        "the text that is evaluated",
    )
    validation_split: float | None = key(
        None,
        "Share of the documents held out for evaluation, drawn by `seed`; needs `streaming: false`.",
        "which documents are trained on and which evaluated",
        gt=0,
        lt=1,
    )
    num_workers: int = key(
        16,
        "Processes that tokenise ahead of training (never more than the machine has cores; 0: in the training process).",
        "processes; time spent waiting for data",
        ge=0,
        le=1024,
    )
    pin_memory: bool = key(
        False,
        "Page-locked host memory for batches. Always on when training on CUDA, without effect elsewhere.",
        "batch memory",
    )
    persistent_workers: bool = key(
        True, "Keep the tokenising processes from one epoch to the next; `false` starts new ones.", "process ids"
    )
    prefetch_factor: int | None = key(
        None,
        "Blocks of documents in flight per tokenising process (default: 2).",
        "memory; time waiting for data",
        ge=1,
        le=1024,
    )
    num_proc: int = key(4, "Processes for `pre_tokenize`.", "processes while preparing", ge=1, le=1024)
    shuffle_buffer_size: int = key(
        10000,
        "Documents in the shuffle buffer of a streamed corpus; 0 or 1 keeps file order.",
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
    trust_remote_code: bool = key(False, "Let a hub dataset run its own loading code.", "whether such a dataset loads")
    load_all_from_disk: bool = key(False, "Hold the whole corpus in memory instead of memory-mapping it.", "memory")
    force_redownload: bool = key(
        False, "Make what is cached anew: downloads, and the token folder of `pre_tokenize`.", "cached files"
    )
    pretraining_prob: float = key(
        0.3, "Contrastive: share of steps that draw unlabelled corpus text.", "source of batches", ge=0, le=1
    )
    min_length: int = key(512, "Contrastive: shortest corpus text that is used, in characters.", "documents used", ge=0)
    long_documents: Literal["split", "truncate", "drop"] | None = key(
        None,
        "What happens to a document longer than a row: split into pieces, cut after the first, or left out "
        "(default: split when packing; otherwise as `tokenizer.truncation` says). Beyond the reference.",
        "number of rows; share of tokens cut",
    )


class DataCollatorConfig(Section):
    """`datacollator`: rows and their masks."""

    mlm_probability: float = key(0.15, "Share of tokens selected for prediction.", "masks", gt=0, lt=1)
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
