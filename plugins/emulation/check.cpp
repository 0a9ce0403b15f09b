// A small case of every kernel against plain loops in double, as a program of its own, for rows of one format: built
// with -fsanitize=thread or -fsanitize=address, it finds races and accesses outside of buffers. Each buffer is an
// allocation of exactly its size.
// Prints the largest error of each result, in terms of its largest value; returns 1 if one is too large.

#include <numeric>

#include "driver.cpp"

#include "check.h"

namespace {

constexpr int kKvHeads = 2, kHeads = kKvHeads * GROUP, kRow = kKvHeads * HEAD_DIM;
constexpr bool kExact = std::is_same_v<KEYS, Exact>, kInt8 = std::is_same_v<KEYS, Int8>;
constexpr int kGroupOf = kExact || kInt8 ? HEAD_DIM : std::gcd(HEAD_DIM, 32), kScales = kKvHeads * HEAD_DIM / kGroupOf;

constexpr int whole_units(int bytes) { return (bytes + 15) / 16 * 16; }
constexpr int kPlane = whole_units(kRow / 2), kRecord = whole_units(2 * kScales) + (kInt8 ? 2 : 1) * kPlane;
constexpr int kRowBytes = kExact ? kRow * int(sizeof(Row)) : kRecord;  // of one pool row; its id is in units or rows

// An element of a pool row; `coarse`: as a scan sees it.
double element(const std::vector<unsigned char>& pool, int row, int head, int i, bool coarse = false) {
    const unsigned char* bytes = &pool[size_t(row) * kRowBytes];
    if (kExact) {
        Row value;
        std::memcpy(&value, bytes + (head * HEAD_DIM + i) * sizeof(Row), sizeof(Row));
        return widened(value);
    }
    unsigned short scale;
    std::memcpy(&scale, bytes + 2 * ((head * HEAD_DIM + i) / kGroupOf), 2);
    const unsigned char* plane = bytes + whole_units(2 * kScales) + head * HEAD_DIM / 2 + i % (HEAD_DIM / 2);
    const auto nibble = [&](int number) { return plane[number * kPlane] >> (i / (HEAD_DIM / 2) * 4) & 15; };
    const int number = !kInt8 ? nibble(0) - 8 : nibble(0) * 16 + (coarse ? 8 : nibble(1)) - 128;
    return double(number) * unpack(Half{}, scale).x;
}

struct Selection {
    std::vector<int> offsets = {0, 0, 1, 2 * kTile * WARPS * STAGES + 2}, rows;
    int batch = int(offsets.size()) - 1, capacity = offsets.back(), pool = capacity / 2 + 3;
    std::vector<unsigned char> keys, values;
    std::vector<Row> query = random_rows(batch * kHeads * HEAD_DIM);

    // A pool whose rows were all appended, and random ids of them.
    Selection() : keys(size_t(pool) * kRowBytes), values(size_t(pool) * kRowBytes) {
        const std::vector<Row> new_keys = random_rows((pool + 1) * kRow), new_values = random_rows((pool + 1) * kRow);
        std::vector<int> slots(pool + 1, -1);
        for (int row = 0; row < pool; ++row) slots[row] = id(pool - 1 - row);
        run("avl_append", {unsigned(pool + 1), 2, 1}, new_keys.data(), new_values.data(), slots.data(), kKvHeads, kRow,
            HEAD_DIM, kRow, HEAD_DIM, keys.data(), values.data());
        for (int i = 0; i < capacity; ++i) rows.push_back(id(int(generator() % pool)));
    }
    static int id(int row) { return kExact ? row : row * (kRecord / 16); }
    static int row_of(int id) { return kExact ? id : id / (kRecord / 16); }

    std::vector<double> weights(int sequence, int head, bool coarse) const {
        return softmax(&query[(sequence * kHeads + head) * HEAD_DIM], offsets[sequence + 1] - offsets[sequence],
                       [&](int r, int i) {
                           return element(keys, row_of(rows[offsets[sequence] + r]), head / GROUP, i, coarse);
                       });
    }
};

bool decode() {
    const Selection own;
    const int splits = 2, batch = own.batch, capacity = own.capacity;
    std::vector<float> sums = unwritten(batch * splits * kHeads * HEAD_DIM), logits = unwritten(kHeads * capacity);
    std::vector<float> states = unwritten(batch * splits * kHeads * 2), log_sums = unwritten(batch * kHeads);
    std::vector<float> scores = unwritten(capacity), wide_out;
    std::vector<Row> out(batch * kHeads * HEAD_DIM);
    const int *begins = own.offsets.data(), *ends = begins + 1;
    run("avl_attend", {kKvHeads, unsigned(splits), unsigned(batch)}, own.query.data(), own.keys.data(),
        own.values.data(), own.rows.data(), begins, ends, kRow, HEAD_DIM, kRow, HEAD_DIM, capacity, 0, splits,
        sums.data(), states.data(), logits.data());
    run("avl_merge", {(kHeads + WARPS - 1) / WARPS, unsigned(batch), 1}, sums.data(), states.data(), begins, ends,
        kHeads, splits, 1, out.data(), log_sums.data());
    run("avl_scores", {2, unsigned(batch), 1}, logits.data(), log_sums.data(), begins, ends, kHeads, capacity,
        scores.data());

    std::vector<double> expected(out.size()), expected_scores(capacity);
    for (int b = 0; b < batch; ++b)
        for (int h = 0; h < kHeads; ++h) {
            const std::vector<double> weights = own.weights(b, h, false);
            for (int r = 0; r < int(weights.size()); ++r) {
                const int row = Selection::row_of(own.rows[own.offsets[b] + r]);
                expected_scores[own.offsets[b] + r] += weights[r] / kHeads;
                for (int i = 0; i < HEAD_DIM; ++i)
                    expected[(b * kHeads + h) * HEAD_DIM + i] += weights[r] * element(own.values, row, h / GROUP, i);
            }
        }
    for (Row row : out) wide_out.push_back(widened(row));
    const bool good = close("out", expected, wide_out, 4e-3);
    return close("scores", expected_scores, scores, 1e-4) && good;
}

// New keys and queries of three sequences, of which the second smooths its keys.
bool smoothing() {
    const int batch = 3;
    std::vector<Row> query = random_rows(batch * kHeads * HEAD_DIM), keys = random_rows(batch * kRow);
    const std::vector<Row> old_query = query, old_keys = keys, centers = random_rows(2 * kRow);
    std::vector<Row> scales = random_rows(2 * kRow);
    for (Row& scale : scales) scale.bits = (unsigned short)pack(Row{}, 0.5f + std::fabs(widened(scale)), 0);
    const std::vector<int> rows = {-1, 1, -1};
    run("avl_smooth", {kKvHeads, unsigned(batch), 1}, query.data(), keys.data(), rows.data(), kRow, HEAD_DIM, kRow,
        HEAD_DIM, centers.data(), scales.data());
    std::vector<double> expected;
    std::vector<float> found;
    for (int i = 0; i < batch * kRow; ++i) {
        const double center = widened(centers[kRow + i % kRow]), scale = widened(scales[kRow + i % kRow]);
        expected.push_back(i / kRow == 1 ? (widened(old_keys[i]) - center) / scale : widened(old_keys[i]));
        found.push_back(widened(keys[i]));
    }
    for (int i = 0; i < batch * kHeads * HEAD_DIM; ++i) {
        const int sequence = i / (kHeads * HEAD_DIM), head = i / HEAD_DIM % kHeads / GROUP;
        const double scale = sequence == 1 ? widened(scales[kRow + head * HEAD_DIM + i % HEAD_DIM]) : 1;
        expected.push_back(widened(old_query[i]) * scale);
        found.push_back(widened(query[i]));
    }
    return close("smoothed", expected, found, 4e-3);
}

bool choice() {
    const Selection own;
    const int batch = own.batch, capacity = own.capacity, most = 5;
    std::vector<float> logits = unwritten(kHeads * capacity), log_sums = unwritten(batch * kHeads);
    std::vector<float> weights = unwritten(capacity);
    const int *begins = own.offsets.data(), *ends = begins + 1;
    run("avl_scan", {kKvHeads, 2, unsigned(batch)}, own.query.data(), own.keys.data(), own.rows.data(), begins, ends,
        kRow, HEAD_DIM, capacity, logits.data());
    run("avl_log_sums", {(kHeads + WARPS - 1) / WARPS, unsigned(batch), 1}, logits.data(), begins, ends, kHeads,
        capacity, log_sums.data());
    run("avl_scores", {2, unsigned(batch), 1}, logits.data(), log_sums.data(), begins, ends, kHeads, capacity,
        weights.data());
    std::vector<int> limits, listed, rows(batch * most), attended(batch);
    std::vector<signed char> picked(capacity);
    for (int b = 0; b < batch; ++b) {
        limits.insert(limits.end(), {1 << 30, most});
        listed.push_back(b * most);
    }
    run("avl_nucleus", {unsigned(batch), 1, 1}, weights.data(), own.rows.data(), begins, ends, limits.data(),
        listed.data(), rows.data(), attended.data(), picked.data());

    std::vector<double> expected(capacity);
    bool good = true;
    for (int b = 0; b < batch; ++b) {
        for (int h = 0; h < kHeads; ++h) {
            const std::vector<double> of_head = own.weights(b, h, true);
            for (int r = 0; r < int(of_head.size()); ++r) expected[own.offsets[b] + r] += of_head[r] / kHeads;
        }
        std::vector<float> sorted(weights.begin() + begins[b], weights.begin() + ends[b]);
        std::sort(sorted.rbegin(), sorted.rend());
        const int count = min(most, int(sorted.size()));
        good &= attended[b] == b * most + count;
        for (int r = begins[b]; r < ends[b]; ++r) good &= picked[r] == (weights[r] >= sorted[count - 1]);
    }
    if (!good) std::printf("other rows were picked\n");
    return close("weights", expected, weights, 1e-4) && good;
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
            const std::vector<double> weights = softmax(one, positions[q] + 1, [&](int r, int i) {
                return widened(keys[(r * kKvHeads + h / GROUP) * HEAD_DIM + i]);
            });
            std::vector<double>& expected = q < summed ? expected_total : expected_last;
            for (int r = 0; r <= positions[q]; ++r) expected[r] += weights[r] / kHeads;
        }
    const bool good = close("last", expected_last, last, 1e-4);
    return close("total", expected_total, total, 1e-4) && good;
}

}  // namespace

int main() {
    const bool good = decode() & choice() & smoothing();
    return prompt() && good ? 0 : 1;
}
