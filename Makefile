# `make demo` and `make test` need Python 3.11 or newer and pip; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
# The tested versions; any torch from 2.11 on, with the torchvision that belongs to it, works.
TORCH ?= 2.14.1
TORCHVISION ?= 0.29.1
EXTRAS ?= models,tensorrt-rtx,dev
# One worker process per core, one thread in each. Each starts with a share of the files, so that models and exports that
# the tests of a file have in common are made once, and takes over from the others when it is done.
WORKERS ?= auto

OUT ?= samples/out
EPOCHS ?= 10

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint install clean

demo: $(OUT)/digits.pt
	$(BIN)/tokenopt optimize $(OUT)/digits.pt --recipe tome --schedule r=8 \
	    --data $(OUT)/digits-test.npz --batch 1,8,32 -o $(OUT)/optimized

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

install: $(STAMP)

clean:
	rm -rf $(VENV) $(OUT)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH) torchvision==$(TORCHVISION)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(OUT)/digits.pt: samples/train_digits.py | $(STAMP)
	$(BIN)/python samples/train_digits.py --out $(OUT) --epochs $(EPOCHS)
