"""GLUE: every task from the hub's layout, scores as published libraries compute them, one model under three loaders."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.glue import RANDOM, foreign_model, load_glue, pretrain_tiny, run_glue, write_hub_cache, write_local
from helpers.runs import SHARED
from neobert.config.explain import starter_file
from neobert.config.load import load_config
from neobert.data.batch import RowLayout
from neobert.data.labelled import TASKS, EpochLoader, Rows, Source, read_split
from neobert.errors import UserError
from neobert.ranks import Ranks
from neobert.tasks.glue import data as glue_data
from neobert.tasks.glue import suite as glue_suite
from neobert.tasks.glue import task as glue
from neobert.tasks.glue.model import load_finetuned
from neobert.training.metrics import read_metrics

TRAINED = [task for task in TASKS.values() if task.trains]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain_tiny(tmp_path_factory.mktemp("pretrained") / "run")


@pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
def test_every_task_trains_evaluates_and_predicts(task, hub, tmp_path):
    words = [f"glue.task_name={task.name}", f"dataset.cache_dir={hub}", f"trainer.output_dir={tmp_path}", *RANDOM]
    finished, result = run_glue(*words)
    assert finished.state.step == 3
    assert math.isfinite(result["metrics"]["loss"])
    assert set(task.metrics) <= set(result["metrics"])
    written = glue_suite.predict_run(load_glue(*words).config)
    wanted = [*task.tests, *(TASKS["ax"].tests if task.name == "mnli" else [])]
    assert [path.name for path in written] == [name for _, name in wanted]
    for path in written:
        header, *lines = path.read_text().splitlines()
        assert header == "index\tprediction"
        assert [line.split("\t")[0] for line in lines] == ["0", "1", "2", "3", "4", "5"]
        allowed = task.labels if task.writes_names else [str(number) for number in range(task.num_labels)]
        assert all(line.split("\t")[1] in allowed for line in lines) or not task.labels


@pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
def test_metrics_equal_scikit_learn_and_scipy(task):
    """On random predictions, 50 times; scores as GLUE defines them."""
    from scipy import stats
    from sklearn import metrics

    random = np.random.default_rng(0)
    for _ in range(50):
        logits = random.normal(size=(40, task.num_labels)).astype(np.float32)
        if not task.labels:
            labels = random.uniform(0, 5, 40)
            wanted = {
                "pearson": stats.pearsonr(labels, logits[:, 0])[0],
                "spearman": stats.spearmanr(labels, logits[:, 0])[0],
            }
        else:
            labels, chosen = random.integers(0, task.num_labels, 40).astype(float), logits.argmax(1)
            wanted = {"accuracy": metrics.accuracy_score(labels, chosen)}
            if task.name == "cola":
                wanted["matthews"] = metrics.matthews_corrcoef(labels, chosen)
            if task.name in ("mrpc", "qqp"):
                wanted["f1"] = metrics.f1_score(labels, chosen)
        values = glue_data.measure(task, logits, labels)
        assert values == wanted
        both = values | {f"{name}_mm": 0.5 for name in values}
        of = {
            "cola": ["matthews"],
            "stsb": ["pearson", "spearman"],
            "mrpc": ["f1", "accuracy"],
            "qqp": ["f1", "accuracy"],
        }
        expected = [values[name] for name in of.get(task.name, ["accuracy"])] + ([0.5] if task.name == "mnli" else [])
        assert glue_data.score(task, both) == pytest.approx(np.mean(expected))


def test_metrics_equal_their_formulas():
    """What scikit-learn is asked for is what GLUE means: F1 of the class 1, Matthews from the four counts."""
    random = np.random.default_rng(1)
    labels, logits = random.integers(0, 2, 200), random.normal(size=(200, 2))
    chosen = logits.argmax(1)
    tp, tn = ((labels == 1) & (chosen == 1)).sum(), ((labels == 0) & (chosen == 0)).sum()
    fp, fn = ((labels == 0) & (chosen == 1)).sum(), ((labels == 1) & (chosen == 0)).sum()
    values = glue_data.measure(TASKS["mrpc"], logits, labels) | glue_data.measure(TASKS["cola"], logits, labels)
    assert values["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert values["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


def test_a_constant_prediction_has_no_correlation():
    assert glue_data.measure(TASKS["stsb"], np.ones((9, 1)), np.arange(9.0)) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "stsb"])
def test_the_real_data_is_read(name):
    if not (SHARED / "data/glue").is_dir():
        pytest.skip(f"the GLUE data is not at {SHARED / 'data/glue'}")
    task, source = TASKS[name], Source(str(SHARED / "data/glue"))
    sizes = [len(read_split(source, task, split).texts[0]) for split in ("train", "validation")]
    assert sizes == {"cola": [8551, 1043], "mrpc": [3668, 408], "rte": [2490, 277], "stsb": [5749, 1500]}[name]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(kind, tmp_path, local):
    task = TASKS["rte"]
    wanted = read_split(Source(str(local)), task, "train")
    (tmp_path / "rte").mkdir()
    if kind == "parquet":
        write_local(tmp_path / "p", ["rte"], "parquet")
        root = tmp_path / "p"
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [mark.join(["sentence1", "sentence2", "label"])]
        rows = zip(*wanted.texts, wanted.labels, strict=True)
        lines += [mark.join([a, b, task.labels[int(label)]]) for a, b, label in rows]  # names of labels
        (tmp_path / f"rte/train.{kind}").write_text("\n".join(lines) + "\n")
        root = tmp_path
    found = read_split(Source(str(root)), task, "train")
    assert found.texts == wanted.texts
    assert (found.labels == wanted.labels).all()


# --- batches -----------


def made(number=53):
    random = np.random.default_rng(0)
    ids = [random.integers(5, 99, length) for length in random.integers(3, 30, number)]
    return Rows(ids, None, random.integers(0, 2, number))


def loader_of(rows, **changes):
    settings = {"ranks": Ranks(0, 1), "batch_size": 8, "seed": 3, "group_by_length": False, "num_workers": 0} | changes
    return EpochLoader(rows, RowLayout(0), fingerprint={}, **settings)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_every_row_once(grouped):
    loader = loader_of(made(), group_by_length=grouped)
    orders = [loader.order(epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(np.concatenate(order)) == list(range(53))
        assert [len(batch) for batch in order] == [8] * 6 + [5]
    assert not np.array_equal(np.concatenate(orders[0]), np.concatenate(orders[1]))


def test_grouping_leaves_less_padding():
    def padding(grouped):
        loader = loader_of(made(400), group_by_length=grouped)
        return sum(next(loader).input_ids.numel() for _ in range(loader.batches_per_epoch))

    assert padding(True) < 0.8 * padding(False)


def test_threads_and_positions_change_nothing():
    reference = loader_of(made())
    batches = [next(reference) for _ in range(20)]
    ahead = loader_of(made(), num_workers=3)
    for _ in range(9):
        next(ahead)
    resumed = loader_of(made(), num_workers=2)
    resumed.load_state_dict(json.loads(json.dumps(ahead.state_dict()[0])), {})
    for wanted in batches[9:]:
        found = next(resumed)
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert (found.epoch, found.ends_epoch) == (wanted.epoch, wanted.ends_epoch)
    ahead.close(), resumed.close()
    with pytest.raises(UserError, match="batch_size was 8, now 4"):
        loader_of(made(), batch_size=4).load_state_dict(*reference.state_dict())


def test_two_processes_have_the_batches_of_one():
    one = loader_of(made(49))  # the last batch has one row, and the second process none of it
    two = [loader_of(made(49), ranks=Ranks(rank, 2), batch_size=4) for rank in range(2)]
    for _ in range(2 * one.batches_per_epoch):
        whole, parts = next(one), [next(loader) for loader in two]
        assert whole.num_targets == sum(part.num_targets for part in parts)
        assert whole.num_tokens == sum(part.num_tokens for part in parts)
        rows = [row[row != 0].tolist() for row in whole.input_ids]
        for rank, part in enumerate(parts):
            assert [row[row != 0].tolist() for row in part.input_ids][: part.num_targets] == rows[rank::2]
    assert parts[1].num_targets == 0
    assert (parts[1].labels == -100).all()
    two[0].load_state_dict(*one.state_dict())


def test_accumulation_ends_with_the_epoch():
    fetch = loader_of(made()).next_step
    assert [len(fetch(4)) for _ in range(4)] == [4, 3, 4, 3]


def test_padded_longest_and_packed_give_one_answer(pretrained, local, tmp_path):
    words = [f"dataset.path={local}", "glue.task_name=rte", f"glue.pretrained_checkpoint_dir={pretrained}"]
    losses = []
    for number, extra in enumerate([[], ["tokenizer.padding=longest"], ["datacollator.pack_sequences=true"]]):
        finished, _ = run_glue(
            *words, f"trainer.output_dir={tmp_path / str(number)}", "glue.classifier_dropout=0", *extra
        )
        rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)


# --- models -----------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformers_loads_the_result(pooling, pretrained, local, tmp_path):
    from transformers import AutoModelForSequenceClassification

    words = [f"dataset.path={local}", "glue.task_name=mnli", f"glue.pretrained_checkpoint_dir={pretrained}"]
    finished, _ = run_glue(*words, f"glue.pooling={pooling}", f"trainer.output_dir={tmp_path}")
    folder = finished.folder / "checkpoints/3"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours, tokenizer, task = load_finetuned(folder)
    inputs = tokenizer(["the congress met"] * 2, ["to speak", "of peace and war"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, ours(**inputs).logits, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(task.labels))


def test_the_encoder_is_that_of_the_checkpoint(pretrained, local, tmp_path):
    words = [f"dataset.path={local}", "glue.task_name=stsb", f"glue.pretrained_model_path={pretrained / 'config.yaml'}"]
    finished, result = run_glue(
        *words, f"trainer.output_dir={tmp_path}", "optimizer.lr=1e-12", "optimizer.weight_decay=0"
    )
    before = load_file(pretrained / "checkpoints/2/model.safetensors")
    after = load_file(finished.folder / "checkpoints/3/model.safetensors")
    shared = [name for name in after if name.startswith("model.")]
    assert len(shared) == len(before) - 1  # all but the decoder
    assert all(torch.allclose(after[name], before[name], atol=1e-7) for name in shared)
    assert "not used: lm_head" in result["weights"]
    assert result["protocol"]["weights"].endswith("pretraining step 2")


def test_an_encoder_of_transformers_runs_under_the_same_protocol(local, tmp_path):
    model = foreign_model(tmp_path / "bert")
    words = [f"dataset.path={local}", "model.from_hub=true", f"model.name={model}"]
    mnli, _ = run_glue(*words, "glue.task_name=mnli", f"trainer.output_dir={tmp_path / 'mnli'}")
    assert glue_suite.predict_run(load_config([str(mnli.folder / "config.yaml")]).config)[-1].name == "AX.tsv"
    transfer = ["glue.transfer_from_task=true", f"glue.pretrained_checkpoint_dir={mnli.folder}", "optimizer.lr=1e-12"]
    transfer += ["trainer.mixed_precision=fp16"]
    rte, result = run_glue(*words, *transfer, "glue.task_name=rte", f"trainer.output_dir={tmp_path / 'rte'}")
    donor, own = (load_file(run.folder / "checkpoints/3/model.safetensors") for run in (mnli, rte))
    shared = [name for name in own if not name.startswith("classifier.")]
    assert len(shared) == len(own) - 2
    assert all(torch.allclose(own[name], donor[name], atol=1e-7) for name in shared)
    assert result["transferred_from"] == "mnli"
    assert result["protocol"]["dropout"] == {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    assert result["protocol"]["precision"] == "no"  # what ran
    from transformers import AutoModel

    _, found = AutoModel.from_pretrained(rte.folder / "checkpoints/3", output_loading_info=True)
    assert not [name for name in found["missing_keys"] if "pooler" not in name]


# --- bad input -----------


def damage(name, change):
    """Made data of rte with one row changed."""

    def make(root):
        folder = write_local(root, ["rte"]) / "rte"
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        rows = change(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make


def label(value):
    return lambda rows: [*rows[:3], {**rows[3], "label": value}, *rows[4:]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damage("train", label(2)), "train.jsonl:4: label 2 is out of range; rte has labels 0 to 1 (entailment,"),
        (damage("train", label("no")), "train.jsonl:4: label 'no'; rte has labels 0 to 1"),
        (damage("validation", label(-1)), "validation.jsonl:4: label -1 is out of range"),
        (damage("train", lambda rows: []), "the split train of rte is empty"),
        (damage("train", lambda rows: [{"a": 1}]), "jsonl:1: no column 'sentence1'; it has: a"),
        (damage("train", lambda rows: [{**rows[0], "sentence2": None}]), "jsonl:1: sentence2 is None, not a text"),
        (lambda root: (write_local(root, ["rte"]) / "rte/train.jsonl").write_text("{"), "train.jsonl:1: not JSON"),
        (
            lambda root: (write_local(root, ["rte"]) / "rte/train.jsonl").unlink(),
            "no file train (.jsonl, ",
        ),
        (lambda root: write_local(root, ["cola"]), "no folder 'rte' with the task's files; it has cola"),
    ],
)
def test_bad_data_is_one_line(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError) as error:
        run_glue(f"dataset.path={tmp_path / 'data'}", "glue.task_name=rte", *RANDOM)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bad_starts_are_one_line(pretrained, local, tmp_path):
    start = f"glue.pretrained_checkpoint_dir={pretrained}"
    words = [f"dataset.path={local}", "glue.task_name=rte", f"trainer.output_dir={tmp_path / 'out'}"]
    finished, _ = run_glue(*words, start)
    model = foreign_model(tmp_path / "bert")
    cases = {
        "no weights to start from": [],
        "must be one of cola, sst2": [start, "glue.task_name=colla"],
        "glue.num_labels: 3, but rte has 2": [start, "glue.num_labels=3"],
        "model.num_hidden_layers: 3, but": [start, "model.num_hidden_layers=3"],
        "no checkpoint '7'; there are: 2": [start, "glue.pretrained_checkpoint=7"],
        "is another tokenizer than that of": [start, f"tokenizer.path={other_tokenizer(tmp_path / 'other')}"],
        "is not a checkpoint of a GLUE task": [start, "glue.transfer_from_task=true"],
        "is a checkpoint of the GLUE task rte": [f"glue.pretrained_checkpoint_dir={finished.folder}"],
        "needs a checkpoint of another task": ["glue.transfer_from_task=true"],
        "set glue.pretrained_checkpoint_dir": ["glue.pretrained_checkpoint=latest"],
        "not one of our checkpoints; to start from an encoder of transformers": [f"glue.pretrained_model_path={model}"],
        "longer than the model's max_position_embeddings": [start, "glue.max_seq_length=4096"],
        "raise that, or set tokenizer.truncation": [start, "tokenizer.truncation=false", "glue.max_seq_length=8"],
        "model.name: not set": ["model.from_hub=true"],
        "'absent/model' cannot be loaded": ["model.from_hub=true", "model.name=absent/model"],
        "ax is predicted by a model of mnli": [start, "glue.task_name=ax"],
        "rte has no metric 'f1'": [start, "trainer.metric_for_best_model=f1"],
        "this machine is offline": [start, "dataset.path=", f"dataset.cache_dir={tmp_path / 'empty'}"],
    }
    for message, extra in cases.items():
        with pytest.raises(UserError) as error:
            run_glue(*words, *extra)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def other_tokenizer(folder):
    from neobert.data.tokenizer import train_tokenizer

    train_tokenizer(["other words altogether"] * 9, folder, 70, True, 64)
    return folder


def test_weights_that_do_not_load_are_listed(local, tmp_path):
    from safetensors.torch import save_file

    model = foreign_model(tmp_path / "bert")
    weights = load_file(model / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    save_file({name: t for name, t in weights.items() if name != lost}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors were not loaded: {lost}"):
        run_glue(
            f"dataset.path={local}",
            "model.from_hub=true",
            f"model.name={model}",
            f"trainer.output_dir={tmp_path / 'o'}",
        )


def test_the_starter_trains_as_it_is(pretrained, local, tmp_path):
    """For as many epochs as it says, and the rate gets to its peak."""
    (tmp_path / "new.yaml").write_text(starter_file("glue"))
    words = [
        f"glue.pretrained_checkpoint_dir={pretrained}",
        f"dataset.path={local}",
        f"trainer.output_dir={tmp_path / 'o'}",
    ]
    sizes = ["trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "glue.max_seq_length=64"]
    loaded = load_config([str(tmp_path / "new.yaml")], [*words, *sizes], "glue")
    finished = glue.run(loaded)
    rows = read_metrics(finished.folder / "metrics.jsonl")
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert len([row for row in rows if row["kind"] == "eval"]) == 3  # epochs
    assert max(rates) == pytest.approx(loaded.config.optimizer.lr)
    assert rates[-1] < max(rates)


def test_the_saved_configuration_repeats_the_run(pretrained, local, tmp_path):
    words = [f"dataset.path={local}", "glue.task_name=mnli", f"glue.pretrained_checkpoint_dir={pretrained}"]
    finished, result = run_glue(*words, f"trainer.output_dir={tmp_path / 'a'}")
    again = load_config([str(finished.folder / "config.yaml")], [f"trainer.output_dir={tmp_path / 'b'}"])
    assert glue.read_result(glue.run(again).folder) == result
    assert again.warnings == []
    assert load_config([str(finished.folder / "config.yaml")], ["glue.task_name=rte"]).config.glue.task_name == "rte"
