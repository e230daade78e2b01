# Everything runs in one environment, $(VENV), made once by pip and made again only when pyproject.toml or
# constraints.txt change; nothing needs the network after that.
#
#   make test PYTHON=python3.12 VENV=.venv312     another interpreter, beside the first
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                                 the small CPU build of torch instead of the one with CUDA
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

SHELL := /bin/bash
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# lmms-eval's pins clash with ours, so its tests have an environment of their own.
LMMS_VENV ?= .venv-lmms
LMMS_INSTALLED := $(LMMS_VENV)/.installed
LMMS_PIP := $(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
LMMS_PIP += -c tests/lmms/constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-all test-lmms demo bench clean

help:
	@echo "make test      lint, format, types and the fast tests"
	@echo "make test-all  the slow tests, those that make test leaves out"
	@echo "make test-lmms the plugin inside the real lmms-eval; NEXUS_DEMO=DIR names a finished demo"
	@echo "make demo      train, evaluate and report a tiny model: runs/demo/report.html"
	@echo "make bench     our parts against published ones, long and on a quiet machine: benchmarks/results/"
	@echo "make clean     remove the environment, caches and build products; runs/ stays"

install: $(INSTALLED)

# The builder is installed first and used without isolation, so that it is pinned like everything else and a second
# install finds it without the network.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nexus needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another, as in make $(MAKECMDGOALS) PYTHON=python3.12" % sys.version_info[:2])'
	@echo "installing into $(VENV), a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout 1800

test-lmms: $(INSTALLED) $(LMMS_INSTALLED)
	$(BIN)/python tests/lmms/run.py --python $(LMMS_VENV)/bin/python --command $(BIN)/nexus

# Of lmms-eval's own requirements only what it imports before its first task; ours are not needed there at all.
$(LMMS_INSTALLED): pyproject.toml tests/lmms/constraints.txt
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_PIP) $$(sed -n 's/^# needs: //p' tests/lmms/constraints.txt)
	$(LMMS_PIP) --no-deps lmms-eval
	$(LMMS_PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nexus demo --out runs/demo

bench: $(INSTALLED)
	$(BIN)/nexus bench --out benchmarks/results

clean:
	rm -rf $(VENV) $(LMMS_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find nexus tests -name __pycache__ -type d -prune -exec rm -rf {} +
