# Everything happens in .venv, which the first command fills from the Python package index.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.PHONY: demo test check format install clean
.DEFAULT_GOAL := test

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# The stamp is named after what was asked for, so that a checkout of another version installs anew and time stamps do not matter.
$(STAMP):
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[llamacpp,dev]'
	rm -f .venv/installed-*
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
