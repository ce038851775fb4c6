# `make demo` and `make test` set up everything they need in .venv; see README.md
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=70.1,<81" wheel
	$(BIN)/pip install --quiet --no-build-isolation -r requirements.txt pytest hypothesis ruff torchattacks
	touch $@

demo: .venv/installed
	$(BIN)/python train.py --dataset digits --depth 20 --batch-size 64 --epochs 60 --target 0.7 --expname demo --overwrite
	$(BIN)/python train.py --test --resume runs/demo/model_best.pth.tar --gate-mode sample
	$(BIN)/python train.py --test --resume runs/demo/model_best.pth.tar

test: .venv/installed
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv
