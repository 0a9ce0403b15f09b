// The attention that a prompt's tokens received from a few of its queries: for the policies that rank them by it.

#pragma once

#include "merge.cuh"

namespace {

constexpr int kLogitsBlocks = 5;  // as kMergeBlocks

}  // namespace

// Logits of a prompt's keys for some of its queries. The warps of all blocks (h, ...) share the keys of head h, a tile
// at a time; a tile stays in registers while all queries pass, so that keys are read from memory once.
extern "C" __global__ void __launch_bounds__(kThreads, kLogitsBlocks)
avl_prompt_logits(const Row* __restrict__ query,    // element (token, head, i) at token * query_token_stride + ...
                  const Row* __restrict__ keys,     // likewise; so [n, H, d] and [H, n, d] both do
                  const int* __restrict__ positions,  // [queries]: tokens in [0, n); one given twice counts twice
                  int n, int queries,
                  int query_token_stride, int query_head_stride,
                  int key_token_stride, int key_head_stride,
                  float* __restrict__ logits) {     // [queries, H, n], in units of log 2
    const int kv_head = blockIdx.x, heads = gridDim.x * GROUP;
    const int piece = lane_index() % kLanes;
    const Exact own(keys, 0, kv_head, piece, key_token_stride, key_head_stride);
    for (int tile = (blockIdx.y * WARPS + warp_index()) * kTile; tile < n; tile += gridDim.y * WARPS * kTile) {
        uint4 bits[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = entry(tile, u);
            bits[u] = token < n && piece < kPieces ? own.fetch(token) : uint4{0, 0, 0, 0};
        }
        float key[UNROLL][kPiece];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) own.widen(bits[u], key[u]);

        for (int q = 0; q < queries; ++q) {
            const int position = positions[q];
            const Row* token = query + (long long)position * query_token_stride;
#pragma unroll 1  // several heads at once would take more registers than they save time
            for (int head = 0; head < GROUP; ++head) {
                float wide[kPiece];
                load_query<Exact>(token + (long long)(kv_head * GROUP + head) * query_head_stride, piece, wide);
                float* to = logits + ((long long)q * heads + kv_head * GROUP + head) * n;
                float products[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) products[u] = sum_over_row(dot(wide, key[u]));
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    const int column = entry(tile, u);
                    if (piece == 0 && column < n) to[column] = column <= position ? products[u] : kLowest;
                }
            }
        }
    }
}

// One warp: one query and head.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_prompt_log_sums(const float* __restrict__ logits,  // [queries * H, n], as avl_prompt_logits left it
                    int n, int softmaxes,              // queries * H
                    float* __restrict__ log_sums) {    // [queries * H]
    const int index = blockIdx.x * WARPS + warp_index();
    if (index >= softmaxes) return;
    const float sum = log_sum(logits + (long long)index * n, n);
    if (lane_index() == 0) log_sums[index] = sum;
}

// The attention that the prompt's tokens received, averaged over heads: from the last query of the list alone, and
// summed over its first `summed` queries. A list whose logits would not fit the workspace is given in pieces: `total`
// is added to, so the caller zeroes it before the first piece; `last` is written by each, and the last piece's stays.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_prompt_scores(const float* __restrict__ logits,    // [queries, H, n], as avl_prompt_logits left it
                  const float* __restrict__ log_sums,  // [queries, H]
                  int n, int heads, int queries, int summed,
                  float* __restrict__ last,            // [n]
                  float* __restrict__ total) {         // [n]
    __shared__ float parts[WARPS][32];
    const int column = blockIdx.x * 32 + lane_index();
    const float of_summed = sum_column(logits, n, log_sums, 0, summed * heads, column, column < n, parts);
    const float of_last =
        sum_column(logits, n, log_sums, (queries - 1) * heads, queries * heads, column, column < n, parts);
    if (column >= n || warp_index() != 0) return;
    total[column] += of_summed / heads;
    last[column] = of_last / heads;
}
