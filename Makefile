# make demo    compile and compare the digits model; needs python3 >= 3.11 with venv and pip
# make test    run all tests, those that need torch included
# make check   lint, formatting, types
# make clean   remove everything that make, the tools and Python left behind

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What each stamp installs: the package itself (editable) with these extras.
demo := .
test := .[test,torch]
check := .[dev]

.PHONY: demo test check clean
# All installs go to one environment; two pips at a time would harm it.
.NOTPARALLEL:

demo: $(VENV)/demo.stamp
	$(BIN)/fourfold demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2

check: $(VENV)/check.stamp .types/fourfold
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .types build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$($*)'
	touch $@

# pip is the last that venv writes: an interrupted call is started anew.
$(BIN)/pip:
	$(PYTHON) -m venv --clear $(VENV)

# mypy checks the package under its real name; the repository's folder may have any.
.types/fourfold:
	mkdir -p .types
	ln -sfn .. $@
