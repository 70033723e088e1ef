# Needs Python 3.11 or later with pip; everything else is installed into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the checkout has its own cache of samples unless WANDAZETA_CACHE names another
export WANDAZETA_CACHE ?= $(CURDIR)/.cache/wandazeta
# DeepSpeed would compile its kernels at install
export DS_BUILD_OPS := 0
# mkdocs-material advertises its successor otherwise
export NO_MKDOCS_2_WARNING := 1
# two processes with several threads each on the same cores are four times slower: one thread each, two tests at a time
TEST_THREADS ?= 1
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup samples demo gpu-check test lint installed types contracts docs dist format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-9s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## create .venv with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or later is needed; run make PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools wheel
# torch first: DeepSpeed's own set-up asks for it
	$(BIN)/python -m pip install -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[all,docs,dev]"
	touch $@

samples: setup  ## fetch and convert the sample model and texts
	$(BIN)/python -m wandazeta.data.samples

demo: samples  ## prune SmolLM2-135M, fine-tune it, show the table
	$(BIN)/wandazeta fit -c configs/demo.yaml
	$(BIN)/python benchmarks/demo.py

# without a GPU, with tiny shapes and without the samples
gpu-check: setup  ## check correctness, time and memory on the GPU; see benchmarks/gpu/README.md
	$(BIN)/python benchmarks/gpu/check.py

test: samples  ## run every test
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: setup  ## check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# mypy and import-linter read packages by folder, and only the wheel has callbacks/, modules/ and datamodules/ inside
# wandazeta/; an old build/ would end up in the wheel
installed: setup
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/installed .

types: installed  ## check types, over the package as installed from its wheel
	cd build/installed && MYPYPATH=. $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p wandazeta

contracts: installed  ## check which package imports which, over the package as installed from its wheel
	cd build/installed && PYTHONPATH=. $(abspath $(BIN))/lint-imports $(CURDIR)/pyproject.toml --no-cache

docs: installed  ## build the documentation site into build/site; a warning is an error
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

dist: setup  ## build the packages into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation > /dev/null
	$(BIN)/python -m twine check --strict dist/*

format: setup  ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make made, except samples and runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
