SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
SETUP := .venv/.setup
RENDERING := .venv/.rendering
ARGS ?=
RUN ?= runs/demo/fit
# without cached bytecode every process compiles torch and its friends anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(SETUP) ## make .venv with Python 3.12 and install what requirements.lock names (the other targets do this too)

$(SETUP): requirements.lock setup.cfg pyproject.toml plugins/lerobot_policy_pi05_lightning/pyproject.toml
	@bash tools/make_venv.sh .venv
	@touch $@

$(RENDERING): $(SETUP) tools/check_rendering.py
	@$(BIN)/python tools/check_rendering.py
	@touch $@

.PHONY: demo
demo: $(RENDERING) ## collect data, train both stages, evaluate, roll out, write a page (ARGS="--seed 1" for another seed)
	@$(BIN)/pi05 demo $(ARGS)

.PHONY: test
test: $(RENDERING) ## the tests that are not slow
	@$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(RENDERING) ## the slow tests
	@$(BIN)/pytest -m slow $(ARGS)

.PHONY: bench
bench: $(SETUP) ## compare speed and memory with LeRobot here, half an hour, over the figures in docs (ARGS="--quick" only tries it)
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: lint
lint: $(SETUP) ## ruff, formatting, type check of the package, the tools and the experiments
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy pi05_lightning plugins/lerobot_policy_pi05_lightning/lerobot_policy_pi05_lightning
	@$(BIN)/mypy --explicit-package-bases tools experiments/*/*.py

.PHONY: format
format: $(SETUP) ## apply formatting and what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: monitor
monitor: $(SETUP) ## open TensorBoard on the newest run under runs/
	@mkdir -p runs; newest=$$(find runs/ -name 'events.out.tfevents.*' -exec ls -t {} + | sed -n 1p); \
	if [ -z "$$newest" ]; then echo "There is no run under runs/ yet: start one with make demo or pi05 fit." >&2; exit 1; fi; \
	$(BIN)/tensorboard --logdir "$$(dirname "$$newest")" $(ARGS)

.PHONY: play
play: $(RENDERING) ## serve a page on which you tell the demo's policy what to do (RUN=runs/mine, ARGS="--env Desk" for others)
	@if [ ! -e "$(RUN)" ]; then echo "There is no $(RUN) yet: train it with make demo, or name another with RUN=." >&2; exit 1; fi
	@$(BIN)/pi05 play "$(RUN)" $(ARGS)

.PHONY: experiment
experiment: $(RENDERING) ## run an experiment with three seeds on the demo's data and gather it (NAME=002_without_stage_1)
	@$(BIN)/python tools/experiment.py $(NAME) $(ARGS)

.PHONY: docs
docs: $(RENDERING) ## run the tutorial and build the documentation as a site in build/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q $(ARGS)
	@echo "Look at it with: python3 -m http.server -d build/site"

.PHONY: libero
libero: $(SETUP) ## add LIBERO's simulator to .venv (1.2 GB)
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install -r requirements-libero.lock

.PHONY: lock
lock: $(SETUP) ## resolve the locks for all platforms, of what they hold as little as needed anew (ARGS=--upgrade for all)
	@$(BIN)/uv pip compile -q --universal --python-version 3.12 --extra sim --extra dev --extra docs --extra export --extra loggers --no-header --no-annotate setup.cfg -o requirements.lock $(ARGS)
	@$(BIN)/uv pip compile -q --universal --python-version 3.12 --extra sim --extra libero -c requirements.lock --no-header --no-annotate setup.cfg -o requirements-libero.lock $(ARGS)

.PHONY: clean
clean: ## remove .venv, caches and build output; runs/ and data/ stay
	rm -rf .venv {.,plugins/*}/{build,dist,*.egg-info} .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
