// Attention of one decode step over selected rows of a key/value pool, read where they lie, on a GPU.
//
// One query token per sequence attends to the rows that a list of row ids names; nothing is gathered first, and every
// selected row is read from memory exactly once. With r over the rows of a sequence and h over its query heads:
//
//   p[h][r]   = softmax over r of <query[h], key[r]> / sqrt(d)
//   out[h]    = sum over r of p[h][r] * value[r]
//   scores[r] = mean over h of p[h][r]                                  (when asked)
//
// The kernels, in the order in which a layer launches them. Grids are (x, y, z); a block has 32 * WARPS threads and
// no dynamic shared memory. B sequences, H query and H_kv key/value heads, H = GROUP * H_kv, S >= 1 splits, and
// `capacity` >= offsets[B], the rows that all selections hold together.
//
//   avl_append             (rows, 2)                  writes new rows into their slots
//   avl_attend             (H_kv, S, B)               partial results of each split; the logits when asked
//   avl_merge              (ceil(H / WARPS), B)       out, by log-sum-exp over the splits
//   avl_scores             (any, B)                   scores, from the logits; on refresh steps only
//
//   avl_prompt_logits      (H_kv, any)                a prompt's logits for a few of its queries
//   avl_prompt_log_sums    (ceil(queries * H / WARPS))
//   avl_prompt_scores      (ceil(n / 32))             the attention that the prompt's tokens received from them
//
// A CUDA graph captures a step once and replays it: grids and S are fixed, the numbers of rows are read from
// `offsets` in device memory, a block that finds no work returns, and nothing is allocated. S is a constant of the
// launcher: enough for H_kv * S * B to be two to four times the blocks that the GPU holds at once, but no more than
// leaves each warp of a split a tile of kTile rows. Results do not depend on the order of blocks: all sums have a
// fixed order, there are no atomics, and the splits of a sequence depend on its own row count and S alone.
//
// How avl_attend keeps memory busy. A decode step does a few operations per byte, so all that matters is to have
// enough bytes on their way. A row's slice for one head is read 16 bytes per lane, by kLanes neighbouring lanes. Each
// warp owns a ring of STAGES tiles in shared memory, filled by cp.async and drained in order. A lane reads back only
// what it has copied itself, so the pipeline needs no barrier at all, neither of the block nor of the warp; shared
// memory serves as a queue that costs no registers. With the default sizes a warp has 8 KB under way while it
// computes on 4 KB. Row ids are loaded one tile before the copies that need them. A group's query heads share the one
// pass over a row.
//
// Lanes that share a row hold its slice of the query, the logit after a butterfly, and their part of the weighted sum
// of values: each such set of lanes is an online softmax of its own, rescaled at most once per tile. Sets are joined
// by shuffles, warps through shared memory, splits through the workspace by avl_merge. Logits are in units of log 2
// from the start: the query is multiplied by log2(e) / sqrt(d) once, and exponentials are single instructions. (A
// model with another factor than 1 / sqrt(d) scales its query projection.) Head sizes 80 and 96 leave 6 and 4 of 16
// lanes without work; memory does not notice, as only whole rows are read.
//
// Compiled by NVRTC or nvcc, for compute capability 8.0 and later, once per shape: -DHEAD_DIM= a multiple of 8 up to
// 256, -DGROUP= 1 to 8 query heads per key/value head, -DROW=Half or -DROW=Bfloat. It includes no header, so NVRTC
// needs no include path. plugins/emulation compiles the same text as C++ and runs it on a CPU, where the tests
// compare its numbers with float64 and look for races. None of it has run on a GPU yet: still to be tried on one are
// the few lines of PTX below, which the emulation replaces, and the speed, hence the choices of WARPS, STAGES, UNROLL
// and S.

#if !defined(HEAD_DIM) || !defined(GROUP) || !defined(ROW)
#error "HEAD_DIM, GROUP and ROW (Half or Bfloat) select the kernels' shape"
#endif
#ifndef WARPS
#define WARPS 4   // of a block
#endif
#ifndef STAGES
#define STAGES 3  // tiles in a warp's ring: one being read, the others on their way
#endif
#ifndef UNROLL
#define UNROLL 4  // 16-byte loads per lane, of keys and as many of values, in a tile
#endif

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };
using Row = ROW;

// What only a GPU can do. The emulation brings functions of the same names.
#ifdef __CUDACC__

__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float log2_approx(float x) {
    float result;
    asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The two values in a word, the first in its low half, and back, rounded to nearest even.
__device__ __forceinline__ float2 unpack(Half, unsigned word) {
    float2 pair;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(pair.x), "=f"(pair.y) : "r"(word));
    return pair;
}

__device__ __forceinline__ float2 unpack(Bfloat, unsigned word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ unsigned pack(Half, float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ unsigned pack(Bfloat, float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// Starts copying 16 bytes to shared memory, past the first-level cache, as no row is read twice; zeros if not `there`.
// The memory clobber keeps the reads of what the copy overwrites in front of it.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(unsigned(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)),
                    "r"(there ? 16 : 0) : "memory");
}

// Closes the group of copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` groups are on their way; what the others copied is visible to this thread.
template <int Pending> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory");
}

#endif

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 32 * WARPS;
constexpr int kPiece = 8;                    // elements in the 16 bytes that one lane loads
constexpr int kPieces = HEAD_DIM / kPiece;   // of one head's slice of a row
constexpr float kLowest = -3.0e38f;          // under every logit, and finite: a difference of two is never NaN

// Blocks on a multiprocessor, where the compiler, if not told, would spill a register or two to fit more of them.
constexpr int kMergeBlocks = 8, kLogitsBlocks = 5;

__device__ constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

constexpr int kLanes = power_of_two_from(kPieces);  // lanes on one row; those past kPieces hold zeros
constexpr int kRowsAtOnce = 32 / kLanes;            // rows that one load of a warp touches
constexpr int kTile = kRowsAtOnce * UNROLL;         // rows that a warp takes at once

static_assert(HEAD_DIM % kPiece == 0 && HEAD_DIM <= 256, "a row's slice is read by at most one warp, 16 bytes a lane");
static_assert(GROUP >= 1 && GROUP <= 8, "a lane keeps 16 registers for each query head of the group");
static_assert(STAGES >= 2, "one tile is read while another arrives");

// A part of a softmax: its largest logit, and the sum of 2^(logit - peak).
struct State { float peak, mass; };

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

__device__ __forceinline__ void widen(const uint4& piece, float (&to)[kPiece]) {
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(Row{}, words[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}

// Loads a lane's piece of a query, scaled so that its product with a key is a logit in units of log 2.
__device__ __forceinline__ void load_query(const Row* query, int piece, float (&to)[kPiece]) {
    const float scale = 1.44269504f / sqrtf(float(HEAD_DIM));
    const uint4 bits = piece < kPieces ? reinterpret_cast<const uint4*>(query)[piece] : uint4{0, 0, 0, 0};
    widen(bits, to);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[i] *= scale;
}

__device__ __forceinline__ float dot(const float (&a)[kPiece], const float (&b)[kPiece]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += a[i] * b[i];
    return sum;
}

// The sum over the lanes that share a row, in all of them.
__device__ __forceinline__ float sum_over_row(float value) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAll, value, mask);
    return value;
}

// Rows of a split: every one but the last has as many, a whole number of tiles. Splits past the last row have none.
__device__ __forceinline__ int rows_per_split(int count, int splits) {
    return ceil_div(ceil_div(count, splits), kTile) * kTile;
}

// Where a piece of a row lies: `stride` elements from row to row, this lane's piece of the head already added.
struct Slices {
    const Row* piece;
    int stride;
    __device__ __forceinline__ const Row* at(int row) const { return piece + (long long)row * stride; }
};

// The ring of one warp; once that is drained, the warp's part of the result.
union Scratch {
    uint4 ring[STAGES][2][UNROLL][32];  // stage, keys or values, load, lane
    struct {
        float sums[GROUP][HEAD_DIM];
        State states[GROUP];
    } part;
};

static_assert(sizeof(Scratch) * WARPS <= 48 * 1024, "static shared memory ends at 48 KB");

// What a warp reads: rows[0] to rows[count - 1], every WARPS-th tile from its own on.
class Pipeline {
public:
    __device__ __forceinline__ Pipeline(Scratch& scratch, Slices keys, Slices values, const int* rows, int count)
        : ring(scratch.ring), keys(keys), values(values), rows(rows), count(count), tile(warp_index() * kTile) {
        load_ids();
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);
    }

    // The entry of the list that load `u` of the tile at `first` brings to this lane.
    __device__ __forceinline__ static int entry(int first, int u) {
        return first + u * kRowsAtOnce + lane_index() / kLanes;
    }

    // Starts the copies of the next tile into a stage, whose last content this lane must have read. Past the last tile
    // the group is empty, so that the number of groups on their way stays the same.
    __device__ __forceinline__ void fetch(int stage) {
        if (tile < count) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const bool there = entry(tile, u) < count && lane_index() % kLanes < kPieces;
                copy_async(&ring[stage][0][u][lane_index()], keys.at(ids[u]), there);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const bool there = entry(tile, u) < count && lane_index() % kLanes < kPieces;
                copy_async(&ring[stage][1][u][lane_index()], values.at(ids[u]), there);
            }
        }
        commit_copies();
        tile += WARPS * kTile;
        load_ids();
    }

private:
    __device__ __forceinline__ void load_ids() {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) ids[u] = entry(tile, u) < count ? rows[entry(tile, u)] : 0;
    }

    uint4 (*ring)[2][UNROLL][32];
    const Slices keys, values;
    const int* rows;
    const int count;
    int tile;         // the first entry of the tile to fetch next
    int ids[UNROLL];  // its row ids
};

// An online softmax over the rows that one set of lanes reads, for every query head of a group.
struct Softmax {
    State states[GROUP];
    float sums[GROUP][kPiece];  // of values, weighted by 2^(logit - peak): this lane's piece

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            states[head] = {kLowest, 0};
#pragma unroll
            for (int i = 0; i < kPiece; ++i) sums[head][i] = 0;
        }
    }

    // Makes `peak`, which is no less than the present one, the reference of all that was summed so far.
    __device__ __forceinline__ void raise(int head, float peak) {
        const float shrink = exp2_approx(states[head].peak - peak);
        states[head] = {peak, states[head].mass * shrink};
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sums[head][i] *= shrink;
    }

    // Adds the first `here` rows of a tile, given the logits of each, which become their weights.
    __device__ __forceinline__ void add(float (&logits)[UNROLL][GROUP], int here, const uint4 (*values)[32]) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            float peak = states[head].peak;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) peak = u < here ? fmaxf(peak, logits[u][head]) : peak;
            raise(head, peak);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                logits[u][head] = u < here ? exp2_approx(logits[u][head] - peak) : 0;
                states[head].mass += logits[u][head];
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float value[kPiece];
            widen(values[u][lane_index()], value);
#pragma unroll
            for (int head = 0; head < GROUP; ++head)
#pragma unroll
                for (int i = 0; i < kPiece; ++i) sums[head][i] += logits[u][head] * value[i];
        }
    }

    // Joins the sets of lanes of a warp; all of them hold the result.
    __device__ __forceinline__ void join() {
#pragma unroll
        for (int mask = kLanes; mask < 32; mask *= 2) {
#pragma unroll
            for (int head = 0; head < GROUP; ++head) {
                raise(head, fmaxf(states[head].peak, __shfl_xor_sync(kAll, states[head].peak, mask)));
                states[head].mass += __shfl_xor_sync(kAll, states[head].mass, mask);
#pragma unroll
                for (int i = 0; i < kPiece; ++i) sums[head][i] += __shfl_xor_sync(kAll, sums[head][i], mask);
            }
        }
    }
};

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

}  // namespace

// Writes new rows into the pool. Block (i, 0) copies the keys of new row i into row slots[i] of the pool, block (i, 1)
// its values. A negative slot drops the row: so a sequence that rests keeps its place in the batch, and a prompt's rows
// are written by the same call, whichever of them a policy keeps. No two slots are the same.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_append(const Row* __restrict__ new_keys,    // [rows, H_kv, d], contiguous, as all that names no stride
           const Row* __restrict__ new_values,  // [rows, H_kv, d]
           const int* __restrict__ slots,       // [rows]
           int kv_heads,
           int key_row_stride, int key_head_stride,      // of the pool, in elements; multiples of 8, as all strides
           int value_row_stride, int value_head_stride,
           Row* __restrict__ keys,              // [R, H_kv, d], 16-byte aligned, as all pointers
           Row* __restrict__ values) {          // [R, H_kv, d]
    const int slot = slots[blockIdx.x];
    if (slot < 0) return;
    const bool second = blockIdx.y == 1;
    const int head_stride = second ? value_head_stride : key_head_stride;
    Row* to = second ? values + (long long)slot * value_row_stride : keys + (long long)slot * key_row_stride;
    const Row* from = (second ? new_values : new_keys) + (long long)blockIdx.x * kv_heads * HEAD_DIM;
    for (int i = threadIdx.x; i < kv_heads * kPieces; i += kThreads) {
        const int head = i / kPieces, piece = i % kPieces;
        *reinterpret_cast<uint4*>(to + (long long)head * head_stride + piece * kPiece) =
            reinterpret_cast<const uint4*>(from)[i];
    }
}

// One block: one split of one sequence's rows, for one key/value head and the query heads that share it.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_attend(const Row* __restrict__ query,       // [B, H, d]
           const Row* __restrict__ keys,        // [R, H_kv, d]
           const Row* __restrict__ values,      // [R, H_kv, d]
           const int* __restrict__ rows,        // [capacity], ids in [0, R); a row may serve several sequences
           const int* __restrict__ offsets,     // [B + 1]; sequence b reads rows offsets[b] to offsets[b + 1] - 1
           int key_row_stride, int key_head_stride,
           int value_row_stride, int value_head_stride,
           int capacity,
           float* __restrict__ sums,            // [B, S, H, d]: values, weighted relative to the split's peak
           State* __restrict__ states,          // [B, S, H]
           float* __restrict__ logits) {        // [H, capacity], in units of log 2; null when no scores are asked for
    const int kv_head = blockIdx.x, split = blockIdx.y, sequence = blockIdx.z, heads = gridDim.x * GROUP;
    const int total = offsets[sequence + 1] - offsets[sequence];
    const int per_split = rows_per_split(total, gridDim.y);
    if (split * per_split >= total) return;  // avl_merge will not look here
    const int begin = offsets[sequence] + split * per_split;
    const int count = min(per_split, total - split * per_split);
    const int lane = lane_index(), warp = warp_index(), piece = lane % kLanes;

    __shared__ Scratch scratch[WARPS];
    const int element = min(piece, kPieces - 1) * kPiece;  // lanes past a row's end copy nothing, from inside of it
    Pipeline pipeline(scratch[warp], {keys + (long long)kv_head * key_head_stride + element, key_row_stride},
                      {values + (long long)kv_head * value_head_stride + element, value_row_stride},
                      rows + begin, count);

    float queries[GROUP][kPiece];
#pragma unroll
    for (int head = 0; head < GROUP; ++head)
        load_query(query + ((long long)sequence * heads + kv_head * GROUP + head) * HEAD_DIM, piece, queries[head]);

    Softmax softmax;
    int stage = 0;
    for (int tile = warp * kTile; tile < count; tile += WARPS * kTile) {
        pipeline.fetch(stage == 0 ? STAGES - 1 : stage - 1);
        wait_copies<STAGES - 1>();

        float products[UNROLL][GROUP];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float key[kPiece];
            widen(scratch[warp].ring[stage][0][u][lane], key);
#pragma unroll
            for (int head = 0; head < GROUP; ++head) products[u][head] = dot(queries[head], key);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int head = 0; head < GROUP; ++head) products[u][head] = sum_over_row(products[u][head]);

        const int here = ceil_div(count - Pipeline::entry(tile, 0), kRowsAtOnce);  // loads that brought this lane a row
        if (logits && piece == 0) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
#pragma unroll
                for (int head = 0; head < GROUP; ++head)
                    if (u < here)
                        logits[(long long)(kv_head * GROUP + head) * capacity + begin + Pipeline::entry(tile, u)] =
                            products[u][head];
        }
        softmax.add(products, here, scratch[warp].ring[stage][1]);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    softmax.join();
    __syncwarp();  // the other lanes have read their part of the ring, which the result now takes
    if (lane < kPieces) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head)
#pragma unroll
            for (int i = 0; i < kPiece; ++i) scratch[warp].part.sums[head][lane * kPiece + i] = softmax.sums[head][i];
    }
    if (lane == 0) {
#pragma unroll
        for (int head = 0; head < GROUP; ++head) scratch[warp].part.states[head] = softmax.states[head];
    }
    __syncthreads();

    const long long result = ((long long)sequence * gridDim.y + split) * heads + kv_head * GROUP;
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

// One warp: one query head of one sequence. A sequence without rows gets zeros.
extern "C" __global__ void __launch_bounds__(kThreads, kMergeBlocks)
avl_merge(const float* __restrict__ sums,     // [B, S, H, d], as avl_attend left it
          const State* __restrict__ states,   // [B, S, H]
          const int* __restrict__ offsets,    // [B + 1]
          int heads, int splits,
          Row* __restrict__ out,              // [B, H, d]
          float* __restrict__ log_sums) {     // [B, H]: log2 of the sum of 2^logit; for avl_scores
    const int head = blockIdx.x * WARPS + warp_index(), sequence = blockIdx.y;
    if (head >= heads) return;
    const int count = offsets[sequence + 1] - offsets[sequence];
    const int used = count > 0 ? ceil_div(count, rows_per_split(count, splits)) : 0;
    const long long first = (long long)sequence * splits * heads + head;  // the next split's result is `heads` later

    float peak = kLowest, mass = 0;
#pragma unroll 8
    for (int s = 0; s < used; ++s) peak = fmaxf(peak, states[first + (long long)s * heads].peak);
#pragma unroll 8
    for (int s = 0; s < used; ++s) {
        const State state = states[first + (long long)s * heads];
        mass += state.mass * exp2_approx(state.peak - peak);
    }
    const float inverse = used > 0 ? 1 / mass : 0;
    const long long result = (long long)sequence * heads + head;
    if (lane_index() == 0) log_sums[result] = used > 0 ? peak + log2_approx(mass) : kLowest;

    for (int i = 4 * lane_index(); i < HEAD_DIM; i += 4 * 32) {
        float4 sum = {0, 0, 0, 0};
#pragma unroll 4
        for (int s = 0; s < used; ++s) {
            const long long part = first + (long long)s * heads;
            const float share = exp2_approx(states[part].peak - peak);
            const float4 term = *reinterpret_cast<const float4*>(sums + part * HEAD_DIM + i);
            sum.x += share * term.x;
            sum.y += share * term.y;
            sum.z += share * term.z;
            sum.w += share * term.w;
        }
        *reinterpret_cast<uint2*>(out + result * HEAD_DIM + i) = {
            pack(Row{}, sum.x * inverse, sum.y * inverse), pack(Row{}, sum.z * inverse, sum.w * inverse)};
    }
}

// Blocks (0, b) to (gridDim.x - 1, b) share the rows of sequence b, 32 at a time.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_scores(const float* __restrict__ logits,    // [H, capacity], as avl_attend left it
           const float* __restrict__ log_sums,  // [B, H], as avl_merge left it
           const int* __restrict__ offsets,     // [B + 1]
           int heads, int capacity,
           float* __restrict__ scores) {        // [capacity]; what lies past offsets[B] is not written
    __shared__ float parts[WARPS][32];
    const int end = offsets[blockIdx.y + 1];
    log_sums += (long long)blockIdx.y * heads;
    for (int first = offsets[blockIdx.y] + blockIdx.x * 32; first < end; first += gridDim.x * 32) {
        const int column = first + lane_index();
        const float sum = sum_column(logits, capacity, log_sums, 0, heads, column, column < end, parts);
        if (column < end && warp_index() == 0) scores[column] = sum / heads;
    }
}

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
    const Slices slices = {keys + (long long)kv_head * key_head_stride + piece * kPiece, key_token_stride};
    for (int tile = (blockIdx.y * WARPS + warp_index()) * kTile; tile < n; tile += gridDim.y * WARPS * kTile) {
        uint4 bits[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = Pipeline::entry(tile, u);
            const bool there = token < n && piece < kPieces;
            bits[u] = there ? *reinterpret_cast<const uint4*>(slices.at(token)) : uint4{0, 0, 0, 0};
        }
        float key[UNROLL][kPiece];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) widen(bits[u], key[u]);

        for (int q = 0; q < queries; ++q) {
            const int position = positions[q];
            const Row* token = query + (long long)position * query_token_stride;
#pragma unroll 1  // several heads at once would take more registers than they save time
            for (int head = 0; head < GROUP; ++head) {
                float wide[kPiece];
                load_query(token + (long long)(kv_head * GROUP + head) * query_head_stride, piece, wide);
                float* to = logits + ((long long)q * heads + kv_head * GROUP + head) * n;
                float products[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) products[u] = sum_over_row(dot(wide, key[u]));
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    const int column = Pipeline::entry(tile, u);
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
    logits += (long long)index * n;
    float peak = kLowest, mass = 0;
#pragma unroll 8
    for (int i = lane_index(); i < n; i += 32) peak = fmaxf(peak, logits[i]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, mask));
#pragma unroll 8
    for (int i = lane_index(); i < n; i += 32) mass += exp2_approx(logits[i] - peak);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) mass += __shfl_xor_sync(kAll, mass, mask);
    if (lane_index() == 0) log_sums[index] = peak + log2_approx(mass);
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
