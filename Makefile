# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SOAK_SECONDS ?= 600
BENCH_FLAGS ?=
PYTEST_FLAGS ?=
TEST_JOBS ?= 2
MUTANTS_FLAGS ?= --sample 500 --seed 1
SIMULATE_FLAGS ?= --seeds 1000 --jobs 2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
BENCHMARKS := copies disk tree kinds flat replay multiturn

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format bench soak mutants simulate clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

# torch by itself and first: which build of it suits the machine is pip's to decide, once.
$(STAMP): pyproject.toml Makefile
	@echo "setting up .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[dev]"
	@touch $@

venv: $(STAMP)  ## make .venv with everything in it

demo: $(STAMP)  ## chat with a small model: without reuse, with three tiers, after a restart; live
	@OMP_WAIT_POLICY=passive $(BIN)/tiertree demo

test: $(STAMP)  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_FLAGS)

lint: $(STAMP)  ## check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --strict src

format: $(STAMP)  ## format, and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)  ## measure; peers only where they are installed (BENCH_FLAGS=--quick for a glance)
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py $(BENCH_FLAGS)"; \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py $(BENCH_FLAGS); \
	done

soak: $(STAMP)  ## run the long tests for SOAK_SECONDS (600)
	@OMP_NUM_THREADS=1 SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/pytest -m soak $(PYTEST_FLAGS)

simulate: $(STAMP)  ## 100,000 requests in made-up worlds where anything goes wrong (SIMULATE_FLAGS)
	@OMP_NUM_THREADS=1 $(BIN)/tiertree simulate $(SIMULATE_FLAGS)

mutants: $(STAMP)  ## plant 500 small faults, one at a time: which of them does no test notice? (MUTANTS_FLAGS)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS_FLAGS)

clean:  ## remove .venv and whatever tools leave behind
	@rm -rf .venv build dist src/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
