# Everything runs in .venv, made on first use from the exact versions in constraints.txt.
#   make PYTHON=/path/to/python3.12 test     another interpreter (3.11 or newer)
#   make test ARGS="-k patience -x"          arguments for pytest, or for the demo

# as many as there are cores, up to four: each takes a gigabyte or so
WORKERS ?= auto
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
BIN := .venv/bin
# Written last, removed first: an interrupted install starts over from an empty .venv.
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint types walls style docs bench-deps clean
.DELETE_ON_ERROR:

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP)  ## The whole road on a small model, with numbers at the end
	$(BIN)/offramp demo $(ARGS)

test: $(STAMP)  ## The tests, on up to four processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(STAMP)  ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Mypy
	$(BIN)/mypy

walls: $(STAMP)  ## Which room may import which
	$(BIN)/lint-imports

style: $(STAMP)  ## The figures of the house style over src/
	$(BIN)/python tools/house_style.py

docs: $(STAMP)  ## The documentation site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/check_site.py build/site

bench-deps: $(STAMP)  ## What the benchmarks need on top
	$(PIP) --build-constraint constraints.txt --editable '.[bench]'

clean:  ## Remove .venv, caches and builds
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): Makefile pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "offramp needs Python 3.11 or newer with venv; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned versions into .venv (minutes the first time, then never again)"
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@$(PIP) pip
	@$(PIP) --build-constraint constraints.txt --editable '.[dev,docs,onnx,openvino]'
	@touch $@
