# Environments are made from nothing; python3 with venv and pip are all that must be there. Versions come from
# constraints.txt, and pip heeds its own settings (PIP_INDEX_URL, PIP_CONSTRAINT, pip.conf), so that a CPU build of
# torch, or a mirror, can be used.

PYTHON ?= python3
MARKS ?= not slow and not gpu and not tensorrt
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sample test test-fast test-all test-floors test-pycuda fuzz check lint types kernels gpu-check format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

sample: ## Draw samples.png with the bundled model: 256 images, two steps, no torch installed
	@+$(call environment,.venv)
	.venv/bin/cm-runtime sample --steps 2 --batch 256

check: ## Lint, formatting and types; and the kernels compile, where there is nvcc
	@+$(call environment,.venv-dev)
	@+$(MAKE) --silent --no-print-directory --jobs 2 --output-sync kernels types lint

lint:
	.venv-dev/bin/ruff check
	.venv-dev/bin/ruff format --check

types:
	.venv-dev/bin/mypy

kernels:
	$(MAKE) -C kernels check

# Two workers of one thread each: torch's own threads would otherwise contend for the same cores.
pytest = OMP_NUM_THREADS=1 .venv-dev/bin/python -m pytest -n 2 --dist worksteal -m "$(MARKS)" $(PYTEST_ARGS)

test: check ## What CI runs: make check, then the tests, in ten minutes; MARKS="gpu" or "slow" runs those instead
	$(pytest)

test-fast: MARKS := $(MARKS) and not process
test-fast: ## For every edit: the tests that start no process and take a moment, in some two minutes
	@+$(call environment,.venv-dev)
	$(pytest)

test-all: MARKS := not gpu and not tensorrt
test-all: check ## Every night: the slow tests too: full products, kill matrices, compilations, Ray and wheels
	$(pytest)

INPUTS ?= 10000
FIRST ?= 0

fuzz: ## INPUTS mutated files, shared among all readers; those that fail are kept in build/fuzz
	@+$(call environment,.venv-dev)
	.venv-dev/bin/python tests/fuzz/run.py --inputs $(INPUTS) --first $(FIRST)

# uv resolves to the lowest versions of what pyproject.toml names, and to the newest of what those need.
test-floors: ## The same tests with the oldest packages that pyproject.toml allows
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip --disable-pip-version-check install --quiet uv
	.venv-floors/bin/uv pip install --quiet --python .venv-floors/bin/python --torch-backend cpu \
		--resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -n 2 --dist worksteal -m "$(MARKS)" $(PYTEST_ARGS)

test-pycuda: ## The stand-in for CUDA's driver under the real pycuda, which is built from its source once, in 80 s
	@+$(call environment,.venv-dev)
	CM_RUNTIME_PYCUDA=1 .venv-dev/bin/python -m pytest tests/driver/test_pycuda.py tests/cuda/test_on_driver.py $(PYTEST_ARGS)

# GPU_PYTHON: one that has torch for CUDA, onnxruntime-gpu, cuda-bindings and pytest, or some of them.
# GPU_ARGS: more words, as --part torch; benchmarks/README.md has them.
GPU_PYTHON ?=
GPU_RESULT ?= build/gpu.json
GPU_ARGS ?=

gpu-check: ## What only a GPU can prove, eight minutes a call, completing GPU_RESULT; without a GPU, in host mode
	@+$(if $(GPU_PYTHON),,$(call environment,.venv-dev))
	$(or $(GPU_PYTHON),.venv-dev/bin/python) benchmarks/gpu_check.py -o $(GPU_RESULT) $(GPU_ARGS)

format: ## Mend what ruff can mend
	@+$(call environment,.venv-dev)
	.venv-dev/bin/ruff check --fix
	.venv-dev/bin/ruff format

clean: ## Remove the environments, caches and what a build leaves
	rm -rf .venv .venv-dev .venv-floors build dist cm_runtime.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One make at a time fills an environment (where there is flock), and the stamp, `ready`, comes last: an environment
# left half made is filled by the next make, and a full one costs nothing.
FLOCK := $(shell command -v flock)
environment = mkdir -p $(1) && $(if $(FLOCK),$(FLOCK) $(1)/lock) $(MAKE) --silent --no-print-directory $(1)/ready

.venv/ready: extra = cpu
.venv-dev/ready: extra = dev
pip = $(@D)/bin/python -m pip --disable-pip-version-check

.venv/ready .venv-dev/ready: pyproject.toml constraints.txt
	echo "installing cm-runtime[$(extra)] in $(@D)"
	$(pip) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	$(pip) install --quiet --constraint constraints.txt setuptools
	$(pip) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(extra)]'
	touch $@
