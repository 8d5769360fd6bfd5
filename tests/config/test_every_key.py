"""Every key of the configuration does something: one row per key, with what a user can observe when it is not the default."""

import contextlib
import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from helpers.contrastive_keys import CONTRASTIVE_ROWS
from helpers.glue_keys import GLUE_ROWS
from helpers.mteb_keys import MTEB_ROWS
from helpers.runs import TEXT, TINY, TOKENIZER, hub_cache, tokenizing_threads
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.config.schema import known_keys
from neobert.data.tokenizer import load_tokenizer, text_tokenizer
from neobert.errors import UserError
from neobert.model import modeling_neobert
from neobert.model.modeling_neobert import NeoBERTForMaskedLM
from neobert.ranks import Ranks
from neobert.tasks import encoder
from neobert.tasks.encoder import build_model
from neobert.tasks.pretraining.data import build_data
from neobert.training import processes, resume, runtime
from neobert.training.choices import (
    choose_attention,
    choose_device,
    choose_engine,
    choose_kernels,
)
from neobert.training.optimizer import build_clip, build_run_optimizer

COMPILE_EAGER = "trainer.torch_compile_backend=eager"


def losses(*words):
    """The losses of a run differ from those of the same run without the first word."""
    return lambda train, small: train(*small, *words).losses != train(*small, *words[1:]).losses


def observed(observe, expected, *words):
    """`observe(run)` is `expected`, and without the first word it is not."""

    def row(train, small):
        return observe(train(*small, *words)) == expected and observe(train(*small, *words[1:])) != expected

    return row


def called(owner, name, describe, expected, *words):
    """A run calls `owner.name` with arguments that come to `expected` by `describe`, and without the first word it does not."""

    def row(train, small):
        found = []
        for some in (words, words[1:]):
            calls, original = [], getattr(owner, name)

            def note(*arguments, _calls=calls, _original=original, **named):
                _calls.append(describe(*arguments, **named))
                return _original(*arguments, **named)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, note)
                train(*small, *some)
            found.append(expected in calls)
        return found == [True, False]

    return row


def pins(train, small):
    """On CUDA; without it torch refuses to pin, so an attempt shows."""
    found = []
    for is_asked in (True, False):
        config = load_config([], [*TINY, *small, f"dataset.pin_memory={is_asked}"]).config
        tokenizer = text_tokenizer(load_tokenizer("", str(TOKENIZER)))
        loader = build_data(config, tokenizer, Ranks(), Path(small[0].removeprefix("dataset.path=")).parent, True).train
        try:
            found.append(next(loader).input_ids.is_pinned())
        except RuntimeError:
            found.append(True)
        loader.close()
    return found == [True, False]


def saves_before_the_next_step(train, small):
    """A save that takes longer than a step is over before the next one begins, or not."""
    found, save = [], resume.save_checkpoint
    for word in ("trainer.save_in_background=false", "trainer.save_in_background=true"):
        events = []

        def slowly(*arguments, _events=events):
            time.sleep(0.3)
            _events.append("saved")
            return save(*arguments)

        hook = register_optimizer_step_pre_hook(lambda *given, _events=events: _events.append("step"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "save_checkpoint", slowly)
            train(*small, word, "trainer.save_steps=2", "trainer.max_steps=3")
        hook.remove()
        found.append(events[:3])
    return found == [["step", "step", "saved"], ["step", "step", "step"]]


def refused(text, *words):
    """The run stops with an error that contains `text`."""

    def row(train, small):
        with pytest.raises(UserError) as error:
            train(*small, *words)
        return text in str(error.value)

    return row


def noted(text, *words):
    """Loading the configuration gives a note that contains `text`."""
    return lambda train, small: any(text in note for note in load_config([], [*small, *words]).warnings)


def data_of(small, *words):
    """The data of a run that is not started."""
    config = load_config([], [*TINY, *small, *words]).config
    return build_data(config, text_tokenizer(load_tokenizer("", str(TOKENIZER))), Ranks(), Path("absent"), False)


def reads_a_file_once(train, small):
    """Whether batches stay as they are when the file is overwritten after it was opened."""
    path = Path(small[0].removeprefix("dataset.path=")) / "train.txt"
    text, found = path.read_text(), []
    for word in ("true", "false"):
        batches = []
        for later in (text, "x" * len(text)):
            path.write_text(text)
            loader = data_of(small, f"dataset.load_all_from_disk={word}").train
            with open(path, "r+") as file:
                file.write(later)
            batches.append([next(loader).input_ids.tolist() for _ in range(40)][-1])  # some epochs later
            loader.close()
        found.append(batches[0] == batches[1])
    return found == [True, False]


def computes_in_bfloat16(train, small):
    """On a processor that says it has AMX; where it has not, the products are emulated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        return losses("trainer.mixed_precision=bf16", "trainer.max_steps=2")(train, small)


def in_state(name):
    return lambda run: json.loads((run.folder / f"checkpoints/{run.steps[-1]}/state.json").read_text())[name]


def in_config(section, name):
    return lambda run: yaml.safe_load((run.folder / "config.yaml").read_text())[section].get(name)


def in_model_config(name):
    return lambda run: json.loads((run.folder / f"checkpoints/{run.steps[-1]}/config.json").read_text())["neobert"].get(
        name
    )


def spread(part):
    """Whether the weights whose names contain `part` go beyond 0.25 right after a start at a tiny learning rate."""

    def row(run):
        weights = load_file(run.folder / f"checkpoints/{run.steps[-1]}/model.safetensors")
        return bool(max(tensor.abs().max() for name, tensor in weights.items() if part in name) > 0.25)

    return row


def eval_steps(run):
    return [row["step"] for row in run.eval]


def two_files(name, number=40):
    """Another file in the folder of the corpus, as a split of its own."""

    def row(train, small):
        folder = small[0].removeprefix("dataset.path=")
        with open(f"{folder}/test-more.txt", "w") as file:
            file.write("another text about war and trade and money and ships\n" * number)
        base = [*small, "trainer.eval_steps=3"]
        observe = (lambda run: run.eval[0]["eval_loss"]) if name == "eval" else (lambda run: run.losses)
        return observe(train(*base, f"dataset.{name}_split=test")) != observe(train(*base))

    return row


def tokens_elsewhere(train, small):
    folder = Path(small[0].removeprefix("dataset.path=") + "-tokens")
    run = train(*small, "dataset.pre_tokenize=true", f"dataset.pre_tokenize_output={folder}")
    return (folder / "train/manifest.json").is_file() and not (run.folder / "tokenized").exists()


def columns(train, small):
    path = small[0].removeprefix("dataset.path=") + "/two.jsonl"
    with open(path, "w") as file:
        for n in range(40):
            file.write(json.dumps({"a": f"the congress met {n}", "b": f"ships and money and trade {n} times"}) + "\n")
    words = [*small, f"dataset.path={path}", "trainer.per_device_train_batch_size=1"]
    return train(*words, "dataset.text_column=a").losses != train(*words, "dataset.text_column=b").losses


def cached(train, small):
    import pyarrow as pa
    import pyarrow.parquet

    folder = small[0].removeprefix("dataset.path=")
    lines = [f"the president spoke {n} times about peace and war and trade with the people" for n in range(60)]
    pa.parquet.write_table(pa.table({"text": lines}), f"{folder}/table.parquet")
    train(*small, f"dataset.path={folder}/table.parquet", f"dataset.cache_dir={folder}/cache")
    return bool(os.listdir(f"{folder}/cache"))


def source_words(small, *names):
    """A mixture of small texts, as an override."""
    folder = small[0].removeprefix("dataset.path=")
    for name in names:
        with open(f"{folder}/../{name}.txt", "w") as file:
            file.writelines(f"{name} and trade and ships for the {n}th time\n" for n in range(30))
    entries = ", ".join(f"{{path: '{folder}/../{name}.txt', weight: {n}}}" for n, name in enumerate(names, 1))
    return f"dataset.mixture=[{entries}]"


def mixes(train, small):
    one, two = (train(*small, source_words(small, *names)) for names in (["war"], ["war", "peace"]))
    return one.losses != two.losses and "2 parts of" in two.printed


def mixture_ends(train, small):
    """Sources are repeated, or read once: until the first is used up, or all are."""
    words = [
        *small,
        source_words(small, "war", "peace"),
        UNPACKED,
        "trainer.max_steps=40",
        "trainer.eval_max_batches=1",
    ]
    steps = [train(*words, f"dataset.mixture_exhausted={policy}").state.step for policy in ("repeat", "drop", "stop")]
    return steps[0] == 40 > steps[1] == 30 > steps[2] > 15


def refuses_bad_rows(train, small):
    path = small[0].removeprefix("dataset.path=") + "/train.txt"
    with open(path, "ab") as file:
        file.write(b"\nnot \xff valid\n")
    skipped = train(*small, "dataset.bad_rows=skip").printed
    return "1 not UTF-8" in skipped and refused("not UTF-8", "dataset.bad_rows=refuse")(train, small)


def hub_variants(train, small):
    """The configurations of a dataset in a local cache of the hub."""
    cache = hub_cache(Path(small[0].removeprefix("dataset.path=")) / "hub")
    words = [*small[1:], "dataset.path=", "dataset.name=me/tiny", f"dataset.cache_dir={cache}"]
    english, french = (train(*words, f"dataset.config={name}").losses for name in ("en", "fr"))
    return english != french


def workers_restart(train, small):
    """Without `persistent_workers`, other threads tokenise in every epoch."""
    seen = {}
    for value in ("true", "false"):
        words = ["dataset.num_workers=1", f"dataset.persistent_workers={value}", STREAM]
        loader = data_of(small, *words).train
        with tokenizing_threads() as started:
            batches = loader.batches()
            for _ in range(30):  # several epochs
                next(batches)
            loader.workers.close()
        seen[value] = len(started)

    return seen["true"] == 1 < seen["false"]


def num_threads(key, number, *words):
    """So many threads tokenise, and where one is enough, or none, the training process does it alone."""

    def row(train, small):
        with open(small[0].removeprefix("dataset.path=") + "/train.txt", "w") as file:
            file.writelines(f"the congress met for the {n}th time to speak about peace\n" * 9 for n in range(9000))
        found = []
        for one in (0 if key == "num_workers" else 1, number):
            with tokenizing_threads() as started:
                found.append((train(*small, f"dataset.{key}={one}", *words, FRESH).losses, len(started)))
        return found[0] == (found[1][0], 0) and found[1][1] == number

    return row


def blocks_in_flight(train, small):
    """A larger `prefetch_factor` reads further ahead."""
    folder = small[0].removeprefix("dataset.path=")
    with open(f"{folder}/train.txt", "w") as file:
        file.writelines(f"the congress met for the {n}th time to speak about peace\n" for n in range(4000))
    ahead = []
    for factor in (1, 8):
        words = ["dataset.num_workers=1", f"dataset.prefetch_factor={factor}", STREAM, "dataset.shuffle_buffer_size=0"]
        loader = data_of(small, *words).train
        batches = loader.batches()
        next(batches)
        ahead.append(loader.shards[0].sources[0].reader.position[0])
        loader.workers.close()
    return ahead[0] < ahead[1]


def padded_lengths(train, small):
    """`pad_to_multiple_of` rounds up the length of unpacked batches; on a CPU the model leaves padding out again."""
    lengths = []
    for words in (["datacollator.pad_to_multiple_of=48"], []):
        loader = data_of(small, UNPACKED, "tokenizer.padding=longest", *words).train
        lengths.append(next(loader).input_ids.shape[1])
        loader.close()
    return lengths[0] == 48 != lengths[1]


def bars(train, small):
    """On a terminal there is a progress bar instead of a line per logging interval; with `disable_tqdm`, the lines."""
    folder = small[0].removeprefix("dataset.path=")
    path = f"{folder}-config.yaml"
    with open(path, "w") as file:
        file.write("task: pretraining\n")
    printed_lines = []
    for value in ("false", "true"):
        words = [*TINY, *small, f"trainer.output_dir={folder}-out", f"trainer.disable_tqdm={value}"]
        process, terminal = pty.fork()
        if process == 0:
            os.execv(sys.executable, [sys.executable, "-m", "neobert", "run", path, *words])
        output = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(terminal, 65536):
                output += chunk
        os.waitpid(process, 0)
        printed_lines.append(b"step 6/6" in output)

    return printed_lines == [False, True]


def recomputes(train, small):
    """The model is told to recompute activations; that this changes nothing but memory is a law of test_model.py."""
    models = []
    for value in ("true", "false"):
        config = load_config([], [*TINY, f"trainer.gradient_checkpointing={value}"]).config
        models.append(build_model(config, 64, 0))
    return [model.model.gradient_checkpointing for model in models] == [True, False]


def recomputes_some(train, small):
    """Every second one of two blocks is half as many."""
    counts = []
    for interval in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            patch.setattr(
                modeling_neobert,
                "checkpoint",
                lambda *given, _calls=calls, **named: _calls.append(given[0]) or checkpoint(*given, **named),
            )
            train(*small, "trainer.gradient_checkpointing=true", f"trainer.gradient_checkpointing_interval={interval}")
            counts.append(len(calls))
    return counts[0] == 2 * counts[1] > 0


def best_accuracies(train, small):
    """The best accuracy is the largest, or with `greater_is_better: false` the smallest."""
    found = []
    for value, choose in (("true", max), ("false", min)):
        words = [*BEST, "trainer.metric_for_best_model=accuracy", f"trainer.greater_is_better={value}"]
        run = train(*small, *words)
        found.append(run.state.best_metric == choose(row["eval_accuracy"] for row in run.eval))
    return all(found)


def stage_counts(train, small):
    """The ZeRO stage in the file is checked against the optimizer, unless DeepSpeed is off."""
    path = small[0].removeprefix("dataset.path=") + "-zero.yaml"
    with open(path, "w") as file:
        file.write("deepspeed_config: {zero_stage: 2}\n")
    words = ["optimizer.name=muonclip", f"accelerate_config_file={path}"]
    load_config([], [*words, "use_deepspeed=false"])
    return refused("ZeRO stage 2", *words)(train, small)


def resumes(train, small):
    """The rows of the log up to the checkpoint are those of the first run, with its times; the others are new."""
    first = train(*small, "trainer.save_steps=3").train
    second = train(*small, "trainer.resume_from_checkpoint=3").train
    return [a == b for a, b in zip(first, second, strict=True)] == [True] * 3 + [False] * 3


def refuses_to_overwrite(train, small):
    train(*small)
    return refused("holds a run", "trainer.overwrite_output_dir=false")(train, small)


def tokenises_beforehand(train, small):
    found = [(train(*small, *words).folder / "tokenized/train/manifest.json").is_file() for words in ([], TOKENS)]
    return found == [False, True]


def tokenises_again(train, small):
    """The file of tokens stays, or is made anew."""
    runs = (train(*small, *TOKENS, *words) for words in ([], [], ["dataset.force_redownload=true"]))
    first, again, forced = ((run.folder / "tokenized/train/tokens-00000.bin").stat().st_mtime_ns for run in runs)
    return first == again < forced


def padded_to_the_longest(train, small):
    lengths = []
    for words in (["tokenizer.padding=longest"], []):
        loader = data_of(small, UNPACKED, *words).train
        lengths.append(next(loader).input_ids.shape[1])
        loader.close()
    return lengths[0] < lengths[1] == 64


def acts_as(key, value, *words):
    """The key that a word acts as has this value."""
    return lambda train, small: load_config([], [*small, *words]).config.value_of(key) == value


def evaluates_fewer_rows(train, small):
    one_batch = [*small, "trainer.eval_max_batches=1"]
    few, many = (
        train(*one_batch, f"trainer.per_device_eval_batch_size={n}").eval[0]["eval_num_targets"] for n in (1, 2)
    )
    return few < many


def evaluates_more(train, small):
    one_by_one = [*small, "trainer.per_device_eval_batch_size=1"]
    few, many = (train(*one_by_one, f"trainer.eval_max_batches={n}").eval[0]["eval_num_targets"] for n in (1, 9))
    return few < many


def wandb(name, value, word):
    """The value is found in what W&B recorded offline."""

    def row(train, small):
        os.environ["WANDB_SILENT"] = "true"
        folder = small[0].removeprefix("dataset.path=") + "-logs"
        base = ["wandb.enabled=true", "wandb.mode=offline", f"wandb.dir={folder}", "trainer.max_steps=3"]
        train(*small, *base, f"wandb.{name}={value}")
        records = [
            os.path.join(at, file) for at, _, files in os.walk(folder) for file in files if file.endswith(".wandb")
        ]
        return any(word in open(path, "rb").read() for path in records)

    return row


def wandb_silent(train, small):
    folder = small[0].removeprefix("dataset.path=") + "-logs"
    train(*small, "wandb.enabled=true", "wandb.mode=disabled", f"wandb.dir={folder}", "trainer.max_steps=3")
    return not any(file.endswith(".wandb") for _, _, files in os.walk(folder) for file in files)


def wandb_continues(train, small):
    folder = small[0].removeprefix("dataset.path=") + "-logs"
    base = [*small, "wandb.enabled=true", "wandb.mode=offline", f"wandb.dir={folder}", "trainer.save_steps=3"]
    runs = [train(*base), train(*base, "trainer.resume_from_checkpoint=3", "wandb.resume=allow")]
    return len({(run.folder / "wandb.json").read_text() for run in runs}) == 1


MUON = "optimizer.muon_config."
EVERY_STEP, LOW = f"{MUON}clipping_interval=1", f"{MUON}clipping_threshold=1e-3"
CLIP = [EVERY_STEP, LOW]


def muon(setting, *words):
    """The losses of a MuonClip run differ from those without the setting."""
    return losses(f"{MUON}{setting}", "optimizer.name=muonclip", *words)


def clipped_steps(run):
    return [row["step"] for row in run.train if row.get("qk_clipped_heads")]


def chunks(train, small):
    """The clip is told how many queries to take at a time; that this changes nothing but memory is a law of test_qk_clip.py."""
    sizes = []
    for words in ([f"{MUON}clipping_qk_chunk_size=7"], []):
        config = load_config([], [*TINY, "optimizer.name=muonclip", *words]).config
        clip, _ = build_clip(config, build_model(config, 64, 0))
        sizes.append(clip.settings.chunk_size)
    return sizes == [7, 1024]


def anomalies(train, small):
    """A gradient that is not finite is refused by the name of its parameter, before anything is written."""
    messages = []
    for value in ("true", "false"):
        config = load_config([], [*TINY, "optimizer.name=muonclip", f"{MUON}detect_anomalies={value}"]).config
        model = build_model(config, 64, 0)
        optimizer = build_run_optimizer(config, model, None)
        model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, torch.nan)
        try:
            messages.append(optimizer.step())
        except UserError as error:
            messages.append(str(error))
    return "lm_head.weight is not finite" in messages[0] and messages[1] is None


UNPACKED = "datacollator.pack_sequences=false"
STREAM = "dataset.streaming=true"
FRESH = "dataset.force_redownload=true"
TOKENS = ["dataset.pre_tokenize=true"]
BEST = [
    "trainer.eval_steps=1",
    "trainer.save_strategy=no",
    "optimizer.lr=0.3",
    "scheduler.warmup_steps=0",
    "trainer.max_steps=12",
]
LONG = "trainer.max_steps=12"


def refused_by_its_command(small):
    """A file that says another task than its command."""
    with pytest.raises(UserError, match="this command runs 'glue', the file says 'mteb'"):
        load_config([], [*small, "task=mteb"], "glue")
    return True


ROWS = {
    "task": lambda train, small: refused_by_its_command(small),
    "model.name": observed(in_model_config("name"), "mine", "model.name=mine"),
    "model.hidden_size": losses("model.hidden_size=64"),
    "model.num_hidden_layers": losses("model.num_hidden_layers=1"),
    "model.num_attention_heads": losses("model.num_attention_heads=4"),
    "model.intermediate_size": losses("model.intermediate_size=96"),
    "model.max_position_embeddings": refused(
        "longer than model.max_position_embeddings", "model.max_position_embeddings=32"
    ),
    "model.vocab_size": observed(
        lambda run: json.loads((run.folder / f"checkpoints/{run.steps[-1]}/config.json").read_text())["vocab_size"],
        9024,
        "model.vocab_size=9000",
    ),
    "model.hidden_act": losses("model.hidden_act=gelu"),
    "model.dropout_prob": losses("model.dropout_prob=0.2"),
    "model.norm_eps": losses("model.norm_eps=0.5"),
    "model.rms_norm": losses("model.rms_norm=false"),
    "model.attn_backend": called(
        runtime,
        "choose_attention",
        lambda requested, *_, **__: choose_attention(
            requested, "cuda", packages={"torch_varlen": "", "flash_attn": ""}
        )[0],
        "flash_attn",
        "model.attn_backend=flash_attn_varlen",
    ),
    "model.kernel_backend": called(
        encoder,
        "choose_kernels",
        lambda requested, *_: choose_kernels(requested, "cuda", "")[0],
        "torch",
        "model.kernel_backend=torch",
    ),
    "model.rope": losses("model.rope=false"),
    "model.ngpt": losses("model.ngpt=true"),
    "model.base_scale": losses("model.base_scale=0.5", "model.ngpt=true"),
    "model.pad_token_id": noted("replaced by the tokenizer's padding id", "model.pad_token_id=3"),
    "model.embedding_init_range": observed(
        spread("embed_tokens"), True, "model.embedding_init_range=0.4", "optimizer.lr=1e-6"
    ),
    "model.decoder_init_range": observed(spread("lm_head"), True, "model.decoder_init_range=0.4", "optimizer.lr=1e-6"),
    "tokenizer.name": refused(
        "tokenizer.name: 'absent/tokenizer' cannot be loaded", "tokenizer.name=absent/tokenizer", "tokenizer.path=null"
    ),
    "tokenizer.path": refused("tokenizer.path: no folder at 'absent'", "tokenizer.path=absent"),
    "tokenizer.max_length": losses("tokenizer.max_length=9"),
    "tokenizer.padding": padded_to_the_longest,
    "tokenizer.truncation": losses("tokenizer.truncation=false", UNPACKED, "tokenizer.max_length=9"),
    "tokenizer.vocab_size": observed(in_config("tokenizer", "vocab_size"), 8192, "tokenizer.vocab_size=500"),
    "dataset.name": noted("wins over dataset.name 'squad'", "dataset.name=squad"),
    "dataset.path": losses(f"dataset.path={TEXT}"),
    "dataset.streaming": losses(STREAM),
    "dataset.max_seq_length": losses("dataset.max_seq_length=32"),
    "dataset.text_column": columns,
    "dataset.train_split": two_files("train"),
    "dataset.eval_split": two_files("eval"),
    "dataset.validation_split": losses("dataset.validation_split=0.4"),
    "dataset.num_workers": num_threads("num_workers", 1),
    "dataset.pin_memory": pins,
    "dataset.persistent_workers": workers_restart,
    "dataset.prefetch_factor": blocks_in_flight,
    "dataset.num_proc": num_threads("num_proc", 2, *TOKENS),
    "dataset.shuffle_buffer_size": losses("dataset.shuffle_buffer_size=0", STREAM),
    "dataset.pre_tokenize": tokenises_beforehand,
    "dataset.pre_tokenize_output": tokens_elsewhere,
    "dataset.cache_dir": cached,
    "dataset.load_all_from_disk": reads_a_file_once,
    "dataset.force_redownload": tokenises_again,
    "dataset.config": hub_variants,
    "dataset.trust_remote_code": noted("no longer runs code of a dataset", "dataset.trust_remote_code=true"),
    "dataset.bad_rows": refuses_bad_rows,
    "dataset.mixture": mixes,
    "dataset.mixture_exhausted": mixture_ends,
    "dataset.num_shards": losses("dataset.num_shards=2"),
    "datacollator.mlm_probability_final": losses("datacollator.mlm_probability_final=0.6"),
    "dataset.long_documents": losses("dataset.long_documents=truncate", "tokenizer.max_length=9"),
    "datacollator.mlm_probability": losses("datacollator.mlm_probability=0.4"),
    "datacollator.mask_all": losses("datacollator.mask_all=true"),
    "datacollator.pack_sequences": losses(UNPACKED),
    "datacollator.max_length": losses("datacollator.max_length=32"),
    "datacollator.pad_to_multiple_of": padded_lengths,
    "trainer.per_device_train_batch_size": losses("trainer.per_device_train_batch_size=3"),
    "trainer.per_device_eval_batch_size": evaluates_fewer_rows,
    "trainer.gradient_accumulation_steps": losses("trainer.gradient_accumulation_steps=2"),
    "trainer.max_steps": observed(lambda run: run.state.step, 4, "trainer.max_steps=4"),
    "trainer.save_steps": observed(lambda run: run.steps, [4, 6], "trainer.save_steps=4"),
    "trainer.eval_steps": observed(eval_steps, [4, 6], "trainer.eval_steps=4"),
    "trainer.logging_steps": observed(lambda run: len(run.train), 2, "trainer.logging_steps=3"),
    "trainer.output_dir": lambda train, small: (
        train(*small, f"trainer.output_dir={small[0][13:]}/x").folder.name == "x"
    ),
    "trainer.mixed_precision": computes_in_bfloat16,
    "trainer.gradient_checkpointing": recomputes,
    "trainer.gradient_checkpointing_interval": recomputes_some,
    "trainer.gradient_clipping": losses("trainer.gradient_clipping=0.001"),
    "trainer.enforce_full_packed_batches": losses("trainer.enforce_full_packed_batches=false"),
    "trainer.eval_max_batches": evaluates_more,
    "trainer.log_train_accuracy": observed(
        lambda run: "accuracy" in run.train[0], True, "trainer.log_train_accuracy=true"
    ),
    "trainer.log_grad_norm": observed(lambda run: "grad_norm" in run.train[0], True, "trainer.log_grad_norm=true"),
    "trainer.log_weight_norms": observed(
        lambda run: "weight_norm" in run.train[0], True, "trainer.log_weight_norms=true"
    ),
    "trainer.torch_compile": called(
        torch, "compile", lambda *blocks, backend, **rest: backend, "eager", "trainer.torch_compile=true", COMPILE_EAGER
    ),
    "trainer.torch_compile_dynamic": called(
        torch,
        "compile",
        lambda *blocks, dynamic, **rest: dynamic,
        True,
        "trainer.torch_compile_dynamic=true",
        "trainer.torch_compile=true",
        COMPILE_EAGER,
    ),
    "trainer.torch_compile_backend": refused(
        "no backend 'nonsense'", "trainer.torch_compile_backend=nonsense", "trainer.torch_compile=true"
    ),
    "trainer.torch_compile_mode": refused(
        "is for torch_compile_backend: inductor",
        "trainer.torch_compile_mode=default",
        "trainer.torch_compile=true",
        COMPILE_EAGER,
    ),
    "trainer.fsdp_reshard_after_forward": called(
        processes,
        "build_runtime",
        lambda *, fsdp_reshard_after_forward, **rest: fsdp_reshard_after_forward,
        False,
        "trainer.fsdp_reshard_after_forward=false",
    ),
    "trainer.fsdp_hybrid": called(
        processes, "build_runtime", lambda *, fsdp_hybrid, **rest: fsdp_hybrid, True, "trainer.fsdp_hybrid=true"
    ),
    "trainer.ddp_bf16_gradients": called(
        processes,
        "build_runtime",
        lambda *, ddp_bf16_gradients, **rest: ddp_bf16_gradients,
        True,
        "trainer.ddp_bf16_gradients=true",
    ),
    "trainer.tf32": lambda train, small: (
        [runtime.Runtime(device=torch.device("cuda"), tf32=on).arithmetic for on in (True, False)]
        == ["float32 with TF32 products", "float32"]
    ),
    "trainer.masked_logits_only_loss": called(
        NeoBERTForMaskedLM,
        "forward",
        lambda *given, masked_only, **rest: masked_only,
        False,
        "trainer.masked_logits_only_loss=false",
    ),
    "trainer.resume_from_checkpoint": resumes,
    "trainer.overwrite_output_dir": refuses_to_overwrite,
    "trainer.num_train_epochs": observed(
        lambda run: run.state.epoch, 1, "trainer.num_train_epochs=2", "trainer.max_steps=-1"
    ),
    "trainer.eval_strategy": observed(lambda run: len(run.eval) > 1, True, "trainer.eval_strategy=epoch", LONG),
    "trainer.save_strategy": observed(
        lambda run: run.steps, [], "trainer.save_strategy=no", "trainer.save_steps=2", "trainer.save_model=false"
    ),
    "trainer.save_total_limit": observed(
        lambda run: run.steps, [6], "trainer.save_total_limit=1", "trainer.save_steps=2", "trainer.eval_steps=6"
    ),
    "trainer.max_ckpt": observed(
        lambda run: run.steps, [6], "trainer.max_ckpt=1", "trainer.save_steps=2", "trainer.eval_steps=6"
    ),
    "trainer.disable_tqdm": bars,
    "trainer.dataloader_num_workers": acts_as("dataset.num_workers", 3, "trainer.dataloader_num_workers=3"),
    "trainer.engine": called(
        runtime,
        "choose_engine",
        lambda requested, *_: choose_engine(requested, 2, False, {})[0],
        "fsdp2",
        "trainer.engine=fsdp2",
    ),
    "trainer.deepspeed_config_file": refused(
        "absent.json: No such file", "trainer.deepspeed_config_file=absent.json", "trainer.engine=deepspeed"
    ),
    "trainer.save_in_background": saves_before_the_next_step,
    "trainer.use_cpu": lambda train, small: (
        [choose_device(use_cpu, True) for use_cpu in (True, False)] == ["cpu", "cuda"]
    ),
    "trainer.report_to": refused("no tracker 'nowhere'", "trainer.report_to=[nowhere]"),
    "trainer.train_batch_size": acts_as("trainer.per_device_train_batch_size", 2, "trainer.train_batch_size=2"),
    "trainer.eval_batch_size": acts_as("trainer.per_device_eval_batch_size", 3, "trainer.eval_batch_size=3"),
    "trainer.early_stopping": observed(lambda run: run.state.step < 12, True, "trainer.early_stopping=2", *BEST),
    "trainer.metric_for_best_model": refused("no metric 'speed'", "trainer.metric_for_best_model=speed"),
    "trainer.greater_is_better": best_accuracies,
    "trainer.load_best_model_at_end": observed(
        lambda run: find_checkpoint(str(run.folder)).name == str(run.state.best_step) != str(run.state.step),
        True,
        "trainer.load_best_model_at_end=true",
        "trainer.save_strategy=best",
        *BEST[:1],
        *BEST[2:],
    ),
    "trainer.save_model": observed(lambda run: run.steps, [], "trainer.save_model=false"),
    "scheduler.name": losses("scheduler.name=linear"),
    "scheduler.warmup_steps": losses("scheduler.warmup_steps=4"),
    "scheduler.total_steps": losses("scheduler.total_steps=50"),
    "scheduler.decay_steps": losses("scheduler.decay_steps=4"),
    "scheduler.warmup_percent": losses("scheduler.warmup_percent=60"),
    "scheduler.decay_percent": losses("scheduler.decay_percent=60"),
    "scheduler.num_cycles": losses("scheduler.num_cycles=2.0"),
    "scheduler.final_lr_ratio": losses("scheduler.final_lr_ratio=0.9"),
    "scheduler.power": losses("scheduler.power=4", "scheduler.name=polynomial"),
    "scheduler.wsd_decay_percent": losses("scheduler.wsd_decay_percent=60", "scheduler.name=wsd"),
    "optimizer.name": losses("optimizer.name=adam"),
    "optimizer.lr": losses("optimizer.lr=0.01"),
    "optimizer.weight_decay": losses("optimizer.weight_decay=0.5"),
    "optimizer.betas": losses("optimizer.betas=[0.5, 0.9]"),
    "optimizer.eps": losses("optimizer.eps=0.1"),
    "optimizer.param_groups": losses("optimizer.param_groups=[{pattern: '*ffn*', lr_scale: 0.1}]"),
    "optimizer.muon_config": losses("optimizer.muon_config={muon_beta: 0.5}", "optimizer.name=muonclip"),
    "optimizer.muon_config.muon_beta": muon("muon_beta=0.5"),
    "optimizer.muon_config.nesterov": muon("nesterov=true"),
    "optimizer.muon_config.muon_decay": muon("muon_decay=0.5"),
    "optimizer.muon_config.ns_steps": muon("ns_steps=2"),
    "optimizer.muon_config.orthogonalization": muon("orthogonalization=newton_schulz"),
    "optimizer.muon_config.algorithm": muon("algorithm=newton_schulz"),
    "optimizer.muon_config.polar_express": muon("polar_express=false"),
    "optimizer.muon_config.enable_clipping": muon("enable_clipping=false", *CLIP),
    "optimizer.muon_config.clipping_threshold": muon("clipping_threshold=1e-2", EVERY_STEP),
    "optimizer.muon_config.clipping_alpha": muon("clipping_alpha=1.0", *CLIP),
    "optimizer.muon_config.clipping_warmup_steps": observed(
        clipped_steps, [4, 5, 6], f"{MUON}clipping_warmup_steps=3", "optimizer.name=muonclip", *CLIP
    ),
    "optimizer.muon_config.clipping_interval": observed(
        clipped_steps, [3, 6], f"{MUON}clipping_interval=3", "optimizer.name=muonclip", LOW
    ),
    "optimizer.muon_config.clipping_qk_chunk_size": chunks,
    "optimizer.muon_config.capture_last_microbatch_only": muon(
        "capture_last_microbatch_only=false",
        *CLIP,
        "trainer.gradient_accumulation_steps=3",
        "model.decoder_init_range=0.3",
    ),
    "optimizer.muon_config.detect_anomalies": anomalies,
    "optimizer.muon_config.clipping_layers_mapping": refused(
        "no attention block of the model has modules of these names",
        f"{MUON}clipping_layers_mapping={{q_proj: query, k_proj: key}}",
        "optimizer.name=muonclip",
    ),
    "wandb.enabled": wandb("project", "a-project", b"a-project"),
    "wandb.project": wandb("project", "a-project", b"a-project"),
    "wandb.entity": wandb("entity", "an-entity", b"an-entity"),
    "wandb.name": wandb("name", "a-name", b"a-name"),
    "wandb.tags": wandb("tags", "[a-tag]", b"a-tag"),
    "wandb.mode": wandb_silent,
    "wandb.dir": wandb("project", "a-project", b"a-project"),
    "wandb.resume": wandb_continues,
    "wandb.log_interval": noted("trainer.logging_steps says how often", "wandb.log_interval=7"),
    "seed": losses("seed=1"),
    "use_deepspeed": stage_counts,
    "accelerate_config_file": stage_counts,
    "debug": observed(
        lambda run: [row["step"] for row in run.train], [1, 2, 3, 4, 5, 6], "debug=true", "trainer.logging_steps=3"
    ),
    "pretraining_metadata": observed(in_state("metadata"), {"corpus": "mine"}, "pretraining_metadata={corpus: mine}"),
    "config_path": lambda train, small: (
        yaml.safe_load((train(*small, "config_path=here").folder / "config.yaml").read_text())["config_path"] == "here"
    ),
}


ROWS |= MTEB_ROWS | GLUE_ROWS | CONTRASTIVE_ROWS


def test_every_key_has_a_row():
    assert sorted(ROWS) == sorted(known_keys())


@pytest.mark.parametrize("key", ROWS)
def test_key_does_something(key, train, small):
    assert ROWS[key](train, small)
