// test_matmul.cpp: the model's matrix products (CudaMatmul, cuBLASLt) against their twins in cpu_backend.h, on fresh
// random inputs. Bounds and helpers are test_kernels.cpp's, which test_cuda.cu includes first: sums are fp32 on both
// sides, a bf16 result is rounded once more.
#include "../cuda_backend.cuh"

namespace test_matmul {
using namespace test_kernels;

TEST_CASE("cuBLASLt: matmul_forward, matmul_backward_input, matmul_backward_weight") {
    struct Size {
        int N, C, OC;
    };
    std::vector<Size> sizes = {{1, 8, 24}, {77, 72, 216}, {3, 24, 8}, {77, 64, 256}, {130, 40, 160}};
    if (large_sizes()) sizes.insert(sizes.end(), {{13, 768, 2304}, {1024, 768, 768}, {77, 3072, 768}, {5, 64, 50304}});
    for (const Size& size : sizes) {
        const int N = size.N, C = size.C, OC = size.OC;
        INFO("N " << N << " C " << C << " OC " << OC);
        const size_t inputs = size_t(N) * C, outputs = size_t(N) * OC, weights = size_t(OC) * C;
        const Floats inp = random_reals(inputs), weight = random_reals(weights), bias = random_reals(OC);
        DeviceBuffer<real> device_inp(narrow(inp)), device_weight(narrow(weight)), device_bias(narrow(bias));
        for (int slots : {1, 3}) {  // Q, K and V are written, and read, as column slices: rows are 3 OC apart
            CAPTURE(slots);
            const int ldo = slots * OC, slice = (slots - 1) * OC;
            // The last OC columns of a wide (N, ldo) tensor; the others must stay as they were.
            auto columns = [&](const Floats& wide) {
                Floats narrow_ones;
                for (int n = 0; n < N; n++)
                    narrow_ones.insert(narrow_ones.end(), wide.begin() + size_t(n) * ldo + slice,
                                       wide.begin() + size_t(n) * ldo + slice + OC);
                return narrow_ones;
            };
            for (bool with_bias : {false, true}) {
                CAPTURE(with_bias);
                const Floats before = random_reals(size_t(N) * ldo);
                Floats want = before;
                CpuOps::matmul_forward(want.data() + slice, ldo, inp.data(), weight.data(),
                                       with_bias ? bias.data() : nullptr, N, C, OC);
                DeviceBuffer<real> out(narrow(before));
                CudaMatmul::matmul_forward(out + slice, ldo, device_inp, device_weight,
                                           with_bias ? device_bias.data() : nullptr, N, C, OC);
                const Floats got = widen(out.download());
                check_close(narrow(columns(got)), columns(want), OC);
                size_t touched = 0;
                for (size_t i = 0; i < got.size(); i++) touched += int(i % ldo) < slice && got[i] != before[i];
                CHECK(touched == 0);
            }
            for (bool accumulate : {false, true}) {
                CAPTURE(accumulate);
                const Floats dout = random_reals(size_t(N) * ldo),
                             before = accumulate ? normal(weights) : Floats(weights, NAN);
                Floats want = before;
                CpuOps::matmul_backward_weight(want.data(), dout.data() + slice, ldo, inp.data(), N, C, OC, accumulate);
                DeviceBuffer<real> device_dout(narrow(dout));
                DeviceBuffer<float> dweight(before);
                CudaMatmul::matmul_backward_weight(dweight, device_dout + slice, ldo, device_inp, N, C, OC, accumulate);
                check_close(dweight.download(), want, C, 1e-5, std::sqrt(double(N)));
            }
        }
        const Floats dout = random_reals(outputs);
        Floats want(inputs);
        CpuOps::matmul_backward_input(want.data(), dout.data(), weight.data(), N, C, OC);
        DeviceBuffer<real> device_dout(narrow(dout)), dinp(inputs);
        CudaMatmul::matmul_backward_input(dinp, device_dout, device_weight, N, C, OC);
        check_close(dinp.download(), want, C, 1e-5, std::sqrt(double(OC)));
    }
}

}  // namespace test_matmul
