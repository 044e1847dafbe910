# make demo      lock, verify, merge, unlock and audit the embedded models; pictures, figures and a report in demo/
# make test      style, types and all tests but the slow ones: what CI runs
# make test-all  the slow ones too, with keys, salts and probes that are new in every run: real models from packages, every
#                architecture, the kill tests, and the report in a real browser (Chromium, which the system must have)
# make lint      style and types alone
# make bench     speed and memory beside a plain copy, on a 1.7 GB checkpoint that it makes
#
# .venv is made on first use and again only when pyproject.toml or constraints.txt change.
# UNMERGEABLE_UV=1 makes it with uv, which may fetch another build of torch than pip does.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
ifdef UNMERGEABLE_UV
  UV := $(shell command -v uv)
endif

.PHONY: demo test test-all lint bench clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/unmergeable demo -o demo

# One thread each: two processes on two cores, whose threads would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not browser"

test-all: lint $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --fresh

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(STAMP)
	mkdir -p bench/results
	$(BIN)/python bench/speed.py -o bench/results/speed.json

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed; name one by PYTHON=..." >&2; exit 1; }
ifneq ($(UV),)
	uv venv --allow-existing --python $(PYTHON) $(VENV)
	uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[all,dev]"
else
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --editable ".[all,dev]"
endif
	touch $@

$(VENV)/.browser: $(STAMP)
ifneq ($(UV),)
	uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[browser]"
else
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --editable ".[browser]"
endif
	touch $@

clean:
	rm -rf $(VENV) demo build dist
