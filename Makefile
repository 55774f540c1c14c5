# Two commands for a newcomer: `make run` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker a core, and one thread a worker.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# JAX compiles for every shape: what says most about it in little time. CONTRIBUTING.md has the rest.
JAX_TESTS := $(addprefix tests/test_,libraries.py theory_page.py frameworks_page.py)

.PHONY: run test test-numpy mutants bench soak lint types clean

run: $(VENV)/.train
	$(BIN)/loda train

test: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/pytest -n auto
	$(ONE_THREAD) LODA_LIBRARIES=jax,jax-x32 $(BIN)/pytest -n auto -m jax $(JAX_TESTS)

# The mathematics on NumPy alone, without torch: seconds.
test-numpy: $(VENV)/.test
	$(ONE_THREAD) LODA_LIBRARIES=numpy $(BIN)/pytest @tests/numpy_only.txt -p no:xdist

# An interrupted run goes on where it stopped; `make clean` starts anew. JOBS=8 for eight at a time.
mutants: $(VENV)/.dev
	$(ONE_THREAD) LODA_LIBRARIES=numpy HYPOTHESIS_PROFILE=mutants $(BIN)/mutmut run --max-children $(or $(JOBS),1)
	$(BIN)/python docs/mutation_table.py

# One thread and one worker: the ratios are printed as they are measured.
bench: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/pytest tests/benchmarks -p no:xdist

# Fifty tasks, ended at random moments: ten minutes on an idle core. `make clean` before the next.
soak: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python tests/soak.py build/soak

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
	rm -rf $(VENV) build dist mutants
