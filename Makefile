# make demo   the whole way, on this machine's CPU: data, base, aligned models, fusion, training, release, report
# make test   the tests (make test-all: all of them in full counts; make check: linters, types, import contract)
# Both begin with make setup: a virtual environment in .venv with the pinned packages.
# make megablocks       MegaBlocks, for recipes that ask for it (docs/experts.md); make test-megablocks tests it on the CPU
# make test-lm-eval     the scores of suites against lm-evaluation-harness, which it installs beside the packages of .venv
#
# PYTHON       the Python to use (3.11 or newer)
# TORCH_INDEX  where torch comes from, when it is not your default index (for a CPU build, say)
# VENV         where make megablocks installs it; another one than .venv sees the packages of .venv too
# OUT          where make demo puts its results
# WORKERS      test files that run at a time (2); many start two or four processes of their own

PYTHON ?= python3
OUT ?= demo-out
VENV ?= .venv
MEGABLOCKS = megablocks==0.10.0 stanford-stk==0.7.1
TRITON = triton==3.9.0
LM_EVAL = lm_eval==0.4.13
WORKERS ?= 2
PIP_INSTALL = -m pip install --disable-pip-version-check --quiet
PIP = .venv/bin/python $(PIP_INSTALL)
# Tests start hundreds of processes: what they import is compiled once, also where the environment says not to keep that.
CPU = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=

.PHONY: setup demo test test-all megablocks test-megablocks lm-eval test-lm-eval check format clean

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
	$(CPU) .venv/bin/python -m pytest --numprocesses $(WORKERS) -m 'not slow and not gpu and not megablocks and not lm_eval'

test-all: setup
	$(CPU) .venv/bin/python -m pytest --numprocesses $(WORKERS) -m 'not gpu and not megablocks and not lm_eval'

# Without its pins, which name an old torch. Its compiled extension does not build with CUDA 13: without a GPU in sight it is not
# tried (h3scale has it in plain torch), and a list of architectures keeps the build from looking for one. GPU builds of torch bring
# triton along.
megablocks: setup
	test -d $(VENV) || .venv/bin/python -m venv --without-pip $(VENV)
	test $(VENV) = .venv || ls -d $(CURDIR)/.venv/lib/python3*/site-packages > $$(ls -d $(VENV)/lib/python3*/site-packages)/shared.pth
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/python $(PIP_INSTALL) --no-deps $(TRITON)
	CUDA_VISIBLE_DEVICES= TORCH_CUDA_ARCH_LIST=9.0 $(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation $(MEGABLOCKS)

test-megablocks:
	$(MAKE) megablocks VENV=.venv-megablocks
	$(CPU) TRITON_INTERPRET=1 .venv-megablocks/bin/python -m pytest -m megablocks tests/megablocks tests/repo/test_benchmark_layers.py

# In an environment of its own: h3scale has no need of the thirty packages that it brings.
lm-eval:
	test -d .venv-lm-eval || .venv/bin/python -m venv --without-pip .venv-lm-eval
	ls -d $(CURDIR)/.venv/lib/python3*/site-packages > $$(ls -d .venv-lm-eval/lib/python3*/site-packages)/shared.pth
	.venv-lm-eval/bin/python $(PIP_INSTALL) --constraint constraints.txt $(LM_EVAL)

test-lm-eval: lm-eval
	$(CPU) .venv-lm-eval/bin/python -m pytest -m lm_eval tests/parity

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
	rm -rf .venv .venv-megablocks .venv-lm-eval demo-out
