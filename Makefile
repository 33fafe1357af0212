# make quickstart   train a glyph recogniser on two ranks, from nothing
# make test         lint, types, tests          make test-all   with the slow, full-size ones
# make test-slurm   jobs on a real Slurm, installed if possible
# Each creates the virtual environment .venv. TORCH="torch==2.13.0" chooses the torch to install, PIP_ARGS adds arguments
# for pip (an index of CPU builds, a folder of wheels), and JOBS=4 runs four test files at a time.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PIP_ARGS ?=
RANKS ?= 2
JOBS ?= 2
GLYPHS ?= data/glyphs
export OMP_NUM_THREADS ?= 1

FORCE:

.PHONY: help quickstart test test-all test-slurm lint benchmark clean
help:
	@sed -n '1,5s/^# //p' Makefile

# One stamp per set of packages, renewed when its sources change, the choice of torch included.
$(VENV)/.choice: FORCE
	@mkdir -p $(VENV)
	@echo "$(TORCH) $(PIP_ARGS)" | cmp -s - $@ || echo "$(TORCH) $(PIP_ARGS)" > $@

$(VENV)/.train: pyproject.toml locks/train.txt launch/install.sh $(VENV)/.choice
	@launch/install.sh "$(PYTHON)" "$(VENV)" "$(TORCH)" train "$(PIP_ARGS)"
	@touch $@

$(VENV)/.dev: $(VENV)/.train locks/dev.txt
	@launch/install.sh "$(PYTHON)" "$(VENV)" "$(TORCH)" dev "$(PIP_ARGS)"
	@touch $@

quickstart: $(VENV)/.train
	@$(VENV)/bin/python -m partialfc data glyphs --out $(GLYPHS) --classes 2000 --size 32 --fonts small
	@$(VENV)/bin/torchrun --nproc-per-node $(RANKS) -m partialfc train configs/quickstart.yaml

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not slurm"

test-all: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slurm"

test-slurm: $(VENV)/.dev
	@tests/install_slurm.sh
	$(VENV)/bin/python -m pytest -m slurm tests/launch/test_slurm.py

benchmark: $(VENV)/.train
	$(VENV)/bin/python benchmarks/head_step.py

clean:
	rm -rf .venv build *.egg-info
