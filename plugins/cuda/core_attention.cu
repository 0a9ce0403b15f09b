// Attention of one decode step over selected rows of a key/value pool, read where they lie, on a GPU.
//
// One query token per sequence attends to the rows that lists of row ids name; nothing is gathered or unpacked first,
// and every selected row is read from memory exactly once. With r over the rows of a sequence and h over its query
// heads:
//
//   p[h][r]   = softmax over r of <query[h], key[r]> / sqrt(d)
//   out[h]    = sum over r of p[h][r] * value[r]
//   scores[r] = mean over h of p[h][r]                                  (when asked)
//
// Rows of several formats share one softmax. Each format has these kernels, compiled with -DKEYS and -DVALUES, and its
// own avl_attend reads what the batch selects of it, a *part*: partial results of all parts and their splits stand side by
// side in one workspace, and one avl_merge joins them. Parts come one after the other in one list of ids: sequence b
// reads of part p the rows begins[p * B + b] to ends[p * B + b] - 1 of it. The avl_attend of low-rank parts is another
// kernel, in low_rank.cu.
//
// The kernels, in the order in which a layer launches them. Grids are (x, y, z); a block has 32 * WARPS threads and
// no dynamic shared memory. B sequences, P parts, H query and H_kv key/value heads, H = GROUP * H_kv, S >= 1 splits of
// a part, and `capacity` >= the ends of all selections.
//
//   avl_smooth             (H_kv, B)                  new keys and queries, where a sequence smooths its keys
//   avl_append             (rows, 2)                  writes new rows into their slots; per format
//
//   avl_scan               (H_kv, any, B)             logits by a coarse scan of keys alone; per format
//   avl_log_sums           (ceil(H / WARPS), B, P)    of those, and then avl_scores
//   avl_nucleus            (B, P)                     of the rows scanned, those to attend: ids and where they end
//
//   avl_attend             (H_kv, S, B)               partial results of each split; the logits when asked; per format
//   avl_merge              (ceil(H / WARPS), B)       out, by log-sum-exp over the splits of all parts
//   avl_scores             (any, B, P)                scores, from the logits; on refresh steps only
//
//   avl_prompt_logits      (H_kv, any)                a prompt's logits for a few of its queries
//   avl_prompt_log_sums    (ceil(queries * H / WARPS))
//   avl_prompt_scores      (ceil(n / 32))             the attention that the prompt's tokens received from them
//
// A CUDA graph captures a step once and replays it: grids and S are fixed, the numbers of rows are read from device
// memory, a block that finds no work returns, and nothing is allocated. S is a constant of the launcher: enough for
// H_kv * S * B to be two to four times the blocks that the GPU holds at once, but no more than leaves each warp of a
// split a tile of kTile rows. Results do not depend on the order of blocks: all sums have a fixed order, there are no
// atomics, and the splits of a sequence depend on its own row counts and S alone.
//
// Logits are in units of log 2 from the start: the query is multiplied by log2(e) / sqrt(d) once, and exponentials are
// single instructions. (A model with another factor than 1 / sqrt(d) scales its query projection.)
//
// Compiled by NVRTC or nvcc, for compute capability 8.0 and later, once per shape and format: -DHEAD_DIM= a multiple of
// 8 up to 256, -DGROUP= 1 to 8 query heads per key/value head, -DROW=Half or -DROW=Bfloat, -DKEYS= and -DVALUES=Exact,
// Int8 or Int4. It includes only files beside it. plugins/emulation compiles the same text as C++ and runs it on a CPU, where
// the tests compare its numbers with float64 and look for races. None of it has run on a GPU yet: still to be tried on
// one are the few lines of PTX in device.cuh, which the emulation replaces, and the speed, hence the choices of WARPS,
// STAGES, UNROLL and S.

#ifndef KEYS
#define KEYS Exact
#endif
#ifndef VALUES
#define VALUES KEYS
#endif

#include "append.cuh"
#include "merge.cuh"
#include "nucleus.cuh"
#include "pipeline.cuh"
#include "prompt_scores.cuh"
#include "smoothing.cuh"

namespace {

using Keys = Reading<KEYS>::Whole;
using Values = Reading<VALUES>::Whole;
using Coarse = Reading<KEYS>::Coarse;

constexpr int kScanBlocks = 2;  // as kMergeBlocks

static_assert(sizeof(Scratch<Keys, Values>) * WARPS <= 48 * 1024, "static shared memory ends at 48 KB");

}  // namespace

// Writes new rows into the pool. Block (i, 0) writes the keys of new row i into row slots[i] of the pool, block (i, 1)
// its values. A negative slot drops the row: so a sequence that rests, or whose new row is of another format, keeps its
// place in the batch, and a prompt's rows are written by the same call, whichever of them a policy keeps. No two slots
// are the same.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_append(const Row* __restrict__ new_keys,    // [rows, H_kv, d], contiguous, as all that names no stride
           const Row* __restrict__ new_values,  // [rows, H_kv, d]
           const int* __restrict__ slots,       // [rows], ids of this format
           int kv_heads,
           int key_row_stride, int key_head_stride,  // of exact rows, in elements; multiples of 8, as all strides
           int value_row_stride, int value_head_stride,
           void* __restrict__ keys,             // Exact: Row [R, H_kv, d], 16-byte aligned, as all pointers; packed:
           void* __restrict__ values) {         // the bytes in which rows are records, values as ids count them too
    const int slot = slots[blockIdx.x];
    if (slot < 0) return;
    const long long from = (long long)blockIdx.x * kv_heads * HEAD_DIM;
    if (blockIdx.y == 0)
        Writer<KEYS>::write(new_keys + from, kv_heads, keys, slot, key_row_stride, key_head_stride);
    else
        Writer<VALUES>::write(new_values + from, kv_heads, values, slot, value_row_stride, value_head_stride);
}

// One block: one split of one sequence's rows, for one key/value head and the query heads that share it.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_attend(const Row* __restrict__ query,       // [B, H, d]
           const void* __restrict__ keys,       // as avl_append has them
           const void* __restrict__ values,
           const int* __restrict__ rows,        // [capacity], ids; a row may serve several sequences
           const int* __restrict__ begins,      // [B], of this part
           const int* __restrict__ ends,        // [B]
           int key_row_stride, int key_head_stride,
           int value_row_stride, int value_head_stride,
           int capacity,
           int first_split, int all_splits,     // of this part, and of all parts together
           float* __restrict__ sums,            // [B, all_splits, H, d]: values, weighted relative to the split's peak
           State* __restrict__ states,          // [B, all_splits, H]
           float* __restrict__ logits) {        // [H, capacity], in units of log 2; null when no scores are asked for
    const int kv_head = blockIdx.x, split = blockIdx.y, sequence = blockIdx.z, heads = gridDim.x * GROUP;
    const int total = ends[sequence] - begins[sequence];
    const int per_split = rows_per_split(total, gridDim.y);
    if (split * per_split >= total) return;  // avl_merge will not look here
    const int begin = begins[sequence] + split * per_split;
    const int count = min(per_split, total - split * per_split);
    const int lane = lane_index(), warp = warp_index(), piece = lane % kLanes;

    __shared__ Scratch<Keys, Values> scratch[WARPS];
    const int own = min(piece, kPieces - 1);  // lanes past a row's end copy nothing, from inside of it
    const Keys key_reader(keys, gridDim.x, kv_head, own, key_row_stride, key_head_stride);
    const Values value_reader(values, gridDim.x, kv_head, own, value_row_stride, value_head_stride);
    Pipeline<Keys, Values> pipeline(scratch[warp], key_reader, value_reader, rows + begin, count);

    float queries[GROUP][kPiece];
#pragma unroll
    for (int head = 0; head < GROUP; ++head)
        load_query<Keys>(query + ((long long)sequence * heads + kv_head * GROUP + head) * HEAD_DIM, piece,
                         queries[head]);

    Softmax softmax;
    int stage = 0;
    for (int tile = warp * kTile; tile < count; tile += WARPS * kTile) {
        pipeline.fetch(stage == 0 ? STAGES - 1 : stage - 1);
        wait_copies<STAGES - 1>();

        float products[UNROLL][GROUP];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float key[kPiece];
            key_reader.widen(Keys::take(scratch[warp].ring[stage].keys[u]), key);
#pragma unroll
            for (int head = 0; head < GROUP; ++head) products[u][head] = dot(queries[head], key);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int head = 0; head < GROUP; ++head) products[u][head] = sum_over_row(products[u][head]);

        const int here = ceil_div(count - entry(tile, 0), kRowsAtOnce);  // loads that brought this lane a row
        if (logits && piece == 0) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
#pragma unroll
                for (int head = 0; head < GROUP; ++head)
                    if (u < here)
                        logits[(long long)(kv_head * GROUP + head) * capacity + begin + entry(tile, u)] =
                            products[u][head];
        }
        softmax.add(products, here, value_reader, scratch[warp].ring[stage].values);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    softmax.join();
    __syncwarp();  // the other lanes have read their part of the ring, which the result now takes
    if (lane < kPieces) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head)
#pragma unroll
            for (int i = 0; i < kPiece; ++i)
                scratch[warp].part.sums[head][Values::dimension(lane, i)] = softmax.sums[head][i];
    }
    if (lane == 0) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head) scratch[warp].part.states[head] = softmax.states[head];
    }
    __syncthreads();

    const long long result = ((long long)sequence * all_splits + first_split + split) * heads + kv_head * GROUP;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kThreads) {
        const int head = i / HEAD_DIM;
        float peak = kLowest, mass = 0, sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, scratch[w].part.states[head].peak);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float share = exp2_approx(scratch[w].part.states[head].peak - peak);
            mass += share * scratch[w].part.states[head].mass;
            sum += share * scratch[w].part.sums[head][i % HEAD_DIM];
        }
        sums[result * HEAD_DIM + i] = sum;
        if (i % HEAD_DIM == 0) states[result + head] = {peak, mass};
    }
}

// Logits of keys that are only scanned: of int8 keys the upper nibbles, of others all. The warps of blocks (h, ..., b)
// share the listed rows of sequence b, a tile at a time, from one key/value head.
extern "C" __global__ void __launch_bounds__(kThreads, kScanBlocks)
avl_scan(const Row* __restrict__ query,   // [B, H, d]
         const void* __restrict__ keys,   // as avl_append has them
         const int* __restrict__ rows,    // [capacity], ids
         const int* __restrict__ begins,  // [B], of this part
         const int* __restrict__ ends,    // [B]
         int row_stride, int head_stride,
         int capacity,
         float* __restrict__ logits) {    // [H, capacity], in units of log 2
    const int kv_head = blockIdx.x, sequence = blockIdx.z, heads = gridDim.x * GROUP;
    const int begin = begins[sequence], count = ends[sequence] - begin;
    const int piece = lane_index() % kLanes;
    if (int(blockIdx.y * WARPS + warp_index()) * kTile >= count) return;
    const Coarse reader(keys, gridDim.x, kv_head, min(piece, kPieces - 1), row_stride, head_stride);
    float queries[GROUP][kPiece];
#pragma unroll
    for (int head = 0; head < GROUP; ++head)
        load_query<Coarse>(query + ((long long)sequence * heads + kv_head * GROUP + head) * HEAD_DIM, piece,
                           queries[head]);

    for (int tile = (blockIdx.y * WARPS + warp_index()) * kTile; tile < count; tile += gridDim.y * WARPS * kTile) {
        Coarse::Bits bits[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) bits[u] = reader.fetch(rows[begin + min(entry(tile, u), count - 1)]);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float key[kPiece];
            reader.widen(bits[u], key);
            const int row = entry(tile, u);
#pragma unroll
            for (int head = 0; head < GROUP; ++head) {
                const float logit = sum_over_row(piece < kPieces ? dot(queries[head], key) : 0);
                if (piece == 0 && row < count)
                    logits[(long long)(kv_head * GROUP + head) * capacity + begin + row] = logit;
            }
        }
    }
}
