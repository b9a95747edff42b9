# qmqp-relay: targets for users and developers. `make` alone lists them.
#
# Every target first sets up what it needs, which is quick when nothing has changed. It uses only venv, and pip with the
# locked hashes, so you need no root, no compiler and no Docker.

.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?=
export PYTHON
BIN := .venv/bin
# A test waits more than it computes, so three at once are right for two cores. Example: make test TESTS="tests/unit -x"
TESTS ?= tests
PYTEST_WORKERS ?= 3
# For `make soak`: the number of histories for each database and variant, and the most seconds for each of its four tests.
EXAMPLES ?= 1000
SOAK_TIMEOUT ?= 14400

# For `make fuzz`: how long each target runs.
SECONDS ?= 60

.PHONY: help setup run demo status test soak fuzz coverage lint fmt bench lock clean

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## create .venv with the relay, its tests and linters
	@scripts/setup dev

run: ## run the relay in the foreground, in ./var; with --demo unless RELAY_QMQP_SERVERS is set
	@scripts/setup
	@exec $(BIN)/qmqp-relay up $(if $(RELAY_QMQP_SERVERS)$(RELAY_QMQP_SERVERS_FILE),,--demo)

demo: ## send real messages through a temporary relay, and print the state of each (a minute)
	@scripts/setup
	@exec $(BIN)/qmqp-relay demo

status: ## show the queue of the relay that `make run` started
	@scripts/setup
	@exec $(BIN)/qmqp-relay stats

test: ## run all tests: SQLite, PostgreSQL, a real broker (TESTS=path to choose)
	@scripts/setup dev
	@exec $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(TESTS)

soak: ## test the queue against its model: a thousand histories for each database (EXAMPLES=n; ten minutes)
	@scripts/setup dev
	@RELAY_TESTS_EXAMPLES=$(EXAMPLES) exec $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --timeout $(SOAK_TIMEOUT) \
	  tests/integration/test_state_machine.py

fuzz: ## give the parsers bytes that reach new code (SECONDS=n for each; needs Linux on x86_64)
	@scripts/setup dev
	@exec $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

coverage: ## run the tests and report their branch coverage (TESTS=path to choose)
	@scripts/setup dev
	@rm -rf .coverage
	@$(BIN)/coverage run -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(TESTS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

lint: ## check code (ruff, strict mypy), directions of imports, and the English of the pages
	@scripts/setup dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python scripts/prose.py

fmt: ## format, and fix what ruff can fix
	@scripts/setup dev
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: ## measure messages per second on this machine
	@scripts/setup dev
	@exec $(BIN)/python -m bench

lock: ## update the lock files to newer dependencies (needs uv)
	@scripts/lock

clean: ## remove .venv and caches; mail in ./var stays
	rm -rf .venv .fuzz .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .coverage build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
