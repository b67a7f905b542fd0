# make demo    train on the toy world, evaluate, index, search: runs/demo
# make test    every test
# Both set up .venv on first use, from setup.cfg and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types clean
demo: .venv/ready
	$(BIN)/fromage toy demo --out runs/demo

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

.venv/ready: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
