"""Which kernels run and why; kernels that need a GPU, as far as a CPU can tell; torch.compile."""

import inspect
import itertools
import shutil
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.models import assert_same, build, gradients, packed_batch
from neobert.config.load import load_config
from neobert.errors import ConfigError
from neobert.model import kernels
from neobert.model.unpadding import cumulative
from neobert.training import choices
from neobert.training.choices import (
    PRECISION_NAMES,
    check_compile,
    choose_attention,
    choose_flash_version,
    choose_kernels,
    choose_precision,
    compile_blocks,
    find_kernels,
    unused_device,
)
from neobert.training.runtime import Runtime

BF16 = torch.bfloat16


AMPERE, TURING = (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("requested", "device", "facts", "dtype", "words"),
    [
        ("bf16", "cuda", {"capability": AMPERE}, BF16, ""),
        ("bf16", "cpu", {"has_amx": True}, BF16, ""),
        ("bf16", "cpu", {}, None, "no AMX"),
        ("bf16", "cuda", {"capability": TURING}, None, "capability 7.5"),
        ("bf16", "cuda", {"capability": TURING, "trains": False}, torch.float16, "float16 is used"),
        ("fp16", "cuda", {}, None, "loss scaling; float32 is used"),
        ("fp16", "cpu", {}, None, "loss scaling; float32 is used"),
        ("fp16", "cuda", {"trains": False}, torch.float16, ""),
        ("fp16", "cpu", {"trains": False}, None, "only CUDA"),
        *((name, device, {}, None, "") for name in ("no", "fp32") for device in ("cpu", "cuda")),
    ],
)
def test_precision(requested, device, facts, dtype, words):
    """What is not what was asked for says so."""
    chosen, note = choose_precision(requested, device, **facts)
    assert chosen == dtype
    assert words in note
    assert bool(words) == bool(note) == ({"fp32": "no"}.get(requested, requested) != PRECISION_NAMES[chosen])


FLASH, OWN, BROKEN = {"flash_attn": ""}, {"torch_varlen": ""}, {"flash_attn": "undefined symbol: x"}


@pytest.mark.parametrize(
    ("requested", "device", "facts", "kernel", "words"),
    [
        ("sdpa", "cpu", {}, "sdpa", "every document is attended to by itself"),
        ("flash_attn_varlen", "cpu", {}, "sdpa", "needs CUDA"),
        *((name, "xpu", {"packages": OWN}, "sdpa", "one by one") for name in ("sdpa", "flash_attn_varlen")),
        ("sdpa", "cuda", {"packages": FLASH | OWN}, "torch_varlen", "torch's own"),
        ("flash_attn_varlen", "cuda", {"packages": FLASH | OWN}, "flash_attn", "flash-attn package"),
        ("flash_attn_varlen", "cuda", {"packages": FLASH | OWN, "dropout": 0.1}, "flash_attn", "flash-attn package"),
        ("flash_attn_varlen", "cuda", {"packages": OWN}, "torch_varlen", "torch's own"),
        ("flash_attn_varlen", "cuda", {"packages": BROKEN | OWN}, "torch_varlen", "torch's own"),
        (
            "flash_attn_varlen",
            "cuda",
            {"packages": BROKEN | OWN, "dropout": 0.1},
            "torch_efficient",
            "undefined symbol",
        ),
        ("flash_attn_varlen", "cuda", {"packages": BROKEN}, "torch_efficient", "undefined symbol: x"),
        *(
            (name, "cuda", {"packages": OWN | packages, **facts}, "torch_efficient", words)
            for name, packages in (("sdpa", FLASH), ("sdpa", {}), ("flash_attn_varlen", {}))
            for facts, words in (
                ({"dropout": 0.1}, "model.dropout_prob: 0"),
                ({"dtype": None}, "mixed_precision: bf16"),
                ({"capability": TURING}, "capability 7.5"),
                ({"head_width": 20}, "20 wide"),
                ({"head_width": 264}, "264 wide"),
            )
        ),
        ("sdpa", "cuda", {}, "torch_efficient", "neobert[flash]"),
    ],
)
def test_attention(requested, device, facts, kernel, words):
    chosen, why = choose_attention(requested, device, **facts)
    assert chosen == kernel
    assert words in why


@pytest.mark.parametrize(
    ("requested", "device", "problem", "is_compiled"),
    itertools.product(("auto", "liger", "torch"), ("cpu", "cuda"), ("", None, "no triton"), (False, True)),
)
def test_kernels(requested, device, problem, is_compiled):
    if (requested, device) == ("liger", "cuda") and problem != "":
        with pytest.raises(ConfigError, match=problem or r"pip install 'neobert\[liger\]'"):
            choose_kernels(requested, device, problem, is_compiled)
        return
    chosen, why = choose_kernels(requested, device, problem, is_compiled)
    uses_liger = device == "cuda" and problem == "" and requested != "torch" and not is_compiled
    assert chosen == ("liger" if uses_liger else "torch")
    assert ("needs CUDA" in why) == (requested == "liger" and device == "cpu")
    assert ("no triton" in why) == ((requested, device, problem, is_compiled) == ("auto", "cuda", "no triton", False))


def test_flash_attention_3():
    """On Hopper only, where torch and its package have it, and where torch's own kernel runs."""
    assert choose_flash_version("torch_varlen", (9, 0), ["FA3", "FA4"], True) == "FA3"
    for kernel, capability, known, is_installed in (
        ("torch_efficient", (9, 0), ["FA3"], True),
        ("torch_varlen", (8, 0), ["FA3"], True),
        ("torch_varlen", (10, 0), ["FA3"], True),
        ("torch_varlen", (9, 0), [], True),
        ("torch_varlen", (9, 0), ["FA3"], False),
    ):
        assert choose_flash_version(kernel, capability, known, is_installed) is None


def test_kernels_that_cannot_be_imported(tmp_path, monkeypatch):
    """Packages that are installed and broken are not chosen, and the reason is told; absent ones are not mentioned."""
    for name, text in (
        ("flash_attn", "raise ImportError('undefined symbol: x\\nmore')"),
        ("liger_kernel", "import absent"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = find_kernels()
    assert found == {"flash_attn": "undefined symbol: x", "torch_varlen": "", "liger": "No module named 'absent'"}
    shutil.rmtree(tmp_path / "flash_attn")
    assert "flash_attn" not in find_kernels()


LIGER = """
def liger_rms_norm(x, weight, eps, in_place):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

def liger_swiglu(gate, up):
    return gate * gate.sigmoid() * up
"""


@pytest.fixture
def liger(tmp_path, monkeypatch):
    """A package with the names and arguments of liger-kernel's, which runs on the CPU."""
    folder = tmp_path / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    (folder / "functional.py").write_text(LIGER)
    monkeypatch.syspath_prepend(tmp_path)
    kernels.liger.cache_clear()
    yield
    kernels.liger.cache_clear()
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


def test_liger_equals_torch(liger):
    """Arguments and results fit."""
    inputs = batch_of((5, 30, 29), (64,))
    model = build()
    expected = gradients(model, **inputs)
    model.choose_kernels("liger")
    assert_same(expected, gradients(model, **inputs))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_models_do_without_liger(device, liger):
    """What is chosen for a compiled model with Liger installed runs; Liger's kernels themselves are not traced."""
    torch._dynamo.reset()
    model, inputs = build(), batch_of((5, 30, 29), (64,))
    expected = gradients(model, **inputs)
    model.choose_kernels(choose_kernels("auto", device, find_kernels()["liger"], is_compiled=True)[0])
    compile_blocks(model.model, "cpu", "aot_eager", None)
    assert_same(expected, gradients(model, **inputs))


def test_variable_length_arguments():
    """What the CUDA kernels get: torch's own takes these arguments, and the boundaries are those of the documents."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (5, 1, 30)
    starts, longest = cumulative(lengths), max(lengths)
    assert starts.dtype == torch.int32
    tokens = torch.arange(36)
    pieces = [tokens[a:b] for a, b in itertools.pairwise(starts.tolist())]
    assert all(torch.equal(a, b) for a, b in zip(pieces, tokens.split(lengths), strict=True))
    q = torch.zeros(36, 2, 8)
    inspect.signature(varlen_attn).bind(q, q, q, starts, starts, longest, longest, scale=0.1)


# --- torch.compile -----------


CPU = Runtime(device=torch.device("cpu"))


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
    monkeypatch.setattr("neobert.training.choices.check_compile", lambda *_: None)
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


@pytest.mark.parametrize("most", [64, 4])
def test_every_shape_anew(most, counter, monkeypatch):
    """`torch_compile_dynamic: false` compiles shapes as they come; those beyond the limit run uncompiled."""
    monkeypatch.setattr(choices, "MOST_SHAPES", most)
    eager, model = build(num_hidden_layers=1), build(num_hidden_layers=1)
    compile_blocks(model.model, "cpu", counter, False)
    for n in range(10, 22):
        ids = torch.randint(5, 100, (2, n))
        inputs = {"input_ids": ids, "labels": ids}
        assert_same(gradients(eager, **inputs), gradients(model, **inputs))
    assert counter.frame_count == 2 * min(most, 12)


def test_the_mode_of_compilation(monkeypatch):
    """Where CUDA graphs are recorded, evaluation says where a batch begins; in training gradients do."""
    asked, marks = [], []
    monkeypatch.setattr(torch, "compile", lambda method, *, mode, **rest: asked.append(mode) or method)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append("batch"))
    monkeypatch.setattr("neobert.training.choices.check_compile", lambda *_: None)
    for mode, number in {"default": 0, "reduce-overhead": 1}.items():
        model = build(num_hidden_layers=2)
        compile_blocks(model.model, "cpu", "inductor", None, mode)
        for is_training in (True, False):
            model.train(is_training)(**batch_of((40, 24), (64,)))
        assert asked[-4:] == [mode] * 4
        assert len(marks) == number


def test_cuda_graphs_are_for_one_shape():
    words = ["trainer.torch_compile=true", "trainer.torch_compile_mode=reduce-overhead"]
    load_config([], [*words, "datacollator.pack_sequences=true"])
    for more in ([], ["datacollator.pack_sequences=true", "trainer.enforce_full_packed_batches=false"]):
        with pytest.raises(ConfigError, match="reduce-overhead records CUDA graphs, which need batches of one shape"):
            load_config([], [*words, *more])
    load_config([], [words[0], "trainer.torch_compile_mode=max-autotune-no-cudagraphs"])


def test_devices_that_are_not_used():
    assert "MPS" in unused_device(False, "cpu", ["mps"])
    assert "XPU" in unused_device(False, "cpu", ["xpu"])
    assert not any(
        unused_device(*some) for some in [(True, "cpu", ["mps"]), (False, "cuda", ["xpu"]), (False, "cpu", [])]
    )


def test_compile_backends_are_checked():
    with pytest.raises(ConfigError, match="no backend 'nonsense'; there are: eager, inductor"):
        check_compile("nonsense", {"inductor", "eager"}, "cpu", True)
    with pytest.raises(ConfigError, match="needs a C"):
        check_compile("inductor", {"inductor"}, "cpu", False)
    check_compile("inductor", {"inductor"}, "cuda", False)
    check_compile("eager", {"eager"}, "cpu", False)
