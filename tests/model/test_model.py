"""The model against what we did not write, and against itself in another form."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import VARIANTS, VOCABULARY, assert_same, build, gradients, packed_batch, unpacked
from neobert.model import kernels, modeling_neobert
from neobert.model.attention import (
    CPU_CALL,
    BucketAttention,
    Layout,
    Rotary,
    attend,
    attend_documents,
    uses_buckets,
)
from neobert.model.kernels import FusedRMSNorm, FusedSwiGLU, round_up_tokens
from neobert.model.modeling_neobert import IGNORED, NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from neobert.model.unpadding import UnpaddedBatch


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_equals_unpacked(variant):
    model = build(**variant)
    ids, labels, lengths = packed_batch()
    padded, mask = unpacked(ids, 0), unpacked(torch.ones_like(ids), 0)
    packed_loss = gradients(model, input_ids=ids, labels=labels, document_lengths=lengths)
    padded_loss = gradients(model, input_ids=padded, labels=unpacked(labels, IGNORED), attention_mask=mask)
    assert_same(packed_loss, padded_loss)
    hidden = model.model(ids, document_lengths=lengths).last_hidden_state
    alone = [model.model(row[None, : int(m.sum())]).last_hidden_state[0] for row, m in zip(padded, mask, strict=True)]
    torch.testing.assert_close(hidden.flatten(0, 1), torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_documents_never_see_each_other(variant):
    """Changing every token of one document leaves all others identical to the bit."""
    model = build(**variant).eval()
    ids, _, lengths = packed_batch()
    before = model.model(ids, document_lengths=lengths).last_hidden_state
    changed = ids.clone()
    changed[0, 5:35] = (changed[0, 5:35] + 1) % VOCABULARY
    after = model.model(changed, document_lengths=lengths).last_hidden_state
    others = torch.ones(ids.shape, dtype=torch.bool)
    others[0, 5:35] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("changed", [{"masked_only": False}, {"gradient_checkpointing": True}, {"chunks": 7}], ids=str)
@pytest.mark.parametrize("variant", [{}, {"ngpt": True}, {"decoder_bias": True}], ids=str)
def test_paths_agree(changed, variant, monkeypatch):
    """Masked-only logits = full logits; recomputed activations = kept ones; chunked loss = whole loss."""
    ids, labels, lengths = packed_batch()
    inputs = {"input_ids": ids, "labels": labels, "document_lengths": lengths}
    expected = gradients(build(**variant), **inputs)
    model = build(**variant)
    model.model.gradient_checkpointing = changed.get("gradient_checkpointing", False)
    if "chunks" in changed:
        monkeypatch.setattr("neobert.model.kernels.LOGIT_BUDGET", changed["chunks"] * VOCABULARY)
    assert_same(expected, gradients(model, **inputs, masked_only=changed.get("masked_only", True)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("batch", ["packed", "padded", "whole"])
def test_other_devices_get_all_they_need(variant, batch):
    """Off the CPU, with the document lengths on it: shapes and devices agree ("meta" computes nothing else)."""
    model = build(**variant).to("meta")
    ids, _, lengths = packed_batch()
    mask = torch.ones_like(ids, device="meta")
    inputs = {"packed": {"document_lengths": lengths}, "padded": {"attention_mask": mask}, "whole": {}}[batch]
    hidden = model.model(ids.to("meta"), **inputs).last_hidden_state
    assert (hidden.device.type, hidden.shape) == ("meta", (*ids.shape, 32))


def test_no_targets_is_a_loss_of_zero():
    ids, labels, lengths = packed_batch()
    loss, grads = gradients(build(), input_ids=ids, labels=torch.full_like(labels, IGNORED), document_lengths=lengths)
    assert loss == 0
    assert all(torch.all(g == 0) for g in grads.values())


def test_lengths_must_sum_to_the_batch():
    ids, _, lengths = packed_batch()
    with pytest.raises(ValueError, match="sum to 255"):
        build()(ids, document_lengths=lengths - torch.tensor([1] + [0] * (len(lengths) - 1)))


def test_count_correct():
    model = build().eval()
    ids, labels, lengths = packed_batch()
    logits = model(ids, document_lengths=lengths).logits
    expected = (logits.argmax(-1) == labels).sum()
    assert model(ids, document_lengths=lengths, labels=labels, count_correct=True).num_correct == expected


DOCUMENTS = {
    "mixed": (5, 64, 3, 130, 64, 200, 1, 77),
    "like GLUE's": (20, 33, 33, 57, 20, 41, 33, 60),
    "one token": (1,) * 300,
    "equal": (128, 128, 128),
    "long": (512, 1024),
    "empty rows": (0, 7, 0, 7, 40),
}


def loop_of_sdpa(qkv, rotary, lengths, scale):
    """Every document by itself."""
    q, k, v = qkv.unbind(1)
    parts = (x.transpose(0, 1).split(lengths, 1) for x in (rotary.rotate(q), rotary.rotate(k), v))
    documents = [[x[None] for x in pieces] for pieces in zip(*parts, strict=True) if pieces[0].shape[1]]
    outs = [F.scaled_dot_product_attention(*document, scale=scale)[0] for document in documents]
    return torch.cat(outs, 1).transpose(0, 1)


@pytest.mark.parametrize("kernel", ["buckets", "documents"])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_attention_equals_a_loop_over_documents(dtype, tolerance, lengths, kernel, monkeypatch):
    """Both kernels of the CPU, whichever of them the arithmetic gets: outputs and gradients."""
    monkeypatch.setattr("neobert.model.attention.uses_buckets", lambda dtype: kernel == "buckets")
    monkeypatch.setattr("neobert.model.attention.SCORE_BUDGET", 2**21 if sum(lengths) > 512 else 1)
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 4, 64).to(dtype).requires_grad_()
    rotary = Rotary.of(max(lengths), 64, torch.cat([torch.arange(n) for n in lengths]))
    out = attend(qkv, rotary, Layout(lengths=lengths), 0.125)
    direction = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, direction)
    reference = qkv.detach().float().requires_grad_()
    expected = loop_of_sdpa(reference, rotary, lengths, 0.125)
    (expected_grad,) = torch.autograd.grad(expected, reference, direction.float())
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.float(), expected_grad, rtol=tolerance, atol=tolerance)


def test_the_arithmetic_chooses_the_kernel_of_the_cpu():
    """bfloat16 goes through buckets, everything else through SDPA, as the saved tensors of a forward pass show."""
    for dtype, wanted in (
        (torch.bfloat16, True),
        (torch.float32, False),
        (torch.float64, False),
        (torch.float16, False),
    ):
        qkv = torch.randn(12, 3, 2, 8).to(dtype).requires_grad_()
        out = attend(qkv, None, Layout(lengths=(5, 7)), 0.3)
        assert isinstance(out.grad_fn, BucketAttention._backward_cls) is uses_buckets(dtype) is wanted


class SDPACalls(TorchDispatchMode):
    """Batch sizes of the attention kernels that run inside."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default or "attention" in func.name():
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_equal_documents_are_one_call():
    """Off the CPU ("meta") rows without a mask cost one call, packed documents one for each length; on the CPU a call
    holds a bounded number of tokens.
    """
    qkv = torch.randn(192, 3, 2, 8, device="meta")
    for lengths, calls in (((12,) * 16, 1), ((5, 7) * 16, 2)):
        with SDPACalls() as seen:
            attend(qkv, None, Layout(lengths=lengths), 0.3)
        assert len(seen.sizes) == calls * 2, lengths  # "meta" composes each of two products
    with SDPACalls() as seen:
        attend_documents(torch.randn(2 * CPU_CALL, 3, 2, 8), Layout(lengths=(8,) * (CPU_CALL // 4)), 0.3)
    assert seen.sizes == [CPU_CALL // 8] * 2


@pytest.mark.parametrize("kind", ["norm", "swiglu"])
def test_fused_functions_equal_torch(kind):
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    if kind == "norm":
        ours, theirs, inputs = (
            FusedRMSNorm.apply(x, weight, 1e-5, torch.float32),
            F.rms_norm(x, (64,), weight, 1e-5),
            (x, weight),
        )
    else:
        gate, up = x.chunk(2, dim=-1)
        ours, theirs, inputs = FusedSwiGLU.apply(x), F.silu(gate) * up, (x,)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_has_the_gradients_of_its_values(dropout):
    """Against finite differences in float64, dropout drawn again in the backward pass."""
    lengths = (3, 33, 1, 40)
    layout = Layout(lengths=lengths, dropout=dropout)
    rotary = Rotary.of(40, 4, torch.cat([torch.arange(n) for n in lengths]))
    qkv = torch.randn(sum(lengths), 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def seeded(qkv):
        torch.manual_seed(1)
        return attend(qkv, rotary, layout, 0.7)

    assert torch.autograd.gradcheck(seeded, qkv.requires_grad_(), fast_mode=True)


def test_dropout_has_the_right_mean():
    layout, torch_seed = Layout(lengths=(40, 24), dropout=0.4), torch.manual_seed(0)
    qkv = torch.randn(64, 3, 2, 8, generator=torch_seed)
    mean = torch.stack([attend(qkv, None, layout, 0.3) for _ in range(2000)]).mean(0)
    whole = attend(qkv, None, Layout(lengths=(40, 24)), 0.3)
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.06)


@pytest.mark.parametrize("pooling", ["mean", "avg", "cls", "max"])
def test_pooling_equals_a_loop(pooling):
    """Padded rows and packed documents give the same vectors, those of a loop over documents."""
    model = build().eval()
    ids, _, lengths = packed_batch()
    hidden = model.model(ids, document_lengths=lengths).last_hidden_state.flatten(0, 1)
    reduce = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.amax(0)}
    expected = torch.stack([reduce[pooling.replace("avg", "mean")](x) for x in hidden.split(lengths.tolist())])
    packed = model.model.embed(ids, document_lengths=lengths, pooling=pooling)
    padded = model.model.embed(unpacked(ids, 0), attention_mask=unpacked(torch.ones_like(ids), 0), pooling=pooling)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_tokens_change_nothing(variant, monkeypatch):
    """In bfloat16 on the CPU a batch is filled up to a size that recurs; no document, loss, vector or gradient sees it."""
    model, (ids, labels, lengths) = build(**variant), packed_batch()
    ids, labels, lengths = ids[:, :-3], labels[:, :-3], lengths[:-2]
    lengths = torch.cat((lengths, torch.tensor([ids.numel() - int(lengths.sum())])))
    inputs = {"input_ids": ids.reshape(1, -1), "labels": labels.reshape(1, -1), "document_lengths": lengths}

    def outcome():
        with torch.autocast("cpu", torch.bfloat16):
            assert model.model.flatten(ids.reshape(1, -1), None, lengths).layout.padding == padding
            result = gradients(model, **inputs, count_correct=True)
            pooled = model.model.embed(inputs["input_ids"], document_lengths=lengths)
            hidden = model.model(inputs["input_ids"], document_lengths=lengths).last_hidden_state
        return result, pooled.detach(), hidden.detach().float()

    padding = 4  # 244 tokens -> 248
    filled = outcome()
    assert filled[1].shape == (len(lengths), 32)
    assert filled[0][1]["model.embed_tokens.weight"][0].abs().max() == 0  # the padding's token
    monkeypatch.setattr(modeling_neobert, "round_up_tokens", lambda rows, *_: rows)
    monkeypatch.setattr(kernels, "round_up_tokens", lambda rows, *_: rows)
    padding = 0
    plain = outcome()
    assert_same(filled[0], plain[0], 2e-2)
    for a, b in zip(filled[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_sizes_that_recur():
    sizes = {round_up_tokens(rows, "cpu", torch.bfloat16) for rows in range(1024, 2048)}
    assert len(sizes) == 17
    for rows in range(5000):
        size = round_up_tokens(rows, "cpu", torch.bfloat16)
        assert rows <= size <= rows * 17 / 16
        assert round_up_tokens(size, "cpu", torch.bfloat16) == size
    assert round_up_tokens(1025, "cpu", torch.float32) == 1025
    assert round_up_tokens(1025, "cuda", torch.bfloat16) == round_up_tokens(1025, "cuda", torch.float32) == 1088


def test_rows_of_padding_only():
    """A row without tokens is zeros and changes nothing; it has no vector."""
    model = build().eval()
    ids, mask = torch.randint(5, VOCABULARY, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1] = 0
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    assert torch.all(hidden[1] == 0)
    torch.testing.assert_close(hidden[2:], model.model(ids[2:]).last_hidden_state, rtol=1e-5, atol=1e-5)
    padded = UnpaddedBatch(ids.flatten(), torch.arange(10).repeat(3), Layout(mask_BT=mask.bool()), ids.shape, None)
    restored = padded.restore(model.model.encode(padded))  # as off the CPU, where padding stays in
    torch.testing.assert_close(restored, hidden, rtol=1e-5, atol=1e-5)
    for pooling in ("mean", "cls", "max"):
        with pytest.raises(ValueError, match="row 1 has no tokens"):
            model.model.embed(ids, attention_mask=mask, pooling=pooling)
        with pytest.raises(ValueError, match="row 1 has no tokens"):
            padded.pool(restored.flatten(0, 1), pooling)


@pytest.mark.parametrize("shape", [(0, 10), (3, 0), (0, 0)])
@pytest.mark.parametrize("batch", ["packed", "padded", "whole"])
def test_empty_batches_have_empty_states(shape, batch):
    ids = torch.ones(shape, dtype=torch.long)
    inputs = {"packed": {"document_lengths": ()}, "padded": {"attention_mask": ids}, "whole": {}}[batch]
    assert build().model(ids, **inputs).last_hidden_state.shape == (*shape, 32)


# --- as transformers' users call it -----------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_half_precision_weights(variant, dtype):
    """A model loaded in half precision computes about what it does in float32, forward and backward; off the CPU too."""
    ids, labels, lengths = packed_batch()
    inputs = {"input_ids": ids, "labels": labels, "document_lengths": lengths}
    expected = gradients(build(**variant), **inputs)
    model = build(**variant).to(dtype)
    loss, grads = gradients(model, **inputs)
    assert loss == pytest.approx(expected[0].item(), rel=2e-2)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert F.cosine_similarity(grad.float().flatten(), expected[1][name].flatten(), 0) > 0.95, name
    assert model(ids, document_lengths=lengths).logits.dtype == dtype
    classifier = NeoBERTForSequenceClassification(model.config).to(dtype)
    assert classifier(ids, document_lengths=lengths).logits.isfinite().all()
    mask = torch.ones_like(ids, device="meta")
    assert model.to("meta")(ids.to("meta"), attention_mask=mask).logits.dtype == dtype


def test_labels_give_loss_and_logits():
    model, (ids, labels, lengths) = build().eval(), packed_batch()
    output = model(ids, document_lengths=lengths, labels=labels, count_correct=True)
    lean = model(ids, document_lengths=lengths, labels=labels, count_correct=True, masked_only=True)
    wanted = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, wanted)
    torch.testing.assert_close(output.loss, lean.loss)
    assert (lean.logits, lean.num_correct) == (None, output.num_correct)


@pytest.mark.parametrize("kind", [NeoBERTForMaskedLM, NeoBERTForSequenceClassification])
def test_hidden_states(kind):
    """What goes into each block, then the last hidden state; by argument or by configuration. What is not done is refused."""
    ids, mask = torch.randint(5, VOCABULARY, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model = kind(build().config).eval()
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 6, 32)] * 4
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids) * mask[..., None])
    torch.testing.assert_close(states[-1], model.model(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(model.model.norm(model.model.layers[2](*block_inputs(states[2][0]))), states[-1][0])
    assert model(ids, attention_mask=mask).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids, attention_mask=mask).hidden_states) == 4
    with pytest.raises(ValueError, match="does not take output_attentions"):
        model(ids, output_attentions=True)


def block_inputs(x_ND):
    """What a block takes of a row without padding."""
    rotary = Rotary.of(len(x_ND), 8, torch.arange(len(x_ND)))
    return x_ND, rotary, Layout(lengths=(len(x_ND),))


@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 20])
@pytest.mark.parametrize("variant", [{}, {"ngpt": True}], ids=str)
def test_another_vocabulary_size(variant, size):
    """Tokens that stay have the logits they had; those that are new have some."""
    model, ids = build(**variant).eval(), torch.randint(5, 90, (2, 6))
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        after = model(ids).logits
    assert after.shape == (2, 6, size)
    assert after.isfinite().all()
    kept = min(size, VOCABULARY)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model(torch.full((1, 3), size - 1), labels=torch.full((1, 3), size - 1)).loss.backward()


def test_tied_embeddings_are_refused():
    with pytest.raises(ValueError, match="decoder has weights of its own"):
        build(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        ("33 tokens, but max_position_embeddings is 32", {"input_ids": torch.ones(2, 33, dtype=torch.long)}),
        ("sum to 30", {"document_lengths": torch.tensor([20, 10])}),
        ("labels go up to 120, but the vocabulary has 120", {"labels": torch.full((2, 16), 120)}),
    ],
)
def test_bad_inputs_are_named(words, inputs):
    model = build(max_position_embeddings=32)
    with pytest.raises(ValueError, match=words):
        model(**{"input_ids": torch.ones(2, 16, dtype=torch.long), **inputs})


@pytest.mark.parametrize("fields", [{"hidden_size": 36, "num_attention_heads": 12}, {"num_attention_heads": 5}])
def test_heads_have_one_even_width(fields):
    with pytest.raises(ValueError, match="heads of one, even width"):
        build(**fields)


def test_dropout_is_active_in_training_only():
    model = build(dropout_prob=0.5)
    ids, labels, lengths = packed_batch()
    first, second = (model(ids, document_lengths=lengths, labels=labels).loss_sum for _ in range(2))
    assert first != second
    model.eval()
    first, second = (model(ids, document_lengths=lengths, labels=labels).loss_sum for _ in range(2))
    assert first == second
