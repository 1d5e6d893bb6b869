# make setup   a virtual environment in .venv with the pinned requirements
# make repro   the pipeline on the model and pages of params.yaml (the embedded demo)
# make test    all tests, the pipeline in a temporary clone included
# make report  all results in artifacts/report/index.html, a file that opens offline
# make lint    ruff and mypy
# make check-release   the released folders in clean environments with transformers 4.57 and 5: minutes
# make bench-size   time and memory at true size (4B, random weights) on this CPU: 10 minutes, 40 GB

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup repro report test lint check-release bench-size
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
		uv pip install --quiet --python $(VENV)/bin/python -r requirements.txt; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	fi
	@touch $@

repro: setup
	dvc repro

report: repro
	python -m stages.report
	@echo "open artifacts/report/index.html"

# one thread a process: two processes of two threads each would slow one another down
test: setup
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

lint: setup
	ruff check .
	ruff format --check .
	mypy

check-release: setup
	for folder in artifacts/release/*; do \
		PYTHONPATH=. python tests/slow/check_release.py "$$folder" --environments .venv/release || exit 1; \
	done

bench-size: setup
	python -m demo.bench_size
