# The commands of the README. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
RUNS := runs/trees
PRETRAINED := runs/trees-pretrained
LOOKS := -p size small -p short_side 384 -p max_side 384 -p finest_stride 8
# Kernel output goes to the terminal as it comes, progress bars included.
PAPERMILL := $(BIN)/papermill --no-progress-bar --stdout-file - --stderr-file -

# Begins first, so that one process of two is not left alone with it at the end.
LONGEST := tests/test_processes.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

.PHONY: help install demo pretrained models ablation check test slow gpu-check lab lint notebooks clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/:/'

install: .venv/installed  ## make .venv and install everything that notebooks and tests need

.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(RUNS)/analysis/summary.txt  ## train teacher and student on the bundled photographs and compare them (minutes)
	@cat $<

$(RUNS)/analysis/summary.txt: | install
	@mkdir -p $(RUNS)
	@echo "1 of 3: the teacher"
	@$(PAPERMILL) nbs/train_teacher.ipynb $(RUNS)/train_teacher.ipynb
	@echo "2 of 3: the student"
	@$(PAPERMILL) nbs/train_student.ipynb $(RUNS)/train_student.ipynb
	@echo "3 of 3: analysis"
	@$(PAPERMILL) nbs/analysis.ipynb $(RUNS)/analysis.ipynb

pretrained: $(PRETRAINED)/analysis/summary.txt  ## the demo from ImageNet weights, with larger views (minutes)
	@cat $<

$(PRETRAINED)/analysis/summary.txt: | install
	@mkdir -p $(PRETRAINED)
	@echo "1 of 3: the teacher"
	@$(PAPERMILL) $(LOOKS) -p weights pretrained -p iterations 300 -p out $(PRETRAINED)/teacher \
		nbs/train_teacher.ipynb $(PRETRAINED)/train_teacher.ipynb
	@echo "2 of 3: the student"
	@$(PAPERMILL) -p teacher $(PRETRAINED)/teacher -p iterations 300 -p distillation balanced -p out $(PRETRAINED)/student \
		nbs/train_student.ipynb $(PRETRAINED)/train_student.ipynb
	@echo "3 of 3: analysis"
	@$(PAPERMILL) -y "runs: [$(PRETRAINED)/teacher, $(PRETRAINED)/student]" -p out $(PRETRAINED)/analysis \
		nbs/analysis.ipynb $(PRETRAINED)/analysis.ipynb

models: pretrained  ## replace the bundled student by that of `make pretrained`, with 16 bits a weight
	$(BIN)/python -c 'from msad import load_model; from msad.engine.weights import save_model; \
		save_model("models/trees.pth", load_model("$(PRETRAINED)/student"), half=True)'
	cp $(PRETRAINED)/student/metrics.json models/trees.json

ablation: install  ## repeat the ablation, on the bundled photographs and on synthetic ones, from nothing; goes on where it was stopped (hours)
	@mkdir -p $(RUNS) runs/synthetic
	@$(PAPERMILL) -p results $(RUNS)/ablation/results.json nbs/ablation.ipynb $(RUNS)/ablation.ipynb
	@$(PAPERMILL) -p data synthetic -y "variants: [high, scratch, continued, student, correlated, placewise]" \
		-p results runs/synthetic/ablation/results.json nbs/ablation.ipynb runs/synthetic/ablation.ipynb

check: install lint  ## lint, package and notebooks agree, the fast tests (under 10 minutes)
	$(BIN)/python tests/check_notebooks.py
	$(PYTEST) -m "not slow" tests

test: install lint  ## everything: package and notebooks agree, notebooks are clean and run, all tests pass
	$(BIN)/python tests/check_notebooks.py
	@# Its processes end without removing their temporary folders, hundreds of megabytes.
	TMPDIR=$$(mktemp -d); export TMPDIR; trap 'rm -r "$$TMPDIR"' EXIT; \
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(PYTEST) $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

slow: install  ## the slow tests alone: real runs, several processes, notebooks through papermill
	$(PYTEST) -m slow $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

gpu-check: install  ## check results, speed and loading on a GPU: a table, and results/gpu.json (8 minutes at most)
	$(BIN)/python tests/on_gpu.py

lint: install  ## style of package, tests and notebooks; names and calls of the package
	$(BIN)/ruff check .
	$(BIN)/ty check --quiet msad

lab: install  ## JupyterLab, at the table of contents
	$(BIN)/jupyter lab nbs/index.ipynb

notebooks: install  ## execute the notebooks in place, as they are committed; after the demo, and the ablation trains what it lacks (hours)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--NotebookExporter.preprocessors=nbconvert.preprocessors.coalescestreams.CoalesceStreamsPreprocessor \
		--CoalesceStreamsPreprocessor.enabled=True nbs/*.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

clean:  ## remove the environment and what was built (never the runs)
	rm -rf .venv build dist *.egg-info
