// test_matmul.cpp: the model's matrix products (CudaMatmul, cuBLASLt) against their twins in cpu_backend.h, on fresh
// random inputs. Bounds and helpers are test_kernels.cpp's, which test_cuda.cu includes first: sums are fp32 on both
// sides, a bf16 result is rounded once more.
#include <deque>
#include <sstream>

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

// The library's GELU takes tanh from the GPU's approximation, whose relative error is 2^-11 (PTX ISA, tanh.approx):
// that moves gelu(x) = x/2 (1 + tanh) by up to 2^-12 |x|. Not fused, gelu reads pre as it was rounded: its slope, 1.13
// at most, times the rounding of x.
TEST_CASE("matmul_gelu_forward, matmul_backward_input_gelu") {
    struct Size {
        int N, C, OC;
    };
    std::vector<Size> sizes = {{1, 8, 32}, {77, 72, 288}, {130, 40, 160}};
    if (large_sizes()) sizes.insert(sizes.end(), {{1024, 768, 3072}, {333, 1600, 6400}});
    for (const Size& size : sizes) {
        const int N = size.N, C = size.C, OC = size.OC;
        INFO("N " << N << " C " << C << " OC " << OC);
        const size_t inputs = size_t(N) * C, outputs = size_t(N) * OC, weights = size_t(OC) * C;
        const Floats inp = random_reals(inputs), weight = random_reals(weights, 1.5f / std::sqrt(float(C))),
                     bias = random_reals(OC);
        Floats want(outputs), want_pre(outputs);
        CpuOps::matmul_gelu_forward(want.data(), want_pre.data(), inp.data(), weight.data(), bias.data(), N, C, OC);
        DeviceBuffer<real> device_inp(narrow(inp)), device_weight(narrow(weight)), device_bias(narrow(bias)),
            out(outputs), pre(outputs);
        CudaMatmul::matmul_gelu_forward(out, pre, device_inp, device_weight, device_bias, N, C, OC);
        check_close(pre.download(), want_pre, OC);
        const Floats got = widen(out.download());
        const double from_pre = CudaMatmul::gelu_is_fused() ? std::ldexp(1.0, -12) : 1.13 * rounding<real>;
        size_t wrong = 0;
        for (size_t i = 0; i < outputs; i++)
            wrong += !(std::fabs(got[i] - want[i]) <=
                       rounding<real> * std::fabs(want[i]) + from_pre * std::fabs(want_pre[i]) + 2e-5);
        CHECK(wrong == 0);

        // Backward: (N,C) inputs of this product were the GELU's outputs.
        const Floats dout = random_reals(outputs), x = random_reals(inputs, 2.0f);
        Floats product(inputs), dpre(inputs);
        CpuOps::matmul_backward_input(product.data(), dout.data(), weight.data(), N, C, OC);
        CpuOps::matmul_backward_input_gelu(dpre.data(), dout.data(), weight.data(), x.data(), N, C, OC);
        DeviceBuffer<real> device_dout(narrow(dout)), device_x(narrow(x)), device_dpre(inputs);
        CudaMatmul::matmul_backward_input_gelu(device_dpre, device_dout, device_weight, device_x, N, C, OC);
        const Floats got_dpre = widen(device_dpre.download());
        wrong = 0;
        for (size_t i = 0; i < inputs; i++) {
            // gelu' = (1 + t)/2 + x/2 (1 - t^2) u'; an error e of t moves it by up to e (1/2 + |x| u'). Not fused, the
            // product is rounded first.
            const double u = 0.79788 * (1 + 3 * 0.044715 * x[i] * x[i]);
            const double slope =
                CudaMatmul::gelu_is_fused() ? std::ldexp(0.5 + std::fabs(x[i]) * u, -11) : 1.13 * rounding<real>;
            wrong += !(std::fabs(got_dpre[i] - dpre[i]) <= rounding<real> * std::fabs(dpre[i]) +
                                                               slope * std::fabs(product[i]) +
                                                               2e-5 * std::sqrt(double(OC) / C));
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("tune: right results, kept in a file, which may be damaged") {
    const int N = 320, C = 64, OC = 256;
    const Floats inp = random_reals(size_t(N) * C), weight = random_reals(size_t(OC) * C);
    Floats want(size_t(N) * OC);
    CpuOps::matmul_forward(want.data(), OC, inp.data(), weight.data(), nullptr, N, C, OC);
    DeviceBuffer<real> device_inp(narrow(inp)), device_weight(narrow(weight)), out(want.size());

    namespace fs = std::filesystem;
    const char* before = getenv("XDG_CACHE_HOME");
    const std::string restored = before ? before : "";
    const fs::path cache = fs::temp_directory_path() / ("train_gpt_test_" + std::to_string(getpid()));
    setenv("XDG_CACHE_HOME", cache.c_str(), 1);
    auto tune = [&] {
        CudaMatmul::stop();  // forgets all plans
        out.poison();
        CudaMatmul::tune([&] { CudaMatmul::matmul_forward(out, OC, device_inp, device_weight, nullptr, N, C, OC); });
        check_close(out.download(), want, OC);
        std::vector<fs::path> files;
        for (const auto& entry : fs::directory_iterator(cache / "train_gpt")) files.push_back(entry.path());
        REQUIRE(files.size() == 1);
        return files[0];
    };
    auto text = [](const fs::path& path) {
        std::ostringstream all;
        all << std::ifstream(path).rdbuf();
        return all.str();
    };
    const fs::path file = tune();
    const std::string first = text(file);
    CHECK(std::count(first.begin(), first.end(), '\n') == 1);
    fs::last_write_time(file, fs::file_time_type::clock::now() - std::chrono::hours(1));
    const auto written = fs::last_write_time(file);
    tune();
    CHECK(fs::last_write_time(file) == written);  // read, and so not timed and written again
    CHECK(text(file) == first);
    const std::string no_hex = std::string("zz") + first.substr(2), cut = first.substr(0, first.size() / 3),
                      no_algorithm = std::string(128, 'f') + first.substr(128);
    for (const std::string& damaged : {no_hex, cut, no_algorithm, std::string("\n\nnothing\n")}) {
        std::ofstream(file) << damaged;
        tune();
    }
    fs::remove_all(cache);
    if (before) setenv("XDG_CACHE_HOME", restored.c_str(), 1);
    else unsetenv("XDG_CACHE_HOME");
}

// What a recorded step goes through before it is launched, since cuBLASLt's products come with memsets.
TEST_CASE("kernels in the place of small memsets of a graph: the same bytes, in the same order") {
    const size_t n = 4 * (1 + integers(1, 999)[0]);
    const unsigned value = integers(1, 1 << 30)[0] * 4u + 3;
    INFO(n << " bytes of " << value);
    const DeviceBuffer<unsigned char> bytes(n), large(kMemsetBytes + 4);
    cudaGraph_t graph;
    CUDA_CHECK(cudaGraphCreate(&graph, 0));
    std::vector<cudaGraphNode_t> before;
    auto set = [&](unsigned char* to, unsigned element, size_t size) {
        cudaMemsetParams params = {};
        params.dst = to, params.value = element < 4 ? value % (1u << 8 * element) : value, params.elementSize = element;
        params.width = size / element, params.height = 1;
        cudaGraphNode_t node;
        CUDA_CHECK(cudaGraphAddMemsetNode(&node, graph, before.data(), before.size(), &params));
        before = {node};
    };
    std::deque<DeviceBuffer<unsigned char>> copies;  // of bytes after each memset
    for (unsigned element : {1, 2, 4}) {
        set(bytes, element, n);
        copies.emplace_back(n);
        cudaGraphNode_t node;
        CUDA_CHECK(cudaGraphAddMemcpyNode1D(&node, graph, before.data(), before.size(), copies.back(), bytes, n,
                                            cudaMemcpyDeviceToDevice));
        before = {node};
    }
    set(large, 4, large.size());
    CudaRuntime::kernels_for_memsets(graph);

    size_t nodes = 0;
    CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
    REQUIRE(nodes == 7);
    std::vector<cudaGraphNode_t> all(nodes);
    CUDA_CHECK(cudaGraphGetNodes(graph, all.data(), &nodes));
    int memsets = 0, kernels = 0;
    for (cudaGraphNode_t node : all) {
        cudaGraphNodeType type;
        CUDA_CHECK(cudaGraphNodeGetType(node, &type));
        memsets += type == cudaGraphNodeTypeMemset, kernels += type == cudaGraphNodeTypeKernel;
    }
    CHECK(memsets == 1);  // the large one
    CHECK(kernels == 3);

    cudaGraphExec_t recorded;
    CUDA_CHECK(cudaGraphInstantiate(&recorded, graph, 0));
    CUDA_CHECK(cudaGraphLaunch(recorded, cuda_stream));
    auto wrong = [&](const DeviceBuffer<unsigned char>& buffer, unsigned element) {
        const std::vector<unsigned char> got = buffer.download();
        int count = 0;
        for (size_t i = 0; i < got.size(); i++) count += got[i] != (value >> 8 * (i % element) & 0xff);
        return count;
    };
    for (int i = 0; i < 3; i++) CHECK(wrong(copies[i], 1 << i) == 0);
    CHECK(wrong(large, 4) == 0);
    CUDA_CHECK(cudaGraphExecDestroy(recorded));
    CUDA_CHECK(cudaGraphDestroy(graph));
}

}  // namespace test_matmul
