# Each target is complete in itself on a machine with git, make and Python >= 3.11.
# PYTHON picks the interpreter; EXTRAS of a target are installed into .venv once, under the pinned constraints.

PYTHON ?= python3
VENV ?= .venv
CORES = $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

# One test process per core; WORKERS=0 runs all tests in this process, for a debugger.
WORKERS ?= $(CORES)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo docs test test-fast test-gpu bench bench-gpu coverage test-oldest faults notebooks quality imports clean

demo: $(VENV)/.demo
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) run_glue.py recipes/demo/sparse.yaml

test: $(VENV)/.test $(VENV)/.trl
	$(PYTEST) $(PYTEST_ARGS)

# For the inner loop: no runs of the launcher or of a trainer, and two cases of each parametrized test.
test-fast: $(VENV)/.test
	$(PYTEST) -m "not slow and not run" --few 2 $(PYTEST_ARGS)

# Tests that need a CUDA device; all other targets hide it.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# All performance rows of the pages, in at most 40 minutes; BENCH='--data path/to/glue' adds those on real rows.
bench: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(BENCH)

# All methods on a CUDA card: correctness, time, memory; at most ten minutes.
bench-gpu: $(VENV)/.test
	$(BIN)/python benchmarks/accelerator.py $(BENCH)

# Coverage of lines and branches, forks and commands included; htmlcov/index.html shows what is missed.
coverage: $(VENV)/.test $(VENV)/.trl
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html $(PYTEST_ARGS)

# About 1,200 injected faults, an hour on one core; FAULTS='--count 4' runs a fifth of them.
faults: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/faults/campaign.py $(FAULTS)
	ARGUMENT_EXAMPLES=150 $(BIN)/python -m pytest tests/faults/inputs/test_arguments.py

# Write the notebooks of examples/ from the scripts, then run them without the Hub, in a few minutes.
notebooks: $(VENV)/.demo $(VENV)/.test $(VENV)/.trl $(VENV)/.notebooks
	$(BIN)/python docs/notebooks.py
	HF_HUB_OFFLINE=1 $(BIN)/python docs/notebooks.py --execute

quality: $(VENV)/.quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

# Draw which package imports which, in imports.svg; pyproject.toml lists the layers.
imports: $(VENV)/.quality
	$(BIN)/python docs/import_graph.py imports.svg

# Build the documentation into site/, offline, with warnings as errors. To read it with its search:
# python -m http.server --directory site
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The lowest versions that setup.cfg allows, in a separate environment.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-oldest build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage* htmlcov

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# One stamp file for each extra: later runs reuse the environment; a change of the requirements installs again.
# torch is installed first, so that the pinned build is there before another package asks for a range of versions.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) torch
	touch $@

$(VENV)/.%: setup.cfg pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) --editable '.[$*]'
	touch $@

$(VENV)/.quality: setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) ruff mypy import-linter
	touch $@

# The API pages are made from the source, so the package itself is not installed.
$(VENV)/.docs: setup.cfg constraints.txt | $(BIN)/python
	$(INSTALL) mkdocs-material 'mkdocstrings[python]' ruff
	touch $@
