// Attention of one decode step over selected rows of a key/value pool, read where they lie.
//
// One query token per sequence attends to the rows that a list of row ids names:
//   p[h][r] = softmax over r of scale * <query[h], key[r]>         out[h] = sum over r of p[h][r] * value[r]
//   scores[r] = mean over h of p[h][r], when asked
// The usual way, gathering those rows and multiplying, reads them, writes them and reads them again. A decode step is
// bound by memory, so the copy costs more than the arithmetic; here every selected row is read from memory once.
//
// Work is cut into items (split, block): a split is up to kSplit rows of one sequence, a block is as many neighbouring
// key/value heads as fill kSlice bytes of a row. All query heads of a group share the item's one pass over its rows.
// Threads take items from a shared counter, so a thread that loses its core for a while delays the others little.
//
// An item makes two passes, keys then values, rather than one with an online softmax: the logits stay in a near cache
// meanwhile, no change of maximum rescales the sums, and the exponentials are taken a full vector at a time. What an
// item leaves is relative to its own maximum; merge() joins a sequence's splits by log-sum-exp, and the exponentials,
// kept, become the scores by one multiplication each. Results do not depend, to the last bit, on the number of threads
// or on the other sequences of the batch: splits are counted from a sequence's own first row, sums have a fixed order.
//
// Rows are widened to float as they are loaded, all sums are in float. Vectors are the GNU vector extension: a vector
// is one register in AVX-512, two in AVX2, four in SSE and NEON. The x86 build holds each item function for all three.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // it warns of how calls pass vectors, and all that take one are inlined
#define INLINE __attribute__((always_inline))

// The one entry of OpenMP in use, declared here rather than generated from a pragma: GNU's, LLVM's and Intel's runtimes
// all export it, so this library is linked with none and binds to the one that torch has loaded. A second runtime in
// the process would keep a second team of threads spinning on the same cores.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {
constexpr int kSplit = 128;  // rows of an item: enough to make its start cheap, few enough to share one sequence out
constexpr int kSlice = 512;  // bytes of a row that an item reads: eight cache lines, side by side
constexpr int kAhead = 8;    // rows between a prefetch and its use: 8 slices in flight cover the latency of memory
constexpr int kLanes = 16;   // floats of a vector

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
struct Bfloat { uint16_t bits; }; struct Half { uint16_t bits; };

template <class To> INLINE inline To read(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
template <class To, class From> INLINE inline To same_bits(const From& from) { return read<To>(&from); }
INLINE inline Words read_shorts(const void* from) { return __builtin_convertvector(read<Shorts>(from), Words); }
INLINE inline Floats load(const float* from) { return read<Floats>(from); }
INLINE inline Floats load(const Bfloat* from) { return same_bits<Floats>(read_shorts(from) << 16); }

// The exponent and mantissa of a half, moved to where a float has them, are the value times 2^-112, subnormals
// included. Infinity and NaN, the largest exponent, are completed to a float's largest.
INLINE inline Floats load(const Half* from) {
    const Words bits = read_shorts(from), magnitude = (bits & 0x7fff) << 13;
    const Words special = (Words)(magnitude >= 0x7c00u << 13) & 0x7f800000u;
    const Words scaled = same_bits<Words>(same_bits<Floats>(magnitude) * 0x1p112f);
    return same_bits<Floats>(scaled | special | ((bits & 0x8000) << 16));
}

// The first `lanes` elements, and `rest` after them.
template <class Row> INLINE inline Floats load(const Row* from, int lanes, Row rest = Row()) {
    if (lanes == kLanes) return load(from);
    Row padded[kLanes];
    std::fill(std::copy_n(from, lanes, padded), padded + kLanes, rest);
    return load(padded);
}

INLINE inline void store(float* to, const Floats& from, int lanes) { std::memcpy(to, &from, sizeof(float) * lanes); }

// Calls part(first, lanes) for every vector of `count` elements. Only the last may be short, and only there is `lanes`
// a number that the compiler does not know.
template <class Part> INLINE inline void each_vector(int count, Part part) {
    int first = 0;
    for (; first + kLanes <= count; first += kLanes) part(first, kLanes);
    if (first < count) part(first, count - first);
}

INLINE inline float sum(const Floats& lanes) {
    typedef float Eight __attribute__((vector_size(32))), Four __attribute__((vector_size(16)));
    struct Eights { Eight low, high; } const eights = same_bits<Eights>(lanes);
    struct Fours { Four low, high; } const fours = same_bits<Fours>(eights.low + eights.high);
    const Four four = fours.low + fours.high;
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0 within 2 units in the last place; below -87, e^-87, about the smallest normal float; NaN for NaN.
// x = k ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves k in the low bits of a float, where a shift makes it an
// exponent. ln 2 is taken off in two parts, the first so short that its product with k is exact.
INLINE inline Floats exponential(const Floats& argument) {
    const Floats lowest = Floats{} - 87.0f, x = argument < lowest ? lowest : argument;
    const Floats shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    const Floats high = ((r * (1.0f / 5040) + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24;
    const Floats series = ((high * r + 1.0f / 6) * r + 0.5f) * (r * r) + r + 1.0f;
    const Floats power = same_bits<Floats>(same_bits<Words>(series) + (same_bits<Words>(shifted) << 23));
    return x == x ? power : x;  // a NaN's payload would pass for an exponent
}

struct Pool {  // [row, kv head, dim]: dim is contiguous, the other strides count elements
    const void* data;
    int64_t row_stride, head_stride;
    template <class Row> INLINE inline const Row* at(int64_t row, int64_t head) const {
        return static_cast<const Row*>(data) + row * row_stride + head * head_stride;
    }
    template <class Row> INLINE inline void prefetch(int64_t row, int begin, int end, int dim) const {
        for (int head = begin; head < end; ++head)
            for (int i = 0; i < dim; i += 64 / sizeof(Row)) __builtin_prefetch(at<Row>(row, head) + i);
    }
};

struct Split { int sequence, begin, count; };  // `count` entries of the list of rows, from `begin` on
struct Step {
    const float* query;  // [batch, heads, dim]
    Pool keys, values;
    const int32_t* rows;  // [total]
    int total, heads, kv_heads, dim, block;  // block: key/value heads of an item
    float scale;
    std::vector<Split> splits;  // in the order of `rows`
    std::vector<int> first;     // [batch + 1]: the first split of each sequence
    float *weights;             // [heads, total]: logits, then exponentials relative to their split's maximum
    float *sums;                // [split, heads, dim]: the values weighted by these exponentials
    float *peak, *mass;         // [split, heads]: the maximum, later the split's share of the softmax; the weights' sum

    int blocks() const { return (kv_heads + block - 1) / block; }
    int64_t cell(int outer, int head) const { return int64_t(outer) * heads + head; }  // in [split or sequence, heads]
    float* weights_at(int head, int entry) const { return weights + int64_t(head) * total + entry; }
};

// Adds the weighted values of `Count` rows, from entry `r` of the split on, to the sums of the key/value heads [begin,
// end): several rows at once, so that a sum is loaded and stored once for all, and a row widened once for its group.
template <class Row, int Dim, int Count>
INLINE inline void add_values(const Step& step, const Split& split, int r, int begin, int end, float* sums) {
    const int dim = Dim ? Dim : step.dim, group = step.heads / step.kv_heads;
    for (int kv = begin; kv < end; ++kv) {
        const Row* row[Count];
        for (int j = 0; j < Count; ++j) row[j] = step.values.at<Row>(step.rows[split.begin + r + j], kv);
        each_vector(dim, [&](int i, int lanes) INLINE {
            Floats value[Count];
            for (int j = 0; j < Count; ++j) value[j] = load(row[j] + i, lanes);
            for (int head = kv * group; head < (kv + 1) * group; ++head) {
                const float* weights = step.weights_at(head, split.begin + r);
                float* to = sums + int64_t(head - begin * group) * dim + i;
                Floats total = load(to, lanes);
                for (int j = 0; j < Count; ++j) total += value[j] * weights[j];
                store(to, total, lanes);
            }
        });
    }
}

// One item. `Dim` is the head size where the compiler knows it, and unrolls by it, or 0.
template <class Row, int Dim> INLINE inline void attend(const Step& step, int item) {
    const int dim = Dim ? Dim : step.dim, group = step.heads / step.kv_heads, index = item / step.blocks();
    const int begin = item % step.blocks() * step.block, end = std::min(begin + step.block, step.kv_heads);
    const Split split = step.splits[index];
    const int32_t* rows = step.rows + split.begin;
    for (int r = 0; r < split.count; ++r) {
        const int ahead = (r + kAhead) % split.count;  // the last keys call up the first values
        (ahead > r ? step.keys : step.values).prefetch<Row>(rows[ahead], begin, end, dim);
        for (int kv = begin; kv < end; ++kv) {
            const Row* key = step.keys.at<Row>(rows[r], kv);
            Floats wide[Dim ? Dim / kLanes : 1];  // a known head size is whole vectors: they are widened once for a group
            if (Dim) each_vector(dim, [&](int i, int) INLINE { wide[i / kLanes] = load(key + i); });
            for (int head = kv * group; head < (kv + 1) * group; ++head) {
                const float* query = step.query + step.cell(split.sequence, head) * dim;
                Floats dot[2] = {};
                each_vector(dim, [&](int i, int n) INLINE {
                    dot[i / kLanes % 2] += load(query + i, n) * (Dim ? wide[i / kLanes] : load(key + i, n));
                });
                step.weights_at(head, split.begin)[r] = sum(dot[0] + dot[1]) * step.scale;
            }
        }
    }

    for (int head = begin * group; head < end * group; ++head) {
        float* weights = step.weights_at(head, split.begin);
        Floats peaks = Floats{} - INFINITY, mass = {};
        each_vector(split.count, [&](int r, int lanes) INLINE {
            const Floats logits = load(weights + r, lanes, -INFINITY);
            peaks = logits > peaks ? logits : peaks;
        });
        float peak = peaks[0];
        for (int lane = 1; lane < kLanes; ++lane) peak = std::max(peak, peaks[lane]);
        each_vector(split.count, [&](int r, int lanes) INLINE {
            const Floats exponentials = exponential(load(weights + r, lanes, -INFINITY) - peak);
            store(weights + r, exponentials, lanes);
            mass += exponentials;
        });
        step.peak[step.cell(index, head)] = peak;
        step.mass[step.cell(index, head)] = sum(mass);
    }

    float* sums = step.sums + step.cell(index, begin * group) * dim;
    std::fill_n(sums, int64_t(end - begin) * group * dim, 0.0f);
    int r = 0;
    for (; r + 4 <= split.count; r += 4) {
        for (int ahead = r + kAhead; ahead < std::min(r + kAhead + 4, split.count); ++ahead)
            step.values.prefetch<Row>(rows[ahead], begin, end, dim);
        add_values<Row, Dim, 4>(step, split, r, begin, end, sums);
    }
    for (; r < split.count; ++r) add_values<Row, Dim, 1>(step, split, r, begin, end, sums);
}

// out[sequence, head] from the partial results of the sequence's splits. Leaves each split's share in `peak`.
void merge(const Step& step, int item, float* out) {
    const int head = item % step.heads, begin = step.first[item / step.heads], end = step.first[item / step.heads + 1];
    float peak = -INFINITY, mass = 0;
    for (int s = begin; s < end; ++s) peak = std::max(peak, step.peak[step.cell(s, head)]);
    for (int s = begin; s < end; ++s) {
        float& share = step.peak[step.cell(s, head)];
        mass += step.mass[step.cell(s, head)] * (share = std::exp(share - peak));
    }
    std::fill_n(out += int64_t(item) * step.dim, step.dim, 0.0f);
    for (int s = begin; s < end; ++s) {
        const float share = step.peak[step.cell(s, head)] /= mass, *sums = step.sums + step.cell(s, head) * step.dim;
        for (int i = 0; i < step.dim; ++i) out[i] += share * sums[i];
    }
}

// The scores of one split's rows, once the shares are known.
void average(const Step& step, int index, float* scores) {
    const Split split = step.splits[index];
    std::fill_n(scores + split.begin, split.count, 0.0f);
    for (int head = 0; head < step.heads; ++head) {
        const float share = step.peak[step.cell(index, head)] / step.heads, *weights = step.weights_at(head, 0);
        for (int r = split.begin; r < split.begin + split.count; ++r) scores[r] += share * weights[r];
    }
}

using Item = void (*)(const Step&, int);
template <class Row, int Dim> void baseline(const Step& step, int item) { attend<Row, Dim>(step, item); }
#ifdef __x86_64__
template <class Row, int Dim> __attribute__((target("avx2,fma")))
void avx2(const Step& step, int item) { attend<Row, Dim>(step, item); }
template <class Row, int Dim> __attribute__((target("avx512bw,avx512vl,fma")))
void avx512(const Step& step, int item) { attend<Row, Dim>(step, item); }
#endif

template <class Row, int Dim> Item for_processor() {
#ifdef __x86_64__
    const bool fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fused && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return avx512<Row, Dim>;
    if (fused) return avx2<Row, Dim>;
#endif
    return baseline<Row, Dim>;
}

template <class Row> Item for_dim(int dim) {
    return dim == 64 ? for_processor<Row, 64>() : dim == 80 ? for_processor<Row, 80>()
         : dim == 96 ? for_processor<Row, 96>() : dim == 128 ? for_processor<Row, 128>()
         : dim == 256 ? for_processor<Row, 256>() : for_processor<Row, 0>();
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

// `offsets` rise from 0; `type` is 0 for float, 1 for bfloat16, 2 for half; `scores` may be null. Returns 0, EINVAL for
// a row outside the pool, or ENOMEM. Scratch: heads * (total + splits * (dim + 2)) floats.
extern "C" int32_t avl_core_attention(
    const float* query, const void* keys, const void* values, const int32_t* rows, const int32_t* offsets,
    int32_t type, int32_t batch, int32_t heads, int32_t kv_heads, int32_t dim, int32_t pool_rows,
    int64_t key_row, int64_t key_head, int64_t value_row, int64_t value_head, float scale, int32_t threads,
    float* out, float* scores) try {
    const int total = offsets[batch], block = std::max(1, kSlice / (dim * (type == 0 ? 4 : 2)));
    if (std::any_of(rows, rows + total, [=](int row) { return row < 0 || row >= pool_rows; })) return EINVAL;

    Step step{query, {keys, key_row, key_head}, {values, value_row, value_head}, rows, total, heads, kv_heads, dim,
              block, scale, {}, {0}, nullptr, nullptr, nullptr, nullptr};
    for (int sequence = 0; sequence < batch; ++sequence) {
        for (int begin = offsets[sequence], end = offsets[sequence + 1]; begin < end; begin += kSplit)
            step.splits.push_back({sequence, begin, std::min(kSplit, end - begin)});
        step.first.push_back(int(step.splits.size()));
    }
    const int splits = step.first[batch];
    const std::unique_ptr<float[]> scratch(new float[int64_t(heads) * (total + int64_t(splits) * (dim + 2))]);
    step.weights = scratch.get();
    step.sums = step.weights + int64_t(heads) * total;
    step.peak = step.sums + step.cell(splits, 0) * dim;
    step.mass = step.peak + step.cell(splits, 0);

    const auto item = type == 0 ? for_dim<float>(dim) : type == 1 ? for_dim<Bfloat>(dim) : for_dim<Half>(dim);
    parallel(splits * step.blocks(), threads, [&](int i) { item(step, i); });
    parallel(batch * heads, threads, [&](int i) { merge(step, i, out); });
    if (scores) parallel(splits, threads, [&](int i) { average(step, i, scores); });
    return 0;
} catch (const std::bad_alloc&) { return ENOMEM; }
