"""How much memory a process of a training step needs: a pure function of shapes, for planning a run, and for the message of
one that has too little.

The default architecture (RoPE, RMSNorm, SwiGLU) on the CPU, trained with AdamW; docs/distributed.md writes the formula out, and
tests compare it with what PyTorch allocates. N tokens and M targets of a microbatch, D width, H heads, F inner width of the
feed-forward part, V vocabulary, T length of a document. Weights are float32; c bytes are an element of what is computed in (4,
or 2 under bfloat16 autocast).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from neobert.config.schema import Config
from neobert.errors import OutOfMemory
from neobert.model.attention import GRANULARITY, KEPT_LENGTH, SCORE_BUDGET
from neobert.model.kernels import LOGIT_BUDGET
from neobert.model.layers import swiglu_width
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.training.runtime import Runtime

FLOAT = 4  # bytes of a float32
ASKED = re.compile(r"(?:ried|nable) to allocate ([\d.]+) ?(\w+)")  # torch's two allocators, numpy


@dataclass(frozen=True)
class Step:
    """What a training step depends on. `num_tokens` and `num_targets` are of a microbatch of one process."""

    width: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_tokens: int
    num_targets: int
    document_length: int
    world_size: int = 1
    engine: str = "plain"  # or ddp, fsdp2
    in_bfloat16: bool = False
    gradient_checkpointing: bool = False
    checkpointing_interval: int = 1
    reshard: bool = True  # FSDP2 frees what it gathered of a block for the forward pass


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, at the moment of a step when it needs most.

    `states`: its weights and the two moments of AdamW. `gradients`: those that exist beside activations. `gathered`: weights
    of others that FSDP2 has fetched. `activations`: what is kept for the backward pass. `passing`: what exists for a moment,
    `logits` for one. `update`: what the update needs beside states, every gradient of this process.
    """

    states: int
    gradients: int
    gathered: int
    activations: int
    passing: int
    logits: int
    update: int

    @property
    def peak(self) -> int:
        step = self.gradients + self.gathered + self.activations + self.passing
        return self.states + max(step, self.update)


def memory_per_process(step: Step) -> Memory:
    """The memory of the first process, which holds the largest shards."""
    N, M, D, V = step.num_tokens, step.num_targets, step.width, step.vocab_size
    F, c = swiglu_width(step.intermediate_size), 2 if step.in_bfloat16 else FLOAT
    ranks = step.world_size if step.engine == "fsdp2" else 1

    def local(*matrices: tuple[int, int]) -> int:
        """Bytes of the rows that the first process has, of matrices of so many rows and columns; a vector has one column."""
        return FLOAT * sum(-(-rows // ranks) * columns for rows, columns in matrices)

    block = local((3 * D, D), (D, D), (2 * F, D), (D, F), (D, 1), (D, 1))
    root = local((V, D), (V, D), (D, 1))  # embeddings, decoder, last norm
    weights = step.num_layers * block + root
    # Embeddings and decoder until the end, the block that is computed and the next one, or all that are kept; every process
    # sends as many rows.
    num_blocks = 2 if step.reshard else step.num_layers
    gathered = ranks * (root + num_blocks * block) * c // FLOAT if step.engine == "fsdp2" else 0
    # Every gradient is a view of DDP's buffers, which are kept; else that of the decoder is the first to exist.
    gradients = weights if step.engine == "ddp" else c * V * D

    # A block keeps its two residual streams in float32; both norms' results, q, k, v and what attention gives; gate and up,
    # silu(gate) and their product; and in bfloat16 the attention weights of short documents, which SDPA, in float32, does not,
    # and copies of its weights in the type of products.
    length = -(-step.document_length // GRANULARITY) * GRANULARITY
    scores = step.num_heads * length if step.in_bfloat16 and length <= KEPT_LENGTH else 0
    is_cast = step.in_bfloat16 and step.engine != "fsdp2"  # which gathers them in it
    copies, decoder = (c * (4 * D * D + 3 * F * D), c * V * D) if is_cast else (0, 0)
    kept = N * (2 * D * FLOAT + c * (6 * D + 4 * F + scores)) + copies
    after_attention = D * FLOAT + c * (D + 4 * F)  # a token's residual stream, norm's result, feed-forward part
    activations = of_blocks(step, N * D * FLOAT, kept, kept - (N - M) * after_attention)
    activations += N * D * FLOAT + decoder + c * M * D

    # For a moment there are gradients inside the feed-forward part, those of attention, or logits, whichever are most.
    # Attention's backward pass has five matrices of scores at a time in bfloat16 (weights, their gradients, and what products
    # copy), and gradients of q, k, v in three layouts; by then it has freed what the feed-forward part of the block had kept.
    num_kept = N if step.gradient_checkpointing else M  # tokens in the feed-forward part of the block that counts
    scores = min(step.num_heads * step.document_length * N, SCORE_BUDGET) if step.in_bfloat16 else 0
    logits = c * min(M * V, LOGIT_BUDGET)
    passing = max(
        N * (2 * D * FLOAT + 2 * F * c),
        c * (5 * scores + 11 * N * D) - num_kept * after_attention,
        logits + N * D * FLOAT,
    )
    return Memory(3 * weights, gradients, gathered, activations, passing, logits, weights)


def of_blocks(step: Step, stream: int, kept: int, kept_by_last: int) -> int:
    """The most that blocks keep at a time during the backward pass. Of a block that is recomputed its input, a residual
    `stream`, stays from the forward pass on, and the rest is there while the block has its turn.
    """
    most = below = 0
    for number in range(step.num_layers):
        whole = kept if number < step.num_layers - 1 else kept_by_last  # which after its attention has targets alone
        is_recomputed = step.gradient_checkpointing and number % step.checkpointing_interval == 0
        most = max(most, below + whole + stream * is_recomputed)
        below += stream if is_recomputed else whole
    return most


# --- when there is too little -----------


def memory_asked(error: BaseException) -> str | None:
    """How much memory could not be had, in words, by the error that said so; None for an error of another kind."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    amount, unit = found.groups() if (found := ASKED.search(str(error))) else ("", "")
    return f"{float(amount) / 2**30:,.2f} GiB" if unit == "bytes" else f"{amount} {unit}" if unit else "more"


def out_of_memory(
    error: BaseException, number: int, config: Config, model: Any, runtime: Runtime
) -> OutOfMemory | None:
    """What to tell of step `number`, which ended in `error`: what takes the memory, where the formula fits the run, and
    which keys to lower; None for an error of another kind.
    """
    if (asked := memory_asked(error)) is None:
        return None
    trainer, needs = config.trainer, ""
    if isinstance(model, NeoBERTForMaskedLM) and runtime.engine in ("plain", "ddp", "fsdp2"):
        shape, num_tokens = model.config, trainer.per_device_train_batch_size * config.row_length
        memory = memory_per_process(Step(
            shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size, shape.vocab_size,
            num_tokens, round(num_tokens * config.datacollator.mlm_probability), config.row_length,
            runtime.world_size // runtime.num_copies, runtime.engine, runtime.dtype is not None,
            trainer.gradient_checkpointing, trainer.gradient_checkpointing_interval, runtime.reshard,
        ))  # fmt: skip
        sizes = {
            "weights": memory.states // 3 + memory.gathered, "moments": memory.states * 2 // 3, "gradients": memory.update,
            "activations": memory.activations, "logits": memory.logits,
        }  # fmt: skip
        parts = ", ".join(f"{name} {size / 2**30:,.2f}" for name, size in sizes.items())
        needs = f"; a process of this run needs about {memory.peak / 2**30:,.2f} GiB ({parts})"
    is_whole = trainer.gradient_checkpointing and trainer.gradient_checkpointing_interval == 1
    length = "glue.max_seq_length" if config.task == "glue" else "dataset.max_seq_length"
    recompute = "" if is_whole else ", or set trainer.gradient_checkpointing: true (gradient_checkpointing_interval: 1)"
    return OutOfMemory(
        f"out of memory in step {number:,}: {asked} could not be had{needs}; lower trainer.per_device_train_batch_size "
        f"({trainer.per_device_train_batch_size}) and raise gradient_accumulation_steps, or lower {length}{recompute}"
    )
