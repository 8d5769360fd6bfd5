"""How much memory a process of a training step needs: a pure function of shapes, for planning a run.

The default architecture (RoPE, RMSNorm, SwiGLU) on the CPU, trained with AdamW; docs/distributed.md writes the formula out, and
tests compare it with what PyTorch allocates. N tokens and M targets of a microbatch, D width, H heads, F inner width of the
feed-forward part, V vocabulary, T length of a document. Weights are float32; c bytes are an element of what is computed in (4,
or 2 under bfloat16 autocast).
"""

from dataclasses import dataclass
from typing import Literal

from neobert.model.attention import GRANULARITY, KEPT_LENGTH, SCORE_BUDGET
from neobert.model.kernels import LOGIT_BUDGET
from neobert.model.layers import swiglu_width

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


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, at the moment of a step when it needs most.

    `states`: its weights and the two moments of AdamW. `gradients`: those that exist beside activations. `gathered`: weights
    of others that FSDP2 has fetched. `activations`: what is kept for the backward pass. `passing`: what exists for a moment.
    `update`: what the update needs beside states, every gradient of this process.
    """

    states: int
    gradients: int
    gathered: int
    activations: int
    passing: int
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
    # Embeddings and decoder until the end, the block that is computed and the next one; every process sends as many rows.
    gathered = ranks * (root + 2 * block) if step.engine == "fsdp2" else 0
    # Every gradient is a view of DDP's buffers, which are kept; else that of the decoder is the first to exist.
    gradients = weights if step.engine == "ddp" else c * V * D

    # A block keeps its two residual streams in float32; both norms' results, q, k, v and what attention gives; gate and up,
    # silu(gate) and their product; and in bfloat16 the attention weights of short documents, which SDPA, in float32, does not,
    # and copies of its weights in the type of products.
    length = -(-step.document_length // GRANULARITY) * GRANULARITY
    scores = step.num_heads * length if step.in_bfloat16 and length <= KEPT_LENGTH else 0
    copies, decoder = (c * (4 * D * D + 3 * F * D), c * V * D) if step.in_bfloat16 else (0, 0)
    kept = N * (2 * D * FLOAT + c * (6 * D + 4 * F + scores)) + copies
    after_attention = D * FLOAT + c * (
        D + 4 * F
    )  # of a token: a residual stream, a norm's result, the feed-forward part
    if step.gradient_checkpointing:
        activations = step.num_layers * N * D * FLOAT + kept
    else:  # after its attention the last block keeps targets alone
        activations = step.num_layers * kept - (N - M) * after_attention
    activations += N * D * FLOAT + decoder + c * M * D

    # For a moment there are gradients inside the feed-forward part, those of attention, or logits, whichever are most.
    # Attention's backward pass has five matrices of scores at a time in bfloat16 (weights, their gradients, and what products
    # copy), and gradients of q, k, v in three layouts; by then it has freed what the feed-forward part of the block had kept.
    num_kept = N if step.gradient_checkpointing else M  # tokens in the feed-forward part of the block that counts
    scores = min(step.num_heads * step.document_length * N, SCORE_BUDGET) if step.in_bfloat16 else 0
    passing = max(
        N * (2 * D * FLOAT + 2 * F * c),
        c * (5 * scores + 11 * N * D) - num_kept * after_attention,
        c * min(M * V, LOGIT_BUDGET) + N * D * FLOAT,
    )
    return Memory(3 * weights, gradients, gathered, activations, passing, weights)
