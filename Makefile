# Everything runs from a virtual environment in this checkout, made on first use: Python 3.11 and pip are all it takes.
# `make train` installs only what it runs; the other targets install the rest (docs/install.md has the bytes).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TRAIN  := $(VENV)/.installed-train
RUN    ?= runs/train
SEEDS  ?= 2

.PHONY: install train test test-all smoke lint bench bench-check baseline study scale clean

install: $(STAMP)

$(TRAIN): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

$(STAMP): $(TRAIN)
	# torch first and pinned: an open range would take a build with gigabytes of CUDA libraries.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[jax,torch,triton,tpu,data,images,hf,report,tensorboard,dev]'
	touch $@

# AdamW, with a usual and with a tuned weight decay, and three corrections: many passes over 8,000 tokens.
METHODS := adamw,adamw:weight-decay=10,precond-functional-sam:rho=0.4
METHODS := $(METHODS),precond-functional-sam:rho=0.4:correction-fraction=1/8,precond-sam:rho=0.2:savings=split

train: $(TRAIN)
	$(BIN)/fsam compare --preset tiny --max-tokens 8000 --batch 8 --steps 160 --learning-rate 1e-3 --evaluate-every 20 \
	  --methods $(METHODS) --seeds $(SEEDS) --out $(RUN)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not compilers"

# What `make test` leaves out. slow: every option on several ranks, ten kills and resumptions of a run in each framework,
# every combination of dtype and option. compilers: those of TPUs and GPUs that are not here.
test-all: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or compilers"

# Under a minute: one step of each framework against the formula in float64, and one tiny run.
smoke: install
	$(BIN)/python -m pytest -n 0 -q tests/core/test_smoke.py
	$(BIN)/fsam train --preset tiny --max-tokens 20000 --batch 2 --steps 3 --out $(shell mktemp -d)/run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Step cost of every method beside AdamW, both frameworks, on this machine. Run it on a quiet one.
bench: install
	$(BIN)/fsam profile step

# What the compilers make of every kernel and step, compared with profiling/baseline.json: fails at 3 % worse.
# Half an hour; nothing is timed, so it may run beside other work. `fsam profile check --quick` is what CI runs.
bench-check: install
	$(BIN)/fsam profile check

# Write the present figures into the baseline, and print how they differ.
baseline: install
	$(BIN)/fsam profile check --update

# When to use what: tuned runs in six regimes. About twelve hours on two cores; a stopped study resumes.
study: install
	JAX_PLATFORMS=cpu $(BIN)/python profiling/experiments/study.py --jobs 2  # its results are a CPU's

# The memory of each chip of a TPU slice in a sharded step, by its compiler, without a TPU. Hours on two cores.
scale: install
	$(BIN)/fsam profile tpu --what scale --preset 118m --chip v5e --json docs/data/scale-tpu-118m.json
	$(BIN)/fsam profile tpu --what scale --preset 1208m --chip v5p --json docs/data/scale-tpu-1208m.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
