"""The sections that every run has: model, tokenizer, dataset, datacollator, trainer, scheduler, optimizer, wandb.

A table: each key with its default, help, where its effect shows, bounds, and the tasks in which it acts if not in all of its
section. Layout by hand.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from neobert.config.field import CONTRASTIVE, PRETRAINING, TASKS, TEXT, Section, key

# fmt: off
Probability = Annotated[float, Field(ge=0, lt=1)]


def _precision(value: Any) -> Any:
    """YAML writes booleans where people mean a precision: true is bf16, false is fp32 (as `no`)."""
    return {True: "bf16", False: "no"}[value] if isinstance(value, bool) else value


def _selector(value: Any) -> Any:
    """A step is written as a number in YAML; true is the latest checkpoint, false none."""
    if isinstance(value, bool) or value in ("true", "false"):
        return "latest" if value in (True, "true") else None
    return str(value) if isinstance(value, int) else value


Precision = Annotated[Literal["no", "fp32", "bf16", "fp16"], BeforeValidator(_precision)]


class ModelConfig(Section):
    """`model`: the architecture."""

    name: str | None = key(None,
        "Name of the model, kept in its config.json; with `from_hub` the folder or hub name it comes from.",
        "config.json of a checkpoint")
    hidden_size: int = key(768, "Width of embeddings, attention and residual stream.", "shape of the model", ge=8, le=65536)
    num_hidden_layers: int = key(12, "Encoder blocks.", "shape of the model", ge=1, le=1024)
    num_attention_heads: int = key(12,
        "Attention heads per block; must divide `hidden_size`.", "shape of the model", ge=1, le=4096)
    intermediate_size: int = key(3072,
        "Width of the feed-forward block; SwiGLU uses two thirds of it, rounded up to a multiple of 8.",
        "shape of the model", ge=8, le=2**20)
    max_position_embeddings: int = key(512,
        "Longest sequence the model is built for, in tokens.", "longest input", ge=8, le=2**24)
    vocab_size: int = key(30522,
        "Size of the vocabulary. Follows the tokenizer, rounded up to a multiple of 64; a larger value than that is honoured.",
        "shape of the model; len(tokenizer)", ge=8, le=2**24)
    hidden_act: Literal["swiglu", "gelu"] = key("swiglu", "Activation of the feed-forward block.", "shape of the model")
    dropout_prob: float = key(0.0, "Dropout in embeddings, attention and feed-forward output.", "training noise", ge=0, lt=1)
    norm_eps: float = key(1e-5, "Term that keeps the norms stable.", "outputs", gt=0, lt=1)
    rms_norm: bool = key(True, "RMSNorm; `false`: LayerNorm.", "shape of the model")
    attn_backend: Literal["sdpa", "flash_attn_varlen"] = key("sdpa",
        "Attention kernel; `flash_attn_varlen` (the flash-attn package, or torch's own kernel) needs CUDA and falls back with "
        "a message.", "speed")
    kernel_backend: Literal["auto", "liger", "torch"] = key("auto",
        "Kernels of norms and SwiGLU; `auto` takes Liger on CUDA when it is installed.", "speed")
    rope: bool = key(True, "Rotary positions; `false`: learned positions.", "shape of the model")
    ngpt: bool = key(False,
        "The normalised transformer (arXiv 2410.01131): no norms, all vectors of length 1.", "shape of the model")
    base_scale: float = key(1.0 / (960.0**0.5),
        "How large nGPT stores its learned scales: small is fast.", "updates with `ngpt`", gt=0)
    pad_token_id: int = key(0, "Id of the padding token; follows the tokenizer.", "config.json of a checkpoint", ge=0)
    embedding_init_range: float = key(0.02, "Embeddings start uniform within plus or minus this.", "initial weights", gt=0)
    decoder_init_range: float = key(0.02, "Matrices start uniform within plus or minus this.", "initial weights", gt=0)
    classifier_init_range: float = key(0.02, "Standard deviation of a classifier's first weights.", "initial weights", gt=0)
    from_hub: bool = key(False,
        "Start from the model `model.name`; its architecture and tokenizer are used. GLUE, contrastive: a folder or hub name "
        "that `AutoModel` loads. Pretraining: a checkpoint, an export, a EuroBERT or a published NeoBERT.", "initial weights")


class TokenizerConfig(Section):
    """`tokenizer`: how text becomes token ids."""

    tasks = TASKS
    name: str = key("bert-base-uncased",
        "Tokenizer on the Hugging Face hub; used when `tokenizer.path` is not set.",
        "token ids; the tokenizer saved in every checkpoint", min_length=1)
    path: str | None = key(None,
        "Folder of a saved tokenizer; wins over `tokenizer.name`.", "token ids; the tokenizer saved in checkpoints")
    max_length: int = key(512,
        "Longest piece of a document, in tokens, special tokens included.", "length of rows", ge=8, tasks=(*TEXT, "mteb"))
    padding: Literal["max_length", "longest"] = key("max_length",
        "Rows without packing are padded to `max_length`, or to the longest row of their batch (`longest`).",
        "shape of unpacked batches")
    truncation: bool = key(True,
        "Without packing, cut a longer document after its first `max_length` tokens; `false` splits it into several rows.",
        "number of rows; share of tokens cut")
    vocab_size: int | None = key(None,
        "Size of the vocabulary; follows the tokenizer, and is saved as it is in use.", "config.yaml of a run", ge=8)


class MixtureSource(Section):
    """One entry of `dataset.mixture`."""

    path: str = key("", "As `dataset.path`.", "the source of text")
    name: str = key("", "As `dataset.name`.", "the source of text")
    config: str | None = key(None, "As `dataset.config`.", "the source of text")
    text_column: str | None = key(None, "As `dataset.text_column`.", "the text that is read")
    train_split: str | None = key(None, "As `dataset.train_split`.", "the text that is read")
    eval_split: str | None = key(None, "As `dataset.eval_split`.", "the text that is evaluated")
    weight: float = key(1.0, "Share of the rows, relative to the other weights.", "order of the data", gt=0)
    columns: dict[str, str] = key({}, "As `dataset.columns`.", "the text that is read")

    def laid_over(self, dataset: "DatasetConfig") -> "DatasetConfig":
        """The section with the path or name of this entry, and with what else is set in it."""
        given = self.model_dump(exclude={"weight"}, exclude_unset=True)
        columns: dict[str, object] = {"columns": {}} if given.get("text_column") else {}
        return dataset.model_copy(update={"path": "", "name": "", **columns, **given})


class DatasetConfig(Section):
    """`dataset`: where text comes from and how it is read."""

    name: str = key("refinedweb",
        "Dataset on the Hugging Face hub; used when `dataset.path` is empty, or names nothing and this one is set.",
        "the source of text")
    config: str | None = key(None, "Configuration (variant) of the hub dataset.", "the source of text")
    path: str = key("",
        "A file, a folder or a glob of .txt, .jsonl, .json, .csv, .tsv (also as .gz, .zst), .parquet or .arrow, a folder "
        "written by `save_to_disk`, or a folder of tokens; wins over `name` when it exists.", "the source of text")
    streaming: bool = key(True,
        "Read documents in file order through a shuffle buffer; `false` opens the corpus for random access and shuffles all "
        "of it anew in every epoch.", "order of the data", tasks=TEXT)
    max_seq_length: int = key(512, "Length of a training row, in tokens.", "shape of batches", ge=8, tasks=TEXT)
    text_column: str | None = key(None,
        "Column that holds the text; needed when there is more than one candidate.", "the text that is read", tasks=TEXT)
    train_split: str | None = key(None,
        "Split to train on, or a slice of one, as `train[:1%]` or `train[1000:]` (default: `train`, or the only one).",
        "the text that is read", tasks=TEXT)
    eval_split: str | None = key(None,
        "Split to evaluate on, or a slice of one (default: validation, valid, dev, eval or test, whichever exists first; when "
        "none does, a stream holds out its first 1 %, at most 1,000 documents).", "the text that is evaluated", tasks=TEXT)
    validation_split: float | None = key(None,
        "Share of the documents held out for evaluation, drawn by `seed`; needs `streaming: false`; `eval_split` wins.",
        "which documents are trained on and which evaluated", gt=0, lt=1, tasks=TEXT)
    num_workers: int = key(16,
        "Threads that tokenise ahead of training (never more than the machine has cores; 0: none, it is done on reading).",
        "threads; time spent waiting for data", ge=0, le=1024)
    pin_memory: bool = key(False,
        "Page-locked host memory for batches, on CUDA: copies to the GPU overlap with work.", "batch memory", tasks=PRETRAINING)
    persistent_workers: bool = key(True,
        "Keep the tokenising threads from one epoch to the next; `false` starts new ones.", "threads", tasks=PRETRAINING)
    prefetch_factor: int | None = key(None,
        "Blocks of documents in flight per tokenising thread (default: 2).",
        "memory; time waiting for data", ge=1, le=1024, tasks=PRETRAINING)
    num_proc: int = key(4, "Threads for `pre_tokenize`.", "threads while preparing", ge=1, le=1024, tasks=PRETRAINING)
    shuffle_buffer_size: int = key(10000,
        "Pieces of documents in the shuffle buffer of a streamed corpus; 0 or 1 keeps file order, also with `streaming: "
        "false`.", "order of the data", ge=0, tasks=PRETRAINING)
    pre_tokenize: bool = key(False,
        "Tokenise the whole corpus once before training and memory-map the result; needs `streaming: false`.",
        "a token folder on disk; start-up time", tasks=PRETRAINING)
    pre_tokenize_output: str | None = key(None,
        "Folder of the tokenised corpus (default: `<trainer.output_dir>/tokenized`).",
        "where the tokens are", tasks=PRETRAINING)
    cache_dir: str | None = key(None, "Folder for what the `datasets` library caches.", "where cached files are")
    trust_remote_code: bool = key(False,
        "Let a hub dataset run its own loading code; `datasets` no longer does that, and a note says so.", "a note")
    load_all_from_disk: bool = key(False, "Hold the whole corpus in memory instead of memory-mapping it.", "memory", tasks=TEXT)
    force_redownload: bool = key(False,
        "Make what is cached anew: downloads, and the token folder of `pre_tokenize`.", "cached files")
    pretraining_prob: float = key(0.3,
        "Share of the batches that are drawn from sources of plain text, where there are such sources beside pairs (SimCSE: "
        "two dropout passes of one text).", "source of batches", ge=0, le=1, tasks=CONTRASTIVE)
    min_length: int = key(512,
        "Texts of plain-text sources with fewer characters are passed over.", "documents used", ge=0, tasks=CONTRASTIVE)
    columns: dict[str, str] = key({},
        "What columns are, as {anchor: title, positive: body, negative: other}, {text: ..., label: ...}, {text1: ..., text2: "
        "..., score: ...} or {text: ...}; usual names need no telling.",
        "the text that is read", tasks=CONTRASTIVE, beyond=True)
    mixture_temperature: float | None = key(None,
        "Sources of a mixture get shares in proportion to rows ** (1 / this) instead of their weights: 1 by size, large ones "
        "equal.", "source of batches", gt=0, tasks=CONTRASTIVE, beyond=True)
    long_documents: Literal["split", "truncate", "drop"] | None = key(None,
        "What happens to a document longer than a row: split into pieces, cut after the first, or left out (default: split "
        "when packing; otherwise as `tokenizer.truncation` says).",
        "number of rows; share of tokens cut", tasks=PRETRAINING, beyond=True)
    bad_rows: Literal["skip", "refuse"] = key("skip",
        "Rows that are no JSON, or whose text is missing, empty, not text or not UTF-8, and the rest of a compressed file "
        "that is damaged: pass over and count them, or stop at the first.",
        "an error, or a count in the summary", tasks=TEXT, beyond=True)
    mixture: list[MixtureSource] = key([],
        "Several sources with weights, instead of `path` and `name`: a list of {path or name, config, text_column, "
        "train_split, eval_split, columns, weight}; what an entry does not set is the section's. Which source a row comes "
        "from depends on its index only.", "the source of text", tasks=TEXT, beyond=True)
    mixture_exhausted: Literal["repeat", "drop", "stop"] = key("repeat",
        "When a source of the mixture has been read: begin it again, go on with the others, or end the run.",
        "the source of text; length of the run", tasks=PRETRAINING, beyond=True)
    num_shards: int | None = key(None,
        "Equal parts that the corpus is dealt to, document by document; a resumed run may use any number of processes that "
        "divides it (default: the number of processes).", "order of the data", ge=1, le=4096, tasks=PRETRAINING, beyond=True)


class DataCollatorConfig(Section):
    """`datacollator`: rows and their masks."""

    mlm_probability: float = key(0.15, "Share of tokens selected for prediction.", "masks", gt=0, lt=1, tasks=PRETRAINING)
    mlm_probability_final: float | None = key(None,
        "The share at the end of the run, reached linearly from `mlm_probability` (default: constant). Evaluations keep "
        "`mlm_probability`.", "masks", gt=0, lt=1, tasks=PRETRAINING, beyond=True)
    mask_all: bool = key(False,
        "Replace every selected token by [MASK]; `false`: 80 % [MASK], 10 % random, 10 % unchanged.",
        "masks", tasks=PRETRAINING)
    pack_sequences: bool = key(False,
        "Fill each row with several documents that never see each other.", "rows; share of padding")
    max_length: int | None = key(None,
        "Length of a packed row (default: `dataset.max_seq_length`).", "rows", ge=8, tasks=PRETRAINING)
    pad_to_multiple_of: int | None = key(None,
        "Without packing, round the padded length up to a multiple of this.", "shape of unpacked batches", ge=1, le=4096)


class TrainerConfig(Section):
    """`trainer`: the loop."""

    per_device_train_batch_size: int = key(16, "Rows per microbatch and device.", "tokens per step", ge=1)
    per_device_eval_batch_size: int = key(32, "Rows per evaluation batch and device.", "evaluation memory", ge=1)
    gradient_accumulation_steps: int = key(1, "Microbatches per optimizer step.", "tokens per step", ge=1)
    max_steps: int = key(1_000_000,
        "Optimizer steps to train for; -1: until `num_train_epochs` have been read.", "length of the run", ge=-1)
    save_steps: int = key(10_000, "Steps between checkpoints (`save_strategy: steps`).", "checkpoints", ge=1)
    eval_steps: int = key(10_000, "Steps between evaluations (`eval_strategy: steps`).", "evaluations", ge=1)
    logging_steps: int = key(100, "Steps between lines of metrics.jsonl and the console.", "metrics.jsonl", ge=1)
    output_dir: str = key("./output", "Folder for everything that a run writes.", "where things are", min_length=1, tasks=TASKS)
    mixed_precision: Precision = key("bf16",
        "Arithmetic of the forward and backward pass: `bf16` (autocast), or `no`/`fp32`. Weights are always float32.",
        "speed; rounding", tasks=TASKS)
    gradient_checkpointing: bool = key(False,
        "Recompute activations in the backward pass instead of keeping them.", "memory; speed")
    gradient_checkpointing_interval: int = key(1,
        "With `gradient_checkpointing`, recompute one block in this many: 1 all of them, 2 every second one.",
        "memory; speed", ge=1, le=1024, beyond=True)
    gradient_clipping: float | None = key(None, "Largest norm of the gradient; `null`: no clipping.", "updates", gt=0)
    torch_compile: bool = key(False,
        "Compile the encoder's blocks, without attention, with `torch.compile`.", "speed; start-up time")
    torch_compile_dynamic: bool | None = key(None, "Compile for changing shapes (`null`: torch decides).", "recompilations")
    torch_compile_backend: str = key("inductor", "Backend of `torch.compile`.", "speed", min_length=1)
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = key(None,
        "Mode of `torch.compile` with inductor; `reduce-overhead` and `max-autotune` record CUDA graphs, for rows packed full.",
        "speed; start-up time", beyond=True)
    enforce_full_packed_batches: bool = key(True,
        "Packing yields full microbatches only; `false` packs each `per_device_train_batch_size` pieces of documents by "
        "themselves.", "share of padding", tasks=PRETRAINING)
    eval_max_batches: int | None = key(None, "Most batches of an evaluation.", "evaluation length", ge=1)
    log_train_accuracy: bool = key(False, "Log the share of masked tokens guessed right.", "metrics.jsonl: accuracy")
    log_grad_norm: bool = key(False, "Log the norm of the gradient.", "metrics.jsonl: grad_norm")
    log_weight_norms: bool = key(False, "Log the norm of the weights.", "metrics.jsonl: weight_norm")
    tf32: bool = key(True, "Allow TF32 matrix products on CUDA.", "speed; rounding of float32 on CUDA", tasks=TASKS)
    masked_logits_only_loss: bool = key(True,
        "Compute logits at masked positions only; `false`: at all positions.", "memory; speed", tasks=PRETRAINING)
    resume_from_checkpoint: Annotated[str | None, BeforeValidator(_selector)] = key(None,
        "Continue from `latest` or `true` (the last step), a step number (later steps are moved to `previous/<n>`), or the "
        "path of a checkpoint; one of another folder begins a new run in this one.", "where the run starts")
    overwrite_output_dir: bool = key(True,
        "Start over in an output folder that holds a run, which is moved to `previous/<n>` in it and never deleted; `false`: "
        "refuse.", "an error, or a fresh folder")
    num_train_epochs: int = key(3, "Passes over the data when `max_steps` is -1.", "length of the run", ge=1)
    eval_strategy: Literal["steps", "epoch"] = key("steps", "Evaluate every `eval_steps`, or every epoch.", "evaluations")
    save_strategy: Literal["steps", "epoch", "best", "no"] = key("steps",
        "Save every `save_steps`, every epoch, at each best evaluation, or never.", "checkpoints")
    save_total_limit: int | None = key(3,
        "Checkpoints kept; the newest and the best one always are. `null`: all.", "checkpoints", ge=1)
    max_ckpt: int = key(3, "Older name of `save_total_limit`; acts when that one is not set.", "checkpoints", ge=1)
    disable_tqdm: bool = key(False, "No progress bars.", "the terminal")
    dataloader_num_workers: int = key(0,
        "Older name of `dataset.num_workers`; acts when that one is not set.", "threads", ge=0, le=1024)
    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = key("auto",
        "What several processes run on: `ddp` (each holds the whole model), `fsdp2` (each holds a part), `deepspeed` (ZeRO), "
        "or as they were launched (`auto`: DDP unless the launcher says otherwise).", "memory; communication", beyond=True)
    fsdp_reshard_after_forward: bool = key(True,
        "FSDP2 frees a block's gathered weights after its forward pass and gathers them again; `false` keeps them.",
        "memory; communication", beyond=True)
    fsdp_hybrid: bool = key(False,
        "FSDP2 splits the model over the processes of a node, and every node has a copy.", "memory; communication", beyond=True)
    ddp_bf16_gradients: bool = key(False,
        "DDP sums gradients over the processes in bfloat16: half of the traffic.", "communication; rounding", beyond=True)
    deepspeed_config_file: str | None = key(None,
        "DeepSpeed's own JSON file (default: ZeRO stage 2, or what the launcher says).", "memory; communication", beyond=True)
    save_in_background: bool = key(True,
        "Write checkpoints while training goes on; needs memory for a copy of weights and optimizer state.",
        "speed", beyond=True)
    use_cpu: bool = key(False, "Train on the CPU even where there is a GPU.", "the device", tasks=TASKS)
    report_to: list[str] = key([],
        "Experiment trackers, as Accelerate names them: wandb, tensorboard, trackio, mlflow and others.", "tracker files")
    train_batch_size: int | None = key(None,
        "Older name of `per_device_train_batch_size`; acts when that one is not set.", "tokens per step", ge=1)
    eval_batch_size: int | None = key(None,
        "Older name of `per_device_eval_batch_size`; acts when that one is not set.", "evaluation memory", ge=1)
    early_stopping: int = key(0, "Stop after this many evaluations without improvement; 0: never.", "length of the run", ge=0)
    metric_for_best_model: str | None = key(None,
        "Evaluation metric that decides which checkpoint is best (default: loss).", "the best checkpoint")
    greater_is_better: bool = key(True,
        "Whether a larger metric is better; for `loss` and `perplexity` smaller always is.", "the best checkpoint")
    load_best_model_at_end: bool = key(False,
        "End with the weights of the best checkpoint, which `latest` then means.", "the final weights")
    save_model: bool = key(True, "Save the final weights at the end of the run.", "the last checkpoint")


class SchedulerConfig(Section):
    """`scheduler`: the learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"] = key("cosine",
        "Shape of the decay; `wsd` stays at the peak, then falls in a straight line; `inverse_sqrt` follows 1/sqrt(step).",
        "learning rate")
    warmup_steps: int = key(10_000, "Steps of linear warmup from 0.", "learning rate", ge=0)
    total_steps: int | None = key(None, "Length of the schedule (default: the length of the run).", "learning rate", ge=1)
    decay_steps: int | None = key(None, "Step at which the floor is reached (default: `total_steps`).", "learning rate", ge=1)
    warmup_percent: float | None = key(None,
        "Warmup in percent of the schedule; wins over `warmup_steps`.", "learning rate", ge=0, le=100)
    decay_percent: float | None = key(None,
        "End of the decay in percent of the schedule; wins over `decay_steps`.", "learning rate", gt=0, le=100)
    num_cycles: float = key(0.5, "Cosine waves between warmup and the end; 0.5 falls once.", "learning rate", gt=0)
    final_lr_ratio: float = key(0.1, "Floor of the learning rate, as a ratio of `optimizer.lr`.", "learning rate", ge=0, le=1)
    power: float = key(2.0, "Exponent of `name: polynomial`; 1 is linear.", "learning rate", gt=0, le=100, beyond=True)
    wsd_decay_percent: float = key(20.0,
        "Length of the fall of `name: wsd`, in percent of the schedule.", "learning rate", ge=0, le=100, beyond=True)


class MuonConfig(Section):
    """`optimizer.muon_config`: settings of MuonClip."""

    muon_beta: float = key(0.95, "Momentum.", "updates", ge=0, lt=1)
    nesterov: bool = key(False, "Look ahead along the momentum, as Keller Jordan's Muon does.", "updates", beyond=True)
    muon_decay: float = key(0.0, "Weight decay of the Muon matrices.", "updates", ge=0)
    ns_steps: int = key(5,
        "Iterations of the orthogonalisation; more of them even out smaller singular values.", "updates", ge=1, le=20)
    enable_clipping: bool = key(True,
        "Clip attention logits (QK-clip); off with `model.ngpt`, which bounds them itself.", "query and key weights")
    clipping_threshold: float = key(50.0,
        "Largest attention logit of a head, q.k / sqrt(head width), before it is clipped.", "query and key weights", gt=0)
    clipping_alpha: float = key(0.5,
        "Share of the correction that queries take; keys take the rest.", "query and key weights", ge=0, le=1)
    clipping_warmup_steps: int = key(0, "Steps without clipping at the start.", "query and key weights", ge=0)
    clipping_interval: int = key(10, "Steps from one look at the logits, and clip, to the next.", "query and key weights", ge=1)
    clipping_qk_chunk_size: int = key(1024, "Queries per chunk when looking for the largest logit.", "memory", ge=1)
    capture_last_microbatch_only: bool = key(True,
        "Look at the last microbatch of an accumulation window only.", "query and key weights")
    detect_anomalies: bool = key(False, "Stop at a gradient that is not finite, naming the parameter.", "an error")
    orthogonalization: Literal["polar_express", "newton_schulz"] = key("polar_express", "Iteration used.", "updates")
    algorithm: str | None = key(None, "Deprecated name of `orthogonalization`.", "updates")
    polar_express: bool | None = key(None, "Deprecated switch of `orthogonalization`.", "updates")
    clipping_layers_mapping: dict[str, str] = key({},
        "Names of the modules `q_proj`, `k_proj` (and `v_proj`) in attention blocks that keep projections apart.",
        "which weights are clipped")


class ParamGroup(Section):
    """An entry of `optimizer.param_groups`."""

    pattern: str = Field(min_length=1, description="Names of parameters, as in a shell: `*`, `?`, `[abc]`.")
    lr_scale: float = Field(default=1.0, ge=0, description="Factor of the learning rate.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay instead of the usual one.")
    algorithm: Literal["muon", "adamw"] | None = Field(default=None, description="Which half of MuonClip takes them.")


class OptimizerConfig(Section):
    """`optimizer`: how gradients become updates."""

    name: Literal["adamw", "adam", "muonclip"] = key("adamw", "Optimizer family.", "updates")
    lr: float = key(1e-4, "Peak learning rate.", "updates", gt=0)
    weight_decay: float = key(0.01,
        "Decoupled weight decay of matrices; norms and embeddings have none, MuonClip's matrices `muon_decay`.",
        "updates", ge=0)
    betas: list[Probability] = key([0.9, 0.999], "Decay rates of Adam's two moments.", "updates", min_length=2, max_length=2)
    eps: float = key(1e-8, "Term that keeps Adam's division stable.", "updates", gt=0)
    muon_config: MuonConfig | None = key(None, "Settings of MuonClip (`name: muonclip`).", "updates")
    param_groups: list[ParamGroup] = key([],
        "Exceptions for parameters by name, a list of `{pattern, lr_scale, weight_decay, algorithm}`. The first pattern that "
        "matches a name decides; one that acts on nothing is an error.", "updates", beyond=True)


class WandbConfig(Section):
    """`wandb`: the Weights & Biases tracker."""

    enabled: bool = key(False, "Log to Weights & Biases.", "tracker files")
    project: str = key("neo-bert", "Project.", "tracker files", min_length=1)
    entity: str | None = key(None, "User or team.", "tracker files")
    name: str | None = key(None, "Name of the run.", "tracker files")
    tags: list[str] = key([], "Tags of the run.", "tracker files")
    mode: Literal["online", "offline", "disabled"] = key("online", "Where the run is recorded.", "tracker files")
    log_interval: int = key(100,
        "Left over; `trainer.logging_steps` says how often is logged, and a note says so.", "a note", ge=1)
    resume: Literal["never", "allow", "must", "auto"] = key("never", "Whether to continue a recorded run.", "tracker files")
    dir: str = key("logs/wandb", "Folder of the recorded run.", "tracker files", min_length=1)
