# make demo, make test: each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
PUBLISH := --out benchmarks/results

.PHONY: help install demo test test-scale faults fuzz check bench clean

help:                ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/'

install: .venv/installed ## create .venv and install the package with pinned versions

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'from flow.video import import_cv2; import_cv2()'
	@touch $@

demo: install        ## generate videos, pack them, train both streams, test, fuse, print the table (no data needed)
	$(BIN)/python -m flow.demo --out $(DEMO)/videos
	$(BIN)/python -m flow.pack --videos $(DEMO)/videos --splits $(DEMO)/videos/splits --dataset ucf101 --size 64 --out $(DEMO)/packed
	$(BIN)/python -m train.launch --gpus 0 --config demo --run $(DEMO)/run data.root=$(DEMO)/packed

test: install        ## run the test suite (TWOSTREAM_DATA=folder adds the tests on real clips)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-scale: .venv-scale/installed ## run the tests on Ray, S3, nginx and network namespaces (minutes; what is not there is skipped)
	.venv-scale/bin/python -m pytest -q tests/scale

.venv-scale/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[scale]'
	@touch $@

faults: install      ## inject every fault for real, count what survives (minutes; make test has the short form)
	$(BIN)/python -m tests.faults

fuzz: install        ## feed mutated files to every reader (half an hour)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz

check: install       ## lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install       ## measure loader, training, scaling, flow; overwrite the published results and tables: DATA=packed set VIDEOS=folder of clips
	$(BIN)/python benchmarks/loader_throughput.py $(PUBLISH) $(DATA:%=--data %)
	$(BIN)/python benchmarks/footprint.py $(PUBLISH) $(DATA:%=--data %)
	$(BIN)/python benchmarks/draw_statistics.py $(PUBLISH) $(DATA:%=--data %)
	$(BIN)/python benchmarks/train_step.py $(PUBLISH) $(DATA:%=--data %)
	$(BIN)/python benchmarks/scaling.py --procs 1,2 $(PUBLISH) $(DATA:%=--data %)
	$(BIN)/python benchmarks/flow_extraction.py $(PUBLISH) $(VIDEOS:%=--data %)
	$(BIN)/python benchmarks/scale_costs.py $(PUBLISH) $(DATA:%=--data %) $(VIDEOS:%=--videos %)
	$(BIN)/python benchmarks/scale_model.py $(PUBLISH)
	$(BIN)/python benchmarks/readme.py

clean:               ## remove .venv and what demo made
	rm -rf .venv .venv-scale $(DEMO)
