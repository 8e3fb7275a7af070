# make demo: install, then a video from a prompt.   make test: install, then every check and test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
PYTEST_ARGS ?=

# pip takes the pins from here, for the packages and for the build backend (newer pips read the second name).
PINS := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test setup lint format types eval-tiny lock clean

help:
	@echo "make demo       set up if needed, then a red ball in out/red_ball.mp4"
	@echo "make test       set up if needed, then lint, types and tests (PYTEST_ARGS='-k layers' for some)"
	@echo "make setup      only set up, with the development tools"
	@echo "make lint       ruff: rules and format"
	@echo "make format     let ruff rewrite the files"
	@echo "make types      mypy, strict"
	@echo "make eval-tiny  judge the embedded model by its pixels"
	@echo "make lock       write constraints.txt anew from the newest versions that fit"
	@echo "make clean      remove the environment, caches and outputs"

demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/pipedit generate "a red ball moves right" -o out/red_ball.mp4 --overwrite

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

setup: $(INSTALLED_DEV)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV)
	$(BIN)/mypy

eval-tiny: $(INSTALLED)
	$(BIN)/python -m training.evaluate

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: no $(PYTHON) here" >&2; \
	  echo "hint: install Python 3.11 or 3.12, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), but pipedit needs Python 3.11, 3.12 or 3.13" >&2; \
	  echo "hint: name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make virtual environments" >&2; \
	  echo "hint: on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The stamps make a finished set-up free; new pins or new metadata run it again.
METADATA := pyproject.toml constraints.txt src/pipedit/core/version.py

$(INSTALLED): $(METADATA) | $(BIN)/python
	@echo "installing pipedit and what it needs into $(VENV), pinned by constraints.txt (about a minute)"
	@$(PINS) $(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_DEV): $(METADATA) | $(BIN)/python
	@echo "installing pipedit with its development tools into $(VENV), pinned by constraints.txt (about a minute)"
	@$(PINS) $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(INSTALLED) $@

# Left out: pip itself, local versions (+cpu) and what only CUDA builds of torch pull in, which torch pins itself.
lock:
	set -e; venv=$$(mktemp -d); trap 'rm -rf "$$venv" constraints.txt.new' EXIT; \
	"$(PYTHON)" -m venv "$$venv"; \
	"$$venv/bin/python" -m pip install --quiet torch==$(TORCH) '.[dev,training]' hatchling editables; \
	echo "# Every package of a development environment, pinned. Written by: make lock" > constraints.txt.new; \
	"$$venv/bin/python" -m pip freeze --all --exclude pip --exclude pipedit \
	  | sed -E 's/\+[a-z0-9.]+$$//' | grep -Ev '^(nvidia|cuda|triton)' >> constraints.txt.new; \
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests training -name __pycache__ -type d -prune -exec rm -rf {} +
