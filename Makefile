# The whole door: make install | quality | style | test | test-all | demo | bench
# Every target sets up what it needs in .venv, through uv (which pip brings once).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
STAMP  := $(VENV)/.installed

# One BLAS thread per test process: pytest-xdist already uses the cores.
XDIST  ?= auto

.PHONY: install quality style test test-all demo bench clean

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): $(UV) pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -e ".[dev]"
	@touch $@

install: $(STAMP)

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)
	$(BIN)/python -m pytest -n $(XDIST)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(XDIST) -m ""

demo: $(STAMP)
	$(BIN)/python recipes/digits.py --output demo-output

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) demo-output dist .pytest_cache .mypy_cache .ruff_cache
