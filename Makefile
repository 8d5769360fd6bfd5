# make quickstart   an encoder trained on the text that ships with the project
# make test         the tests
# make check        format, lint, types, tests
# make bench        every benchmark; rewrites benchmarks/RESULTS.md
#
# Each sets up .venv by itself. TORCH chooses the build, for example: make quickstart TORCH="torch==2.13.0+cu130"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST := .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := outputs/quickstart

.PHONY: quickstart test check format docs bench clean

quickstart: .venv/.installed
	$(BIN)/neobert pretrain configs/pretraining/quickstart.yaml
	@echo
	$(BIN)/neobert fill-mask $(RUN) "The President of the United [MASK] spoke." "We must not [MASK] the people."
	@echo
	$(BIN)/python examples/quickstart/load_in_transformers.py $(RUN)

test: .venv/.installed-dev
	$(PYTEST)

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

clean:
	rm -rf .venv outputs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
