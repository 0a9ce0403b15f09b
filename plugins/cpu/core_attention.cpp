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
// What an item leaves is relative to its own maximum; merge() joins a sequence's splits by log-sum-exp, whatever their
// formats, and the exponentials, kept where scores are asked for, become these by one multiplication each. Results do
// not depend, to the last bit, on the number of threads or on the other sequences of the batch: splits are counted from
// a sequence's own first row of a part, sums have a fixed order.
//
// Rows are widened to float as they are loaded, all sums are in float; the query is read, and the output written, in
// their own type. The x86 build holds each item function for AVX-512, AVX2 and SSE.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "items.h"

// The one entry of OpenMP in use, declared here rather than generated from a pragma: GNU's, LLVM's and Intel's runtimes
// all export it, so this library is linked with none and binds to the one that torch has loaded. A second runtime in
// the process would keep a second team of threads spinning on the same cores.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {
// The output of one head of one sequence, [dim] in `row`, from the partial results of the sequence's splits; nothing
// where there are none. Leaves each split's share of the softmax in `peak`.
void merge(const Step& step, int index, float* row) {
    const int head = index % step.heads, sequence = index / step.heads;
    const int begin = step.first[sequence], end = step.first[sequence + 1];
    float peak = -INFINITY, mass = 0;
    for (int s = begin; s < end; ++s) peak = std::max(peak, step.peak[step.cell(s, head)]);
    for (int s = begin; s < end; ++s) {
        float& share = step.peak[step.cell(s, head)];
        mass += step.mass[step.cell(s, head)] * (share = std::exp(share - peak));
    }
    for (int s = begin; s < end; ++s) step.peak[step.cell(s, head)] /= mass;
    if (!step.sums) return;
    std::fill_n(row, step.dim, 0.0f);
    for (int s = begin; s < end;) {  // those of a part are summed in its order, in the place of its first
        const std::vector<int>& order = step.sources[step.splits[s].part].value_reader.order;
        float *total = step.sums_at(s, head), share = step.peak[step.cell(s, head)];
        for (int i = 0; i < step.dim; ++i) total[i] *= share;
        for (const int part = step.splits[s++].part; s < end && step.splits[s].part == part; ++s) {
            const float *sums = step.sums_at(s, head), share = step.peak[step.cell(s, head)];
            for (int i = 0; i < step.dim; ++i) total[i] += share * sums[i];
        }
        for (int i = 0; i < step.dim; ++i) row[i] += total[order.empty() ? i : order[i]];
    }
}

// The scores of one split's rows, once the shares are known; `weights` of all heads.
void average(const Step& step, int index, const float* weights, float* scores) {
    const Split& split = step.splits[index];
    std::fill_n(scores += split.entry, split.count, 0.0f);
    for (int head = 0; head < step.heads; ++head) {
        const float share = step.peak[step.cell(index, head)] / step.heads;
        const float* own = weights + int64_t(head) * step.total + split.entry;
        for (int r = 0; r < split.count; ++r) scores[r] += share * own[r];
    }
}

// Numbers of a query's format as floats, or floats as such numbers.
template <class From, class To> void convert(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int lanes = int(std::min<int64_t>(kLanes, count - i));
        store(to + i, load(from + i, lanes), lanes);
    }
}

void read_query(int format, const void* from, float* to, int64_t count) {
    format == 0   ? convert(static_cast<const float*>(from), to, count)
    : format == 1 ? convert(static_cast<const Bfloat*>(from), to, count)
                  : convert(static_cast<const Half*>(from), to, count);
}
void write_out(int format, const float* from, void* to, int64_t begin, int64_t count) {
    format == 0   ? convert(from, static_cast<float*>(to) + begin, count)
    : format == 1 ? convert(from, static_cast<Bfloat*>(to) + begin, count)
                  : convert(from, static_cast<Half*>(to) + begin, count);
}

// The two passes over an item's rows, for each instruction set.
template <class Format, int Dim> struct Baseline {
    static void multiply(const Step& step, const Item& item, const Weights& weights) {
        weigh<Format, Dim, 1>(step, item, weights);
    }
    static void add(const Step& step, const Item& item, const Weights& weights) {
        add_up<Format, Dim, 1>(step, item, weights);
    }
};
#ifdef __x86_64__
template <class Format, int Dim> struct Avx2 {
    __attribute__((target("avx2,fma")))
    static void multiply(const Step& step, const Item& item, const Weights& weights) {
        weigh<Format, Dim, 2>(step, item, weights);
    }
    __attribute__((target("avx2,fma")))
    static void add(const Step& step, const Item& item, const Weights& weights) {
        add_up<Format, Dim, 2>(step, item, weights);
    }
};
template <class Format, int Dim> struct Avx512 {
    __attribute__((target("avx512bw,avx512vl,fma")))
    static void multiply(const Step& step, const Item& item, const Weights& weights) {
        weigh<Format, Dim, 4>(step, item, weights);
    }
    __attribute__((target("avx512bw,avx512vl,fma")))
    static void add(const Step& step, const Item& item, const Weights& weights) {
        add_up<Format, Dim, 4>(step, item, weights);
    }
};
#endif

template <class Passes, class Format, int Dim> Reader reader_of(int dim) {
    using Row = Row<Format, Dim, false>;
    Reader made{Passes::multiply, nullptr, std::max(1, kSlice / Row::head_bytes(dim)), Row::order(dim)};
    if constexpr (!std::is_same_v<Format, Coarse>) made.add = Passes::add;  // values are never scanned
    return made;
}

template <class Format, int Dim> Reader reader(int dim) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        return wide ? reader_of<Avx512<Format, Dim>, Format, Dim>(dim) : reader_of<Avx2<Format, Dim>, Format, Dim>(dim);
    }
#endif
    return reader_of<Baseline<Format, Dim>, Format, Dim>(dim);
}

// Compiled apart for the sizes that many models have; each one costs the compiler ten seconds.
template <class Format> Reader reader_for(int dim) {
    return dim == 64 ? reader<Format, 64>(dim) : dim == 80 ? reader<Format, 80>(dim)
         : dim == 96 ? reader<Format, 96>(dim) : dim == 128 ? reader<Format, 128>(dim)
         : dim == 256 ? reader<Format, 256>(dim) : reader<Format, 0>(dim);
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

// A part as the batch will read it; its query is filled in later.
Source source_of(const Step& step, const Part& part, bool sums) {
    return {{part.keys, part.key_row, part.key_head, step.kv_heads, step.dim},
            {part.values, part.value_row, part.value_head, step.kv_heads, step.dim},
            reader_for(part.key_format, step.dim), reader_for(part.value_format, step.dim),
            sums && part.key_format == part.value_format, nullptr};
}

// 0, or EINVAL where offsets do not rise from 0 to the number of ids, or ERANGE where an id leads outside its pool.
int refusal(const Part& part, int batch) {
    bool falls = part.offsets[0] != 0 || part.offsets[batch] != part.listed, outside = false;
    for (int b = 0; b < batch; ++b) falls |= part.offsets[b] > part.offsets[b + 1];
    if (falls) return EINVAL;
    const uint32_t id_limit = uint32_t(std::min<int64_t>(part.id_limit, INT32_MAX + int64_t(1)));
    for (int64_t i = 0; i < part.listed; ++i) outside |= uint32_t(part.rows[i]) >= id_limit;
    return outside ? ERANGE : 0;
}

// Fills in the sources, splits and items of a step. 0 or why it is refused.
int cut(Step& step, const Call& call, const Part* parts) {
    for (int p = 0; p < call.parts; ++p) {
        if (const int status = refusal(parts[p], call.batch)) return status;
        step.sources.push_back(source_of(step, parts[p], call.out != nullptr));
        step.total += int(parts[p].listed);
        step.most = std::max(step.most, std::min(step.sources.back().block(), step.kv_heads) * step.group);
    }
    for (int b = 0; b < call.batch; ++b) {
        for (int p = 0, entry = 0; p < call.parts; entry += int(parts[p++].listed)) {
            const Part& part = parts[p];
            for (int begin = part.offsets[b], end = part.offsets[b + 1]; begin < end; begin += kSplit)
                step.splits.push_back({b, p, entry + begin, std::min(kSplit, end - begin), part.rows + begin});
        }
        step.first.push_back(int(step.splits.size()));
    }
    for (int s = 0; s < int(step.splits.size()); ++s)
        for (int block = step.sources[step.splits[s].part].block(), head = 0; head < step.kv_heads; head += block)
            step.items.push_back({s, {head, std::min(head + block, step.kv_heads)}});
    return 0;
}

// Calls work(i, seat) for i = 0 ... items - 1, each once and in any order.
template <class Work> void parallel(Workers& workers, int items, const Work& work) {
    workers.run(items, [](const void* data, int i, int seat) { (*static_cast<const Work*>(data))(i, seat); }, &work);
}

// Up to `seats` threads of the OpenMP runtime, each of which has a seat of its own.
struct OpenMp final : Workers {
    using Workers::Workers;
    void run(int items, Task task, const void* data) override {
        struct Team {
            Task task;
            const void* data;
            int items;
            std::atomic<int> next, taken;
        } team{task, data, items, {0}, {0}};
        const auto body = [](void* of) {
            Team& team = *static_cast<Team*>(of);
            const int seat = team.taken.fetch_add(1, std::memory_order_relaxed);
            for (int i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;)
                team.task(team.data, i, seat);
        };
        std::min(items, seats) > 1 ? GOMP_parallel(body, &team, seats, 0) : body(&team);
    }
};

// The query as floats, then in the order of each source's keys, one after the other.
void order_query(Step& step, const Call& call, float* to) {
    const int64_t rows = int64_t(call.batch) * call.heads;
    const float* const wide = to;
    read_query(call.format, call.query, to, rows * call.dim);
    to += rows * call.dim;
    for (Source& source : step.sources) {
        const std::vector<int>& order = source.key_reader.order;
        source.query = order.empty() ? wide : to;
        if (order.empty()) continue;
        for (int64_t row = 0; row < rows; ++row, to += call.dim)
            for (int i = 0; i < call.dim; ++i) to[order[i]] = wide[row * call.dim + i];
    }
}

// A step's memory, in one piece.
struct Scratch {
    int64_t query, weights, seat, cells;  // floats of the query, of weights that are kept, of a thread; splits * heads
    std::unique_ptr<float[]> floats;

    Scratch(const Step& step, const Call& call, int threads)
        : query(int64_t(call.batch) * call.heads * call.dim),
          weights(call.scores ? int64_t(call.heads) * step.total : 0),
          seat(std::max(call.scores ? 0 : step.most * kSplit, call.dim)),
          cells(step.cell(step.first[call.batch], 0)) {
        for (const Source& source : step.sources)
            query += source.key_reader.order.empty() ? 0 : int64_t(call.batch) * call.heads * call.dim;
        floats.reset(new float[query + weights + seat * threads + cells * (call.out ? step.dim + 2 : 2)]);
    }
    float* kept() const { return floats.get() + query; }  // [heads, total], where there are scores
    float* of_seat(int at) const { return kept() + weights + seat * at; }
};

void run(Step& step, const Call& call, Workers& workers) {
    const Scratch scratch(step, call, workers.seats);
    step.peak = scratch.of_seat(workers.seats);
    step.mass = step.peak + scratch.cells;
    step.sums = call.out ? step.mass + scratch.cells : nullptr;
    order_query(step, call, scratch.floats.get());
    parallel(workers, int(step.items.size()), [&](int i, int at) {
        const Item& item = step.items[i];
        const Split& split = step.splits[item.split];
        float* kept = scratch.kept() + int64_t(item.heads.begin) * step.group * step.total + split.entry;
        const Weights own = call.scores ? Weights{kept, step.total} : Weights{scratch.of_seat(at), kSplit};
        const Source& source = step.sources[split.part];
        source.key_reader.multiply(step, item, own);
        if (step.sums) source.value_reader.add(step, item, own);
    });
    parallel(workers, call.batch * call.heads, [&](int i, int at) {
        merge(step, i, scratch.of_seat(at));
        if (call.out) write_out(call.format, scratch.of_seat(at), call.out, int64_t(i) * call.dim, call.dim);
    });
    if (call.scores)
        parallel(workers, step.first[call.batch], [&](int i, int) { average(step, i, scratch.kept(), call.scores); });
}
}  // namespace

// Returns 0, EINVAL for offsets or ERANGE for row ids that do not fit. Scratch: about heads * (d + 2) floats for each
// split; for each thread the weights of an item, or those of all rows where there are scores; the query.
int32_t attend(const Call& call, const Part* parts, Workers& workers) {
    Step step{};
    step.heads = call.heads, step.kv_heads = call.kv_heads, step.dim = call.dim, step.scale = call.scale;
    step.group = call.heads / call.kv_heads;
    if (const int status = cut(step, call, parts)) return status;
    run(step, call, workers);
    return 0;
}

// The same on threads of the OpenMP runtime; ENOMEM where there is no memory.
extern "C" int32_t avl_attend(const Call* call, const Part* parts) try {
    OpenMp workers(std::max(1, call->threads));
    return attend(*call, parts, workers);
} catch (const std::bad_alloc&) { return ENOMEM; }
