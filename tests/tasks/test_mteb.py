"""MTEB: the library's own code on tasks of our own, offline; stopped and started again."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch

from helpers.checkpoints import tiny_model, write_checkpoint
from helpers.commands import start_neobert
from helpers.glue import foreign_model

pytest.importorskip("mteb")

import mteb
from mteb.benchmarks.benchmark import BenchmarkAggregation
from mteb.cache import ResultCache
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from neobert.checkpoints.load import load_source
from neobert.config.explain import starter_file
from neobert.config.load import load_config
from neobert.errors import CheckpointError, ConfigError, DataError
from neobert.export.write import write_transformers
from neobert.inference.embed import load_embedder
from neobert.inference.sentence_transformers import Embedding, read_sentence_settings, write_sentence_transformers
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.tasks.mteb import task as mteb_task
from neobert.tasks.mteb.library import KINDS, build_task, choose_tasks, find_local_tasks, weights_identity
from neobert.tasks.mteb.task import averages, score_of
from neobert.training.runtime import Runtime

WORDS = ("peace", "war", "trade", "law", "land", "money", "ships", "rivers")


def text(number):
    return f"report {number} speaks of {WORDS[number % 8]} and of {WORDS[number * 3 % 8]}"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of every type."""
    root = tmp_path_factory.mktemp("tasks")
    for split, begin in (("train", 0), ("test", 40)):
        rows = [{"text": text(begin + n), "label": WORDS[n % 3]} for n in range(30)]
        write_rows(root / f"a-classification/{split}.jsonl", rows)
    write_rows(root / "b-clustering/test.jsonl", [{"text": text(n), "label": n % 8} for n in range(40)])
    pairs = [{"sentence1": text(n), "sentence2": text(2 * n)} for n in range(20)]
    write_rows(root / "c-pairs/test.jsonl", [{**pair, "label": n % 2} for n, pair in enumerate(pairs)])
    ranked = [{"query": WORDS[n], "positive": [text(n)], "negative": [text(n + 1), text(n + 2)]} for n in range(8)]
    write_rows(root / "d-reranking/test.jsonl", ranked)
    write_rows(
        root / "e-retrieval/corpus.jsonl", [{"id": n, "title": WORDS[n % 8], "text": text(n)} for n in range(30)]
    )
    write_rows(root / "e-retrieval/queries.jsonl", [{"id": f"q{n}", "text": text(n)} for n in range(8)])
    write_rows(root / "e-retrieval/qrels.jsonl", [{"query_id": f"q{n}", "document_id": n} for n in range(7)])
    write_rows(root / "f-sts/test.jsonl", [{**pair, "score": n / 3} for n, pair in enumerate(pairs)])
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model as a folder that both we and sentence-transformers load."""
    root = tmp_path_factory.mktemp("model")
    source = load_source(str(write_checkpoint(root / "run", tiny_model())))
    (root / "out").mkdir()
    write_transformers(source, root / "out")
    write_sentence_transformers(root / "out", 32, Embedding("cls", prompts={"query": "query: "}))
    return root / "out"


def evaluate(exported, output, *words, model=True):
    """(exit code, the summary) of a run in this process."""
    loaded = load_config([], [*map(str, words), f"trainer.output_dir={output}"], "mteb")
    code = mteb_task.run(loaded, str(exported) if model else None)
    [path] = (output / "mteb").glob("*.json")
    return code, json.loads(path.read_text())


def test_the_same_scores_as_sentence_transformers(tasks, exported, tmp_path, capsys):
    """All six types, with a prompt; the library reads our results; a second run computes nothing again."""
    words = [f"mteb_local_tasks={tasks}", "mteb_prompts={document: 'text: '}"]
    code, summary = evaluate(exported, tmp_path, *words)
    assert (code, [one["name"] for one in sorted(summary["tasks"], key=lambda one: one["name"])]) == (
        0, ["a-classification", "b-clustering", "c-pairs", "d-reranking", "e-retrieval", "f-sts"],
    )  # fmt: skip
    assert (summary["settings"]["pooling"], summary["settings"]["max_length"]) == ("cls", 512)
    prompts = {one["name"]: one["prompts"] for one in summary["tasks"]}
    assert (prompts["e-retrieval"], prompts["f-sts"]) == ({"query": "query: ", "document": "text: "}, {})
    peer = SentenceTransformer(str(exported), device="cpu", prompts={"query": "query: ", "document": "text: "})
    scores = {one["name"]: one["score"] for one in summary["tasks"]}
    for task in find_local_tasks(str(tasks)):
        quiet = {"co2_tracker": False, "show_progress_bar": False}
        theirs = mteb.evaluate(peer, task, cache=None, encode_kwargs={"batch_size": 4}, **quiet).task_results[0]
        assert theirs.get_score() == pytest.approx(scores[task.metadata.name], abs=1e-4), task.metadata.name
    results = ResultCache(tmp_path / "mteb").get_cache_paths()
    assert sorted(path.stem for path in results) == sorted(scores)
    assert TaskResult.from_disk(results[0]).get_score() == pytest.approx(scores[results[0].stem], abs=1e-5)
    capsys.readouterr()
    assert evaluate(exported, tmp_path, *words)[1]["tasks"] == summary["tasks"]
    printed = capsys.readouterr().out
    assert printed.count("(had a result)") == 6
    assert "mean over tasks" in printed
    evaluate(exported, tmp_path, *words, "mteb_overwrite_results=true", "mteb_task_type=sts")
    assert "(had a result)" not in capsys.readouterr().out


def test_folders_of_sentence_transformers_score_as_there(tasks, tmp_path):
    """CLS, a Dense module, a default prompt, dot products and a length of its own; weights of the Dense module count too."""
    torch.manual_seed(0)
    foreign_model(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"))
    transformer.max_seq_length = 8
    prompts = {"query": "query: ", "story": "a story of "}
    modules = [transformer, Pooling(32, "cls"), Dense(32, 16)]
    peer = SentenceTransformer(
        modules=modules, device="cpu", prompts=prompts, default_prompt_name="story", similarity_fn_name="dot"
    )
    peer.save(str(tmp_path / "model"))
    words = [f"mteb_local_tasks={tasks}", "mteb_task_type=e-retrieval, f-sts, b-clustering"]
    code, summary = evaluate(tmp_path / "model", tmp_path / "out", *words)
    settings = summary["settings"]
    found = [settings[name] for name in ("pooling", "normalize", "max_length", "similarity", "default_prompt")]
    assert (code, found) == (0, ["cls", False, 8, "dot", "a story of "])
    scores = {one["name"]: one["score"] for one in summary["tasks"]}
    for task in find_local_tasks(str(tasks)):
        if task.metadata.name in scores:
            quiet = {"co2_tracker": False, "show_progress_bar": False}
            theirs = mteb.evaluate(peer, task, cache=None, encode_kwargs={"batch_size": 4}, **quiet).task_results[0]
            assert theirs.get_score() == pytest.approx(scores[task.metadata.name], abs=1e-5), task.metadata.name
    before = weights_identity(tmp_path / "model")
    with open(tmp_path / "model/2_Dense/model.safetensors", "ab") as file:
        file.write(b" ")
    assert weights_identity(tmp_path / "model") != before


def test_computed_where_and_as_the_configuration_says(exported, tmp_path):
    """Precision and device are those of a run's runtime; results in bfloat16 are kept apart from those in float32."""

    def subject(*words):
        loaded = load_config([], [*words, f"trainer.output_dir={tmp_path}"], "mteb")
        return mteb_task.load_subject(loaded.config, str(exported))

    asked, plain = (
        subject("trainer.mixed_precision=bf16"),
        subject("trainer.mixed_precision=no", "trainer.use_cpu=true"),
    )
    has_amx = torch.cpu._is_amx_tile_supported()
    if not torch.cuda.is_available():
        assert (asked.embedder.runtime.dtype is torch.bfloat16, bool(asked.embedder.runtime.note)) == (
            has_amx,
            not has_amx,
        )
        assert ("arithmetic" in asked.settings) == has_amx
    assert plain.embedder.runtime.device.type == "cpu"
    assert "arithmetic" not in plain.settings
    half = load_embedder(str(exported), runtime=Runtime(device=torch.device("cpu"), dtype=torch.bfloat16))
    texts = [text(n) for n in range(5)]
    difference = np.abs(half.encode(texts) - plain.embedder.encode(texts)).max()
    assert 0 < difference < 0.05


def test_what_scores_depend_on(tasks, exported, tmp_path, capsys):
    """Pooling, length and prompts give results of their own; so do other weights; changed data is evaluated again."""
    one = tmp_path / "one"
    shutil.copytree(tasks / "f-sts", one / "f-sts")
    words = [f"mteb_local_tasks={one}"]
    revisions = [
        evaluate(exported, tmp_path, *words, *more)[1]["revision"]
        for more in (
            [],
            ["mteb_pooling=mean"],
            ["tokenizer.max_length=16"],
            ["mteb_prompts={STS: 'a '}"],
            ["mteb_batch_size=1"],
        )
    ]
    assert len(set(revisions)) == 4
    assert revisions[0] == revisions[4]
    own = tmp_path / "own"
    write_rows(
        own / "mine/test.jsonl", [{"sentence1": text(n), "sentence2": text(n + 1), "score": n} for n in range(5)]
    )
    evaluate(exported, tmp_path / "b", f"mteb_local_tasks={own}")
    with open(own / "mine/test.jsonl", "a") as file:
        file.write(json.dumps({"sentence1": "a", "sentence2": "b", "score": 1}) + "\n")
    capsys.readouterr()
    evaluate(exported, tmp_path / "b", f"mteb_local_tasks={own}")
    assert "is of other data; its task runs again" in capsys.readouterr().err
    [result] = (tmp_path / "b/mteb/results").glob("*/*/mine.json")
    result.write_text("{")
    evaluate(exported, tmp_path / "b", f"mteb_local_tasks={own}")
    printed = capsys.readouterr()
    assert "was cut off; its task runs again" in printed.err
    assert "(had a result)" not in printed.out


def test_a_task_that_needs_the_network(tasks, exported, tmp_path, capsys):
    """It is named, the others go on; averages say of how many tasks they are."""
    code, summary = evaluate(exported, tmp_path, f"mteb_local_tasks={tasks}", "mteb_task_type=STS12, f-sts")
    assert (code, [one["name"] for one in summary["tasks"]]) == (2, ["f-sts"])
    assert [one["name"] for one in summary["not_run"]] == ["STS12"]
    printed = capsys.readouterr().out
    assert "STS12: not run: its data is not on this machine, and the hub was not reached" in printed
    assert "mean over tasks (1 of 2 tasks)" in printed


def test_killed_and_started_again(tasks, tmp_path, capsys):
    """SIGKILL between tasks: the next run takes up what is there, and runs no task twice."""
    run = write_checkpoint(tmp_path / "run", tiny_model())
    (tmp_path / "config.yaml").write_text(
        f"task: mteb\nmteb_local_tasks: {tasks}\ntrainer: {{output_dir: {run}}}\npretrained_checkpoint: '7'\n"
    )
    process = start_neobert("mteb", tmp_path / "config.yaml", unbuffered=True)
    done = []
    for line in process.stdout:
        if line.startswith("["):
            done.append(line.split()[1])
        if len(done) == 2:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    written = {path.stem for path in (run / "mteb/results").glob("*/*/*.json")} - {"model_meta"}
    assert set(name.rstrip(":") for name in done) <= written
    capsys.readouterr()
    assert mteb_task.run(load_config([str(tmp_path / "config.yaml")])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert {line.split()[1].rstrip(":") for line in lines if "had a result" in line} == written
    assert len(lines) == 6
    assert len(json.loads((run / "mteb/local__run-7.json").read_text())["tasks"]) == 6


def test_averages_are_the_leaderboards():
    names = ["STS12", "STS13", "ArguAna", "Banking77Classification", "SummEval"]
    tasks = [mteb.get_task(name) for name in names]
    results = []
    for number, task in enumerate(tasks):
        scores = {
            "test": {"default": {"main_score": (number + 1) / 7, "hf_subset": "default", "languages": ["eng-Latn"]}}
        }
        results.append(TaskResult.from_task_results(task, scores, evaluation_time=0.0, kg_co2_emissions=None))
    ours = averages([score_of(task, result, {}) for task, result in zip(tasks, results, strict=True)])
    for name, kind in (
        ("mean_task", BenchmarkAggregation.MEAN_TASK),
        ("mean_task_type", BenchmarkAggregation.MEAN_TASK_TYPE),
    ):
        [theirs] = kind.aggregate(results).values()
        assert ours[name] == pytest.approx(theirs), name


def test_choices(tasks):
    def names(*words):
        return [task.metadata.name for task in choose_tasks(*words)]

    assert len(names("all", None)) == 56
    assert set(names("sts", None)) >= {"STS12", "STSBenchmark"}
    assert len(names("MTEB(eng, v2)", None)) == 41
    assert names("STS12,ArguAna", None) == ["STS12", "ArguAna"]
    assert names("pair_classification", str(tasks)) == ["c-pairs"]
    with pytest.raises(ConfigError, match="'retreival'; did you mean retrieval\\? There are: all, classification, "):
        names("retreival", str(tasks))
    with pytest.raises(ConfigError, match="benchmark 'zzz'\\. There are: all"):
        names("zzz", None)


def test_the_starter_leaves_pooling_to_the_model(tmp_path):
    write_checkpoint(tmp_path / "run", tiny_model(NeoBERTForEmbedding), embedding={"pooling": "cls", "max_length": 64})
    (tmp_path / "new.yaml").write_text(starter_file("mteb"))
    config = load_config([str(tmp_path / "new.yaml")], [f"trainer.output_dir={tmp_path / 'run'}"]).config
    assert mteb_task.load_subject(config, None).settings["pooling"] == "cls"


def test_bad_input_is_one_line(tasks, exported, tmp_path):
    words = [f"mteb_local_tasks={tasks}"]
    for more, text in (
        (["mteb_prompts={STSS: x}"], "mteb_prompts.STSS: names no task that runs; did you mean STS"),
        (["mteb_local_tasks=absent"], "mteb_local_tasks: no folder at 'absent'"),
        ([f"mteb_local_tasks={tmp_path}"], "no task in"),
        (["mteb_task_type=summarization"], "summarization: no such task in"),
    ):
        with pytest.raises((ConfigError, DataError), match=text.replace("(", "\\(")):
            evaluate(exported, tmp_path, *words, *more)
    with pytest.raises(CheckpointError, match="train one, or name a model with --model"):
        evaluate(exported, tmp_path, *words, model=False)
    with pytest.raises(CheckpointError, match="'absent/model' is no folder"):
        evaluate("absent/model", tmp_path, *words)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"test.jsonl": '{"text": "a"}'}, "columns text are those of no task"),
        ({"test.jsonl": '{"text": "a", "label": 1}\n{"text": 3, "label": 1}'}, "test.jsonl:2: text is 3, not a text"),
        ({"test.jsonl": '{"text": "a", "label": 1}\n{"text"'}, "test.jsonl:2: not JSON"),
        ({"test.jsonl": '{"text": "a", "label": 1}\n{"text": "b"}'}, "test.jsonl:2: no label"),
        ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "label": 3}'}, "row 1: label is 3, not 0 or 1"),
        ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": "x"}'}, "row 1: score is 'x', not a number"),
        ({"test.jsonl": '{"query": "a", "positive": [], "negative": ["b"]}'}, "row 1: positive is not a list of texts"),
        ({"corpus.jsonl": '{"id": 1, "text": "a"}'}, "queries.jsonl: missing"),
        ({"test.jsonl": '{"text": "a", "label": 1}', "task.yaml": "type: regression"}, "type 'regression'; there are"),
        ({"test.jsonl": '{"text": "a", "label": 1}', "task.yaml": "kind: sts"}, "unknown: kind; a task has"),
    ],
    ids=str,
)
def test_bad_local_tasks(files, text, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        build_task(tmp_path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(KINDS) == {"classification", "clustering", "pair_classification", "reranking", "retrieval", "sts"}


def test_settings_of_sentence_transformers_folders(exported, tmp_path):
    found = read_sentence_settings(exported)
    assert (found.pooling, found.normalize, found.max_length, found.prompts) == ("cls", True, 512, {"query": "query: "})
    SentenceTransformer(str(exported), device="cpu").save(str(tmp_path / "newer"))
    assert read_sentence_settings(tmp_path / "newer").pooling == "cls"
    modules = json.loads((exported / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(CheckpointError, match="3_Dense/config.json: missing"):
        read_sentence_settings(tmp_path)
