# Overtone. `make` shows what there is; `make up` and `make test` need nothing but Python 3.11+ and make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help up down status test drill lint format bench bench-full fuzz clean

VENV := .venv
BIN := $(VENV)/bin
# Options of the command behind a target, such as: make up ARGS="--for 90s --json"
ARGS ?=
# In this order: what is quick and needs nothing comes first.
SUITES ?= unit integration cluster model e2e
# Files of unit and integration tests; the other suites have the machine to themselves. Those of unit tests compute on one
# thread each: two that share two cores would wait for each other's threads.
TESTS_AT_ONCE ?= 2
CONSTRAINTS := $(wildcard constraints.txt)
# The interpreter for .venv; the newest that is known to work, unless you choose one.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	command -v $$name >/dev/null 2>&1 && $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& $$name -c 'import venv, ensurepip' 2>/dev/null && { command -v $$name; break; }; done)

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(VENV)/.installed ## Install what is missing, start everything, print the addresses. ARGS="--for 90s --json"
	@exec $(BIN)/overtone up $(ARGS)

down: $(VENV)/.installed ## Stop everything that `make up` started
	@exec $(BIN)/overtone down $(ARGS)

status: $(VENV)/.installed ## Show what runs
	@exec $(BIN)/overtone status $(ARGS)

test: $(VENV)/.installed-dev ## Run every test, the quick ones first. ARGS="-k batcher"
	@failed=""; report=""; \
	for suite in $(SUITES); do \
		echo "== tests/$$suite"; status=0; threads=""; \
		[ $$suite != unit ] || threads="OMP_NUM_THREADS=1"; \
		case $$suite in unit | integration) beside="-n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder";; *) beside="";; esac; \
		env $$threads $(BIN)/python -m pytest tests/$$suite $$beside $(ARGS) 2>&1 | tee $(VENV)/test-$$suite.log || status=$$?; \
		[ $$status -eq 0 ] || [ $$status -eq 5 ] || failed="$$failed $$suite"; \
		said=$$(grep -E '^=+ .* in [0-9.]+s' $(VENV)/test-$$suite.log | tail -n 1 | sed -E 's/^=+ | =+$$//g' || true); \
		report="$$report$$(printf '%-12s %s' "$$suite" "$${said:-ended with status $$status}")\n"; \
	done; \
	for suite in $$failed; do echo; echo "== what failed in tests/$$suite"; \
		grep -aE '^(E  |FAILED |ERROR |tests/.*: in )' $(VENV)/test-$$suite.log | cut -c -300 | tail -n 60 || true; done; \
	printf '\n%b' "$$report"; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

drill: $(VENV)/.installed-dev ## Lose the head, a node and a version of the code under load; needs root. About 10 minutes
	$(BIN)/python -m pytest tests/cluster -m drill -s $(ARGS)

lint: $(VENV)/.installed-dev ## Check format, style, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev ## Measure texts a second of the engine and through the API. ARGS="--quick"
	@exec $(BIN)/python -m benchmarks $(ARGS)

bench-full: $(VENV)/.installed-dev ## Measure everything, other servers too; plots, the table in README. About 1.5 hours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'$(CONSTRAINTS:%= -c %)
	$(BIN)/python -m benchmarks.peers install || true
	@exec $(BIN)/python -m benchmarks --full $(ARGS)

fuzz: $(VENV)/.installed-dev ## Spoilt lines through parser and writer, for ten minutes. ARGS="--minutes 1 --seed 7"
	@exec $(BIN)/python -m benchmarks.fuzz $(ARGS)

clean: ## Remove .venv and caches (not your data: that is in OVERTONE_HOME)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.made:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Overtone needs Python 3.11, 3.12 or 3.13 with venv." >&2; \
		echo "Debian and Ubuntu: apt install python3 python3-venv   macOS: brew install python@3.13" >&2; \
		echo "Or name one: make up PYTHON=/path/to/python3.13" >&2; exit 1; \
	fi
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	@echo "Installing what is needed into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .$(CONSTRAINTS:%= -c %)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	@echo "Installing what training and the tests need into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,dev]'$(CONSTRAINTS:%= -c %)
	@touch $@ $(VENV)/.installed
