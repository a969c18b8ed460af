# Every target sets itself up: the environment lies in .venv and is reused.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check gpu perf all-plans compile-table clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py

test: .venv/.ready
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules triton_sp -p no:cacheprovider

# On a machine with a GPU and its own PyTorch and Triton: nothing is installed, nothing is fetched.
gpu:
	$(PYTHON) perf/gpu.py

# Long: every model with every plan.
all-plans: .venv/.ready
	$(BIN)/python tests/all_plans.py

# DeepSpeed takes part if it is installed: .venv/bin/python -m pip install -e '.[peers]'
perf: .venv/.ready
	$(BIN)/python perf/exchange.py

compile-table: .venv/.ready
	$(BIN)/python tests/compile_table.py

# torch first and by exact version: where a local build of it exists (CPU machines) pip takes that one, and the
# second install then leaves it alone.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv || (echo "this python has no venv module; on Debian/Ubuntu: apt-get install python3-venv" && exit 1)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv reports
