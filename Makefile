# make demo     train the teacher and three students on generated data, compare them
# make test     the quick tests          make test-slow   all tests
# make lint     black, isort, flake8, import-linter (rooms of the package)     make format      apply black and isort
# make wheel    build dist/*.whl, install it elsewhere (with the packages of .venv) and run crosskd-demo --quick there
# make docs     build the site of docs/ into site/, in an environment of its own, .venv-docs (150 MB)
# make setup    build .venv (every target does this first when it is missing or out of date)
# make lock     write requirements.lock and requirements-docs.lock anew from setup.py (UPGRADE=1: with the newest releases)
# make clean    remove .venv, .venv-docs, site/ and caches, keep output/ and datasets/
#
# PYTHON=...    the interpreter to build .venv with (3.11 or newer)
# ARGS=...      more arguments for pytest
# JOBS=...      processes that run the tests (2), one thread each

PYTHON ?=
ARGS ?=
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
DOCS := .venv-docs
# a file of tests stays in one process: they share what they train
PYTEST = $(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
LINTED := $(wildcard projects tools tests benchmarks setup.py)

# caches of tools that would otherwise write into the home folder
export MPLBACKEND := Agg
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export BLACK_CACHE_DIR := $(CURDIR)/$(VENV)/cache/black

.PHONY: setup demo test test-slow lint format wheel docs lock clean

setup:
	@PYTHON="$(PYTHON)" sh tools/setup_venv.sh

demo: setup
	$(PY) tools/demo.py

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup
	$(PYTEST) $(ARGS)

lint: setup
	$(PY) -m black --check -l 100 --extend-exclude crosskd_ifc/configs/ $(LINTED)
	$(PY) -m isort --check $(LINTED)
	$(PY) -m flake8 $(LINTED)
	$(VENV)/bin/lint-imports --no-cache setup.cfg

format: setup
	$(PY) -m isort --quiet $(LINTED)
	$(PY) -m black --quiet -l 100 --extend-exclude crosskd_ifc/configs/ $(LINTED)

# The fresh environment sees what .venv holds, less the editable install: only the package itself is from the wheel.
wheel: setup
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --use-pep517 --wheel-dir dist .
	tried=$$(mktemp -d) && trap 'rm -rf $$tried' EXIT && $(PY) -m venv $$tried/venv && \
	$$tried/venv/bin/pip install --quiet --no-deps dist/*.whl && \
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > $$(echo $$tried/venv/lib/python*/site-packages)/others.pth && \
	cd $$tried && unset PYTHONPATH && venv/bin/crosskd-demo --quick && \
	venv/bin/crosskd-export output/demo_quick/crosskd_ifc_1/model_final.pth student

# It reads the sources without importing them: no torch, no detectron2.
docs: $(DOCS)/.stamp
	$(DOCS)/bin/zensical build --clean --strict

$(DOCS)/.stamp: requirements-docs.lock
	rm -rf $(DOCS)
	$(or $(PYTHON),python3) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --require-hashes -r requirements-docs.lock
	touch $@

# setuptools 80.9 and newer print a warning whenever detectron2.model_zoo is imported
lock: setup
	$(PY) -m venv $(VENV)/lock && $(VENV)/lock/bin/pip install --quiet uv
	echo 'setuptools<80.9' > $(VENV)/lock/constraints.txt
	sed '/^#/d' requirements.lock > $(VENV)/lock/requirements.lock
	$(VENV)/lock/bin/uv pip compile setup.py --extra dev --constraints $(VENV)/lock/constraints.txt \
	    --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
	    $(if $(UPGRADE),--upgrade) --output-file $(VENV)/lock/requirements.lock >/dev/null
	{ sed -n '/^#/p' requirements.lock; cat $(VENV)/lock/requirements.lock; } > $(VENV)/lock/new
	mv $(VENV)/lock/new requirements.lock
	sed -n 's/^ *"docs": \[\(.*\)\].*/\1/p' setup.py | tr -d '" ' | tr , '\n' > $(VENV)/lock/docs.in
	sed '/^#/d' requirements-docs.lock > $(VENV)/lock/requirements-docs.lock
	$(VENV)/lock/bin/uv pip compile $(VENV)/lock/docs.in \
	    --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
	    $(if $(UPGRADE),--upgrade) --output-file $(VENV)/lock/requirements-docs.lock >/dev/null
	{ sed -n '/^#/p' requirements-docs.lock; cat $(VENV)/lock/requirements-docs.lock; } > $(VENV)/lock/new
	mv $(VENV)/lock/new requirements-docs.lock && rm -rf $(VENV)/lock

clean:
	rm -rf $(VENV) $(DOCS) site .cache build dist projects/*.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
