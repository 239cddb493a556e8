# Two commands do everything: `make demo` and `make test`. Both set up .venv first where needed.
#   make demo   trains two tasks on the embedded model, serves them on vLLM, asks over gRPC   (about 5 minutes, 2 cores)
#   make test   all tests
#   make lint   style
# WORKERS says how many processes share the tests (2; see tests/conftest.py).
# PYTHON chooses the interpreter (3.11 or newer); EXTRAS=cuda,dev the vLLM build for NVIDIA GPUs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= cpu,dev
WORKERS ?= 2
BIN := .venv/bin

.PHONY: setup demo test lint clean

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py constraints.txt tools/setup.sh $(wildcard proto/loraf/v1/*.proto) \
              $(wildcard loraf/csrc/* loraf_serve/kernels/csrc/*)
	PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" tools/setup.sh

demo: setup
	$(BIN)/python examples/demo/run.py

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info examples/demo/data examples/demo/ckpt loraf_serve/v1/*_pb2* loraf/_native.so loraf_serve/kernels/_cpu.so
