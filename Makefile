# `make demo` and `make test` are all a newcomer needs; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := $(shell find kernels/cpu cmake -name '*.cpp' -o -name '*.h' -o -name '*.cmake' -o -name CMakeLists.txt 2>/dev/null)
MODEL ?= smollm2-135m-instruct
# Recorded seconds of `make test`, three processes together; and a commit since which the reached test files run whole.
CORE ?= 4500
SINCE ?=
IMAGE ?= llamaclust:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# What is missing is said in a line each, before anything is fetched or compiled.
define need_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "error: $(PYTHON) is not Python 3.11 or later: install one, and name it if need be, as in make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "error: $(PYTHON) makes no virtual environments: install python3-venv (Debian, Ubuntu: sudo make system-deps)" >&2; exit 1; }
endef
define need_compiler
@for compiler in "$$CXX" c++ g++ clang++; do command -v $${compiler:-none} >/dev/null && exit 0; done; \
  echo "error: no C++ compiler found: install g++ or clang++ (Debian, Ubuntu: sudo make system-deps), or name one in CXX" >&2; exit 1
endef

.PHONY: demo model check test test-all test-unit test-gpu cuda-matrix lint structure format build wheel wheel-test proto bench chart image image-test system-deps system-deps-test clean

demo: build ## a real model on two worker processes answers a question
	$(BIN)/python examples/demo.py

model: build ## the demo model, downloaded once
	$(BIN)/llamaclust model pull $(MODEL)

check: build $(VENV)/.lint $(VENV)/.test ## format, style, types, imports and unit tests: a minute or two
	@$(MAKE) --no-print-directory -j2 lint test-unit

test-unit:
	$(BIN)/python -m pytest -n 2 -m unit

# GPU kernels are compiled for the CPU first, so that no test waits for that.
define run_tests
PYTHONPATH=tests $(BIN)/python -m support.cuda.shim_build
$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not alone" $(1)
$(BIN)/python -m pytest -m alone $(1)
endef

test: build $(VENV)/.test $(VENV)/.helm model ## every package and promise; downloads the demo model once
	$(call run_tests,--core $(CORE) $(if $(SINCE),--since $(SINCE)))

test-all: build $(VENV)/.test $(VENV)/.helm model ## every case of every test
	$(call run_tests)

test-gpu: build $(VENV)/.test ## tests of the GPU's kernels on the first NVIDIA card
	$(BIN)/python -m pytest tests/kernels/cuda --gpu

cuda-matrix: build $(VENV)/.test ## those kernels compiled for every architecture, by NVIDIA's run-time compiler
	$(PIP) install -c constraints.txt --group cuda
	$(BIN)/python -m pytest tests/kernels/cuda/test_compile.py --all-architectures

lint: build $(VENV)/.lint $(VENV)/.test ## format, style, types of program and tests, imports between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

structure: build ## figures of the source's structure: folders, import depth, classes, functions, lines
	$(BIN)/python tests/support/structure.py

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: build ## engine speed on the demo model, beside this machine's own limits
	$(BIN)/llamaclust bench $(MODEL)

build: $(VENV)/.installed ## the program, editable, in .venv

wheel: build $(VENV)/.wheel ## dist/: a wheel that needs no compiler, for every Python from 3.11 on
	rm -rf dist build/wheel
	$(PIP) wheel --no-deps --no-build-isolation -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --only-plat -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

wheel-test: wheel ## the wheel, installed where there is no compiler, answers the demo's question
	deploy/wheel_test.sh dist/*.whl $(PYTHON)

proto: ## regenerate the stubs in proto/ with pinned tools in an environment of their own
	./proto/generate.sh $(PYTHON)

chart: build $(VENV)/.helm ## the Helm chart's README and schema from its values; looked through by helm
	$(BIN)/python deploy/helm/generate.py
	$(BIN)/helm lint --strict deploy/helm/llamaclust --set image.repository=llamaclust

image: ## a container image by docker, podman or buildah; BASE, EXTRAS and IMAGE_FLAGS are handed on
	builder=$$(deploy/builder.sh) || exit 1; [ $$builder = docker ] || format="--format docker"; \
	  $$builder build $$format $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(EXTRAS),--build-arg EXTRAS=$(EXTRAS)) $(IMAGE_FLAGS) \
	  -t $(IMAGE) -f deploy/Dockerfile .

image-test: image ## the image answers the demo's question
	deploy/image_test.sh $(IMAGE)

system-deps: ## Debian/Ubuntu packages (needs root): a compiler, Python's headers, OpenSSL
	apt-get update && apt-get install -y --no-install-recommends g++ make python3-venv python3-dev libssl-dev

system-deps-test: ## what tests of the ARM kernels, of networks and of the page in a browser need besides (needs root); they are skipped without
	apt-get update && apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user-static iproute2 iptables nftables libfaketime
	command -v chromium || command -v google-chrome || apt-get install -y --no-install-recommends chromium || \
	  echo "Chromium is not to be had here: the tests of the page in a browser are skipped" >&2

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
	@echo "compiling the kernels: two to four minutes on two idle cores, ten and more on old or busy ones"
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -c constraints.txt --group test
	@$(PIP) install -c constraints.txt --group launchers || \
	  echo "Ray or Open MPI is not to be had here: the tests of these launchers are skipped" >&2
	@$(PIP) install -c constraints.txt --group browser || \
	  echo "Playwright is not to be had here: the tests of the page in a browser are skipped" >&2
	@touch $@

# Only tests of the chart need it: without it they are skipped.
$(VENV)/.helm: $(VENV)/.deps deploy/helm/fetch.py
	@$(BIN)/python deploy/helm/fetch.py $(BIN)/helm && touch $@ || echo "no helm to be had: tests of the chart are skipped" >&2

$(VENV)/.wheel: $(VENV)/.deps
	$(PIP) install -c constraints.txt --group wheel
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -c constraints.txt --group lint
	@touch $@

clean: ## all that make, the tests and the linters have left here
	rm -rf $(VENV) build dist .hypothesis
	find . -type d \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +
