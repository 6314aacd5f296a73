# One environment, made on demand. Everything a user or CI does is one of these targets.
#
#   make demo     train a small model on Shakespeare, watch it write, leave out/demo/report.html
#   make test     run every test
#   make soak     run the full forms of the long checks (docs/reliability.md), one by one: an hour or two; figures are printed
#   make check    style, types and structure
#   make bench    time how every method writes on this machine
#   make family   train the models that docs/results.md compares (an hour to two on two cores; it goes on)
#   make docs     build these pages and the reference into a site, build/docs; no warning is let through
#   make notebook execute docs/tutorials/welcome.ipynb anew, in place: some minutes, most of them training
#   make clean    remove the environment and what was built; runs stay
#
#   PYTHON=...        the interpreter to build on (default: the first of python3.11 ... python3 that is 3.11 or newer)
#   PIP_FLAGS=...     passed to pip. On Linux the public index's torch brings CUDA; for a CPU-only one point pip at
#                     torch's CPU index, e.g. make demo PIP_FLAGS="--extra-index-url URL"
#   PYTEST_FLAGS=...  passed to pytest, e.g. make test PYTEST_FLAGS="-k cache"

VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test soak check bench family docs notebook clean help

help:
	@sed -n '/^$$/q; s/^#  //p; s/^#$$//p' Makefile

demo: $(VENV)/.core
	$(BIN)/esolm demo --out out/demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_FLAGS)

soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -s --durations=0 --timeout=7200 -m slow $(PYTEST_FLAGS)

check: $(VENV)/.dev
	$(BIN)/ruff check src tests docs
	$(BIN)/ruff format --check src tests docs
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

bench: $(VENV)/.core
	$(BIN)/esolm bench

family: $(VENV)/.core
	$(BIN)/esolm family --out runs/family

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -n -W --keep-going -E -a -b html -d build/doctrees docs build/docs
	@echo "the site is build/docs/index.html"

notebook: $(VENV)/.docs
	$(BIN)/python docs/notebook.py docs/tutorials/welcome.ipynb

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "esolm needs Python 3.11 or newer; none was found (name one: make PYTHON=/path/to/python3)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .[docs]
	@touch $@ $(VENV)/.core

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .[dev]
	@touch $@ $(VENV)/.core
