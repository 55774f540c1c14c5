# Two commands for a newcomer: `make run` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test bench lint types clean

run: $(VENV)/.train
	$(BIN)/loda train

test: $(VENV)/.test
	$(BIN)/pytest -n auto

# One thread and one worker: the ratios are printed as they are measured.
bench: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/benchmarks -p no:xdist

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# One stamp an extra: nothing is installed twice unless the project file or the pins changed.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist
