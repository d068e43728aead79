# Everything happens in .venv, which the first command fills from the Python package index.
PYTHON ?= python3.11
BIN := .venv/bin
WANTED := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
PEERS := $(shell cksum < benchmarks/peers/requirements.txt | cut -d ' ' -f 1)

.PHONY: demo test check format bench merge-quality install install-dev clean
.DEFAULT_GOAL := test

demo: install
	$(BIN)/python examples/demo.py

test: install-dev
	$(BIN)/python -m pytest

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Against TRL and PEFT, in an environment of their own. E2E names a file of rows to measure on besides long made-up ones.
bench: install .venv-peers/installed-$(PEERS)
	$(BIN)/python benchmarks/peers/run.py --peers-python .venv-peers/bin/python $(if $(E2E),--e2e $(E2E))

# The table of docs/merge-quality.md; E2E names a folder with train.jsonl and test.jsonl.
merge-quality: install-dev
	$(BIN)/python benchmarks/merge_quality.py $(E2E) --page docs/merge-quality.md

# A stamp is named after what was asked for, so that a checkout of another version installs anew and time stamps do not
# matter. What only tests need (a gigabyte of it) is not asked of those who use lorafit.
install: .venv/installed-$(WANTED)
install-dev: .venv/installed-dev-$(WANTED)

.venv/installed-$(WANTED): EXTRAS := llamacpp
.venv/installed-dev-$(WANTED): EXTRAS := llamacpp,dev
.venv/installed-%:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

.venv-peers/installed-%:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-peers build dist .mypy_cache .pytest_cache .ruff_cache
