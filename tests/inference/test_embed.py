"""Embedding: every kind of sentence-transformers folder gives the vectors of that library, or is refused by name; files."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.commands import run_neobert
from helpers.glue import foreign_model
from helpers.runs import TOKENIZER

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from transformers import AutoTokenizer, EuroBertConfig, EuroBertModel, RobertaConfig, RobertaModel

from neobert.config.load import load_config
from neobert.errors import CheckpointError, DataError, UserError
from neobert.inference.embed import embed_file, load_embedder
from neobert.model.hf_encoder import longest_input
from neobert.training.runtime import Runtime

TEXTS = ["peace", "the congress of the people spoke about peace and war", "Trade " * 40, "", "ships and rivers, " * 9]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny encoders of transformers with our tokenizer, by name: bert, eurobert."""
    root = tmp_path_factory.mktemp("encoders")
    foreign_model(root / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = EuroBertConfig(
        vocab_size=8192, max_position_embeddings=128, num_key_value_heads=1, pad_token_id=0, **sizes
    )
    EuroBertModel(config).save_pretrained(root / "eurobert")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(root / "eurobert")
    return root


def sentence_folder(encoder, folder, *more, pooling="mean", length=None, **settings):
    """A folder that sentence-transformers saved: `encoder`, pooling, and the modules `more`. Returns (folder, the model)."""
    torch.manual_seed(1)
    transformer = Transformer(str(encoder))
    if length:
        transformer.max_seq_length = length
    keep = {"include_prompt": settings.pop("include_prompt")} if "include_prompt" in settings else {}
    built = [transformer, Pooling(32, pooling, **keep), *more]
    model = SentenceTransformer(modules=built, device="cpu", **settings)
    model.save(str(folder))
    return folder, SentenceTransformer(str(folder), device="cpu")


def dense(**fields):
    torch.manual_seed(2)
    return Dense(**{"in_features": 32, "out_features": 24, **fields})


FOLDERS = {
    "cls": ("bert", [], {"pooling": "cls"}),
    "max, unit vectors": ("eurobert", [Normalize()], {"pooling": "max"}),
    "mean, cut": ("eurobert", [], {"length": 9}),
    "dense": ("bert", [dense(), Normalize()], {"pooling": "cls"}),
    "two of dense, no bias": (
        "eurobert", [Normalize(), dense(bias=False, activation_function=torch.nn.Identity()),
                     Dense(24, 16, activation_function=torch.nn.GELU())], {},
    ),
    "a default prompt": (
        "bert", [Normalize()], {"prompts": {"query": "query: ", "story": "a story of "}, "default_prompt_name": "story"},
    ),
    "prompts by name alone": ("bert", [], {"prompts": {"query": "query: "}, "include_prompt": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_sentence_transformers(name, encoders, tmp_path):
    """`embed` and `similarity` as `encode` and cosines of it."""
    encoder, more, settings = FOLDERS[name]
    folder, peer = sentence_folder(encoders / encoder, tmp_path / "model", *more, **settings)
    embedder = load_embedder(str(folder))
    wanted = peer.encode(TEXTS)
    assert np.abs(embedder.encode(TEXTS) - wanted).max() <= 1e-5
    assert embedder.width == wanted.shape[1]
    rows = [json.dumps({"body": text}) + "\n" for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(rows))
    embed_file(embedder, str(tmp_path / "texts.jsonl"), tmp_path / "a.npy", "body")
    assert np.abs(np.load(tmp_path / "a.npy") - wanted).max() <= 1e-5
    if "prompts" in settings and "include_prompt" not in settings:
        named = embedder.encode(TEXTS, prompt=embedder.settings.prompt("query"))
        assert np.abs(named - peer.encode(TEXTS, prompt_name="query")).max() <= 1e-5
        with pytest.raises(CheckpointError, match="no prompt 'passage'; there are: query, story"):
            embedder.settings.prompt("passage")


def test_older_folders(encoders, tmp_path):
    """As sentence-transformers 2 wrote them: the encoder in a folder of its own, flags of pooling, lower case, a length that
    the tokenizer does not know.
    """
    folder, _ = sentence_folder(encoders / "bert", tmp_path / "model", dense(), pooling="cls")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    for one in modules:
        one["type"] = f"sentence_transformers.models.{one['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(flags))
    tokenizer = json.loads((inner / "tokenizer_config.json").read_text())
    (inner / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 8}))
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    embedder = load_embedder(str(folder))
    assert embedder.max_length == 20
    texts = [*TEXTS, *[text.upper() for text in TEXTS]]
    wanted = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert np.abs(embedder.encode(texts) - wanted).max() <= 1e-5


def test_what_is_not_computed_is_named(encoders, tmp_path):
    """Each is one line; nothing is left out silently."""

    def refused(text, *more, change=None, **settings):
        folder, _ = sentence_folder(encoders / "bert", tmp_path / str(len(list(tmp_path.iterdir()))), *more, **settings)
        if change:
            path = folder / change[0]
            path.write_text(json.dumps({**json.loads(path.read_text()), **change[1]}))
        with pytest.raises(CheckpointError) as caught:
            load_embedder(str(folder)).encode(TEXTS)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("has modules that are not computed here: LayerNorm", LayerNorm(32))
    refused("pooling lasttoken is not computed here", pooling="lasttoken")
    refused("pooling cls, mean is not computed here", pooling=("cls", "mean"))
    refused("a Dense module with use_residual is not computed here", dense(use_residual=True))
    refused("a Dense module with activation_function Softplus", dense(activation_function=torch.nn.Softplus()))
    refused(
        "include_prompt: false", include_prompt=False, prompts={"query": "query: "}, default_prompt_name="query"
    )  # fmt: skip
    asked = {"query_expansion": {"length": 32}, "transformer_task": "fill-mask"}
    refused("query_expansion, transformer_task fill-mask", change=("sentence_bert_config.json", asked))


def test_a_half_loaded_encoder_is_refused(encoders, tmp_path):
    """Tensors that are missing are not drawn at random."""
    from safetensors.torch import load_file, save_file

    folder, _ = sentence_folder(encoders / "bert", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    dropped = next(name for name in weights if "layer.1" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors were not loaded: encoder.layer.1"):
        load_embedder(str(folder))


def test_batches_dealt_over_processes_are_the_same(encoders):
    """Two processes, one after the other, each with its batches: together to the bit what one computes."""
    embedder = load_embedder(str(encoders / "bert"), batch_tokens=16)
    sums = []

    class Recording(Runtime):
        def sum_tensor(self, tensor):
            sums.append(tensor.clone())
            return tensor

    ids = embedder.tokenize([*TEXTS, "a fifth text", "and one more"])
    from neobert.inference.embed import embed_ids

    def part(rank, world):
        return embed_ids(embedder.model, ids, 0, Recording(rank, world, device=torch.device("cpu")), 16)

    whole = part(0, 1)
    halves = [part(rank, 2) for rank in (0, 1)]
    assert np.array_equal(sum(halves), whole)
    assert all((half == 0).all(1).sum() in (3, 4) for half in halves)


# --- files -----------


def test_outputs_are_kept_and_rows_can_be_told_apart(encoders, tmp_path):
    """An output that is there is not replaced without --force; a .parquet holds ids and texts."""
    embedder = load_embedder(str(encoders / "bert"))
    rows = [{"id": 10 + n, "body": text} for n, text in enumerate(TEXTS)]
    source, out = tmp_path / "texts.jsonl", tmp_path / "a.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed_file(embedder, str(source), out, "body")
    table = pq.read_table(out)
    assert table.column_names == ["id", "text", "embedding"]
    assert (table["id"].to_pylist(), table["text"].to_pylist()) == ([10, 11, 12, 13, 14], TEXTS)
    assert np.allclose(np.array(table["embedding"].to_pylist()), embedder.encode(TEXTS), atol=1e-6)
    before = out.read_bytes()
    with pytest.raises(DataError, match="is there already; choose another file, or --force"):
        embed_file(embedder, str(source), out, "body")
    assert out.read_bytes() == before
    (tmp_path / "plain.txt").write_text("peace\nwar\n")
    embed_file(embedder, str(tmp_path / "plain.txt"), out, force=True)
    assert pq.read_table(out).column_names == ["text", "embedding"]
    said = run_neobert("embed", encoders / "bert", source, "-o", out, "--column", "body")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert pq.read_table(out).num_rows == 2
    said = run_neobert("embed", encoders / "bert", source, "-o", out, "--column", "body", "--force")
    assert (said.returncode, pq.read_table(out).num_rows) == (0, 5), said.stderr


# --- lengths -----------


def test_positions_that_are_padding_are_no_length(tmp_path):
    """RoBERTa's table of 66 positions takes 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = RobertaModel(RobertaConfig(vocab_size=8192, max_position_embeddings=66, pad_token_id=1, **sizes))
    model.save_pretrained(tmp_path / "roberta")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "roberta")
    assert longest_input(model) == 64
    embedder = load_embedder(str(tmp_path / "roberta"))
    assert embedder.max_length == 64
    assert math.isfinite(embedder.encode(["peace " * 200]).sum())
    with pytest.raises(CheckpointError, match="texts of 65 tokens were asked for, but the model takes 64"):
        load_embedder(str(tmp_path / "roberta"), max_length=65)
    from neobert.tasks.contrastive import task as contrastive
    from neobert.tasks.glue import task as glue

    words = ["model.from_hub=true", f"model.name={tmp_path / 'roberta'}", f"trainer.output_dir={tmp_path / 'out'}"]
    (tmp_path / "pairs.jsonl").write_text(
        '{"anchor": "a b", "positive": "c d"}\n{"anchor": "e f", "positive": "g h"}\n'
    )
    more = [f"dataset.path={tmp_path / 'pairs.jsonl'}", "dataset.max_seq_length=65", "dataset.num_workers=0"]
    with pytest.raises(UserError, match="max_seq_length: 65 is longer than the 64 tokens that"):
        contrastive.run(load_config([], [*words, *more], "contrastive"))
    from helpers.glue import write_local

    more = ["glue.task_name=rte", f"dataset.path={write_local(tmp_path / 'glue', ['rte'])}", "glue.max_seq_length=65"]
    with pytest.raises(UserError, match="glue.max_seq_length: 65 is longer than the 64 tokens that"):
        glue.run(load_config([], [*words, *more, "trainer.per_device_train_batch_size=8"], "glue"))
