// Attention of one decode step over selected rows of a key/value pool, read where they lie.
//
// One query token per sequence attends to the rows that a list of row ids names. The usual way, gathering those rows
// and multiplying, reads them, writes them and reads them again; a decode step is bound by memory, so the copy costs
// more than the arithmetic. Here every selected row is read from memory exactly once.
//
//   p[h][r]   = softmax over r of scale * <query[h], key[r]>
//   out[h]    = sum over r of p[h][r] * value[r]
//   scores[r] = mean over h of p[h][r]                                  (when asked)
//
// Work is cut into items (split, block): a split is up to kSplit rows of one sequence, a block is as many neighbouring
// key/value heads as fill kSlice bytes of a row. All query heads of a group share the item's one pass over its rows.
// Threads take items from a shared counter, so that a thread that loses its core for a while delays the others little.
//
// An item makes two passes, keys then values, rather than one with an online softmax: the logits of a split stay in the
// first-level cache between the passes, no change of maximum ever rescales the sums, and the exponentials are taken a
// full vector at a time. What an item leaves is relative to its own maximum; merge() joins a sequence's partial results
// by log-sum-exp, and the exponentials kept from the first pass become the scores by one multiplication each.
//
// Results do not depend, to the last bit, on the number of threads or on the other sequences of the batch: splits are
// counted from each sequence's own first row, and every sum has a fixed order.
//
// Rows are widened to float as they are loaded and everything is accumulated in float. Vectors are the GNU vector
// extension, which GCC and Clang lower to what the enclosing function may use: the x86 build holds every item function
// three times (AVX-512, AVX2, baseline) and picks by processor; a vector is one, two or four registers there, four in NEON.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // how a call would pass a vector matters not: all that take one are inlined
#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

// The one entry of the OpenMP runtime in use, declared here instead of generated from a pragma: GNU's, LLVM's and Intel's
// runtimes all export it, so this library is linked with none and binds to the one that torch has loaded. A second
// runtime in the process would keep a second team of threads spinning on the same cores.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {

constexpr int kSplit = 128;  // rows of an item: enough to make its start cheap, few enough to share one sequence out
constexpr int kSlice = 512;  // bytes of a row that an item reads: eight cache lines, side by side
constexpr int kAhead = 8;    // rows between a prefetch and its use: 8 slices in flight cover the latency of memory
constexpr int kLanes = 16;   // floats of a vector

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

template <class To, class From> INLINE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Words load_words(const void* from) {
    Shorts shorts;
    std::memcpy(&shorts, from, sizeof shorts);
    return __builtin_convertvector(shorts, Words);
}

INLINE Floats load(const float* from) {
    Floats floats;
    std::memcpy(&floats, from, sizeof floats);
    return floats;
}

INLINE Floats load(const Bfloat* from) { return same_bits<Floats>(load_words(from) << 16); }

// The exponent and mantissa of a half, moved to where a float has them, are the value times 2^-112, subnormals included.
// Infinity and NaN, the largest exponent, are completed to a float's largest.
INLINE Floats load(const Half* from) {
    const Words bits = load_words(from), magnitude = (bits & 0x7fff) << 13;
    const Words special = (Words)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    const Words scaled = same_bits<Words>(same_bits<Floats>(magnitude) * 0x1p112f);
    return same_bits<Floats>(scaled | special | ((bits & 0x8000) << 16));
}

// The first `count` elements, zeros after them. A whole vector takes the plain path.
template <class Row> INLINE Floats load(const Row* from, int count) {
    if (count == kLanes) return load(from);
    Row padded[kLanes] = {};
    std::memcpy(padded, from, sizeof(Row) * count);
    return load(padded);
}

INLINE void store(float* to, const Floats& from, int count = kLanes) { std::memcpy(to, &from, sizeof(float) * count); }

INLINE float sum(const Floats& lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    struct Eights { Eight low, high; };
    struct Fours { Four low, high; };
    const Eights eights = same_bits<Eights>(lanes);
    const Fours fours = same_bits<Fours>(eights.low + eights.high);
    const Four four = fours.low + fours.high;
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0 within 2 units in the last place; e^-87, about the smallest normal float, below that; NaN for NaN.
// x = k ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves k in the low bits of a float, where a shift makes it an
// exponent. ln 2 is taken off in two parts, the first so short that its product with k is exact.
INLINE Floats exponential(const Floats& argument) {
    const Floats lowest = Floats{} - 87.0f, x = argument < lowest ? lowest : argument;
    const Floats shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * (r * r) + r + 1.0f;
    return same_bits<Floats>(same_bits<Words>(series) + (same_bits<Words>(shifted) << 23));
}

struct Pool {  // [row, kv head, dim]: dim is contiguous, the other strides count elements
    const void* data;
    int64_t row_stride, head_stride;
    template <class Row> INLINE const Row* at(int64_t row, int64_t head) const {
        return static_cast<const Row*>(data) + row * row_stride + head * head_stride;
    }
};

struct Split { int sequence, begin, count; };  // `count` entries of the list of rows, from `begin` on

struct Step {
    const float* query;            // [batch, heads, dim]
    Pool keys, values;
    const int32_t *rows, *offsets;  // [total], [batch + 1]
    int total, heads, kv_heads, dim, block;  // block: key/value heads of an item
    float scale;
    std::vector<Split> splits;     // in the order of `rows`
    std::vector<int> first;        // [batch + 1]: the first split of each sequence
    float *weights;                // [heads, total]: logits, then exponentials relative to the split's maximum
    float *sums;                   // [split, heads, dim]: values weighted by these exponentials
    float *peak, *mass;            // [split, heads]: the maximum, then the split's share of the softmax; their sum

    int group() const { return heads / kv_heads; }
    int blocks() const { return (kv_heads + block - 1) / block; }
    float* weights_at(int head, int entry) const { return weights + int64_t(head) * total + entry; }
    int64_t state(int split, int head) const { return int64_t(split) * heads + head; }
};

template <class Row> INLINE void prefetch(const Row* slice, int elements) {
    const char* bytes = reinterpret_cast<const char*>(slice);
    for (int at = 0; at < elements * int(sizeof(Row)); at += 64) __builtin_prefetch(bytes + at);
}

// Calls part(first, lanes) for every vector of `dim` elements, the last one shorter where dim is not a multiple. Only that
// one sees a number of lanes which the compiler does not know.
template <class Part> INLINE void each_vector(int dim, Part part) {
    int first = 0;
    for (; first + kLanes <= dim; first += kLanes) part(first, kLanes);
    if (first < dim) part(first, dim - first);
}

// Adds `Count` weighted rows of values, from entry `r` of the split on, to the sums: several at once, so that each sum is
// loaded and stored once for all of them, and a group of query heads widens a row once.
template <class Row, int Dim, int Count>
INLINE void add_values(const Step& step, const Split& split, int r, int head_begin, int head_end, float* sums) {
    const int dim = Dim ? Dim : step.dim, group = step.group();
    for (int kv = head_begin; kv < head_end; ++kv) {
        const Row* row[Count];
        for (int j = 0; j < Count; ++j) row[j] = step.values.at<Row>(step.rows[split.begin + r + j], kv);
        each_vector(dim, [&](int i, int lanes) INLINE_LAMBDA {
            Floats value[Count];
            for (int j = 0; j < Count; ++j) value[j] = load(row[j] + i, lanes);
            for (int head = kv * group; head < (kv + 1) * group; ++head) {
                const float* weights = step.weights_at(head, split.begin + r);
                float* to = sums + int64_t(head - head_begin * group) * dim + i;
                Floats total = load(to, lanes);
                for (int j = 0; j < Count; ++j) total += value[j] * weights[j];
                store(to, total, lanes);
            }
        });
    }
}

// One item. `Dim` is the head size where the compiler knows it, and unrolls by it, or 0.
template <class Row, int Dim> INLINE void attend(const Step& step, int item) {
    const int dim = Dim ? Dim : step.dim, group = step.group(), index = item / step.blocks();
    const int begin = item % step.blocks() * step.block, end = std::min(begin + step.block, step.kv_heads);
    const int slice = (end - begin) * dim;
    const Split split = step.splits[index];
    const int32_t* rows = step.rows + split.begin;

    for (int r = 0; r < split.count; ++r) {
        const int ahead = r + kAhead;  // the last keys call up the first values
        if (ahead < split.count) prefetch(step.keys.at<Row>(rows[ahead], begin), slice);
        else if (ahead < 2 * split.count) prefetch(step.values.at<Row>(rows[ahead - split.count], begin), slice);
        for (int kv = begin; kv < end; ++kv) {
            const Row* key = step.keys.at<Row>(rows[r], kv);
            for (int head = kv * group; head < (kv + 1) * group; ++head) {
                const float* query = step.query + step.state(split.sequence, head) * dim;
                Floats product = {};
                each_vector(dim, [&](int i, int lanes) INLINE_LAMBDA {
                    product += load(query + i, lanes) * load(key + i, lanes);
                });
                step.weights_at(head, split.begin)[r] = sum(product) * step.scale;
            }
        }
    }

    for (int head = begin * group; head < end * group; ++head) {
        float *weights = step.weights_at(head, split.begin), peak = -std::numeric_limits<float>::infinity();
        for (int r = 0; r < split.count; ++r) peak = std::max(peak, weights[r]);
        Floats mass = {};
        each_vector(split.count, [&](int r, int lanes) INLINE_LAMBDA {
            store(weights + r, exponential(load(weights + r, lanes) - peak), lanes);
            mass += load(weights + r, lanes);
        });
        step.peak[step.state(index, head)] = peak;
        step.mass[step.state(index, head)] = sum(mass);
    }

    float* sums = step.sums + step.state(index, begin * group) * dim;
    std::fill_n(sums, int64_t(end - begin) * group * dim, 0.0f);
    int r = 0;
    for (; r + 4 <= split.count; r += 4) {
        for (int ahead = r + kAhead; ahead < std::min(r + kAhead + 4, split.count); ++ahead)
            prefetch(step.values.at<Row>(rows[ahead], begin), slice);
        add_values<Row, Dim, 4>(step, split, r, begin, end, sums);
    }
    for (; r < split.count; ++r) add_values<Row, Dim, 1>(step, split, r, begin, end, sums);
}

// out[sequence, head] from the partial results of the sequence's splits; leaves each split's share in `peak`.
void merge(const Step& step, int item, float* out) {
    const int sequence = item / step.heads, head = item % step.heads;
    const int begin = step.first[sequence], end = step.first[sequence + 1];
    float peak = -std::numeric_limits<float>::infinity(), mass = 0;
    for (int s = begin; s < end; ++s) peak = std::max(peak, step.peak[step.state(s, head)]);
    for (int s = begin; s < end; ++s) {
        float& share = step.peak[step.state(s, head)];
        share = std::exp(share - peak);
        mass += share * step.mass[step.state(s, head)];
    }
    out += int64_t(item) * step.dim;
    std::fill_n(out, step.dim, 0.0f);
    for (int s = begin; s < end; ++s) {
        const float share = step.peak[step.state(s, head)] /= mass;
        const float* sums = step.sums + step.state(s, head) * step.dim;
        for (int i = 0; i < step.dim; ++i) out[i] += share * sums[i];
    }
}

// scores of the rows of one split, once the shares are known.
void average(const Step& step, int index, float* scores) {
    const Split split = step.splits[index];
    scores += split.begin;
    std::fill_n(scores, split.count, 0.0f);
    for (int head = 0; head < step.heads; ++head) {
        const float share = step.peak[step.state(index, head)] / step.heads;
        const float* weights = step.weights_at(head, split.begin);
        for (int r = 0; r < split.count; ++r) scores[r] += share * weights[r];
    }
}

using Item = void (*)(const Step&, int);

template <class Row, int Dim> void baseline(const Step& step, int item) { attend<Row, Dim>(step, item); }
#if defined(__x86_64__)
template <class Row, int Dim> __attribute__((target("avx2,fma")))
void avx2(const Step& step, int item) { attend<Row, Dim>(step, item); }
template <class Row, int Dim> __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
void avx512(const Step& step, int item) { attend<Row, Dim>(step, item); }
#endif

template <class Row, int Dim> Item for_processor() {
#if defined(__x86_64__)
    const bool avx2_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return avx512<Row, Dim>;
    if (avx2_fma) return avx2<Row, Dim>;
#endif
    return baseline<Row, Dim>;
}

template <class Row> Item for_dim(int dim) {
    switch (dim) {
        case 64: return for_processor<Row, 64>();
        case 80: return for_processor<Row, 80>();
        case 96: return for_processor<Row, 96>();
        case 128: return for_processor<Row, 128>();
        case 256: return for_processor<Row, 256>();
        default: return for_processor<Row, 0>();
    }
}

// Calls work(0) ... work(items - 1), each once, in any order, on up to `threads` threads of the OpenMP runtime.
template <class Work> void parallel(int items, int threads, Work work) {
    struct Team { Work& work; int items; std::atomic<int> next; } team{work, items, {0}};
    const auto body = [](void* data) {
        Team& team = *static_cast<Team*>(data);
        for (int item; (item = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;) team.work(item);
    };
    if (std::min(items, threads) > 1) GOMP_parallel(body, &team, threads, 0);
    else body(&team);
}

}  // namespace

// type: 0 float, 1 bfloat16, 2 half. Offsets must rise from 0. Returns 0, EINVAL for a row outside the pool, or ENOMEM.
extern "C" int32_t avl_core_attention(
    const float* query, const void* keys, const void* values, const int32_t* rows, const int32_t* offsets,
    int32_t type, int32_t batch, int32_t heads, int32_t kv_heads, int32_t dim, int32_t pool_rows,
    int64_t key_row, int64_t key_head, int64_t value_row, int64_t value_head, float scale, int32_t threads,
    float* out, float* scores) try {
    const int total = offsets[batch];
    for (int i = 0; i < total; ++i)
        if (uint32_t(rows[i]) >= uint32_t(pool_rows)) return EINVAL;

    const int block = std::max(1, kSlice / (dim * (type == 0 ? 4 : 2)));
    Step step{query, {keys, key_row, key_head}, {values, value_row, value_head}, rows, offsets,
              total, heads, kv_heads, dim, block, scale, {}, {0}, nullptr, nullptr, nullptr, nullptr};
    for (int sequence = 0; sequence < batch; ++sequence) {
        for (int begin = offsets[sequence], end = offsets[sequence + 1]; begin < end; begin += kSplit)
            step.splits.push_back({sequence, begin, std::min(kSplit, end - begin)});
        step.first.push_back(int(step.splits.size()));
    }
    const int splits = int(step.splits.size());
    const std::unique_ptr<float[]> scratch(new float[int64_t(heads) * (total + int64_t(splits) * (dim + 2))]);
    step.weights = scratch.get();
    step.sums = step.weights + int64_t(heads) * total;
    step.peak = step.sums + step.state(splits, 0) * dim;
    step.mass = step.peak + step.state(splits, 0);

    const Item item = type == 0 ? for_dim<float>(dim) : type == 1 ? for_dim<Bfloat>(dim) : for_dim<Half>(dim);
    parallel(splits * step.blocks(), threads, [&](int i) { item(step, i); });
    parallel(batch * heads, threads, [&](int i) { merge(step, i, out); });
    if (scores) parallel(splits, threads, [&](int i) { average(step, i, scores); });
    return 0;
} catch (const std::bad_alloc&) {
    return ENOMEM;
}
