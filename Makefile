# Two commands for a newcomer: `make quickstart`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   := $(or $(SAMOVAR_DATA),../shared/data)
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test lint install bench-full clean

quickstart: $(VENV)/.installed
	$(BIN)/samovar run recipes/quickstart.toml

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first and alone: with it in place, no later range can pull a newer one and its CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	@sh .ci/need
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@echo "installing; llama.cpp is compiled once (about 4 minutes), pip keeps the wheel"
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[train,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# Full counts and grids: hours, by hand. Every script goes on where it was stopped; results are committed.
bench-full: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/quickstart_seeds.py --seeds 17 18 19
	$(BIN)/python benchmarks/kill_trials.py --trials 10 --result benchmarks/results/kill_trials.json
	$(BIN)/python benchmarks/stories260k.py
	$(BIN)/python benchmarks/kill_capture.py --trials 30 --result benchmarks/results/kill_capture.json
	$(BIN)/python benchmarks/kill_training.py --trials 30 --result benchmarks/results/kill_training.json
	$(BIN)/python benchmarks/kill_pruning.py --trials 30 --result benchmarks/results/kill_pruning.json
	$(BIN)/python benchmarks/kill_corpora.py --trials 40 --result benchmarks/results/kill_corpora.json
	$(BIN)/python benchmarks/teacher152k.py
	$(BIN)/python benchmarks/store_sizes.py
	$(BIN)/python benchmarks/sampled_entries.py
	$(BIN)/python benchmarks/sampled_kl.py --result benchmarks/results/sampled_kl.json
	$(BIN)/python benchmarks/loss_memory.py --result benchmarks/results/loss_memory.json
	$(BIN)/python benchmarks/capture_speed.py --result benchmarks/results/capture_speed.json
	$(BIN)/python benchmarks/kd_grid.py
	$(BIN)/python benchmarks/synthesis.py --catalogue $(DATA)/instructions/exercises/exercises.json --work runs/synthesis
	$(BIN)/python benchmarks/leave_one_out.py
	$(BIN)/python benchmarks/layer_pruning.py
	$(BIN)/python benchmarks/vocabulary.py
	$(BIN)/python benchmarks/propagation_size.py --rows 150000 --hidden 4096 --result benchmarks/results/propagation_size.json
	$(BIN)/python benchmarks/deduplication.py --megabytes 1000
	$(BIN)/python benchmarks/quality_filter.py
	$(BIN)/python benchmarks/adaptation.py
	$(BIN)/python benchmarks/export_memory.py
	$(BIN)/python benchmarks/export_parity.py
	$(BIN)/python benchmarks/export_speed.py
	$(BIN)/python benchmarks/imatrix.py
	$(BIN)/python benchmarks/kill_export.py --trials 12 --result benchmarks/results/kill_export.json
