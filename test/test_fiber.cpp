// The CUDA kernels without a GPU: the tests of all kernels, built by a host compiler against fiber.h, which runs each
// CUDA thread as a fiber. One program per precision (-DPRECISION_FP32 or bf16). It tests semantics (indexing, tails,
// barriers, rounding), not timing and not races; test_cuda.cu is the same tests on a GPU.
#include "test_attention.cpp"
#include "test_kernels.cpp"
#include "test_ns.cpp"
#include "test_rungs.cpp"
#include "test_wgmma.cpp"
