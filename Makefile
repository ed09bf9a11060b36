# Two commands do everything on a fresh machine with python3: make demo, make test.
VENV := .venv
PYTHON := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test test-fast bench gpu-check lint format mini-sd mini-sdxl mini-x4 datasets flags clean

demo: $(VENV)/.ready
	bash finetune.sh

# Everything, every script as a user runs it. JOBS=8 on more cores; each worker takes 1 GB.
JOBS ?= 2
test: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n $(JOBS)

# Only what opens no model and starts no script.
test-fast: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n $(JOBS) -m "not run"

# Speed and memory, each beside a limit measured in the same run; half an hour. The READMEs in benchmarks/ have the
# commands that repeat more often and take larger sets.
bench: $(VENV)/.ready
	$(PYTHON) benchmarks/startup/run.py --repeats 2
	PYTHONPATH=. $(PYTHON) benchmarks/convert/run.py --images 2000
	PYTHONPATH=. $(PYTHON) benchmarks/million_rows/run.py
	PYTHONPATH=. $(PYTHON) benchmarks/merge/run.py --rounds 1
	PYTHONPATH=. $(PYTHON) benchmarks/metrics/run.py --rounds 1
	PYTHONPATH=. $(PYTHON) benchmarks/train/run.py --repeats 1 --steps 8

# Everything on your GPU: the same losses as on the CPU? images a second? do the presets fit? Half an hour at most.
gpu-check: $(VENV)/.ready
	$(PYTHON) benchmarks/gpu/run.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Rebuild the embedded model from nothing: hours on a CPU, minutes on a GPU. See models/mini-sd/README.md.
mini-sd: $(VENV)/.ready
	bash models/make_mini_sd.sh

# The same for its SDXL, which is grown from it.
mini-sdxl: $(VENV)/.ready
	bash models/make_mini_sdxl.sh

# The upscaler: an hour and a half on one core of a CPU.
mini-x4: $(VENV)/.ready
	bash models/make_mini_x4.sh

# Rebuild the two shipped datasets. See datasets/README.md.
datasets: $(VENV)/.ready
	$(PYTHON) -m finetuning.shapes.write_dataset --output datasets/shapes --train 400 --validation 64
	$(PYTHON) -m finetuning.shapes.write_dataset --output datasets/chalk --style chalk --train 600 --validation 64 --leave_out cross star
	$(PYTHON) -c "from finetuning.shapes.scenes import single_scenes as all_of; [print(one.caption) for one in all_of(('cross', 'star')) if one.is_held_out]" > datasets/left_out_of_chalk.txt

# uv fetches and links the packages in seconds where pip alone takes minutes; what it installs is the same. Compiled once
# here, or every start of a script compiles some 4,000 files where Python may not write them (PYTHONDONTWRITEBYTECODE).
$(VENV)/.ready: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build runs

# Write docs/flags.md again, from the code.
flags: $(VENV)/.ready
	PYTHONPATH=. $(PYTHON) tests/write_flags.py
