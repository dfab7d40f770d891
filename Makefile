# Everything from a fresh clone with Python, pip and make: each target makes .venv if it is missing.
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/digits_reliability
# One thread is fastest for small networks, and makes results repeatable.
export OMP_NUM_THREADS ?= 1
.PHONY: demo test test-slow lint bench digits-train
.NOTPARALLEL:

demo: $(VENV)/.installed-test
	$(BIN)/tiltflow run experiments/digits_reliability.toml --out $(OUT)
	@echo "The report is $(OUT)/report.html"
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/run.py
digits-train: $(VENV)/.installed-train
	$(BIN)/python -m tiltflow.adapters.train_digits --out src/tiltflow/data

# .installed-EXTRA: the virtual environment has the package with that extra.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@
