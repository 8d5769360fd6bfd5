"""Packed attention alone: 8,192 tokens in about 70 documents, 4 heads of 64, forward and backward, bf16 where AMX has it.

Ours is what training runs: buckets in bf16, SDPA over documents of one length in float32. Against three ways to keep
documents apart in plain PyTorch: one SDPA call with a block mask, a loop of SDPA calls over slices, and a loop of SDPA calls
over the pieces of `torch.split`. All four get the same q, k and v, without rotary positions, and give the same output, which is
checked first. A second table has documents of other lengths, against the loop over pieces. Times are of the process's CPU.
"""

import random
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _bench import alternate, arguments, bar, finish, table

from neobert.model.attention import Layout, attend, uses_buckets

TOKENS, HEADS, WIDTH = 8_192, 4, 64
DTYPE = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


OTHERS = ((2, 16), (20, 60), (512, 512), (1024, 1024), (4096, 4096))


def draw_lengths(shortest: int, longest: int) -> tuple[int, ...]:
    """Documents of `shortest` to `longest` tokens."""
    draw, lengths = random.Random(0), [0]
    while sum(lengths) < TOKENS:
        lengths.append(min(draw.randint(shortest, longest), TOKENS - sum(lengths)))
    return tuple(lengths[1:])


LENGTHS = draw_lengths(20, 220)
SCALE = WIDTH**-0.5


def ours(qkv: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return attend(qkv, None, Layout(lengths=lengths), SCALE)


def block_mask(qkv: torch.Tensor) -> torch.Tensor:
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    mask = document[:, None] == document[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)[0].transpose(0, 1)


def slices(qkv: torch.Tensor) -> torch.Tensor:
    outs, start = [], 0
    for length in LENGTHS:
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in qkv.unbind(1))
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=SCALE)[0].transpose(0, 1))
        start += length
    return torch.cat(outs)


def split(qkv: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in qkv.unbind(1)), strict=True)
    outs = [F.scaled_dot_product_attention(q[None], k[None], v[None], scale=SCALE)[0] for q, k, v in pieces]
    return torch.cat(outs, dim=1).transpose(0, 1)


def timer(function: Callable[[torch.Tensor], torch.Tensor], qkv: torch.Tensor) -> Callable[[], float]:
    """A function that runs forward and backward once and returns the milliseconds."""

    def measure() -> float:
        start = time.process_time()
        out = function(qkv)
        torch.autograd.grad(out, qkv, out.detach())
        return 1e3 * (time.process_time() - start)

    return measure


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    qkv = torch.randn(TOKENS, 3, HEADS, WIDTH).to(DTYPE).requires_grad_()
    peers = {"one SDPA, block mask": block_mask, "SDPA over slices": slices, "SDPA over split pieces": split}
    for function in peers.values():
        torch.testing.assert_close(ours(qkv), function(qkv), rtol=3e-2, atol=3e-2)
    runs = {name: timer(function, qkv) for name, function in {"ours": ours, **peers}.items()}
    alternate(runs, 1)
    times = alternate(runs, 3 if options.quick else 9)
    rows = [(name, f"{took:,.1f}", f"{took / times['ours']:.1f}x") for name, took in times.items()]
    print(f"{TOKENS:,} tokens, {len(LENGTHS)} documents, {HEADS} heads x {WIDTH}, {DTYPE}".replace("torch.", ""))
    table([("", "ms", "of ours"), *rows])
    # without AMX bfloat16 is not what training runs, and in float32 the pieces are as fast as torch's own kernel is
    wanted = (15, 4, 1.5) if uses_buckets(DTYPE) else (15, 1.5, 1.0)
    for name, want, key in zip(("mask", "slices", "split"), wanted, peers, strict=True):
        bar(f"attention_vs_{name}", times[key] / times["ours"], want)
    rows = []
    for shortest, longest in OTHERS:
        lengths = draw_lengths(shortest, longest)
        pair = {function.__name__: timer(partial(function, lengths=lengths), qkv) for function in (ours, split)}
        alternate(pair, 1)
        took = alternate(pair, 3 if options.quick else 5)
        name = f"{len(lengths)} documents of {shortest} to {longest} tokens"
        rows.append((name, f"{took['ours']:,.1f}", f"{took['split']:,.1f}", f"{took['split'] / took['ours']:.2f}x"))
    table([("", "ours, ms", "split pieces, ms", "ours is"), *rows])
    finish()


if __name__ == "__main__":
    main()
