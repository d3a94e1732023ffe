# `make demo` and `make test` do their whole set-up; nothing is needed but Python 3.10+ and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint install clean

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]" --group dev
	# Only tests use it, and what they use runs with the huggingface-hub 2 that its bounds leave out.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt langchain-huggingface
	# The Milvus servers that tests start; their old requirements would pull ours back.
	test -x .venv-milvus/bin/python || $(PYTHON) -m venv .venv-milvus
	.venv-milvus/bin/python -m pip install --quiet milvus==2.3.5 milvus-lite==2.5.1 "setuptools<70" "marshmallow<4"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-milvus build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
