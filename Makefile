# Every target does its own set-up in $(VENV); a second run installs nothing.
# On a machine that already has torch and pytest, and no network:  make gpu-test VENV=
PYTHON ?= python3
VENV ?= .venv

ifeq ($(VENV),)
  RUN := PYTHONPATH=src $(PYTHON)
  READY :=
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif

.PHONY: help demo test check format gpu-test bench results wheel clean

help:
	@echo "make demo      write text with the bundled model"
	@echo "make test      run the tests that need no GPU"
	@echo "make check     lint, format, types, import rules"
	@echo "make format    rewrite the sources as 'make check' wants them"
	@echo "make gpu-test  run the tests that need an NVIDIA GPU"
	@echo "make bench     measure this machine: latency and throughput beside transformers"
	@echo "make results   make the documents' tables and figures anew from benchmarks/results"
	@echo "make wheel     build the wheel into dist/"
	@echo "make clean     remove $(VENV) and caches"

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) -m strobe generate "First Citizen:" --echo --max-tokens 200

test: $(READY)
	$(RUN) -m pytest -n 2 -m "not gpu"

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command as lint; lint()"
	$(RUN) -m strobe.bench.document --check

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

gpu-test: $(READY)
	$(RUN) tests/gpu/run.py tests

bench: $(READY)
	$(RUN) -m strobe bench latency --vs transformers --save auto
	$(RUN) -m strobe bench throughput --vs transformers --save auto

results: $(READY)
	$(RUN) -m strobe.bench.document

wheel: $(READY)
	$(RUN) -m build --wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
