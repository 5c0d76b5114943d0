# Everything that a developer or a visitor needs: `make help`.

PYTHON ?= $(firstword $(shell command -v python3.11 python3 python 2>/dev/null))
# Empty: pip's own registry. An address: PyTorch's index for your machine (README.md, Set-up).
TORCH_INDEX ?=
SMALL ?=
HOST ?=
OUT ?=

VENV ?= .venv
# vLLM wants other versions of packages than the project's own environment has.
VLLM_VENV ?= build/vllm-venv
BIN := $(VENV)/bin
SET_UP = $(PYTHON) tools/set_up.py $(1) --venv $(2) --torch-index "$(TORCH_INDEX)"
DEMO_OPTIONS = $(if $(SMALL),--small "$(SMALL)") $(if $(HOST),--host $(HOST)) \
	$(if $(OUT),--out "$(OUT)")

.DEFAULT_GOAL := help
.PHONY: help python test test-llamacpp test-vllm test-cuda test-browser test-clients demo bench \
	bench-speed load check format docs models clean

help:  ## Say what can be made
	@echo "make test    set up .venv and run the tests"
	@echo "make test-llamacpp  build llama.cpp (20 to 40 minutes on two cores); test hosts and exports"
	@echo "make test-vllm      run the plugin in vLLM's CPU build, 3.9 GB in an environment of its own"
	@echo "make test-cuda      the main job on a GPU, against the processor's; where there is one"
	@echo "make test-browser   run the playground in Chromium, which must be on the path"
	@echo "make test-clients   ask the server with litellm and lm-evaluation-harness"
	@echo "make demo    set up .venv and run the main job on real models: build/demo/report.html"
	@echo "             SMALL=MODEL HOST=\"MODEL ...\" takes others: hub names, folders, GGUF files"
	@echo "make bench   the transfer suite, hours on two cores: BENCH=\"--pair ... --domain ...\""
	@echo "make bench-speed    speed beside all that competes, about 40 min: BENCH=\"--rows head ...\""
	@echo "make load    a server under 200 clients, faults and kill -9, some minutes: build/load"
	@echo "make check   format, lint and types, as .ci/run does after the tests"
	@echo "make format  rewrite the source in the project's format"
	@echo "make docs    rewrite the generated tables of the documentation"
	@echo "make clean   delete .venv and build (downloads, caches, the demo's results)"
	@echo "options      PYTHON=python3.11  TORCH_INDEX=URL (which build of PyTorch; see README.md)"

test: $(VENV)/ready-test models
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2

test-llamacpp: $(VENV)/ready-llamacpp models
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/test_llamacpp.py \
		tests/test_llamacpp_host.py tests/test_llamacpp_expert.py

# Logs are not collected: vLLM sets torch's to say everything.
test-vllm: $(VLLM_VENV)/ready-vllm
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VLLM_VENV)/bin/python -m pytest -p no:logging \
		tests/test_vllm.py tests/test_vllm_parts.py tests/test_vllm_lora.py

# Where there is a GPU and torch was built for it: the main job there, against the processor's.
test-cuda: $(VENV)/ready-test
	@TRIMTAB_TEST_CUDA=1 $(BIN)/python -m pytest tests/test_cuda.py

test-browser: $(VENV)/ready-browser
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/test_playground.py

test-clients: $(VENV)/ready-clients
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/test_serve_clients.py

demo: $(VENV)/ready-demo
	@TRIMTAB_HOME=$${TRIMTAB_HOME:-build/cache} $(BIN)/python -m examples.demo $(DEMO_OPTIONS)

bench: $(VENV)/ready-demo
	@TRIMTAB_HOME=$${TRIMTAB_HOME:-build/cache} $(BIN)/python -m bench.transfer $(BENCH)

bench-speed: $(VENV)/ready-demo
	@TRIMTAB_HOME=$${TRIMTAB_HOME:-build/cache} $(BIN)/python -m bench.speed $(BENCH)

load: $(VENV)/ready-load
	$(BIN)/python -m bench.load $(LOAD)

check: $(VENV)/ready-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready-test
	$(BIN)/python -m tools.generated_docs

# The tests' real model; TRIMTAB_TEST_MODELS names a folder that has it already.
models: $(VENV)/ready-test
	@test -n "$$TRIMTAB_TEST_MODELS" || $(BIN)/python -m examples.demo.models smollm2-135m-instruct

$(VLLM_VENV)/ready-vllm: constraints-vllm.txt pyproject.toml tools/set_up.py | python
	@$(call SET_UP,vllm,$(VLLM_VENV))

$(VENV)/ready-%: constraints.txt pyproject.toml tools/set_up.py | python
	@$(call SET_UP,$*,$(VENV))

python:
	@test -n "$(PYTHON)" || { echo "set-up: no Python found; Trimtab needs Python 3.11 or" \
		"newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }

clean:
	rm -rf $(VENV) build
