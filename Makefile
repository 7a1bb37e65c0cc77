# tuneforge: `make quickstart` and `make test` are all that a fresh clone needs.
# (Both create .venv on their first run.)  `make help` lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONDONTWRITEBYTECODE # torch and its kin, compiled anew in each process, take 20 s

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 24

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tuneforge needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(READY) ## make .venv with the tested versions of constraints.txt

quickstart: $(READY) ## train, fine-tune, merge and question a small model (some minutes on 2 CPU cores)
	$(BIN)/tuneforge quickstart

test: $(READY)   ## everything but the slow cells: drift, notebooks, tests/
	$(BIN)/python -m pytest -n auto --maxprocesses=4

test-slow: $(READY) ## the slow cells and tests as well
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --slow

export: $(READY) ## notebooks to tuneforge/, and clean them
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean

run: $(READY)    ## run a notebook and keep its outputs: make run NB=nbs/22_adapters.ipynb
	PYTHONWARNINGS=ignore::FutureWarning HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 $(BIN)/nbdev-test $(NB) --save
	$(BIN)/nbdev-clean --fname $(NB)

readme: $(READY) ## README.md from nbs/index.ipynb
	$(BIN)/python -m tests.readme > README.md.new && mv README.md.new README.md

docs: $(READY)   ## the docs site (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: https://quarto.org/docs/get-started"; exit 1; }
	$(BIN)/nbdev-docs

clean:           ## remove what make made (not your own outputs)
	rm -rf .venv build dist *.egg-info _docs _proc quickstart

.PHONY: help install quickstart test test-slow export run readme docs clean
