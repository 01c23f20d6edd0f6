# One verb each. An active virtual environment is used as it is; otherwise `make install` makes .venv.
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
BIN = $(VENV)/bin

.DEFAULT_GOAL = help
.PHONY: help install test quick faults bench systems schemas lint fmt demo

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: ## the package, editable, and all it is developed with, in the tested versions
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'

test: ## every test and every example in a docstring, a file at a time on each of three processes: many wait for a broker
	$(BIN)/python -m pytest -n 3 --dist loadfile

quick: ## the inner loop: all but the slow tests, which wait for nobody: two processes, under two minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

faults: ## every fault and bad input, on own brokers, half an hour; writes docs/reliability.md (ROWS=4,19: these only)
	$(BIN)/python -m pytest -m "fault or bad_input or security or figure" --faults=docs/reliability.md --fault-rows=$(ROWS)

bench: ## every case beside its peers, half an hour; writes docs/performance.md (CASES="train ftrl": these only)
	$(BIN)/python tests/bench/speed.py $(CASES) --json docs/performance.json --page docs/performance.md
	$(BIN)/python tests/bench/step.py --page docs/performance.md

systems: ## the nine systems beside FuxiCTR and DeepCTR-Torch, a quarter of an hour; writes docs/systems.md (CASES=quality SYSTEMS="fm lr": these only)
	$(BIN)/python tests/bench/systems.py $(CASES) $(if $(SYSTEMS),--systems $(SYSTEMS)) --json docs/systems.json --page docs/systems.md

schemas: ## the JSON Schemas of pointer, manifest and report, from the types; writes docs/schemas
	$(BIN)/python docs/schemas/generate.py

lint: ## style, form and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: ## put the form right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: ## broker, simulated stream, trainer and subscriber on this machine, about a minute
	$(BIN)/stream-ctr demo
