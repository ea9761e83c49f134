# Everything below sets itself up: Python, git and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs clean

# What the command needs.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[cli]"
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
	$(BIN)/paradiff sample digits --sampler ddpm --steps 1000 --method parasolver --window 32 --tolerance 0.028 --seeds 0-15 \
		--compare --trace --overwrite --out demo/sixteen
	$(BIN)/paradiff sample digits --sampler ddpm --steps 1000 --method parasolver --window 32 --tolerance 0.028 --seeds 0 \
		--compare --trace --overwrite --out demo/one
	@echo "Look at demo/sixteen/samples.png and demo/one/trace.png"

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# A worker for each core, up to eight, with one thread each. Each begins with a stretch of the tests in their order, so that a
# file's fixtures and kept results are made once, and one that has finished takes over a part of another's stretch.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

bench: .venv/.ready
	$(BIN)/python benchmarks/rounds.py --json benchmarks/results/rounds.json
	$(BIN)/python benchmarks/srds.py --json benchmarks/results/srds.json
	$(BIN)/python benchmarks/polylog.py --json benchmarks/results/polylog.json
	$(BIN)/python benchmarks/corrector.py --json benchmarks/results/corrector.json
	$(BIN)/python benchmarks/pipelines.py --json benchmarks/results/pipelines.json
	$(BIN)/python benchmarks/sparse.py --json benchmarks/results/sparse.json
	$(BIN)/python benchmarks/shift.py --json benchmarks/results/shift.json

# The API reference, of the names that each room lists in __all__.
docs: .venv/.docs
	$(BIN)/python -m pdoc -d google -o docs/api paradiff paradiff.chain.slope paradiff.chain.noise
	@echo "Look at docs/api/index.html"

clean:
	rm -rf .venv demo docs/api
