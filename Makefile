# `make demo` runs the program, and `make test` tests it. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := $(shell find kernels/cpu cmake -name '*.cpp' -o -name '*.h' -o -name '*.cmake' -o -name CMakeLists.txt 2>/dev/null)
MODEL ?= smollm2-135m-instruct
# `make test` runs all cases of tests marked `rule` and one case of each other, quickest first, up to CORE seconds of
# recorded time, summed over its processes, and up to ALONE seconds of the tests that need an idle machine.
# Its random inputs are always the same, those of `make test-all` new in each run, unless LLAMACLUST_TEST_SEED names a seed.
# If SINCE names a commit, all cases of test files that changes since the commit affect run, too.
CORE ?= 660
ALONE ?= 30
SINCE ?=
IMAGE ?= llamaclust:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# If a tool is missing, one line says so before anything is downloaded or compiled.
define need_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "error: $(PYTHON) is not Python 3.11 or later: install Python 3.11 or later, and name it if needed, as in make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "error: $(PYTHON) cannot create virtual environments: install python3-venv (Debian, Ubuntu: sudo make system-deps)" >&2; exit 1; }
endef
define need_compiler
@for compiler in "$$CXX" c++ g++ clang++; do command -v $${compiler:-none} >/dev/null && exit 0; done; \
  echo "error: no C++ compiler found: install g++ or clang++ (Debian, Ubuntu: sudo make system-deps), or name one in CXX" >&2; exit 1
endef

.PHONY: help demo model check shim test test-all test-unit test-gpu cuda-matrix lint structure format build wheel wheel-test proto bench chart image image-test system-deps system-deps-test clean

demo: build ## Lets a real model on two worker processes answer a question.
	$(BIN)/python examples/demo.py

help: ## Lists the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(firstword $(MAKEFILE_LIST))

model: build ## Downloads the demo model, unless it is already downloaded.
	$(BIN)/llamaclust model pull $(MODEL)

check: build $(VENV)/.lint $(VENV)/.test ## Checks format, style, types and imports, and runs unit tests. Takes some minutes.
	@$(MAKE) --no-print-directory -j2 lint test-unit

test-unit:
	$(BIN)/python -m pytest -n 2 -m unit

define run_tests
$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not alone" $(1)
$(BIN)/python -m pytest -m alone $(2)
endef

# The CUDA kernels are compiled for the CPU before tests run, so that no test has to wait for the compiler.
shim: build $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m support.cuda.shim_build

test: export LLAMACLUST_TEST_SEED ?= 1
test: since = $(if $(SINCE),--since $(SINCE))
test: build $(VENV)/.test $(VENV)/.helm model shim ## Runs tests of all packages. Downloads the demo model once.
	$(call run_tests,--core $(CORE) $(since),--core $(ALONE) $(since))

test-all: build $(VENV)/.test $(VENV)/.helm model shim ## Runs all cases of all tests.
	$(call run_tests)

test-gpu: build $(VENV)/.test ## Tests the CUDA kernels on the first NVIDIA GPU.
	$(BIN)/python -m pytest tests/kernels/cuda --gpu

cuda-matrix: build $(VENV)/.test ## Compiles the CUDA kernels for all GPU architectures with NVIDIA's run-time compiler.
	$(PIP) install -c constraints.txt --group cuda
	$(BIN)/python -m pytest tests/kernels/cuda/test_compile.py --all-architectures

lint: build $(VENV)/.lint $(VENV)/.test ## Checks format, style, the types of program and tests, and imports between packages.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

structure: build ## Prints statistics of the source code: folders, import depth, classes, functions, lines.
	$(BIN)/python tests/support/structure.py

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: build ## Measures the speed of the demo model, and compares it with the limits of this machine.
	$(BIN)/llamaclust bench $(MODEL)

build: $(VENV)/.installed ## Compiles the kernels, and installs the program in .venv in editable mode.

wheel: build $(VENV)/.wheel ## Builds a wheel in dist/, for Python 3.11 and later. Its installation needs no compiler.
	rm -rf dist build/wheel
	$(PIP) wheel --no-deps --no-build-isolation -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --only-plat -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

wheel-test: wheel ## Installs the wheel without a compiler, and runs the demo with it.
	deploy/wheel_test.sh dist/*.whl $(PYTHON)

proto: ## Regenerates the stubs in proto/ with pinned tools in a temporary environment.
	./proto/generate.sh $(PYTHON)

chart: build $(VENV)/.helm ## Generates the Helm chart's README and schema, and checks the chart with `helm lint`.
	$(BIN)/python deploy/helm/generate.py
	$(BIN)/helm lint --strict deploy/helm/llamaclust --set image.repository=llamaclust

image: ## Builds a container image with docker, podman or buildah. BASE, EXTRAS and IMAGE_FLAGS are passed on.
	builder=$$(deploy/builder.sh) || exit 1; [ $$builder = docker ] || format="--format docker"; \
	  $$builder build $$format $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(EXTRAS),--build-arg EXTRAS=$(EXTRAS)) $(IMAGE_FLAGS) \
	  -t $(IMAGE) -f deploy/Dockerfile .

image-test: image ## Tests that a container of the image answers the demo's question.
	deploy/image_test.sh $(IMAGE)

system-deps: ## Installs packages of Debian or Ubuntu (needs root): a compiler, Python's headers, OpenSSL.
	apt-get update && apt-get install -y --no-install-recommends g++ make python3-venv python3-dev libssl-dev

system-deps-test: ## Installs packages for tests of ARM kernels, networks and the web page (needs root). Without them, these tests are skipped.
	apt-get update && apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user-static iproute2 iptables nftables libfaketime
	command -v chromium || command -v google-chrome || apt-get install -y --no-install-recommends chromium || \
	  echo "Chromium cannot be installed: the tests of the web page in a browser are skipped" >&2

$(VENV)/.pip: constraints.txt
	$(need_python)
	$(need_compiler)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'pip>=25.1'
	@touch $@

$(VENV)/.deps: $(VENV)/.pip pyproject.toml
	$(PIP) install -c constraints.txt --group build
	@touch $@

$(VENV)/.installed: $(VENV)/.deps $(NATIVE) CMakeLists.txt
	$(need_compiler)
	@echo "compiling the kernels: this takes two to four minutes on two idle cores, and ten or more on old or busy cores"
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -c constraints.txt --group test
	@touch $@.tried
	@$(PIP) install -c constraints.txt --group launchers || { rm -f $@.tried; \
	  echo "Ray or Open MPI cannot be installed: the tests of these launchers are skipped" >&2; }
	@$(PIP) install -c constraints.txt --group browser || { rm -f $@.tried; \
	  echo "Playwright cannot be installed: the tests of the web page in a browser are skipped" >&2; }
	@[ ! -e $@.tried ] || mv $@.tried $@

# Only tests of the chart need helm. Without helm, they are skipped.
$(VENV)/.helm: $(VENV)/.deps deploy/helm/fetch.py
	@$(BIN)/python deploy/helm/fetch.py $(BIN)/helm && touch $@ || echo "helm cannot be downloaded: the tests of the chart are skipped" >&2

$(VENV)/.wheel: $(VENV)/.deps
	$(PIP) install -c constraints.txt --group wheel
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -c constraints.txt --group lint
	@touch $@

clean: ## Deletes all files that make, the tests and the linters created here.
	rm -rf $(VENV) build dist .hypothesis
	find . -type d \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +
