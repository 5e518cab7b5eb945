# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3.11
# Threads that wait by spinning make a step eight times slower where another program wants the same cores; sleeping
# ones cost a third on an idle machine. The demo should be quick anywhere (docs/log.md has the figures). The same goes
# for the threads of scikit-learn's BLAS on matrices this small.
export OMP_WAIT_POLICY ?= PASSIVE
export OPENBLAS_NUM_THREADS ?= 1
BIN := .venv/bin

.PHONY: setup demo test lint types check slow luck clean
setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/singer demo --out demo-out --overwrite

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

slow: setup
	$(BIN)/pytest -m slow

# The tests with other seeds, instruction sets and numbers of threads, and beside other work: thrice as long as `test`.
luck: setup
	PYTHON=$(BIN)/python tests/prove_luck.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Everything that must hold before a change lands.
check: lint types test

clean:
	rm -rf .venv dist build demo-out
