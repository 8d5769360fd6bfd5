"""Exports: every tool loads them and computes what the trained model computes; whole or not at all."""

import json
import resource
import signal
import sys
import time
from dataclasses import asdict

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    dynamic_module_utils,
    pipeline,
)

from helpers.checkpoints import LENGTHS, OWN_CODE, largest_difference, padded_rows, tiny_model, write_checkpoint
from helpers.commands import run_neobert, start_neobert
from helpers.models import VARIANTS
from neobert.checkpoints.convert import convert
from neobert.checkpoints.load import load_source
from neobert.errors import UserError
from neobert.export.importing import import_model
from neobert.export.write import Wanted, export_model, write_transformers
from neobert.files import write_json
from neobert.inference.embed import load_embedder
from neobert.inference.masked_lm import fill_masks
from neobert.inference.sentence_transformers import Embedding
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification


@pytest.fixture(autouse=True)
def _own_modules(tmp_path, monkeypatch):
    """Code that comes with a folder is copied into a cache of this test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf_modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def quiet(text):
    pass


def export(source, out, wanted=None):
    """(checks, the folder) of a verified export."""
    return {check.what: check for check in export_model(str(source), out, wanted or Wanted(), log=quiet)}, out


def whole_precision(checks):
    """What was compared in float32, all of it to 1e-5."""
    found = {what: check for what, check in checks.items() if not check.is_half}
    assert all(check.absolute <= 1e-5 for check in found.values())
    return set(found)


def half_difference(ours, theirs, ids, mask, output):
    """Root mean square of the differences at real tokens over the spread of the float32 outputs."""
    with torch.no_grad():
        a, b = (getattr(m(input_ids=ids, attention_mask=mask), output)[mask.bool()].float() for m in (ours, theirs))
    return float((a - b).square().mean().sqrt() / a.std())


# --- the same numbers -----------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_in_transformers(variant, tmp_path):
    """AutoModel, AutoModelForMaskedLM and AutoModelForSequenceClassification, 1 to 512 tokens, padded and alone."""
    model = tiny_model(**variant)
    source = load_source(str(write_checkpoint(tmp_path / "run", model)))
    (tmp_path / "out").mkdir()
    write_transformers(source, tmp_path / "out")
    is_native = variant == {"rope": True, "rms_norm": True, "hidden_act": "swiglu"}
    assert source.is_native == is_native == (not list((tmp_path / "out").glob("*.py")))
    trust = {} if is_native else {"trust_remote_code": True}
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", **trust).eval()
    ids, mask = padded_rows()
    assert largest_difference(model, theirs, ids, mask, "logits") <= 1e-5
    encoder = AutoModel.from_pretrained(tmp_path / "out", **trust).eval()
    assert largest_difference(model.model, encoder, ids, mask, "last_hidden_state") <= 1e-5
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3, **trust)
    assert torch.equal(fresh.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert fresh(input_ids=ids, attention_mask=mask).logits.shape == (len(LENGTHS), 3)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        for kind, output in ((AutoModelForMaskedLM, "logits"), (AutoModel, "last_hidden_state")):
            short = kind.from_pretrained(tmp_path / "out", dtype=dtype, **trust).eval()
            assert half_difference(model if output == "logits" else model.model, short, ids, mask, output) <= tolerance
        scores = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out", num_labels=3, dtype=dtype, **trust
        )
        assert scores(input_ids=ids, attention_mask=mask).logits.isfinite().all()
    again = convert(str(tmp_path / "out"))
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_native_in_a_clean_process(tmp_path):
    """transformers without our code; the tokenizer, the pipeline, the card, and our own commands on it."""
    run = write_checkpoint(tmp_path / "run", tiny_model())
    checks, out = export(run, tmp_path / "out")
    half = {f"{what} {dtype}": (1, 200) for what in ("hidden", "logits") for dtype in ("bfloat16", "float16")}
    assert {what: (check.shortest, check.longest) for what, check in checks.items()} == {
        "hidden": (1, 512), "logits": (1, 512), **half,
    }  # fmt: skip
    assert all(check.absolute <= 1e-5 for what, check in checks.items() if what not in half)
    assert all(checks[what].difference <= (0.05 if "bfloat16" in what else 0.01) for what in half)
    assert json.loads((out / "export.json").read_text())["verified"] == [asdict(check) for check in checks.values()]
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".py", ".pt", ".pkl")]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == 512
    assert set(tokenizer("peace")) == {"input_ids", "attention_mask"}
    best = pipeline("fill-mask", model=str(out), tokenizer=str(out))("the [MASK] of the people", top_k=1)[0]
    [guess] = fill_masks(str(out), ["the [MASK] of the people"], 1)
    assert (best["token_str"], pytest.approx(best["score"], abs=1e-5)) == guess.masks[0][0]
    card = (out / "README.md").read_text()
    for text in (
        "library_name: transformers", "AutoModelForMaskedLM", "- corpus\n", "lr: 0.002", "7 steps and 12,345 tokens",
        "| 7 | 7.2500 | 7.5000 |", "![loss](training.svg)",
    ):  # fmt: skip
        assert text in card, text
    assert "/somewhere" not in card
    assert "| 99 |" not in card


def test_own_code_in_a_clean_process(tmp_path):
    """nGPT with learned positions and GELU: transformers, sentence-transformers and ONNX."""
    run = write_checkpoint(tmp_path / "run", tiny_model(**OWN_CODE))
    embedding = Embedding("max", normalize=False, prompts={"query": "query: "})
    checks, out = export(run, tmp_path / "out", Wanted(embedding, onnx=True))
    assert whole_precision(checks) == {"hidden", "logits", "onnx hidden", "embedding"}
    assert checks["logits bfloat16"].difference <= 0.05
    assert (checks["onnx hidden"].shortest, checks["onnx hidden"].longest) == (1, 512)
    card = (out / "README.md").read_text()
    assert all(text in card for text in ("library_name: sentence-transformers", "trust_remote_code=True", "query: "))
    embedder = load_embedder(str(out))
    assert (embedder.model.contrastive.settings.pooling, embedder.max_length) == ("max", 512)
    settings = json.loads((out / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "query: "}
    assert not (out / "2_Normalize").exists()


@pytest.mark.parametrize("variant", [{}, {**OWN_CODE, "ngpt": False, "rms_norm": False}], ids=str)
def test_classifiers_there_and_back(variant, tmp_path):
    """A classifier's logits; imported and exported again, to the byte. LayerNorm also as an ONNX graph."""
    model = tiny_model(NeoBERTForSequenceClassification, num_labels=3, num_hidden_layers=1, **variant)
    wanted = Wanted(onnx=bool(variant))
    checks, out = export(write_checkpoint(tmp_path / "run", model), tmp_path / "out", wanted)
    assert whole_precision(checks) == {"hidden", "logits", *(["onnx logits"] if variant else [])}
    assert checks["logits bfloat16"].difference <= 0.05
    if not variant:
        import_model(str(out), tmp_path / "in", log=quiet)
        (tmp_path / "again").mkdir()
        write_transformers(load_source(str(tmp_path / "in")), tmp_path / "again")
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_embedding_models_are_exported_as_such(tmp_path):
    """With the pooling and the longest text that they were trained with."""
    model = tiny_model(NeoBERTForEmbedding)
    trained = {"pooling": "cls", "max_length": 40}
    checks, out = export(write_checkpoint(tmp_path / "run", model, embedding=trained), tmp_path / "out")
    assert whole_precision(checks) == {"hidden", "embedding"}
    assert (checks["embedding"].longest, checks["embedding"].absolute <= 1e-5) == (40, True)
    assert json.loads((out / "1_Pooling/config.json").read_text())["pooling_mode_cls_token"]
    with pytest.raises(UserError, match="has no decoder"):
        list(fill_masks(str(out), ["a [MASK]"], 1))


# --- whole or not at all -----------


def test_a_difference_is_not_kept(tmp_path):
    """What computes something else is named, and goes."""
    run = write_checkpoint(tmp_path / "run", tiny_model())
    step = run / "checkpoints/7"
    fields = json.loads((step / "config.json").read_text())
    fields["rope_parameters"]["rope_theta"] = 500.0  # transformers believes this, our model the section of its own
    source, state = step / "config.json", json.loads((step / "state.json").read_text())
    source.write_text(json.dumps(fields))
    (step / "state.json").unlink()
    (step / "config.yaml").unlink()
    assert state
    with pytest.raises(UserError, match="computes something else, so it is not kept: hidden"):
        export_model(str(step), tmp_path / "out", Wanted(), log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing(tmp_path):
    run = write_checkpoint(tmp_path / "run", tiny_model())
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))
        with pytest.raises(UserError, match="out: cannot be written: "):
            export_model(str(run), tmp_path / "out", Wanted(), log=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_killed_and_started_again(tmp_path):
    """SIGKILL in the middle leaves no folder of that name; the next export clears up after it, and nothing of the user's.

    An earlier export stays whole whenever the kill comes. `--replace` keeps others' folders.
    """
    run = write_checkpoint(tmp_path / "run", tiny_model())
    out = tmp_path / "out"
    process = start_neobert("export", run, out, discard=True)
    theirs = [tmp_path / name for name in ("out.tmp", "out.old.tmp")]
    for folder in theirs:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    while not (tmp_path / ".out.neobert-new/config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    result = run_neobert("export", run, out)
    assert result.returncode == 0, result.stderr
    assert "verified    logits: 15 rows of 1 to 512 tokens, difference " in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old.tmp", "out.tmp", "run"]
    assert all((folder / "notes.txt").read_text() == "mine" for folder in theirs)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(tmp_path / ".out.neobert-old")  # as a kill leaves it between two renames
    (tmp_path / ".out.neobert-new").mkdir()
    with pytest.raises(UserError, match="is there already; choose another folder, or --replace"):
        export_model(str(run), out, Wanted())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"it has no export.json, so it is not replaced"):
        export_model(str(run), tmp_path / "mine", Wanted(), replacing=True)


def test_bad_input_is_one_line(tmp_path):
    run = write_checkpoint(tmp_path / "run", tiny_model())
    step = run / "checkpoints/7"

    def says(source, text):
        with pytest.raises(UserError) as caught:
            export_model(str(source), tmp_path / "out", Wanted(), log=quiet)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    says(tmp_path / "absent", "no such folder")
    (tmp_path / "empty").mkdir()
    says(
        tmp_path / "empty",
        "it has no state.json, no config.json and no model.safetensors; expected a run's output folder",
    )
    (step / "state.json").rename(tmp_path / "state.json")
    says(step, "half a checkpoint: it has no state.json, which is written last")
    (step / "config.yaml").unlink()
    fields = json.loads((step / "config.json").read_text())
    for changed, text in {
        "hidden_size": "the weights do not fit the model: model.embed_tokens.weight is (8192, 32), the model has (8192, 64)",
        "num_hidden_layers": "model.layers.2.attention_norm.weight is missing",
        "num_attention_heads": "describes no model: hidden_size 32 does not give 5 heads",
    }.items():
        own = fields["neobert"] | {
            changed: {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 5}[changed]
        }
        write_json(step / "config.json", fields | {"neobert": own})
        says(step, text)
    write_json(step / "config.json", fields)
    tokenizer = AutoTokenizer.from_pretrained(step)
    tokenizer.add_tokens([f"<more-{n}>" for n in range(5)])
    tokenizer.save_pretrained(step)
    says(step, "the tokenizer does not fit: it has 8,197 tokens, the model's embeddings 8,192")
    (step / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes()[:1000])
    says(step, "model.safetensors: damaged")
    result = run_neobert("export", step, tmp_path / "out", "--pooling", "mean")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "without --sentence-transformers" in result.stderr
