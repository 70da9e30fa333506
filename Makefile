# make demo    the main job on embedded defaults: a tiny model learns to follow requested scores (two cores, minutes)
# make test    the unit tests, in a process for each core, up to four (JOBS=1: one)
# make bench   ours against naive PyTorch and the baselines; writes benchmarks/results/cpu.json (ARGS="--set ci": half a minute)
# make gpu-check  every kernel on a GPU against the float64 oracle; writes benchmarks/results/check-gpu.json
# make gpu-bench  make bench on a GPU, within 8 minutes; writes benchmarks/results/gpu.json
# make gpu-pack  on a machine without a GPU: what tools/gpu.sh would build on one with, for sm_90, in build/gpu
# make lint    ruff, mypy, clang-format, codespell
# make compile-check  every GPU kernel compiled without a GPU, its machine code compared with benchmarks/results/compile
# make sanitize  the C++ kernels of the CPU under AddressSanitizer and UBSan (minutes)
# make audit   known vulnerabilities of what .venv holds, by pip-audit
# make wheel-matrix  one wheel, tried with every Python here and every CPU build of torch that pip has (minutes each)
# make versions  the newest, pinned and lowest TRL, transformers, PEFT and torch, each tried (ARGS="--rows newest"; half an hour)
# make docs    the documentation site, API reference included, in build/docs
# Each creates .venv and what it needs. Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CORES = $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench gpu-check gpu-bench gpu-pack compile-check sanitize audit docs lint wheel wheel-matrix versions clean

# torch first: the extension is built against it, without build isolation.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cpo-kernels needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) torch 'setuptools>=77' wheel ninja numpy
	touch $@

.venv/train: .venv/torch $(SOURCES)
	@echo 'compiling the kernels with $(CORES) processes; objects are kept in build/objects'
	$(PIP) --no-build-isolation -e '.[train,plot]'
	touch $@

.venv/test: .venv/train
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

# The baselines without what they pull in: torch is there, and their CUDA parts are not needed.
.venv/bench: .venv/test
	$(PIP) --no-deps liger-kernel cut-cross-entropy
	touch $@

demo: .venv/train
	$(BIN)/cpo-kernels demo $(ARGS)

# A file's tests stay in one process, with its share of the cores: at least one.
JOBS ?= $(shell $(PYTHON) -c 'print(min($(CORES), 4))')

test: .venv/test
	OMP_NUM_THREADS=$$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) )) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=10 tests benchmarks $(ARGS)

bench: .venv/bench
	$(BIN)/cpo-kernels bench --device cpu --set default --out benchmarks/results/cpu.json $(ARGS)

gpu-check: .venv/test
	$(BIN)/cpo-kernels check --device cuda --processes 4 --out benchmarks/results/check-gpu.json $(ARGS)

gpu-bench: .venv/bench
	$(BIN)/cpo-kernels bench --set gpu --out benchmarks/results/gpu.json $(ARGS)

# The Triton of torch 2.10 and 2.11, the oldest that the library runs with, beside the pinned one.
.venv/triton-3.6: .venv/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==3.6.0

gpu-pack: .venv/torch
	PYTHON=$(BIN)/python tools/gpu_pack.sh

compile-check: .venv/test .venv/triton-3.6
	$(BIN)/python -W ignore -m tools.compile_table.triton_table --check $(ARGS)
	$(BIN)/python -m tools.compile_table.cuda_table --check $(ARGS)
	TRITON_SITE=.venv/triton-3.6 $(BIN)/python -m pytest tests/kernels/test_triton_binding.py

sanitize: .venv/test
	PYTHON=$(BIN)/python tools/sanitize_cpu.sh $(ARGS)

# --strict: a package without advisory data fails. "+cpu" is no release of the index.
audit: .venv/bench
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > build/audit/frozen.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r build/audit/frozen.txt $(ARGS)

docs: .venv/test
	PYTHON=$(BIN)/python tools/docs.sh $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/host_cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/codespell
	$(BIN)/mypy

wheel: .venv/torch
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

wheel-matrix: .venv/torch
	$(BIN)/python -m tools.wheel_matrix $(ARGS)

versions: .venv/train
	$(BIN)/python -m tools.version_matrix $(ARGS)

clean:
	rm -rf .venv build dist cpo_kernels/*.so *.egg-info
