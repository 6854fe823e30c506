# The whole door: make install | quality | style | test | test-all | docs | demo | bench
# For versions: make lock | test-lowest | test-newest | test-extras
# Every target sets up what it needs in an environment of its own, through uv (which pip brings once into .venv).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-docs

# The oldest and the newest Python that are supported; uv finds or fetches them.
OLDEST_PYTHON ?= 3.10
NEWEST_PYTHON ?= 3.13

# One BLAS thread per test process: pytest-xdist already uses the cores.
XDIST  ?= auto

.PHONY: install quality style test test-all docs docs-run test-lowest test-newest test-extras lock demo bench clean

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): $(UV) pyproject.toml constraints.txt
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt -e ".[dev]"
	@touch $@

$(DOCS): $(STAMP)
	$(UV) pip install --quiet --python $(BIN)/python --constraints constraints.txt -e ".[dev,docs]"
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

test-all: $(DOCS)
	$(BIN)/python -m pytest -n $(XDIST) -m ""

# The lowest versions that pyproject.toml allows of what it names, on the oldest Python.
test-lowest: $(UV)
	$(UV) venv --quiet --clear --python $(OLDEST_PYTHON) .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	.venv-lowest/bin/python -m pytest -n $(XDIST)

# The newest versions that pyproject.toml allows, without the lock, on the newest Python; first what it does not allow.
test-newest: $(UV)
	$(UV) venv --quiet --clear --python $(NEWEST_PYTHON) .venv-newest
	$(UV) pip install --quiet --python .venv-newest/bin/python -e ".[dev]"
	$(UV) pip list --python .venv-newest/bin/python --outdated
	.venv-newest/bin/python -m pytest -n $(XDIST)

# The wheel and the source distribution, and every extra alone, each in an empty environment.
test-extras: $(UV)
	$(PYTHON) tests/try_extras.py --uv $(UV)

# New versions in the lock: the newest that pyproject.toml allows today, for every supported Python and system.
lock: $(UV)
	$(UV) pip compile --quiet --upgrade --universal --python-version $(OLDEST_PYTHON) --all-extras \
		--no-header --no-annotate --output-file constraints.txt pyproject.toml

# The documentation site, in site/; a warning is an error. Its search needs a server: python -m http.server -d site
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs the notebooks, and the commands of the pages that teach, on tiny images.
docs-run: $(DOCS)
	$(BIN)/python -m pytest -n $(XDIST) -m "" tests/test_site.py tests/test_guides.py

demo: $(STAMP)
	$(BIN)/python recipes/digits.py --output demo-output

# Everything that a CPU can measure, about half an hour on two idle cores: stopped, it goes on. Rows that are in BENCH
# already are kept; BENCH=outputs/bench measures them all anew, beside those that are committed. Needs no data and no
# weights. BENCH_ARGUMENTS="--tiny" sees whether it runs, "--only step" does a part, "--full" takes hours. What needs a
# GPU: benchmarks/gpu.py.
BENCH ?= docs/results/bench
BENCH_ARGUMENTS ?=

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py --json $(BENCH).json --markdown $(BENCH).md --figure $(BENCH).png $(BENCH_ARGUMENTS)
	$(BIN)/python docs/tables.py

clean:
	rm -rf $(VENV) site .venv-lowest .venv-newest demo-output dist .pytest_cache .mypy_cache .ruff_cache
