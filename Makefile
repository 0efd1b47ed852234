# make            the trainer, ./train_gpt, with whatever this machine has: nvcc, NCCL, MPI, a BLAS, OpenMP
# make info       what was found
# make tests      the test programs, in build/
# make test       builds and runs the whole suite          make demo    trains a small GPT on real text
# make dev        the kernel ladders of dev/               make help    this text
#
# PRECISION=fp32  the exact build of the CUDA backend (default bf16)
# GPU_ARCH="80 90a"  architectures instead of the installed GPU's

PRECISION ?= bf16
CXX       ?= g++
ifeq ($(filter $(PRECISION),bf16 fp32),)
  $(error PRECISION is '$(PRECISION)': bf16 or fp32)
endif
BUILD     := build
SHELL     := /bin/bash
comma     := ,
empty     :=
space     := $(empty) $(empty)

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
HAVE_CBLAS := $(call probe,#include <cblas.h>\nint main() { return cblas_sdot(0$(comma)0$(comma)1$(comma)0$(comma)1) != 0; },-lopenblas)
HAVE_OMP   := $(call probe,#include <omp.h>\nint main() { return omp_get_max_threads() == 0; },-fopenmp)

# --- Flags ---------------------------------------------------------------------------------------------------------------

# no errno and no traps from math: neither changes a value, and both keep loops from using vector instructions
HOST_FLAGS := -O3 -march=native -fno-math-errno -fno-trapping-math -Wall -Wextra $(if $(HAVE_OMP),-fopenmp,-Wno-unknown-pragmas)
DEFINES    := $(if $(HAVE_CBLAS),-DHAVE_CBLAS) $(if $(HAVE_MPI),-DUSE_MPI)
LIBS       := $(if $(HAVE_CBLAS),-lopenblas) $(if $(HAVE_MPI),$(MPI_LIBS)) -lpthread
INCLUDES   := -I. $(filter -I%,$(MPI_CFLAGS))
CPU_CXX     = $(CXX) -std=c++17 $(HOST_FLAGS) $(DEFINES) $(INCLUDES)

NVCC_DEFINES := $(DEFINES) $(if $(HAVE_NCCL),-DUSE_NCCL)
NVCC_FLAGS   := -std=c++17 -O3 --threads 0 -Xcompiler $(subst $(space),$(comma),$(strip $(filter-out -Wextra,$(HOST_FLAGS)))) \
                $(GENCODE) $(NVCC_DEFINES) $(INCLUDES)
# nvcc hands linker options on with -Xlinker, and does not know -pthread
NVCC_LIBS    := -lcublasLt $(if $(HAVE_NCCL),-lnccl) $(patsubst -Wl$(comma)%,-Xlinker %,$(filter-out -pthread,$(LIBS)))
fp32_define  := -DPRECISION_FP32
HEADERS      := $(wildcard *.h *.cuh kernels/*.cuh)

# --- The trainer -----------------------------------------------------------------------------------------------------------

.PHONY: all info tests test demo dev help clean
all: train_gpt

# Rebuilt when the precision or a finding changes
CONFIG := $(PRECISION) $(NVCC) $(GENCODE) $(DEFINES) $(HAVE_NCCL) $(HAVE_OMP)
$(shell mkdir -p $(BUILD); [ "$$(cat $(BUILD)/config 2>/dev/null)" = "$(CONFIG)" ] || echo "$(CONFIG)" > $(BUILD)/config)

train_gpt: train_gpt.cu $(HEADERS) $(BUILD)/config
	@$(MAKE) -s --no-print-directory info
ifneq ($(NVCC),)
	$(NVCC) $(NVCC_FLAGS) $(if $(filter fp32,$(PRECISION)),$(fp32_define)) train_gpt.cu -o $@ $(NVCC_LIBS)
else
	$(CPU_CXX) -x c++ train_gpt.cu -o $@ $(LIBS)
endif

info:
	@echo "CUDA    $(if $(NVCC),$(NVCC)$(comma) $(PRECISION)$(comma) for $(or $(addprefix sm_,$(GPU_ARCH)),sm_80 sm_90a and PTX: no GPU here),not found: building the CPU backend alone)"
	@echo "NCCL    $(if $(HAVE_NCCL),yes,not found: one GPU per run)"
	@echo "MPI     $(if $(HAVE_MPI),yes,not found: no mpirun (Debian: libopenmpi-dev))"
	@echo "BLAS    $(if $(HAVE_CBLAS),OpenBLAS,not found: plain loops on the CPU (Debian: libopenblas-dev))"
	@echo "OpenMP  $(if $(HAVE_OMP),yes,not found: one CPU thread)"

# --- Tests: one program per configuration, so that each header is compiled once for each --------------------------------------

# fiber.h takes bf16 and half from the toolkit's headers
TESTS := test_host test_cpu test_comm $(if $(NVCC),test_fiber_fp32 test_fiber_bf16 test_cuda_fp32 test_cuda_bf16)
tests: train_gpt $(addprefix $(BUILD)/,$(TESTS))

TEST_HEADERS := $(HEADERS) $(wildcard test/*.h test/*.cpp) $(BUILD)/config
FIBER_FLAGS   = $(CXX) -std=c++17 -O2 -g -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -DFIBER $(DEFINES) $(INCLUDES) $(if $(CUDA_DIR),-isystem $(CUDA_DIR)/include)

$(BUILD)/test_host: test/test_host.cpp $(TEST_HEADERS)
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined -I. $< -o $@ -lpthread
$(BUILD)/test_cpu: test/test_cpu.cpp train_gpt.cu $(TEST_HEADERS)
	$(CPU_CXX) $< -o $@ $(LIBS)
$(BUILD)/test_comm: test/test_comm.cpp $(TEST_HEADERS)
	$(CPU_CXX) $< -o $@ $(LIBS)
$(BUILD)/test_fiber_%: test/test_fiber.cpp $(TEST_HEADERS)
	$(FIBER_FLAGS) $($*_define) $< -o $@ $(LIBS)
$(BUILD)/test_cuda_%: test/test_cuda.cu train_gpt.cu $(TEST_HEADERS)
	$(NVCC) $(NVCC_FLAGS) $($*_define) $< -o $@ $(NVCC_LIBS) -lcublas

test:
	./scripts/test.sh --no_setup
demo:
	./scripts/compare.sh adamw dmuon --no_setup

# --- Kernel ladders ---------------------------------------------------------------------------------------------------------------

dev: $(patsubst dev/%.cu,$(BUILD)/%,$(wildcard dev/*.cu))
$(BUILD)/%: dev/%.cu $(HEADERS) $(wildcard dev/*.h) $(BUILD)/config
	$(if $(NVCC),,$(error the ladders of dev/ need nvcc))
	$(NVCC) $(NVCC_FLAGS) $< -o $@ $(NVCC_LIBS) -lcublas

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile
clean:
	rm -rf $(BUILD) train_gpt
