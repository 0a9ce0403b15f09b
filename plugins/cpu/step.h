// What a call asks for, and how a step is cut into work.

#pragma once

#include <vector>

#include "rows.h"

// One token of each of `batch` sequences attends to the rows of `parts` parts. `query` and `out` are contiguous,
// [batch, heads, dim], in `format`: 0 for float, 1 for bfloat16, 2 for half. `scores` are those of all parts' rows, one
// part after the other. `out` may be null, and then no values are read; so may `scores`.
struct Call {
    const void* query;
    void* out;
    float* scores;
    int32_t parts, batch, heads, kv_heads, dim, format, threads;
    float scale;
};

// Rows of one format that the batch attends: of sequence b, those that rows[offsets[b]] ... rows[offsets[b + 1] - 1]
// name. A format is a query's, or 3 for int8, 4 for int4 and 5 for a coarse scan of int8. Exact rows have strides, in
// elements; of packed ones an id is where a record begins, in units of 16 bytes. There are `listed` ids, each below
// `id_limit`.
struct Part {
    const void *keys, *values;
    const int32_t *rows, *offsets;
    int64_t key_row, key_head, value_row, value_head, id_limit, listed;
    int32_t key_format, value_format;
};

// Threads that share out work. `run` calls task(data, i, seat) for i = 0 ... items - 1, each once and in any order, on
// up to `seats` threads, each of which has a seat of its own, below `seats`; it returns when all is done.
struct Workers {
    using Task = void (*)(const void* data, int i, int seat);
    const int seats;

    explicit Workers(int seats) : seats(seats) {}
    virtual void run(int items, Task task, const void* data) = 0;

  protected:
    ~Workers() = default;
};

// The call on other threads than its own; `threads` of it counts for nothing. Throws std::bad_alloc.
int32_t attend(const Call& call, const Part* parts, Workers& workers);

namespace {
constexpr int kSplit = 128;  // rows of an item: enough to make its start cheap, few enough to share one sequence out

struct Step;
struct Split { int sequence, part, entry, count; const int32_t* rows; };  // `entry`: where its weights begin
struct Item { int split; Heads heads; };
struct Weights {  // of an item: logits, then exponentials relative to their split's maximum
    float* first;
    int64_t stride;

    float* of(int head) const { return first + head * stride; }  // counted from the item's first query head
};
struct Reader {  // how keys or values of a format are attended
    void (*multiply)(const Step&, const Item&, const Weights&);  // keys: an item's logits, and their exponentials
    void (*add)(const Step&, const Item&, const Weights&);       // values: the sums of an item
    int block;               // key/value heads of an item, at most
    std::vector<int> order;  // where each dimension is among them; empty where all are in place
};
struct Source {  // a part, ready to be read
    Arena keys, values;
    Reader key_reader, value_reader;
    bool alike;          // whether values will be read, in the format of the keys: then these call up the first of them
    const float* query;  // [batch, heads, dim], in the order of the keys

    int block() const { return std::min(key_reader.block, value_reader.block); }  // key/value heads of an item
};

struct Step {
    int heads, kv_heads, dim, group;  // group: query heads of a key/value head
    float scale;
    int total = 0;               // rows of all parts
    int most = 0;                // query heads of the largest item
    std::vector<Source> sources;
    std::vector<Split> splits;   // by sequence, then by part
    std::vector<int> first{0};   // [batch + 1]: the first split of each sequence
    std::vector<Item> items;     // in the order of the splits
    float *peak, *mass;          // [split, heads]: the maximum, later the share of the softmax; the sum of the weights
    float *sums;                 // [split, heads, dim]: the values weighted by these exponentials; null for none

    int64_t cell(int outer, int head) const { return int64_t(outer) * heads + head; }  // in [split or sequence, heads]
    float* sums_at(int split, int head) const { return sums + cell(split, head) * dim; }
};
}  // namespace
