# Every target sets itself up: the environment lies in .venv and is reused.
PYTHON ?= python3
BIN := .venv/bin
# Where Python is told to write no bytecode, each of a test's processes would compile all of transformers: 14 s, not 5.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check docs gpu perf all-plans zoo interpreter engines adapters faults chaos long-run mutants soak versions compile-table clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py

test: .venv/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m tools.house
	$(BIN)/python -m tools.imports --check
	$(BIN)/python -m perf.plot --check
	$(BIN)/python -m pytest --doctest-modules triton_sp perf tools -p no:cacheprovider \
		--import-mode=importlib -o consider_namespace_packages=true

# The site, for reading from a folder: build/site/index.html.
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# On a machine with a GPU and its own PyTorch and Triton: nothing is installed, nothing is fetched. OUT=folder takes all
# results, BUDGET=seconds trims.
gpu:
	$(PYTHON) -m perf.gpu $(if $(OUT),--out $(OUT)) $(if $(BUDGET),--budget $(BUDGET))

# Long: the kernels in Triton's interpreter, in every dtype.
interpreter: .venv/.ready
	cd tests/kernels && OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ../../$(BIN)/python -m pytest -m "long or not long" --noconftest \
		attend_cases.py attend_properties.py bounds_cases.py check_cases.py pack_cases.py splice_cases.py

# Long: every model with every plan.
all-plans: .venv/.ready
	PYTHONPATH=tests $(BIN)/python tests/promises/all_plans.py

# Long: a tiny model of every class that transformers has, on 2 and 3 ranks; makes docs/models.md. It goes on where it
# stopped; ARGS="--again refused" tries those again.
zoo: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python -W ignore -m zoo.run $(ARGS)

# Long: DeepSpeed, with every ZeRO stage, and more of the suite's engines and PEFT. DeepSpeed is built against the torch
# that is there; what it compiles for CPUs, it compiles at the first use, which takes minutes.
engines: .venv/.ready
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation 'deepspeed>=0.19.8'
	$(BIN)/python -m pytest -m "long or not long" tests/engines

# Long: trainers of other packages, in an environment of their own.
adapters: .venv-adapters/.ready
	.venv-adapters/bin/python -m pytest -m "long or not long" tests/adapters

.venv-adapters/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-adapters/bin/python -m pip install --quiet --no-compile -e '.[dev,adapters]'
	touch $@

# Everything that can go wrong on a rank, on 2 and 4 ranks: reports/faults.csv.
faults: .venv/.ready
	PYTHONPATH=tests $(BIN)/python tests/ranks/faults.py

# Long: training in which a random fault strikes a rank at a random moment: reports/chaos.csv. ARGS="--runs 20" for less.
chaos: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python tests/ranks/chaos.py $(ARGS)

# Long: 2,000 steps on 2 ranks beside one process: tests/data/long_run.csv and docs/figures/long_run.png.
long-run: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python tests/promises/long_run.py

# Long: which small changes of the source the tests notice, by a sample of cosmic-ray's mutants: reports/mutants.csv, and
# the counts in tests/data/mutants.csv. ARGS="--sample 20 triton_sp/plan/cost.py" for less.
mutants: .venv-mutants/.ready
	PYTHONPATH=.:tests .venv-mutants/bin/python -m mutants.examine $(ARGS)

.venv-mutants/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-mutants/bin/python -m pip install --quiet --no-compile -e '.[dev,mutants]'
	touch $@

# 10,000 small steps of all kinds, all parity with every fresh buffer filled with NaN, memory of every family, and
# recurrent layers of every kind on 2, 3 and 4 ranks.
soak: .venv/.ready
	$(BIN)/python -m pytest -n 2 -m long tests/promises/test_poison.py tests/promises/test_memory.py tests/promises/test_bounds.py \
		tests/wrappers/test_hybrids.py \
		tests/wrappers/test_special.py tests/promises/test_video.py
	PYTHONPATH=tests $(BIN)/python tests/promises/fuzz.py 10000

# What a CPU can measure; DeepSpeed takes part if it is installed: .venv/bin/python -m pip install -e '.[peers]'
perf: .venv/.ready
	for sweep in scale agree fuse exchange model single_rank host plan; do $(BIN)/python -m perf.sweep $$sweep --device cpu || exit 1; done
	$(BIN)/python -m perf.plot

# Long: a part of the parity suite with other versions of transformers: tests/data/versions.csv.
versions: .venv/.ready
	$(BIN)/python tests/versions.py

# Long: an hour of CPU. It goes on where it stopped; ARGS="sm_90 72" takes a part, ARGS=--again compiles all anew.
compile-table: .venv/.ready
	$(BIN)/python tests/kernels/compile_table.py $(ARGS)
	$(BIN)/python tests/kernels/moves_table.py

# torch first and by exact version: where a local build of it exists (CPU machines) pip takes that one, and the
# second install then leaves it alone. --no-compile: 1 minute instead of 3, most of what is installed is never imported.
# What every process imports is compiled once, before the first tests start ten at the same time: 14 s each, then 7.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv || (echo "this python has no venv module; on Debian/Ubuntu: apt-get install python3-venv" && exit 1)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]'
	$(BIN)/python -c "import torch._dynamo, transformers.modeling_utils, triton"
	touch $@

clean:
	rm -rf .venv .venv-adapters .venv-mutants build reports
