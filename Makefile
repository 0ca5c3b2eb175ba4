# What a fresh clone needs: python3 (3.11 or newer), make and a C++ compiler. Everything else goes into $(VENV).
#   make demo | test | gpu | bench | lint | format | clean | distclean          make help says what each does
PYTHON    ?= python3
VENV      ?= .venv
TORCH     ?= torch==2.14.1 torchvision==0.29.1
EXTRAS    ?= dev
PIP_ARGS  ?=
# One GPU architecture keeps a build short. Its PTX runs on any newer GPU, compiled by the driver at first use. CUDA_ARCHS= builds all.
CUDA_ARCHS ?= 80
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

SHELL  := /bin/bash
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SAY    := @printf '\033[1m== %s\033[0m\n'
# An installed package is out of date when what is compiled, or how, has changed. Python files are used where they are.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(wildcard build_backend/*.py) \
  $(shell find csrc kernels \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \) -type f)

.PHONY: help demo test gpu bench install wheel sanitize lint format clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a fused and a reference network, evaluate and time both, write demo/report.html"
	@echo "make test       the test suite                      TEST_ARGS='-k native'"
	@echo "make gpu        what needs a GPU: parity, CUDA graphs, compute-sanitizer"
	@echo "make bench      the benchmarks, small sizes         BENCH_ARGS='--full --save-results'"
	@echo "make sanitize   the convolution kernels under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make lint       ruff, mypy, clang-format, line limit, README tables"
	@echo "make format     rewrite files as ruff and clang-format want them"
	@echo "make install    create $(VENV) only                  TORCH='torch==2.13.0' EXTRAS=dev,dali-cu13 PIP_ARGS=..."
	@echo "                                                    CUDA_ARCHS='80 90-real' (default 80, empty: all)"
	@echo "make wheel      a wheel with both libraries, for all GPU architectures, in dist/, and its checks"
	@echo "make clean      remove what was built; make distclean removes $(VENV) and the demo's results as well"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastres needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(SAY) "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Written anew only when the choice changes, so that another TORCH or EXTRAS is installed and the same one is not.
$(STAMPS)/torch.wanted: FORCE | $(BIN)/python
	@mkdir -p $(STAMPS); echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
$(STAMPS)/extras.wanted: FORCE | $(BIN)/python
	@mkdir -p $(STAMPS); echo '$(EXTRAS)' | cmp -s - $@ || echo '$(EXTRAS)' > $@
$(STAMPS)/archs.wanted: FORCE | $(BIN)/python
	@mkdir -p $(STAMPS); echo '$(CUDA_ARCHS)' | cmp -s - $@ || echo '$(CUDA_ARCHS)' > $@

$(STAMPS)/torch: $(STAMPS)/torch.wanted
	$(SAY) "installing $(TORCH) (the longest step: about a minute on a fast connection)"
	@$(PIP) $(TORCH)
	@touch $@

$(STAMPS)/tools: | $(BIN)/python
	$(SAY) "installing the build tools"
	@mkdir -p $(STAMPS)
	@$(PIP) 'setuptools>=77' wheel pybind11 'cmake>=3.25' ninja
	@touch $@

# The pinned torch is named again: a requirement of an extra must not replace it.
$(STAMPS)/package: $(STAMPS)/torch $(STAMPS)/tools $(STAMPS)/extras.wanted $(STAMPS)/archs.wanted $(BUILD_INPUTS)
	$(SAY) "building fastres and installing it with [$(EXTRAS)]"
	@FASTRES_CUDA_ARCHS='$(CUDA_ARCHS)' $(PIP) --no-build-isolation -e '.[$(EXTRAS)]' $(TORCH)
	@touch $@

install: $(STAMPS)/package

# What a release is built from, but for the image: [tool.cibuildwheel] in pyproject.toml builds in manylinux_2_28.
wheel: $(STAMPS)/torch $(STAMPS)/tools
	$(SAY) "building the wheel"
	@rm -rf build/lib* dist/*.whl; FASTRES_NATIVE=ON FASTRES_CUDA=ON FASTRES_CUDA_ARCHS= $(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --wheel-dir dist .
	@$(BIN)/python tools/check_wheel.py --run dist/*.whl

demo: install
	@$(BIN)/python demo/run.py $(DEMO_ARGS)

test: install
	$(SAY) "running the tests"
	@$(BIN)/python -m pytest -q $(TEST_ARGS)

gpu: install
	@$(BIN)/python tools/check_gpu.py $(TEST_ARGS)

bench: install
	$(SAY) "running the benchmarks"
	@$(BIN)/python -m pytest benchmarks/ --benchmark-only $(BENCH_ARGS)

# A program of its own for each sanitizer, without torch and Python; their folders only satisfy the one CMakeLists.txt.
SANITIZERS ?= address undefined thread
SANITIZED  ?= build/sanitized
sanitize: $(STAMPS)/torch $(STAMPS)/tools
	@set -e; torch=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])'); \
	for kind in $(SANITIZERS); do \
	  printf '\033[1m== %s sanitizer\033[0m\n' $$kind; \
	  $(BIN)/cmake -G Ninja -S . -B $(SANITIZED)/$$kind -DCMAKE_MAKE_PROGRAM="$$PWD/$(BIN)/ninja" -DFASTRES_TORCH_DIR="$$torch" \
	    -DFASTRES_CUDA=OFF -DFASTRES_SANITIZE=$$kind > /dev/null; \
	  $(BIN)/cmake --build $(SANITIZED)/$$kind --target sanitized_kernels > $(SANITIZED)/$$kind/log || { cat $(SANITIZED)/$$kind/log; exit 1; }; \
	  ASAN_OPTIONS=detect_leaks=0 $(SANITIZED)/$$kind/sanitized_kernels; \
	done

CPP_SOURCES = $(shell find csrc kernels tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
lint: install
	$(SAY) "ruff"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(SAY) "mypy"
	@$(BIN)/mypy
	$(SAY) "clang-format"
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(SAY) "line limit and README tables"
	@$(BIN)/python tools/check_lines.py && $(BIN)/python -m benchmarks.report --check

format: install
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf build dist *.egg-info fastres/_native*.so fastres/_cuda.so fastres/_build.json $(STAMPS)/package
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) demo/out demo/report.html runs
