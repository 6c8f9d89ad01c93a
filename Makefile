# make demo   set up and run the main job      make test   set up and run all tests
# make lint   check formatting                 make format apply it
# make bench  time the ops beside their peers  make sanitize  run the CPU kernels under sanitizers
# make wheels  sdist -> wheels, native and pure Python, each run in an environment of its own without a compiler
# make docs   the reference from the docstrings, in build/docs
# make fuzz   load tens of thousands of hostile adapter files, and search for a call that computes something wrong
# make readme-check  compare README with the results
# make compat TORCH=2.15.0  the tests with another release of torch, in an environment of its own (fetches gigabytes)
# make cuda-check  compile the CUDA kernels for every target, and run them block by block on the CPU (part of make test)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) setup.py

.PHONY: demo test lint format bench sanitize cuda-check fuzz readme-check docs wheels compat clean

demo: $(VENV)/.installed
	$(BIN)/dts-fast demo $(ARGS)

test: $(VENV)/.installed lint readme-check
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

bench: $(VENV)/.installed
	$(BIN)/python bench/bench_ops.py $(ARGS)

sanitize:
	mkdir -p build
	$(CXX) -std=c++20 -O1 -g -Wno-psabi -DDTS_FAST_POISON -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc -o build/sanitize \
		tests/native/sanitize.cpp csrc/cpu/batch.cpp csrc/cpu/paging.cpp csrc/cpu/isa.cpp csrc/cpu/scalar.cpp csrc/cpu/avx2.cpp csrc/cpu/avx512.cpp csrc/cpu/avx512_bf16.cpp csrc/cpu/amx.cpp
	build/sanitize

fuzz: $(VENV)/.installed
	DTS_FAST_FUZZ=40000 $(BIN)/python -m pytest -q tests/test_fuzz.py $(ARGS)
	$(BIN)/python -m pytest -q tests/test_ops.py -k any_legal_call --hypothesis-profile search $(ARGS)

readme-check: $(VENV)/.installed
	$(BIN)/python bench/readme.py --check

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt "pdoc>=15"
	$(BIN)/pdoc -o build/docs dts_fast

# With another PYTHON, for that version: make wheels PYTHON=python3.13
wheels:
	rm -rf build/wheels && mkdir -p build/wheels
	$(PYTHON) -m venv build/wheels/builder
	build/wheels/builder/bin/pip install --quiet -c constraints.txt "setuptools>=64" wheel build torch pybind11 ninja numpy
	build/wheels/builder/bin/python -m build --sdist --no-isolation --outdir build/wheels
	for kind in native pure; do \
	  choice=$$([ $$kind = native ] && echo cpu || echo none) && \
	  DTS_FAST_BUILD=$$choice build/wheels/builder/bin/pip wheel --quiet --no-build-isolation --no-deps \
	    --wheel-dir build/wheels/$$kind build/wheels/dts_fast-*.tar.gz && \
	  $(PYTHON) -m venv build/wheels/clean-$$kind && \
	  build/wheels/clean-$$kind/bin/pip install --quiet -c constraints.txt build/wheels/$$kind/*.whl && \
	  (cd build/wheels && env -i HOME="$$HOME" PATH=clean-$$kind/bin clean-$$kind/bin/python ../../tests/smoke.py $$kind) || exit 1; \
	done

# Not the block sizes of Triton's kernels: they were chosen, and their registers counted, for the release in constraints.txt.
compat:
	rm -rf build/compat && mkdir -p build/compat/tree
	$(PYTHON) -m venv build/compat/venv
	build/compat/venv/bin/pip install --quiet "setuptools>=64" wheel pybind11 ninja "numpy<2.4" "torch==$(TORCH)"
	git archive HEAD | tar -x -C build/compat/tree
	cd build/compat/tree && DTS_FAST_BUILD=cpu ../venv/bin/pip install --quiet --no-build-isolation --editable ".[dev]"
	cd build/compat/tree && ../venv/bin/python -m pytest -k "not every_configuration_compiles" $(ARGS)

cuda-check: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_cuda.py $(ARGS)

# The build tools and torch first: the extension is built against the torch that runs it (--no-build-isolation).
$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=64" wheel torch pybind11 ninja numpy
	touch $@

# Editable, so that a changed Python file needs no installation; a changed native file or setting does.
$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info dts_fast/*.so
