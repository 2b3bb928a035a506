# Everything from a bare clone; needs Python 3.10 or newer. Set-up runs first, and does nothing when nothing has changed.
PYTHON_BIN := .venv/bin
PYTEST := $(PYTHON_BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder
# Folders of the package whose own tests measure how much of them they cover.
COVERED := engine heads data

# With this variable set, every process of the tests would compile torch and all other packages again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo lint format test test-slow coverage test-lowest test-newest clean

help:
	@echo "make demo         train a head on the shipped preferences and see what it does (a few minutes)"
	@echo "make test         lint, types, layers, tests and what they cover (some minutes)"
	@echo "make test-slow    the tests that it leaves out: kills, Ray, LangChain's suites on a real model (four minutes)"
	@echo "make coverage     the part of make test that measures: its tests cover 90 % of engine, heads and data at least"
	@echo "make test-lowest  the tests with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make test-newest  the tests with the newest versions that pyproject.toml allows, in .venv-newest"
	@echo "make lint         lint, types and layers alone"
	@echo "make format       put the code in order"
	@echo "make setup        the virtual environment alone"
	@echo "make clean        remove the virtual environment and all caches of this folder"

setup:
	@sh .ci/setup.sh

demo: setup
	@$(PYTHON_BIN)/mara-tools demo

lint: setup
	$(PYTHON_BIN)/ruff check .
	$(PYTHON_BIN)/ruff format --check .
	$(PYTHON_BIN)/mypy
	$(PYTHON_BIN)/lint-imports

format: setup
	$(PYTHON_BIN)/ruff check --fix .
	$(PYTHON_BIN)/ruff format .

test: lint coverage
	$(PYTEST) -m "not slow" $(COVERED:%=--ignore=tests/%)

test-slow: setup
	$(PYTEST) -m slow

coverage: setup
	$(PYTEST) -m "not slow" $(COVERED:%=tests/%) --cov --cov-report=
	@for folder in $(COVERED); do \
		echo "Coverage of $$folder, at least 90 %:"; \
		$(PYTHON_BIN)/coverage report --include="mara_integrations/$$folder/*" --fail-under=90 || exit 1; \
	done

test-lowest:
	@sh .ci/other_versions.sh lowest

test-newest:
	@sh .ci/other_versions.sh newest

clean:
	rm -rf .venv .venv-lowest .venv-newest .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage build dist
