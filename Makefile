# qmqp-relay: targets for users and developers. `make` alone lists them.
#
# Every target first sets up what it needs, which is quick when nothing has changed. It uses only venv, and pip with the
# locked hashes, so you need no root, no compiler and no Docker.

.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?=
export PYTHON
BIN := .venv/bin
# A test waits more than it computes, so five at once are right for two cores. Example: make test TESTS="tests/unit -x"
TESTS ?= tests
PYTEST_WORKERS ?= 5
# The tests of a file run in one process, which starts their programs once. Files start in their order: acceptance tests,
# which wait most, first, and unit tests, which are the shortest, last.
PYTEST := -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
# For `make soak`: the number of histories for each database and variant, and for the journal; the most seconds for a test.
EXAMPLES ?= 1000
SOAK_TIMEOUT ?= 14400
# For `make faults`: FULL=1 runs the whole matrix, CASES="worker killed,power cut" some faults, SEED=... an earlier run.
FULL ?=
CASES ?=
SEED ?=
JOBS ?= 3
# For `make endure`: the number of faults, one a minute.
MINUTES ?= 30

# For `make fuzz`: how long each target runs.
SECONDS ?= 60

.PHONY: help setup run demo status test soak fuzz faults endure coverage lint fmt bench docs picture wheel lock clean

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
	@exec $(BIN)/python $(PYTEST) $(TESTS)

soak: ## test queue and journal against their models: a thousand histories each (EXAMPLES=n; ten minutes)
	@scripts/setup dev
	@RELAY_TESTS_EXAMPLES=$(EXAMPLES) exec $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --timeout $(SOAK_TIMEOUT) \
	  tests/integration/test_state_machine.py tests/unit/test_journal_crashes.py

faults: ## inject faults while mail flows, and keep exact books (twenty minutes; FULL=1: the whole matrix)
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults $(if $(FULL),--full) --jobs $(JOBS) --cases "$(CASES)" --seed "$(SEED)"

endure: ## half load for MINUTES=30, with a random fault each minute and the same books
	@scripts/setup dev
	@exec $(BIN)/python -m tests.faults.endure --minutes $(MINUTES) --seed "$(SEED)"

fuzz: ## give the parsers bytes that reach new code (SECONDS=n for each; needs Linux on x86_64)
	@scripts/setup dev
	@exec $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

coverage: ## run the tests and report their branch coverage (TESTS=path to choose)
	@scripts/setup dev
	@rm -rf .coverage
	@$(BIN)/coverage run $(PYTEST) $(TESTS)
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

docs: ## build docs/ as a site into build/docs; a dead link is an error
	@scripts/setup dev
	@$(BIN)/sphinx-build -q -W --keep-going -n -b html -d build/doctrees -c docs . build/docs
	@echo "build/docs/index.html"

picture: ## take the picture of the page for README (needs Chromium)
	@scripts/setup dev
	@$(BIN)/python -m tests.picture docs/page.png

wheel: ## build the wheel into dist/
	@scripts/setup dev
	@scripts/wheel

lock: ## update the lock files to newer dependencies (needs uv)
	@scripts/lock

clean: ## remove .venv and caches; mail in ./var stays
	rm -rf .venv .python .fuzz .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .coverage build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
