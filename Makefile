.PHONY: demo test bench check

PYTHON ?= python3
BIN := .venv/bin

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready  ## compress the shipped model, load it, compare it with the original
	rm -rf runs/demo runs/demo.partial
	$(BIN)/globe compress -o runs/demo
	$(BIN)/globe evaluate runs/demo --prompt 'def test_read(self):'

test: .venv/ready  ## the test suite
	$(BIN)/python -m pytest

check: .venv/ready  ## style, types, and the direction of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: .venv/ready  ## every measured figure: tables on the terminal, JSON and pictures in benchmarks/results (hours)
	$(BIN)/python -m benchmarks.quality --rivals all
	$(BIN)/python -m benchmarks.race
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.calibrated
	$(BIN)/python -m benchmarks.allocation
	$(BIN)/python -m benchmarks.scopes
	$(BIN)/python -m benchmarks.sparse
	$(BIN)/python -m benchmarks.convergence
	$(BIN)/python -m benchmarks.serving
