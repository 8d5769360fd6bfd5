# make quickstart   an encoder trained on the text that ships with the project
# make test         the tests
# make test-extras  the tests that need DeepSpeed
# make check        format, lint, types, tests
# make bench        every benchmark into benchmarks/RESULTS.md
# make gpu          on a CUDA machine: the tests of CUDA, and what this GPU reaches into benchmarks/RESULTS_GPU.md
#
# Each sets up .venv by itself; gpu only where torch and transformers are not there already. TORCH chooses the build, for example: make quickstart TORCH="torch==2.13.0+cu130"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST := .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EXTRAS_PIP := $(subst .venv,.venv-extras,$(PIP))
RUN := outputs/quickstart

.PHONY: quickstart test test-extras check format docs bench gpu clean

quickstart: .venv/.installed
	$(BIN)/neobert pretrain configs/pretraining/quickstart.yaml
	@echo
	$(BIN)/neobert fill-mask $(RUN) "The President of the United [MASK] spoke." "We must not [MASK] the people."
	@echo
	$(BIN)/python examples/quickstart/load_in_transformers.py $(RUN)

test: .venv/.installed-dev
	$(PYTEST)

test-extras: .venv-extras/.installed
	.venv-extras/bin/python -m pytest tests/training/test_deepspeed.py

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.installed
	$(BIN)/python -c 'from neobert.config.explain import reference_page; print(reference_page(), end="")' > docs/configuration.md
	$(BIN)/neobert config schema > configs/schema.json

bench: .venv/.installed
	$(PIP) --editable ".[bench]"
	$(BIN)/python benchmarks/run_all.py

# .venv where it is there, else PYTHON with the packages that it has.
gpu:
	@choose() { python=$(PYTHON); [ ! -x $(BIN)/python ] || python=$(BIN)/python; }; choose; \
	if ! $$python -c 'import torch, transformers' 2> /dev/null && nvidia-smi --list-gpus > /dev/null 2>&1; then \
		$(MAKE) --no-print-directory .venv/.installed-dev || exit 1; $(PIP) --editable ".[bench]" || exit 1; choose; \
	fi; \
	if ! $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then \
		echo "no CUDA device: make gpu measures NeoBERT on one"; exit 0; \
	fi; \
	export PYTHONPATH=$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}; status=0; \
	if $$python -c 'import pytest' 2> /dev/null; then \
		$$python -m pytest --override-ini addopts=-q -m cuda tests/gpu || status=1; \
	else \
		echo "pytest is not installed: the tests of CUDA are left out"; \
	fi; \
	$$python benchmarks/gpu.py || status=1; exit $$status

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neobert needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	@echo "installing into .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

# DeepSpeed is built behind torch, and Accelerate imports it wherever it is installed: an environment of its own, on top of .venv.
.venv-extras/.installed: .venv/.installed-dev
	$(BIN)/python -m venv .venv-extras
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-extras/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(EXTRAS_PIP) "setuptools>=77" wheel
	$(EXTRAS_PIP) --no-build-isolation deepspeed
	@touch $@

clean:
	rm -rf .venv .venv-extras outputs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
