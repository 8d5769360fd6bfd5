"""A model as an ONNX graph with any batch size and length, through torch's own exporter.

Inputs are `input_ids` and `attention_mask`, B x T int64; the output is what `output` names. All variants go one way: our
model on padded rows (`Layout.mask_BT`), as on CUDA with SDPA, where no shape depends on the data but B and T.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.checkpoints.load import Model
from neobert.model.modeling_neobert import NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from neobert.model.unpadding import UnpaddedBatch

Output = Literal["last_hidden_state", "logits"]
ONNX = "onnx/model.onnx"  # where sentence-transformers and optimum look


class PaddedModel(nn.Module):
    """`model` as a function of two tensors. `output`: hidden states B x T x D, or logits of its head."""

    def __init__(self, model: Model, output: Output):
        super().__init__()
        self.inner, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask_BT, model = attention_mask.bool(), self.inner
        hidden_ND = model.model.encode(UnpaddedBatch.padded(input_ids, mask_BT))
        if self.output == "last_hidden_state":
            return hidden_ND.view(*input_ids.shape, -1)
        if isinstance(model, NeoBERTForMaskedLM):
            return F.linear(hidden_ND, model.decoder_weight(), model.lm_head.bias).view(*input_ids.shape, -1)
        assert isinstance(model, NeoBERTForSequenceClassification)
        hidden_BTD, mask_BT1 = hidden_ND.view(*input_ids.shape, -1), mask_BT.unsqueeze(-1).float()
        if model.config.classifier_pooling == "bos":
            first_B = mask_BT.int().argmax(1)
            pooled_BD = hidden_BTD[torch.arange(first_B.shape[0]), first_B]
        else:
            pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return model.classifier(F.gelu(model.dense(pooled_BD)))


def write_onnx(model: Model, path: Path, output: Output) -> None:
    """Write the graph to `path`; weights beyond 2 GB go into a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    length = min(8, model.config.max_position_embeddings)
    ids = torch.ones(2, length, dtype=torch.int64)
    mask = ids.clone()
    mask[1, length // 2 :] = 0
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes: dict[str, Any] = {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            PaddedModel(model, output).eval(), (ids, mask), dynamo=True, dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask"], output_names=[output], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path))
