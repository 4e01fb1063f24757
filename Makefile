# `make up` and `make test` need a Python ≥ 3.10 and nothing else installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE ?= .farrier/demo
PORT ?= 8000
EXTRAS ?= cpu$(shell test -e /dev/nvidiactl && echo ,cuda,build-cuda)
SOURCES := $(shell find agent runtime targets plugins public -type f ! -name '*.pyc') pyproject.toml

.PHONY: up test lint bench clean

up: $(VENV)/.installed
	@$(BIN)/farrier detect
	@$(BIN)/farrier build demo -o $(ENGINE)
	@exec $(BIN)/farrier serve $(ENGINE) --port $(PORT)

# Tests and linters run against the installed package, not against the sources. Kernels run in a process of their own:
# Triton's interpreter has to be chosen before Triton is imported.
test: lint
	$(BIN)/pytest --cov --cov-report= tests/kernels
	$(BIN)/pytest --cov --cov-append --cov-report= tests/compile
	$(BIN)/pytest --cov --cov-append --cov-report= tests/integration
	$(BIN)/pytest --cov --cov-append --cov-report=term tests/unit

lint: $(VENV)/.dev $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.installed
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf $(VENV) .farrier build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "farrier needs Python 3.10 or later; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The build folder is removed because setuptools would install what it left there earlier.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed '.[$(EXTRAS)]'
	rm -rf build
	@touch $@

# torch is for the tests' reference only; a CPU build of it is not to be had for every Python everywhere.
$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet '.[dev]'
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
		then $(BIN)/python -m pip install --quiet torch==2.13.0; \
		else echo 'No CPU build of torch for this Python: tests against transformers will be skipped.'; fi
	@touch $@
