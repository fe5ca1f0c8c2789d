PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
export MPLBACKEND := Agg

.PHONY: help setup demo test test-all lint type format bench leaderboard pretrain clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## make the virtual environment with pinned packages

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "denoise_env needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## reinforcement learning on a tiny Stable Diffusion: minutes on a laptop (SEED=0)
	$(BIN)/denoise-env train --seed $(SEED)

test: setup  ## run the tests, but for those that are marked slow
	$(TEST) -m "not slow"

test-all: setup  ## run all tests
	$(TEST)

lint: setup  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## mypy
	$(BIN)/mypy

format: setup  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## throughput against the bare network
	$(BIN)/python -m benchmarks.throughput

leaderboard: setup  ## every agent, every suite, then tables, figures and the page: hours; resumes where it stopped
	for suite in points points-flow shapes shapes-flux prompt-growth; do $(BIN)/python -m benchmarks.suite run $$suite --jobs 2; done
	$(BIN)/python -m benchmarks.suite report

pretrain: setup  ## make the tiny models from nothing, into build/pretrained: hours
	$(BIN)/python -m denoise_env.shapes.pretrain --out build/pretrained/stable_diffusion
	$(BIN)/python -m denoise_env.shapes.pretrain_flux --out build/pretrained/flux
	$(BIN)/python -m denoise_env.shapes.pretrain_video --out build/pretrained/hunyuan_video
	$(BIN)/python -m denoise_env.shapes.pretrain_i2v --out build/pretrained/skyreels
	$(BIN)/python -m denoise_env.shapes.pretrain_videoalign --out build/pretrained/videoalign

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
