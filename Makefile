# Everything runs in an environment of its own, .venv, made on first use: a fresh machine needs Python and make only.
PYTHON ?= python3
VENV ?= .venv
# What `make` installs as torch: this CPU release is the one the project is tested with. For a GPU: make env TORCH=torch
TORCH ?= torch==2.13.0
# Processes that run tests, each with one thread: a number, or one a core.
WORKERS ?= logical
BIN := $(VENV)/bin
PY := $(BIN)/python
# Nothing here may ask a model hub: a test or demo that would is a mistake, and says so at once.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env install test lint format bench codegen reproduce demo model wheel clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

env: $(VENV)/.torch ## make the environment .venv, with torch

install: $(VENV)/.installed ## install the project into it, editable, with all it needs to be developed

test: install model ## run the linter and the tests
	$(BIN)/ruff check .
	$(PY) -m pytest -n $(WORKERS) --maxprocesses=8 --dist worksteal -p no:benchmark --durations=10

lint: install ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install model ## measure encoding and every operation against their peers, in one run
	$(PY) -m benchmarks.encode
	$(PY) -m benchmarks.contrastive
	$(PY) -m benchmarks.attention
	$(PY) -m benchmarks.cross_entropy
	$(PY) -m benchmarks.elementwise
	$(PY) -m benchmarks.train

codegen: install ## compile every kernel for GPUs that need not be here, and hold the machine code to the gate
	$(PY) -m benchmarks.codegen --json benchmarks/results/codegen.json --markdown benchmarks/results/codegen.md

reproduce: install ## train the recipe on a real model and fill in the paper's table; goes on where it was stopped
	$(PY) -m benchmarks.reproduce

demo: install demo/docstrings.jsonl demo/model ## embed 10,000 real texts with a real model and its adapter, then ask
	$(BIN)/llm2vec-fast embed demo/docstrings.jsonl --model demo/model --adapter smollm2-135m --output demo/embeddings \
	  --id-column id --text-column text --keep-columns text --normalize --doc-max-length 64
	$(BIN)/llm2vec-fast search demo/embeddings --top-k 5 \
	  "read rows of a csv file" "run a command in another process and read its output" "turn an object into json"

model: install
	@$(PY) -m benchmarks.fetch.smollm2

wheel: install ## build the wheel into dist/
	$(PY) -m pip wheel -qq --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## delete the environment, the demo and everything built (the fetched model stays in its cache)
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

demo/docstrings.jsonl: | install
	@$(PY) -m benchmarks.fetch.docstrings $@

demo/model: | install
	@mkdir -p demo
	@ln -sfn "$$($(PY) -m benchmarks.fetch.smollm2)" $@

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq "$(TORCH)"
	@touch $@

# pip before 23.1 would build seqeval with a setup.py that finds half of what it needs.
$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml constraints.txt
	$(PY) -m pip install -qq --use-pep517 --constraint constraints.txt --editable '.[dev]'
	@touch $@
