# `make demo` and `make test` set up everything themselves: Python 3.10 or later is all they need.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

.PHONY: demo test lint format clean

# A stamp file a requirement list: pip runs again when the list changes, and only then.
$(VENV)/.run: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, this is " + sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-deploy.txt requirements-dev.txt
	$(PIP) install -r requirements-deploy.txt -r requirements-dev.txt
	touch $@

demo: $(VENV)/.run
	$(PY) experiments/demo.py

test: $(VENV)/.dev
	# for two cores: two processes mostly wait, for Slurm and for processes that it starts; one thread
	# each, as threads that wait for each other on shared cores are slow
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 25

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache
