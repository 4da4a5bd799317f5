# `make` lists the targets; start with `make demo` or `make test`. They create the virtual environment that they need.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python from 3.10 to 3.12 that runs: version managers leave shims for versions that are not installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
# Number of parallel test processes: three suit two cores, because tests that start ranks spend much time waiting.
JOBS ?= 3
# Branch coverage of the slow tests and of the ranks that they start; `make test-slow COVERAGE=` leaves it out.
COVERAGE ?= --cov --cov-report=term --cov-report=html

.PHONY: help demo test test-slow test-slurm test-gpu test-nvme lint format hooks clean

help:  ## print this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## synthesise data, pre-train, fine-tune, evaluate, report: about 5 minutes on 2 cores
	$(BIN)/python tools/demo.py

test: $(STAMP) lint  ## run lint, type checks and fast tests, which must pass before every commit
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu and not slurm"

test-slow: JOBS = 2
test-slow: $(STAMP)  ## run the slow tests, which take more memory; their branch coverage goes to build/coverage
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "slow and not gpu and not slurm" $(COVERAGE)

test-slurm: $(STAMP)  ## run real jobs on a SLURM cluster that the tests start; needs root, on Linux
	$(BIN)/python -m pytest -q -rs -m slurm --slurm-report build/slurm-faults.md

test-gpu: $(STAMP)  ## run the tests that need a CUDA device; they are skipped without one
	$(BIN)/python -m pytest -q -rs tests/gpu

# Compile before the tests: this takes minutes, once per checkout, and a test's ranks would time out meanwhile.
test-nvme: export TORCH_EXTENSIONS_DIR = $(CURDIR)/build/torch_extensions
test-nvme: export DS_ACCELERATOR = cpu
test-nvme: $(STAMP)  ## run the tests of optimiser states on a disk; needs libaio with its headers, g++ and ninja
	CUDA_VISIBLE_DEVICES= $(BIN)/python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()'
	$(BIN)/python -m pytest -q -rs tests/parallel/test_nvme.py

lint: $(STAMP)  ## check style, docstrings, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(STAMP)  ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(STAMP)  ## install the checks of .pre-commit-config.yaml as git hooks of this clone
	$(BIN)/pre-commit install

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one or set PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:  ## remove the virtual environment, build/ and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
