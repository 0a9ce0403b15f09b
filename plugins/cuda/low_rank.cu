// Attention of one decode step over low-rank rows of one format: a part of the step that core_attention.cu describes.
//
// A row is coefficients of its key and of its value, each over a basis that its sequence has in the layer: exact rows
// of the same pool (avl_edge/attention/lowrank.py). With c_k and c_v the coefficients of row n, and k and v the bases:
//
//   key[n]   = RoPE(sum over r of c_k[n][r] * k[r], position[n])
//   value[n] = sum over r of c_v[n][r] * v[r]
//
// Where a sequence smooths its keys, (key[n] - center) / scale stands for key[n] (smoothing.cuh).
//
// Keys are rebuilt, a few at a time, in registers: RoPE stands between them and a query that would be turned into the
// basis once. Values are not: their coefficients are summed by weight, and the sums taken over the basis.
//
//   avl_attend_low_rank    (H_kv, S, B)               partial results of each split, as avl_attend leaves them
//
// So a block goes over its rows twice: for their logits, which it leaves in the workspace, and, once it knows their
// peak, for the coefficients of their values. Ranks are numbers of a launch. Sizes, splits and the order of sums are as
// in core_attention.cu, and it is compiled as that is, once for all low-rank formats, without -DKEYS.

#include "pipeline.cuh"

namespace {

constexpr int kRows = 8;                        // whose keys a lane rebuilds at once
constexpr int kWarpRows = kRowsAtOnce * kRows;  // of a warp
constexpr int kStaged = 1024 / kWarpRows;       // coefficients of each, in 4 KB of shared memory
constexpr int kMixed = 64;                      // coefficients of values that are summed at once, two by each lane
constexpr int kBlocks = 3;                      // as kMergeBlocks in merge.cuh

// A lane's piece of a key: four dimensions of the first half of a head, and those that RoPE turns them with.
using Order = Packed<Int8>;

__device__ __forceinline__ void load_halves(const Row* head, int piece, float (&to)[kPiece]) {
    const uint2 low = *reinterpret_cast<const uint2*>(head + Order::dimension(piece, 0));
    const uint2 high = *reinterpret_cast<const uint2*>(head + Order::dimension(piece, kPiece / 2));
    widen<Row>({low.x, low.y, high.x, high.y}, to);
}

// The first `rank` coefficients of records: numbers of the rows' type or, `packed`, bytes behind a half, their scale.
struct Coefficients {
    const unsigned char* records;
    int rank;
    bool packed;

    // Number `first`, which is even, and what follows, which may be none any more: records end at whole units.
    __device__ __forceinline__ float2 pair(int row, int first) const {
        const unsigned char* record = records + (long long)row * kUnit;
        if (!packed) return unpack(Row{}, *reinterpret_cast<const unsigned*>(record + sizeof(Row) * first));
        const float scale = unpack(Half{}, *reinterpret_cast<const unsigned short*>(record)).x;
        const int bytes = *reinterpret_cast<const unsigned short*>(record + 2 + first);
        return {float((signed char)bytes) * scale, float((signed char)(bytes >> 8)) * scale};
    }
};

// What a block reads: the listed rows of a split, and its sequence's basis.
struct Split {
    const int* rows;
    const int* positions;
    const int* basis;
    int count;
};

// What a block keeps, one after the other: coefficients of keys, sums of those of values, and its results.
union alignas(16) Phases {
    float staged[WARPS][kStaged][kWarpRows];
    float mixed[WARPS][GROUP][kMixed];
    float sums[WARPS][GROUP][HEAD_DIM];
};

static_assert(sizeof(Phases) + GROUP * sizeof(State) <= 48 * 1024, "static shared memory ends at 48 KB");

// Keys before RoPE, of the rows from `tile` on: this lane's piece of the kRows that its set takes of the warp's.
// `directions`: the pool's exact keys of one head.
__device__ __forceinline__ void rebuild(const Split& split, int tile, const Coefficients& coefficients,
                                        const Row* directions, int stride, float (&staged)[kStaged][kWarpRows],
                                        float (&keys)[kRows][kPiece]) {
    const int lane = lane_index(), set = lane / kLanes, piece = min(lane % kLanes, kPieces - 1);
    for (int first = 0; first < coefficients.rank; first += kStaged) {
        const int here = min(kStaged, coefficients.rank - first);
        __syncwarp();  // the other lanes have read what was staged before
        for (int i = lane; i < ceil_div(here, 2) * kWarpRows; i += 32) {
            const int row = i % kWarpRows, at = i / kWarpRows * 2;
            float2 two = {0, 0};
            if (tile + row < split.count) two = coefficients.pair(split.rows[tile + row], first + at);
            staged[at][row] = two.x;
            staged[at + 1][row] = two.y;
        }
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < here; ++i) {
            float direction[kPiece];
            load_halves(directions + (long long)split.basis[first + i] * stride, piece, direction);
#pragma unroll
            for (int row = 0; row < kRows; ++row)
#pragma unroll
                for (int j = 0; j < kPiece; ++j) keys[row][j] += staged[i][set * kRows + row] * direction[j];
        }
    }
}

// A lane's piece of a key, turned by the cosines and sines of its position.
__device__ __forceinline__ void rotate(const Row* angles, int piece, float (&key)[kPiece]) {
    float turn[kPiece];
    load_halves(angles, piece, turn);
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
        const float first = key[i], second = key[i + kPiece / 2];
        key[i] = first * turn[i] - second * turn[i + kPiece / 2];
        key[i + kPiece / 2] = second * turn[i] + first * turn[i + kPiece / 2];
    }
}

// A lane's piece of keys as their sequence stores others, by its center and scale; in float32, as they were rebuilt.
__device__ __forceinline__ void smooth(const Row* center, const Row* scale, int piece, float (&keys)[kRows][kPiece]) {
    float middle[kPiece], inverse[kPiece];
    load_halves(center, piece, middle);
    load_halves(scale, piece, inverse);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) inverse[i] = 1 / inverse[i];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int i = 0; i < kPiece; ++i) keys[row][i] = (keys[row][i] - middle[i]) * inverse[i];
}

// The logits of a tile's rows for every query head of a group, from their keys after RoPE.
__device__ __forceinline__ void multiply(const Row* query, const float (&keys)[kRows][kPiece], int tile, int count,
                                         int capacity, float* logits) {
    const int piece = lane_index() % kLanes, first = tile + lane_index() / kLanes * kRows;
#pragma unroll 1
    for (int head = 0; head < GROUP; ++head) {
        float own[kPiece];
        load_query<Order>(query + head * HEAD_DIM, piece, own);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float logit = sum_over_row(dot(own, keys[row]));
            if (piece == 0 && first + row < count) logits[(long long)head * capacity + first + row] = logit;
        }
    }
}

// The coefficients `first` + 2 * lane and the next of all values, by weight: this warp's share of the rows.
__device__ __forceinline__ void mix(const Split& split, const Coefficients& coefficients, int first,
                                    const float* logits, int capacity, const State (&softmax)[GROUP],
                                    float (&mixed)[GROUP][kMixed]) {
    const int own = first + 2 * lane_index();
    if (own >= coefficients.rank) return;
    float2 sums[GROUP] = {};
#pragma unroll 4
    for (int row = warp_index(); row < split.count; row += WARPS) {
        const float2 two = coefficients.pair(split.rows[row], own);
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            const float weight = exp2_approx(logits[(long long)head * capacity + row] - softmax[head].peak);
            sums[head].x += weight * two.x;
            sums[head].y += weight * two.y;
        }
    }
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        mixed[head][2 * lane_index()] = sums[head].x;
        mixed[head][2 * lane_index() + 1] = sums[head].y;
    }
}

// Adds `here` directions from `first` on, each times the warps' sums: this lane's piece of those that its set takes.
__device__ __forceinline__ void expand(const Split& split, const Exact& directions, int first, int here,
                                       const float (&mixed)[WARPS][GROUP][kMixed], float (&values)[GROUP][kPiece]) {
    for (int i = warp_index() * kRowsAtOnce + lane_index() / kLanes; i < here; i += WARPS * kRowsAtOnce) {
        float direction[kPiece];
        directions.widen(directions.fetch(split.basis[first + i]), direction);
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            float weight = 0;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) weight += mixed[warp][head][i];
#pragma unroll
            for (int j = 0; j < kPiece; ++j) values[head][j] += weight * direction[j];
        }
    }
}

}  // namespace

// One block: one split of one sequence's rows, for one key/value head and the query heads that share it.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
avl_attend_low_rank(const Row* __restrict__ query,      // [B, H, d]
                    const void* __restrict__ keys,      // Row [R, H_kv, d], and in the same memory records
                    const void* __restrict__ values,
                    const int* __restrict__ rows,       // [capacity], ids of records; a row may serve several sequences
                    const int* __restrict__ begins,     // [B], of this part
                    const int* __restrict__ ends,       // [B]
                    const int* __restrict__ positions,  // [capacity], of the listed rows
                    const int* __restrict__ bases,      // [B, most], ids of exact rows: `rank` of each are read
                    const Row* __restrict__ angles,     // [context, 2, d / 2]: RoPE's cosines and sines by position
                    const int* __restrict__ smoothing,  // [B], as avl_smooth has it; null where nobody's keys are
                    int key_row_stride, int key_head_stride,  // of exact rows, in elements; multiples of 8
                    int value_row_stride, int value_head_stride,
                    int capacity,
                    int first_split, int all_splits,    // of this part, and of all parts together
                    int most, int rank, int packed,
                    float* __restrict__ sums,           // [B, all_splits, H, d]: values, relative to the split's peak
                    State* __restrict__ states,         // [B, all_splits, H]
                    float* __restrict__ logits) {       // [H, capacity], in units of log 2
    const int kv_head = blockIdx.x, sequence = blockIdx.z, heads = gridDim.x * GROUP;
    const int total = ends[sequence] - begins[sequence], per_split = rows_per_split(total, gridDim.y);
    const int skipped = blockIdx.y * per_split, begin = begins[sequence] + skipped;
    if (skipped >= total) return;  // avl_merge will not look here
    const Split split = {rows + begin, positions + begin, bases + sequence * most, min(per_split, total - skipped)};
    const int lane = lane_index(), warp = warp_index();
    const int piece = min(lane % kLanes, kPieces - 1);  // of keys and values; past a row's end queries are zeros
    query += ((long long)sequence * heads + kv_head * GROUP) * HEAD_DIM;
    logits += (long long)kv_head * GROUP * capacity + begin;
    const int smooths = smoothing ? smoothing[sequence] : -1;

    __shared__ Phases shared;
    __shared__ State softmax[GROUP];

    const Coefficients of_keys = {static_cast<const unsigned char*>(keys), rank, packed != 0};
    const Row* directions = static_cast<const Row*>(keys) + (long long)kv_head * key_head_stride;
    const Row* scales = static_cast<const Row*>(values) + (long long)kv_head * value_head_stride;
    for (int tile = warp * kWarpRows; tile < split.count; tile += WARPS * kWarpRows) {
        float rebuilt[kRows][kPiece] = {};
        rebuild(split, tile, of_keys, directions, key_row_stride, shared.staged[warp], rebuilt);
        const int first = tile + lane / kLanes * kRows;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const int position = split.positions[min(first + row, split.count - 1)];
            rotate(angles + (long long)position * HEAD_DIM, piece, rebuilt[row]);
        }
        if (smooths >= 0)
            smooth(directions + (long long)smooths * key_row_stride, scales + (long long)smooths * value_row_stride,
                   piece, rebuilt);
        multiply(query, rebuilt, tile, split.count, capacity, logits);
    }
    __syncthreads();

    for (int head = warp; head < GROUP; head += WARPS) {
        const State state = state_of(logits + (long long)head * capacity, split.count);
        if (lane == 0) softmax[head] = state;
    }
    __syncthreads();

    const Coefficients of_values = {static_cast<const unsigned char*>(values), rank, packed != 0};
    const Exact value_directions(values, gridDim.x, kv_head, piece, value_row_stride, value_head_stride);
    float weighted[GROUP][kPiece] = {};
    for (int first = 0; first < rank; first += kMixed) {
        mix(split, of_values, first, logits, capacity, softmax, shared.mixed[warp]);
        __syncthreads();
        expand(split, value_directions, first, min(kMixed, rank - first), shared.mixed, weighted);
        __syncthreads();  // what was mixed has been read
    }

#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2)
#pragma unroll
        for (int head = 0; head < GROUP; ++head)
#pragma unroll
            for (int j = 0; j < kPiece; ++j) weighted[head][j] += __shfl_xor_sync(kAll, weighted[head][j], mask);
    if (lane < kPieces) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head)
#pragma unroll
            for (int j = 0; j < kPiece; ++j) shared.sums[warp][head][lane * kPiece + j] = weighted[head][j];
    }
    __syncthreads();

    const long long result =
        ((long long)sequence * all_splits + first_split + blockIdx.y) * heads + kv_head * GROUP;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kThreads) {
        const int head = i / HEAD_DIM;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shared.sums[w][head][i % HEAD_DIM];
        sums[result * HEAD_DIM + i] = sum;
        if (i % HEAD_DIM == 0) states[result + head] = softmax[head];
    }
}
