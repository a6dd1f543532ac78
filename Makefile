# Each target makes its own environment (.venv) when it is missing. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two busy OpenMP threads on few cores can be far slower than one: tests and tiny models run on one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo app gate test test-all lint bench

demo: $(VENV)/ready ## make demo [VIDEO=path] [MODEL=folder or Hub id] [QUESTION="..."]
	$(BIN)/python -m recipes.demo $(if $(VIDEO),--video "$(VIDEO)") $(if $(MODEL),--model "$(MODEL)") $(if $(QUESTION),--question "$(QUESTION)")

app: $(VENV)/ready ## make app MODEL=folder or Hub id [ARGS="--help"]: a page to ask it about videos
	$(BIN)/python -m recipes.demo_app $(if $(MODEL),--model "$(MODEL)") $(ARGS)

gate: $(VENV)/ready ## train a tiny model that learns, and put its latents on trial (about an hour on one core)
	$(BIN)/python -m recipes.experiments.gate $(ARGS)

# Two processes, or four where there are more cores: each takes about 2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20

test: $(VENV)/ready ## everything but tests marked slow or gpu
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/ready ## slow tests too
	$(PYTEST) -m "not gpu" $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-progress modeling_storms

bench: $(VENV)/ready ## make bench [ARGS="--help"]
	$(BIN)/python -m speed $(ARGS)

# constraints.txt pins what CI has tested; drop it with CONSTRAINTS= to try newer releases.
CONSTRAINTS ?= -c constraints.txt
$(VENV)/ready: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@
