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

# Long: every model with every plan. ARGS=0, 1 or 2 takes a third.
all-plans: .venv/.ready
	PYTHONPATH=tests $(BIN)/python tests/promises/all_plans.py $(ARGS)

# Long: a tiny model of every class that transformers has, on 2 and 3 ranks; makes docs/models.md. It goes on where it
# stopped; ARGS="--again refused" tries those again.
zoo: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python -W ignore -m zoo.run $(ARGS)

# Long: DeepSpeed, with every ZeRO stage, and more of the suite's engines and PEFT. DeepSpeed is built against the torch
# that is there; what it compiles for CPUs, it compiles at the first use, which takes minutes.
engines: .venv/.ready
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation 'deepspeed>=0.19.8'
	$(BIN)/python -m pytest -m "long or not long" tests/engines

# Long: trainers of other packages, in environments of their own, because each asks for another transformers.
adapters: .venv-adapters/.ready .venv-axolotl/.ready .venv-llamafactory/.ready .venv-swift/.ready
	.venv-adapters/bin/python -m pytest -m "long or not long" tests/adapters/test_trl.py
	for name in axolotl llamafactory swift; do \
		.venv-$$name/bin/python -m pytest -m "long or not long" tests/adapters/test_$$name.py || exit 1; done

# axolotl without what it takes for GPUs and for logging; LLaMA-Factory without torchvision, and with an empty torchaudio,
# because both packages' wheels need CUDA.
.venv-axolotl/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-axolotl/bin/python -m pip install --quiet --no-compile --no-deps axolotl==0.19.0 \
		axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
	.venv-axolotl/bin/python -m pip install --quiet --no-compile torch==2.13.0 transformers==5.16.1 accelerate==1.13.0 \
		datasets==4.8.4 trl==1.9.0 peft==0.20.0 pydantic==2.12.5 huggingface_hub==1.17.0 tokenizers==0.23.1 addict fire \
		PyYAML requests einops colorama 'numba<1.0' typer scipy art python-dotenv fastcore schedulefree==1.4.1 \
		posthog==6.7.11 pillow bitsandbytes==0.50.2 triton evaluate wandb pytest pytest-timeout
	touch $@

.venv-llamafactory/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-llamafactory
	.venv-llamafactory/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-llamafactory/bin/python -m pip install --quiet --no-compile torch==2.13.0 torchvision==0.28.0 \
		llamafactory==0.9.5 pytest pytest-timeout
	.venv-llamafactory/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $$(.venv-llamafactory/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchaudio.py
	touch $@

.venv-swift/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-swift/bin/python -m pip install --quiet --no-compile torch==2.13.0 ms-swift==4.6.0 pytest pytest-timeout
	touch $@

.venv-adapters/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-adapters/bin/python -m pip install --quiet --no-compile -e '.[dev,adapters]'
	touch $@

# Everything that can go wrong on a rank, on 2 and 4 ranks: reports/faults.csv; ARGS=--keep puts it into tests/data and docs.
faults: .venv/.ready
	PYTHONPATH=.:tests $(BIN)/python tests/ranks/faults.py $(ARGS)

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

# Long: a part of the parity suite with other versions of transformers: tests/data/versions.csv. ARGS=5.24.0/2.14.1 takes
# one of torch too.
versions: .venv/.ready
	$(BIN)/python tests/versions.py $(ARGS)

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
	rm -rf .venv .venv-adapters .venv-axolotl .venv-llamafactory .venv-swift .venv-mutants build reports
