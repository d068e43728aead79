# Everything happens in .venv, which the first command fills from the Python package index.
PYTHON ?= python3.11
BIN := .venv/bin
WANTED := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.PHONY: demo test check format install install-dev clean
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

install: $(STAMP)

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

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
