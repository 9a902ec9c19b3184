# Every target sets up .venv first if it is not current (tools/install.py, Python 3.11 or newer and nothing else).
#   make demo ARGS="--samples 500"      make test      make lab      make install PYTHON=python3.12

ifndef PYTHON
PYTHON := $(or $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null))),python3)
endif
BIN := .venv/bin
ARGS ?=
# Two test processes of one thread each; the tests of one file stay together.
PARALLEL ?= -n 2 --dist loadfile

export OMP_WAIT_POLICY := passive
OFFLINE := HF_HUB_OFFLINE=1
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.NOTPARALLEL:
.PHONY: help install demo lab test lint layers unit slow compiled interpreted lessons notebooks docs numbers matrix lock format clean
.DEFAULT_GOAL := help

help:             ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:          ## set up .venv, or do nothing if it is current (ARGS for tools/install.py)
	@$(PYTHON) tools/install.py $(if $(filter install,$(MAKECMDGOALS)),$(ARGS))

demo: install     ## the whole ladder, from the 50-step teacher to the combined pipeline
	@$(BIN)/diffusion-opt demo $(ARGS)

lab: install      ## open your copies of the lessons in JupyterLab (ARGS=--merge: with all that changed)
	@$(BIN)/python tools/course.py $(ARGS)
	@$(BIN)/jupyter lab runs/course $(ALLOW_ROOT)

test: install lint layers unit slow compiled interpreted lessons    ## everything that must pass; stops at the first failure
	@echo "== all stages passed"

lint: install     ## style and spelling, notebooks included
	@echo "== lint: ruff check, ruff format, codespell"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell

layers: install   ## which room may import which
	@echo "== layers: import-linter"
	@$(BIN)/lint-imports --no-logo

unit: install     ## fast tests, shapes checked at run time
	@echo "== unit: fast tests"
	@$(BIN)/python -m pytest -q $(PARALLEL)

slow: install     ## tests that take minutes
	@echo "== slow: longer tests"
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "slow and not compiled and not interpreted" || [ $$? -eq 5 ]

compiled: install ## torch.compile tests, in a call without run-time shape checks
	@echo "== compiled: torch.compile tests"
	@$(BIN)/python -m pytest -q $(PARALLEL) -m compiled || [ $$? -eq 5 ]

interpreted: install ## Triton kernels without a GPU, in Triton's interpreter
	@echo "== interpreted: Triton kernels in the interpreter"
	@$(BIN)/python -m pytest -q $(PARALLEL) -m interpreted || [ $$? -eq 5 ]

lessons: install  ## run each notebook in fast mode
	@echo "== lessons: notebooks in fast mode"
	@$(OFFLINE) DIFFUSION_OPT_FAST=1 $(BIN)/python -m pytest -q --nbmake --nbmake-timeout=300 --timeout=600 notebooks

notebooks: install ## run each notebook in full and store its cleaned outputs
	@$(OFFLINE) $(BIN)/python tools/notebooks.py $(ARGS)

format: install   ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: install     ## the course, names and results as web pages in build/docs/html, without a network
	@$(BIN)/python tools/docs.py $(ARGS)

numbers: install  ## rewrite the numbers that README and lessons quote from benchmarks/results
	@$(BIN)/python tools/quoted.py

matrix: install   ## try every technique on every tiny pipeline, and write the table into README (ARGS: pipelines)
	@$(OFFLINE) PYTHONPATH=tests $(BIN)/python -m matrix $(ARGS)

lock: install     ## rewrite constraints.txt from .venv
	@$(BIN)/python tools/lock.py

clean:            ## remove caches and build products (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
