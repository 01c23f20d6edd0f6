# An active virtual environment is used; otherwise `make install` creates .venv.
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
BIN = $(VENV)/bin
COVERAGE = --cov --cov-report=term:skip-covered
# Tests start many processes, which would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL = help
.PHONY: help install test quick long coverage docs schemas vectors lineage transcripts screenshots faults fuzz bench card systems quality lint fmt demo

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: ## install the package, editable, with all development tools in the tested versions
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'

test: ## run the tests and docstring examples but the long ones, in three processes because many tests wait for a broker
	$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

quick: ## run the tests that are not slow, in two processes, six to ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

long: ## run the tests that `test` leaves out, because they take minutes or are much like others
	$(BIN)/python -m pytest --long -m long $(ARGS)

coverage: ## run the quick tests and fail below the coverage floor of pyproject.toml
	$(MAKE) quick ARGS="$(COVERAGE)"

docs: ## build the documentation site in site/, failing on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

transcripts: ## run the commands whose output the pages show and renew it (NAMES=demo: only this one)
	$(BIN)/python tests/transcripts.py $(NAMES)

screenshots: ## learn a simulated stream, and write the pictures of the live page and of top into docs/images; needs Chromium
	$(BIN)/python tests/screenshots.py

faults: ## inject every fault and bad input, up to an hour; writes docs/reliability.md (ROWS=4,19: only these)
	$(BIN)/python -m pytest -m "fault or bad_input or security or figure" --faults=docs/reliability.md --fault-rows=$(ROWS)

fuzz: ## fuzz every reader of bytes from outside, ten minutes each (TARGETS="arrow command" SECONDS=60: only these, shorter)
	$(BIN)/python tests/fuzz/run.py $(TARGETS) --seconds $(or $(SECONDS),600)

bench: ## benchmark every case next to its peers, half an hour; writes docs/performance.md (CASES="train ftrl": only these)
	$(BIN)/python tests/bench/speed.py $(CASES) --json docs/performance.json --page docs/performance.md
	$(BIN)/python tests/bench/step.py --page docs/performance.md

card: ## run what to measure first on a machine with a GPU; needs compute-sanitizer and nsys
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -n 0 -m "not slow" tests/test_triton_kernels.py
	$(BIN)/python -m pytest -n 0 --long tests/test_triton_kernels.py tests/test_gpu_step.py
	$(BIN)/python tests/bench/card.py repeat aligned rows copy
	nsys profile --stats=true --cuda-graph-trace=node -o card $(BIN)/python tests/bench/card.py steps
	$(MAKE) bench CASES=gpu

systems: ## compare the nine systems with FuxiCTR and DeepCTR-Torch, a quarter of an hour; writes docs/systems.md (CASES=quality SYSTEMS="fm lr": only these)
	$(BIN)/python tests/bench/systems.py $(CASES) $(if $(SYSTEMS),--systems $(SYSTEMS)) --json docs/systems.json --page docs/systems.md

quality: ## measure logloss against events/s beside Vowpal Wabbit and River, hours; writes docs/results.md (LOGS="criteo drift-20k": only these; ARGS=--missing: the rest; QUICK=1: minutes, writes nothing)
	$(BIN)/python tests/bench/frontier.py $(LOGS) $(ARGS) $(if $(QUICK),--quick,--json docs/quality.json --page docs/results.md --figure docs/quality.svg)

vectors: ## write docs/vectors.json, test vectors of the published hash
	$(BIN)/python docs/vectors.py

schemas: ## write docs/schemas, the JSON Schemas of pointer, manifest, delta and report
	$(BIN)/python docs/schemas/generate.py

lineage: ## run every order in which two runs may start, and write what subscribers serve into docs/serving.md
	$(BIN)/python tests/test_two_runs.py

lint: ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: ## run a broker, a simulated stream, the trainer and a subscriber on this machine, about a minute
	$(BIN)/stream-ctr demo
