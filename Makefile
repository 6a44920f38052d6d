# The two commands: `make demo` and `make test`. Everything they need is put into $(VENV); nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test build test-build test-cpp test-python explore lint format tidy wheel gpu slurm sanitize clean help

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: build  ## train, compress, fine-tune and measure a ResNet-20 on Fashion-MNIST
	$(BIN)/cctorch run configs/demo.yaml

test: test-build lint test-cpp test-python wheel  ## everything CI runs: C++ and Python tests, lint, types, wheel

$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "cctorch needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv is missing: apt install python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "Python.h is missing: apt install python3-dev"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing: apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

build: $(VENV)/.ready  ## compile and install into the virtual environment, editable
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install -q --no-build-isolation -e .

test-build: export CCTORCH_CMAKE_ARGS := -DCCTORCH_BUILD_TESTS=ON
test-build: build

test-cpp: test-build
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure -j 2

test-python: test-build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
	$(BIN)/python -m pytest --doctest-modules python/cctorch -o testpaths=python

explore: test-build  ## new random examples for the tests of properties; `make test` always draws the same
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=default

lint: test-build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format:  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Minutes of work for every file, so not a part of `make test`. FILES=... checks some. Configured apart, since clang
# can't read the headers that g++ precompiles.
tidy: FILES ?= $(shell git ls-files 'csrc/*.cpp')
tidy: $(VENV)/.ready  ## clang-tidy over the library's C++ sources
	$(BIN)/pip install -q clang-tidy==23.1.4
	$(BIN)/cmake -S . -B $(BUILD)-tidy -G Ninja -DCCTORCH_PRECOMPILED_HEADERS=OFF -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -DLIBTORCH_ROOT=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') >/dev/null
	printf '%s\n' $(FILES) | xargs -P 2 -n 1 $(BIN)/clang-tidy -p $(BUILD)-tidy --quiet \
	  --extra-arg=-idirafter$$(g++ -print-file-name=include)

# The wheel must import on a machine without compiler or source tree: install it aside and import it from there.
wheel: test-build  ## build the wheel into dist/ and import it
	rm -rf dist && $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	$(BIN)/pip install -q --no-deps --target dist/installed dist/*.whl
	cd dist && PATH=/nonexistent PYTHONPATH=installed ../$(BIN)/python -c \
	  'import cctorch; assert "installed" in cctorch.__file__, cctorch.__file__; print("wheel imports:", cctorch.__file__)'

gpu: CARD = docs/results/gpu/$(shell $(BIN)/python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))')
gpu: build  ## on a machine with a GPU: its tests and benchmarks; results under the card's name
	$(BIN)/python -m pytest tests/gpu
	mkdir -p $(CARD)
	$(BIN)/python benchmarks/ops.py --device cuda --gigabytes 2 --json $(CARD)/ops.json
	$(BIN)/python benchmarks/regularize.py --device cuda --model resnet56 --json $(CARD)/regularize_resnet56.json
	$(BIN)/python benchmarks/throughput.py --device cuda --model resnet56 --ranks 1 --steps 40 --cuda-graphs --out $(CARD)
	$(BIN)/python benchmarks/search.py --device cuda --output $(CARD)/search resnet50

slurm: build  ## as root, with slurm-wlm installed: the jobs of examples/slurm on two nodes that this machine poses as
	$(BIN)/python -m pytest -v tests/slurm

sanitize: $(VENV)/.ready  ## the C++ tests under address and undefined-behaviour sanitizers
	$(BIN)/cmake -S . -B $(BUILD)-sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCCTORCH_SANITIZE=address,undefined \
	  -DCCTORCH_BUILD_TESTS=ON -DCCTORCH_BUILD_PYTHON=OFF -DCCTORCH_CUDA=OFF \
	  -DLIBTORCH_ROOT=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')
	$(BIN)/cmake --build $(BUILD)-sanitize
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/ctest --test-dir $(BUILD)-sanitize --output-on-failure -j 2

clean:  ## remove what was built, but not the virtual environment
	rm -rf $(BUILD) $(BUILD)-sanitize $(BUILD)-tidy dist python/cctorch/lib python/cctorch/include python/cctorch/share \
	  python/cctorch/_C*.so python/cctorch.egg-info
