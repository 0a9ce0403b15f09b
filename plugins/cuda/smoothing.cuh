// New keys as their sequence stores them, and queries as they meet stored keys (avl_edge/kv/smoothing.py).

#pragma once

#include "rows.cuh"

namespace {

// Rounded to the rows' type, in which torch leaves the result of every operation.
__device__ __forceinline__ float rounded(float value) { return unpack(Row{}, pack(Row{}, value, 0)).x; }

}  // namespace

// A key becomes (key - center) / scale and a query query * scale, in place. Block (h, b): key/value head h of sequence
// b, and the query heads that share it.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_smooth(Row* __restrict__ query,            // [B, H, d]
           Row* __restrict__ new_keys,         // [B, H_kv, d]
           const int* __restrict__ smoothing,  // [B], ids of exact rows: a center in the keys, a scale in the values;
                                               // negative: none, and nothing changes
           int key_row_stride, int key_head_stride,  // in elements; multiples of 8
           int value_row_stride, int value_head_stride,
           const void* __restrict__ keys,      // Row [R, H_kv, d]
           const void* __restrict__ values) {
    const int row = smoothing[blockIdx.y], head = blockIdx.y * gridDim.x + blockIdx.x;
    if (row < 0) return;
    for (int i = threadIdx.x; i < (1 + GROUP) * kPieces; i += kThreads) {
        const int piece = i % kPieces, own_query = i / kPieces - 1;
        const bool is_key = own_query < 0;
        Row* from = is_key ? new_keys + (long long)head * HEAD_DIM
                           : query + ((long long)head * GROUP + own_query) * HEAD_DIM;
        uint4* own = reinterpret_cast<uint4*>(from) + piece;
        const Exact centers(keys, gridDim.x, blockIdx.x, piece, key_row_stride, key_head_stride);
        const Exact scales(values, gridDim.x, blockIdx.x, piece, value_row_stride, value_head_stride);
        float numbers[kPiece], center[kPiece], scale[kPiece];
        widen<Row>(*own, numbers);
        centers.widen(centers.fetch(row), center);
        scales.widen(scales.fetch(row), scale);
#pragma unroll
        for (int k = 0; k < kPiece; ++k)
            numbers[k] = is_key ? rounded(numbers[k] - center[k]) / scale[k] : numbers[k] * scale[k];
        *own = {pack(Row{}, numbers[0], numbers[1]), pack(Row{}, numbers[2], numbers[3]),
                pack(Row{}, numbers[4], numbers[5]), pack(Row{}, numbers[6], numbers[7])};
    }
}
