"""What runs on CUDA computes what the CPU computes: every variant, path and task, the optimizers, resuming, one NCCL process.

`make gpu` or `pytest -m cuda tests/gpu` on a machine with a GPU; elsewhere they are skipped. With CUDA_TESTS_ON=cpu they run
on the CPU, where reference kernels (helpers/reference_kernels.py) stand in for those of CUDA: that tests the tests.
"""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from helpers.models import PAD, VARIANTS, VOCABULARY, assert_same, build, packed_batch, planted, unpacked
from helpers.runs import ROOT, TINY, TOKENIZER
from neobert.data.batch import Batch
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.modeling_neobert import IGNORED, NeoBERTForSequenceClassification
from neobert.model.unpadding import unpad
from neobert.optim.build import OptimizerSettings, build_optimizer
from neobert.optim.muon import MuonSettings
from neobert.optim.qk_clip import QKClip, QKClipSettings

ON_CPU = os.environ.get("CUDA_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
KERNELS = {"torch_efficient": None, "torch_varlen": torch.bfloat16}  # and what the products are computed in
SAME = 1e-4  # float32 on two devices: relative, and of gradients absolute
BF16_LOSS = 0.01  # bfloat16 against float32: relative difference of the loss
BF16 = 0.05  # of every gradient, the norm of the difference over the norm; the reference kernels come to 0.015
BACKEND = "aot_eager" if ON_CPU else "inductor"

IS_HERE = ON_CPU or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not IS_HERE, reason="needs a CUDA device of compute capability 8.0 or newer"),
]


@pytest.fixture(autouse=True)
def kernels():
    if ON_CPU:
        from helpers import reference_kernels

        reference_kernels.register()


# --- the model -----------


def batches():
    """The same documents as packed and as padded rows, in host memory."""
    ids, labels, lengths = packed_batch()
    padded = {"input_ids": unpacked(ids, 0), "attention_mask": unpacked(torch.ones_like(ids), 0)}
    return {
        "packed": {"input_ids": ids, "labels": labels, "document_lengths": tuple(lengths.tolist())},
        "padded": {**padded, "labels": unpacked(labels, IGNORED)},
    }


def on_device(inputs, is_unpadded=True):
    """As a loader hands them over: laid out in host memory, then copied."""
    keys = {"keys": inputs["keys"]} if "keys" in inputs else {}
    rest = {name: value for name, value in inputs.items() if name != "keys"}
    return Batch(**(unpad(**rest) if is_unpadded else rest), **keys).to(DEVICE).inputs()


def on_cuda(model, kernel):
    """The model on the device, with that kernel."""
    model.to(DEVICE).model.attention_kernel = kernel
    return model


def gradients(model, dtype=None, **inputs):
    """(sum of the losses, every gradient), on the CPU."""
    model.zero_grad()
    with torch.autocast(inputs["input_ids"].device.type, dtype=dtype, enabled=dtype is not None):
        output = model(**inputs)
    output.loss_sum.backward()
    found = {name: p.grad.cpu().float() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss_sum.detach().cpu(), found


def assert_close(expected, found, dtype):
    """float32: as equal as sums in another order are; bfloat16: within the rounding of its products."""
    if dtype is None:
        return assert_same(expected, found, SAME)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=BF16_LOSS)
    assert found[1].keys() == expected[1].keys()
    return assert_near(expected[1], found[1], BF16)


def assert_near(expected, found, most):
    apart = {name: ((found[name] - x).norm() / x.norm().clamp_min(1e-6)).item() for name, x in expected.items()}
    assert not {name: value for name, value in apart.items() if not value <= most}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_variants(kernel, variant, rows):
    model, inputs = build(**variant), batches()[rows]
    expected = gradients(model, masked_only=True, **inputs)
    found = gradients(on_cuda(model, kernel), KERNELS[kernel], masked_only=True, **on_device(inputs))
    assert_close(expected, found, KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("masked_only", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("is_unpadded", [True, False])
def test_paths(kernel, rows, masked_only, checkpointing, is_unpadded):
    """Losses of masked tokens alone and of all, with activations computed again, laid out by the loader or by the model."""
    model, inputs = build(), batches()[rows]
    expected = gradients(model, masked_only=True, **inputs)
    on_cuda(model, kernel).model.gradient_checkpointing = checkpointing
    found = gradients(model, KERNELS[kernel], masked_only=masked_only, **on_device(inputs, is_unpadded))
    assert_close(expected, found, KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pooling", ["bos", "mean", "max"])
def test_classifier(kernel, pooling):
    torch.manual_seed(0)
    config = build().config
    config.num_labels, config.classifier_pooling, config.classifier_dropout = 3, pooling, 0.0
    model, inputs = NeoBERTForSequenceClassification(config), batches()["padded"]
    inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 3
    expected = gradients(model, **inputs)
    found = gradients(on_cuda(model, kernel), KERNELS[kernel], **on_device(inputs))
    if kernel == "torch_efficient":
        assert_same(expected, found, SAME)
    else:  # gradients of balanced classes nearly cancel out, and another token may be the largest
        assert found[0].item() == pytest.approx(expected[0].item(), rel=BF16_LOSS)
        assert all(gradient.isfinite().all() for gradient in found[1].values())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss_type", ["simcse", "supcon"])
def test_contrastive(kernel, loss_type):
    torch.manual_seed(0)
    model, inputs = NeoBERTForEmbedding(build().config, ContrastiveSettings(loss_type)), batches()["padded"]
    del inputs["labels"]
    rows = len(inputs["input_ids"]) // 2
    inputs = {name: value[: 2 * rows] for name, value in inputs.items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    keys = {"row_keys_G": torch.arange(rows) // 2, "anchor_keys_G": torch.arange(rows) + 100}
    inputs["keys"] = keys | {"negative_keys": nothing, "negative_rows": nothing, "num_negatives": (0,)}
    expected = gradients(model, **inputs)
    found = gradients(on_cuda(model, kernel), KERNELS[kernel], **on_device(inputs))
    assert_close(expected, found, KERNELS[kernel])


@pytest.fixture
def debug_waits():
    """Sets what CUDA does where the host waits for it."""
    yield (lambda mode: None) if ON_CPU else torch.cuda.set_sync_debug_mode
    if not ON_CPU:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_nothing_waits_for_the_host(kernel, rows, debug_waits):
    """CUDA itself raises where a forward or backward pass waits."""
    model, inputs = on_cuda(build(), kernel), on_device(batches()[rows])
    for mode in ("default", "error"):  # the first pass loads libraries
        debug_waits(mode)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=KERNELS[kernel] is not None):
            output = model(**inputs, masked_only=True, count_correct=True)
        output.loss_sum.backward()


def ragged(seed):
    """Packed rows with documents of other lengths, and another number of masked tokens, in every batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (4, 64), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, IGNORED)
    cuts = [int(torch.randint(1, 63, (), generator=generator)) for _ in ids]
    return {"input_ids": ids, "labels": labels, "document_lengths": tuple(n for cut in cuts for n in (cut, 64 - cut))}


@pytest.mark.parametrize("variant", [{}, {"ngpt": True}, {"rms_norm": False, "hidden_act": "gelu"}], ids=str)
def test_compiled_equals_eager(variant):
    """The same losses and gradients; after the second of ten batches nothing is compiled any more."""
    from torch._dynamo.utils import counters

    from neobert.training.choices import compile_blocks

    torch._dynamo.reset()
    eager, compiled = (on_cuda(build(**variant), "torch_varlen") for _ in range(2))
    compile_blocks(compiled.model, DEVICE.type, BACKEND, None)
    graphs = []
    for seed in range(10):
        inputs = on_device(ragged(seed))
        expected = gradients(eager, torch.bfloat16, masked_only=True, **inputs)
        assert_close(expected, gradients(compiled, torch.bfloat16, masked_only=True, **inputs), torch.bfloat16)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


# --- the optimizers -----------


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_updates(name):
    """Four steps in float32, with a QK-clip after every second one: what they changed, by name."""

    def changes(device, kernel):
        model = planted(build(pad_token_id=PAD))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.to(device).model.attention_kernel = kernel
        muon = MuonSettings(dtype=torch.float32, weight_decay=0.01)
        numbers = {"lr": 2e-3, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-4, "muon": muon}
        settings = OptimizerSettings(name, **numbers, fused={"attention.qkv.weight": 3, "ffn.gate_up.weight": 2})
        optimizer = build_optimizer(model.named_parameters(), settings)
        clip = QKClip(model, QKClipSettings(threshold=3.0, interval=2), pad_id=PAD) if name == "muonclip" else None
        factors = []
        for update in range(1, 5):
            inputs = Batch(**unpad(**ragged(update))).to(device).inputs()
            if clip is not None:
                clip.prepare(update, is_last_microbatch=True)
            (model(**inputs, masked_only=True).loss_sum / len(inputs["labels"])).backward()
            optimizer.step()
            optimizer.zero_grad()
            if clip is not None and (report := clip.apply(update)) is not None:
                factors.append(report.factors)
        return {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}, factors

    (expected, clipped), (found, clipped_too) = changes(torch.device("cpu"), "sdpa"), changes(DEVICE, "torch_efficient")
    assert_near(expected, found, 0.01)
    assert len(clipped) == len(clipped_too) == (2 if name == "muonclip" else 0)
    for a, b in zip(clipped, clipped_too, strict=True):
        assert (a < 1).any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- one process of several -----------


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_of_a_group(engine, tmp_path):
    """NCCL with one process: the same losses, gradients and norm as without it."""
    from neobert.training.runtime import Runtime

    model, inputs = build(), batches()["packed"]
    expected = gradients(model, masked_only=True, **inputs)
    norm = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm().item()
    dist.init_process_group("gloo" if ON_CPU else "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        runtime = Runtime(0, 1, device=DEVICE, engine=engine)
        called = runtime.distribute(on_cuda(model, "torch_efficient"), model.model.layers)
        called.zero_grad()
        called(**on_device(inputs), masked_only=True).loss_sum.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found = {name: (g.full_tensor() if engine == "fsdp2" else g).cpu() for name, g in grads.items()}
        assert_same(expected, (expected[0], found), SAME)
        assert runtime.clip(called, 1.0).item() == pytest.approx(norm, rel=1e-3)
    finally:
        dist.destroy_process_group()


# --- whole runs -----------

RUN = [*TINY, "trainer.mixed_precision=bf16", "datacollator.pack_sequences=true", "trainer.save_steps=3"]
# With this, flash attention and the memory-efficient kernel add up in a fixed order, and scatters do; cuBLAS wants a workspace.
DETERMINISTIC = "import torch; torch.use_deterministic_algorithms(True); import neobert.__main__"


def neobert(*words, is_deterministic=False):
    """The command in a process of its own."""
    start = ["-c", DETERMINISTIC] if is_deterministic else ["-m", "neobert"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *start, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def task(folder, name):
    (path := folder / f"{name}.yaml").write_text(f"task: {name}\n")
    return path


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [row.get("loss", row.get("eval_loss")) for row in map(json.loads, lines)]
    assert all(value is None or math.isfinite(value) for value in found)
    return found


@pytest.fixture(scope="module")
def packages():
    for name in ("datasets", "pydantic", "sklearn", "typer"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, packages):
    folder = tmp_path_factory.mktemp("pretrained")
    printed = neobert("pretrain", task(folder, "pretraining"), *RUN, f"trainer.output_dir={folder / 'run'}")
    assert ON_CPU or "torch_varlen" in printed
    assert losses(folder / "run")
    return folder / "run"


@pytest.mark.parametrize("words", [[], ["datacollator.pack_sequences=true", "trainer.torch_compile=true"]], ids=str)
def test_glue(pretrained, tmp_path, words):
    if ON_CPU and words:
        pytest.skip("compiling takes a minute on the CPU")
    from helpers.glue import GLUE_TINY, write_local

    start = [f"glue.pretrained_checkpoint_dir={pretrained}", f"dataset.path={write_local(tmp_path / 'data', ['mrpc'])}"]
    more = ["glue.task_name=mrpc", "trainer.mixed_precision=bf16", f"trainer.output_dir={tmp_path / 'out'}", *words]
    neobert("glue", task(tmp_path, "glue"), *GLUE_TINY, *start, *more)
    assert math.isfinite(json.loads((tmp_path / "out/result.json").read_text())["score"])


def test_contrastive_run(pretrained, tmp_path):
    from helpers.pairs import CONTRASTIVE_TINY, made_pairs, write_rows

    data = write_rows(tmp_path / "pairs.jsonl", made_pairs(negatives=True))
    words = [*CONTRASTIVE_TINY, f"dataset.path={data}", f"contrastive.pretrained_checkpoint_dir={pretrained}"]
    words += [
        "contrastive.allow_random_weights=false",
        "trainer.mixed_precision=bf16",
        "model.max_position_embeddings=128",
    ]
    neobert("contrastive", task(tmp_path, "contrastive"), *words, f"trainer.output_dir={tmp_path / 'out'}")
    assert losses(tmp_path / "out")
    (tmp_path / "texts.txt").write_text("one text\nanother text\n")
    neobert("embed", tmp_path / "out", tmp_path / "texts.txt", "-o", tmp_path / "vectors.npy")
    assert (tmp_path / "vectors.npy").stat().st_size > 0


@pytest.mark.parametrize("words", [[], ["optimizer.name=muonclip"]], ids=str)
def test_resumed_to_the_bit(tmp_path, packages, words):
    """Once torch's algorithms are deterministic: the last weights, byte for byte."""
    words = [task(tmp_path, "pretraining"), *RUN, "trainer.save_total_limit=9", f"tokenizer.path={TOKENIZER}", *words]
    neobert("pretrain", *words, f"trainer.output_dir={tmp_path / 'a'}", is_deterministic=True)
    shutil.copytree(tmp_path / "a/checkpoints/3", tmp_path / "b/checkpoints/3")
    again = [f"trainer.output_dir={tmp_path / 'b'}", "trainer.resume_from_checkpoint=3"]
    neobert("pretrain", *words, *again, is_deterministic=True)
    a, b = ((tmp_path / name / "checkpoints/6/model.safetensors").read_bytes() for name in "ab")
    assert a == b
