// A decoder of the LLaMA family, and what a decode step of it takes and gives. avl_edge/attention/decoder.py packs these
// structures.

#pragma once

#include "products.h"
#include "step.h"

struct Layer {
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;      // [dim], of each head, or null
    Matrix query, key, value, out, gate, up, down;
};

// Weights and the pool's rows, all of which stay where they are as long as the decoder is open. `embedding` is dense.
// `type` is that of exact rows: 0 for float, 1 for bfloat16, 2 for half. `keys` and `values` are `pool_bytes` each, and
// a row of them [kv_heads, dim]; values lie right behind keys. `norm` is the last one's weights, [hidden].
struct Decoder {
    const Layer* layers;
    const float* norm;
    Matrix embedding, head;
    void *keys, *values;
    int64_t pool_bytes;
    int32_t count, hidden, heads, kv_heads, dim, type, threads;
    float epsilon, scale;
};

// One token of each of `batch` sequences. Of every layer, row by row of the tables: `slots` [count, batch], where the
// new key and value go, in the format of `written` [batch]; `smoothing` [count, batch], the exact row by which a
// sequence smooths its keys, or -1; `rows` [count, capacity], the ids of all rows that are attended, format by format
// and in each sequence by sequence, the new one among them; list l of them, the sequence's b = l % batch in format
// l / batch, begins at `offsets` [count, kFormats * batch + 1]. `cosines` and `sines` [batch, dim] are RoPE's.
// Out: `logits` [batch, vocabulary]; `scores` [count, capacity], each row's share of attention, or null.
enum RowFormat { kExact, kInt8, kInt8Int4, kInt4, kFormats };
struct DecodeStep {
    const int32_t *tokens, *slots, *written, *smoothing, *rows, *offsets;
    const float *cosines, *sines;
    float *scores, *logits;
    int64_t capacity;
    int32_t batch;
};
