# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first: the demo what users
# need, the tests what developers need besides.
PYTHON ?= python3.11
# Threads that wait by spinning make a step eight times slower where another program wants the same cores; sleeping
# ones cost a third on an idle machine. The demo should be quick anywhere (docs/log.md has the figures). The same goes
# for the threads of scikit-learn's BLAS on matrices this small.
export OMP_WAIT_POLICY ?= PASSIVE
export OPENBLAS_NUM_THREADS ?= 1
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: setup develop demo test lint types check docs slow luck clean
setup: .venv/.installed
develop: .venv/.developer

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/.developer: .venv/.installed
	$(PIP) '.[dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(PIP) '.[docs]'
	touch $@

demo: setup
	$(BIN)/singer demo --out demo-out --overwrite

test: develop
	$(BIN)/pytest -n 2 --dist worksteal

# What takes too long for `test`: about a quarter of an hour.
slow: develop
	$(BIN)/pytest -n 2 --dist worksteal -m slow

# The tests with other seeds, instruction sets and numbers of threads, and beside other work: thrice as long as `test`.
luck: develop
	PYTHON=$(BIN)/python tests/prove_luck.sh

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: develop
	$(BIN)/mypy

# Everything that must hold before a change lands.
check: lint types test

# The site of the pages, in the folder site: a link or a name that leads nowhere stops it.
docs: .venv/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv dist build demo-out site
