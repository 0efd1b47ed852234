// The rungs of a ladder that only Hopper can run (dev/newton_schulz_hopper.cuh), on fibers: on a GPU the ladder checks
// them itself. Numbers are small integers, so that sums are exact, and A is rounded once.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <vector>

#include "../dev/newton_schulz_hopper.cuh"
#include "device_buffer.h"

TEST_CASE("ladder: X X^T on Hopper") {
    using rungs::bf16;
    const int m = 256, batch = 2;
    for (int n : {64, 448}) {  // one step, and more than the rings have places
        std::mt19937 generator(n);
        std::vector<bf16> x(size_t(batch) * m * n), want;
        for (bf16& value : x) value = from_float<bf16>(float(int(generator() % 17) - 8));
        for (int row = 0; row < batch * m; row++)
            for (int col = 0; col < m; col++) {
                const bf16 *a = &x[size_t(row) * n], *b = &x[size_t(row / m * m + col) * n];
                float sum = 0;
                for (int k = 0; k < n; k++) sum += to_float(a[k]) * to_float(b[k]);
                want.push_back(from_float<bf16>(sum));
            }
        const DeviceBuffer<bf16> X(x);
        for (auto run : {rungs::run_7, rungs::run_8, rungs::run_9, rungs::run_10})
            for (int launch = 0; launch < 2; launch++) {  // copies that land early and late
                CAPTURE(n);
                const DeviceBuffer<bf16> A(want.size());
                run(A, X, batch, m, n);
                CHECK(std::memcmp(A.download().data(), want.data(), want.size() * sizeof(bf16)) == 0);
            }
    }
}
