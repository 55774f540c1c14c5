# Two commands for a newcomer: `make run` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker a core, and one thread a worker.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# JAX compiles for every shape: what says most about it in little time. `make full` has the rest.
JAX_TESTS := $(addprefix tests/test_,libraries.py theory_page.py frameworks_page.py)
MLX_TESTS := $(addprefix tests/test_,libraries.py other_libraries.py frameworks_page.py)
# What a version that is too old breaks first: layers, steps, settings, data, files, reports.
TRAIN_TESTS := $(addprefix tests/test_,torch_math.py torch_layers.py torch_lora.py torch_gao.py \
	torch_moments.py torch_loda.py config.py cli.py train.py checkpoint.py transforms.py \
	backbones_build.py readouts.py report_tables.py report_runs.py)
WITH_JAX := $(ONE_THREAD) LODA_LIBRARIES=jax,jax-x32
# One worker has all tests of a file, whose runs and processes they share.
PYTEST = $(ONE_THREAD) $(BIN)/pytest -n auto --dist loadfile

.PHONY: run test gate full gpu jax-all mlx integrations minimum test-numpy mutants bench bench-gpu attack soak faults docs lint types clean

run: $(VENV)/.train
	$(BIN)/loda train

# All but what takes more than a few seconds: three minutes on two idle cores.
test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu and not jax"

# What .ci/run adds to that: the slow tests that say most, and those of JAX that take least.
gate: $(VENV)/.test
	$(PYTEST) -m "gate and not gpu and not jax"
	$(WITH_JAX) $(BIN)/pytest -n auto -m "jax and not slow" $(JAX_TESTS)

# What neither of them runs, by hand before a release: over an hour on two cores.
full: gpu jax-all mlx integrations minimum soak faults
	$(PYTEST) -m "slow and not gate and not gpu and not jax"

# One process: tests of memory and of waiting mind each other. Skipped where there is no GPU.
gpu: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/pytest -p no:xdist -m gpu

# File by file, for what JAX has compiled stays in memory. 5: a file without such tests.
jax-all: $(VENV)/.test
	for file in tests/test_*.py; do $(WITH_JAX) $(BIN)/pytest -q -m jax $$file || test $$? = 5 || exit 1; done

# The mathematics on MLX, and on what cannot solve, in an environment of their own.
mlx: .venv-mlx/.done
	$(ONE_THREAD) LODA_LIBRARIES=mlx .venv-mlx/bin/pytest @tests/numpy_only.txt $(MLX_TESTS)

# Every recipe of docs/loops.md, and runs exported to every format, in an environment of their own:
# Avalanche brings much with it.
integrations: .venv-integrations/.done
	$(ONE_THREAD) .venv-integrations/bin/pytest \
		$(addprefix tests/test_,loops_page.py torch_peft.py analysis_export.py use_page.py)

# The lowest versions that pyproject.toml allows, exactly those, in an environment of their own.
minimum: .venv-minimum/.done
	$(ONE_THREAD) LODA_LIBRARIES=numpy,torch,array_api_strict \
		.venv-minimum/bin/pytest @tests/numpy_only.txt
	$(WITH_JAX) .venv-minimum/bin/pytest -m jax tests/test_libraries.py
	$(ONE_THREAD) .venv-minimum/bin/pytest -m "not slow and not gpu and not jax" $(TRAIN_TESTS)

# The mathematics on NumPy alone, without torch: seconds.
test-numpy: $(VENV)/.test
	$(ONE_THREAD) LODA_LIBRARIES=numpy $(BIN)/pytest @tests/numpy_only.txt -p no:xdist

# An interrupted run goes on where it stopped; `make clean` starts anew. JOBS=8 for eight at a time.
mutants: $(VENV)/.dev
	$(ONE_THREAD) LODA_LIBRARIES=numpy HYPOTHESIS_PROFILE=mutants $(BIN)/mutmut run --max-children $(or $(JOBS),1)
	$(BIN)/python docs/developers/mutation_table.py

# One thread and one worker: the ratios are printed as they are measured.
bench: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/pytest tests/benchmarks -p no:xdist

# On a machine with a GPU, within ten minutes: the table of a ViT-B, with the name of the machine.
bench-gpu: $(VENV)/.test
	$(BIN)/pytest tests/benchmarks/test_gpu_speed.py -p no:xdist

# Oracles of 60 digits and others: how many cases were tried, how many held. Some minutes.
attack: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python docs/developers/numerics_attack.py

# Fifty tasks, ended at random moments: ten minutes on an idle core.
soak: $(VENV)/.test
	rm -rf build/soak
	$(ONE_THREAD) $(BIN)/python tests/soak.py build/soak

# Faults at single file operations, killed processes: how often tried, how often held. Half an hour.
faults: $(VENV)/.test
	rm -rf build/faults
	$(ONE_THREAD) $(BIN)/python tests/faults.py build/faults

# The site, in build/docs: a minute and a half on a core. Warnings are errors; both notebooks run.
docs: $(VENV)/.docs
	$(ONE_THREAD) $(BIN)/sphinx-build -W --keep-going -q -d build/doctrees docs build/docs

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

.venv-mlx/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[mlx,other-libraries,maths-tests]'
	touch $@

.venv-integrations/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[integrations,export,maths-tests]'
	touch $@

.venv-minimum/.done: pyproject.toml tests/minimum.py
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python tests/minimum.py train jax maths-tests > .venv-minimum/pins.txt
	.venv-minimum/bin/python -m pip install --quiet --constraint .venv-minimum/pins.txt \
		--editable '.[train,jax,maths-tests]'
	touch $@

clean:
	rm -rf $(VENV) .venv-mlx .venv-integrations .venv-minimum build dist mutants
