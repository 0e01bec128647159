# Every target builds the environment it needs from nothing but a Python, and reuses it afterwards.
#
# `.venv` belongs to `python3`; any other PYTHON gets an environment named after its version, such
# as `.venv-3.12`. An environment made by another interpreter, or for another checkout (it is tied
# to both), is built anew. Stamps inside record which extras are installed; they are out of date
# when setup.cfg changes.

PYTHON ?= python3
ARGS ?=

ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
endif
BIN := $(VENV)/bin
RUN := $(BIN)/python

# The only builds of torch that the tests ask for: those without CUDA, which alone carry `+cpu`.
TORCH := torch==2.13.0+cpu
TORCH_PYTHON := 3.11

# JAX's CPU backend spreads one computation over all cores, but most of a test's time is tracing and
# compiling, which is serial: two workers pay, more would cost memory.
WORKERS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-core lint bench bench-micro plots compile-gpu compile-hopper test-triton compile-triton test-gpu bench-gpu train notebooks clean FORCE

help: ## show this list
	@echo 'Usage: make TARGET [PYTHON=python3.12] [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.train ## check every engine here, then train a small transformer on real text
	$(RUN) -m flash_attention_jax demo $(ARGS)

test: $(VENV)/.test $(VENV)/.torch ## run the tests; ARGS="-k causal" goes to pytest
	$(RUN) -m pytest -n $(WORKERS) $(ARGS)

test-core: ## install what setup.cfg requires and nothing else, and ask that install for its kernels
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" && \
	    mkdir "$$folder/source" && cp -R README.md LICENSE setup.cfg pyproject.toml flash_attention_jax kernels "$$folder/source" && \
	    "$$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$$folder/source" && \
	    cp tests/core_install.py "$$folder" && cd "$$folder" && venv/bin/python core_install.py

lint: $(VENV)/.dev ## check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.bench $(VENV)/.torch $(VENV)/.peers ## measure speed and memory on this CPU, in 12 minutes
	$(RUN) benchmarks/cpu.py $(if $(ARGS),$(ARGS),--fresh --out benchmarks/results/cpu.json)

bench-micro: $(VENV)/.bench $(VENV)/.torch ## a small set in under two minutes, which only prints
	$(RUN) benchmarks/micro.py $(ARGS)

plots: $(VENV)/.bench ## draw every table and picture of the pages from benchmarks/results
	$(RUN) benchmarks/redraw.py $(ARGS)

compile-gpu: compile-hopper compile-triton ## compile every kernel for GPUs that are not there

compile-hopper: $(VENV)/.test ## compile the Hopper kernels for an H200 without one; says so where the CUDA plugin is missing
	$(RUN) -m flash_attention_jax compile hopper $(ARGS)

test-triton: .venv-triton/.triton ## run the Triton kernels interpreted on the CPU, and lower them for CUDA
	TRITON_INTERPRET=1 JAX_PLATFORMS=cpu .venv-triton/bin/python -m pytest -n $(WORKERS) tests/test_triton_interpreted.py $(ARGS)
	JAX_PLATFORMS=cpu .venv-triton/bin/python -m pytest tests/test_triton.py

compile-triton: .venv-triton/.triton ## compile every Triton kernel for sm_80, 86, 89 and 90 without a GPU
	JAX_PLATFORMS=cpu .venv-triton/bin/python -m flash_attention_jax compile triton $(ARGS)

test-gpu: $(VENV)/.test ## run the tests that need an NVIDIA GPU; PYTHON must be one whose JAX sees it
	$(RUN) -m pytest -m gpu $(ARGS)

bench-gpu: $(VENV)/.bench ## measure the kernels on this GPU in 10 minutes; again goes on
	$(RUN) benchmarks/gpu.py $(if $(ARGS),$(ARGS),--out benchmarks/results/gpu.json)

train: $(VENV)/.train ## train a transformer; ARGS="--help" lists the options
	$(RUN) -m flash_attention_jax train $(ARGS)

notebooks: $(VENV)/.notebooks $(VENV)/.torch ## run every notebook from top to bottom; SAVE=1 keeps the outputs
	@results=$$(mktemp -d) && trap 'rm -rf "$$results"' EXIT && \
	for notebook in notebooks/*.ipynb; do \
	    case "$$notebook" in *pytorch*) \
	        $(RUN) -c 'import torch' 2>/dev/null || { echo "Leaving out $$notebook: it needs torch."; continue; };; \
	    esac; \
	    $(RUN) -m jupyter nbconvert --to notebook --execute \
	        --ExecutePreprocessor.record_timing=False \
	        $(if $(SAVE),--inplace,--output-dir "$$results") "$$notebook" || exit 1; \
	done

clean: ## remove environments, caches and builds; data/ and runs/ stay
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One extra of setup.cfg, with the library itself, editable.
$(VENV)/.train $(VENV)/.test $(VENV)/.dev $(VENV)/.bench $(VENV)/.notebooks: $(VENV)/.%: setup.cfg pyproject.toml $(VENV)/.python
	@echo 'Installing flash_attention_jax[$*] into $(VENV); the first time takes a few minutes.'
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

# Absence is no error: the tests that need torch then say that they are skipped, and why.
$(VENV)/.torch: $(VENV)/.python
	@if ! $(RUN) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(TORCH_PYTHON)")'; then \
	    echo 'Going without torch: its CPU build is installed for Python $(TORCH_PYTHON) only.' && touch $@; \
	elif $(RUN) -m pip install -qq --disable-pip-version-check '$(TORCH)'; then touch $@; \
	else echo 'Going without torch: pip found no $(TORCH). PIP_EXTRA_INDEX_URL can name an index that has it.'; fi

# What is only ever measured, each in a folder of its own: one of them has our import name. Absence is
# no error here either: the benchmark then has rows that say so.
$(VENV)/.peers: $(VENV)/.python
	@for peer in flash-attention-jax==0.3.1 memory-efficient-attention-pytorch==0.1.6; do \
	    $(RUN) -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
	        --target "$(VENV)/peers/$${peer%%=*}" "$$peer" einops || echo "Going without $$peer."; \
	done; touch $@

# Triton with its interpreter's torch, and the plugin that jax-triton imports: too heavy for `test`.
.venv-triton/.triton: setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(TORCH_PYTHON)")' || \
	    { echo '`PYTHON` must be Python $(TORCH_PYTHON), for which there is a CPU build of torch.'; exit 1; }
	@echo 'Installing Triton, jax-triton and torch into .venv-triton; the first time takes some minutes.'
	@rm -rf .venv-triton && $(PYTHON) -m venv .venv-triton
	@.venv-triton/bin/python -m pip install -qq --disable-pip-version-check --editable '.[test]' '$(TORCH)'
	@version=$$(.venv-triton/bin/python -c 'import jax; print(jax.__version__)') && \
	    .venv-triton/bin/python -m pip install -qq --disable-pip-version-check 'jax-triton==0.3.1' 'triton>=3.6' \
	    "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
	@touch $@

# Written when the environment is made; left alone, with its old date, while it still fits.
$(VENV)/.python: FORCE
	@facts=$$($(PYTHON) -c 'import os, sys; print(sys.version, sys.base_prefix, os.getcwd())') || \
	    { echo '`PYTHON` must be a command that runs Python, got $(PYTHON). Name one that does.'; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo '`PYTHON` must be Python 3.11 or newer, got' "$$($(PYTHON) --version)."; exit 1; }; \
	if [ "$$facts" != "$$(cat $@ 2>/dev/null)" ]; then \
	    echo 'Making $(VENV) with $(PYTHON).' && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && echo "$$facts" > $@; \
	fi

FORCE:
