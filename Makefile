# `make demo` and `make test` each do all the set-up they need; `make setup` is the part they share.
PYTHON ?= python3.11
EXTRA ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
UV_VERSION := 0.13.8
TORCH_VERSION := 2.13.0
BIN := .venv/bin

.PHONY: setup demo fast test test-portable check import-guard schema lock clean

setup: .venv/installed-$(EXTRA)

# Compiled, because every worker process imports torch and vLLM: where nothing may write bytecode later, that is 7 s each.
# pip finds a CPU torch where the machine provides one; elsewhere uv knows PyTorch's own CPU index.
.venv/installed-%: locks/%.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	if [ $* = cpu ]; then \
	  $(BIN)/python -m pip install --quiet --no-deps torch==$(TORCH_VERSION)+cpu || \
	  $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu torch==$(TORCH_VERSION); fi
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r locks/$*.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python -m fleet.realign --manifest models.json

# What needs no Ray, engine, S3 server or training: under two minutes.
fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not vllm and not s3 and not slow"

# A file's tests stay together, because they share a Ray and an engine.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

# The numeric tests again, by the kernels of a processor without AVX: what holds by the luck of one kind fails on another.
OLD_KERNELS := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Nehalem ONEDNN_MAX_CPU_ISA=SSE41 \
  NUMBA_CPU_NAME=generic
test-portable: setup
	$(OLD_KERNELS) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not vllm and not s3" \
	  tests/algebra tests/fusion tests/methods tests/work

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# What planning and --help import, and nothing heavy among it.
import-guard: setup
	$(BIN)/python -m pytest -q tests/run/test_realign.py -k "imports_no_heavy"

schema:
	$(BIN)/python -c "from fleet.manifest import manifest_schema as s; print(s(), end='')" > fleet/manifest/manifest.schema.json

# The locks leave out what breaks a CPU torch; the GPU one resolves torch's CUDA build.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --override locks/cpu-overrides.txt \
	  --torch-backend cpu --python-version 3.11 --no-header --no-annotate --output-file locks/cpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra gpu --extra dev \
	  --python-version 3.11 --no-header --no-annotate --output-file locks/gpu.txt

clean:
	rm -rf artifacts mlflow.db mlruns
