"""A configuration that helps: older names, explanations, differences, starter files, the generated pages."""

import contextlib
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.commands import run_neobert
from helpers.runs import CONFIGS, ROOT, TEXT, TOKENIZER
from neobert.config.explain import STARTERS, diff_configs, explain_key, reference_page, show_config, starter_file
from neobert.config.load import LEGACY, load_config
from neobert.config.ready import check_ready
from neobert.config.rules import RULES
from neobert.config.schema import Config, known_keys
from neobert.config.sections import MuonConfig
from neobert.errors import ConfigError

EXAMPLES = {
    "mixed_precision": ("fp32", "fp32"),
    "trainer.bf16": (False, "no"),
    "trainer.seed": (7, 7),
    "trainer.run_name": ("a", "a"),
    "trainer.learning_rate": (0.5, 0.5),
    "trainer.warmup_steps": (3, 3),
    "trainer.max_grad_norm": (2.0, 2.0),
    "trainer.dir": ("x", "x"),
    "dataset.tokenizer_name": ("t", "t"),
    "dataset.column": ("c", "c"),
    "dataset.path_to_disk": ("p", "p"),
    "dataset.lanes": (2, 2),
    "tokenizer.tokenizer_name_or_path": ("t", "t"),
    "optimizer.hparams.lr": (0.25, 0.25),
    "model.flash_attention": (True, "flash_attn_varlen"),
    "model.xformers_attention": (True, "flash_attn_varlen"),
    "model.use_flash_attention": (False, "sdpa"),
    "model.sdpa_attention": (False, "flash_attn_varlen"),
    "trainer.max_ckpt": (9, 9),
    "trainer.train_batch_size": (9, 9),
    "trainer.eval_batch_size": (9, 9),
    "trainer.dataloader_num_workers": (9, 9),
    "optimizer.muon_config.algorithm": ("newton_schulz", "newton_schulz"),
    "optimizer.muon_config.polar_express": (False, "newton_schulz"),
}


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def nested(dotted, value):
    *sections, last = dotted.split(".")
    values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def new_name(old):
    rule = next(
        rule for rule in LEGACY if rule.old == old or (rule.old.endswith(".*") and old.startswith(rule.old[:-1]))
    )
    return rule.new.replace("*", old.rpartition(".")[2])


def test_every_older_name_has_an_example():
    assert len(EXAMPLES) == len(LEGACY)


@pytest.mark.parametrize("old", EXAMPLES)
def test_older_names_act_and_warn(old, tmp_path):
    written, expected = EXAMPLES[old]
    muon = ["optimizer.name=muonclip"] if "muon" in old else []
    loaded = load_config([write(tmp_path / "c.yaml", nested(old, written))], muon)
    assert loaded.config.value_of(new_name(old)) == expected
    assert (
        sum(f"{old} is an older name: {written!r} acts as {new_name(old)}" in warning for warning in loaded.warnings)
        == 1
    )


STILL_KEYS = [old for old in EXAMPLES if old in known_keys()]


@pytest.mark.parametrize("old", [old for old in EXAMPLES if old not in STILL_KEYS])
def test_older_and_newer_names_may_not_contradict(old, tmp_path):
    written, expected = EXAMPLES[old]
    other = {"no": "bf16", "fp32": "bf16", "flash_attn_varlen": "sdpa", "sdpa": "flash_attn_varlen"}.get(
        expected, "other"
    )
    values = nested(old, written)
    section, _, name = new_name(old).rpartition(".")
    target = values
    for part in filter(None, section.split(".")):
        target = target.setdefault(part, {})
    target[name] = other
    with pytest.raises(ConfigError, match="contradicts"):
        load_config([write(tmp_path / "c.yaml", values)])


NOT_THERE, REFUSED = "not there", "refused"
OLDER_AND_NEWER = {  # older name: {(its value, value of the newer name): (what it comes to, warnings)}
    "trainer.max_ckpt": {
        (3, NOT_THERE): (3, 0), (3, 5): (5, 0), (3, None): (None, 0),
        (7, NOT_THERE): (7, 1), (7, 7): (7, 1), (7, 5): (5, 1), (7, None): (None, 1),
        (None, NOT_THERE): (None, 1), (None, 5): (5, 1), (None, None): (None, 1),
    },
    "trainer.dataloader_num_workers": {
        (0, NOT_THERE): (16, 0), (0, 16): (16, 0), (0, None): (REFUSED, 0),
        (7, NOT_THERE): (7, 1), (7, 7): (7, 1), (7, 5): (5, 1), (7, None): (REFUSED, 0),
        (None, NOT_THERE): (REFUSED, 0), (None, 5): (5, 1), (None, None): (REFUSED, 0),
    },
    "trainer.train_batch_size": {
        (None, NOT_THERE): (16, 0), (None, 5): (5, 0), (None, None): (REFUSED, 0),
        (7, NOT_THERE): (7, 1), (7, 7): (7, 1), (7, 5): (5, 1), (7, None): (REFUSED, 0),
    },
    "optimizer.muon_config.polar_express": {
        (None, NOT_THERE): ("polar_express", 0), (None, "newton_schulz"): ("newton_schulz", 0),
        (False, NOT_THERE): ("newton_schulz", 1), (False, "polar_express"): ("polar_express", 1),
        (False, None): (REFUSED, 0), (True, "polar_express"): ("polar_express", 1),
    },
    "trainer.max_grad_norm": {
        (1.0, NOT_THERE): (1.0, 1), (1.0, 1.0): (1.0, 1), (1.0, 2.0): (REFUSED, 0), (1.0, None): (REFUSED, 0),
        (None, NOT_THERE): (None, 1), (None, 1.0): (REFUSED, 0), (None, None): (None, 1),
    },
    "trainer.bf16": {
        (False, NOT_THERE): ("no", 1), (False, "no"): ("no", 1), (False, "fp32"): ("fp32", 1), (False, "bf16"): (REFUSED, 0),
        (True, True): ("bf16", 1), (True, "fp32"): (REFUSED, 0), (None, NOT_THERE): (REFUSED, 0), (True, None): (REFUSED, 0),
    },
}  # fmt: skip


@pytest.mark.parametrize(("old", "given"), [(old, given) for old, rows in OLDER_AND_NEWER.items() for given in rows])
def test_what_an_older_and_a_newer_name_come_to(old, given, tmp_path):
    (written, present), (expected, num_warnings) = given, OLDER_AND_NEWER[old][given]
    values = nested(old, written)
    if present != NOT_THERE:
        *sections, last = new_name(old).split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = present
    file = write(tmp_path / "c.yaml", values)
    muon = ["optimizer.name=muonclip"] if "muon" in old else []
    if expected == REFUSED:
        with pytest.raises(ConfigError):
            load_config([file], muon)
        return
    loaded = load_config([file], muon)
    assert loaded.config.value_of(new_name(old)) == expected
    assert len(loaded.warnings) == num_warnings, loaded.warnings


def test_on_the_command_line_an_older_name_means_its_default_too(tmp_path):
    file = write(tmp_path / "c.yaml", {"dataset": {"num_workers": 8}})
    loaded = load_config([file], ["--trainer.dataloader_num_workers", "0"])
    assert loaded.config.dataset.num_workers == 0
    assert len(loaded.warnings) == 1


@pytest.mark.parametrize("task", ["pretraining", "glue", "contrastive", "mteb"])
def test_all_defaults_in_one_file_are_valid(task, tmp_path):
    """A file that sets every key to what it is anyway loads to the defaults, and there is nothing to say about it."""
    file = write(tmp_path / "c.yaml", {**Config().model_dump(), "optimizer": all_defaults("optimizer"), "task": task})
    loaded = load_config([file])
    assert loaded.warnings == []
    defaults = Config(task=task, config_path=file, optimizer={"muon_config": {}})
    assert loaded.config.model_copy(update={"config_path": file}) == defaults


def all_defaults(section):
    values = getattr(Config(), section).model_dump()
    return {**values, "muon_config": MuonConfig().model_dump()} if section == "optimizer" else values


def test_the_defaults_of_the_reference_are_valid(reference_keys, tmp_path):
    values = {}
    for info in sorted(reference_keys, key=lambda info: info["key"].count(".")):
        *sections, last = info["key"].split(".")
        target = values
        for section in sections:
            target[section] = target = target.get(section) or {}
        target[last] = info["default"]
    file = write(tmp_path / "c.yaml", values)
    loaded = load_config([file])
    assert loaded.warnings == []
    for info in known_keys().values():
        expected = {"config_path": None, "optimizer.muon_config": MuonConfig()}.get(info.key, info.default)
        assert loaded.config.value_of(info.key) == expected, info.key
    for key, value in {"trainer.save_total_limit": 5, "dataset.num_workers": 8, "dataset.path": str(tmp_path)}.items():
        loaded = load_config([file], [f"{key}={value}"])
        assert loaded.config.value_of(key) == value
        assert loaded.warnings == []


def test_an_empty_section_of_a_later_file_changes_nothing(tmp_path):
    first = write(tmp_path / "a.yaml", {"trainer": {"max_steps": 5}})
    second = write(tmp_path / "b.yaml", {"trainer": None})
    assert load_config([first, second]).config.trainer.max_steps == 5


def test_an_older_and_a_newer_name_may_agree(tmp_path):
    file = write(tmp_path / "c.yaml", {"trainer": {"bf16": True, "mixed_precision": True}, "mixed_precision": "bf16"})
    assert load_config([file]).config.trainer.mixed_precision == "bf16"


def test_a_newer_layer_wins_over_an_older_name(tmp_path):
    file = write(tmp_path / "c.yaml", {"trainer": {"learning_rate": 0.5}})
    assert load_config([file], ["optimizer.lr=0.1"]).config.optimizer.lr == 0.1
    assert load_config([file], ["trainer.learning_rate=0.2"]).config.optimizer.lr == 0.2


def test_explain():
    text = explain_key("scheduler.warmup_percent")
    for words in ("float | None", ">= 0, <= 100", "wins over", "precedence"):
        assert words in text
    assert "older     trainer.bf16" in explain_key("trainer.mixed_precision").replace("mixed_precision, ", "")
    assert "older name of trainer.output_dir" in explain_key("trainer.dir")
    assert "tasks     contrastive" in explain_key("dataset.columns")
    assert "tasks  " not in explain_key("seed")
    with pytest.raises(ConfigError, match="did you mean trainer.max_steps"):
        explain_key("trainer.max_step")
    for key in known_keys():
        assert explain_key(key)


def test_show_says_where_and_loads_again(tmp_path):
    file = write(tmp_path / "c.yaml", {"trainer": {"max_steps": 5, "seed": 3}})
    loaded = load_config([file], ["optimizer.lr=0.1"])
    text = show_config(loaded.config, loaded.origins)
    assert f"  max_steps: 5  # {file}:2" in text
    assert f"seed: 3  # {file}:3" in text
    assert "  lr: 0.1  # command line" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_config([str(tmp_path / "again.yaml")]).config == loaded.config


def test_diff(tmp_path):
    a = load_config([write(tmp_path / "a.yaml", {"trainer": {"max_steps": 5}})]).config
    b = load_config([write(tmp_path / "b.yaml", {"optimizer": {"lr": 0.1}})]).config
    assert diff_configs(a, b) == ["trainer.max_steps: 5 -> 1000000", "optimizer.lr: 0.0001 -> 0.1"]
    assert diff_configs(a, a) == []


@pytest.mark.parametrize("task", STARTERS)
def test_starter_files(task, tmp_path):
    """A starter says what is to be filled in, `check` refuses it until that is done, and no key of it is without effect."""
    path = tmp_path / "new.yaml"
    path.write_text(starter_file(task))
    lines = path.read_text().splitlines()
    result = run_neobert("config", "check", path, cwd=tmp_path)
    assert result.returncode == 2
    places = [f"({path}:{number})" for number, line in enumerate(lines, 1) if "to be filled in" in line]
    told = result.stderr.splitlines()
    assert len(told) == len(places)
    assert all(line.endswith(place) for line, place in zip(told, places, strict=True))
    (tmp_path / "checkpoints").mkdir()
    filled = {"path": TEXT, "pretrained_checkpoint_dir": tmp_path, "output_dir": tmp_path}
    for number, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if "to be filled in" in line:
            value = TOKENIZER if lines[number - 2] == "tokenizer:" else filled[name]
            lines[number] = f"{line.partition(':')[0]}: {value}"
    path.write_text("\n".join(lines))
    loaded = load_config([str(path)])
    check_ready(loaded)
    assert loaded.warnings == []
    assert not {"mteb_pooling", "scheduler.warmup_steps"} & set(loaded.origins)


def test_generated_files_are_fresh():
    """`make docs` writes them."""
    assert (ROOT / "docs/configuration.md").read_text() == reference_page()
    assert json.loads((ROOT / "configs/schema.json").read_text()) == Config.model_json_schema()
    for key in known_keys():
        assert f"`{key}`" in reference_page()


def test_every_configuration_names_the_schema():
    for path in CONFIGS:
        assert path.read_text().startswith("# yaml-language-server: $schema=../schema.json\n"), path


def test_rules_name_real_keys():
    for rule in RULES:
        assert set(rule.all_keys) <= set(known_keys())
        assert rule.description.endswith(".")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*known_keys(), *EXAMPLES, *(info.section for info in known_keys().values())])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, ANYTHING, min_size=1, max_size=5))
def test_any_values_give_a_config_or_a_config_error(changes, tmp_path):
    values = {}
    for dotted, value in changes.items():
        target = values
        for part in dotted.split(".")[:-1]:
            target = target.setdefault(part, {}) if isinstance(target.get(part, {}), dict) else {}
        target[dotted.rpartition(".")[2]] = value
    (tmp_path / "c.yaml").write_text(yaml.dump(values, allow_unicode=True))
    with contextlib.suppress(ConfigError):
        load_config([str(tmp_path / "c.yaml")])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#%@`,? \n\t\x00é1.e<<trainer"), max_size=60))
def test_any_text_gives_a_config_or_a_config_error(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with contextlib.suppress(ConfigError):
        load_config([str(tmp_path / "c.yaml")])
