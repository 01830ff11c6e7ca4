# Everything runs from .venv, which the first target that needs it creates. PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUNDLE := out/odise-tiny
EXAMPLE := training/pretrained/odise-tiny/example.jpg
# Words of the demo: the model was never trained to segment the first class of this list (see the model card).
DEMO_WORDS := training/pretrained/odise-tiny/example_vocabulary.txt
EXTRAS := cuda,openvino,demo,browser,serve,ray,video,heif,supervision,completion
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: help demo test test-slow extras lint format types docs wheel bench readme engines audit kernels clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "constraints.txt pins what Python 3.11 or newer can install; set PYTHON=/path/to/python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[cpu,export,bench,dev]'
	@touch $@

$(BUNDLE)/bundle.json: $(STAMP)
	@if [ ! -f $@ ]; then \
		$(BIN)/python -m export.build_engines --checkpoint training/pretrained/odise-tiny --out $(BUNDLE); fi

demo: $(BUNDLE)/bundle.json  ## install, export odise-tiny, segment the example picture
	$(BIN)/odise-rt segment $(EXAMPLE) --bundle $(BUNDLE) --vocab $(DEMO_WORDS) --out out/demo

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -q -m 'not slow and not gpu and not tensorrt and not tensorrt_rtx and not browser and not triton and not onnxruntime_gpu'

test-slow: $(STAMP)  ## every test that this machine can run
	$(BIN)/python -m pytest -q

extras: $(STAMP)  ## install what the web page, the server, videos and the like need, so that their tests run too
	$(INSTALL) '.[$(EXTRAS)]'

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: extras  ## mypy over every package, with the extras that it follows
	$(BIN)/mypy odise_rt training export benchmarks

docs: $(STAMP)  ## build the documentation with the API reference; a warning is an error
	$(INSTALL) '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

wheel: $(STAMP)  ## build the wheel of the runtime, with the CUDA kernels if nvcc is there, and list it
	rm -rf dist
	@if command -v cmake >/dev/null && command -v nvcc >/dev/null; then $(MAKE) kernels; fi
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m zipfile -l dist/*.whl

bench: $(BUNDLE)/bundle.json  ## measure odise-tiny on this machine's CPU and report it as a page
	$(BIN)/python -m benchmarks.run --bundle $(BUNDLE) --out out/bench/run.json
	$(BIN)/python -m benchmarks.report out/bench/run.json --out out/bench/report

readme: $(STAMP)  ## write the tables of README and docs from the committed results
	$(BIN)/python -m benchmarks.readme

engines: $(BUNDLE)/bundle.json  ## build odise-tiny's engines with TensorRT-RTX; needs no GPU
	$(INSTALL) '.[tensorrt-rtx]'
	$(BIN)/python -m pytest -q -m tensorrt_rtx

audit: $(STAMP)  ## check that every installed package is pinned, and for advisories where a database is reached
	$(BIN)/python .ci/audit.py

kernels:  ## compile the CUDA kernels into build/kernels; says so and builds nothing where there is no nvcc
	cmake -S . -B build/kernels $(KERNEL_OPTIONS) && cmake --build build/kernels --parallel 2

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
