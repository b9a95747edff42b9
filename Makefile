# qmqp-relay: what can be done with a clone. `make` alone explains.
#
# Every target sets up what it needs first; that is quick when nothing has changed. Python's own tools do the work (venv
# and pip with the locked hashes), so neither root nor a compiler nor Docker is needed.

.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?=
export PYTHON
BIN := .venv/bin
# A test waits more than it computes, so three at once are right for two cores. `make test TESTS="tests/unit -x"`.
TESTS ?= tests
PYTEST_WORKERS ?= 3
# `make soak`: histories a database and variant, and the seconds that one of these four tests may take.
EXAMPLES ?= 1000
SOAK_TIMEOUT ?= 14400

.PHONY: help setup run demo status test soak coverage lint fmt bench lock clean

help: ## say what there is (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with the relay, its tests and linters
	@scripts/setup dev

run: ## the relay in the foreground, in ./var; --demo unless RELAY_QMQP_SERVERS is set
	@scripts/setup
	@exec $(BIN)/qmqp-relay up $(if $(RELAY_QMQP_SERVERS)$(RELAY_QMQP_SERVERS_FILE),,--demo)

demo: ## send real messages through a relay of its own, and show what becomes of each (a minute)
	@scripts/setup
	@exec $(BIN)/qmqp-relay demo

status: ## how many messages are where, of the relay that `make run` started
	@scripts/setup
	@exec $(BIN)/qmqp-relay stats

test: ## all tests: SQLite, PostgreSQL, a real broker (TESTS=path to choose)
	@scripts/setup dev
	@exec $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(TESTS)

soak: ## the queue against its model, a thousand histories a database (EXAMPLES=n to choose; an hour)
	@scripts/setup dev
	@RELAY_TESTS_EXAMPLES=$(EXAMPLES) exec $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --timeout $(SOAK_TIMEOUT) \
	  tests/integration/test_state_machine.py

coverage: ## the tests, and how many branches they run, in percent (TESTS=path to choose)
	@scripts/setup dev
	@rm -rf .coverage
	@$(BIN)/coverage run -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(TESTS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

lint: ## ruff, strict mypy, the direction of imports, the English of the pages
	@scripts/setup dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python scripts/prose.py

fmt: ## format, and mend what ruff can mend
	@scripts/setup dev
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: ## messages per second on this machine
	@scripts/setup dev
	@exec $(BIN)/python -m bench

lock: ## choose newer dependencies (needs uv)
	@scripts/lock

clean: ## remove .venv and caches; mail in ./var stays
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .coverage build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
