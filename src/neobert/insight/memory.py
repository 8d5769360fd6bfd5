"""How much memory a process of a training step needs: a pure function of shapes, for planning a run.

The default architecture (RoPE, RMSNorm, SwiGLU) on the CPU, trained with AdamW; docs/distributed.md writes the formula out, and
tests compare it with what PyTorch allocates. N tokens and M targets of a microbatch, D width, H heads, F inner width of the
feed-forward part, V vocabulary, T length of a document, W processes. Weights are float32; c bytes are an element of what is
computed in (4, or 2 under bfloat16 autocast).
"""

from dataclasses import dataclass
from typing import Literal

from neobert.model.bucket_attention import GRANULARITY, KEPT_LENGTH, SCORE_BUDGET
from neobert.model.layers import swiglu_width
from neobert.model.loss import LOGIT_BUDGET

FLOAT = 4  # bytes of a float32


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
    engine: Literal["plain", "ddp", "fsdp2"] = "plain"
    in_bfloat16: bool = False
    gradient_checkpointing: bool = False

    @property
    def compute_bytes(self) -> int:
        return 2 if self.in_bfloat16 else FLOAT

    def block_matrices(self) -> list[tuple[int, int]]:
        """Rows and columns of the parameters of a block; vectors have one column."""
        D, F = self.width, swiglu_width(self.intermediate_size)
        return [(3 * D, D), (D, D), (2 * F, D), (D, F), (D, 1), (D, 1)]

    def root_matrices(self) -> list[tuple[int, int]]:
        """Those outside of blocks: embeddings, decoder, last norm."""
        return [(self.vocab_size, self.width), (self.vocab_size, self.width), (self.width, 1)]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, at the moment of a step when it needs most.

    `states`: its weights and the two moments of AdamW. `gradients`: those that exist beside activations. `gathered`: weights
    of others that FSDP2 has fetched. `activations`: what is kept for the backward pass. `passing`: what exists for a moment.
    """

    states: int
    gradients: int
    gathered: int
    activations: int
    passing: int
    update: int  # what the update needs beside states: every gradient of this process

    @property
    def peak(self) -> int:
        step = self.gradients + self.gathered + self.activations + self.passing
        return self.states + max(step, self.update)


def memory_per_process(step: Step) -> Memory:
    """The memory of the first process, which holds the largest shards."""
    ranks = step.world_size if step.engine == "fsdp2" else 1
    blocks = step.num_layers * held(step.block_matrices(), ranks)
    root = held(step.root_matrices(), ranks)
    decoder = FLOAT * step.vocab_size * step.width
    gathered = 0
    if step.engine == "fsdp2":  # embeddings and decoder until the end, the block that is computed and the next one
        gathered = padded(step.root_matrices(), ranks) + 2 * padded(step.block_matrices(), ranks)
    # every gradient is a view of DDP's buffers, which are kept; else that of the decoder is the first to exist
    gradients = blocks + root if step.engine == "ddp" else decoder * step.compute_bytes // FLOAT
    return Memory(3 * (blocks + root), gradients, gathered, activations(step), passing(step), blocks + root)


def held(matrices: list[tuple[int, int]], num_ranks: int) -> int:
    """Bytes of the rows that the first process holds."""
    return FLOAT * sum(-(-rows // num_ranks) * columns for rows, columns in matrices)


def padded(matrices: list[tuple[int, int]], num_ranks: int) -> int:
    """Bytes of whole matrices as FSDP2 gathers them: every process sends as many rows."""
    return num_ranks * held(matrices, num_ranks)


def activations(step: Step) -> int:
    """Bytes kept for the backward pass: of every block, of the last norm, and copies of weights in the type of products."""
    N, D, c = step.num_tokens, step.width, step.compute_bytes
    block = block_activations(step)
    copies = (
        c * (sum(rows * columns for rows, columns in step.block_matrices() if columns > 1)) if step.in_bfloat16 else 0
    )
    kept = N * D * FLOAT if step.gradient_checkpointing else block + copies
    recomputed = block + copies if step.gradient_checkpointing else 0
    decoder = c * step.vocab_size * D if step.in_bfloat16 else 0
    after_attention = (N - last_rows(step)) * row_after_attention(step)  # which the last block keeps of targets alone
    return step.num_layers * kept - after_attention + recomputed + N * D * FLOAT + decoder + c * step.num_targets * D


def last_rows(step: Step) -> int:
    """Tokens that go on after the attention of the last block; where blocks are recomputed, the one before it counts."""
    return step.num_tokens if step.gradient_checkpointing else step.num_targets


def row_after_attention(step: Step) -> int:
    """Bytes that a block keeps of a token after its attention: a residual stream, a norm's result, the feed-forward part."""
    D, F, c = step.width, swiglu_width(step.intermediate_size), step.compute_bytes
    return D * FLOAT + c * (D + 4 * F)


def block_activations(step: Step) -> int:
    """Bytes that a block keeps: its two residual streams in float32; both norms' results, q, k, v and what attention gives;
    gate and up, silu(gate) and their product; and in bfloat16 the attention weights of short documents, which SDPA, in
    float32, does not keep.
    """
    N, D, F, c = step.num_tokens, step.width, swiglu_width(step.intermediate_size), step.compute_bytes
    length = -(-step.document_length // GRANULARITY) * GRANULARITY
    weights = step.num_heads * length if step.in_bfloat16 and length <= KEPT_LENGTH else 0
    return N * (2 * D * FLOAT + c * (6 * D + 4 * F + weights))


def passing(step: Step) -> int:
    """Bytes that exist for a moment: gradients inside the feed-forward part, those of attention, or logits, whichever are most.

    Attention's backward pass has five matrices of scores at a time in bfloat16 (weights, their gradients, and what products
    copy), and gradients of q, k, v in three layouts; by then it has freed what the feed-forward part of the block had kept.
    """
    N, D, F, c = step.num_tokens, step.width, swiglu_width(step.intermediate_size), step.compute_bytes
    backward = N * (2 * D * FLOAT + 2 * F * c)
    scores = min(step.num_heads * step.document_length * N, SCORE_BUDGET) if step.in_bfloat16 else 0
    attention = c * (5 * scores + 11 * N * D) - last_rows(step) * row_after_attention(step)
    logits = c * min(step.num_targets * step.vocab_size, LOGIT_BUDGET) + N * D * FLOAT
    return max(backward, attention, logits)
