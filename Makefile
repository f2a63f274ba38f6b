# Everything a developer runs. `make demo` and `make test` need Python 3.11 or later, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-leaks fuzz check format protos models cuda train bench-engine bench-chunks bench-handoff bench-encodings clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbaton needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,dev]'
	touch $@

# Each target for FUZZ_SECONDS, by coverage; what was found before is in build/fuzz.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := codec receiver link server client

fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	for target in $(FUZZ_TARGETS); do PYTHONPATH=tests $(BIN)/python -m fuzz.run $$target $(FUZZ_SECONDS) || exit 1; done

demo: $(INSTALLED)
	$(BIN)/kvbaton demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m 'not cuda and not leaks'

# Ten thousand transfers by each transport: a minute or two.
test-leaks: $(INSTALLED)
	$(BIN)/python -m pytest -q -m leaks

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/yamllint --strict docker

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos:
	$(PYTHON) -m venv build/protos
	build/protos/bin/python -m pip install --quiet grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools==80.9.0
	PATH=$(CURDIR)/build/protos/bin:$$PATH build/protos/bin/python scripts/gen_protos.py

models: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m support.models_page

cuda: $(INSTALLED)
	$(BIN)/python -m pytest -q -m cuda

# Benchmarks leave their results in build/bench; docs/benchmarks.md is written from those that are there.
# A quarter of an hour on two quiet cores; with vLLM where bench/peers/setup_vllm.sh build/peers/vllm was run before.
bench-engine: $(INSTALLED)
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/report.py

# A minute.
bench-chunks: $(INSTALLED)
	$(BIN)/python bench/chunk_budget.py
	$(BIN)/python bench/report.py

# A quarter of an hour on two quiet cores; with NIXL and Mooncake where bench/peers/setup_nixl.sh build/peers/nixl and setup_mooncake.sh
# build/peers/mooncake were run before. It needs 6 GB of memory.
bench-handoff: $(INSTALLED)
	$(BIN)/python bench/handoff.py
	$(BIN)/python bench/handoff_latency.py
	$(BIN)/python bench/report.py

# Half a minute.
bench-encodings: $(INSTALLED)
	$(BIN)/python bench/kv_encodings.py
	$(BIN)/python bench/report.py

train: $(INSTALLED)
	$(BIN)/python scripts/train_tiny.py

clean:
	rm -rf .venv build dist
