# make demo    install into .venv, find tickets on real digits, write runs/demo/report.md
# make test    install into .venv, run the test suite
# make bench   print the layer suite;  make bench-quick  the table of the README, in minutes
# make asan    the kernel tests under address and undefined-behaviour sanitizers
# make tsan    threaded kernels under ThreadSanitizer;  make nightly  10000 random layers on every instruction set, a search killed 20 times
# make aarch64 cross-compile the CPU kernels, run the innermost in an emulator
# make fuzz   ten thousand damaged files;  make test-peers  torch's own tests of linear and convolution, on ours
# make emulate  every CUDA kernel on the CPU once more, for longer than make test does
# make offline  compile every GPU kernel and read its machine code, no GPU needed (wants triton, nvcc for csrc/cuda)
# make gpu-test PY=python3            the tests that need a GPU
# make gpu-bench PY=python3 OUT=dir   what this GPU does and what we do on it: dir/rows.jsonl, dir/gpu.md; no network
#   MINUTES=15  its time;  ARGS=--quick  the first cases only, --experiments  a sweep of launch configurations
#
# TORCH=…      another torch requirement, with pip options if need be
# PY=…         an existing Python that has torch (and pytest); nothing is downloaded then

TORCH ?= torch==2.13.0
PYTHON ?= python3
OUT ?= runs/gpu
MINUTES ?= 15

ifdef PY
RUN := $(PY)
READY := existing
else
RUN := .venv/bin/python
READY := .venv/ready
endif

.PHONY: demo test test-peers lint bench bench-quick docs emulate fuzz offline gpu-test gpu-bench asan tsan nightly aarch64 existing clean

demo: $(READY)
	$(RUN) -m sparsekit.demo --out runs/demo

# One process a core where pytest-xdist is there; the tests that want more threads ask for them.
PARALLEL = $(shell $(RUN) -c "import xdist" 2>/dev/null && printf %s "-n auto --maxprocesses 8")

test: $(READY)
	$(RUN) setup.py -q build_ext --inplace
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL)

test-peers: $(READY)
	$(RUN) setup.py -q build_ext --inplace
	SPARSEKIT_PEERS=all $(RUN) -m pytest tests/test_peers.py

lint: $(READY)
	$(RUN) -m ruff check .

bench: $(READY)
	$(RUN) -m sparsekit bench layers

bench-quick: $(READY)
	$(RUN) -m sparsekit bench hero --quick --threads 2

docs: $(READY)
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs

emulate: $(READY)
	$(RUN) tests/emulated.py long

fuzz: $(READY)
	$(RUN) tests/fuzz_packed.py 10000

offline: $(READY)
	$(RUN) benchmarks/offline.py $(ARGS)

# Only these files are imported: the others need packages that a GPU machine may lack.
GPU_TESTS = $(shell grep -lE 'mark\.gpu|runs_kernels' tests/test_*.py)

# What an environment of one's own lacks is named before anything else runs.
gpu-test: $(filter .venv/ready,$(READY))
	$(RUN) benchmarks/gpu.py --check test
	$(MAKE) $(READY)
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) -m pytest -m gpu $(GPU_TESTS) $(ARGS)

# Most rows need no native library, so one that does not build stops only the rows that do.
gpu-bench: $(filter .venv/ready,$(READY))
	$(RUN) benchmarks/gpu.py --check bench $(ARGS)
	SPARSEKIT_NATIVE=0 $(MAKE) $(READY)
	-$(RUN) setup.py -q build_ext --inplace
	$(RUN) benchmarks/gpu.py --out $(OUT) --minutes $(MINUTES) $(ARGS)

.venv/ready: pyproject.toml setup.py
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q setuptools wheel
	.venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[demo,test]'
	touch $@

existing:
	$(RUN) -m pip install -q --no-index --no-deps --no-build-isolation -e .

asan: $(READY)
	rm -rf build/asan && mkdir -p build/asan && cp -r sparsekit kernels csrc tests setup.py pyproject.toml build/asan/
	cd build/asan && SPARSEKIT_SANITIZE=1 SPARSEKIT_NATIVE=1 $(abspath $(RUN)) setup.py -q build_ext --inplace
	cd build/asan && ln -sfn ../kernels sparsekit/kernels && \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$$PWD $(abspath $(RUN)) -m pytest -q tests/test_csr_ops.py tests/test_bsr_native.py \
	  tests/test_bsr_conv_native.py tests/test_lanes.py tests/test_jit.py tests/test_conv_code.py tests/test_planes.py tests/test_max_pool.py tests/test_random_kernels.py -k "not isa and not instruction_set" -p no:cacheprovider

tsan: $(READY)
	rm -rf build/tsan && mkdir -p build/tsan && cp -r sparsekit kernels csrc tests setup.py pyproject.toml build/tsan/
	cd build/tsan && ln -sfn ../kernels sparsekit/kernels && rm -f sparsekit/_C.abi3.so && \
	  CXX="g++ -fsanitize=thread -g" SPARSEKIT_CUDA=0 SPARSEKIT_NATIVE=1 $(abspath $(RUN)) setup.py -q build_ext --inplace
	cd build/tsan && PYTHONPATH=$$PWD $(abspath $(RUN)) tests/race.py

nightly: $(READY)
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) tests/random_kernels.py --cases 10000
	$(RUN) tests/kill_sweep.py --kills 20

aarch64: $(READY)
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) tests/aarch64.py

clean:
	rm -rf build .venv sparsekit/_C.abi3.so sparsekit/_C.abi3.json sparsekit/_autograd.torch*
