# `make` lists what can be made. Everything runs from a virtual environment in .venv.

PYTHON ?= python3
# Any pip requirement, wheel file or options: see CONTRIBUTING.md for a build without CUDA.
TORCH ?= $(shell grep '^torch==' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything that the targets below need

# torch goes in first and on its own, so that TORCH alone decides which build that is. Some pinned versions
# need Python 3.11: on 3.10 pip chooses.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	sed -e '/^torch==/d' -e '/==/s/$$/ ; python_version >= "3.11"/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[compare,dev]'
	@touch $@

demo: $(STAMP) ## train one network with and without batch normalization, and write a page about it
	$(BIN)/batchnorm compare

test: $(STAMP) ## run the tests, the docstring examples and the examples of README and docs
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

lint: $(STAMP) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

constraints: $(STAMP) ## pin in constraints.txt what .venv holds now
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//'; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt
	@touch $(STAMP)

clean: ## remove .venv and all that was built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
