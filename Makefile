# Everything runs in a virtual environment of its own, which each target makes as far as it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests start hundreds of processes. Without bytecode files each would compile the package, and each worker all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-gpu campaign lint format docs wheel clean

demo: $(VENV)/installed  ## build a kernel on demand, check it against PyTorch, load it again from the cache
	$(BIN)/jitnorm demo

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10

test: $(VENV)/installed-dev  ## the tests that this machine can run, but for the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev  ## the slow ones: sweeps over architectures, operators and faults
	$(PYTEST) -m slow

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu

FAULTS ?= 10000
CALLS ?= 100000
SEED ?= 1
WORKERS ?= 2
campaign: $(VENV)/installed-dev  ## random faults of the engine and random calls: docs/faults.md
	PYTHONPATH=tests $(BIN)/python -m faults --faults $(FAULTS) --calls $(CALLS) --seed $(SEED) --workers $(WORKERS)

lint: $(VENV)/installed-dev  ## ruff, mypy, import-linter and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: $(VENV)/installed-dev  ## the documentation, into build/site; without the network, and every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: $(VENV)/installed-dev  ## dist/jitnorm-*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

CXX_SOURCES := $(wildcard csrc/include/jitnorm/*.h csrc/elementwise/*.h csrc/elementwise/*.cuh csrc/attention/* csrc/decode_step/* csrc/gemm/*.h csrc/gemm/*.cuh csrc/launcher/*)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e . numpy  # torch warns without numpy
	touch $@

# nvcc comes with it, so that the CUDA sources are compiled, and tested as far as that goes, without a GPU.
$(VENV)/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[bench,dev,docs,nvcc,nvrtc]'
	touch $@ $(VENV)/installed
