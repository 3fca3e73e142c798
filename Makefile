.PHONY: demo test test-servers bench check

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

.venv-servers/ready: tests/servers/requirements.txt  # what is uninstalled is built for another torch than this one
	$(PYTHON) -m venv .venv-servers
	.venv-servers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-servers/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-tools/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lm-eval]' peft==0.21.2
	touch $@

test-servers: .venv-servers/ready .venv-tools/ready  ## real servers and tools: gigabytes of packages, minutes
	.venv-tools/bin/python -m pytest tests/servers

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
