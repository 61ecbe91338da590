# Needs make and Python 3.11, 3.12 or 3.13; everything else goes into .venv.
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is written on first import, which saves compiling what is never imported;
# without it each process compiles all that it imports, JAX alone for seconds.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --no-compile --prefer-binary

# PYTHON=... picks an interpreter; otherwise the first of these that runs and fits.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	if $$p -c '$(IN_RANGE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

# The plain torch wheel for Linux brings gigabytes of GPU libraries. The CPU build is
# enough for the tests: name its index if yours offers none, make TORCH_INDEX=... test
TORCH := torch==2.13.*
TORCH_INDEX ?=

# The TPU compiler, for the tests of gift_jax.compile; it runs on Linux, x86-64. In a
# folder of its own: where JAX finds it, it looks for a TPU each time that it starts.
TPU_COMPILER := $(VENV)/libtpu/libtpu/libtpu.so
ITS_VERSION := import importlib.metadata as m; print(next( \
	r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))

# Test processes, each of which takes up to 3 GB.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint large-files format clean python

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
		| awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed ## immunize the embedded model, attack it, show the result
	$(BIN)/python -m gift_jax.demo

PYTEST = if [ -f $(TPU_COMPILER) ]; then \
	export TPU_LIBRARY_PATH=$(abspath $(TPU_COMPILER)); fi; $(BIN)/python -m pytest -q

test: lint ## lint, then run the tests
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.installed-test ## run the tests that take minutes each
	$(PYTEST) -m slow

lint: $(VENV)/.installed-test large-files ## check style, formatting, types, file sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry gift_jax
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

# Results and weights do not belong into git; the package's own assets are older.
large-files:
	@large=$$(git ls-files -z -- ':!gift_jax/assets' 2>/dev/null \
		| xargs -0 sh -c 'find "$$@" -size +1000 -prune 2>/dev/null' -- Makefile); \
		test -z "$$large" || { echo "larger than 500 kB: $$large" >&2; exit 1; }

format: $(VENV)/.installed-test ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n '$(PYTHON)' && $(PYTHON) -c '$(IN_RANGE)' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed; found '$(PYTHON)'." \
			"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }

# Stamps: installed again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) '$(TORCH)')
	$(INSTALL) --editable '.[test]'
	-$(INSTALL) --no-deps --upgrade --target $(VENV)/libtpu \
		"$$($(BIN)/python -c '$(ITS_VERSION)')"
	@touch $(VENV)/.installed $@
