# Everything runs in an environment of its own: nothing has to be installed first but Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-network check format gpu clean

demo: $(READY) ## prune a real model, build its engines and judge them: about 11 minutes on 2 cores
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo c4-demo
	$(BIN)/trsp-deploy prune-and-build --model smollm2-135m --drop 25%

test: $(READY) check ## style, types, import rule and the default tests, offline
	$(BIN)/python -m pytest -q

check: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pip check

test-slow: $(READY) ## minutes and gigabytes
	$(BIN)/python -m pytest -q -m slow

test-network: $(READY) ## needs a package registry
	$(BIN)/python -m pytest -q -m network

gpu: $(READY) ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu tests/gpu

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp comes last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cpu,rtx,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
