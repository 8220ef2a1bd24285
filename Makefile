# `make` alone lists the targets. Settings: PYTHON (makes the environment), PIP_ARGS (as for pip install), PYTEST_ARGS, TORTURE_ARGS.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= --numprocesses=logical
TORTURE_ARGS ?= --kills 100 --others 21

# An active virtual environment is used as it is; without one, .venv is made.
ENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(ENV)/bin/python
# Named by what was installed from where: the same again costs nothing, another setup.cfg installs anew.
STAMP := $(ENV)/.gkd-$(shell (pwd; cat setup.cfg pyproject.toml) | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-classification test test-detectron2 fuzz torture docs lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F @ '{ printf "%-34s%s\n", $$1, $$2 }'

setup: $(STAMP) ## install gkd and all it needs, into .venv or the active virtual environment

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Expected Python 3.10 or newer (got %s): make PYTHON=python3.12, say" % sys.version.split()[0])'
	$(PYTHON) -m venv $(ENV)

$(STAMP): | $(RUN)
	$(RUN) -m pip install --quiet --upgrade 'pip>=23.1'
	$(RUN) -m pip install $(PIP_ARGS) --editable '.[detection,dev,viz]'
	@rm -f $(ENV)/.gkd-* && touch $@

quickstart: setup ## detectors find digits in scenes: teacher, student, distilled student; table, report, pictures
	$(RUN) projects/detection/quickstart.py --gin gin/quickstart_detection.gin

quickstart-classification: setup ## the same in a minute with classifiers of digits: teacher, student, KD, graphs and KD
	$(RUN) projects/classification/quickstart.py --gin gin/quickstart_classification.gin

test: lint ## all checks: style, types, tests
	$(RUN) -m pytest $(PYTEST_ARGS)

# Detectron2 is on no package index; its source needs no building for these tests, only the packages that it imports.
test-detectron2: setup ## the tests of Detectron2's detectors, with DETECTRON2=/path/to/a/checkout
	@test -d '$(DETECTRON2)/detectron2' || { echo 'Expected DETECTRON2=/path/to/a/checkout of https://github.com/facebookresearch/detectron2 (got "$(DETECTRON2)")' >&2; exit 2; }
	$(RUN) -m pip install --quiet $(PIP_ARGS) black cloudpickle fvcore hydra-core iopath omegaconf pycocotools tabulate termcolor tqdm yacs
	PYTHONPATH='$(DETECTRON2)' $(RUN) -m pytest $(PYTEST_ARGS) tests/detection/d2

fuzz: setup ## many random bindings, images, annotations and graphs: no traceback, no wrong result; some hours
	HYPOTHESIS_PROFILE=long $(RUN) -m pytest $(PYTEST_ARGS) tests/fuzz tests/graphs/test_fuzz.py tests/data/test_properties.py

torture: setup ## kill small trainings, fill their disk and send second writers, and count what is lost: some minutes
	$(RUN) -m projects.reliability.torture $(TORTURE_ARGS)

docs: setup ## the site, into docs/_build/html; warnings are errors, nothing is fetched
	$(RUN) -m pip install $(PIP_ARGS) --quiet --editable '.[docs]'
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: setup ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup ## rewrite the code in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find gkd projects tests -name __pycache__ -type d -prune -exec rm -rf {} +
