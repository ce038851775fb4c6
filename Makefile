# `make demo` and `make test` set up everything they need in .venv; see README.md.
# Another Python: make test PYTHON=python3.13 VENV=.cache/python3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TOOLS := pytest pytest-xdist hypothesis ruff import-linter torchattacks timm tensorboard onnx onnxruntime openvino
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

.PHONY: demo test test-all lint clean

$(VENV)/installed: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=70.1,<81" wheel
	$(BIN)/pip install --quiet --no-build-isolation -r requirements.txt $(TOOLS)
	touch $@

demo: $(VENV)/installed
	$(BIN)/python train.py --dataset digits --depth 20 --batch-size 64 --epochs 60 --target 0.7 --expname demo --overwrite
	$(BIN)/python train.py --test --resume runs/demo --gate-mode sample
	$(BIN)/python train.py --test --resume runs/demo

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not engine"
	$(PYTEST) -m "not slow and engine"

test-all: $(VENV)/installed
	$(PYTEST) -m "not engine"
	$(PYTEST) -m engine

lint: $(VENV)/installed
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports

clean:
	rm -rf $(VENV)
