"""The path of a GPU: documents in one call of a kernel for variable lengths, and nothing that waits for the device.

Reference kernels stand in for those of CUDA (helpers/reference_kernels.py); all else is what runs there.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import reference_kernels
from helpers.host_reads import HostReads
from helpers.models import VARIANTS, VOCABULARY, assert_same, build, gradients, packed_batch, unpacked
from neobert.model.kernels import round_up
from neobert.model.modeling_neobert import IGNORED, NeoBERTForSequenceClassification
from neobert.model.unpadding import Documents, cumulative, unpad
from neobert.training.choices import compile_blocks, dynamic_shapes

KERNELS = ("torch_varlen", "torch_efficient")


@pytest.fixture(autouse=True)
def kernels():
    reference_kernels.register()


def batches():
    """The same documents as packed and as padded rows; the second packed row is padding but for 40 tokens."""
    ids, labels, lengths = packed_batch()
    mask = unpacked(torch.ones_like(ids), 0)
    padded = {"input_ids": unpacked(ids, 0), "attention_mask": mask, "labels": unpacked(labels, IGNORED)}
    return {
        "packed": {"input_ids": ids, "labels": labels, "document_lengths": tuple(lengths.tolist())},
        "padded": padded,
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("is_unpadded", [True, False])
def test_one_kernel_equals_the_loop(kernel, variant, rows, is_unpadded):
    """Loss and every gradient of the CPU's path, whether the loader has laid the documents out or the model does."""
    model, inputs = build(**variant), batches()[rows]
    expected = gradients(model, **inputs)
    model.model.attention_kernel = kernel
    assert_same(expected, gradients(model, **unpad(**inputs) if is_unpadded else inputs))


@pytest.mark.parametrize("masked_only", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_paths_agree(masked_only, checkpointing):
    model, inputs = build(), batches()["padded"]
    expected = gradients(model, **inputs)
    model.model.attention_kernel, model.model.gradient_checkpointing = "torch_varlen", checkpointing
    assert_same(expected, gradients(model, masked_only, **unpad(**inputs)))


@pytest.mark.parametrize("pooling", ["bos", "mean"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_classifiers(pooling, kernel):
    torch.manual_seed(0)
    config = build().config
    config.num_labels, config.classifier_pooling, config.classifier_dropout = 3, pooling, 0.0
    model = NeoBERTForSequenceClassification(config)
    inputs = batches()["padded"]
    inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 3
    expected = model(**inputs)
    model.model.attention_kernel = kernel
    output = model(**unpad(**inputs))
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_nothing_waits_for_the_device(kernel, rows):
    """Forward and backward pass read no value of a tensor; every layer makes one call of attention."""
    model = build()
    model.model.attention_kernel = kernel
    inputs = unpad(**batches()[rows])
    with HostReads() as reads:
        output = model(**inputs, masked_only=True, count_correct=True)
        output.loss_sum.backward()
    assert not reads.found
    calls = {"torch_varlen": "_varlen_attn", "torch_efficient": "_efficient_attention_forward"}
    assert reads.launches[calls[kernel]] == len(model.model.layers)


def test_layout_of_documents():
    """Padding comes last, in pieces no longer than the documents; sizes come again; what holds padding alone is none."""
    ids = torch.randint(5, VOCABULARY, (2, 64))
    ids[0, 40:], ids[1, 60:] = 0, 0
    found = unpad(ids, document_lengths=(30, 10, 24, 60, 4), labels=ids.masked_fill(ids % 2 == 0, IGNORED), pad_id=0)
    lengths, cu_seqlens, longest = found["document_lengths"]
    assert (lengths, longest, found["input_ids"].shape) == ((30, 10, 60), round_up(60), (1, 128))
    assert cu_seqlens[:5].tolist() == [0, 30, 40, 100, 128]
    assert (cu_seqlens[5:] == 128).all()
    assert torch.equal(found["input_ids"][0, :40], ids[0, :40])
    assert torch.equal(found["input_ids"][0, found["targets"]], found["labels"])
    assert (found["labels"] % 2 == 1).all()
    other = unpad(ids, document_lengths=(20, 20, 24, 20, 20, 20, 4), pad_id=0)
    assert other["document_lengths"].cu_seqlens.shape == cu_seqlens.shape
    assert cumulative((3, 5), padding=12).tolist() == [0, 3, 8, 13, 18, 20]


def test_documents_move_with_a_batch():
    from neobert.data.batch import Batch

    inputs = unpad(**batches()["packed"])
    batch = Batch(**inputs).to(torch.device("meta"))
    assert isinstance(batch.document_lengths, Documents)
    assert batch.document_lengths.cu_seqlens.device.type == batch.targets.device.type == "meta"
    assert batch.document_lengths.lengths == inputs["document_lengths"].lengths


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("variant", [{}, {"ngpt": True}, {"rms_norm": False, "hidden_act": "gelu"}], ids=str)
def test_ragged_batches_do_not_recompile(rows, variant, monkeypatch):
    """Ten batches, each of other documents: the two halves of a block are compiled once each, and give what eager gives."""
    monkeypatch.setattr("neobert.training.choices.check_compile", lambda *_: None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager, model = build(**variant), build(**variant)
    eager.model.attention_kernel = model.model.attention_kernel = "torch_varlen"
    compile_blocks(model.model, "cpu", counter, dynamic_shapes(None, rows == "packed"))
    for n in range(1, 11):
        ids = torch.randint(5, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(n))
        labels = ids.masked_fill(ids % 3 > 0, IGNORED)
        if rows == "packed":
            inputs = unpad(ids, document_lengths=(n, 64 - n, 64, 2 * n, 64 - 2 * n), labels=labels)
        else:
            mask = (torch.arange(64) < torch.tensor([n, 40, 64 - 3 * n])[:, None]).long()
            inputs = unpad(ids, mask, labels=labels.masked_fill(mask == 0, IGNORED))
        assert_same(gradients(eager, **inputs), gradients(model, **inputs))
    assert counter.frame_count == 2


def test_launches_of_a_block():
    """What is not compiled of a block, forward and backward: attention alone. With four graphs (before and after it, each
    forward and backward) these are at most twelve launches.
    """
    model = build()
    model.model.attention_kernel = "torch_varlen"
    inputs = unpad(**batches()["packed"])
    unpadded = model.model.flatten(inputs["input_ids"], document_lengths=inputs["document_lengths"])
    qkv = torch.randn(len(unpadded.ids_N), 3, 4, 8, requires_grad=True)
    with HostReads() as reads:
        out_ND = model.model.layers[0].attention(qkv, None, unpadded.layout)
        torch.autograd.grad(out_ND, qkv, torch.ones_like(out_ND))
    assert sum(reads.launches.values()) + 4 <= 12, reads.launches
