# make demo   train on the synthetic set, export the seven variants, score a clip on each and check it
# make test   the test suite
# Both set everything up by themselves: a virtual environment in .venv, the Python packages, the C++ library.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard runtime/csrc/*)

.PHONY: demo test lint types bench exhaustive arm cuda-architectures clean

demo: $(VENV)/installed
	$(BIN)/python samples/demo.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy over the three folders as the one package they are installed as; an editor may look there as well.
types: $(VENV)/installed
	rm -rf build/typing && mkdir -p build/typing/hcmen
	ln -s $(CURDIR)/hcmen/* $(CURDIR)/export $(CURDIR)/runtime build/typing/hcmen/
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/scan.py --out docs/results/scan_cpu.json
	$(BIN)/python benchmarks/training.py --out docs/results/training_speed.json

# The elementary functions of the kernels at every float32: some 10 minutes of two cores.
exhaustive: $(VENV)/installed
	cmake -S runtime/csrc -B build/exhaustive -DHCMEN_TESTS=ON
	cmake --build build/exhaustive --target hcmen_ops_test --parallel 2
	$(BIN)/python benchmarks/ulp.py build/exhaustive/hcmen_ops_test --out docs/results/ulp.json

# Everything for 64-bit ARM, by the cross compiler and under qemu: docs/arm.md.
arm: $(VENV)/installed
	$(BIN)/python tests/arm/run.py

# The CUDA kernels by nvcc for every architecture from 75 to 120, warnings being errors: registers and spills of each.
cuda-architectures:
	$(PYTHON) tests/gpu/build.py --architectures all --out build/cuda_all

# Installed in place: a change of Python code needs no reinstall, a change of C++ code does, and make sees to it.
$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build $(VENV)
