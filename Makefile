# make setup          a virtual environment in .venv with the pinned requirements and this project
# make repro          the pipeline on the model and pages of params.yaml (the embedded demo), then its results
# make test           all tests, the pipeline in a temporary clone included
# make lint           ruff and mypy
# make report         all results in artifacts/report/index.html, a file that opens offline
# make clean-recipes  what recipes that are no longer in params.yaml have left behind
# make check-release  the releases in clean environments: transformers 4.57 and 5, mteb, colpali-engine, vLLM: an hour
# make check-vllm     the releases in vLLM on a CPU, offline and served: 15 minutes, 8 GB
# make setup-corpus   two more environments: Ray, vector stores and the search page; fast-plaid with its torch: GBs
# make test-corpus    the tests that need them, a browser (chromium) for the last: minutes
# make bench-size     time and memory at true size (4B, random weights) on this CPU: 10 minutes, 40 GB
# make reference      the present results as the committed figures of README and docs, which are redrawn

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup repro report test lint clean-recipes check-release check-vllm setup-corpus test-corpus bench-size reference
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
		uv pip install --quiet --python $(VENV)/bin/python -r requirements.txt && \
		uv pip install --quiet --python $(VENV)/bin/python --no-deps --editable .; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt && \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	fi
	@touch $@

repro: setup
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "error: $(CURDIR) is not a Git repository, which DVC needs; \
	run \`git init && git add -A && git commit -m start\`, or \`dvc config --local core.no_scm true\`" >&2; exit 1; }
	@python -m stages.tools.repro

# also of a run in which a recipe failed: then it is wanted most
report: setup
	@python -m stages.tools.repro; status=$$?; python -m stages.tools.report && \
		echo "open artifacts/report/index.html"; exit $$status

# one thread per process: two processes of two threads each would slow one another down
test: setup
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

lint: setup
	ruff check .
	ruff format --check .
	mypy

clean-recipes: setup
	python -m stages.tools.clean_recipes

check-release: setup check-vllm
	for folder in artifacts/release/*; do \
		python -m tests.slow.check_release "$$folder" --environments .venv/release || exit 1; \
	done
	for check in transformers mteb colpali; do \
		python -m tests.slow.check_$$check --environments .venv/release || exit 1; \
	done
	python docs/figures.py

check-vllm: setup
	python -m tests.slow.check_vllm --environments .venv/release

setup-corpus: setup $(VENV)/corpus/.installed $(VENV)/plaid/.installed

$(VENV)/corpus/.installed: requirements.txt requirements-corpus.txt pyproject.toml
	@$(PYTHON) -m venv $(VENV)/corpus
	@$(VENV)/corpus/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.txt -r requirements-corpus.txt
	@$(VENV)/corpus/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# fast-plaid runs with no other torch
$(VENV)/plaid/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -m venv $(VENV)/plaid
	@sed 's/^torch==.*/torch==2.11.0/' requirements.txt | $(VENV)/plaid/bin/python -m pip install --quiet \
		--disable-pip-version-check -r /dev/stdin fast-plaid==1.7.0.2110
	@$(VENV)/plaid/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-corpus: setup-corpus
	OMP_NUM_THREADS=1 $(VENV)/corpus/bin/python -m pytest tests/colqwen3/corpus tests/colqwen3/search \
		tests/demo/benchmarks/test_stores.py
	OMP_NUM_THREADS=1 $(VENV)/plaid/bin/python -m pytest tests/demo/benchmarks/test_stores.py -k fast-plaid

bench-size: setup
	python -m demo.benchmarks.size

reference: setup
	python -m stages.tools.reference
	python docs/figures.py
