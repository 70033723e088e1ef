# Needs Python 3.11 or later with pip; everything else is installed into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# samples stay with the checkout unless told otherwise
export WANDAZETA_CACHE ?= $(CURDIR)/.cache/wandazeta
# DeepSpeed would compile its kernels at install
export DS_BUILD_OPS := 0
# processes that share cores are four times slower with several threads each: one each, and two tests at a time
TEST_THREADS ?= 1
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup samples demo test lint types format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-9s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## create .venv with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or later is needed; run make PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools wheel
# torch first: DeepSpeed's own set-up asks for it
	$(BIN)/python -m pip install -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[samples,deepspeed,lora,dev]"
	touch $@

samples: setup  ## fetch and convert the sample model and texts
	$(BIN)/python -m wandazeta.data.samples

demo: samples  ## prune SmolLM2-135M, fine-tune it, show the table
	$(BIN)/wandazeta fit -c configs/demo.yaml
	$(BIN)/python benchmarks/demo.py

test: samples  ## run every test
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: setup  ## check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup  ## check types, over the package as installed from its wheel
# mypy cannot follow the mapping of folders to packages, and a stale build/ would end up in the wheel
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p wandazeta

format: setup  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make made, but for the samples and runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
