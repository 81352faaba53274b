# serve and test do all their own set-up in $(VENV); every other target uses the same environment.
#   make serve                     chat endpoint on http://127.0.0.1:8000 with the bundled model
#   make test                      the whole CPU test suite
#   make check                     format, lint, types, architecture rules
#   make serve VENV_FLAGS=--system-site-packages     on a host that already has a CUDA build of torch

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
PY ?= $(VENV)/bin/python
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ARGS ?=

RUN_READY ?= $(VENV)/.installed
DEV_READY ?= $(VENV)/.installed-dev
PROTO_OUT ?= .

KERNELS_READY ?= $(VENV)/.kernels

.PHONY: serve test check format proto test-gpu bench clean

serve: $(RUN_READY) $(KERNELS_READY)
	$(VENV)/bin/dsv4 up $(ARGS)

test: $(DEV_READY) $(KERNELS_READY)
	$(PY) -m pytest -q $(ARGS)

check: $(DEV_READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/architecture

format: $(DEV_READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Stubs are committed: only whoever edits a .proto file runs this. tests/architecture compares them with a fresh run.
proto: $(DEV_READY)
	$(PY) -m grpc_tools.protoc -Ikvstore/transfer/stubs=proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) \
		--grpc_python_out=$(PROTO_OUT) proto/kv_transfer.proto
	$(PY) -m grpc_tools.protoc -Iworkers/service/stubs=proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) \
		--grpc_python_out=$(PROTO_OUT) proto/worker.proto

test-gpu: $(DEV_READY)
	$(PY) -m pytest -q -m gpu $(ARGS)

bench: $(DEV_READY) $(KERNELS_READY)
	$(PY) -m tests.bench.serve $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch goes first and alone: given a range, pip may pick a build that pulls gigabytes of CUDA packages. A torch that the
# environment can already import (VENV_FLAGS=--system-site-packages) is kept, whatever its version.
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet $(TORCH)
	$(PY) -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/constraints.txt
	grep -v '^torch==' constraints.txt >> $(VENV)/constraints.txt
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --editable . -c $(VENV)/constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --editable '.[dev]' -c $(VENV)/constraints.txt
	touch $(VENV)/.installed $@

# Compiled once per change of their sources, so that no start of a worker waits for it.
$(VENV)/.kernels: $(wildcard workers/cpu/*.py) | $(RUN_READY)
	$(PY) -m workers.cpu.warm
	touch $@
