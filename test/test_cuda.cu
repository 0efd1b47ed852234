// Everything that needs a GPU, in one program per precision so that each header is compiled once: kernels and products
// against the CPU backend on fresh random inputs, and the whole model against the golden run of PyTorch.
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cu"
#include "test_attention.cpp"
#include "test_golden.cpp"
#include "test_kernels.cpp"
#include "test_matmul.cpp"
#include "test_ns.cpp"
#include "test_wgmma.cpp"
