# Everything runs in .venv; `make quickstart` and `make test` work from a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow check bench-check format clean

quickstart: $(STAMP)
	$(BIN)/miras train recipes/quickstart.yaml

test: $(STAMP)
	$(BIN)/pytest -n 2

test-slow: $(STAMP)
	$(BIN)/pytest -n 2 -m slow

check: test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

# Speed, as ratios within one run, against benchmarks/baseline.json.
bench-check: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/check.py

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
