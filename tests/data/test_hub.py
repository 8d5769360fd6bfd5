"""Datasets of the hub, from a local cache that is laid out as the hub's; and what an offline machine is told."""

from pathlib import Path

import pytest

from helpers.commands import run_neobert
from helpers.runs import hub_cache
from neobert.config.load import load_config
from neobert.data.files.documents import Files, read_text, stream
from neobert.data.files.splits import KNOWN, find_hub_splits
from neobert.errors import DataError
from neobert.tasks.contrastive.data import find_places


def texts(files):
    return [read_text(files, row, begin) for row, begin, _ in stream(files, files.start, files.stop)]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_in_the_cache_is_read(tmp_path, streaming):
    cache = str(hub_cache(tmp_path))
    train, evaluation = find_hub_splits("me/tiny", "en", streaming, None, None, None, cache)
    assert train.column == "content"
    assert len(texts(train)) == 60
    assert len(texts(evaluation)) == 5
    assert "assemblée" in texts(find_hub_splits("me/tiny", "fr", streaming, None, "train[:1%]", None, cache)[0])[0]
    assert len(texts(find_hub_splits("me/tiny", "fr", streaming, None, "train[50%:]", None, cache)[0])) == 30


def test_pairs_of_the_hub_have_the_usual_configuration(tmp_path):
    """The one that the dataset itself calls its default, or the one that is asked for."""
    words = ["task=contrastive", f"dataset.cache_dir={hub_cache(tmp_path)}", "dataset.name=me/tiny"]
    for more, language in (([], "en"), (["dataset.config=fr"], "fr")):
        place = find_places(load_config([], [*words, *more]).config)[0]
        assert Path(place.splits["train"][0]).parent.name == language


def test_what_an_offline_machine_is_told(tmp_path):
    with pytest.raises(
        DataError, match=r"dataset.name: 'no/such' is not in the local cache of the hub, and this machine is"
    ):
        find_hub_splits("no/such", None, True, None, None, None, str(tmp_path))
    with pytest.raises(DataError, match="'not a name' is no name of a dataset"):
        find_hub_splits("not a name", None, True, None, None, None, str(tmp_path))
    cache = str(hub_cache(tmp_path))
    with pytest.raises(DataError, match=r"'me/tiny' cannot be loaded: BuilderConfig 'de' not found"):
        find_hub_splits("me/tiny", "de", True, None, None, None, cache)
    with pytest.raises(DataError, match=r"no split 'test' in dataset me/tiny; there are: train, validation"):
        find_hub_splits("me/tiny", "en", True, None, "test", None, cache)


def test_refinedweb_is_known_by_its_name(tmp_path, empty_config):
    assert KNOWN["refinedweb"] == ("tiiuae/falcon-refinedweb", "content")
    result = run_neobert(
        "pretrain",
        empty_config,
        "dataset.cache_dir=" + str(tmp_path),
        "tokenizer.path=examples/quickstart/tokenizer",
        f"trainer.output_dir={tmp_path}/out",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: dataset.name: 'tiiuae/falcon-refinedweb' is not in the local cache")
    assert len(result.stderr.splitlines()) == 1


def test_an_existing_path_wins_and_an_absent_one_falls_back(tmp_path):
    from neobert.config.schema import Config
    from neobert.tasks.pretraining.data import find_files

    dataset = Config().dataset.model_copy(
        update={"name": "me/tiny", "config": "en", "cache_dir": str(hub_cache(tmp_path))}
    )
    (tmp_path / "mine.txt").write_text("my own text\n")
    here = dataset.model_copy(update={"path": str(tmp_path / "mine.txt")})
    assert texts(find_files(here)[0]) == ["my own text"]
    assert len(texts(find_files(dataset.model_copy(update={"path": str(tmp_path / "absent.txt")}))[0])) == 60
    with pytest.raises(DataError, match="nothing at"):
        find_files(Config().dataset.model_copy(update={"path": str(tmp_path / "absent.txt")}))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_files_behind_a_url_are_read(tmp_path, name):
    """What a stream of the hub reads: the same files through fsspec."""
    import gzip
    import json

    import pyarrow as pa
    import pyarrow.parquet

    lines = [f"line {n}" for n in range(50)]
    if name.endswith("parquet"):
        pa.parquet.write_table(pa.table({"text": lines}), tmp_path / name, row_group_size=8)
    else:
        content = "\n".join(json.dumps({"text": x}) if "json" in name else x for x in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    column = None if "txt" in name else "text"
    files = Files((f"file://{tmp_path / name}",), column)
    assert texts(files) == lines
    behind = list(stream(files, files.start))[19][2]
    assert len(list(stream(files, behind))) == 30
