# `make run` and `make test` do all the set-up themselves; CONTRIBUTING.md tells the rest.
#
# What may be set, on the command line or in the environment:
#   PYTHON=python3.12        the interpreter that makes the virtual environment (default: the first one that is 3.11 or newer)
#   INSTAR_VENV=.venv        where the virtual environment lies, relative to this folder and without spaces
#   INSTAR_TORCH_INDEX=URL   the index that torch and torchvision come from, for a CPU or another CUDA build; always both,
#                            because torchvision is compiled against torch
#   CONSTRAINTS=FILE         the exact versions to install (default: constraints.txt; empty: the newest that fit)
#   PIP_ARGS=...             more arguments for `pip install`
#   PYTEST_ARGS=...          more arguments for pytest, for example PYTEST_ARGS="-k pgd"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
INSTAR_VENV ?= .venv
INSTAR_TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
PYTEST_ARGS ?=
# Two workers of one thread each: what the tests were sized for, see conftest.py.
WORKERS ?= 2

bin := $(INSTAR_VENV)/bin
stamp := $(INSTAR_VENV)/.installed
pinned := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
install = $(bin)/python -m pip install --disable-pip-version-check $(PIP_ARGS) $(pinned)
pip_beside = $(bin)/python -m pip --disable-pip-version-check --python build/wheel-check/venv/bin/python
purelib = import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: help run setup test docs fuzz lint lint-format lint-rules lint-types format wheel wheel-check lock clean

help:
	@echo 'make run          train, resume and evaluate on the embedded digits'
	@echo 'make test         the whole test suite'
	@echo 'make docs         the documentation site, into docs/_build/html; warnings are errors'
	@echo 'make fuzz         a million mutated inputs for everything that reads what a stranger may have written'
	@echo 'make lint         format, lint and types, as CI checks them'
	@echo 'make format       mend what can be mended by machine'
	@echo 'make wheel        build the wheel into dist/'
	@echo 'make wheel-check  install the wheel beside the environment and run it outside the checkout'
	@echo 'make lock         resolve constraints.txt anew (on Linux, with the oldest supported Python)'
	@echo 'make clean        remove the environment and everything that was built'

setup: $(stamp)

# Written last, so that an interrupted set-up starts again; pip keeps what it already has.
$(stamp): pyproject.toml $(CONSTRAINTS)
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: expected Python 3.11 or newer; got '$(or $(PYTHON),none)'. Install one, or name it: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(INSTAR_VENV) || { \
	  rm -rf $(INSTAR_VENV); \
	  echo "make: '$(PYTHON) -m venv' failed, see above. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@echo '*' > $(INSTAR_VENV)/.gitignore
	@echo 'Setting up $(INSTAR_VENV); torch is large: expect minutes and several GB the first time.'
	$(install) --upgrade pip hatchling
ifneq ($(INSTAR_TORCH_INDEX),)
	$(install) --no-deps --index-url $(INSTAR_TORCH_INDEX) torch torchvision
endif
	$(install) --no-build-isolation -e '.[dev]'
	@touch $(stamp)

run: $(stamp)
	@. $(bin)/activate && sh examples/main_job.sh

test: $(stamp)
	$(bin)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

docs: $(stamp)
	$(bin)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

fuzz: $(stamp)
	$(bin)/python benchmarks/fuzz.py --out build/fuzz

# Three targets, so that `make --keep-going lint` tells everything at once.
lint: lint-format lint-rules lint-types

lint-format: $(stamp)
	$(bin)/ruff format --check .

lint-rules: $(stamp)
	$(bin)/ruff check .

lint-types: $(stamp)
	$(bin)/mypy

format: $(stamp)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

wheel: $(stamp)
	$(bin)/python -m build --wheel --no-isolation --outdir dist

# The second environment holds nothing but the wheel: a path file lends it the packages of the first, because torch is
# too large to install twice. A path file found through a path file is not read, so the editable install stays hidden.
wheel-check: $(stamp)
	rm -rf build/wheel-check
	$(bin)/python -m build --wheel --no-isolation --outdir build/wheel-check/dist
	$(bin)/python -m venv --without-pip build/wheel-check/venv
	$(pip_beside) install --quiet --no-index --no-deps build/wheel-check/dist/*.whl
	@$(bin)/python -c '$(purelib)' > "$$(build/wheel-check/venv/bin/python -c '$(purelib)')/borrowed.pth"
	$(pip_beside) check
	PATH="$$PWD/build/wheel-check/venv/bin:$$PATH" sh .ci/outside-checkout

lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet --dry-run --ignore-installed --report build/lock/report.json \
	  --constraint .ci/lock-limits.txt pip '.[dev]'
	build/lock/bin/python .ci/write_constraints.py build/lock/report.json constraints.txt

clean:
	rm -rf $(INSTAR_VENV) build dist docs/_build docs/examples .hypothesis .mypy_cache .pytest_cache .ruff_cache
