"""The main job as a user runs it: train, stop hard, resume, load elsewhere, look at it, get it wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from helpers.commands import run_neobert, start_neobert
from helpers.runs import TEXT, TINY, TOKENIZER
from neobert.checkpoints.format import checksum, list_steps
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.files import write_json
from neobert.tasks.pretraining import task as pretraining
from neobert.training.loop import Interrupt
from neobert.training.metrics import read_metrics
from neobert.training.processes import stop_signals


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("task: pretraining\n")
    extra = [
        "trainer.save_steps=3",
        "trainer.eval_steps=3",
        "datacollator.pack_sequences=true",
        "trainer.log_train_accuracy=true",
    ]
    words = [*TINY, *extra, f"trainer.output_dir={folder / 'out'}"]
    result = run_neobert("pretrain", folder / "config.yaml", *words, real=True)
    assert result.returncode == 0, result.stderr
    return folder / "out", result


def weights_of(folder, step):
    return load_file(folder / "checkpoints" / str(step) / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_what_a_run_leaves_behind(run):
    folder, _ = run
    assert list_steps(folder / "checkpoints") == [3, 6]
    assert {p.name for p in (folder / "checkpoints/6").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "config.yaml", "optimizer", "state.json",
        "data_rank00000.json", "data_rank00000.safetensors",
    }  # fmt: skip
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6]
    assert {"loss", "lr", "tokens_per_second", "accuracy", "data_seconds"} <= rows[0].keys()
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert (folder / "config.yaml").is_file()


def test_output_to_a_pipe_is_readable(run):
    """No control characters, no progress bars; the summary, the evaluations and the end are there."""
    _, result = run
    assert result.stderr == ""
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout) is None
    for words in (
        "parameters",
        "step ",
        "evaluation at step 3",
        "attention       sdpa",
        "waiting for data",
        "fill-mask",
    ):
        assert words in result.stdout


def test_transformers_loads_the_checkpoint(run):
    """AutoModelForMaskedLM without our code gives our logits."""
    from neobert.checkpoints.load import load_pretrained

    folder = find_checkpoint(str(run[0]))
    theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ours, _ = load_pretrained(str(run[0]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["The Congress [MASK].", "Peace"], return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        difference = ours(**inputs).logits[real] - theirs(**inputs).logits[real]
    assert difference.abs().max() <= 1e-5
    assert len(tokenizer) == theirs.config.vocab_size
    assert theirs.config.pad_token_id == tokenizer.pad_token_id


def test_pipelines_open_a_checkpoint(run, tmp_path):
    """`pipeline` and `SentenceTransformer`, by the checkpoint's folder; and tokenizers in folders of their own are read."""
    from transformers import pipeline

    from neobert.checkpoints.load import load_pretrained
    from neobert.inference.embed import load_embedder
    from neobert.inference.masked_lm import fill_masks

    folder, text = find_checkpoint(str(run[0])), "The Congress of the [MASK] States."
    theirs = [one["token_str"] for one in pipeline("fill-mask", model=str(folder))(text, top_k=60)]
    (guesses,) = fill_masks(str(folder), [text], 3)
    ours = [token for token, _ in guesses.masks[0]]
    assert [token for token in theirs if token in ours] == ours  # theirs has special tokens among them
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    difference = model.encode([text]) - load_embedder(str(folder)).encode([text], normalize=False)
    assert abs(difference).max() < 1e-5
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    (older / "tokenizer").mkdir()
    for path in older.glob("tokenizer*.json"):
        path.rename(older / "tokenizer" / path.name)
    state = json.loads((older / "state.json").read_text())
    state["sha256"] = {
        f"tokenizer/{name}" if name.startswith("tokenizer") else name: value for name, value in state["sha256"].items()
    }
    del state["checksum"]
    write_json(older / "state.json", {**state, "checksum": checksum(state)})
    assert len(load_pretrained(str(older))[1]) == len(load_pretrained(str(folder))[1])


def test_fill_mask_and_report(run, tmp_path):
    result = run_neobert("fill-mask", run[0], "The [MASK] of the United [MASK].", "--top", "3")
    assert result.returncode == 0
    assert len(re.findall(r"^ +\d+\.\d%  \S+$", result.stdout, re.MULTILINE)) == 6
    assert "no [MASK] in it" in run_neobert("fill-mask", run[0], "no mask").stderr
    page = (run[0] / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#)', page)
    result = run_neobert("report", run[0], "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
    assert "not the output folder" in run_neobert("report", tmp_path).stderr


VARIANTS = {
    "tokens packed": ["datacollator.pack_sequences=true", "dataset.pre_tokenize=true", "dataset.num_proc=1"],
    "text packed, muonclip": ["datacollator.pack_sequences=true", "optimizer.name=muonclip", "scheduler.name=wsd",
        "optimizer.muon_config.clipping_threshold=0.001", "optimizer.muon_config.clipping_interval=3"],
    "stream padded": ["dataset.streaming=true", "dataset.shuffle_buffer_size=100", "model.dropout_prob=0.1"],
    "tokens padded": ["dataset.pre_tokenize=true", "dataset.num_proc=1", "tokenizer.padding=longest"],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_uninterrupted(variant, tmp_path, empty_config):
    """SIGKILL somewhere behind the first checkpoint; the final weights are equal to the bit."""
    steps = 40
    words = [*TINY, *VARIANTS[variant], f"trainer.max_steps={steps}", "trainer.save_steps=5", "trainer.eval_steps=1000"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_neobert("run", empty_config, *words, f"trainer.output_dir={whole}").returncode == 0
    process = start_neobert("run", empty_config, *words, f"trainer.output_dir={broken}", discard=True)
    while not list_steps(broken / "checkpoints") and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert list_steps(broken / "checkpoints")[-1] < steps
    result = run_neobert(
        "run", empty_config, *words, f"trainer.output_dir={broken}", "trainer.resume_from_checkpoint=latest"
    )
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert_same_weights(weights_of(whole, steps), weights_of(broken, steps))
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
        for folder in (whole, broken)
    ]
    assert losses[0] == losses[1]


def test_the_seed_decides_everything(tmp_path, empty_config):
    words = [*TINY, "model.dropout_prob=0.1", "trainer.save_steps=6"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            run_neobert("run", empty_config, *words, f"seed={seed}", f"trainer.output_dir={tmp_path / name}").returncode
            == 0
        )
    assert_same_weights(weights_of(tmp_path / "a", 6), weights_of(tmp_path / "b", 6))
    a, c = weights_of(tmp_path / "a", 6), weights_of(tmp_path / "c", 6)
    assert not any(torch.equal(a[name], c[name]) for name in a if a[name].ndim == 2)


def test_a_signal_saves_and_says_so(tmp_path, empty_config):
    words = [*TINY, "trainer.max_steps=100000", f"trainer.output_dir={tmp_path}"]
    process = start_neobert("run", empty_config, *words, unbuffered=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert "received SIGTERM" in rest
    assert find_checkpoint(str(tmp_path)).name in rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step(number, capsys):
    with pytest.raises(SystemExit) as stopped, stop_signals(Interrupt()):
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert "nothing had to be saved" in capsys.readouterr().out


def test_a_signal_breaks_off_an_evaluation_which_is_made_up_for(tmp_path):
    """It comes in step 3, behind which an evaluation is due; resumed, the run has what a whole one has."""

    def run(name, observe=None, *words):
        base = ["trainer.eval_steps=3", "trainer.save_strategy=best", "trainer.save_model=false"]
        loaded = load_config([], [*TINY, *base, *words, f"trainer.output_dir={tmp_path / name}"])
        return pretraining.run(loaded, observe)

    def stop(batch, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, broken = run("whole"), run("broken", stop)
    assert (broken.exit_code, broken.state.step, broken.state.is_evaluation_open) == (128 + signal.SIGTERM, 3, True)
    resumed = run("broken", None, "trainer.resume_from_checkpoint=latest")
    assert resumed.state == whole.state
    assert_same_weights(weights_of(tmp_path / "whole", 6), weights_of(tmp_path / "broken", 6))
    rows = [
        [
            (row["kind"], row["step"], row.get("loss", row.get("eval_loss")))
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert rows[0] == rows[1]
    state = json.loads((tmp_path / "broken/checkpoints/3/state.json").read_text())
    assert (state["best_step"], state["is_evaluation_open"]) == (3, False)


def test_a_new_run_moves_the_old_one_aside(run, tmp_path, empty_config):
    words = [*TINY, "trainer.max_steps=2", f"trainer.output_dir={tmp_path}"]
    assert run_neobert("run", empty_config, *words).returncode == 0
    refused = run_neobert("run", empty_config, *words, "trainer.overwrite_output_dir=false")
    assert refused.returncode == 2
    assert "holds a run" in refused.stderr
    again = run_neobert("run", empty_config, *words, "seed=1")
    assert "is now in" in again.stdout
    assert list_steps(tmp_path / "previous/1/checkpoints") == [2]


def made_tokenizer(folder):
    """A tokenizer without a mask token."""
    from transformers import BertTokenizerFast

    AutoTokenizer.from_pretrained(TOKENIZER)
    BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}, mask_token=None).save_pretrained(
        folder
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("mask_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}))


BAD_INPUT = {
    "missing file": (["dataset.path=absent.txt"], "dataset.path: nothing at 'absent.txt'"),
    "empty corpus": (["dataset.path={tmp}/empty.txt"], "empty.txt: empty"),
    "blank corpus": (["dataset.path={tmp}/blank.txt"], "no document in it"),
    "small corpus": (["dataset.path={tmp}/small.txt"], "fewer than one microbatch of 4"),
    "invalid utf-8": (
        ["dataset.path={tmp}/latin.txt", "dataset.bad_rows=refuse"],
        ": not UTF-8 (dataset.bad_rows: skip passes over such rows)",
    ),
    "few valid rows": (
        ["dataset.path={tmp}/latin.txt"],
        "fewer than one microbatch of 4 (40 rows passed over: 40 not UTF-8, first at",
    ),
    "no mask token": (["tokenizer.path={tmp}/maskless"], "has no mask_token"),
    "no tokenizer": (["tokenizer.path={tmp}/absent"], "tokenizer.path: no folder"),
    "offline tokenizer": (
        ["tokenizer.path=null", "tokenizer.name=bert-base-uncased"],
        "tokenizer.name: 'bert-base-uncased' cannot be loaded",
    ),
    "heads": (["model.hidden_size=30", "model.num_attention_heads=4"], "model.hidden_size: 30 is not divisible"),
    "not writable": (["trainer.output_dir={tmp}/empty.txt/out"], "trainer.output_dir: cannot write"),
    "no checkpoint": (["trainer.resume_from_checkpoint=77"], "no checkpoint '77'; there is none"),
    "decay": (["scheduler.decay_steps=1"], "scheduler: the decay ends at step 1, before the warmup"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, empty_config):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "small.txt").write_text("one\n")
    (tmp_path / "latin.txt").write_bytes(b"a good line\n" + b"caf\xe9\n" * 40)
    if case == "no mask token":
        made_tokenizer(tmp_path / "maskless")
    words, message = BAD_INPUT[case]
    result = run_neobert(
        "run",
        empty_config,
        *TINY,
        f"trainer.output_dir={tmp_path / 'out'}",
        *(word.format(tmp=tmp_path) for word in words),
    )
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr
    assert not list_steps(Path(tmp_path / "out/checkpoints"))


def test_a_full_disk_while_saving(tmp_path, empty_config):
    """The last good checkpoint stays; one line, exit code 2. The disk is a limit of the size of files."""
    words = [*TINY, f"trainer.output_dir={tmp_path / 'out'}", "trainer.save_steps=3"]
    result = run_neobert("run", empty_config, *words, max_file_bytes=300 << 10)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: .*cannot save step 3: .*no checkpoint was written before\n", result.stderr)
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == []


def test_a_full_disk_while_logging(tmp_path, empty_config):
    """metrics.jsonl is a device that is always full: one line, exit code 2."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    words = [*TINY, f"trainer.output_dir={out}", "trainer.resume_from_checkpoint=latest"]
    result = run_neobert("run", empty_config, *words)
    told = f"error: {out / 'metrics.jsonl'}: the disk is full; go on from {out / 'checkpoints/2'}\n"
    assert (result.returncode, result.stderr) == (2, told)


def test_help_teaches_without_torch():
    code = (
        "import sys; from neobert.cli.main import app\n"
        "try: app(['pretrain', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "neobert pretrain configs/pretraining/quickstart.yaml" in result.stdout


def test_tokenizer_train_makes_the_shipped_tokenizer(tmp_path):
    """Up to a few rare tokens: the trainer of `tokenizers` breaks ties by hash order."""
    result = run_neobert("tokenizer", "train", TEXT / "train.txt", "-o", tmp_path / "tokenizer", "--vocab-size", "8192")
    assert result.returncode == 0, result.stderr
    ours, shipped = (
        set(AutoTokenizer.from_pretrained(path).get_vocab()) for path in (tmp_path / "tokenizer", TOKENIZER)
    )
    assert len(ours) == len(shipped) == 8192
    assert len(ours - shipped) < 40
    assert "no text" in run_neobert("tokenizer", "train", write(tmp_path / "e.txt", "\n"), "-o", tmp_path / "t").stderr


def write(path, text):
    path.write_text(text)
    return path


def test_ngpt_trains_saves_and_fills_masks(tmp_path, empty_config, small):
    """A variant that only our code loads, compiled blocks included: matrices keep length 1 through saving and resuming."""
    from neobert.checkpoints.load import load_pretrained

    words = [*TINY, *small, "model.ngpt=true", f"trainer.output_dir={tmp_path / 'out'}", "trainer.save_steps=3"]
    compiled = ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"]
    assert run_neobert("pretrain", empty_config, *words, "trainer.max_steps=3", *compiled).returncode == 0
    resumed = run_neobert("pretrain", empty_config, *words, "trainer.resume_from_checkpoint=latest")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    model, _ = load_pretrained(str(tmp_path / "out"))
    norms = model.model.layers[0].attention.qkv.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)
    guesses = run_neobert("fill-mask", tmp_path / "out", "the president [MASK] to the people")
    assert guesses.returncode == 0
    assert "%" in guesses.stdout
