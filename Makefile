# make            the trainer, ./train_gpt, with whatever this machine has: nvcc, NCCL, MPI, a BLAS, OpenMP
# make info       what was found                           make help    this text
# make demo       trains a small GPT on real text; it fetches that text, and the build takes nothing but g++
# make tests      the test programs, in build/; needs doctest
# make test       builds and runs the whole suite; skips, and counts, what this machine lacks nvcc, a GPU or MPI for
# make soak       200 kills of runs, each resumed, about 7 minutes; make fuzz: libFuzzer for half an hour each (both in short in make test)
# make sanitize   the host's part under the sanitizers of threads, addresses and leaks; some minutes
# make mutants    plants deliberate faults in copies of the tree: each must make its test fail; about an hour
# make lint       the style of every source; needs clang-format 14, clang-tidy 14, shellcheck: scripts/setup.sh --lint
# make dev        the kernel ladders of dev/ and the benchmark of the optimizer; needs nvcc (CUDA Toolkit) to build them and a GPU to
#                 run them
#
# PRECISION=fp32  the exact build of the CUDA backend (default bf16)
# GPU_ARCH="80 90a"  architectures instead of the installed GPU's
# CXX=g++-12      another compiler (nvcc hands the host's part to it)

PRECISION ?= bf16
ifeq ($(filter $(PRECISION),bf16 fp32),)
  $(error PRECISION is '$(PRECISION)': bf16 or fp32)
endif
BUILD     := build
SHELL     := /bin/bash
comma     := ,
empty     :=
space     := $(empty) $(empty)
$(shell mkdir -p $(BUILD))

# --- What is here: each probe compiles and links a small program --------------------------------------------------------

probe = $(shell printf '%b' '$(1)' | $(CXX) -x c++ - $(2) -o /dev/null 2>/dev/null && echo yes)

NVCC      := $(or $(shell command -v nvcc),$(wildcard $(addsuffix /bin/nvcc,$(CUDA_HOME) $(CUDA_PATH) /usr/local/cuda)))
NVCC      := $(firstword $(NVCC))
CUDA_DIR  := $(if $(NVCC),$(patsubst %/bin/,%,$(dir $(realpath $(NVCC)))))
ifneq ($(NVCC),)
  # The driver names the GPU's architecture, as in 9.0; wgmma and setmaxnreg need the "a" of 90a.
  GPU_ARCH ?= $(patsubst 90,90a,$(sort $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$$' | tr -d .)))
  GENCODE  := $(foreach a,$(or $(GPU_ARCH),80 90a),-gencode arch=compute_$(a),code=sm_$(a))
  ifeq ($(GPU_ARCH),)
    GENCODE += -gencode arch=compute_80,code=compute_80
  endif
  NCCL_FLAGS := -I$(CUDA_DIR)/include -L$(CUDA_DIR)/lib64 -lnccl
  HAVE_NCCL := $(call probe,#include <nccl.h>\nint main() { ncclUniqueId id; return ncclGetUniqueId(&id); },$(NCCL_FLAGS) -Wl$(comma)--unresolved-symbols=ignore-in-shared-libs)
endif

MPI_CFLAGS := $(shell mpicxx --showme:compile 2>/dev/null || mpicxx -compile-info 2>/dev/null | cut -d' ' -f2-)
MPI_LIBS   := $(shell mpicxx --showme:link 2>/dev/null || mpicxx -link-info 2>/dev/null | cut -d' ' -f2-)
HAVE_MPI   := $(call probe,#include <mpi.h>\nint main() { return MPI_Init(0$(comma)0); },$(MPI_CFLAGS) $(MPI_LIBS))
HAVE_OMP   := $(call probe,#include <omp.h>\nint main() { return omp_get_max_threads() == 0; },-fopenmp)

# The first of these that links. Asked for by name: what a distribution calls libblas or libcblas and no more is as a rule the
# reference BLAS, which computes the demo's steps ten times slower than our own loops (dev/results/demo_cpu.log).
try_blas = $(if $(call probe,#include <cblas.h>\nint main() { return cblas_sdot(0$(comma)0$(comma)1$(comma)0$(comma)1) != 0; },$(1)),$(1))
BLAS := $(strip $(or $(call try_blas,-lopenblas),$(call try_blas,-I/usr/include/openblas -lopenblas),$(call try_blas,-lblis)))

# Only `make found` asks for these: doctest, and an mpirun that starts two ranks of what mpicxx builds.
HAVE_DOCTEST = $(call probe,#include <doctest/doctest.h>\nint main() {},-c)
HAVE_MPIRUN  = $(and $(HAVE_MPI),$(shell \
    printf '%b' '#include <mpi.h>\nint main() { int n; MPI_Init(0, 0); MPI_Comm_size(MPI_COMM_WORLD, &n); MPI_Finalize(); return n != 2; }' | \
    $(CXX) -x c++ - $(MPI_CFLAGS) $(MPI_LIBS) -o $(BUILD)/probe_mpirun && for flags in '--allow-run-as-root --oversubscribe' ''; do \
    timeout 30 mpirun $$flags -n 2 $(BUILD)/probe_mpirun && echo yes && break; done 2>/dev/null))

# --- Flags ---------------------------------------------------------------------------------------------------------------

# no errno and no traps from math: neither changes a value, and both keep loops from using vector instructions
HOST_FLAGS := -O3 -march=native -fno-math-errno -fno-trapping-math -Wall -Wextra $(if $(HAVE_OMP),-fopenmp,-Wno-unknown-pragmas)
DEFINES    := $(if $(BLAS),-DHAVE_CBLAS) $(if $(HAVE_MPI),-DUSE_MPI)
LIBS       := $(filter-out -I%,$(BLAS)) $(if $(HAVE_MPI),$(MPI_LIBS)) -lpthread
INCLUDES   := -I. $(filter -I%,$(BLAS) $(MPI_CFLAGS))
CPU_CXX     = $(CXX) -std=c++17 $(HOST_FLAGS) $(DEFINES) $(INCLUDES)

NVCC_DEFINES := $(DEFINES) $(if $(HAVE_NCCL),-DUSE_NCCL)
NVCC_FLAGS   := -std=c++17 -O3 --threads 0 $(if $(filter-out default,$(origin CXX)),-ccbin $(lastword $(CXX))) \
                -Xcompiler $(subst $(space),$(comma),$(strip $(filter-out -Wextra,$(HOST_FLAGS)))) $(GENCODE) $(NVCC_DEFINES) $(INCLUDES)
# nvcc hands linker options on with -Xlinker, and does not know -pthread
NVCC_LIBS    := -lcublasLt -ldl $(if $(HAVE_NCCL),-lnccl) $(patsubst -Wl$(comma)%,-Xlinker %,$(filter-out -pthread,$(LIBS)))
fp32_define  := -DPRECISION_FP32
races_bf16_define := -DEVERY_LANE_ARRIVES
races_fp32_define := $(races_bf16_define) $(fp32_define)
HEADERS      := $(sort $(wildcard *.h *.cuh kernels/*.cuh))
# Ranks of one run must be of the same sources: --version says which, and each rank is asked for it.
SOURCES      := $(shell cat train_gpt.cu $(HEADERS) | sha256sum | cut -c 1-16)

# --- The trainer -----------------------------------------------------------------------------------------------------------

.PHONY: all info found tests test soak fuzz sanitize mutants lint demo dev help clean
all: train_gpt

# Rebuilt when the compiler, the precision or a finding changes
CONFIG := $(PRECISION) $(shell $(CXX) --version 2>/dev/null | head -n 1) $(CPU_CXX) $(LIBS) $(NVCC) $(NVCC_FLAGS) $(NVCC_LIBS)
$(shell [ "$$(cat $(BUILD)/config 2>/dev/null)" = '$(CONFIG)' ] || echo '$(CONFIG)' > $(BUILD)/config)

define say_what_is_here
@echo "CUDA    $(if $(NVCC),$(NVCC)$(comma) $(PRECISION)$(comma) for $(or $(addprefix sm_,$(GPU_ARCH)),sm_80 sm_90a and PTX: no GPU here),not found: building the CPU backend alone)"
@echo "NCCL    $(if $(HAVE_NCCL),yes,not found: one GPU per run)"
@echo "MPI     $(if $(HAVE_MPI),yes,not found: no mpirun (Debian: libopenmpi-dev openmpi-bin))"
@echo "BLAS    $(or $(BLAS),neither OpenBLAS nor BLIS: plain loops on the CPU (Debian: libopenblas-dev))"
@echo "OpenMP  $(if $(HAVE_OMP),yes,not found: one CPU thread)"
endef

train_gpt: train_gpt.cu $(HEADERS) $(BUILD)/config
	$(say_what_is_here)
ifneq ($(NVCC),)
	@echo "compiling for the GPU: up to a minute"
	$(NVCC) $(NVCC_FLAGS) $(if $(filter fp32,$(PRECISION)),$(fp32_define)) -DSOURCES=$(SOURCES) -c train_gpt.cu -o $(BUILD)/train_gpt.o
	$(NVCC) $(NVCC_FLAGS) $(BUILD)/train_gpt.o -o $@ $(NVCC_LIBS)
else
	$(CPU_CXX) -DSOURCES=$(SOURCES) -x c++ train_gpt.cu -o $@ $(LIBS)
endif

info:
	$(say_what_is_here)
# The same for scripts: a word for each thing that was found.
found:
	@echo $(if $(NVCC),nvcc) $(if $(HAVE_NCCL),nccl) $(if $(HAVE_MPI),mpi) $(if $(HAVE_MPIRUN),mpirun) $(if $(BLAS),blas) \
	    $(if $(HAVE_OMP),openmp) $(if $(HAVE_DOCTEST),doctest)

# --- Tests: one program per configuration, so that each header is compiled once for each --------------------------------------

# fiber.h takes bf16 and half from the toolkit's headers
TESTS := test_host test_cpu test_comm $(if $(NVCC),test_fiber_fp32 test_fiber_bf16 test_cuda_fp32 test_cuda_bf16)
tests: train_gpt $(addprefix $(BUILD)/,$(TESTS) bench_optimizer_cpu $(if $(NVCC),train_gpt_shared invented_gpus.so))

TEST_HEADERS := $(HEADERS) $(wildcard test/*.h test/*.cpp) $(BUILD)/config
FIBER_FLAGS   = $(CXX) -std=c++17 -O2 -g -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing -DFIBER $(DEFINES) $(INCLUDES) $(if $(CUDA_DIR),-isystem $(CUDA_DIR)/include)

$(BUILD)/test_host: test/test_host.cpp $(TEST_HEADERS)
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined -I. $< -o $@ -lpthread
$(BUILD)/test_cpu: test/test_cpu.cpp train_gpt.cu $(TEST_HEADERS)
	$(CPU_CXX) $< -o $@ $(LIBS)
$(BUILD)/test_comm: test/test_comm.cpp $(TEST_HEADERS)
	$(CPU_CXX) $< -o $@ $(LIBS)
$(BUILD)/bench_optimizer_cpu: dev/bench_optimizer.cu train_gpt.cu $(HEADERS) $(BUILD)/config
	$(CPU_CXX) -x c++ $< -o $@ $(LIBS)
# The trainer with the CUDA runtime as a library beside it, and what takes the place of that library's GPUs (test_train.py).
$(BUILD)/train_gpt_shared: train_gpt
	$(NVCC) $(NVCC_FLAGS) -cudart shared $(BUILD)/train_gpt.o -o $@ $(NVCC_LIBS)
# The trainer for racecheck (gpu_check.sh sanitize_run)
$(BUILD)/train_gpt_races: train_gpt.cu $(HEADERS) $(BUILD)/config
	$(NVCC) $(NVCC_FLAGS) $(races_bf16_define) $< -o $@ $(NVCC_LIBS)
$(BUILD)/invented_gpus.so: test/invented_gpus.cpp $(BUILD)/config
	$(CXX) -std=c++17 -Wall -Wextra -shared -fPIC -isystem $(CUDA_DIR)/include $< -o $@
$(BUILD)/test_fiber_%: test/test_fiber.cpp $(TEST_HEADERS) dev/newton_schulz_hopper.cuh
	$(FIBER_FLAGS) $($*_define) $< -o $@ $(LIBS)
$(BUILD)/test_cuda_%: test/test_cuda.cu train_gpt.cu $(TEST_HEADERS)
	$(NVCC) $(NVCC_FLAGS) $($*_define) $< -o $@ $(NVCC_LIBS) -lcublas

test:
	./scripts/test.sh --no_setup
lint:
	./scripts/lint.sh $(DEFINES) $(INCLUDES)
soak: train_gpt
	python3 test/soak.py ./train_gpt --kills 200
fuzz:
	./test/fuzz.sh 1800
sanitize:
	./test/sanitize.sh
mutants:
	python3 test/mutants.py
demo:
	./scripts/compare.sh adamw dmuon --no_setup

# --- Kernel ladders ---------------------------------------------------------------------------------------------------------------

$(BUILD)/bench_optimizer: train_gpt.cu
# For scripts/profile_kernels.py. CUPTI comes with the toolkit, beside its libraries or in extras.
CUPTI_DIRS := $(CUDA_DIR)/extras/CUPTI/lib64 $(CUDA_DIR)/lib64
$(BUILD)/kernel_trace.so: dev/kernel_trace.cpp $(BUILD)/config
	$(CXX) -std=c++17 -O2 -Wall -Wextra -shared -fPIC -I$(CUDA_DIR)/extras/CUPTI/include -I$(CUDA_DIR)/include $< -o $@ \
	    $(foreach dir,$(CUPTI_DIRS),-L$(dir) -Wl$(comma)-rpath$(comma)$(dir)) -lcupti
ifneq ($(NVCC),)
dev: $(patsubst dev/%.cu,$(BUILD)/%,$(wildcard dev/*.cu))
$(BUILD)/%: dev/%.cu $(HEADERS) $(wildcard dev/*.h dev/*.cuh) $(BUILD)/config
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(NVCC_LIBS) -lcublas
else
dev:
	@echo "make dev: the ladders of dev/ need nvcc, of NVIDIA's CUDA Toolkit: put it on the PATH, or name its directory in CUDA_HOME" >&2
	@exit 2
endif

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile
clean:
	rm -rf $(BUILD) train_gpt
