# `make demo` and `make test` each do all the set-up they need; `make setup` is the part they share.
PYTHON ?= python3.11
EXTRA ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
UV_VERSION := 0.13.8
TORCH_VERSION := 2.13.0
BIN := .venv/bin

.PHONY: setup demo test check lock clean

setup: .venv/installed-$(EXTRA)

# pip finds a CPU torch where the machine provides one; elsewhere uv knows PyTorch's own CPU index.
.venv/installed-%: locks/%.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	if [ $* = cpu ]; then \
	  $(BIN)/python -m pip install --quiet --no-deps torch==$(TORCH_VERSION)+cpu || \
	  $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu torch==$(TORCH_VERSION); fi
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r locks/$*.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@
