// Attention of one decode step over selected rows of a key/value pool, read where they lie.
//
// One query token per sequence attends to the rows that lists of row ids name, one list per format (a part):
//   p[h][r] = softmax over r of scale * <query[h], key[r]>         out[h] = sum over r of p[h][r] * value[r]
//   scores[r] = mean over h of p[h][r], when asked
// The usual way, gathering those rows and multiplying, reads them, writes them and reads them again. A decode step is
// bound by memory, so the copy costs more than the arithmetic; here every selected row is read from memory once, and
// packed rows are unpacked in registers.
//
// Work is cut into items (split, block): a split is up to kSplit rows of one part of one sequence, a block is as many
// neighbouring key/value heads as fill kSlice bytes of a row. All query heads of a group share the item's one pass over
// its rows. Threads take items from a shared counter, so a thread that loses its core for a while delays the others
// little.
//
// An item makes two passes, keys then values, rather than one with an online softmax: the logits stay in a near cache
// meanwhile, no change of maximum rescales the sums, and the exponentials are taken a full vector at a time. What an
// item leaves is relative to its own maximum; merge() joins a sequence's splits by log-sum-exp, whatever their formats,
// and the exponentials, kept, become the scores by one multiplication each. Results do not depend, to the last bit, on
// the number of threads or on the other sequences of the batch: splits are counted from a sequence's own first row of
// a part, sums have a fixed order.
//
// Rows are widened to float as they are loaded, all sums are in float. The x86 build holds each item function for
// AVX-512, AVX2 and SSE.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "rows.h"

// The one entry of OpenMP in use, declared here rather than generated from a pragma: GNU's, LLVM's and Intel's runtimes
// all export it, so this library is linked with none and binds to the one that torch has loaded. A second runtime in
// the process would keep a second team of threads spinning on the same cores.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Rows of one format that the batch attends: of sequence b, those that rows[offsets[b]] ... rows[offsets[b + 1] - 1]
// name. `format` is 0 for float, 1 for bfloat16, 2 for half, 3 for int8, 4 for int4 and 5 for a coarse look at int8.
// Exact rows have strides, in elements; of packed ones an id is where a record begins, in units of 16 bytes. Ids are
// below `places`.
struct Part {
    const void *keys, *values;
    const int32_t *rows, *offsets;
    int64_t key_row, key_head, value_row, value_head, places;
    int32_t format;
};

namespace {
constexpr int kSplit = 128;  // rows of an item: enough to make its start cheap, few enough to share one sequence out
constexpr int kAhead = 8;    // rows between a prefetch and its use: 8 slices in flight cover the latency of memory

struct Step;
struct Split { int sequence, part, entry, count; const int32_t* rows; };  // `entry`: where its weights begin
struct Item { int split; Heads heads; };
struct Reader {  // how rows of a format are attended
    void (*work)(const Step&, const Item&);
    int block;               // key/value heads of an item
    int width, lanes;        // floats of a head, as vectors have them, and of a vector
    std::vector<int> order;  // where each dimension is among them; empty where all are in place
};
struct Source {  // a part, ready to be read
    Arena keys, values;
    Reader reader;
    std::vector<float> ordered;  // the query in the reader's order, or nothing
    const float* query;          // [batch, heads, width]
};

struct Step {
    int heads, kv_heads, dim;
    float scale;
    int total = 0;               // rows of all parts
    int width = 0;               // of the widest reader
    std::vector<Source> sources;
    std::vector<Split> splits;   // by sequence, then by part
    std::vector<int> first{0};   // [batch + 1]: the first split of each sequence
    std::vector<Item> items;     // in the order of the splits
    Four* products;              // [split, heads, 4]: of four rows at a time, keys with the query
    float *weights;              // [heads, total]: logits, then exponentials relative to their split's maximum
    float *peak, *mass;          // [split, heads]: the maximum, later the share of the softmax; the sum of the weights
    float *sums;                 // [split, heads, width]: the values weighted by these exponentials; null for none

    int64_t cell(int outer, int head) const { return int64_t(outer) * heads + head; }  // in [split or sequence, heads]
    float* sums_at(int split, int head) const { return sums + cell(split, head) * width; }
    float* weights_at(int head, int entry) const { return weights + int64_t(head) * total + entry; }
};

// Calls each(i, lanes) for every vector of a head; or, of a known head size, for the first of `Together` ones.
template <int Dim, int Together = 1, class Each>
INLINE inline void each_vector_of_head(const Reader& reader, Each each) {
    if constexpr (Dim) each_vector<Dim, Together>(each);
    else each_vector(reader.width, reader.lanes, each);
}

// Adds the weighted values of `Count` rows, from number `r` of the split on, to the sums of some key/value heads:
// several rows at once, so that a sum is loaded and stored once for all, and a row widened once for its group. Vectors
// that come from the same bytes are widened before any of their sums is stored: for all that the compiler knows, a
// store changes the bytes, and they would be read and taken apart once more.
template <class Format, int Dim, int Count>
INLINE inline void add_values(const Step& step, const Split& split, int r, const Item& item) {
    using Row = Row<Format, Dim>;
    const Source& source = step.sources[split.part];
    const int width = step.width, group = step.heads / step.kv_heads, total = step.total;
    Row rows[Count];
    for (int j = 0; j < Count; ++j) rows[j].open(source.values, split.rows[r + j], item.heads);
    for (int kv = item.heads.begin; kv < item.heads.end; ++kv) {
        const float* first_weights = step.weights_at(kv * group, split.entry + r);
        float* first_sums = step.sums_at(item.split, kv * group);
        each_vector_of_head<Dim, Row::together>(source.reader, [&](int i, int lanes) INLINE {
            Floats value[Count][Row::together];
#pragma GCC unroll 4
            for (int j = 0; j < Count; ++j)
#pragma GCC unroll 4
                for (int t = 0; t < Row::together; ++t) value[j][t] = rows[j].at(kv, i + t * kLanes, lanes);
            for (int head = 0; head < group; ++head) {
                const float* weights = first_weights + int64_t(head) * total;
                float* sums = first_sums + int64_t(head) * width + i;
#pragma GCC unroll 4
                for (int t = 0; t < Row::together; ++t) {
                    Floats sum = load(sums + t * kLanes, lanes);
                    for (int j = 0; j < Count; ++j) sum += value[j][t] * splat(weights[j]);
                    store(sums + t * kLanes, sum, lanes);
                }
            }
        });
    }
}

// The products of a row's keys with the query heads that they serve, four sums of each, into every fourth of `products`.
template <class Format, int Dim>
INLINE inline void multiply_key(
    const Step& step, const Source& source, int sequence, int64_t row, const Heads& heads, Four* products) {
    const int width = Dim ? Dim : source.reader.width, group = step.heads / step.kv_heads;
    Row<Format, Dim> key;
    key.open(source.keys, row, heads);
    for (int kv = heads.begin; kv < heads.end; ++kv) {
        Floats wide[Dim ? Dim / kLanes : 1];  // a known head size is whole vectors, widened once for a group
        if constexpr (Dim) each_vector<Dim>([&](int i, int n) INLINE { wide[i / kLanes] = key.at(kv, i, n); });
        const float* query = source.query + step.cell(sequence, kv * group) * width;
        for (int head = 0; head < group; ++head, query += width, products += 4) {
            Floats dot[2] = {};
            each_vector_of_head<Dim>(source.reader, [&](int i, int lanes) INLINE {
                dot[i / kLanes % 2] += load(query + i, lanes) * (Dim ? wide[i / kLanes] : key.at(kv, i, lanes));
            });
            *products = fold(dot[0] + dot[1]);
        }
    }
}

// The logits of a split's rows, four at a time: their sums are finished together, and stored in one piece.
template <class Format, int Dim>
INLINE inline void multiply_keys(const Step& step, const Split& split, const Heads& heads) {
    const Source& source = step.sources[split.part];
    const int group = step.heads / step.kv_heads, begin = heads.begin * group, count = heads.end * group - begin;
    Four* const products = step.products + step.cell(&split - step.splits.data(), begin) * 4;
    for (int r = 0; r < split.count; r += 4) {
        const int rows = std::min(4, split.count - r);
        for (int j = 0; j < rows; ++j) {
            const int ahead = (r + j + kAhead) % split.count;  // the last keys call up the first values
            const bool keys = ahead > r + j;
            if (keys || step.sums)
                Row<Format, Dim>::prefetch(keys ? source.keys : source.values, split.rows[ahead], heads);
            multiply_key<Format, Dim>(step, source, split.sequence, split.rows[r + j], heads, products + j);
        }
        for (int head = 0; head < count; ++head) {
            const Four logits = sums(products + head * 4) * step.scale;
            std::memcpy(step.weights_at(begin + head, split.entry) + r, &logits, sizeof(float) * rows);
        }
    }
}

// Turns a split's logits of one head into exponentials.
INLINE inline void exponentiate(const Step& step, int split, int head) {
    const int count = step.splits[split].count;
    float* weights = step.weights_at(head, step.splits[split].entry);
    Floats peaks = Floats{} - INFINITY, mass = {};
    each_vector(count, count, [&](int r, int lanes) INLINE {
        const Floats logits = load(weights + r, lanes, -INFINITY);
        peaks = logits > peaks ? logits : peaks;
    });
    float peak = peaks[0];
    for (int lane = 1; lane < kLanes; ++lane) peak = std::max(peak, peaks[lane]);
    each_vector(count, count, [&](int r, int lanes) INLINE {
        const Floats exponentials = exponential(load(weights + r, lanes, -INFINITY) - peak);
        store(weights + r, exponentials, lanes);
        mass += exponentials;
    });
    step.peak[step.cell(split, head)] = peak;
    step.mass[step.cell(split, head)] = sum(mass);
}

// The sums of an item's values, weighted by its exponentials.
template <class Format, int Dim> INLINE inline void sum_values(const Step& step, const Split& split, const Item& item) {
    const int group = step.heads / step.kv_heads, begin = item.heads.begin * group, end = item.heads.end * group;
    std::fill(step.sums_at(item.split, begin), step.sums_at(item.split, end), 0.0f);
    int r = 0;
    for (; r + 4 <= split.count; r += 4) {
        for (int ahead = r + kAhead; ahead < std::min(r + kAhead + 4, split.count); ++ahead)
            Row<Format, Dim>::prefetch(step.sources[split.part].values, split.rows[ahead], item.heads);
        add_values<Format, Dim, 4>(step, split, r, item);
    }
    for (; r < split.count; ++r) add_values<Format, Dim, 1>(step, split, r, item);
}

// One item. `Dim` is the head size where the compiler knows it, and unrolls by it, or 0.
template <class Format, int Dim> INLINE inline void attend(const Step& step, const Item& item) {
    const Split& split = step.splits[item.split];
    const int group = step.heads / step.kv_heads, begin = item.heads.begin * group, end = item.heads.end * group;
    multiply_keys<Format, Dim>(step, split, item.heads);
    for (int head = begin; head < end; ++head) exponentiate(step, item.split, head);
    if constexpr (!std::is_same_v<Format, Coarse>)  // values are never looked at coarsely
        if (step.sums) sum_values<Format, Dim>(step, split, item);
}

// out[sequence, head] from the partial results of the sequence's splits, unless it is null. Leaves each split's share
// of the softmax in `peak`.
void merge(const Step& step, int index, float* out) {
    const int head = index % step.heads, sequence = index / step.heads;
    const int begin = step.first[sequence], end = step.first[sequence + 1];
    float peak = -INFINITY, mass = 0;
    for (int s = begin; s < end; ++s) peak = std::max(peak, step.peak[step.cell(s, head)]);
    for (int s = begin; s < end; ++s) {
        float& share = step.peak[step.cell(s, head)];
        mass += step.mass[step.cell(s, head)] * (share = std::exp(share - peak));
    }
    for (int s = begin; s < end; ++s) step.peak[step.cell(s, head)] /= mass;
    if (!out) return;
    std::fill_n(out += int64_t(index) * step.dim, step.dim, 0.0f);
    for (int s = begin; s < end;) {  // those of a part are summed in its order, in the place of its first
        const Reader& reader = step.sources[step.splits[s].part].reader;
        float *total = step.sums_at(s, head), share = step.peak[step.cell(s, head)];
        for (int i = 0; i < reader.width; ++i) total[i] *= share;
        for (const int part = step.splits[s++].part; s < end && step.splits[s].part == part; ++s) {
            const float *sums = step.sums_at(s, head), share = step.peak[step.cell(s, head)];
            for (int i = 0; i < reader.width; ++i) total[i] += share * sums[i];
        }
        for (int i = 0; i < step.dim; ++i) out[i] += total[reader.order.empty() ? i : reader.order[i]];
    }
}

// The scores of one split's rows, once the shares are known.
void average(const Step& step, int index, float* scores) {
    const Split& split = step.splits[index];
    std::fill_n(scores += split.entry, split.count, 0.0f);
    for (int head = 0; head < step.heads; ++head) {
        const float share = step.peak[step.cell(index, head)] / step.heads;
        const float* weights = step.weights_at(head, split.entry);
        for (int r = 0; r < split.count; ++r) scores[r] += share * weights[r];
    }
}

template <class Format, int Dim> void baseline(const Step& step, const Item& item) { attend<Format, Dim>(step, item); }
#ifdef __x86_64__
template <class Format, int Dim> __attribute__((target("avx2,fma")))
void avx2(const Step& step, const Item& item) { attend<Format, Dim>(step, item); }
template <class Format, int Dim> __attribute__((target("avx512bw,avx512vl,fma")))
void avx512(const Step& step, const Item& item) { attend<Format, Dim>(step, item); }
#endif

template <class Format, int Dim> Reader reader(int dim) {
    using Row = Row<Format, Dim>;
    auto work = baseline<Format, Dim>;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        work = wide ? avx512<Format, Dim> : avx2<Format, Dim>;
    }
#endif
    return {work, std::max(1, kSlice / Row::head_bytes(dim)), Row::width(dim), Row::lanes(dim), Row::order(dim)};
}

template <class Format, int Dim> Reader unrolled(int dim) {
    return reader<Format, Row<Format, 0>::unrolls(Dim) ? Dim : 0>(dim);
}
template <class Format> Reader reader_for(int dim) {
    return dim == 64 ? unrolled<Format, 64>(dim) : dim == 80 ? unrolled<Format, 80>(dim)
         : dim == 96 ? unrolled<Format, 96>(dim) : dim == 128 ? unrolled<Format, 128>(dim)
         : dim == 256 ? unrolled<Format, 256>(dim) : reader<Format, 0>(dim);
}
Reader reader_for(int format, int dim) {
    switch (format) {
        case 0: return reader_for<float>(dim);
        case 1: return reader_for<Bfloat>(dim);
        case 2: return reader_for<Half>(dim);
        case 3: return reader_for<Int8>(dim);
        case 4: return reader_for<Int4>(dim);
        default: return reader_for<Coarse>(dim);
    }
}

// A part as the batch will read it.
Source source_of(const Step& step, const Part& part, const float* query, int batch) {
    Source source{{part.keys, part.key_row, part.key_head, step.kv_heads, step.dim},
                  {part.values, part.value_row, part.value_head, step.kv_heads, step.dim},
                  reader_for(part.format, step.dim), {}, query};
    const Reader& reader = source.reader;
    if (reader.order.empty()) return source;
    source.ordered.resize(int64_t(batch) * step.heads * reader.width);
    for (int64_t row = 0; row < int64_t(batch) * step.heads; ++row)
        for (int i = 0; i < step.dim; ++i)
            source.ordered[row * reader.width + reader.order[i]] = query[row * step.dim + i];
    source.query = source.ordered.data();
    return source;
}

// Fills in the sources, splits and items of a step. False where a row id leads outside its pool.
bool cut(Step& step, const Part* parts, int count, const float* query, int batch) {
    for (int p = 0; p < count; ++p) {
        const Part& part = parts[p];
        const auto outside = [&](int row) { return row < 0 || row >= part.places; };
        if (std::any_of(part.rows, part.rows + part.offsets[batch], outside)) return false;
        step.sources.push_back(source_of(step, part, query, batch));
        step.total += part.offsets[batch];
        step.width = std::max(step.width, step.sources.back().reader.width);
    }
    for (int b = 0; b < batch; ++b) {
        for (int p = 0, entry = 0; p < count; entry += parts[p++].offsets[batch]) {
            const Part& part = parts[p];
            for (int begin = part.offsets[b], end = part.offsets[b + 1]; begin < end; begin += kSplit)
                step.splits.push_back({b, p, entry + begin, std::min(kSplit, end - begin), part.rows + begin});
        }
        step.first.push_back(int(step.splits.size()));
    }
    for (int s = 0; s < int(step.splits.size()); ++s)
        for (int block = step.sources[step.splits[s].part].reader.block, head = 0; head < step.kv_heads; head += block)
            step.items.push_back({s, {head, std::min(head + block, step.kv_heads)}});
    return true;
}

// Calls work(0) ... work(items - 1), each once and in any order, on up to `threads` threads of the OpenMP runtime.
template <class Work> void parallel(int items, int threads, const Work& work) {
    struct Team { const Work& work; int items; std::atomic<int> next; } team{work, items, {0}};
    const auto body = [](void* data) {
        Team& team = *static_cast<Team*>(data);
        for (int item; (item = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;) team.work(item);
    };
    std::min(items, threads) > 1 ? GOMP_parallel(body, &team, threads, 0) : body(&team);
}
}  // namespace

// `offsets` of every part rise from 0. `scores`, those of all parts one after the other, may be null, and so may `out`:
// then no values are read. Returns 0, EINVAL for a row outside its pool, or ENOMEM. Scratch, in floats:
// heads * (total + splits * (d + 18)), where packed heads of an odd d / 2 count double.
extern "C" int32_t avl_core_attention(
    const float* query, const Part* parts, int32_t count, int32_t batch, int32_t heads, int32_t kv_heads, int32_t dim,
    float scale, int32_t threads, float* out, float* scores) try {
    Step step{};
    step.heads = heads, step.kv_heads = kv_heads, step.dim = dim, step.scale = scale;
    if (!cut(step, parts, count, query, batch)) return EINVAL;
    const int splits = step.first[batch];
    const int64_t weights = int64_t(heads) * step.total, cells = int64_t(heads) * splits;
    const int64_t products = cells * 4 * int64_t(sizeof(Four) / sizeof(float));
    const std::unique_ptr<float[]> scratch(new float[products + weights + cells * (out ? step.width + 2 : 2)]);
    step.products = reinterpret_cast<Four*>(scratch.get());  // first, where memory is aligned for it
    step.weights = scratch.get() + products;
    step.peak = step.weights + weights;
    step.mass = step.peak + cells;
    step.sums = out ? step.mass + cells : nullptr;

    parallel(int(step.items.size()), threads, [&](int i) {
        const Item& item = step.items[i];
        step.sources[step.splits[item.split].part].reader.work(step, item);
    });
    parallel(batch * heads, threads, [&](int i) { merge(step, i, out); });
    if (scores) parallel(splits, threads, [&](int i) { average(step, i, scores); });
    return 0;
} catch (const std::bad_alloc&) { return ENOMEM; }
