"""docs/architecture.md: its signposts are diffs that apply to this tree and work, and the modules that it names are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()
PROOF = """
import lzma, sys, torch
from neobert.config.load import load_config
from neobert.data.files.splits import find_splits
from neobert.data.mlm.readers import Reader
from neobert.optim.build import OptimizerSettings, build_optimizer

assert load_config([], ["trainer.log_num_rows=true", "optimizer.name=nadam"]).config.trainer.log_num_rows
with lzma.open("corpus.txt.xz", "wt") as file:
    file.write("one\\ntwo\\n")
assert Reader(find_splits("corpus.txt.xz", None, None, None)[0]).read() == ["one", "two"]
weight = torch.nn.Linear(2, 2)
assert isinstance(build_optimizer(weight.named_parameters(), OptimizerSettings("nadam", 1e-3)), torch.optim.NAdam)
"""


def test_signposts_apply_and_work(tmp_path):
    diffs = re.findall(r"^```diff\n(.*?)^```", PAGE, flags=re.M | re.S)
    assert len(diffs) == 3
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests/config", tmp_path / "tests/config", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)
    command = [sys.executable, "-c", PROOF]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "src"), "HF_HUB_OFFLINE": "1"})


def test_the_modules_it_names_are_there():
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", PAGE))
    assert len(named) > 20
    assert not [
        name for name in named if not any((ROOT / "src/neobert" / name, ROOT / name)[i].is_file() for i in (0, 1))
    ]
