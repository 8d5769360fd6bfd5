"""Without a GPU: the tests of CUDA run on the CPU, the page of a GPU is made at tiny size, and `make gpu` is one line."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.runs import ROOT

QUICK = (
    "not (run or resumed or glue or pretraining or variants)"  # of the tests of CUDA: no whole runs, not every variant
)


def python(*words, timeout=900, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def test_the_tests_of_cuda():
    """They compute on the CPU what the CPU computes, which shows that nothing but the kernels is left to be found out."""
    result = python("-m", "pytest", "-n0", "-m", "cuda", "-k", QUICK, "tests/gpu", CUDA_TESTS_ON="cpu")
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout or "[100%]" in result.stdout


def test_the_page(tmp_path):
    """Every section reports, none fails, and every bar has its line."""
    result = python("benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", tmp_path / "page.md")
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# NeoBERT on the CPU\n\nCommit ")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for what in (
        "model step 250M",
        "EuroBERT 250M",
        "ModernBERT 250M",
        "with muonclip",
        "neobert pretrain",
        "quickstart",
    ):
        assert any(what in row for row in rows), what
    assert "failed" not in page
    assert "does not run" not in page
    bars = set(re.findall(r"^bar (gpu_\w+) figure=", page, re.M))
    wanted = {"model_step_250M_over_peers", "muonclip_over_adamw", "quickstart_loss_apart", "fine_tuning", "embedding"}
    assert {f"gpu_{name}" for name in wanted} <= bars


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_without_a_device():
    words = ["make", "--silent", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout) == (0, "no CUDA device: make gpu measures NeoBERT on one\n")
