# The targets of the project; `make help` lists them. Each makes what it needs, and makes nothing twice.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTEST_ARGS ?=
CARGO_TEST_ARGS ?=
PYTEST_JOBS ?= $(shell nproc)
DEMO_ARGS ?=

OMP_NUM_THREADS ?= $(shell nproc)
export OMP_NUM_THREADS
# Every worker of pytest has one core, and torch's threads would wait for each other on it; tests of threads ask for theirs.
TEST_THREADS := $(shell n=$$(( $$(nproc) / $(PYTEST_JOBS) )); echo $$(( n > 1 ? n : 1 )))
PYTEST = OMP_NUM_THREADS=$(TEST_THREADS) $(BUILD_ENV) .venv/bin/pytest -n $(PYTEST_JOBS) --dist worksteal
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

# Every recipe that builds Rust goes through this: it sets CARGO_TARGET_DIR and the interpreter that pyo3 asks.
BUILD_ENV := scripts/build-env.sh

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r target what; do \
		printf '  make %-17s %s\n' "$$target" "$$what"; done

.PHONY: setup
setup: ## third-party packages, the built wheel and the small model, in .venv
	@scripts/setup.sh

.PHONY: demo
demo: setup ## run the demonstration on the small model; pictures and text go to out/demo (DEMO_ARGS)
	@mkdir -p out/demo
	.venv/bin/kvsieve demo --out out/demo $(DEMO_ARGS)

.PHONY: test
test: setup ## every test that needs no GPU: the Rust core, then Python against the installed wheel (PYTEST_ARGS)
	$(BUILD_ENV) cargo test --locked --workspace --exclude kvsieve-py $(CARGO_TEST_ARGS)
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: compile-tests
compile-tests: ## compile the Rust core's tests, and nothing else; `make test` runs them
	$(BUILD_ENV) cargo test --quiet --locked --workspace --exclude kvsieve-py --no-run

# The seam with transformers and everything that `generate` does, without the real model and without the slow tests. What a backend
# computes does not depend on transformers: one of them is enough here, with each value of each parameter.
RELEASE ?= oldest newest
RELEASE_ARGS ?= --backend cpu --each -m "not model and not gpu and not slow" tests/generate tests/surface/test_transformers_facts.py

.PHONY: test-transformers
test-transformers: setup ## the seam's and generate's tests on other releases (RELEASE="oldest newest", or 5.17.0, ...)
	@OMP_NUM_THREADS=$(TEST_THREADS) PYTEST_JOBS=$(PYTEST_JOBS) scripts/test-transformers.sh $(RELEASE) -- $(RELEASE_ARGS) $(PYTEST_ARGS)

.PHONY: test-ray
test-ray: setup ## the tests of `kvsieve serve --ray`: two replicas, one killed under load (installs Ray beside the environment, once)
	@OMP_NUM_THREADS=1 scripts/test-ray.sh $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: setup ## the same without the real model
	$(BUILD_ENV) cargo test --locked --workspace --exclude kvsieve-py $(CARGO_TEST_ARGS)
	$(PYTEST) -m "not model and not gpu" $(PYTEST_ARGS)

FUZZ_CALLS ?= 100000
FUZZ_EXECUTIONS ?= 50000
FUZZ_SEED ?= $(shell date +%s)

.PHONY: fuzz
fuzz: setup ## random arguments to the compiled core and to the public calls, changed files (FUZZ_CALLS, FUZZ_EXECUTIONS, FUZZ_SEED)
	OMP_NUM_THREADS=1 .venv/bin/python tests/faults/fuzz_core.py --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED)
	OMP_NUM_THREADS=1 .venv/bin/python tests/faults/fuzz_public.py --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED)
	OMP_NUM_THREADS=1 .venv/bin/python tests/faults/fuzz_files.py --executions $(FUZZ_EXECUTIONS) --seed $(FUZZ_SEED)

FAULT_ARGS ?=

.PHONY: faults
faults: setup ## every row of the fault matrix, reduced, planned for ten minutes: counts and verdicts (FAULT_ARGS="--times 10", "--row memory")
	@$(BUILD_ENV) .venv/bin/python tests/faults/run.py $(FAULT_ARGS)

.PHONY: audit
audit: setup ## licences, sources and advisories of all dependencies; what cannot be asked here is said to be skipped
	@scripts/audit.sh

.PHONY: miri sanitize
miri: ## the core's tests that are not SIMD under Miri, where rustup's nightly has it
	@scripts/sanitize.sh miri

sanitize: ## the same under what there is: Miri, AddressSanitizer (nightly) or valgrind
	@scripts/sanitize.sh

STEPS ?= 50000

.PHONY: soak
soak: setup ## the state machine over whole streams for 50,000 steps, other ones each time (STEPS)
	KVSIEVE_STEPS=$(STEPS) $(PYTEST) tests/property/test_machine.py $(PYTEST_ARGS)

# The machine with the GPU may have no Rust: with a wheel in dist/ and a Python that has torch, nothing else is made.
GPU_PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)
GPU_ARGS ?=

.PHONY: gpu
gpu: ## on a machine with an NVIDIA GPU: parity, times, sanitizer, from the wheel in dist/ (GPU_PYTHON, GPU_ARGS)
	@compgen -G 'dist/*.whl' >/dev/null || $(MAKE) wheel
	$(GPU_PYTHON) benches/gpu.py --wheel "$$(ls -t dist/*.whl | head -n 1)" $(GPU_ARGS)

.PHONY: cross
cross: ## the core for 64-bit ARM: clippy, and its kernel tests under qemu where that is installed (some minutes)
	@scripts/cross.sh $(CARGO_TEST_ARGS)

.PHONY: lint lint-rust lint-python
lint: lint-rust lint-python ## formatting, clippy, ruff, mypy, and the stubs of the extension against the extension (-j2 runs both sides at once)

lint-rust: setup
	$(BUILD_ENV) cargo fmt --all --check
	$(BUILD_ENV) cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

lint-python: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(BUILD_ENV) bash -c 'flock "$$MYPY_CACHE_DIR.lock" .venv/bin/mypy'
	if [ -e python/kvsieve/_core.pyi ]; then .venv/bin/stubtest kvsieve._core --mypy-config-file scripts/stubtest.ini; fi

.PHONY: fmt
fmt: setup ## format everything, and fix what ruff can fix
	cargo fmt --all
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

.PHONY: bench
bench: setup ## the measurements: out/bench.json, and criterion's report under cargo's target folder
	@mkdir -p out
	if compgen -G 'benches/*.py' >/dev/null; then \
		$(BUILD_ENV) .venv/bin/pytest benches --benchmark-json=out/bench.json $(PYTEST_ARGS); fi
	$(BUILD_ENV) cargo bench --locked --workspace --exclude kvsieve-py

.PHONY: figures
figures: ## the figures and tables of README and docs, made anew of the results in benches/record (needs nothing but Python)
	@$(firstword $(wildcard .venv/bin/python) python3) scripts/figures.py
	@$(firstword $(wildcard .venv/bin/python) python3) scripts/tables.py

REPORT_ARGS ?=

.PHONY: report
report: setup ## a little of each kind of measurement, planned for 20 minutes on two idle cores: out/report/index.html (REPORT_ARGS="--minutes 60 --resume")
	.venv/bin/python scripts/report.py $(REPORT_ARGS)

PEERS_ARGS ?=

.PHONY: peers
peers: setup ## kvsieve beside kvpress, OpenVINO, llama.cpp and transformers' caches, each in its own environment (long; PEERS_ARGS)
	@mkdir -p out
	$(BUILD_ENV) .venv/bin/python benches/peers/run.py --json out/peers.json $(PEERS_ARGS)

.PHONY: docs
docs: ## the documentation as a site, into out/site; a link or an anchor that leads nowhere is an error
	@scripts/docs.sh build
	@echo out/site/index.html

.PHONY: docs-rust
docs-rust: setup ## the Rust side's reference, into out/docs
	RUSTDOCFLAGS='-D warnings' $(BUILD_ENV) cargo doc --quiet --locked --no-deps -p kvsieve-core
	@rm -rf out/docs && mkdir -p out/docs
	@$(BUILD_ENV) bash -c 'cp -r "$$CARGO_TARGET_DIR"/doc/. out/docs/'
	@echo out/docs/kvsieve_core/index.html

.PHONY: wheel
wheel: setup ## the release wheel (one abi3 wheel for every Python from 3.10 on), into dist/
	@mkdir -p dist
	@cp -v .venv/wheel/*.whl dist/

.PHONY: sdist
sdist: setup ## the source distribution, into dist/
	@mkdir -p dist
	.venv/bin/maturin sdist --out dist

.PHONY: check-sdist
check-sdist: setup ## build a wheel from the source distribution as pip does, import it, compare it with ours (some minutes)
	@scripts/check-sdist.sh

.PHONY: lock
lock: ## resolve the dependencies anew for PYTHON, and rewrite its lock file
	@scripts/lock.sh

.PHONY: check-locks
check-locks: setup ## the lock files (Python 3.10, 3.11 on, the documentation's and Ray's) still resolve to themselves on the index; installs nothing
	@.venv/bin/python scripts/check_locks.py

.PHONY: clean
clean: ## remove what the targets made in this clone; the shared cache stays
	rm -rf .venv .venv.lock out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
