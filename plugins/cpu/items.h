// One item of work: the keys of a split's rows, for a block of heads, then the values of the same.
//
// Two passes, rather than one with an online softmax: the logits stay in a near cache meanwhile, no change of maximum
// rescales the sums, and the exponentials are taken a full vector at a time.
//
// Both read kRows rows side by side and up to `Block` query heads of a group: what is loaded of a query, a row or a sum
// serves all. `Block` is what the registers of an instruction set hold; it changes no result, since every product
// and every sum adds up by itself and in the same order.

#pragma once

#include "step.h"

namespace {
constexpr int kOneRegister = 4;  // the Block of an instruction set whose registers hold a whole vector
constexpr int kAhead = 8;  // rows between a prefetch and its use: 8 slices in flight cover the latency of memory

// Calls each(i, lanes, size) for every `size` vectors of a head, up to `Together`, from place i on.
template <int Dim, int Together, bool Unrolled, class Each>
INLINE inline void each_vectors_of_head(int dim, Each each) {
    if constexpr (Dim)
        each_vectors<Dim / kLanes, Together, Unrolled>([&](int i, auto size) INLINE { each(i, kLanes, size); });
    else each_vector(dim, [&](int i, int lanes) INLINE { each(i, lanes, Constant<1>()); });
}

// Calls each(head, size) for the query heads of a group, `Most` at a time, then half as many, down to one.
template <int Most, class Each> INLINE inline void each_heads(int group, Each each, int head = 0) {
    for (; head + Most <= group; head += Most) each(head, Constant<Most>());
    if constexpr (Most > 1) each_heads<Most / 2>(group, each, head);
}

// The products of kRows keys with `Queries` query heads that they serve.
template <int Block, int Queries, class Row> INLINE inline void multiply(
    const Row* keys, int kv, int dim, const float* query, Four* products) {
    constexpr int Dim = Row::known, Together = std::min(Block, Row::abreast);
    constexpr bool unrolled = Block != kOneRegister;
    const int width = Dim ? Dim : dim;
    Four parts[Queries][kRows];
#pragma GCC unroll 1
    for (int j = 0; j < kRows; j += Together) {
        Floats dot[Queries][Together] = {};
        each_vectors_of_head<Dim, Row::together, unrolled>(width, [&](int i, int lanes, auto vectors) INLINE {
            constexpr int count = vectors;
            UNROLL for (int v = 0; v < count; ++v) {
                Floats key[Together];
                UNROLL for (int t = 0; t < Together; ++t) key[t] = keys[j + t].at(kv, i, v, lanes);
                UNROLL for (int q = 0; q < Queries; ++q) {
                    const Floats wide = load(query + q * width + i + v * kLanes, lanes);
                    UNROLL for (int t = 0; t < Together; ++t) dot[q][t] += wide * key[t];
                }
            }
        });
        UNROLL for (int q = 0; q < Queries; ++q)
            UNROLL for (int t = 0; t < Together; ++t) parts[q][j + t] = fold(dot[q][t]);
    }
    UNROLL for (int q = 0; q < Queries; ++q) products[q] = sums(parts[q]);
}

// The logits of an item's rows. Beyond the last row stands that row once more, and its products go nowhere.
template <class Row, int Block> INLINE inline void multiply_keys(
    const Step& step, const Split& split, const Heads& heads, const Weights& logits) {
    constexpr int Dim = Row::known;
    const Source& source = step.sources[split.part];
    const int width = Dim ? Dim : step.dim;
    const float* query = source.query + step.cell(split.sequence, heads.begin * step.group) * width;
    const float scale = step.scale;
    for (int r = 0; r < split.count; r += kRows) {
        const int rows = std::min(kRows, split.count - r);
        Row keys[kRows];
        for (int j = 0; j < kRows; ++j) keys[j].open(source.keys, split.rows[r + std::min(j, rows - 1)], heads);
        for (int kv = heads.begin; kv < heads.end; ++kv) {
            const Heads one{kv, kv + 1};
            for (int ahead = r + kAhead; ahead < r + kAhead + rows; ++ahead) {
                const int value = ahead - split.count;  // the last keys call up the first values
                if (value < 0) Row::prefetch(source.keys, split.rows[ahead], one);
                else if (source.alike && value < split.count) Row::prefetch(source.values, split.rows[value], one);
            }
            each_heads<Block>(step.group, [&](int head, auto size) INLINE {
                Four products[size];
                const int first = (kv - heads.begin) * step.group + head;
                multiply<Block, size>(keys, kv, width, query + first * width, products);
                for (int q = 0; q < size; ++q) {
                    const Four scaled = products[q] * scale;
                    float* to = logits.of(first + q) + r;
                    if (rows == kRows) std::memcpy(to, &scaled, sizeof scaled);
                    else for (int j = 0; j < rows; ++j) to[j] = scaled[j];
                }
            });
        }
    }
}

// Turns the logits of one head into exponentials.
INLINE inline void exponentiate(float* weights, int count, float& highest, float& total) {
    Floats peaks = Floats{} - INFINITY, mass = {};
    each_vector(count, [&](int r, int lanes) INLINE {
        const Floats logits = load(weights + r, lanes, -INFINITY);
        peaks = logits > peaks ? logits : peaks;
    });
    float peak = peaks[0];
    for (int lane = 1; lane < kLanes; ++lane) peak = std::max(peak, peaks[lane]);
    each_vector(count, [&](int r, int lanes) INLINE {
        const Floats exponentials = exponential(load(weights + r, lanes, -INFINITY) - peak);
        store(weights + r, exponentials, lanes);
        mass += exponentials;
    });
    highest = peak;
    total = sum(mass);
}

// Adds the values of `Count` rows, from place i of their head on, to the sums of `Queries` query heads, each weighted
// by weights[head * stride + row]. Where a register holds a vector, all sums stay in registers while rows go by; else
// the values do, and sums go by.
template <int Count, int Block, int Queries, int Vectors, class Row> INLINE inline void add(
    const Row* values, int kv, int i, int lanes, const float* weights, int64_t stride, float* sums, int width) {
    if constexpr (Block == kOneRegister) {
        Floats sum[Queries][Vectors];
        UNROLL for (int q = 0; q < Queries; ++q)
            UNROLL for (int v = 0; v < Vectors; ++v) sum[q][v] = load(sums + q * width + i + v * kLanes, lanes);
#pragma GCC unroll 1
        for (int j = 0; j < Count; ++j) {
            Floats value[Vectors];
            UNROLL for (int v = 0; v < Vectors; ++v) value[v] = values[j].at(kv, i, v, lanes);
            UNROLL for (int q = 0; q < Queries; ++q) {
                const Floats weight = splat(weights[q * stride + j]);
                UNROLL for (int v = 0; v < Vectors; ++v) sum[q][v] += value[v] * weight;
            }
        }
        UNROLL for (int q = 0; q < Queries; ++q)
            UNROLL for (int v = 0; v < Vectors; ++v) store(sums + q * width + i + v * kLanes, sum[q][v], lanes);
    } else {
        Floats value[Count][Vectors];
        UNROLL for (int j = 0; j < Count; ++j)
            UNROLL for (int v = 0; v < Vectors; ++v) value[j][v] = values[j].at(kv, i, v, lanes);
        UNROLL for (int q = 0; q < Queries; ++q)
            UNROLL for (int v = 0; v < Vectors; ++v) {
                float* const at = sums + q * width + i + v * kLanes;
                Floats sum = load(at, lanes);
                UNROLL for (int j = 0; j < Count; ++j) sum += value[j][v] * splat(weights[q * stride + j]);
                store(at, sum, lanes);
            }
    }
}

// The same for `Count` rows from row r on, all places of the heads of an item.
template <int Count, int Block, class Row> INLINE inline void add_rows(
    const Step& step, const Split& split, const Item& item, const Weights& weights, int r) {
    const Source& source = step.sources[split.part];
    float* const sums = step.sums_at(item.split, item.heads.begin * step.group);
    Row values[Count];
    for (int j = 0; j < Count; ++j) values[j].open(source.values, split.rows[r + j], item.heads);
    for (int kv = item.heads.begin; kv < item.heads.end; ++kv) {
        for (int ahead = r + kAhead; ahead < std::min(r + kAhead + Count, split.count); ++ahead)
            Row::prefetch(source.values, split.rows[ahead], {kv, kv + 1});
        each_heads<Block>(step.group, [&](int head, auto queries) INLINE {
            const int first = (kv - item.heads.begin) * step.group + head;
            const float* own = weights.of(first) + r;
            float* into = sums + int64_t(first) * step.dim;
            each_vectors_of_head<Row::known, std::max(Block, Row::together), false>(
                step.dim, [&](int i, int lanes, auto vectors) INLINE {
                    add<Count, Block, queries, vectors>(values, kv, i, lanes, own, weights.stride, into, step.dim);
                });
        });
    }
}

// The sums of an item's values, weighted by its exponentials.
template <class Row, int Block> INLINE inline void sum_values(
    const Step& step, const Split& split, const Item& item, const Weights& weights) {
    const int begin = item.heads.begin * step.group, end = item.heads.end * step.group;
    std::fill(step.sums_at(item.split, begin), step.sums_at(item.split, end), 0.0f);
    const Source& source = step.sources[split.part];
    for (int ahead = 0; !source.alike && ahead < std::min(kAhead, split.count); ++ahead)
        Row::prefetch(source.values, split.rows[ahead], item.heads);
    int r = 0;
    for (; r + Row::summed <= split.count; r += Row::summed)
        add_rows<Row::summed, Block, Row>(step, split, item, weights, r);
    for (; r < split.count; ++r) add_rows<1, Block, Row>(step, split, item, weights, r);
}

// An item's keys.
template <class Format, int Dim, int Block>
INLINE inline void weigh(const Step& step, const Item& item, const Weights& weights) {
    const Split& split = step.splits[item.split];
    const int begin = item.heads.begin * step.group, heads = item.heads.end * step.group - begin;
    multiply_keys<Row<Format, Dim, Block == kOneRegister>, Block>(step, split, item.heads, weights);
    for (int head = 0; head < heads; ++head) {
        const int64_t cell = step.cell(item.split, begin + head);
        exponentiate(weights.of(head), split.count, step.peak[cell], step.mass[cell]);
    }
}

// Its values, once its keys were read.
template <class Format, int Dim, int Block>
INLINE inline void add_up(const Step& step, const Item& item, const Weights& weights) {
    sum_values<Row<Format, Dim, Block == kOneRegister>, Block>(step, step.splits[item.split], item, weights);
}
}  // namespace
