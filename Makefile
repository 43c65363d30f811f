# Each target sets up its own environment: `make demo` and `make test` work on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# onnxruntime-gpu also runs on the CPU, but exists for Linux and Windows on x86-64 only.
ORT := $(shell $(PYTHON) -c "import platform, sys; print('gpu' if platform.machine().lower() in ('x86_64', 'amd64') and sys.platform in ('linux', 'win32') else 'cpu')")

# Of the native library: the install compiles it, if there is a C++ compiler.
NATIVE := $(sort $(wildcard native/*/*.h native/*/*.cpp))

# Tests start Python some sixty times, which without bytecode compiles icnnrt each time; empty is as if it were not set.
export PYTHONDONTWRITEBYTECODE :=

# A file of tests is run by one worker, for what its tests share; conftest.py has the long ones begin first.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all native check format clean

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) $(wildcard native/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable ".[$(ORT),demo,cli]"
	touch $@

demo: $(VENV)/.ready  ## train, export, reload without torch, complete images, check, draw
	$(BIN)/icnnrt demo

test: $(VENV)/.ready  ## lint, types, the kernels' tests, and every capability once
	$(MAKE) -j 2 check native
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready  ## the same with all that repeats it in size: see tests/amounts.py
	$(MAKE) -j 2 check native
	ICNNRT_TEST_AMOUNT=all $(PYTEST)

native: $(VENV)/.ready  ## the kernels' C++ tests; without a compiler CMake says so and there are none
	$(BIN)/cmake --preset tests
	$(BIN)/cmake --build --preset tests
	$(BIN)/ctest --preset tests

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
