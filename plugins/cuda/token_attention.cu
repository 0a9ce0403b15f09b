// Attention of many new tokens at once, over listed rows of the pool and over one another: a prompt's, for the TensorRT
// plugin. The numbers are those of avl::CoreAttention as avl_edge/package/export defines it. A column is a listed row, which
// every token of its sequence sees, or a token without a slot, which itself and the later tokens of its sequence see.
//
//   avl_token_attend   (ceil(t / kTeams), H)         attended, and the logarithms of the softmax sums
//   avl_token_scores   (ceil((N + t) / kTeams))      row_scores and token_scores, from those
//   avl_token_join     (t)                           after avl_merge, in a step: a token without a slot sees itself
//   avl_token_sums     (ceil(N / kThreads))          after avl_scores, in a step: the second line of row_scores
//
// t tokens of B sequences, one of each in a step, N row ids in lists of P formats (exact, int8, int4, int8/int4), part
// by part, H query and H_kv key/value heads, H = GROUP * H_kv; a block has 32 * WARPS threads and no dynamic shared memory. Grids
// follow from the shapes alone, counts are read from the offsets in device memory, nothing is allocated and no sum
// depends on the order of blocks: a CUDA graph may hold all of it.
//
// A team of lanes (columns.cuh) shares a query, in the scores a column. The columns of a tile lie in shared memory as
// float32, whatever their format; all teams of a warp read the same column at a time, so that a read is one for all of
// them. A block takes neighbouring tokens of one head, which share nearly all columns. No t x t matrix is ever formed:
// the scores compute their few logits anew. Multiplications are plain float32: matrix units are not used.
//
// Compiled as core_attention.cu is, once per shape: -DHEAD_DIM= a multiple of 8 up to 256, -DGROUP= query heads per
// key/value head, -DROW=Half, Bfloat or Float; and of the first two once more with -DPACKED, for P > 1: so that exact
// rows alone pay for no others. plugins/emulation runs the same text on a CPU. None of it has run on a GPU yet.

#include "columns.cuh"

namespace {

constexpr int kColumns = HEAD_DIM <= 128 ? 32 : 16;   // of a tile: at most 32 KB of keys and values
constexpr int kAtOnce = 8;                            // columns between two looks at the peak
constexpr int kUnseen = 0x7fffffff;                   // above the index of every token

// A tile of columns; rows are as wide as all lanes' pieces, so that no lane looks whether a piece is there.
struct Tile {
    float keys[kColumns][kWidth * kPiece];
    float values[kColumns][kWidth * kPiece];
    int order[kColumns];  // the first token that sees the column

    __device__ __forceinline__ Head head(const float (&row)[kWidth * kPiece]) const {
        Head head;
#pragma unroll
        for (int m = 0; m < kMine; ++m)
#pragma unroll
            for (int i = 0; i < kPiece; ++i) head.parts[m][i] = row[(m * kTeam + lane_of_team()) * kPiece + i];
        return head;
    }
};

// An online softmax of one query.
struct Softmax {
    float peak = kLowest, mass = 0;
    Head sum;

    // Adds `kAtOnce` columns of a tile. A column that the query does not see has the logit kLowest.
    __device__ __forceinline__ void add(const Tile& tile, int first, const float (&logits)[kAtOnce]) {
        float higher = peak;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) higher = fmaxf(higher, logits[u]);
        const float shrink = exp2_approx(peak - higher);
        peak = higher;
        mass *= shrink;
        sum.scale(shrink);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const float weight = logits[u] > kLowest ? exp2_approx(logits[u] - peak) : 0;
            mass += weight;
            const Head value = tile.head(tile.values[first + u]);
#pragma unroll
            for (int m = 0; m < kMine; ++m)
#pragma unroll
                for (int i = 0; i < kPiece; ++i) sum.parts[m][i] += weight * value.parts[m][i];
        }
    }
};

// The list that holds entry `index` of what `offsets` cut up; `lists` for room past the last.
__device__ __forceinline__ int owner_of(int index, const int* offsets, int lists) {
    int owner = 0;
    while (owner < lists && offsets[owner + 1] <= index) ++owner;
    return owner;
}

}  // namespace

// One block: neighbouring tokens, a team each, for one query head. A token that sees nothing gets zeros.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_token_attend(const Row* __restrict__ query,         // [t, H, d]
                 const Row* __restrict__ key,           // [t, H_kv, d], of the new tokens
                 const Row* __restrict__ value,         // [t, H_kv, d]
                 const void* __restrict__ pool_keys,    // [R, H_kv, d], with the new rows written; packed: the bytes in
                 const void* __restrict__ pool_values,  // which rows are records, the same memory
                 const int* __restrict__ rows,          // [N], ids of their formats
                 const int* __restrict__ row_offsets,   // [P * B + 1]
                 const int* __restrict__ slots,         // [P, t]; all negative: the token is a column itself
                 const int* __restrict__ token_offsets,  // [B + 1]
                 int tokens, int sequences, int parts, int kv_heads,  // parts: P
                 Row* __restrict__ attended,            // [t, H, d]
                 float* __restrict__ log_sums) {        // [t, H]: log2 of the sum of 2^logit; for avl_token_scores
    __shared__ Tile tile;
    const int head = blockIdx.y, kv_head = head / GROUP, heads = kv_heads * GROUP, formats = kPacks ? parts : 1;
    const int first = blockIdx.x * kTeams, token = first + team_index();
    const long long place = (long long)token * heads + head;
    Head own;
    own.load(query + place * HEAD_DIM, token < tokens);
    own.scale(query_scale());
    Softmax softmax;
    softmax.sum.clear();

    for (int s = 0; s < sequences; ++s) {
        const int begin = token_offsets[s], end = token_offsets[s + 1];
        if (end <= first || begin >= first + kTeams) continue;
        const bool member = begin <= token && token < end;
        const Listed lists = {rows, row_offsets + s, sequences, formats};
        const int listed = lists.count();
        const int columns = listed + min(end, first + kTeams) - begin;  // what the block's last token sees
        for (int at = 0; at < columns; at += kColumns) {
            __syncthreads();  // the last tile has been read
            for (int i = threadIdx.x; i < kColumns * kWidth; i += kThreads) {
                const int column = at + i / kWidth, piece = i % kWidth;
                float keys[kPiece] = {}, values[kPiece] = {};
                Column from = {kNew, begin + column - listed};
                if (column < columns && piece < kPieces) {
                    if (column < listed) from = lists[column];
                    from.load_key(pool_keys, key, kv_heads, kv_head, piece, keys);
                    from.load_value(pool_keys, pool_values, value, kv_heads, kv_head, piece, values);
                }
#pragma unroll
                for (int e = 0; e < kPiece; ++e) {
                    tile.keys[column - at][from.dimension(piece, e)] = keys[e];
                    tile.values[column - at][from.dimension(piece, e)] = values[e];
                }
            }
            for (int i = threadIdx.x; i < kColumns; i += kThreads) {
                const int column = at + i, other = begin + column - listed;
                const bool is_row = column < listed;
                const bool is_token = !is_row && column < columns && !has_slot(slots, tokens, formats, other);
                tile.order[i] = is_row ? -1 : is_token ? other : kUnseen;
            }
            __syncthreads();
            for (int i = 0; i < min(kColumns, columns - at); i += kAtOnce) {
                float logits[kAtOnce];
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) {
                    const float logit = dot(own, tile.head(tile.keys[i + u]));
                    logits[u] = member && tile.order[i + u] <= token ? logit : kLowest;
                }
                softmax.add(tile, i, logits);
            }
        }
    }
    if (token >= tokens) return;
    softmax.sum.scale(softmax.mass > 0 ? 1 / softmax.mass : 0);
    softmax.sum.store(attended + place * HEAD_DIM);
    if (lane_of_team() == 0) log_sums[place] = softmax.mass > 0 ? softmax.peak + log2_approx(softmax.mass) : kLowest;
}

// A team takes a column: first the listed rows, then the tokens. Room past the last row, and tokens with a slot, get 0.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_token_scores(const Row* __restrict__ query,        // as above
                 const Row* __restrict__ key,
                 const void* __restrict__ pool_keys,
                 const int* __restrict__ rows,
                 const int* __restrict__ row_offsets,
                 const int* __restrict__ slots,
                 const int* __restrict__ token_offsets,
                 const int* __restrict__ score_queries,  // [W]: tokens; -1 is nobody
                 const float* __restrict__ log_sums,     // [t, H], as avl_token_attend left it
                 int tokens, int sequences, int parts, int kv_heads,
                 int room, int queries,                  // room: N, queries: W
                 float* __restrict__ row_scores,         // [2, N]: from the last token, and summed over the queries
                 float* __restrict__ token_scores) {     // [2, t]
    const int column = blockIdx.x * kTeams + team_index(), heads = kv_heads * GROUP, formats = kPacks ? parts : 1;
    const bool is_row = column < room, inside = column < room + tokens;
    const int entry = is_row ? column : column - room, lists = is_row ? formats * sequences : sequences;
    const int list = inside ? owner_of(entry, is_row ? row_offsets : token_offsets, lists) : lists;
    const bool there = list < lists && (is_row || !has_slot(slots, tokens, formats, entry));
    const int owner = there ? list % sequences : 0;
    const int begin = there ? token_offsets[owner] : 0, end = there ? token_offsets[owner + 1] : 0;
    const Column from = {is_row ? list / sequences : kNew, there && is_row ? rows[entry] : entry};
    float last = 0, summed = 0;
    for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
        Head own;
        own.load(from, pool_keys, key, kv_heads, kv_head, there);
        for (int q = 0; q <= queries; ++q) {
            const bool is_last = q == queries;
            const int token = is_last ? end - 1 : score_queries[q];
            const bool sees = there && begin <= token && token < end && (is_row || entry <= token);
            for (int head = kv_head * GROUP; head < (kv_head + 1) * GROUP; ++head) {
                const long long place = sees ? (long long)token * heads + head : 0;
                Head asking;
                asking.load_query(from, query + place * HEAD_DIM, sees);
                const float logit = dot(asking, own) * query_scale();
                const float weight = sees ? exp2_approx(logit - log_sums[place]) : 0;
                last += is_last ? weight : 0;
                summed += is_last ? 0 : weight;
            }
        }
    }
    if (!inside || lane_of_team() != 0) return;
    float* scores = is_row ? row_scores : token_scores;
    scores[entry] = last / heads;
    scores[(is_row ? room : tokens) + entry] = summed / heads;
}

// One block: the one new token of a sequence in a step. Without a slot it is no row, but sees itself: its own key
// and value join what avl_merge left. The scores of a token with a slot, in any part, are 0: it is among the rows.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_token_join(const Row* __restrict__ query,          // [t, H, d]
               const Row* __restrict__ key,            // [t, H_kv, d]
               const Row* __restrict__ value,          // [t, H_kv, d]
               const int* __restrict__ slots,          // [P, t]
               const int* __restrict__ score_queries,  // [W]
               int tokens, int parts, int kv_heads, int queries,
               Row* __restrict__ attended,             // [t, H, d], changed in place
               float* __restrict__ log_sums,           // [t, H], likewise
               float* __restrict__ token_scores) {     // [2, t]; null when nobody looks
    __shared__ float of_teams[kTeams];
    const int token = blockIdx.x, heads = kv_heads * GROUP;
    const bool homeless = !has_slot(slots, tokens, parts, token);
    float weights = 0;
    for (int first = 0; homeless && first < heads; first += kTeams) {
        const int head = first + team_index();
        const bool there = head < heads;
        const long long place = (long long)token * heads + head;
        const long long from = ((long long)token * kv_heads + head / GROUP) * HEAD_DIM;
        Head asking, own, result, added;
        asking.load(query + place * HEAD_DIM, there);
        own.load(key + from, there);
        const float before = there ? log_sums[place] : kLowest;
        const float logit = dot(asking, own) * query_scale();
        __syncwarp();  // all lanes of the team have read the old sum
        if (there) {
            const float peak = fmaxf(before, logit);
            const float after = peak + log2_approx(exp2_approx(before - peak) + exp2_approx(logit - peak));
            const float kept = exp2_approx(before - after), weight = exp2_approx(logit - after);
            result.load(attended + place * HEAD_DIM, true);
            added.load(value + from, true);
#pragma unroll
            for (int m = 0; m < kMine; ++m)
#pragma unroll
                for (int i = 0; i < kPiece; ++i)
                    result.parts[m][i] = kept * result.parts[m][i] + weight * added.parts[m][i];
            result.store(attended + place * HEAD_DIM);
            if (lane_of_team() == 0) log_sums[place] = after;
            weights += weight;
        }
    }
    if (!token_scores) return;
    if (lane_of_team() == 0) of_teams[team_index()] = weights;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float mean = 0;
    for (int team = 0; team < kTeams; ++team) mean += of_teams[team];
    mean /= heads;
    int times = 0;
    for (int q = 0; q < queries; ++q) times += score_queries[q] == token;
    token_scores[token] = mean;
    token_scores[tokens + token] = times * mean;
}

// A thread takes a listed row. The one token of its sequence is the last one, and counts as often as it is named.
extern "C" __global__ void __launch_bounds__(kThreads)
avl_token_sums(const int* __restrict__ row_offsets,    // [P * B + 1]
               const int* __restrict__ score_queries,  // [W]
               int sequences, int parts, int room, int queries,
               float* __restrict__ row_scores) {       // [2, N], of which avl_scores left the first line
    const int row = blockIdx.x * kThreads + threadIdx.x;
    if (row >= room) return;
    const int list = owner_of(row, row_offsets, parts * sequences);
    int times = 0;
    for (int q = 0; q < queries; ++q) times += score_queries[q] == list % sequences;
    row_scores[room + row] = list < parts * sequences && times > 0 ? times * row_scores[row] : 0;
}
