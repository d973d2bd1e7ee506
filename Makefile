# The environment is made once and again whenever what it is made of changes; everything else runs inside it.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# Interprets our kernels, and compiles them for GPUs, where there is none. torch for CUDA brings the one it needs.
TRITON := triton==3.7.1

.PHONY: help setup demo bench-queue chaos outage load test check format docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## Create .venv and install everything into it

# torch goes in first and alone, at the pinned version: no later package can then pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) on PATH: Millrace needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Millrace needs Python 3.11 or newer; this is $$($(PYTHON) -V). Set PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@if [ "$$(uname)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
		$(BIN)/python -m pip install -q --disable-pip-version-check '$(TRITON)'; \
	fi
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[worker,postgres,parquet,flower,tune,dev]'
	touch $(STAMP)

demo: $(STAMP)  ## Answer examples/prompts.jsonl with the bundled model, on whatever this machine has
	$(BIN)/millrace run examples/prompts.jsonl -o out/results.jsonl

chaos: $(STAMP)  ## Kill workers, engines and servers at random while a Job runs, and check every line (ROUNDS=1 SEED=0)
	$(BIN)/python -m benchmarks.chaos --rounds $(or $(ROUNDS),1) --seed $(or $(SEED),0)

outage: $(STAMP)  ## Take Redis, the database and both away for a minute while a Job runs, and check every line
	$(BIN)/python -m benchmarks.outage

load: $(STAMP)  ## Many users at once against a system of their own; a report in out/load.html (USERS=100 TIME=60s)
	$(BIN)/python -m benchmarks.load --users $(or $(USERS),100) --time $(or $(TIME),60s)

bench-queue: $(STAMP)  ## Prompts per second through the queue, against plain Celery
	$(BIN)/python -m benchmarks.bench_queue

# Two at a time: most of a test of processes is waiting for one.
test: $(STAMP)  ## Run all tests
	$(BIN)/python -m pytest -n 2

check: $(STAMP)  ## Format, lint, types and import rules, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## Write docs/settings.md and docs/cli.md from the code
	$(BIN)/python -m docs.generate

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) out .millrace *.egg-info
