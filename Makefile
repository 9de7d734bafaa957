# make demo    set up, generate RefShapes, train a small CrossVLT with two CPU processes, evaluate it, draw predictions
# make test    set up, run the tests
# make lint    run ruff as CI does
# make gpu     check the project on a GPU and run the benchmarks there (at most 9 minutes); PYTHON=… uses that Python's packages
# make docs    generate docs/options.md from lib/options.py
# make stress  kill 20 trainings at random moments, resume them, compare (about 15 minutes)
# make lock    resolve requirements*.txt into requirements.lock
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := checkpoints/demo
ON_REFSHAPES := --dataset refshapes --device cpu --batch-size 32
# One thread per process: more threads than cores slow each other down.
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2

.PHONY: demo test stress lint docs lock gpu
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.x")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(DEMO)/.trained: configs/demo.yaml | $(VENV)/.installed
	$(BIN)/python -m data.refshapes
	@rm -rf $(DEMO) models/demo
	$(TORCHRUN) train.py --cfg configs/demo.yaml
	@touch $@

models/demo/report.txt: $(DEMO)/.trained
	@mkdir -p $(@D)
	$(TORCHRUN) test.py --resume $(DEMO)/best.pth $(ON_REFSHAPES) --split val --shuffle_sentences > $@.part
	$(TORCHRUN) test.py --resume $(DEMO)/best.pth $(ON_REFSHAPES) --split val,testA,testB --baselines \
		--json models/demo/results.json --vis models/demo/vis >> $@.part
	@mv $@.part $@

demo: models/demo/report.txt
	@cat $<

test: | $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

stress: | $(VENV)/.installed
	$(BIN)/python -m benchmarks.stress --kills 20 --out benchmarks/results/stress.md

ifeq ($(origin PYTHON), command line)
gpu:
	@$(PYTHON) -m benchmarks.gpu
else
gpu: | $(VENV)/.installed
	@$(BIN)/python -m benchmarks.gpu
endif

lint: | $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: | $(VENV)/.installed
	$(BIN)/python -c 'from lib.config import options_table; print(options_table(), end="")' > docs/options.md

lock: | $(VENV)/.installed
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
		requirements-dev.txt --output-file requirements.lock
