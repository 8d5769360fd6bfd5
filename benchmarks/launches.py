"""How many operators a block of the encoder launches on a GPU, forward and backward, for a batch of ragged documents.

Counted on torch's "meta" device, which takes the path of a GPU and computes nothing. What is compiled is one graph before and
one after attention, each forward and backward; attention itself is not compiled. Beside it: the same block not compiled,
and with one call of SDPA for documents of one length, which is what other devices run.

    python benchmarks/launches.py
"""

import sys
from pathlib import Path

import torch
from _bench import arguments, bar, finish

from neobert.model.attention import Kernel
from neobert.model.modeling_neobert import NeoBERT, NeoBERTConfig
from neobert.model.unpadding import Documents, unpad

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.host_reads import HostReads

ROWS, LENGTH, DOCUMENT = 16, 1024, 210
GRAPHS = 4


def batch() -> tuple[torch.Tensor, Documents]:
    """Packed rows of documents of different lengths, of about `DOCUMENT` tokens."""
    lengths: list[int] = []
    while sum(lengths) < ROWS * LENGTH:
        lengths.append(min(DOCUMENT // 2 + 37 * len(lengths) % DOCUMENT, ROWS * LENGTH - sum(lengths)))
    found = unpad(torch.ones(ROWS, LENGTH, dtype=torch.int64), document_lengths=tuple(lengths))
    return found["input_ids"], found["document_lengths"]


def launches(kernel: Kernel, attention_alone: bool = False) -> int:
    """Of one block, or of its attention alone."""
    encoder = NeoBERT(NeoBERTConfig(num_hidden_layers=1)).to("meta").train()
    encoder.attention_kernel = kernel
    ids, documents = batch()
    documents = documents._replace(cu_seqlens=documents.cu_seqlens.to("meta"))
    unpadded = encoder.flatten(ids.to("meta"), document_lengths=documents)
    block, width = encoder.layers[0], encoder.config.hidden_size
    x_ND = torch.empty(ids.numel(), width, device="meta", requires_grad=True)
    qkv = torch.empty(ids.numel(), 3, 12, width // 12, device="meta", requires_grad=True)
    with HostReads() as reads:
        if attention_alone:
            out, source = block.attention(qkv, None, unpadded.layout), qkv
        else:
            out, source = block(x_ND, None, unpadded.layout), x_ND
        torch.autograd.grad(out, [source, *([] if attention_alone else block.parameters())], torch.empty_like(out))
    return sum(reads.launches.values())


def main() -> None:
    arguments(__doc__)
    compiled = launches("torch_varlen", attention_alone=True) + GRAPHS
    print(f"a block, not compiled: {launches('torch_varlen')}; with SDPA by lengths of documents: {launches('sdpa')}")
    bar("launches_of_a_compiled_block", compiled, 12, at_most=True)
    finish()


if __name__ == "__main__":
    main()
