# make serve   the demo model on http://127.0.0.1:8000; HOST=, PORT= and MODEL= change that
# make test    everything that a machine without a GPU can run
# make lint    ruff and mypy
# make clean   what the other targets made

PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?= demo

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install serve test lint clean

install: $(INSTALLED)

# One environment for users and developers: next to torch, the development tools weigh nothing.
# The stamp makes later calls instant, until the dependencies or the compiled kernels change.
$(INSTALLED): pyproject.toml setup.py $(wildcard src/vattention/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/vattention serve $(MODEL) --host $(HOST) --port $(PORT)

# Triton's interpreter runs the kernels for GPUs. It takes a gigabyte, so those who only serve do without; where it
# cannot be had, those tests are skipped.
test: install
	-$(BIN)/python -m pip install --quiet --progress-bar off 'triton>=3.6'
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/vattention/native/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
