# `make demo` and `make test` do all their set-up themselves, in .venv, with the versions that constraints.txt pins.
# Python 3.11 to 3.13; another one than python3: `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := latentvlm configuration_latentvlm modeling_latentvlm processing_latentvlm conversion evaluation train benchmarks examples docs tests
SETUP := constraints.txt setup.cfg pyproject.toml .ci/install_torch.py
PYTEST := python -m pytest -q -n auto --dist loadfile

# Versions of transformers that the core suite runs on; the whole suite runs on the one in constraints.txt.
# vLLM takes 5.19. A line HUB_X names the newest huggingface_hub that transformers X accepts, where that is not the pin.
MATRIX := 5.17.0 5.19.0 5.21.1 5.23.0
HUB_5.17.0 := 1.33.0

.PHONY: demo docs notebooks test test-slow test-matrix test-newest check style export lock clean train-deeplatent train-lare train-vedas
.SECONDARY: $(MATRIX:%=.venvs/%/.ready)

# Make a virtual environment with torch in it. $(1): its folder; $(2): arguments of install_torch.py
define make_venv
@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(f"Python 3.11 to 3.13 is needed, \
$(PYTHON) is {sys.version.split()[0]}: name another one with PYTHON=python3.12")'
$(PYTHON) -m venv $(1)
$(1)/bin/python .ci/install_torch.py $(2)
endef

$(VENV)/.ready: $(SETUP)
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo

test: $(VENV)/.ready
	$(BIN)/$(PYTEST) $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/$(PYTEST) --slow -m slow $(ARGS)

# An environment of the matrix: the pins, but another transformers, and what the core suite needs.
.venvs/%/.ready: $(SETUP) Makefile
	$(call make_venv,.venvs/$*)
	grep -v -e '^transformers==' $(if $(HUB_$*),-e '^huggingface-hub==') constraints.txt > .venvs/$*/constraints.txt
	.venvs/$*/bin/python -m pip install --quiet --constraint .venvs/$*/constraints.txt transformers==$* \
		$(if $(HUB_$*),huggingface-hub==$(HUB_$*)) --editable ".[train]" pytest pytest-xdist
	touch $@

# `make core-5.19.0` runs the core suite on that version alone.
core-%: .venvs/%/.ready
	@echo "Core suite on transformers $*"
	.venvs/$*/bin/$(PYTEST) -m core $(ARGS)

test-matrix: $(MATRIX:%=core-%)

# What will come: the newest of every dependency by name, so that no bound in setup.cfg holds one back. Whatever runs
# here is not what the pins are, so a failure is a notice and no failure of the commit.
test-newest:
	$(call make_venv,.venvs/newest,--newest)
	.venvs/newest/bin/python .ci/newest.py
	.venvs/newest/bin/$(PYTEST) -m core $(ARGS)

# The pages of docs/ as a site, in an environment of their own without torch: the reference is read from the sources, not imported.
# Ruff formats its signatures. A warning is an error.
.venvs/docs/.ready: constraints.txt Makefile
	$(PYTHON) -m venv .venvs/docs
	.venvs/docs/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: .venvs/docs/.ready
	NO_MKDOCS_2_WARNING=1 .venvs/docs/bin/mkdocs build --strict --quiet

# Runs the notebooks from the first to the last cell; they are committed without outputs.
notebooks: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 0 --slow tests/test_notebooks.py $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(VENV)/.ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The code in checkpoints/ anew from the packages; it is committed, and a test holds it to them.
export: $(VENV)/.ready
	$(BIN)/python -m train.recipes.shipping

# Versions that are in constraints.txt stay as long as setup.cfg allows them; `make lock LOCK=--upgrade` takes the newest.
lock:
	$(PYTHON) -m venv .venvs/lock
	.venvs/lock/bin/python -m pip install --quiet --upgrade uv
	.venvs/lock/bin/python .ci/install_torch.py --pin > .venvs/lock/torch.txt
	.venvs/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra demo --extra docs \
		--constraint .venvs/lock/torch.txt --annotation-style line --custom-compile-command "make lock" $(LOCK) \
		--output-file constraints.txt setup.cfg

# Small models from nothing, on whatever is at hand; `TRAIN="--scale 0.01"` tries a recipe out.
train-deeplatent train-lare train-vedas: train-%: $(VENV)/.ready
	$(BIN)/python -m train.recipes $* --output out/small $(TRAIN)

clean:
	rm -rf $(VENV) .venvs *.egg-info build dist site
