# make demo   the whole way, on this machine's CPU: data, base, aligned models, fusion, training, release, report
# make test   the tests (make test-all: all of them in full counts; make check: linters, types, import contract)
# Both begin with make setup: a virtual environment in .venv with the pinned packages.
#
# PYTHON       the Python to use (3.11 or newer)
# TORCH_INDEX  where torch comes from, when it is not your default index (for a CPU build, say)
# OUT          where make demo puts its results
# WORKERS      test files that run at a time (2); many start two or four processes of their own

PYTHON ?= python3
OUT ?= demo-out
WORKERS ?= 2
PIP = .venv/bin/python -m pip install --disable-pip-version-check --quiet
CPU = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1

.PHONY: setup demo test test-all check format clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("h3scale needs Python 3.11 or newer, this is %d.%d (make PYTHON=python3.12 ...)" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	.venv/bin/h3scale demo --out $(OUT)

test: setup
	$(CPU) .venv/bin/python -m pytest --numprocesses $(WORKERS) -m 'not slow and not gpu'

test-all: setup
	$(CPU) .venv/bin/python -m pytest --numprocesses $(WORKERS) -m 'not gpu'

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck slurm/*.sh .ci/run

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv demo-out
