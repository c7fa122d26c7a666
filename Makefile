# make demo     train the teacher and three students on generated data, compare them
# make test     the quick tests          make test-slow   all tests
# make lint     black, isort, flake8, import-linter (rooms of the package)     make format      apply black and isort
# make setup    build .venv (every target does this first when it is missing or out of date)
# make lock     write requirements.lock anew from setup.py (UPGRADE=1: with the newest releases)
# make clean    remove .venv and caches, keep output/ and datasets/
#
# PYTHON=...    the interpreter to build .venv with (3.11 or newer)
# ARGS=...      more arguments for pytest

PYTHON ?=
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
LINTED := $(wildcard projects tools tests benchmarks setup.py)

# caches of tools that would otherwise write into the home folder
export MPLBACKEND := Agg
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export BLACK_CACHE_DIR := $(CURDIR)/$(VENV)/cache/black

.PHONY: setup demo test test-slow lint format lock clean

setup:
	@PYTHON="$(PYTHON)" sh tools/setup_venv.sh

demo: setup
	$(PY) -W ignore tools/demo.py

test: setup
	$(PY) -m pytest -q -m "not slow" $(ARGS)

test-slow: setup
	$(PY) -m pytest -q $(ARGS)

lint: setup
	$(PY) -m black --check -l 100 $(LINTED)
	$(PY) -m isort --check $(LINTED)
	$(PY) -m flake8 $(LINTED)
	$(VENV)/bin/lint-imports --no-cache setup.cfg

format: setup
	$(PY) -m isort --quiet $(LINTED)
	$(PY) -m black --quiet -l 100 $(LINTED)

# setuptools 80.9 and newer print a warning whenever detectron2.model_zoo is imported
lock: setup
	$(PY) -m venv $(VENV)/lock && $(VENV)/lock/bin/pip install --quiet uv
	echo 'setuptools<80.9' > $(VENV)/lock/constraints.txt
	sed '/^#/d' requirements.lock > $(VENV)/lock/requirements.lock
	$(VENV)/lock/bin/uv pip compile setup.py --extra dev --constraints $(VENV)/lock/constraints.txt \
	    --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
	    $(if $(UPGRADE),--upgrade) --output-file $(VENV)/lock/requirements.lock >/dev/null
	{ sed -n '/^#/p' requirements.lock; cat $(VENV)/lock/requirements.lock; } > $(VENV)/lock/new
	mv $(VENV)/lock/new requirements.lock && rm -rf $(VENV)/lock

clean:
	rm -rf $(VENV) build projects/*.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
