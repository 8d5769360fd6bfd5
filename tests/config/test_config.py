"""The configuration: names, types, defaults, errors with their place, overrides, and speed of the check."""

import json
import sys

import pytest

from helpers.commands import run_neobert
from helpers.runs import CONFIGS, TEXT, TOKENIZER
from neobert.config.load import dump_config, load_config, parse_overrides
from neobert.config.ready import find_missing
from neobert.config.rules import RULES, resume_needs_a_position
from neobert.config.schema import Config, known_keys
from neobert.errors import ConfigError

LOCAL = ["dataset.path=x"]


def problems(tmp_path, text, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config([str(path)], [*LOCAL, *overrides])
    return {problem.path: problem for problem in error.value.problems}


def test_every_key_of_the_reference(reference_keys):
    ours = known_keys()
    for wanted in reference_keys:
        info = ours[wanted["key"]]
        assert info.type == wanted["type"], wanted["key"]
        assert info.default == (
            pytest.approx(wanted["default"]) if isinstance(wanted["default"], float) else wanted["default"]
        )
    named = {wanted["key"] for wanted in reference_keys}
    assert all((key not in named) == info.help.endswith(" Beyond the reference.") for key, info in ours.items())


def test_every_key_is_described():
    for info in known_keys().values():
        assert info.help.endswith("."), info.key
        assert info.effect, info.key


def test_all_problems_at_once_with_their_lines(tmp_path):
    found = problems(
        tmp_path,
        "trainer:\n  stpes: 3\n  max_step: 5\n  save_steps: '7'\n"
        "model:\n  hidden_act: gleu\n  dropout_prob: 1.5\noptimzer:\n  lr: 1\n",
    )
    assert "did you mean trainer.max_steps?" in found["trainer.max_step"].message
    assert found["trainer.max_step"].where.endswith("c.yaml:3")
    assert "unknown key" in found["trainer.stpes"].message
    assert "must be int, got '7' (str)" in found["trainer.save_steps"].message
    assert "did you mean gelu?" in found["model.hidden_act"].message
    assert "less than 1" in found["model.dropout_prob"].message
    assert "did you mean optimizer" in found["optimzer"].message


def test_wrong_keys_rules_and_older_names_are_reported_together(tmp_path):
    text = "model:\n  hidden_size: 100\n  num_attention_heads: 3\n  rope: maybe\noptimizer:\n  lr: 1\n  lr: 2\n"
    found = problems(
        tmp_path, text + "trainer:\n  dir: a\n  output_dir: b\n  mixed_precision: fp16\n  max_steps: 1.5\n"
    )
    assert set(found) == {"optimizer.lr", "trainer.dir", "model.rope", "trainer.max_steps", "trainer.mixed_precision"}
    assert found["optimizer.lr"].where.endswith("c.yaml:7")
    assert found["trainer.mixed_precision"].where.endswith("c.yaml:11")
    del found["model.rope"]  # which takes part in the rule on heads, so that one waits
    again = problems(tmp_path, text.replace("maybe", "true"))
    assert set(again) == {"optimizer.lr", "model.hidden_size"}


NINE_RULES = {
    "resume with streaming": ("ERROR", "trainer.resume_from_checkpoint", {"trainer": {"resume_from_checkpoint": "latest"}}),
    "validation split with streaming": ("WARNING", "dataset.validation_split", {"dataset": {"validation_split": 0.1}}),
    "warmup": ("PRECEDENCE", "scheduler.warmup_percent", {"scheduler": {"warmup_percent": 5, "warmup_steps": 9}}),
    "decay": ("PRECEDENCE", "scheduler.decay_percent", {"scheduler": {"decay_percent": 50, "decay_steps": 9}}),
    "muonclip with ZeRO": ("ERROR", "optimizer.name", {"optimizer": {"name": "muonclip"}}),
    "packing with sdpa": (
        "WARNING", "model.attn_backend", {"datacollator": {"pack_sequences": True}, "model": {"attn_backend": "sdpa"}},
    ),
    "path and name": ("PRECEDENCE", "dataset.path", {"dataset": {"path": "x", "name": "y"}}),
    "vocabulary": ("IMPORTANT", "model.vocab_size", {"model": {"vocab_size": 9000}}),
    "padding": ("IMPORTANT", "model.pad_token_id", {"model": {"pad_token_id": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", NINE_RULES)
def test_the_rules_of_the_reference(name, tmp_path, monkeypatch):
    kind, key, values = NINE_RULES[name]
    if name == "muonclip with ZeRO":
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        with pytest.raises(ConfigError, match="optimizer.name: muonclip cannot run under ZeRO stage 2"):
            load_config([], ["optimizer.name=muonclip"])
        load_config([], ["optimizer.name=muonclip", "use_deepspeed=false"])
        monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        (tmp_path / "zero.yaml").write_text("deepspeed_config: {zero_stage: 3}")
        with pytest.raises(ConfigError, match="ZeRO stage 3"):
            load_config([], ["optimizer.name=muonclip", f"accelerate_config_file={tmp_path / 'zero.yaml'}"])
        return
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    config = load_config([str(tmp_path / "c.yaml")]).config
    if name == "resume with streaming":
        found = [(rule.kind, one.path) for rule in RULES if rule.check is resume_needs_a_position
                 for one in resume_needs_a_position(config, has_position=False)]  # fmt: skip
    else:
        found = [(rule.kind, one.path) for rule in RULES for one in rule.find(config)]
    assert found == [(kind, key)]
    assert [one for rule in RULES for one in rule.find(load_config([]).config)] == []


def test_keys_that_do_not_act_in_a_task_are_named(tmp_path):
    """By themselves where others of their section act, and else once for the section; at its default a key is not named."""
    for task, words, expected in (
        ("glue", ["dataset.mixture_exhausted=repeat", "dataset.num_shards=2"], ["dataset.num_shards"]),
        ("glue", ["contrastive.pooling=cls", "contrastive.loss_type=supcon"], ["contrastive.loss_type"]),
        ("contrastive", ["datacollator.mask_all=true", "mteb_pooling=cls"], ["datacollator.mask_all", "mteb_pooling"]),
        (
            "mteb",
            ["model.rope=false", "trainer.save_steps=3", "trainer.use_cpu=true"],
            ["model.rope", "trainer.save_steps"],
        ),
        ("pretraining", ["glue.task_name=rte", "dataset.columns={text: a}"], ["dataset.columns", "glue.task_name"]),
    ):
        warnings = load_config([], words, task).warnings
        assert [warning.partition(":")[0] for warning in warnings] == expected
        assert all(f"has no effect in task: {task}" in warning for warning in warnings)
        assert [", nor has the rest of" in warning for warning in warnings] == [
            key in ("contrastive.loss_type", "model.rope", "glue.task_name") for key in expected
        ]


def test_files_on_the_command_line_are_layered(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 1, save_steps: 7}")
    (tmp_path / "b.yaml").write_text("trainer: {max_steps: 2}")
    shown = run_neobert("config", "show", tmp_path / "a.yaml", tmp_path / "b.yaml", "--optimizer.lr", "0.5").stdout
    assert f"max_steps: 2  # {tmp_path}/b.yaml:1" in shown
    assert f"save_steps: 7  # {tmp_path}/a.yaml:1" in shown
    assert "lr: 0.5  # command line" in shown


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("model: {hidden_size: 100, num_attention_heads: 3}", "model.hidden_size", "not divisible"),
        ("model: {hidden_size: 30, num_attention_heads: 2}", "model.num_attention_heads", "even head width"),
        ("trainer: {mixed_precision: fp16}", "trainer.mixed_precision", "fp16"),
        ("dataset: {max_seq_length: 1024}", "dataset.max_seq_length", "max_position_embeddings"),
        ("dataset: {pre_tokenize: true}", "dataset.pre_tokenize", "streaming: false"),
        ("optimizer: {muon_config: {ns_stps: 4}}", "optimizer.muon_config.ns_stps", "ns_steps"),
        ("trainer: {dir: a, output_dir: b}", "trainer.dir", "contradicts"),
        ("trainer: 3", "trainer", "must be a section with keys"),
        (
            "model: {hidden_size: 1000000000000, num_attention_heads: 7}",
            "model.hidden_size",
            "less than or equal to 65536",
        ),
        ("task: glue\nglue: {task_name: mnli, num_labels: 2}", "glue.num_labels", "but mnli has 3"),
    ],
)
def test_rules_say_what_is_wrong(tmp_path, text, path, words):
    assert words in str(problems(tmp_path, text)[path])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datacollator: {max_length: 1024}", "datacollator.max_length: has no effect"),
        (
            "datacollator: {pad_to_multiple_of: 8, pack_sequences: true}",
            "datacollator.pad_to_multiple_of: has no effect",
        ),
        ("optimizer: {muon_config: {ns_steps: 4}}", "optimizer.muon_config: has no effect"),
        ("dataset: {pre_tokenize_output: x}", "dataset.pre_tokenize_output: has no effect"),
        ("wandb: {log_interval: 7}", "wandb.log_interval: has no effect"),
        ("trainer: {bf16: false, mixed_precision: fp32}", "trainer.bf16 is an older name"),
    ],
)
def test_what_has_no_effect_is_said_and_refuses_nothing(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    (warning,) = load_config([str(path)], LOCAL).warnings
    assert words in warning


ALIASES = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a: &a [" + "x, " * 9 + "]\n" + ALIASES,
            r"c.yaml:6: not valid YAML: its aliases stand for more than 100,000 values",
        ),
        ("a: &a [*a]", "an alias contains itself"),
        ("a: 1\na: 2", "written twice"),
        ("- 1", "expected sections"),
        ("a: [1", "not valid YAML"),
        ("x: !!python/object:os.system {}", "not valid YAML"),
        ("{1: 2}", "keys must be words"),
        ("a: " + "[" * 5000 + "]" * 5000, "not a usable YAML"),
    ],
)
def test_yaml_that_is_no_configuration(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config([str(path)])


def test_values_mean_what_they_say(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {lr: 1e-4}\ntrainer: {mixed_precision: no, resume_from_checkpoint: 500}\nscheduler:\n")
    config = load_config([str(path)], LOCAL).config
    assert config.optimizer.lr == 1e-4
    assert config.trainer.mixed_precision == "no"
    assert config.trainer.resume_from_checkpoint == "500"


def test_overrides_win_from_left_to_right(empty_config):
    words = ["--trainer.max_steps", "5", "trainer.max_steps=6", "--wandb.tags=[a, b]", "--trainer.output_dir", "2024"]
    config = load_config([str(empty_config)], [*LOCAL, *words, "optimizer.muon_config=null"]).config
    assert config.trainer.max_steps == 6
    assert config.wandb.tags == ["a", "b"]
    assert config.trainer.output_dir == "2024"
    with pytest.raises(ConfigError, match="expected section.key=value"):
        parse_overrides(["max_steps"])
    with pytest.raises(ConfigError, match="no value"):
        parse_overrides(["--trainer.max_steps"])


def test_lists_may_be_written_with_commas(empty_config):
    words = ["--trainer.report_to", "wandb,tensorboard", "wandb.tags=2024", "--optimizer.betas", "0.9, 0.95"]
    config = load_config([str(empty_config)], words).config
    assert config.trainer.report_to == ["wandb", "tensorboard"]
    assert config.wandb.tags == ["2024"]
    assert config.optimizer.betas == [0.9, 0.95]


@pytest.mark.parametrize(("written", "expected"), [("true", "latest"), ("false", None), ("1", "1"), ("null", None)])
def test_true_resumes_from_the_latest_checkpoint(written, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(f"trainer: {{resume_from_checkpoint: {written}}}")
    for words in ([str(tmp_path / "c.yaml")], []), ([], [f"trainer.resume_from_checkpoint={written}"]):
        assert load_config(*words).config.trainer.resume_from_checkpoint == expected


def test_files_are_layered_left_to_right(tmp_path):
    for name, steps in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(
            f"trainer: {{max_steps: {steps}, output_dir: {name}}}" if name == "a" else "trainer: {max_steps: 2}"
        )
    config = load_config([str(tmp_path / "a"), str(tmp_path / "b")], LOCAL).config
    assert (config.trainer.max_steps, config.trainer.output_dir) == (2, "a")


def test_older_fields_act(empty_config):
    loaded = load_config([str(empty_config)], [*LOCAL, "trainer.train_batch_size=3", "trainer.max_ckpt=7"])
    assert loaded.config.trainer.per_device_train_batch_size == 3
    assert loaded.config.trainer.save_total_limit == 7
    assert len(loaded.warnings) == 2


def test_dump_loads_to_the_same(tmp_path, empty_config):
    config = load_config([str(empty_config)], [*LOCAL, "optimizer.lr=0.003"]).config
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config([str(tmp_path / "dumped.yaml")]).config == config


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().trainer.max_steps = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_load(path):
    load_config([str(path)])


def test_check_needs_no_torch(empty_config):
    import subprocess

    code = (
        "import sys; from neobert.cli.main import app\n"
        f"try: app(['config', 'check', {str(empty_config)!r}, 'dataset.path={TEXT}', 'tokenizer.path={TOKENIZER}'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_lines_and_exit_code_2(tmp_path):
    (tmp_path / "c.yaml").write_text("trainer:\n  max_step: 5\ndataset: {path: x}\n")
    result = run_neobert("config", "check", tmp_path / "c.yaml")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: trainer.max_step: unknown key; did you mean trainer.max_steps? ({tmp_path}/c.yaml:2)\n"
    )
    assert run_neobert("run", tmp_path / "absent.yaml").returncode == 2


def test_notes_are_on_stderr_once_and_in_the_same_words(tmp_path):
    (tmp_path / "c.yaml").write_text(f"trainer: {{dir: a}}\nscheduler: {{power: 3.0}}\ndataset: {{path: {TEXT}}}\n")
    words = [tmp_path / "c.yaml", "--tokenizer.path", TOKENIZER]
    check, show = run_neobert("config", "check", *words), run_neobert("config", "show", *words)
    assert (check.returncode, show.returncode) == (0, 0)
    assert check.stderr.splitlines() == [
        "note: trainer.dir is an older name: 'a' acts as trainer.output_dir: 'a'",
        "note: scheduler.power: has no effect with scheduler.name: cosine",
    ]
    assert show.stderr == check.stderr
    assert "note:" not in check.stdout + show.stdout


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("modle: {hidden_size: 64}", "modle", "did you mean model?"),
        ("trainer: {lerning_rate: 1}", "trainer.lerning_rate", "did you mean optimizer.lr?"),
        ("optimizer: {muon_confg: {}}", "optimizer.muon_confg", "did you mean optimizer.muon_config?"),
        ("learning_rate: 1", "learning_rate", "did you mean optimizer.lr?"),
        ("max_steps: 1", "max_steps", "did you mean trainer.max_steps?"),
        (
            "trainer: {eval_strategy: no}",
            "trainer.eval_strategy",
            "set trainer.eval_steps to more than the steps of the run",
        ),
        ("trainer: {eval_strategy: 'no'}", "trainer.eval_strategy", "to train without evaluations"),
    ],
)
def test_what_was_meant_is_said(tmp_path, text, path, words):
    assert words in problems(tmp_path, text)[path].message


NOTHING_SET, NOTHING_THERE = "not set; ", "nothing at 'absent'"
MISSING = {
    "pretraining": ("dataset: {path: ''}", {"dataset.path": NOTHING_SET, "tokenizer.path": NOTHING_SET}),
    "the default dataset": ("tokenizer: {name: bert-base-uncased}", {}),
    "absent": (
        "dataset: {path: absent/*.txt}\ntokenizer: {path: absent}",
        {"dataset.path": "nothing at 'absent/*.txt'", "tokenizer.path": "no folder at 'absent'"},
    ),
    "mixture": (
        "dataset: {mixture: [{path: absent}, {name: a/b}]}\ntokenizer: {name: x}",
        {"dataset.mixture.0.path": NOTHING_THERE},
    ),
    "named": ("dataset: {name: refinedweb}\ntokenizer: {name: bert-base-uncased}", {}),
    "glue": ("task: glue", {"glue.pretrained_checkpoint_dir": "no weights to start from"}),
    "random": ("task: glue\nglue: {allow_random_weights: true}", {"tokenizer.path": NOTHING_SET}),
    "contrastive": (
        "task: contrastive\ncontrastive: {pretrained_checkpoint_dir: absent}",
        {"dataset.path": NOTHING_SET, "contrastive.pretrained_checkpoint_dir": NOTHING_THERE},
    ),
    "mteb": ("task: mteb\nmteb_local_tasks: absent", {"mteb_local_tasks": NOTHING_THERE, "trainer.output_dir": "no run"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_a_run_would_not_find(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = MISSING[name]
    (tmp_path / "c.yaml").write_text(text)
    found = {problem.path: problem.message for problem in find_missing(load_config([str(tmp_path / "c.yaml")]).config)}
    assert found.keys() == expected.keys()
    assert all(words in found[path] for path, words in expected.items())


def test_a_run_asks_nobody_for_a_tokenizer_that_nobody_named(tmp_path):
    """The command says so at once, with what else is missing; so does the library."""
    from neobert.tasks.pretraining import task as pretraining

    (tmp_path / "c.yaml").write_text("dataset: {path: absent}\n")
    result = run_neobert("run", tmp_path / "c.yaml", "--trainer.output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["dataset.path", "tokenizer.path"]
    words = [f"dataset.path={TEXT}", f"trainer.output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match="tokenizer.path: not set"):
        pretraining.run(load_config([], words))
    assert not (tmp_path / "out").exists()


def test_keys_as_json():
    keys = json.loads(run_neobert("config", "keys", "--json").stdout)
    assert {"key", "type", "default", "section", "help", "choices", "effect"} <= set(keys[0])
