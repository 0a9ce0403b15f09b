// How a warp reads the rows of a split, and the online softmax that it keeps of them.
//
// A decode step does a few operations per byte, so all that matters is to have enough bytes on their way. A row's slice
// for one head is read by kLanes neighbouring lanes, 16 bytes each where rows are exact. Each warp owns a ring of
// STAGES tiles in shared memory, filled by cp.async and drained in order. A lane reads back only what it has copied
// itself, so the pipeline needs no barrier at all, neither of the block nor of the warp; shared memory serves as a queue
// that costs no registers. With exact rows and the default sizes a warp has 8 KB under way while it computes on 4 KB.
// Row ids are loaded one tile before the copies that need them. A group's query heads share the one pass over a row.
//
// Lanes that share a row hold its slice of the query, the logit after a butterfly, and their part of the weighted sum
// of values: each such set of lanes is an online softmax of its own, rescaled at most once per tile. Head sizes 80 and
// 96 leave 6 and 4 of 16 lanes without work; memory does not notice, as only whole rows are read.

#pragma once

#include "rows.cuh"

#ifndef STAGES
#define STAGES 3  // tiles in a warp's ring: one being read, the others on their way
#endif
#ifndef UNROLL
#define UNROLL 4  // loads per lane, of keys and as many of values, in a tile
#endif

namespace {

constexpr int kTile = kRowsAtOnce * UNROLL;  // rows that a warp takes at once

static_assert(GROUP >= 1 && GROUP <= 8, "a lane keeps 16 registers for each query head of the group");
static_assert(STAGES >= 2, "one tile is read while another arrives");

// A part of a softmax: its largest logit, and the sum of 2^(logit - peak).
struct State { float peak, mass; };

// That of a row of logits, by one warp; in all of its lanes.
__device__ __forceinline__ State state_of(const float* logits, int count) {
    float peak = kLowest, mass = 0;
#pragma unroll 8
    for (int i = lane_index(); i < count; i += 32) peak = fmaxf(peak, logits[i]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, mask));
#pragma unroll 8
    for (int i = lane_index(); i < count; i += 32) mass += exp2_approx(logits[i] - peak);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) mass += __shfl_xor_sync(kAll, mass, mask);
    return {peak, mass};
}

// Rows of a split: every one but the last has as many, a whole number of tiles. Splits past the last row have none.
__device__ __forceinline__ int rows_per_split(int count, int splits) {
    return ceil_div(ceil_div(count, splits), kTile) * kTile;
}

// The entry of a list that load `u` of the tile at `first` brings to this lane.
__device__ __forceinline__ int entry(int first, int u) { return first + u * kRowsAtOnce + lane_index() / kLanes; }

// A tile in shared memory.
template <class Keys, class Values> struct Tile {
    typename Keys::Load keys[UNROLL];
    typename Values::Load values[UNROLL];
};

// The ring of one warp; once that is drained, the warp's part of the result.
template <class Keys, class Values> union Scratch {
    Tile<Keys, Values> ring[STAGES];
    struct {
        float sums[GROUP][HEAD_DIM];
        State states[GROUP];
    } part;
};

// What a warp reads: rows[0] to rows[count - 1], every WARPS-th tile from its own on.
template <class Keys, class Values> class Pipeline {
public:
    __device__ __forceinline__ Pipeline(Scratch<Keys, Values>& scratch, const Keys& keys, const Values& values,
                                        const int* rows, int count)
        : ring(scratch.ring), keys(keys), values(values), rows(rows), count(count), tile(warp_index() * kTile) {
        load_ids();
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);
    }

    // Starts the copies of the next tile into a stage, whose last content this lane must have read. Past the last tile
    // the group is empty, so that the number of groups on their way stays the same.
    __device__ __forceinline__ void fetch(int stage) {
        if (tile < count) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) keys.copy(ring[stage].keys[u], ids[u], is_there(u));
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) values.copy(ring[stage].values[u], ids[u], is_there(u));
        }
        commit_copies();
        tile += WARPS * kTile;
        load_ids();
    }

private:
    __device__ __forceinline__ bool is_there(int u) const {
        return entry(tile, u) < count && lane_index() % kLanes < kPieces;
    }
    __device__ __forceinline__ void load_ids() {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) ids[u] = entry(tile, u) < count ? rows[entry(tile, u)] : 0;
    }

    Tile<Keys, Values>* ring;
    const Keys keys;
    const Values values;
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
    template <class Reader>
    __device__ __forceinline__ void add(float (&logits)[UNROLL][GROUP], int here, const Reader& reader,
                                        const typename Reader::Load (&values)[UNROLL]) {
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
            reader.widen(Reader::take(values[u]), value);
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

}  // namespace
