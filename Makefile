# Needs only Python 3.11 or newer. Everything is installed into .venv; nothing else on the machine is touched.
VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.excise-is-set-up
# A name on the path is no proof that it runs, so each candidate is tried.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: setup demo test lint types unit docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "excise needs Python 3.11 or newer: make setup PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/excise demo

# Side by side: the tests often wait for processes that they start.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j3 lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

# The site, in build/site; the tests build it, too. To read it: python -m http.server -d build/site
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
