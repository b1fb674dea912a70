# make demo   a talking face from the shipped speech and avatar: talk.mp4
# make test   the test suite
# make parity the same models in PyTorch, and Wan's in diffusers, compared with ours
# make browser  the live page in a headless Chromium, which the system has to have
# make ray    three replicas on a local Ray cluster, one killed
# make h200   the full-size programs compiled for an H200, without one (600 MB of compiler)
# make lint   ruff
# All of them work in .venv, which is made on the first call. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPEECH ?= $(firstword $(sort $(wildcard pikastream_jax/assets/speech/*.flac)))

.PHONY: demo test browser ray parity h200 lint clean

demo: $(VENV)/.installed
	$(BIN)/python serve.py --audio $(SPEECH) --output talk.mp4
	@echo "the talking face is in $(CURDIR)/talk.mp4"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -q -m parity tests/parity

browser: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[browser]"
	$(BIN)/python -m pytest -q -m browser tests/live

ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[ray]"
	$(BIN)/python -m pytest -q -m ray tests/live

h200: $(VENV)/.installed-dev .cache/cuda/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=.cache/cuda $(BIN)/python -m pytest -q -m h200 tests/benchmarks
	JAX_PLATFORMS=cpu PYTHONPATH=.cache/cuda $(BIN)/python -m benchmarks.h200

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .cache build *.egg-info talk.mp4

# Stamps: installing again is only needed when the dependencies change.
$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,train]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-parity: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev,parity]"
	touch $@ $(VENV)/.installed

# In a folder of their own: installed, they would make JAX look for a GPU whenever it starts.
.cache/cuda/.installed: $(VENV)/.installed-dev
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
		$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(@D) \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)
