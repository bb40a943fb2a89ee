BIN := .venv/bin
CHECKPOINT ?= build/tiny_bagel/checkpoint
SERVE_ARGS ?=

BENCH_ARGS ?=
TRAIN_ARGS ?=

.PHONY: setup demo serve test test-all bench perf rehearsal gpu-kit gpu-report lint wheel train-tiny

setup: ## make .venv (does nothing when it is up to date)
	@build/setup_env.sh

demo: setup ## every task through the whole server, on free ports; .cache/demo.png shows them
	@mkdir -p .cache
	$(BIN)/bagel-triton demo $(CHECKPOINT) --output .cache/demo.png

serve: setup ## serve CHECKPOINT (the toy that draws by default)
	$(BIN)/bagel-triton serve $(CHECKPOINT) --served-model-name bagel $(SERVE_ARGS)

test: setup ## the tests, in some sixteen minutes on two cores
	$(BIN)/python -m pytest

test-all: setup ## the tests that take minutes, too: every case between two hosts, every connector at its edges
	$(BIN)/python -m pytest -m "long or not long"

bench: setup ## every measurement, on a random checkpoint; bench/results.json and a table
	OMP_WAIT_POLICY=PASSIVE GLOG_minloglevel=3 MC_LOG_LEVEL=ERROR $(BIN)/python -m bench $(BENCH_ARGS)

train-tiny: setup ## train the small model anew in .cache/tiny_bagel, on two cores in two hours
	OMP_NUM_THREADS=1 $(BIN)/python -m build.tiny_bagel.train .cache/tiny_bagel $(TRAIN_ARGS)

rehearsal: setup ## steps of the published size on a GPU of shapes alone; the table of docs/benchmarks.md
	$(BIN)/python -m tests.rehearsal.budgets

gpu-kit: setup ## .cache/gpu_kit.tar.xz, which bench/gpu_run.sh unpacks on a machine with a GPU
	@build/gpu_kit.sh

gpu-report: setup ## write the results of bench/gpu_run.sh, in OUT, into docs/benchmarks.md with the device's name
	$(BIN)/python -m bench.gpu_report $(OUT)

perf: setup ## throughput and latency of the server whose Triton gRPC and HTTP addresses are PERF_ARGS (localhost:8001 localhost:8091)
	build/perf/run.sh $(PERF_ARGS)

lint: setup ## style, types, and which room may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	@set -e; for model in model_repository/*/1/model.py bench/hop_models/*/1/model.py; do echo $(BIN)/mypy $$model; $(BIN)/mypy $$model; done

wheel: setup ## dist/bagel_triton-VERSION-py3-none-any.whl, which serves without the source tree
	@rm -rf .cache/build
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
