# Two commands on a bare machine: `make demo` and `make test`. `make test WING=kv` runs the tests of one wing, tests/kv
# (WING=tools those of tools/).
# PYTHON is any Python 3.10 to 3.12; everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve test check format bench clean

demo: $(VENV)/installed
	$(BIN)/avl-edge run --image examples/cockpit.png --prompt "What is the speed?" --stats

serve: $(VENV)/serve
	$(BIN)/avl-edge serve

# The models are tiny: a second thread costs more than it computes, and cores are shared by the processes.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(if $(WING),tests/$(WING))

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python -m tools.bench_decode

clean:
	rm -rf $(VENV) build dist *.egg-info avl_edge/attention/*.so avl_edge/kv/books/*.so

# The package is installed in place, so that its kernels are built once and its sources stay editable.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard plugins/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "avl-edge needs Python 3.10 to 3.12: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/serve: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
