# The verbs of this project. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_SLOW := $(VENV)/.ready-slow
READY_DOCS := $(VENV)/.ready-docs
# The TPU compiler, for ahead-of-time tests only: beside the environment, because wherever JAX can
# import it, it looks for TPUs at every start. One process at a time may load it, and in a process
# that has, JAX's profiler dies: so those tests run in a process of their own.
TPU_COMPILER := $(VENV)/tpu-compiler
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --no-input --disable-pip-version-check \
	--constraint constraints.txt

# A worker that dies ends the suite: xdist may wait without end for the one that replaces it.
PARALLEL := -n $(JOBS) --dist loadfile --max-worker-restart=0 --durations=25

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup train test exam test-slow test-packages check format docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

setup: $(READY)  ## make the virtual environment with the pinned versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moejax needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev,tensorboard]'
	@touch $@

$(READY_SLOW): $(READY)
	$(PIP_INSTALL) --editable '.[dev,tensorboard,wandb,slurm,browser,parity,eval,hf]'
	$(PIP_INSTALL) --no-deps --upgrade --target $(TPU_COMPILER) libtpu
	@touch $@

$(READY_DOCS): $(READY)
	$(PIP_INSTALL) --editable '.[dev,tensorboard,docs]'
	@touch $@

train: $(READY)  ## train the default language model in runs/default (options: ARGS="--config.train.steps=100")
	$(BIN)/moejax train --config=configs/lm.py --workdir=runs/default $(ARGS)

test: $(READY)  ## run the CPU tests, on 8 virtual devices
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

exam: $(READY)  ## examine a gate from elsewhere: GATE="module:Gate field=value" (docs/add-a-gate.md)
	MOEJAX_EXAM="$(GATE)" $(BIN)/python -m pytest -m "not slow" -q \
	  tests/test_gates.py tests/test_visibility.py tests/models/test_prefix.py \
	  -k "not capacity_shows and not overflow and not balanced_batch and not dropless_evaluation" $(ARGS)

test-slow: $(READY_SLOW)  ## run the slow suites (installs PyTorch, transformers, lm_eval and the TPU compiler first)
	$(BIN)/python -m pytest -m "slow and not tpu" $(PARALLEL) $(ARGS)
	PYTHONPATH=$(TPU_COMPILER) $(BIN)/python -m pytest -m "slow and tpu" $(ARGS)

test-packages:  ## install what the slow suites use from Debian: SLURM and Chromium (as root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
	  slurm-wlm munge chromium chromium-driver >/dev/null

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## rewrite the files as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY_DOCS)  ## build the documentation site in build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:  ## remove the virtual environment, caches and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find moejax tests configs experiments scripts -name __pycache__ -type d -prune -exec rm -rf {} +
