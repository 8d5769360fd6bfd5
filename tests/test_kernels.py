"""Which kernels run and why; kernels that need a GPU, as far as a CPU can tell; torch.compile."""

import inspect
import itertools

import pytest
import torch
from test_model import assert_same, build, gradients, packed_batch
from torch._dynamo.testing import CompileCounterWithBackend

from neobert.errors import ConfigError
from neobert.model.attention import Layout
from neobert.training.choices import check_compile, choose_attention, choose_kernels, choose_precision
from neobert.training.machine import compile_blocks
from neobert.training.runtime import Runtime

BF16 = torch.bfloat16


def test_precision():
    assert choose_precision("bf16", "cuda", False) == (BF16, "")
    assert choose_precision("bf16", "cpu", True) == (BF16, "")
    assert choose_precision("no", "cuda", True) == (None, "")
    dtype, why = choose_precision("bf16", "cpu", False)
    assert dtype is None
    assert "no AMX" in why


@pytest.mark.parametrize(
    ("requested", "device", "facts", "kernel", "words"),
    [
        ("sdpa", "cpu", {}, "sdpa", "every document is attended to by itself"),
        ("flash_attn_varlen", "cpu", {}, "sdpa", "needs CUDA"),
        ("sdpa", "cuda", {"packages": {"flash_attn"}}, "sdpa", "scaled_dot_product_attention"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn", "torch_varlen"}}, "flash_attn", "flash-attn package"),
        ("flash_attn_varlen", "cuda", {"packages": {"torch_varlen"}}, "torch_varlen", "torch's own"),
        ("flash_attn_varlen", "cuda", {"packages": {"torch_varlen"}, "dropout": 0.1}, "sdpa", "no dropout"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn"}, "dropout": 0.1}, "flash_attn", "one call"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn"}, "dtype": None}, "sdpa", "mixed_precision: bf16"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn"}, "capability": (7, 5)}, "sdpa", "has 7.5"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn"}, "head_width": 20}, "sdpa", "20 wide"),
        ("flash_attn_varlen", "cuda", {"packages": {"flash_attn"}, "head_width": 264}, "sdpa", "264 wide"),
        ("flash_attn_varlen", "cuda", {}, "sdpa", "neobert[flash]"),
    ],
)
def test_attention(requested, device, facts, kernel, words):
    chosen, why = choose_attention(requested, device, **facts)
    assert chosen == kernel
    assert words in why


@pytest.mark.parametrize(
    ("requested", "device", "has_liger"),
    itertools.product(("auto", "liger", "torch"), ("cpu", "cuda"), (True, False)),
)
def test_kernels(requested, device, has_liger):
    if (requested, device, has_liger) == ("liger", "cuda", False):
        with pytest.raises(ConfigError, match=r"pip install 'neobert\[liger\]'"):
            choose_kernels(requested, device, has_liger)
        return
    chosen, why = choose_kernels(requested, device, has_liger)
    assert chosen == ("liger" if device == "cuda" and has_liger and requested != "torch" else "torch")
    assert ("needs CUDA" in why) == (requested == "liger" and device == "cpu")


def test_variable_length_arguments():
    """What the CUDA kernels get: torch's own takes these arguments, and the boundaries are those of the documents."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (5, 1, 30)
    starts, longest = Layout(lengths=lengths).cumulative(torch.device("cpu"))
    assert (starts.dtype, longest) == (torch.int32, 30)
    tokens = torch.arange(36)
    pieces = [tokens[a:b] for a, b in itertools.pairwise(starts.tolist())]
    assert all(torch.equal(a, b) for a, b in zip(pieces, tokens.split(lengths), strict=True))
    q = torch.zeros(36, 2, 8)
    inspect.signature(varlen_attn).bind(q, q, q, starts, starts, longest, longest, scale=0.1)


# --- torch.compile -----------


CPU = Runtime(torch.device("cpu"), None)


def batch_of(*rows):
    """A packed batch of the given document lengths; every row has 64 tokens."""
    ids, labels, _ = packed_batch()
    return {
        "input_ids": ids[: len(rows)],
        "labels": labels[: len(rows)],
        "document_lengths": torch.tensor([n for row in rows for n in row]),
    }


@pytest.mark.parametrize("variant", [{}, {"ngpt": True}, {"rms_norm": False, "hidden_act": "gelu"}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_equals_eager(variant, checkpointing):
    torch._dynamo.reset()
    eager, compiled = build(**variant), build(**variant)
    compiled.model.gradient_checkpointing = checkpointing
    compile_blocks(compiled.model, "cpu", "aot_eager", None)
    inputs = batch_of((5, 30, 29), (64,))
    assert_same(gradients(eager, **inputs), gradients(compiled, **inputs))
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_inductor_equals_eager():
    torch._dynamo.reset()
    eager, compiled = build(num_hidden_layers=1), build(num_hidden_layers=1)
    compile_blocks(compiled.model, "cpu", "inductor", None)
    inputs = batch_of((5, 30, 29), (64,))
    assert_same(gradients(eager, **inputs), gradients(compiled, **inputs))


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts what is compiled."""
    monkeypatch.setattr("neobert.training.machine.check_compile", lambda *_: None)
    torch._dynamo.reset()
    return CompileCounterWithBackend("eager")


@pytest.mark.parametrize("dynamic", [None, True])
def test_packed_batches_do_not_recompile(dynamic, counter):
    """Three blocks, ten batches of other document lengths: two graphs, compiled once."""
    model = build()
    compile_blocks(model.model, "cpu", counter, dynamic)
    for n in range(1, 11):
        gradients(model, **batch_of((n, 64 - n), (64,)))
    assert counter.frame_count == 2


def test_padded_batches_stop_recompiling(counter):
    """Batches of ever other sizes: after the second, torch compiles for any size and never again."""
    model = build()
    compile_blocks(model.model, "cpu", counter, None)
    counts = []
    for n in range(10, 20):
        ids = torch.randint(5, 100, (3, n))
        mask = (torch.arange(n) < torch.tensor([n, 5, n - 3])[:, None]).long()
        gradients(model, input_ids=ids, attention_mask=mask, labels=ids)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 4


def test_compile_backends_are_checked():
    with pytest.raises(ConfigError, match="no backend 'nonsense'; there are: eager, inductor"):
        check_compile("nonsense", {"inductor", "eager"}, "cpu", True)
    with pytest.raises(ConfigError, match="needs a C"):
        check_compile("inductor", {"inductor"}, "cpu", False)
    check_compile("inductor", {"inductor"}, "cuda", False)
    check_compile("eager", {"eager"}, "cpu", False)
