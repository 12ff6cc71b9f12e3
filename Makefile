# make demo   train on the synthetic set, export the seven variants, score a clip on each and check it
# make demo-words   train on real texts with MiniLM inside, export to int8, score sentences; VADER=FOLDER names the texts
# make test   the test suite
# make test-all   the same with all that a machine without a GPU can be brought, ARM under emulation, other NumPys
# make wheel  the wheel for this machine in build/wheel, tried in an environment of its own
# make fuzz   hostile files for every parser, SECONDS=600 of them: docs/results/robustness.json
# All set everything up by themselves: a virtual environment in .venv, the Python packages, the C++ library.

PYTHON ?= python3
# PyTorch's own index has a build without CUDA: 0.2 GB to fetch instead of 3 GB. TORCH_INDEX= takes pip's index alone.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard runtime/csrc/*)

.PHONY: demo demo-words test test-all wheel lint types bench fuzz exhaustive arm cuda-architectures clean

demo: $(VENV)/installed
	$(BIN)/python samples/demo.py

demo-words: $(VENV)/installed
	$(BIN)/python samples/demo_words.py $(if $(VADER),--vader '$(VADER)')

test: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/installed
	$(BIN)/python tests/all/run.py

wheel: $(VENV)/installed
	$(BIN)/python tests/wheel/run.py

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy over the three folders as the one package they are installed as; an editor may look there as well.
types: $(VENV)/installed
	rm -rf build/typing && mkdir -p build/typing/hcmen
	cd build/typing/hcmen && ln -s ../../../hcmen/* ../../../export ../../../runtime .
	$(BIN)/python -m mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/scan.py --out docs/results/scan_cpu.json
	$(BIN)/python benchmarks/training.py --out docs/results/training_speed.json

fuzz: $(VENV)/installed
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600) --out docs/results/robustness.json

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
# torch comes first: from the environment or local wheels if they have it, then from its own index if that answers.
$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	@case "$$PWD" in *[\"\$$\;\:\\]*) \
	  echo 'make: CMake or Python stumbles over one of " $$ ; : \ in the path of this folder: move it' >&2; exit 1;; esac
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; pip="$(BIN)/python -m pip install --constraint constraints.txt"; index="$(TORCH_INDEX)"; \
	if test -z "$$index" || $$pip --quiet --no-deps --no-index torch 2>/dev/null; then :; \
	elif $(BIN)/python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)" "$$index/torch/" 2>/dev/null \
	  && $$pip --no-deps --index-url "$$index" torch; then :; \
	else echo "make: $$index gives no torch: pip's own index is asked, whose build may bring CUDA along, 3 GB" >&2; fi; \
	echo $$pip --editable '.[dev]'; $$pip --editable '.[dev]'
	touch $@

clean:
	rm -rf build $(VENV)
