# setup, demo, test: what a newcomer needs. protos, check, bench, bench-serving, soak: what a change needs. model: a test of the
# recipe.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo protos protos-release check test soak bench bench-serving model clean

setup: $(INSTALLED)

# pip before 25 backtracks for many minutes on this set of packages, so it is renewed first.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,openvino,rtx,train,signing,metrics,tracing,postgres,fsspec,tensorboard,recipe,dev]'
	touch $(INSTALLED)

demo: setup
	$(BIN)/oneword demo

protos: setup
	$(BIN)/python -m protos.generate

# At a release, and only then: from now on `make check` holds the API to what it is at this moment.
protos-release: setup
	$(BIN)/buf build protos --exclude-source-info -o protos/released.binpb

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/released.binpb
	$(BIN)/python -m protos.generate --check

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Attacks on a server for ten minutes: docs/attacks.md.
soak: setup
	$(BIN)/python -m tests.soak

bench: setup
	$(BIN)/python -m benchmarks.run

# About 25 minutes on two cores with nothing else to do; goes on where it was stopped.
bench-serving: setup
	$(BIN)/python -m benchmarks.serving

# The recipe of the embedded model in toy size; the icons come from npm.
model: setup
	$(BIN)/python -m models.recipe rehearse

clean:
	rm -rf build out dist *.egg-info .pytest_cache .ruff_cache
