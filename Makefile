VENV ?= .venv
PORT ?= 8000
MODEL = tests/assets/recall-9m
BIN = $(VENV)/bin
FFA_FUZZ_CASES ?= 20000
FFA_FUZZ_SEED ?= $(shell echo $$$$)
READY = $(VENV)/.ready

export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# Set-up writes no .pyc files: the first import does, unless this variable forbids it, and every one is slow then.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo eval test test-fast fuzz soak serve doctor lint check-compiled tables gpu-test bench bench-decode bench-serving bench-kproj clean

help:
	@echo "make setup | demo | eval | test | test-fast | fuzz | soak | serve | doctor | lint | check-compiled | tables | gpu-test | bench | clean"
	@echo "PYTHON=... picks the interpreter of the set-up, PORT=... the port of serve, MODEL=... the model of demo, eval and serve, ARGS='...' adds arguments."

setup: $(READY)

$(READY): pyproject.toml scripts/setup.sh scripts/prepare_cpu.py
	@scripts/setup.sh $(VENV)
	@touch $@

demo: $(READY)
	@$(BIN)/ffa-fp8fp8 demo --model $(MODEL) $(ARGS)

eval: $(READY)
	@$(BIN)/ffa-fp8fp8 eval --model $(MODEL) $(ARGS)

doctor: $(READY)
	@$(BIN)/ffa-fp8fp8 doctor

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow" $(ARGS)

fuzz: $(READY)
	FFA_FUZZ_CASES=$(FFA_FUZZ_CASES) FFA_FUZZ_SEED=$(FFA_FUZZ_SEED) $(BIN)/python -m pytest -n 2 --dist loadfile --timeout 0 -rP tests/fuzz $(ARGS)

soak: $(READY)
	$(BIN)/python scripts/soak.py --model $(MODEL) --minutes 3 --drafts 0 4 $(ARGS)

gpu-test: $(READY)
	$(BIN)/python -m pytest -m gpu -n 4 --dist loadgroup --no-loadscope-reorder tests/engine tests/kernels $(ARGS)

check-compiled: $(READY)
	@$(BIN)/python scripts/check_compiled.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tables: $(READY)
	@$(BIN)/python scripts/make_tables.py

serve: $(READY)
	@BIN=$(BIN) PORT=$(PORT) scripts/serve.sh $(MODEL)

bench: $(READY)
	@$(BIN)/ffa-fp8fp8 bench $(ARGS)

bench-decode bench-serving bench-kproj:
	@echo "make $@ is now: make bench ARGS='$(@:bench-%=%) ...'"; exit 2

clean:
	rm -rf $(VENV) .triton build *.egg-info
