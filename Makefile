# Needs python3 >= 3.11 and make, nothing installed by hand. `make PYTHON=python3.12 install` chooses another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := $(VENV)/oldest
QUANTIZERS := $(VENV)/quantizers
PROJECTS := $(wildcard core/pyproject.toml strategies/*/pyproject.toml plugins/*/pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick lint proof bench bench-peers docs clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make .venv with everything in it

$(STAMP): requirements.txt requirements-nodeps.txt $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Unspool needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.txt
	@touch $@

$(OLDEST): $(STAMP) requirements-oldest.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ -r requirements-oldest.txt
	@touch $@

$(QUANTIZERS): $(STAMP) requirements-quantizers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ -r requirements-quantizers.txt
	@touch $@

demo: $(STAMP)  ## Stream an answer of a real model, then one batch with several strategies
	@$(BIN)/python docs/demo/demo.py

# Threads that wait for each other do so asleep: several processes share the cores.
test test-quick: export OMP_WAIT_POLICY = passive
test: $(STAMP) $(OLDEST) $(QUANTIZERS)  ## Run all tests
	UNSPOOL_OLDEST_TRANSFORMERS=$(OLDEST) UNSPOOL_QUANTIZERS=$(QUANTIZERS) $(BIN)/python -m pytest

test-quick: $(STAMP)  ## Run the tests that take no longer than a few seconds each
	$(BIN)/python -m pytest -m 'not slow and not real_model'

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proof: $(STAMP)  ## Try every law on everything at length, and every planted fault (before a release; takes an hour)
	$(BIN)/python tests/power/proof.py

bench: $(STAMP)  ## Measure here, beside transformers: starts, speed, beams, what each row, token and draft costs (a quarter of an hour)
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/loop_cost.py
	$(BIN)/python benchmarks/throughput.py --repeats 1
	$(BIN)/python benchmarks/search.py --repeats 1 --dtypes float32 --prompts 128 --batches 1
	$(BIN)/python benchmarks/curves.py --quick

bench-peers: $(STAMP)  ## Install vLLM and llama.cpp into .peers and measure all in turn (needs a C++ compiler; takes hours)
	$(BIN)/python benchmarks/peers.py $(PEERS)

docs: $(STAMP)  ## Generate what can be generated
	$(BIN)/python docs/generate.py

clean:  ## Remove what was built
	rm -rf $(VENV) .peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
