# Each target sets up what it needs in .venv; nothing else has to be there but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all lint format clean

demo: $(VENV)/.installed
	$(VENV)/bin/gptoss-convert demo --output gptoss-demo

test: lint
	$(VENV)/bin/pytest -n 2 --dist worksteal -m "not slow and not slurm" --durations 20

test-all: lint
	$(VENV)/bin/pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) gptoss-demo dist build
