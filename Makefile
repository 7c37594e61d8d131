# make setup   .venv with mezo and everything its tests and demo need
# make demo    fine-tune a real sentence encoder on a small text set, offline
# make test    tests        make check   lint, types, links        make bench   CPU benchmark

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test check bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,demo,dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.12
	$(BIN)/python tests/check_links.py

bench: setup
	$(BIN)/python benchmarks/cpu_step.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
