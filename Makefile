# The first target that needs it creates .venv and installs the package into it (a few GB, once).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCATTER := $(VENV)/.torch-scatter

.PHONY: help demo test test-slow test-scatter test-lowest test-newest lint format docs model-zoo clean

help: ## list all targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 22

# The stamp is written last, so an interrupted installation is repeated.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gm-mlic needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) (once; a few GB)."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## run the demo (3 minutes on 2 cores)
	$(BIN)/gm-mlic demo

test: $(INSTALLED) ## run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not scatter"

test-slow: $(INSTALLED) ## run the slow tests: kills, full disks, multiple processes, exports, compilation (about 25 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# torch-scatter has no binary wheel on PyPI, so it is built against the installed torch.
$(SCATTER): $(INSTALLED)
	$(BIN)/python -m pip install --no-build-isolation --no-cache-dir -c constraints.txt torch-scatter
	@touch $@

test-scatter: $(SCATTER) ## build torch-scatter (needs a C++ compiler, takes minutes) and run its tests
	$(BIN)/python -m pytest -m scatter

# What has to work with every version that setup.cfg admits.
CORE := tests/nn tests/graphs tests/metrics tests/test_losses.py tests/test_targets.py tests/test_schema.py
PYTHON_LOWEST ?= python3.10
PYTHON_NEWEST ?= python3.13

test-lowest: ## run a small training and the core tests with the lowest versions that setup.cfg admits
	rm -rf .venv-lowest
	$(PYTHON_LOWEST) -m venv .venv-lowest
	sed -nE '/^install_requires/,/^$$/ s/^ *([a-z0-9-]+)>=([0-9.]+).*/\1==\2/p' setup.cfg > .venv-lowest/versions.txt
	$(call core,.venv-lowest,-c .venv-lowest/versions.txt)

test-newest: ## run a small training and the core tests with the newest versions that setup.cfg admits
	rm -rf .venv-newest
	$(PYTHON_NEWEST) -m venv .venv-newest
	$(call core,.venv-newest,)

define core
$(1)/bin/python -m pip install --quiet $(2) . pytest pytest-timeout hypothesis scikit-learn scipy
$(1)/bin/python -m pip list --format=freeze > $(1)/installed.txt
cd $(1) && OMP_NUM_THREADS=1 bin/gm-mlic train experiment=scenes_smoke run_dir=run instances.root=stores
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -m "not slow and not scatter" $(CORE)
endef

lint: $(INSTALLED) ## run ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED) ## format the code with ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(INSTALLED) ## build the site in docs/_build/html (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n docs docs/_build/html

model-zoo: $(INSTALLED) ## generate MODEL_ZOO.md from the registry, shipped models and studies
	$(BIN)/python docs/model_zoo.py

clean: ## remove generated files, but not runs/ and data/
	rm -rf $(VENV) .venv-lowest .venv-newest build dist docs/_build docs/generated src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
