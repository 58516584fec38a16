# Everything runs in .venv; `make quickstart` and `make test` work from a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow test-gpu check bench-check bench-gpu format clean

quickstart: $(STAMP)
	$(BIN)/miras train recipes/quickstart.yaml

test: $(STAMP)
	$(BIN)/pytest -n 2

test-slow: $(STAMP)
	$(BIN)/pytest -n 2 -m slow

# On a CUDA device: the kernels, our own and fla's, that `make test-slow` runs in Triton's interpreter.
test-gpu: $(STAMP)
	$(BIN)/pytest -m "" tests/kernels/triton_cases.py tests/kernels/fla_cases.py

check: test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

# Speed, as ratios within one run, against benchmarks/baseline.json.
bench-check: $(STAMP)
	$(BIN)/python benchmarks/check.py

# On a CUDA device, into its page.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --out docs/results/gpu.md

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
