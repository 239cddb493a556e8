# `make demo` and `make test` are all you need to try it. Every target sets up .venv first if necessary.
#   make demo        trains two tasks on the embedded model, serves them on vLLM, asks over gRPC (5 minutes on 2 cores)
#   make test        all tests
#   make test-fast   the tests without vLLM engines and without slow ones (under 3 minutes on 2 cores)
#   make lint        ruff, mypy, and buf for proto/
#   make docs        the documentation site, in site/; a broken link fails
#   make tools       installs what lint and tests use from outside .venv: buf, Go's template engine and axe-core from npm,
#                    lm-evaluation-harness; with CI set and as root also Debian's Chromium
#   make dist        source distribution and wheel, in dist/
# WORKERS is the number of processes that share the tests (default 2, see tests/conftest.py).
# PYTHON selects the interpreter (3.11 or newer). EXTRAS=cuda,dev selects the vLLM build for NVIDIA GPUs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= cpu,dev
WORKERS ?= 2
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: setup demo test test-fast lint docs tools dist clean

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py constraints.txt build-constraints.txt tools/setup.sh \
              $(wildcard proto/loraf/v1/*.proto proto/vllm/*.proto loraf/matrices/csrc/* loraf_serve/kernels/csrc/*)
	PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" tools/setup.sh

demo: setup
	$(BIN)/python examples/demo/run.py

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not engine and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	tools/buf.sh

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

tools: setup
	tools/buf.sh install
	tools/grpc_js.sh
	$(BIN)/python -m tools.chart install
	tools/browser.sh
	tools/lm_eval.sh

dist: setup
	$(BIN)/uv build --build-constraint build-constraints.txt --out-dir dist

clean:
	rm -rf .venv .tools build dist site *.egg-info examples/demo/data examples/demo/ckpt \
	    loraf_serve/v1/*_pb2* loraf_serve/vllm_proto/*_pb2* loraf/matrices/_native.so loraf_serve/kernels/_cpu.so
