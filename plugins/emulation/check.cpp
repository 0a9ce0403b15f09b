// A small case of every kernel against plain loops in double, as a program of its own: built with -fsanitize=thread or
// -fsanitize=address, it finds races and accesses outside of buffers. Each buffer is an allocation of exactly its size.
// Prints the largest error of each result, in terms of its largest value; returns 1 if one is too large.

#include <cstdio>
#include <random>

#include "driver.cpp"

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

// Softmax weights of one query over keys, whose rows `key` gives.
template <class Key> std::vector<double> softmax(const Row* query, int count, Key key) {
    std::vector<double> weights(count);
    double peak = -1e300, mass = 0;
    for (int r = 0; r < count; ++r) {
        double product = 0;
        for (int i = 0; i < HEAD_DIM; ++i) product += double(widened(query[i])) * widened(key(r)[i]);
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

constexpr int kKvHeads = 2, kHeads = kKvHeads * GROUP;

bool decode() {
    const std::vector<int> offsets = {0, 0, 1, 2 * kTile * WARPS * STAGES + 2};
    const int batch = int(offsets.size()) - 1, splits = 2, capacity = offsets.back(), pool = capacity + 3;
    const int row_stride = kKvHeads * HEAD_DIM, head_stride = HEAD_DIM;
    std::vector<Row> keys = random_rows(pool * row_stride), values = random_rows(pool * row_stride);
    const std::vector<Row> new_keys = random_rows(2 * row_stride), new_values = random_rows(2 * row_stride);
    const std::vector<Row> query = random_rows(batch * kHeads * HEAD_DIM);
    const std::vector<int> slots = {pool - 1, -1};
    std::vector<int> rows(capacity);
    for (int& row : rows) row = int(generator() % pool);
    rows.back() = pool - 1;

    run("avl_append", {2, 2, 1}, new_keys.data(), new_values.data(), slots.data(), kKvHeads, row_stride, head_stride,
        row_stride, head_stride, keys.data(), values.data());
    bool good = !std::memcmp(&keys[(pool - 1) * row_stride], new_keys.data(), row_stride * sizeof(Row)) &&
                !std::memcmp(&values[(pool - 1) * row_stride], new_values.data(), row_stride * sizeof(Row));

    std::vector<float> sums = unwritten(batch * splits * kHeads * HEAD_DIM), logits = unwritten(kHeads * capacity);
    std::vector<float> states = unwritten(batch * splits * kHeads * 2), log_sums = unwritten(batch * kHeads);
    std::vector<float> scores = unwritten(capacity), wide_out;
    std::vector<Row> out(batch * kHeads * HEAD_DIM);
    run("avl_attend", {kKvHeads, unsigned(splits), unsigned(batch)}, query.data(), keys.data(), values.data(),
        rows.data(), offsets.data(), row_stride, head_stride, row_stride, head_stride, capacity, sums.data(),
        states.data(), logits.data());
    run("avl_merge", {(kHeads + WARPS - 1) / WARPS, unsigned(batch), 1}, sums.data(), states.data(), offsets.data(),
        kHeads, splits, out.data(), log_sums.data());
    run("avl_scores", {2, unsigned(batch), 1}, logits.data(), log_sums.data(), offsets.data(), kHeads, capacity,
        scores.data());

    std::vector<double> expected(out.size()), expected_scores(capacity);
    for (int b = 0; b < batch; ++b)
        for (int h = 0; h < kHeads; ++h) {
            const auto at = [&](const std::vector<Row>& pool_rows, int r) {
                return &pool_rows[rows[offsets[b] + r] * row_stride + h / GROUP * head_stride];
            };
            const int count = offsets[b + 1] - offsets[b], head = (b * kHeads + h) * HEAD_DIM;
            const std::vector<double> weights = softmax(&query[head], count, [&](int r) { return at(keys, r); });
            for (int r = 0; r < count; ++r) {
                expected_scores[offsets[b] + r] += weights[r] / kHeads;
                for (int i = 0; i < HEAD_DIM; ++i) expected[head + i] += weights[r] * widened(at(values, r)[i]);
            }
        }
    for (Row row : out) wide_out.push_back(widened(row));
    good &= close("out", expected, wide_out, 4e-3);
    return close("scores", expected_scores, scores, 1e-4) && good;
}

bool prompt() {
    const std::vector<int> positions = {5, 5, 2 * kTile * WARPS + 6};
    const int n = positions.back() + 1, queries = int(positions.size()), summed = queries - 1;
    const std::vector<Row> query = random_rows(n * kHeads * HEAD_DIM), keys = random_rows(n * kKvHeads * HEAD_DIM);
    std::vector<float> logits = unwritten(queries * kHeads * n), log_sums = unwritten(queries * kHeads);
    std::vector<float> last = unwritten(n), total(n, 0.0f);
    run("avl_prompt_logits", {kKvHeads, 2, 1}, query.data(), keys.data(), positions.data(), n, queries,
        kHeads * HEAD_DIM, HEAD_DIM, kKvHeads * HEAD_DIM, HEAD_DIM, logits.data());
    run("avl_prompt_log_sums", {unsigned(queries * kHeads + WARPS - 1) / WARPS, 1, 1}, logits.data(), n,
        queries * kHeads, log_sums.data());
    run("avl_prompt_scores", {unsigned(n + 31) / 32, 1, 1}, logits.data(), log_sums.data(), n, kHeads, queries, summed,
        last.data(), total.data());

    std::vector<double> expected_last(n), expected_total(n);
    for (int q = 0; q < queries; ++q)
        for (int h = 0; h < kHeads; ++h) {
            const Row* one = &query[(positions[q] * kHeads + h) * HEAD_DIM];
            const std::vector<double> weights = softmax(one, positions[q] + 1, [&](int r) {
                return &keys[(r * kKvHeads + h / GROUP) * HEAD_DIM];
            });
            std::vector<double>& expected = q < summed ? expected_total : expected_last;
            for (int r = 0; r <= positions[q]; ++r) expected[r] += weights[r] / kHeads;
        }
    const bool good = close("last", expected_last, last, 1e-4);
    return close("total", expected_total, total, 1e-4) && good;
}

}  // namespace

int main() {
    const bool good = decode();
    return prompt() && good ? 0 : 1;
}
