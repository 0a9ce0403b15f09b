// What many new tokens see, and how a team of lanes holds a head of it: listed rows of any format, and tokens.
//
// kTeam neighbouring lanes, a team, hold the elements of a head in 16-byte pieces, in turn. Rows that are packed come
// in pieces whose elements stand elsewhere in the head (rows.cuh); only what is compiled with -DPACKED knows of them. A
// format is its number among exact, int8, int4 and int8/int4: keys in the one, values in the other, of which a row is
// one record in the memory of all keys and values.

#pragma once

struct Float { float value; };

#ifdef PACKED
#include "rows.cuh"
#else
#include "device.cuh"
using Row = ROW;
#endif

namespace {

#ifdef PACKED
constexpr bool kPacks = true;
#else
constexpr bool kPacks = false;
#endif
constexpr int kTeam = HEAD_DIM <= 64 ? 2 : HEAD_DIM <= 128 ? 4 : 8;  // lanes
constexpr int kMine = (kPieces + kTeam - 1) / kTeam;  // pieces of a lane; those past kPieces are zeros
constexpr int kWidth = kMine * kTeam;                 // pieces of a team
constexpr int kTeams = kThreads / kTeam;              // of a block
constexpr int kNew = -1;                              // the format of a column that is a token

__device__ __forceinline__ int team_index() { return threadIdx.x / kTeam; }
__device__ __forceinline__ int lane_of_team() { return threadIdx.x % kTeam; }

// A piece of a row in float32.
template <class Narrow> __device__ __forceinline__ void load_piece(const Narrow* from, float (&to)[kPiece]) {
    widen<Narrow>(*reinterpret_cast<const uint4*>(from), to);
}

__device__ __forceinline__ void load_piece(const Float* from, float (&to)[kPiece]) {
#pragma unroll
    for (int i = 0; i < kPiece; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        to[i] = four.x;
        to[i + 1] = four.y;
        to[i + 2] = four.z;
        to[i + 3] = four.w;
    }
}

template <class Narrow> __device__ __forceinline__ void store_piece(Narrow* to, const float (&from)[kPiece]) {
    *reinterpret_cast<uint4*>(to) = {pack(Narrow{}, from[0], from[1]), pack(Narrow{}, from[2], from[3]),
                                     pack(Narrow{}, from[4], from[5]), pack(Narrow{}, from[6], from[7])};
}

__device__ __forceinline__ void store_piece(Float* to, const float (&from)[kPiece]) {
#pragma unroll
    for (int i = 0; i < kPiece; i += 4)
        *reinterpret_cast<float4*>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
}

// Where a column lies: a row of a format by its id, or a new token by its index.
struct Column {
    int format, index;

    // Which element of a head is number `i` of a piece.
    __device__ __forceinline__ int dimension(int piece, int i) const {
#ifdef PACKED
        if (format > 0) return Packed<Int8>::dimension(piece, i);  // and Int4's
#endif
        return piece * kPiece + i;
    }

    // A piece of one head: of the keys of the pool and of the new tokens.
    __device__ __forceinline__ void load_key(const void* pool, const Row* tokens, int kv_heads, int kv_head, int piece,
                                             float (&to)[kPiece]) const {
#ifdef PACKED
        if (format == 1 || format == 3) return load_packed<Int8>(pool, kv_heads, kv_head, piece, to);
        if (format == 2) return load_packed<Int4>(pool, kv_heads, kv_head, piece, to);
#endif
        load_exact(pool, tokens, kv_heads, kv_head, piece, to);
    }

    // The same of the values; `keys` are those of the pool.
    __device__ __forceinline__ void load_value([[maybe_unused]] const void* keys, const void* pool, const Row* tokens,
                                               int kv_heads, int kv_head, int piece, float (&to)[kPiece]) const {
#ifdef PACKED
        if (format == 1) return load_packed<Int8>(pool, kv_heads, kv_head, piece, to);
        if (format == 2) return load_packed<Int4>(pool, kv_heads, kv_head, piece, to);
        if (format == 3) {
            const void* behind = static_cast<const unsigned char*>(keys) + Record<Int8>::bytes(kv_heads);
            return load_packed<Int4>(behind, kv_heads, kv_head, piece, to);
        }
#endif
        load_exact(pool, tokens, kv_heads, kv_head, piece, to);
    }

    // A piece of a query whose elements are to meet those.
    __device__ __forceinline__ void load_query(const Row* query, int piece, float (&to)[kPiece]) const {
#ifdef PACKED
        if (format > 0) {
            const uint2 low = *reinterpret_cast<const uint2*>(query + dimension(piece, 0));
            const uint2 high = *reinterpret_cast<const uint2*>(query + dimension(piece, kPiece / 2));
            return widen<Row>({low.x, low.y, high.x, high.y}, to);
        }
#endif
        load_piece(query + piece * kPiece, to);
    }

private:
    __device__ __forceinline__ void load_exact(const void* pool, const Row* tokens, int kv_heads, int kv_head,
                                               int piece, float (&to)[kPiece]) const {
        const Row* from = format == kNew ? tokens : static_cast<const Row*>(pool);
        load_piece(from + ((long long)index * kv_heads + kv_head) * HEAD_DIM + piece * kPiece, to);
    }
#ifdef PACKED
    template <class Code>
    __device__ __forceinline__ void load_packed(const void* pool, int kv_heads, int kv_head, int piece,
                                                float (&to)[kPiece]) const {
        const Packed<Code> reader(pool, kv_heads, kv_head, piece, 0, 0);
        reader.widen(reader.fetch(index), to);
    }
#endif
};

// The row lists of a sequence, as if they were one, part by part.
struct Listed {
    const int *rows, *offsets;  // those of the sequence in the first part; in the next one they are `sequences` further
    int sequences, formats;

    __device__ __forceinline__ int count(int format) const {
        return offsets[format * sequences + 1] - offsets[format * sequences];
    }
    __device__ __forceinline__ int count() const {
        int sum = 0;
        for (int format = 0; format < formats; ++format) sum += count(format);
        return sum;
    }
    __device__ __forceinline__ Column operator[](int place) const {
        int format = 0;
        for (; format < formats - 1 && place >= count(format); ++format) place -= count(format);
        return {format, rows[offsets[format * sequences] + place]};
    }
};

__device__ __forceinline__ bool has_slot(const int* slots, int tokens, int formats, int token) {
    bool found = false;
    for (int format = 0; format < formats; ++format) found |= slots[format * tokens + token] >= 0;
    return found;
}

// One head of a row, spread over a team.
struct Head {
    float parts[kMine][kPiece];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < kMine; ++m)
#pragma unroll
            for (int i = 0; i < kPiece; ++i) parts[m][i] = 0;
    }

    // Zeros if not `there`.
    __device__ __forceinline__ void load(const Row* from, bool there) {
        clear();
#pragma unroll
        for (int m = 0; m < kMine; ++m)
            if (const int piece = m * kTeam + lane_of_team(); there && piece < kPieces)
                load_piece(from + piece * kPiece, parts[m]);
    }

    // A column's key, and a query that is to meet it.
    __device__ __forceinline__ void load(const Column& from, const void* pool, const Row* tokens, int kv_heads,
                                         int kv_head, bool there) {
        clear();
#pragma unroll
        for (int m = 0; m < kMine; ++m)
            if (const int piece = m * kTeam + lane_of_team(); there && piece < kPieces)
                from.load_key(pool, tokens, kv_heads, kv_head, piece, parts[m]);
    }
    __device__ __forceinline__ void load_query(const Column& like, const Row* query, bool there) {
        clear();
#pragma unroll
        for (int m = 0; m < kMine; ++m)
            if (const int piece = m * kTeam + lane_of_team(); there && piece < kPieces)
                like.load_query(query, piece, parts[m]);
    }

    __device__ __forceinline__ void store(Row* to) const {
#pragma unroll
        for (int m = 0; m < kMine; ++m)
            if (const int piece = m * kTeam + lane_of_team(); piece < kPieces)
                store_piece(to + piece * kPiece, parts[m]);
    }

    __device__ __forceinline__ void scale(float factor) {
#pragma unroll
        for (int m = 0; m < kMine; ++m)
#pragma unroll
            for (int i = 0; i < kPiece; ++i) parts[m][i] *= factor;
    }
};

// The sum over a team, in all of its lanes; all lanes of a warp must call.
__device__ __forceinline__ float sum_over_team(float value) {
#pragma unroll
    for (int mask = kTeam / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAll, value, mask);
    return value;
}

__device__ __forceinline__ float dot(const Head& a, const Head& b) {
    float sum = 0;
#pragma unroll
    for (int m = 0; m < kMine; ++m)
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sum += a.parts[m][i] * b.parts[m][i];
    return sum_over_team(sum);
}

}  // namespace
