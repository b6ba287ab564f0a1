# Everything runs in .venv, made on first use from PYTHON (3.11 or newer); every target can be repeated.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The stamp is newer than pyproject.toml when the environment holds what it asks for.
STAMP := $(VENV)/.installed-test
DEMO_STAMP := $(VENV)/.installed-demo
DOCS_STAMP := $(VENV)/.installed-docs
BENCH_STAMP := $(VENV)/.installed-bench
WORKDIR ?= runs/demo

.PHONY: demo test test-all test-floor lint docs bench ledger clean

demo: $(DEMO_STAMP)
	$(PY) -m experiments.imagenet_freq --config=configs/imagenet_freq.py:demo --workdir=$(WORKDIR)

test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 4

# With the peers of the benchmarks, whose tests skip without them, and programs compiled as users
# compile them.
test-all: $(BENCH_STAMP)
	FQJAX_TEST_OPTIMIZED=1 $(PY) -m pytest -n auto --maxprocesses 4 -m 'full or not full'

# The lowest versions pyproject.toml admits, in an environment of their own.
test-floor:
	$(MAKE) test VENV=.venv-floor PIP_CONSTRAINT=constraints/floor.txt

lint: $(DOCS_STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

docs: $(DOCS_STAMP)
	$(PY) -m mkdocs build --strict

# Times only mean something on an otherwise idle machine.
bench: $(BENCH_STAMP)
	$(PY) -m benchmarks.transforms --json runs/transforms.json
	$(PY) -m benchmarks.input --json runs/input.json
	$(PY) -m benchmarks.train_step --json runs/train_step.json
	$(PY) -m benchmarks.collectives --json runs/collectives.json
	$(PY) -m benchmarks.sparsity --json runs/sparsity.json
	$(PY) -m benchmarks.quantize --json runs/quantize.json

# Fails where a row is no row, a command would no longer start, or the README's tables are not made
# from the rows; a goal that was missed is printed.
ledger: $(STAMP)
	$(PY) -m experiments.ledger --check

clean:
	rm -rf .venv .venv-floor site build *.egg-info

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'fqjax needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A failed install leaves no stamp, so the next call installs again.
$(DEMO_STAMP): pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[demo]'
	@touch $@

$(STAMP): pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[test]'
	@touch $@

$(DOCS_STAMP): pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[dev]'
	@touch $@

$(BENCH_STAMP): pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[bench]'
	@touch $@
