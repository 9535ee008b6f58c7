# make demo: sets up .venv, then runs the model that ships.   make test: sets up, then every check and test.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for where no torch in the supported range is there yet.
TORCH ?= torch==2.13.0

# Tests run in as many processes as there are cores, eight at most, each with one thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); if [ $$n -gt 8 ]; then echo 8; else echo $$n; fi)
PARALLEL = -n $(WORKERS) --dist worksteal

BIN := $(VENV)/bin
STAMP := $(VENV)/.ktfx-ready
PACKAGE := pyproject.toml setup.py $(wildcard ktfx/cpu_kernels/*.cpp ktfx/cpu_kernels/*.h ktfx/cpu_kernels/*.inl)

.PHONY: help setup demo test test-slow lint bench native-sanitize native-aarch64 clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## make .venv and install ktfx with all that its tests need

# pip is told nothing of where to get packages from: its own configuration and environment say that.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_IS_THERE := import torch, sys; v = torch.__version__.split("."); sys.exit(not (2, 11) <= (int(v[0]), int(v[1])) < (2, 14))

$(STAMP): $(PACKAGE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "ktfx needs Python 3.11 or newer, and this is $$($(PYTHON) --version): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { \
		echo "no C++ compiler ($${CXX:-g++}): install g++; Inductor and the CPU kernels need it"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c '$(TORCH_IS_THERE)' 2>/dev/null || { echo "installing $(TORCH) into $(VENV)"; $(PIP) '$(TORCH)'; }
	@echo "installing ktfx into $(VENV) and compiling its CPU kernels; this takes some minutes"
	@$(PIP) --editable '.[test]'
	@touch $@

demo: setup ## run the small model that ships, on two simulated GPUs and the host
	$(BIN)/ktfx run

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## every check, and every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: setup ## the tests marked slow: Inductor demos, 12-layer sharing, every shipped rule file, benchmarks' checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PARALLEL)

bench: setup ## the pytest-benchmark suites
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

# The CPU kernels and their driver, without Python, under the address, undefined-behaviour and thread sanitizers.
native-sanitize: ## the CPU kernels under sanitizers
	tests/native/sanitize.sh

native-aarch64: ## the CPU kernels cross-compiled for aarch64, and run under qemu
	tests/native/aarch64.sh

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build ktfx.egg-info ktfx/cpu_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
