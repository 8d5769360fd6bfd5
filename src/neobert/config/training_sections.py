"""The sections of the YAML that describe training: trainer, scheduler, optimizer, wandb."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from neobert.config.field import Section, key

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


class TrainerConfig(Section):
    """`trainer`: the loop."""

    per_device_train_batch_size: int = key(16, "Rows per microbatch and device.", "tokens per step", ge=1)
    per_device_eval_batch_size: int = key(32, "Rows per evaluation batch and device.", "evaluation memory", ge=1)
    gradient_accumulation_steps: int = key(1, "Microbatches per optimizer step.", "tokens per step", ge=1)
    max_steps: int = key(
        1_000_000,
        "Optimizer steps to train for; -1: until `num_train_epochs` have been read.",
        "length of the run",
        ge=-1,
    )
    save_steps: int = key(10_000, "Steps between checkpoints (`save_strategy: steps`).", "checkpoints", ge=1)
    eval_steps: int = key(10_000, "Steps between evaluations (`eval_strategy: steps`).", "evaluations", ge=1)
    logging_steps: int = key(100, "Steps between lines of metrics.jsonl and the console.", "metrics.jsonl", ge=1)
    output_dir: str = key("./output", "Folder for everything that a run writes.", "where things are", min_length=1)
    mixed_precision: Precision = key(
        "bf16",
        "Arithmetic of the forward and backward pass: `bf16` (autocast), or `no`/`fp32`. Weights are always float32.",
        "speed; rounding",
    )
    gradient_checkpointing: bool = key(
        False, "Recompute activations in the backward pass instead of keeping them.", "memory; speed"
    )
    gradient_clipping: float | None = key(None, "Largest norm of the gradient; `null`: no clipping.", "updates", gt=0)
    torch_compile: bool = key(
        False, "Compile the encoder's blocks, without attention, with `torch.compile`.", "speed; start-up time"
    )
    torch_compile_dynamic: bool | None = key(
        None, "Compile for changing shapes (`null`: torch decides).", "recompilations"
    )
    torch_compile_backend: str = key("inductor", "Backend of `torch.compile`.", "speed", min_length=1)
    enforce_full_packed_batches: bool = key(
        True,
        "Packing yields full microbatches only; `false` packs each `per_device_train_batch_size` pieces of documents by "
        "themselves.",
        "share of padding",
    )
    eval_max_batches: int | None = key(None, "Most batches of an evaluation.", "evaluation length", ge=1)
    log_train_accuracy: bool = key(False, "Log the share of masked tokens guessed right.", "metrics.jsonl: accuracy")
    log_grad_norm: bool = key(False, "Log the norm of the gradient.", "metrics.jsonl: grad_norm")
    log_weight_norms: bool = key(False, "Log the norm of the weights.", "metrics.jsonl: weight_norm")
    tf32: bool = key(True, "Allow TF32 matrix products on CUDA.", "speed; rounding of float32 on CUDA")
    masked_logits_only_loss: bool = key(
        True, "Compute logits at masked positions only; `false`: at all positions.", "memory; speed"
    )
    resume_from_checkpoint: Annotated[str | None, BeforeValidator(_selector)] = key(
        None,
        "Continue from `latest` or `true` (the last step), a step number (later steps are moved to `previous/<n>`), or the "
        "path of a checkpoint; one of another folder begins a new run in this one.",
        "where the run starts",
    )
    overwrite_output_dir: bool = key(
        True,
        "Start over in an output folder that holds a run, which is moved to `previous/<n>` in it and never deleted; "
        "`false`: refuse.",
        "an error, or a fresh folder",
    )
    num_train_epochs: int = key(3, "Passes over the data when `max_steps` is -1.", "length of the run", ge=1)
    eval_strategy: Literal["steps", "epoch"] = key(
        "steps", "Evaluate every `eval_steps`, or every epoch.", "evaluations"
    )
    save_strategy: Literal["steps", "epoch", "best", "no"] = key(
        "steps", "Save every `save_steps`, every epoch, at each best evaluation, or never.", "checkpoints"
    )
    save_total_limit: int | None = key(
        3, "Checkpoints kept; the newest and the best one always are. `null`: all.", "checkpoints", ge=1
    )
    max_ckpt: int = key(3, "Older name of `save_total_limit`; acts when that one is not set.", "checkpoints", ge=1)
    disable_tqdm: bool = key(False, "No progress bars.", "the terminal")
    dataloader_num_workers: int = key(
        0, "Older name of `dataset.num_workers`; acts when that one is not set.", "threads", ge=0, le=1024
    )
    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = key(
        "auto",
        "What several processes run on: `ddp` (each holds the whole model), `fsdp2` (each holds a part), `deepspeed` (ZeRO), "
        "or as they were launched (`auto`: DDP unless the launcher says otherwise).",
        "memory; communication",
    )
    deepspeed_config_file: str | None = key(
        None, "DeepSpeed's own JSON file (default: ZeRO stage 2, or what the launcher says).", "memory; communication"
    )
    save_in_background: bool = key(
        True,
        "Write checkpoints while training goes on; needs memory for a copy of weights and optimizer state.",
        "speed",
    )
    use_cpu: bool = key(False, "Train on the CPU even where there is a GPU.", "the device")
    report_to: list[str] = key(
        None,
        "Experiment trackers, as Accelerate names them: wandb, tensorboard, trackio, mlflow and others.",
        "tracker files",
        factory=list,
    )
    train_batch_size: int | None = key(
        None, "Older name of `per_device_train_batch_size`; acts when that one is not set.", "tokens per step", ge=1
    )
    eval_batch_size: int | None = key(
        None, "Older name of `per_device_eval_batch_size`; acts when that one is not set.", "evaluation memory", ge=1
    )
    early_stopping: int = key(
        0, "Stop after this many evaluations without improvement; 0: never.", "length of the run", ge=0
    )
    metric_for_best_model: str | None = key(
        None, "Evaluation metric that decides which checkpoint is best (default: loss).", "the best checkpoint"
    )
    greater_is_better: bool = key(
        True, "Whether a larger metric is better; for `loss` and `perplexity` smaller always is.", "the best checkpoint"
    )
    load_best_model_at_end: bool = key(
        False, "End with the weights of the best checkpoint, which `latest` then means.", "the final weights"
    )
    save_model: bool = key(True, "Save the final weights at the end of the run.", "the last checkpoint")


class SchedulerConfig(Section):
    """`scheduler`: the learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"] = key(
        "cosine",
        "Shape of the decay; `wsd` stays at the peak, then falls in a straight line; `inverse_sqrt` follows 1/sqrt(step).",
        "learning rate",
    )
    warmup_steps: int = key(10_000, "Steps of linear warmup from 0.", "learning rate", ge=0)
    total_steps: int | None = key(
        None, "Length of the schedule (default: the length of the run).", "learning rate", ge=1
    )
    decay_steps: int | None = key(
        None, "Step at which the floor is reached (default: `total_steps`).", "learning rate", ge=1
    )
    warmup_percent: float | None = key(
        None, "Warmup in percent of the schedule; wins over `warmup_steps`.", "learning rate", ge=0, le=100
    )
    decay_percent: float | None = key(
        None, "End of the decay in percent of the schedule; wins over `decay_steps`.", "learning rate", gt=0, le=100
    )
    num_cycles: float = key(0.5, "Cosine waves between warmup and the end; 0.5 falls once.", "learning rate", gt=0)
    final_lr_ratio: float = key(
        0.1, "Floor of the learning rate, as a ratio of `optimizer.lr`.", "learning rate", ge=0, le=1
    )
    power: float = key(2.0, "Exponent of `name: polynomial`; 1 is linear.", "learning rate", gt=0, le=100)
    wsd_decay_percent: float = key(
        20.0, "Length of the fall of `name: wsd`, in percent of the schedule.", "learning rate", ge=0, le=100
    )


class MuonConfig(Section):
    """`optimizer.muon_config`: settings of MuonClip."""

    muon_beta: float = key(0.95, "Momentum.", "updates", ge=0, lt=1)
    nesterov: bool = key(False, "Look ahead along the momentum, as Keller Jordan's Muon does.", "updates")
    muon_decay: float = key(0.0, "Weight decay of the Muon matrices.", "updates", ge=0)
    ns_steps: int = key(
        5, "Iterations of the orthogonalisation; more of them even out smaller singular values.", "updates", ge=1, le=20
    )
    enable_clipping: bool = key(
        True,
        "Clip attention logits (QK-clip); off with `model.ngpt`, which bounds them itself.",
        "query and key weights",
    )
    clipping_threshold: float = key(
        50.0,
        "Largest attention logit of a head, q.k / sqrt(head width), before it is clipped.",
        "query and key weights",
        gt=0,
    )
    clipping_alpha: float = key(
        0.5, "Share of the correction that queries take; keys take the rest.", "query and key weights", ge=0, le=1
    )
    clipping_warmup_steps: int = key(0, "Steps without clipping at the start.", "query and key weights", ge=0)
    clipping_interval: int = key(
        10, "Steps from one look at the logits, and clip, to the next.", "query and key weights", ge=1
    )
    clipping_qk_chunk_size: int = key(1024, "Queries per chunk when looking for the largest logit.", "memory", ge=1)
    capture_last_microbatch_only: bool = key(
        True, "Look at the last microbatch of an accumulation window only.", "query and key weights"
    )
    detect_anomalies: bool = key(False, "Stop at a gradient that is not finite, naming the parameter.", "an error")
    orthogonalization: Literal["polar_express", "newton_schulz"] = key("polar_express", "Iteration used.", "updates")
    algorithm: str | None = key(None, "Deprecated name of `orthogonalization`.", "updates")
    polar_express: bool | None = key(None, "Deprecated switch of `orthogonalization`.", "updates")
    clipping_layers_mapping: dict[str, str] = key(
        None,
        "Names of the modules `q_proj`, `k_proj` (and `v_proj`) in attention blocks that keep projections apart.",
        "which weights are clipped",
        factory=dict,
    )


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
    weight_decay: float = key(
        0.01,
        "Decoupled weight decay of matrices; norms and embeddings have none, MuonClip's matrices `muon_decay`.",
        "updates",
        ge=0,
    )
    betas: list[Probability] = key(
        None, "Decay rates of Adam's two moments.", "updates", factory=lambda: [0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = key(1e-8, "Term that keeps Adam's division stable.", "updates", gt=0)
    muon_config: MuonConfig | None = key(None, "Settings of MuonClip (`name: muonclip`).", "updates")
    param_groups: list[ParamGroup] = key(
        None,
        "Exceptions for parameters by name, a list of `{pattern, lr_scale, weight_decay, algorithm}`. The first pattern that "
        "matches a name decides; one that acts on nothing is an error.",
        "updates",
        factory=list,
    )


class WandbConfig(Section):
    """`wandb`: the Weights & Biases tracker."""

    enabled: bool = key(False, "Log to Weights & Biases.", "tracker files")
    project: str = key("neo-bert", "Project.", "tracker files", min_length=1)
    entity: str | None = key(None, "User or team.", "tracker files")
    name: str | None = key(None, "Name of the run.", "tracker files")
    tags: list[str] = key(None, "Tags of the run.", "tracker files", factory=list)
    mode: Literal["online", "offline", "disabled"] = key("online", "Where the run is recorded.", "tracker files")
    log_interval: int = key(
        100, "Left over; `trainer.logging_steps` says how often is logged, and a note says so.", "a note", ge=1
    )
    resume: Literal["never", "allow", "must", "auto"] = key(
        "never", "Whether to continue a recorded run.", "tracker files"
    )
    dir: str = key("logs/wandb", "Folder of the recorded run.", "tracker files", min_length=1)
