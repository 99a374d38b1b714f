# `make demo` and `make test` need Python 3.11 or later, make and a C++ compiler; nvcc if the CUDA
# kernels are to be built. Everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,
SOURCES := $(shell find csrc tests benchmarks -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.PHONY: help build demo test test-all test-sample lint format types bench report quality instability loading memory quantizers emoji photographs kernel-table kernel-costs kernel-times gpu-check gpu-bench sanitize \
  mutations check-install clean

help:
	@echo "make demo           train a small CogView on handwritten digits and draw captions"
	@echo "make test           build, lint, check types and test everything that needs no GPU"
	@echo "make test-all       the same with every parametrisation and the long sweeps (about 20 minutes)"
	@echo "make test-sample    what make test leaves out, drawn with SEED"
	@echo "make bench          time everything and its peers on this machine, and write the report"
	@echo "make report         make the report's tables and plots from the records that are here"
	@echo "make gpu-check      on a machine with a GPU: build, and run every test that needs one"
	@echo "make gpu-bench      on a machine with a GPU: build, time everything and its peers, and keep a record"
	@echo "make sanitize       run the kernels on the CPU under AddressSanitizer, UBSan and the race check"
	@echo "make mutations      break the kernels on purpose, about 250 times: a test must fail each time"
	@echo "make quality        train a small CogView dense and three-region, and compare what they learn"
	@echo "make instability    train deep float16 models with Pre-LN, Sandwich-LN and PB-relax: what each changes"
	@echo "make loading        measure how fast images and tokens are read, and write it into docs/training.md"
	@echo "make memory         predict the memory that training takes of each GPU, and write it into docs/scaling.md"
	@echo "make quantizers     train the image tokenizer with each of its four rules, and compare them"
	@echo "make emoji          train CogView on the system's colour emoji, and read back the held-out ones"
	@echo "make photographs    train the preset small on photographs that need no download: error, loss, caption gap"
	@echo "make kernel-table   record what the compiler made of each kernel (needs nvcc)"
	@echo "make kernel-costs   count what the attention kernels compute and move (host model, no GPU)"
	@echo "make kernel-times   predict the times of the kernels on one H200 (a model; needs nvcc, no GPU)"
	@echo "make check-install  pip install in fresh environments, every way that is supported"
	@echo "make format         format Python and C++"
	@echo "make clean          remove what was built"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; set PYTHON to a newer one"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools ninja pybind11 torch
	COGVIEW_KERNELS_CUDA=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[cogview,data,dev]'
	@touch $@

# In place and incremental (ninja); CUDA kernels where nvcc is found, the host model always. Fails on
# register spills.
build: $(VENV)/.installed
	COGVIEW_KERNELS_HOST_MODEL=1 $(BIN)/python setup.py -q build_ext --inplace

demo: build
	$(BIN)/cogview demo --out results/demo

# One worker per core; what each worker runs depends on how fast they are.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
SEED ?= 1

test: build lint types
	$(BIN)/python -m cogview_kernels
	$(PYTEST) --junit-xml=results/test.xml

test-all: build lint types
	$(PYTEST) -m "slow or not slow" --timeout=3600 --junit-xml=results/test-all.xml

test-sample: build
	$(PYTEST) -m slow --sample 2 --hypothesis-seed=$(SEED) --junit-xml=results/test-sample.xml

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Otherwise some calls pay for the page faults of tensors that others gave back to the system. Without
# the caches for small pieces, freed tensors merge: glibc would find no room in them for aligned ones.
KEEP_FREED_MEMORY := GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0

# A method that is wrong or breaks fails the run, which goes on all the same.
# make bench FILTER="decode and SDPA"        some of it, kept in results/bench.json only
# make bench COMPARE=benchmarks/results/...  beside an earlier record
bench: build
	@mkdir -p results
	$(KEEP_FREED_MEMORY) $(BIN)/pytest benchmarks/suite/bench.py -q --benchmark-enable --benchmark-only --benchmark-sort=name \
	  --benchmark-columns=min,median,iqr,rounds --benchmark-json=results/bench.json $(if $(FILTER),-k "$(FILTER)"); status=$$?; \
	$(if $(COMPARE),$(BIN)/pytest-benchmark compare $(COMPARE) results/bench.json --group-by=fullname --columns=min$(comma)median$(comma)iqr;) \
	$(if $(FILTER),,$(BIN)/python -m benchmarks.report;) exit $$status

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report

# Minutes (quantizers) to about an hour on two cores; at the same commit they go on where they were
# stopped.
quality: build
	$(BIN)/python -m benchmarks.experiments.quality
	$(BIN)/python -m benchmarks.report

instability: build
	$(BIN)/python -m benchmarks.experiments.instability --jobs 2
	$(BIN)/python -m benchmarks.report

loading: build
	$(BIN)/python -m benchmarks.experiments.loading
	$(BIN)/python -m benchmarks.report

memory: build
	$(BIN)/python -m benchmarks.experiments.memory
	$(BIN)/python -m benchmarks.report

quantizers: build
	$(BIN)/python -m benchmarks.experiments.quantizers --jobs 2
	$(BIN)/python -m benchmarks.report

emoji: build
	$(BIN)/python -m benchmarks.experiments.emoji
	$(BIN)/python -m benchmarks.report

photographs: build
	$(BIN)/python -m benchmarks.experiments.photographs
	$(BIN)/python -m benchmarks.report

# After a change of a kernel; docs/kernels.*, docs/kernel_costs.* and docs/kernel_times.* are committed with it.
kernel-table: build
	$(BIN)/python -m benchmarks.kernels.table

kernel-costs: build
	$(BIN)/python -m benchmarks.kernels.costs

# Some of it, printed and not recorded: make kernel-times ARGS="forward --cases B --head-dims 64",
# of the norms: ARGS="norms backward --shapes 8192x2560"
kernel-times: build
	$(BIN)/python -m benchmarks.kernels.cycles.times $(ARGS)

# With the Python that holds torch there, not .venv: nothing is installed (docs/gpu.md).
gpu-check:
	PYTHONPATH=. $(PYTHON) tests/gpu/check.py

# make gpu-bench ARGS="--resume benchmarks/results/suite-...json"
gpu-bench:
	$(PYTHON) -m benchmarks.suite.gpu $(ARGS)

# The kernels under AddressSanitizer and UBSan, then the same tests under the host model's own checks.
SANITIZED := build/sanitize/lib
SANITIZE_TESTS := -q -m "slow or not slow" --capture=sys tests/test_attention_kernels.py tests/test_pb_relax_layer_norm.py \
  tests/test_layer_norm_kernels.py tests/test_decode_kernels.py \
  -k 'host_model and (many_tiles and 48-3 and dtype1 or any_values or any_packed or any_kv_lens or few_queries and 5-64 \
  or unseen or accuracy or many_rounds or places_do_not_matter)'
ASAN = OMP_NUM_THREADS=1 PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"

sanitize: build
	COGVIEW_KERNELS_CUDA=0 COGVIEW_KERNELS_HOST_MODEL=1 COGVIEW_KERNELS_SANITIZE=1 \
	  $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	$(ASAN) $(BIN)/python -P -c 'from cogview_kernels import _host_model as m; assert "sanitize" in m.__file__'
	$(ASAN) $(BIN)/pytest $(SANITIZE_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SANITIZE_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/test_host_model.py

mutations: build
	$(BIN)/python tests/mutations.py

check-install: $(VENV)/.installed
	$(PYTHON) tests/check_install.py

clean:
	rm -rf build dist *.egg-info cogview_kernels/*.so
