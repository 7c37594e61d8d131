# make setup   .venv with mezo and everything its tests and demo need
# make demo    fine-tune a real sentence encoder on a small text set, offline
# make test    tests        make check   lint, types, security, links        make bench   CPU benchmark
# make docs    the site in build/site
# make test-sglang   tests with SGLang's real engine on a CPU

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test test-sglang check docs bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,demo,dev,docs,lm-eval,plot]'
	touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# SGLang's real engine on a CPU, in an environment of its own: its versions of torch and transformers are fixed.
test-sglang: .venv-sglang/.installed
	.venv-sglang/bin/python -m pytest tests/sglang

.venv-sglang/.installed: tests/sglang/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --upgrade pip
	.venv-sglang/bin/python -m pip install --quiet torch==2.13.0
	.venv-sglang/bin/python -m pip install --quiet --requirement tests/sglang/requirements.txt
	.venv-sglang/bin/python -m pip install --quiet --no-deps sglang==0.5.20
	.venv-sglang/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.12
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src/mezo
	$(BIN)/python tests/check_links.py

docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python benchmarks/cpu_step.py

clean:
	rm -rf $(VENV) .venv-sglang runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
