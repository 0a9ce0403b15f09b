// Rows in every format: where a row's bytes lie, and how a lane reads its piece of one as floats.
//
// kLanes neighbouring lanes share a head of a row, and each takes a piece of eight elements. A format says
//   dimension(piece, i)   which element of the head is number i of a piece
//   Bits                  a lane's piece as it is stored
//   Load                  the pieces that all lanes of a warp bring at once, in shared memory
// and an object of it is the keys or the values of one head, as one lane reads them:
//   copy(load, row, there)   start the copies of its piece of a row
//   fetch(row)               load it into registers
//   take(load)               what was copied
//   widen(bits, floats)      its elements in float32
//
// Packed rows are records (avl_edge/kv/formats.py): scales, which are halves, then one plane of nibbles, or two in
// int8, the upper ones first; each section begins at a multiple of kUnit bytes, and ids count in units of it. A head
// has d / 2 bytes of a plane, and its byte j holds dimension j in its low half and dimension j + d / 2 in its high
// half. So four bytes of a plane are a piece: four dimensions of the first half, and the four that stand d / 2 further.
// Nibbles become bytes by masks, a byte becomes a float by standing in the mantissa of 2^23, and all products of a
// number with its scale are exact: the values are those of any other decoder.

#pragma once

#include "device.cuh"

namespace {

__device__ constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
__device__ constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

constexpr int kLanes = power_of_two_from(kPieces);  // lanes on one row; those past kPieces hold zeros
constexpr int kRowsAtOnce = 32 / kLanes;            // rows that one load of a warp touches
constexpr int kUnit = 16;                           // bytes: what ids of packed rows count in
constexpr float kLargestScale = 65504;              // of halves

using Row = ROW;

// A row of the model's own type; strides in elements.
struct Exact {
    using Bits = uint4;
    using Load = uint4[32];

    const Row* own;
    int stride;

    __device__ static constexpr int dimension(int piece, int i) { return piece * kPiece + i; }

    __device__ __forceinline__ Exact(const void* rows, int, int head, int piece, int row_stride, int head_stride)
        : own(static_cast<const Row*>(rows) + (long long)head * head_stride + piece * kPiece), stride(row_stride) {}

    __device__ __forceinline__ const Row* at(int row) const { return own + (long long)row * stride; }
    __device__ __forceinline__ void copy(Load& to, int row, bool there) const {
        copy_async(&to[lane_index()], at(row), there);
    }
    __device__ __forceinline__ Bits fetch(int row) const { return *reinterpret_cast<const uint4*>(at(row)); }
    __device__ __forceinline__ static Bits take(const Load& from) { return from[lane_index()]; }
    __device__ __forceinline__ void widen(const Bits& bits, float (&to)[kPiece]) const { ::widen<Row>(bits, to); }
};

// Scales of `group` dimensions each, and numbers of a byte that stand `bias` too high.
struct Int8 {
    static constexpr int kPlanes = 2, kGroup = HEAD_DIM, kBias = 128, kLowest = -127, kHighest = 127;
    struct Pair { unsigned low, high; };  // four dimensions of the first half, and four of the second, a byte each

    // The scale of numbers from `low` to `high`, of which 0 is one.
    __device__ __forceinline__ static float scale(float low, float high) {
        return (high >= -low ? high : -low) / kHighest;
    }
    __device__ __forceinline__ static Pair bytes(const unsigned* planes) {
        return {(planes[0] & 0x0f0f0f0fu) << 4 | (planes[1] & 0x0f0f0f0fu),
                (planes[0] & 0xf0f0f0f0u) | (planes[1] >> 4 & 0x0f0f0f0fu)};
    }
};
// The upper nibbles alone, each as the middle of the 16 numbers that it stands for.
struct CoarseInt8 {
    static constexpr int kPlanes = 1, kGroup = HEAD_DIM, kBias = 128;
    __device__ __forceinline__ static Int8::Pair bytes(const unsigned* planes) {
        return {(planes[0] & 0x0f0f0f0fu) << 4 | 0x08080808u, (planes[0] & 0xf0f0f0f0u) | 0x08080808u};
    }
};
struct Int4 {
    static constexpr int kPlanes = 1, kGroup = common_divisor(HEAD_DIM, 32), kBias = 8, kLowest = -8, kHighest = 7;
    // The number of largest magnitude becomes the lowest.
    __device__ __forceinline__ static float scale(float low, float high) {
        return (high >= -low ? high : low) / kLowest;
    }
    __device__ __forceinline__ static Int8::Pair bytes(const unsigned* planes) {
        return {planes[0] & 0x0f0f0f0fu, planes[0] >> 4 & 0x0f0f0f0fu};
    }
};

// Byte `i` of a word, less `bias`: 2^23 plus a byte is a float whose last bits are that byte.
__device__ __forceinline__ float number(unsigned word, int i, int bias) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650 + i)) - float(0x800000 + bias);
}

// Where the sections of a record begin, in bytes.
template <class Code> struct Record {
    static constexpr int kGroups = HEAD_DIM / Code::kGroup;  // of a head: so many scales it has

    __device__ __forceinline__ static int padded(int bytes) { return ceil_div(bytes, kUnit) * kUnit; }
    __device__ __forceinline__ static int plane(int number, int kv_heads) {
        return padded(2 * kv_heads * kGroups) + number * padded(kv_heads * HEAD_DIM / 2);
    }
    __device__ __forceinline__ static int bytes(int kv_heads) { return plane(Code::kPlanes, kv_heads); }
    __device__ __forceinline__ static int word(int number, int kv_heads, int head, int piece) {
        return plane(number, kv_heads) + head * (HEAD_DIM / 2) + piece * (kPiece / 2);
    }
};

template <class Code> struct Packed {
    // One scale of a head serves both halves of a piece; groups may differ.
    static constexpr int kScales = Record<Code>::kGroups > 1 ? 2 : 1, kWords = Code::kPlanes + kScales;
    struct Bits { unsigned words[kWords]; };  // of the planes, then those that hold the scales
    using Load = unsigned[kWords][32];

    const unsigned char* records;
    int places[kWords];  // of the words in a record
    bool upper[kScales];  // whether the scale is the upper half of its word

    __device__ static constexpr int dimension(int piece, int i) {
        return piece * (kPiece / 2) + i % (kPiece / 2) + i / (kPiece / 2) * (HEAD_DIM / 2);
    }

    __device__ __forceinline__ Packed(const void* rows, int kv_heads, int head, int piece, int, int)
        : records(static_cast<const unsigned char*>(rows)) {
#pragma unroll
        for (int i = 0; i < Code::kPlanes; ++i) places[i] = Record<Code>::word(i, kv_heads, head, piece);
#pragma unroll
        for (int i = 0; i < kScales; ++i) {
            const int scale = head * Record<Code>::kGroups + dimension(piece, i * (kPiece / 2)) / Code::kGroup;
            places[Code::kPlanes + i] = scale / 2 * 4;
            upper[i] = scale % 2;
        }
    }

    __device__ __forceinline__ const unsigned char* at(int row, int word) const {
        return records + (long long)row * kUnit + places[word];
    }
    __device__ __forceinline__ void copy(Load& to, int row, bool there) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) copy_async(&to[i][lane_index()], at(row, i), there);
    }
    __device__ __forceinline__ Bits fetch(int row) const {
        Bits bits;
#pragma unroll
        for (int i = 0; i < kWords; ++i) bits.words[i] = *reinterpret_cast<const unsigned*>(at(row, i));
        return bits;
    }
    __device__ __forceinline__ static Bits take(const Load& from) {
        Bits bits;
#pragma unroll
        for (int i = 0; i < kWords; ++i) bits.words[i] = from[i][lane_index()];
        return bits;
    }
    __device__ __forceinline__ float scale(const Bits& bits, int i) const {
        const float2 pair = unpack(Half{}, bits.words[Code::kPlanes + i]);
        return upper[i] ? pair.y : pair.x;
    }
    __device__ __forceinline__ void widen(const Bits& bits, float (&to)[kPiece]) const {
        const Int8::Pair bytes = Code::bytes(bits.words);
        const float low = scale(bits, 0), high = scale(bits, kScales - 1);
#pragma unroll
        for (int i = 0; i < kPiece / 2; ++i) {
            to[i] = number(bytes.low, i, Code::kBias) * low;
            to[i + kPiece / 2] = number(bytes.high, i, Code::kBias) * high;
        }
    }
};

// How a format is read as a whole, and by a coarse scan of its keys.
template <class Format> struct Reading { using Whole = Packed<Format>; using Coarse = Packed<Format>; };
template <> struct Reading<Exact> { using Whole = Exact; using Coarse = Exact; };
template <> struct Reading<Int8> { using Whole = Packed<Int8>; using Coarse = Packed<CoarseInt8>; };

// A lane's piece of a query in the format's order, scaled so that its product with a key is a logit in units of log 2;
// zeros past the head's end.
template <class Reader>
__device__ __forceinline__ void load_query(const Row* query, int piece, float (&to)[kPiece]) {
    uint4 bits = {0, 0, 0, 0};
    if (piece < kPieces && Reader::dimension(0, kPiece / 2) == kPiece / 2) {  // its elements are neighbours
        bits = *reinterpret_cast<const uint4*>(query + Reader::dimension(piece, 0));
    } else if (piece < kPieces) {
        const uint2 low = *reinterpret_cast<const uint2*>(query + Reader::dimension(piece, 0));
        const uint2 high = *reinterpret_cast<const uint2*>(query + Reader::dimension(piece, kPiece / 2));
        bits = {low.x, low.y, high.x, high.y};
    }
    widen<Row>(bits, to);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[i] *= query_scale();
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

}  // namespace
