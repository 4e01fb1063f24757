# `make up` and `make test` need nothing but Python ≥ 3.10 and this directory.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ENGINE ?= .farrier/demo
PORT ?= 8000
SOURCES := $(shell find agent runtime targets plugins farrier -name '*.py' -o -path 'farrier/demo/*.json' -o -path 'farrier/demo/*.safetensors') pyproject.toml README.md

.PHONY: up test lint bench clean

up: $(VENV)/.installed
	@exec $(BIN)/farrier up --engine $(ENGINE) --port $(PORT)
