// Products of a decoder's matrices by the vectors of a batch, shared by the threads of a team. Work is cut by rows of
// weights, never within a sum.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"
#include "team.h"

namespace {
constexpr int64_t kItemBytes = 1 << 15;  // of weights that an item reads, about: some microseconds of memory

template <class Work> void share(Team& team, int items, const Work& work) {
    team.run(items, [](const void* data, int i, int) { (*static_cast<const Work*>(data))(i); }, &work);
}

int64_t bytes_of(const Matrix& matrix) {
    const int64_t count = matrix.inputs;
    return matrix.format == kFloat32 ? 4 * count
         : matrix.format == kCodes8  ? count
         : matrix.format > kCodes8   ? count / 2 : 2 * count;
}

bool is_sound(const Matrix& matrix, int64_t outputs, int64_t inputs) {
    if (!matrix.data || matrix.outputs != outputs || matrix.inputs != inputs || outputs < 1 || inputs < 1) return false;
    if (matrix.format < kFloat32 || matrix.format > kCodes4Exact) return false;
    if (matrix.format < kCodes8) return true;
    const int64_t group = matrix.group;
    if (!matrix.scales || group < 1 || inputs % group) return false;
    return matrix.format == kCodes8 ? !matrix.zeros : group == 32 || group == 64 || group % kBlock == 0;
}

// Vectors of a batch in the order of a format of weights; made anew when the vectors change, or the order that is
// asked.
struct Vectors {
    std::vector<float> arranged;
    void (*order)(const float*, int64_t, float*) = nullptr;

    const float* in(const Kernel& kernel, const float* from, int batch, int64_t count) {
        if (order == kernel.arrange) return arranged.data();
        order = kernel.arrange;
        arranged.resize(size_t(batch) * room_of_vector(count));
        for (int b = 0; b < batch; ++b) order(from + b * count, count, arranged.data() + b * room_of_vector(count));
        return arranged.data();
    }
};

struct Output {  // of a matrix, and its kernel
    const Matrix* matrix;
    Kernel kernel;
    float* to;  // [batch, outputs]
    const float* vectors;
};

// Several products of the same vectors [batch, inputs], as one job; then done(output, begin, end) for the rows of each
// item. Biases are added.
template <class Done>
void multiply(Team& team, const float* vectors, int batch, Output* outputs, int count, const Done& done) {
    const int64_t inputs = outputs[0].matrix->inputs;
    std::vector<Vectors> orders(count);
    std::vector<int> ends(count);
    std::vector<int64_t> sizes(count);
    int items = 0;
    for (int n = 0; n < count; ++n) {
        int same = 0;
        while (same < n && outputs[same].kernel.arrange != outputs[n].kernel.arrange) ++same;
        outputs[n].vectors = orders[same].in(outputs[n].kernel, vectors, batch, inputs);
        sizes[n] = std::max<int64_t>(kItemBytes / bytes_of(*outputs[n].matrix) / kSide, 1) * kSide;
        ends[n] = items += int((outputs[n].matrix->outputs + sizes[n] - 1) / sizes[n]);
    }
    share(team, items, [&](int i) {
        int n = 0;
        while (i >= ends[n]) ++n;
        const Output& output = outputs[n];
        const Matrix& matrix = *output.matrix;
        const int64_t begin = (i - (n ? ends[n - 1] : 0)) * sizes[n], end = std::min(begin + sizes[n], matrix.outputs);
        output.kernel.multiply({&matrix, output.vectors, room_of_vector(inputs), batch, output.to, matrix.outputs},
                               begin, end);
        if (matrix.bias)
            for (int b = 0; b < batch; ++b)
                for (int64_t row = begin; row < end; ++row) output.to[b * matrix.outputs + row] += matrix.bias[row];
        done(n, begin, end);
    });
}
constexpr auto kNothing = [](int, int64_t, int64_t) {};
}  // namespace
