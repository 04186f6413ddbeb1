# `make demo` and `make test` do all their set-up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := configuration_latentvlm modeling_latentvlm processing_latentvlm conversion train benchmarks examples docs tests

.PHONY: demo test check style clean train-deeplatent train-lare train-vedas

# A CUDA build of torch only where there is a GPU: its wheels weigh gigabytes.
$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/install_torch.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m train.checkpoints
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(VENV)/.ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Small models from nothing, on whatever is at hand; `TRAIN="--scale 0.01"` tries a recipe out.
train-deeplatent train-lare train-vedas: train-%: $(VENV)/.ready
	$(BIN)/python -m train.recipes $* --output out/small $(TRAIN)

clean:
	rm -rf $(VENV) *.egg-info build dist
