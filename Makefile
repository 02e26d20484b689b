# Every target does its own set-up through `make setup`.
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTHON ?= python3
SECONDS ?= 600
MINUTES ?= 10
# Of the study; made when it is not there.
CORPUS ?= corpus-out
# Without their caches the tests spend a third of their time on compiling themselves.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo reproduce chaos undefended fuzz test unit check format protos clean
.NOTPARALLEL:

setup: .venv/.setup-stamp

.venv/.setup-stamp: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(PY) -m examples.demo --out demo-out

reproduce: setup $(CORPUS)/manifest.json
	$(PY) -m bench.reproduce --corpus $(CORPUS)/train --out reproduce-out $(if $(SIZE),--size $(SIZE)) $(if $(FULL),--full)

$(CORPUS)/manifest.json: | setup
	$(PY) -m bench.corpus $(CORPUS)

chaos: setup
	$(PY) -m tests.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

undefended: setup
	$(PY) -m tests.undefended

fuzz: setup
	$(PY) -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

test: setup
	$(PY) -m pytest tests

unit: setup
	$(PY) -m pytest tests/unit -n 2

check: setup
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	buf lint
	$(PY) scripts/generate_protos.py --check
	$(PY) scripts/generate_measurements.py --check
	$(PY) -m cbtm_coordinator.migrations check

format: setup
	ruff format .
	ruff check --fix .

protos: setup
	$(PY) scripts/generate_protos.py

clean:
	rm -rf .venv demo-out corpus-out reproduce-out .mypy_cache .ruff_cache .pytest_cache
