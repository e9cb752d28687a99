# setup, demo, test: what a newcomer needs. protos, check, bench: what a change needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo protos check test bench clean

setup: $(INSTALLED)

# pip before 25 backtracks for many minutes on this set of packages, so it is renewed first.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,rtx,train,dev]'
	touch $(INSTALLED)

demo: setup
	$(BIN)/oneword demo

protos: setup
	$(BIN)/python -m protos.generate

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/buf lint protos
	$(BIN)/python -m protos.generate --check

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf build out dist *.egg-info .pytest_cache .ruff_cache
