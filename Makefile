# Every target makes or reuses .venv by itself; the first use of one installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.lab            ## compare four normalizations on handwritten digits
	$(BIN)/normkit compare --output runs/demo

test: $(VENV)/.test           ## every test and doctest
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/.check         ## style, types and the direction of imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.lab           ## speed beside torch's own layers, as ratios in one run (minutes)
	$(BIN)/python benchmarks/layers.py --quick
	$(BIN)/python benchmarks/conditioning.py --rounds 4

docs: $(VENV)/.docs           ## the documentation in site/
	$(BIN)/mkdocs build --strict

clean:                        ## remove what the targets made, but never runs/
	rm -rf $(VENV) site dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "normkit needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# An extra is installed once, and again when what it consists of changes.
$(VENV)/.%: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable ".[$(EXTRAS_$*)]"
	touch $@

EXTRAS_lab   := lab
EXTRAS_test  := lab,test
EXTRAS_check := lab,test,check
EXTRAS_docs  := lab,docs
