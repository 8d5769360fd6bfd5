"""The formula of a step's memory, against what PyTorch allocates; many processes are simulated by a process group that sends
nothing, so that one process does the step of the first of 1,024.
"""

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.commands import spawn
from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.errors import UserError
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.training.choices import allocator_settings
from neobert.training.memory import Step, memory_asked, memory_per_process
from neobert.training.runtime import Runtime

SMALL = {
    "width": 256, "num_layers": 3, "num_heads": 4, "intermediate_size": 1024, "vocab_size": 4096, "num_tokens": 2048,
    "num_targets": 300, "document_length": 128,
}  # fmt: skip
STEPS = {
    "one process": Step(**SMALL),
    "1,024 processes": Step(**SMALL, world_size=1024, engine="fsdp2"),
    "in bfloat16": Step(**SMALL, world_size=1024, engine="fsdp2", in_bfloat16=True),
    "recomputed": Step(**SMALL, world_size=1024, engine="fsdp2", gradient_checkpointing=True),
    "every second block recomputed": Step(**SMALL, gradient_checkpointing=True, checkpointing_interval=2),
    "not resharded": Step(**{**SMALL, "num_layers": 6}, world_size=1024, engine="fsdp2", reshard=False),
    "8 processes": Step(**SMALL, world_size=8, engine="fsdp2"),
    "copies": Step(**SMALL, engine="ddp"),
    "a large vocabulary": Step(**{**SMALL, "vocab_size": 32768, "num_targets": 1000}, world_size=1024, engine="fsdp2"),
    "long documents in bfloat16": Step(
        **{**SMALL, "document_length": 512}, world_size=1024, engine="fsdp2", in_bfloat16=True
    ),
    "long documents": Step(**{**SMALL, "document_length": 512}, world_size=1024, engine="fsdp2"),
}


def allocated(step):
    """The most bytes that are allocated at a time during the second step, weights and optimizer included."""
    dtype = torch.bfloat16 if step.in_bfloat16 else None
    runtime = Runtime(
        device=torch.device("cpu"), dtype=dtype, world_size=step.world_size, engine=step.engine, reshard=step.reshard
    )
    config = NeoBERTConfig(
        hidden_size=step.width, num_hidden_layers=step.num_layers, num_attention_heads=step.num_heads,
        intermediate_size=step.intermediate_size, vocab_size=step.vocab_size, max_position_embeddings=512,
    )  # fmt: skip
    input_ids = torch.randint(5, step.vocab_size, (step.num_tokens // 512, 512))
    labels = torch.full_like(input_ids, -100)
    labels.view(-1)[torch.randperm(step.num_tokens)[: step.num_targets]] = 7
    lengths = torch.full((step.num_tokens // step.document_length,), step.document_length)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = NeoBERTForMaskedLM(config)
        model.model.gradient_checkpointing = step.gradient_checkpointing
        model.model.checkpointing_interval = step.checkpointing_interval
        wrapped = runtime.distribute(model, model.model.layers)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for number in range(2):
            with torch.profiler.record_function(f"step {number}"):
                with runtime.autocast():
                    output = wrapped(input_ids=input_ids, labels=labels, document_lengths=lengths, masked_only=True)
                    loss = output.loss_sum
                runtime.backward(wrapped, loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                del loss, output
    events = recorded.profiler.kineto_results.events()
    (second,) = (event for event in events if event.name() == "step 1")
    total = peak = 0
    for start, num_bytes in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        total += num_bytes
        peak = max(peak, total) if second.start_ns() <= start <= second.end_ns() else peak
    return peak


def worker(_, path):
    torch.set_num_threads(1)
    found = {}
    for name, step in STEPS.items():
        if step.engine == "fsdp2":
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.world_size)
        elif step.engine == "ddp":  # holds the same on any number of processes
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found[name] = allocated(step)
        if dist.is_initialized():
            dist.destroy_process_group()
    torch.save(found, path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "bytes"
    spawn(worker, (path,), 1)
    return torch.load(path)


@pytest.mark.parametrize("name", STEPS)
def test_the_formula_is_within_a_tenth(measured, name):
    memory = memory_per_process(STEPS[name])
    print(f"{name}: {measured[name] / 2**20:.1f} MiB, formula {memory.peak / 2**20:.1f} ({memory})")
    assert memory.peak == pytest.approx(measured[name], rel=0.1)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"), "2.50 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."),
            "3.00 GiB",
        ),
        (MemoryError("Unable to allocate 8.00 MiB for an array with shape (1024, 1024)"), "8.00 MiB"),
        (MemoryError(), "more"),
        (RuntimeError("the shapes do not fit"), None),
    ],
)
def test_what_an_error_asked_for(error, asked):
    assert memory_asked(error) == asked


def test_running_out_of_memory_saves_the_last_whole_step(train, small, tmp_path, monkeypatch):
    """A tensor that no machine has room for, in step 3: one line, with what takes memory and which keys to lower."""
    calls, forward = [], NeoBERTForMaskedLM.forward

    def exhausted(self, *given, **named):
        calls.append(self.training)
        return forward(self, *given, **named) if calls.count(True) < 3 else torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(NeoBERTForMaskedLM, "forward", exhausted)
    with pytest.raises(UserError) as raised:
        train(*small)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(
        "out of memory in step 3: 1,048,576.00 GiB could not be had; a process of this run needs about"
    )
    for word in ("weights", "moments", "gradients", "activations", "logits"):
        assert f"{word} 0.0" in line
    for key in ("per_device_train_batch_size", "dataset.max_seq_length", "trainer.gradient_checkpointing: true"):
        assert key in line
    assert line.endswith(f"; go on from {tmp_path / 'out/checkpoints/2'}")
    verify_checkpoint(tmp_path / "out/checkpoints/2")


def test_an_update_that_was_broken_off_is_not_saved(train, small, tmp_path, monkeypatch):
    """Weights of which some have been updated are those of no step."""
    steps, step = [], torch.optim.AdamW.step

    def exhausted(self, *given):
        steps.append(step(self, *given))
        return torch.empty(2**50, dtype=torch.uint8) if len(steps) == 3 else None

    monkeypatch.setattr(torch.optim.AdamW, "step", exhausted)
    with pytest.raises(UserError, match="out of memory in step 3: .*; go on from .*checkpoints/2$"):
        train(*small, "trainer.save_steps=2")
    assert list_steps(tmp_path / "out/checkpoints") == [2]


def test_the_allocator_of_cuda():
    assert allocator_settings({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}) == {}
