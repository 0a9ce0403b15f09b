// What the checks share: random rows, launches, plain loops in double, and how far results may be from these. For what
// has included a driver.

#pragma once

#include <algorithm>
#include <cstdio>
#include <random>

namespace {

std::mt19937 generator(1);

float widened(Row row) { return unpack(Row{}, row.bits).x; }

struct Grid { unsigned x, y, z; };

template <class... Arguments> void run(const char* kernel, Grid grid, Arguments... arguments) {
    void* addresses[] = {&arguments...};
    if (avl_launch(kernel, grid.x, grid.y, grid.z, false, addresses)) std::abort();
}

std::vector<Row> random_rows(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<Row> rows(count);
    for (Row& row : rows) row.bits = (unsigned short)pack(Row{}, normal(generator), 0);
    return rows;
}

std::vector<float> unwritten(size_t count) { return std::vector<float>(count, NAN); }

// Softmax weights of one query over keys, whose elements `key` gives.
template <class Key> std::vector<double> softmax(const Row* query, int count, Key key) {
    std::vector<double> weights(count);
    double peak = -1e300, mass = 0;
    for (int r = 0; r < count; ++r) {
        double product = 0;
        for (int i = 0; i < HEAD_DIM; ++i) product += double(widened(query[i])) * key(r, i);
        peak = max(peak, weights[r] = product / std::sqrt(double(HEAD_DIM)));
    }
    for (double& weight : weights) mass += weight = std::exp(weight - peak);
    for (double& weight : weights) weight /= mass;
    return weights;
}

bool close(const char* name, const std::vector<double>& expected, const std::vector<float>& found, double bound) {
    double scale = 0, error = 0;
    for (double value : expected) scale = max(scale, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::fabs(found[i] - expected[i]) / scale;
        if (!(difference <= error)) error = difference;  // NaN included
    }
    std::printf("%s %.1e\n", name, error);
    return error <= bound;
}

}  // namespace
