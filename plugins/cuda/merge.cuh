// From the partial results of splits to results: the attention's output, and the scores of the rows.

#pragma once

#include "pipeline.cuh"

namespace {

// Blocks on a multiprocessor, where the compiler, if not told, would spill a register or two to fit more of them.
constexpr int kMergeBlocks = 8;

// The attention that column `column` of `logits` received from the rows `begin` to `end` - 1, each a softmax whose
// logarithm of the sum is in `log_sums`. A lane takes a column, the warps share the rows; all threads must call.
__device__ __forceinline__ float sum_column(const float* logits, long long stride, const float* log_sums, int begin,
                                            int end, long long column, bool there, float (&parts)[WARPS][32]) {
    float sum = 0;
    if (there) {
#pragma unroll 8
        for (int row = begin + warp_index(); row < end; row += WARPS)
            sum += exp2_approx(logits[row * stride + column] - log_sums[row]);
    }
    __syncthreads();  // the parts of an earlier call have been read
    parts[warp_index()][lane_index()] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp][lane_index()];
    return sum;
}

// The logarithm of the sum of 2^logit over a row of logits, by one warp; in all of its lanes.
__device__ __forceinline__ float log_sum(const float* logits, int count) {
    const State state = state_of(logits, count);
    return state.peak + log2_approx(state.mass);
}

// Where the partial results of one sequence and head stand, of the parts that read rows of it.
struct Results {
    const int* begins;  // of this sequence in the first part; in the next one they are `sequences` further
    const int* ends;
    int sequences, splits, heads;

    __device__ __forceinline__ int used(int part) const {
        const int count = ends[part * sequences] - begins[part * sequences];
        return count > 0 ? ceil_div(count, rows_per_split(count, splits)) : 0;
    }
    __device__ __forceinline__ long long at(int part, int split) const {
        return (long long)(part * splits + split) * heads;
    }
};

}  // namespace

// One warp: one query head of one sequence. A sequence without rows gets zeros.
extern "C" __global__ void __launch_bounds__(kThreads, kMergeBlocks)
avl_merge(const float* __restrict__ sums,     // [B, P * S, H, d], as the parts' avl_attend left it
          const State* __restrict__ states,   // [B, P * S, H]
          const int* __restrict__ begins,     // [P, B]
          const int* __restrict__ ends,       // [P, B]
          int heads, int splits, int parts,
          Row* __restrict__ out,              // [B, H, d]
          float* __restrict__ log_sums) {     // [B, H]: log2 of the sum of 2^logit; for avl_scores
    const int head = blockIdx.x * WARPS + warp_index(), sequence = blockIdx.y;
    if (head >= heads) return;
    const Results results = {begins + sequence, ends + sequence, int(gridDim.y), splits, heads};
    const long long first = (long long)sequence * parts * splits * heads + head;
    states += first;
    sums += first * HEAD_DIM;

    float peak = kLowest, mass = 0;
    bool reads = false;
    for (int part = 0; part < parts; ++part) {
        const int used = results.used(part);
        reads |= used > 0;
#pragma unroll 8
        for (int s = 0; s < used; ++s) peak = fmaxf(peak, states[results.at(part, s)].peak);
    }
    for (int part = 0; part < parts; ++part) {
        const int used = results.used(part);
#pragma unroll 8
        for (int s = 0; s < used; ++s) {
            const State state = states[results.at(part, s)];
            mass += state.mass * exp2_approx(state.peak - peak);
        }
    }
    const float inverse = reads ? 1 / mass : 0;
    const long long result = (long long)sequence * heads + head;
    if (lane_index() == 0) log_sums[result] = reads ? peak + log2_approx(mass) : kLowest;

    for (int i = 4 * lane_index(); i < HEAD_DIM; i += 4 * 32) {
        float4 sum = {0, 0, 0, 0};
        for (int part = 0; part < parts; ++part) {
            const int used = results.used(part);
#pragma unroll 4
            for (int s = 0; s < used; ++s) {
                const long long at = results.at(part, s);
                const float share = exp2_approx(states[at].peak - peak);
                const float4 term = *reinterpret_cast<const float4*>(sums + at * HEAD_DIM + i);
                sum.x += share * term.x;
                sum.y += share * term.y;
                sum.z += share * term.z;
                sum.w += share * term.w;
            }
        }
        *reinterpret_cast<uint2*>(out + result * HEAD_DIM + i) = {
            pack(Row{}, sum.x * inverse, sum.y * inverse), pack(Row{}, sum.z * inverse, sum.w * inverse)};
    }
}

// One warp: one query head of one sequence, whose rows of part p are given by begins[p * B + b] and ends[p * B + b]. A
// sequence has rows in one part at most; what it has none in writes nothing.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_log_sums(const float* __restrict__ logits,  // [H, capacity], as avl_scan left it
             const int* __restrict__ begins,    // [P, B]
             const int* __restrict__ ends,      // [P, B]
             int heads, int capacity,
             float* __restrict__ log_sums) {    // [B, H]
    const int head = blockIdx.x * WARPS + warp_index(), sequence = blockIdx.y;
    const int segment = blockIdx.z * gridDim.y + sequence, begin = begins[segment], count = ends[segment] - begin;
    if (head >= heads || count <= 0) return;
    const float sum = log_sum(logits + (long long)head * capacity + begin, count);
    if (lane_index() == 0) log_sums[(long long)sequence * heads + head] = sum;
}

// Blocks (0, b, p) to (gridDim.x - 1, b, p) share the rows of sequence b in part p, 32 at a time.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_scores(const float* __restrict__ logits,    // [H, capacity], as avl_attend or avl_scan left it
           const float* __restrict__ log_sums,  // [B, H], as avl_merge or avl_log_sums left it
           const int* __restrict__ begins,      // [P, B]
           const int* __restrict__ ends,        // [P, B]
           int heads, int capacity,
           float* __restrict__ scores) {        // [capacity]; what no list names is not written
    __shared__ float parts[WARPS][32];
    const int segment = blockIdx.z * gridDim.y + blockIdx.y, end = ends[segment];
    log_sums += (long long)blockIdx.y * heads;
    for (int first = begins[segment] + blockIdx.x * 32; first < end; first += gridDim.x * 32) {
        const int column = first + lane_index();
        const float sum = sum_column(logits, capacity, log_sums, 0, heads, column, column < end, parts);
        if (column < end && warp_index() == 0) scores[column] = sum / heads;
    }
}
