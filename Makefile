# `make` lists the targets. VENV=dir uses another environment, PYTHON=... another interpreter.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PY := $(VENV)/bin/python
READY := $(VENV)/.requirements-installed
FAST := tests/test_imports.py tests/test_values.py tests/test_loop.py
DEMO := results/demo
DEMO_FILE := $(DEMO)/iddemo_lenet_random_photos_b8_i0-checkpoint.pth.tar
DEMO_PICTURES := $(DEMO)/results/exp/demo
RESNET := results/demo-resnet
RESNET_FILE := $(RESNET)/iddemo_resnet18_random_photos_b4_i0-checkpoint.pth.tar
RESNET_PICTURES := $(RESNET)/results/exp/demo

.DEFAULT_GOAL := help
.PHONY: help demo demo-resnet pictures test fast check format docs golden lowest clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

# uv where it can be had (on the PATH, or installed into the environment), else pip.
$(READY): requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "no python3 found; give PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || { uv venv -q --python $(PYTHON) $(VENV) 2>/dev/null || $(PYTHON) -m venv $(VENV); }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give PYTHON=")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || true
	@if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then \
		VIRTUAL_ENV=$(abspath $(VENV)) uv pip install -q --compile-bytecode -r requirements-dev.txt; \
	elif $(PY) -m pip install -q uv && $(PY) -m uv --version >/dev/null 2>&1; then \
		VIRTUAL_ENV=$(abspath $(VENV)) $(PY) -m uv pip install -q --compile-bytecode -r requirements-dev.txt; \
	else \
		$(PY) -m pip install -q -r requirements-dev.txt; \
	fi
	@touch $@

demo: $(READY) ## reconstruct eight photographs from one gradient, into results/ (about a minute)
	rm -rf $(DEMO)
	$(PY) training.py --id demo --data-name photos --image-size 32 --arch lenet --batch-size 8 \
		--outlayer-state keep --with-control --results $(DEMO)
	$(PY) run.py --id demo --root $(DEMO) --checkpoint $(DEMO_FILE) --epochs 3000 --lr 0.05 \
		--TV 1e-4 --TV-end 1e-6 --grad-sign --input-boxed --min-grads-loss --metric
	@echo "pictures: $(DEMO_PICTURES)/pairs.png, and losses, controls, decoys beside it"

demo-resnet: $(READY) ## solve one gradient of a ResNet-18 in train mode for four photographs (3 minutes)
	rm -rf $(RESNET)
	$(PY) training.py --id demo --data-name photos --image-size 32 --arch resnet18 --batch-size 4 \
		--upload-bn --with-control --results $(RESNET)
	$(PY) run.py --id demo --root $(RESNET) --checkpoint $(RESNET_FILE) --attack layerwise --metric
	@echo "pictures: $(RESNET_PICTURES)/pairs.png, and layers, controls, decoys beside it"

pictures: demo demo-resnet ## run both demos and copy their pictures to Demo_images
	cp $(DEMO_PICTURES)/pairs.png Demo_images/photos_lenet.png
	for name in losses controls decoys; do \
		cp $(DEMO_PICTURES)/$$name.png Demo_images/photos_lenet_$$name.png || exit 1; done
	cp $(RESNET_PICTURES)/pairs.png Demo_images/photos_resnet18.png
	cp $(RESNET_PICTURES)/layers.png Demo_images/photos_resnet18_layers.png

test: $(READY) ## run all tests (CPU; those that need a GPU are skipped without one)
	$(PY) -m pytest -q -n 2 --dist loadfile

fast: $(READY) ## run the tests of the numerical core and of the import rule (half a minute)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -x $(FAST)

check: $(READY) ## check style, format, types and the import rule
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

format: $(READY) ## format the code in place
	$(PY) -m ruff check --fix -q .
	$(PY) -m ruff format -q .

docs: $(READY) ## regenerate docs/flags.md from the parsers, docs/performance.md from the rows
	$(PY) -m docs.flags
	$(PY) -m benchmarks.performance_page

golden: $(READY) ## regenerate tests/golden.json; review the difference
	$(PY) -m tests.golden

lowest: ## run the tests on Python 3.12 with the oldest allowed packages (needs uv)
	uv venv -q --allow-existing --python 3.12 .venv-lowest
	VIRTUAL_ENV=$(abspath .venv-lowest) uv pip install -q --compile-bytecode --resolution lowest-direct -r requirements-dev.txt
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

clean: ## remove the demo's results and all caches
	rm -rf $(DEMO) $(RESNET) .pytest_cache .ruff_cache .mypy_cache
