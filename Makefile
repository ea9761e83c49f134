# Everything below sets itself up: Python, git and make are all it needs.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin

.PHONY: help demo test test-all test-oldest lint bench docs notebooks clean

help:
	@echo "make demo         digits and a picture that follows a text, in parallel and step by step, into demo/"
	@echo "make test         format, lint, types and tests, with each value of their parameters"
	@echo "make test-all     the same with all combinations of values"
	@echo "make test-oldest  a part of the tests with the oldest versions that are allowed (Python 3.10, a download of 3 GB)"
	@echo "make lint         format, lint and types alone"
	@echo "make bench        the benchmarks' figures in benchmarks/results, afresh; hours"
	@echo "make docs         the API reference, into docs/api/"
	@echo "make notebooks    the notebooks of examples/, from its scripts"
	@echo "make clean        removes what these have made, but for benchmarks/results"

# What the command needs.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[cli,text]"
	touch $@

# The same, and what development needs.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/.demo $@

# What the API reference needs: it is made by importing everything.
.venv/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch .venv/.demo $@

demo: .venv/.demo
	$(BIN)/paradiff sample digits --sampler ddpm --steps 1000 --method parasolver --window 32 --tolerance 0.014 --seeds 0-15 \
		--compare --trace --overwrite --out demo/sixteen
	$(BIN)/paradiff sample digits --sampler ddpm --steps 1000 --seeds 0 \
		--compare --trace --overwrite --out demo/one
	$(BIN)/paradiff sample shapes-flow --prompt "a red circle left of a blue square" --guidance 4 --steps 1000 --seeds 0 \
		--compare --trace --overwrite --out demo/text
	@echo "Look at demo/sixteen/samples.png, demo/one/trace.png and demo/text/samples.png"

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# A worker for each core, up to eight, with one thread each; bytecode is kept, since many tests start processes. Each worker begins
# with a stretch of the tests in their order, so that a file's fixtures and kept results are made once, and one that has finished
# takes over a part of another's stretch.
PYTEST := pytest -n auto --maxprocesses 8 --dist worksteal
test test-all test-oldest: export OMP_NUM_THREADS = 1
test test-all test-oldest: export PYTHONDONTWRITEBYTECODE =

test: lint
	$(BIN)/$(PYTEST) --each-value

test-all: lint
	$(BIN)/$(PYTEST)

# The oldest versions that pyproject.toml allows. Of their wheels of torch there is only the one for CUDA: 3 GB to download.
.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/pip install --disable-pip-version-check -c constraints-oldest.txt -e ".[all]" \
		accelerate jsonschema peft pytest pytest-xdist scikit-learn scipy torchsde
	touch $@

# The tests that call torch, numpy and diffusers, as `test` has them: each with every value of its parameters (pipelines,
# schedulers, tables, methods), but not with all combinations of them.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/$(PYTEST) --each-value tests/test_rooms.py tests/test_face.py \
		tests/test_values.py tests/test_errors.py tests/test_extending.py $(addprefix tests/app/test_,$(addsuffix .py,cli cli_pipeline cli_refusals media plots)) \
		tests/chain tests/samplers tests/solver tests/methods/test_digest.py tests/models/test_hub.py \
		$(addprefix tests/pipelines/test_,$(addsuffix .py,boundary callback explain hosts pipelines same_image scheduler_proxy windowed))

BENCHES := audit cluster conditioning conditions corrector front memory pipelines plan polylog published ranks rounds serving shapes shift small_windows sparse srds tolerance
bench: .venv/.ready
	for name in $(BENCHES); do $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json || exit 1; done

# The API reference, of the names that each room lists in __all__.
docs: .venv/.docs
	$(BIN)/python -m pdoc -d google -o docs/api paradiff paradiff.chain.slope paradiff.chain.noise
	@echo "Look at docs/api/index.html"

# The notebooks have no outputs: tests/test_examples.py compares them with the scripts.
notebooks: .venv/.ready
	$(BIN)/jupytext --to ipynb examples/*.py

clean:
	rm -rf .venv .venv-oldest demo docs/api
